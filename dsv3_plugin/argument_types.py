"""Numbers that programs take on their command line, as types of `argparse`, which prints the error that each raises."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> int:
    """A count of one at least."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1")
    return number


def from_zero(text: str) -> int:
    """A count, which may be none."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number}: at least 0")
    return number


def seed(text: str) -> int:
    """What every generator of random numbers takes, NumPy's, too."""
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number}: from 0 to {2**32 - 1}")
    return number


def share(text: str) -> float:
    """A part of a whole."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text}: from 0 to 1")
    return number


def not_negative(text: str) -> float:
    """A weight of a loss or a bound, which zero leaves out."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: zero or above, and finite")
    return number


def above_zero(text: str) -> float:
    """A temperature or a learning rate."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: above zero, and finite")
    return number
