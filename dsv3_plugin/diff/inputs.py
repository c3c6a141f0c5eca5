"""The first step: do both sides speak of the same tokens, under the same settings?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_plugin.diff.sides import Pair, Side
from dsv3_plugin.diff.steps import Step, counted

SETTINGS = ("temperature", "top_p", "top_k", "min_p")
SHIFT_FACTOR = 10.0
"""Log-probabilities are taken to be shifted where that makes them so many times closer on average."""


def compare_inputs(left: Side, right: Side, pairs: Sequence[Pair]) -> Step:
    """Samples that one side lacks, token ids, positions, masks, log-probabilities that are one token off, missing or
    NaN, and settings. Samples of other versions of the weights are named, and no difference by themselves: a loop may
    be asynchronous.
    """
    problems: dict[str, list[str]] = {}
    for pair in pairs:
        for kind, text in _problems(pair, left.chooses_tokens and right.chooses_tokens).items():
            problems.setdefault(kind, []).append(f"sample {pair.left.id}: {text}")
    says = [f"{kind}: {counted(len(texts), 'sample')}, first {texts[0]}" for kind, texts in problems.items()]
    found: dict[str, Any] = {kind: {"samples": len(texts), "first": texts[0]} for kind, texts in problems.items()}
    if missing := left.samples.keys() ^ right.samples.keys():
        says.append(f"samples: {counted(len(missing), 'sample')} only one side has, first {min(missing)}")
        found["samples"] = {"samples": len(missing), "first": min(missing)}
    stale = Counter(pair.staleness for pair in pairs if pair.staleness)
    versions = [f"versions: {counted(n, 'sample')} of weights {k:+d} updates older" for k, n in sorted(stale.items())]
    if says:
        return Step("inputs", "different", (*says, *versions), found)
    same = f"tokens, masks and settings of {counted(len(pairs), 'sample')} are the same"
    return Step("inputs", "equal", (same, *versions))


def _problems(pair: Pair, chosen: bool) -> dict[str, str]:
    """Kind of difference to what it is, in the order in which one causes another."""
    a, b = pair.left, pair.right
    found = {}
    if not chosen and (text := _sequence(a.token_ids, b.token_ids, "token")):
        found["token ids"] = text
    elif a.positions != b.positions and (text := _positions(pair)):
        found["positions"] = text
    elif not chosen and (text := _sequence(a.mask, b.mask, "mask")):
        found["mask"] = text
    elif (shift := shift_of(pair)) is not None:
        where = "later" if shift > 0 else "earlier"
        found["shift by one"] = f"the second side's log-probabilities are the first's, one token {where}"
    if pair.missing:
        found["no log-probability"] = _where("none", pair, pair.missing, lambda value: value is None)
    if nan := [i for i in pair.tokens if _is_nan(a.logprobs[i]) or _is_nan(b.logprobs[i])]:
        found["not a number"] = _where("NaN", pair, nan, _is_nan)
    for name in SETTINGS:
        if getattr(a, name) != getattr(b, name):
            found[name] = f"{getattr(a, name)} and {getattr(b, name)}"
    return found


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)


def _where(what: str, pair: Pair, indices: Sequence[int], is_so: Callable[[float | None], bool]) -> str:
    """For how many tokens some side has no number, and which side for the first."""
    first = indices[0]
    left, right = is_so(pair.left.logprobs[first]), is_so(pair.right.logprobs[first])
    whose = "both sides" if left and right else "the first side" if left else "the second side"
    return f"{what} for {counted(len(indices), 'token')} with mask 1, first at index {first}, on {whose}"


def _sequence(a: tuple[int, ...], b: tuple[int, ...], what: str) -> str | None:
    if a == b:
        return None
    for one, two, where in ((a, b, "later"), (b, a, "earlier")):
        if len(a) == len(b) > 1 and one[:-1] == two[1:] and one[1:] != one[:-1]:
            return f"the second side's {what}s are the first's, one token {where}"
    index = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    if index == min(len(a), len(b)):
        return f"{len(a)} and {len(b)} {what}s, equal as far as both go"
    return f"{what} {a[index]} and {b[index]} at index {index}"


def _positions(pair: Pair) -> str | None:
    plain = tuple(range(len(pair.left.token_ids)))
    return _sequence(pair.left.positions or plain, pair.right.positions or plain, "position")


def shift_of(pair: Pair) -> int | None:
    """1 where the right side's log-probabilities are the left's one token later, -1 one earlier; None: as they are."""

    def distance(shift: int) -> float:
        """Mean difference between the left's value at each counted token and the right's `shift` tokens later."""
        differences = []
        for i in pair.tokens:
            j = i + shift
            if 0 <= j < len(pair.right.logprobs):
                one, two = pair.left.logprobs[i], pair.right.logprobs[j]
                if one is not None and two is not None and pair.right.mask[j]:
                    differences.append(abs(one - two))
        # Some tokens at least: two numbers may be alike by chance.
        return sum(differences) / len(differences) if len(differences) >= 3 else math.inf

    aligned = distance(0)
    return next((shift for shift in (1, -1) if SHIFT_FACTOR * distance(shift) < aligned < math.inf), None)
