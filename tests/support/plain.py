"""What several contracts write out, in plain Python: rounding on fractions, sums one addition after the other."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

BF16_BITS, FP32_BITS = 8, 24
"""Bits of the significand."""


def rounded(x: Fraction, bits: int = FP32_BITS) -> Fraction:
    """`x` rounded to nearest, ties to even, to `bits` of significand; fp32's and bf16's smallest normal exponent."""
    if x == 0:
        return x
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, -126) - bits + 1)
    return round(x / step) * step


def plain_fold(values: list[np.float32], lanes: int) -> np.float32:
    """`fold_sum` as its docstring tells it, one addition after the other."""
    total = [np.float32(0)] * lanes
    for i, value in enumerate(values):
        total[i % lanes] = value if i < lanes else total[i % lanes] + value
    while lanes > 1:
        lanes //= 2
        total = [total[i] + total[i + lanes] for i in range(lanes)]
    return total[0]


def plain_row_sum(values: list[np.float32]) -> np.float32:
    """`sum_row` as its docstring tells it, one addition after the other."""
    while len(values).bit_count() != 1:
        values = [*values, np.float32(0)]
    while len(values) > 1024:
        half = len(values) // 2
        values = [low + high for low, high in zip(values[:half], values[half:], strict=True)]
    while len(values) > 1:
        values = [left + right for left, right in zip(values[::2], values[1::2], strict=True)]
    return values[0]
