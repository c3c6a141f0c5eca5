"""The fourth step: the first module, or operation, whose row differs; and how often the router chose otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dsv3_plugin.conformance.compare import Comparison, Difference, RowFile, bits, compare_case, matched_rows
from dsv3_plugin.conformance.taps import ROUTER_CHOICES, operation_of
from dsv3_plugin.diff.sides import Side
from dsv3_plugin.diff.steps import Step, counted


def compare_layers(left: Side, right: Side) -> Step:
    """Compare the rows of each case that both sides ran."""
    cases = [case for case in left.rows if case in right.rows]
    if not cases:
        how = "dsv3 diff --testee A --testee B --checkpoint C computes and compares them"
        return Step("layers", "unknown", (f"no rows of layers to compare; {how}",))
    compared = [compare_case(case, (left.name, left.rows[case]), (right.name, right.rows[case])) for case in cases]
    flips = [text for case in cases if (text := _flips(case, left.rows[case], right.rows[case]))]
    rows = sum(c.equal_rows + c.different_rows for c in compared)
    if not rows:
        return Step("layers", "unknown", ("the sides computed no row of the same tokens",))
    first = next((c for c in compared if c.different_rows), None)
    if first is None:
        says = f"{counted(rows, 'row')} of logits and layers are the same, bit for bit"
        return Step("layers", "equal", (says,), {"rows": rows, "different": 0})
    different = sum(c.different_rows for c in compared)
    return Step(
        "layers",
        "different",
        (*_blame(left, right, first), f"{different:,} of {rows:,} rows differ", *flips),
        {"rows": rows, "different": different, "case": first.case, "first": _record(left, right, first)},
    )


def _blame(left: Side, right: Side, comparison: Comparison) -> list[str]:
    found = comparison.first_difference
    if found is None:
        return [f"case {comparison.case}: {comparison.describe()}"]
    where = f"request {found.request}, position {found.position}, column {found.column}"
    op = operation_of(found.stream)
    what = f"operation {op} in {found.stream.partition('/')[0]}" if op else f"{found.stream}"
    says = [
        f"{what} is the first to differ (case {comparison.case}, {where}):"
        f" {found.left!r} ({found.left_bits}) and {found.right!r} ({found.right_bits}), {found.ulps} ulp apart"
    ]
    if op is not None:
        says.append(f"{op} is computed by {_kernel(left, op)} in {left.name}, by {_kernel(right, op)} in {right.name}")
    return says


def _kernel(side: Side, op: str) -> str:
    return side.about.kernels.get(op, "what it does not tell")


def _record(left: Side, right: Side, comparison: Comparison) -> dict[str, Any] | None:
    found = comparison.first_difference
    if found is None:
        return None
    op = operation_of(found.stream)
    by = {side.name: _kernel(side, op) for side in (left, right)} if op else None
    return asdict(found) | {"operation": op, "implementations": by}


def first_difference(step: Step) -> tuple[str, Difference] | None:
    """Of `compare_layers`: the case and the first difference."""
    if not step.found.get("first"):
        return None
    fields = {name: step.found["first"][name] for name in Difference.__dataclass_fields__}
    return step.found["case"], Difference(**fields)


def _flips(case: str, left: RowFile, right: RowFile) -> str | None:
    """Tokens whose experts are others, by layer: a flip shows much in what follows, however small its cause."""
    flipped: dict[str, int] = {}
    total = 0
    for stream in _choices(left.streams, right.streams):
        pairs = matched_rows(stream, left, right)
        one, two = left.values(stream), right.values(stream)
        count = sum(not bool((bits(one[i]) == bits(two[j])).all()) for i, j in pairs)
        total += len(pairs)
        if count:
            flipped[stream.partition("/")[0]] = count
    if not flipped:
        return None
    layers = ", ".join(f"{count} in {layer}" for layer, count in flipped.items())
    return f"routing flips in case {case}: {sum(flipped.values())} of {total:,} choices of experts ({layers})"


def _choices(left: Sequence[str], right: Sequence[str]) -> list[str]:
    return [stream for stream in left if stream in right and stream.endswith(ROUTER_CHOICES)]
