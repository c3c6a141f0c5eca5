"""All steps of a comparison, its verdict in one line, and its printed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from dsv3_plugin.diff.formulas import compare_formulas
from dsv3_plugin.diff.inputs import compare_inputs
from dsv3_plugin.diff.layers import compare_layers
from dsv3_plugin.diff.sides import Pair, Side, matched
from dsv3_plugin.diff.steps import Step
from dsv3_plugin.diff.summary import FIGURES, summarize
from dsv3_plugin.diff.weights import compare_weights
from dsv3_plugin.errors import DiffError


@dataclass(frozen=True)
class Diff:
    """A whole comparison."""

    left: str
    right: str
    steps: tuple[Step, ...]
    about: dict[str, tuple[str | None, str | None]]
    """What the sides say of themselves that is not the same."""
    summary: dict[str, Any]
    stale_only: bool
    """Whether only samples differ whose weights were older on one side."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs, as far as it could be looked at."""
        everything = self.summary["all"]
        return everything["equal"] == everything["tokens"] and not self.cause

    @property
    def cause(self) -> Step | None:
        """The first step that differs: what comes after may follow from it."""
        return next((step for step in self.steps if step.outcome == "different"), None)

    @property
    def verdict(self) -> str:
        """In one line."""
        tokens, equal = self.summary["all"]["tokens"], self.summary["all"]["equal"]
        if self.equal:
            rows = next((step.found["rows"] for step in self.steps if "rows" in step.found), 0)
            also = f" and {rows:,} rows" if rows else ""
            return f"EQUAL: {tokens:,} log-probabilities{also}, bit for bit"
        share = f"{tokens - equal:,} of {tokens:,} log-probabilities differ" if equal < tokens else "no number differs"
        if self.cause is not None:
            return f"DIFFERENT: {self.cause.name}: {self.cause.says[0]} ({share})"
        if self.stale_only:
            return f"DIFFERENT: versions: only samples of older weights differ ({share})"
        if self.steps[-1].outcome == "equal":
            return f"DIFFERENT: {share}; {self.steps[-1].says[0]}"
        unknown = [step.name for step in self.steps if step.outcome == "unknown"]
        return f"DIFFERENT: {share}; not looked at for want of data: {', '.join(unknown) or 'nothing'}"

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "verdict": self.verdict,
            "equal": self.equal,
            "cause": self.cause.name if self.cause else None,
            "left": self.left,
            "right": self.right,
            "steps": [step.record() for step in self.steps],
            "about": self.about,
            "summary": self.summary,
        }


def compare(left: Side, right: Side, device: str = "cpu") -> Diff:
    """Compare two sides in all steps. `device`: where the testees' formulas ran, since another one's round otherwise.

    Raises `DiffError` where they have nothing in common.
    """
    if left.name == right.name:
        left, right = replace(left, name=f"{left.name} (first)"), replace(right, name=f"{right.name} (second)")
    pairs = matched(left, right)
    steps = (
        compare_inputs(left, right, pairs),
        compare_weights(left, right),
        compare_formulas(left, right, pairs, device),
        compare_layers(left, right),
    )
    summary = summarize(pairs)
    if not summary["all"]["tokens"] and all(step.outcome != "different" and "rows" not in step.found for step in steps):
        raise DiffError(f"{left.name} and {right.name} have no log-probability and no row of the same token")
    return Diff(left.name, right.name, steps, _about(left, right), summary, _stale_only(pairs))


def _stale_only(pairs: Sequence[Pair]) -> bool:
    different = [pair for pair in pairs if not _equal(pair)]
    return bool(different) and all(pair.staleness for pair in different)


def _equal(pair: Pair) -> bool:
    left, right = pair.logprobs()
    return bool((left == right).all())


def _about(left: Side, right: Side) -> dict[str, tuple[str | None, str | None]]:
    found = {}
    for what in ("versions", "kernels", "settings"):
        one, two = getattr(left.about, what), getattr(right.about, what)
        for name in sorted(one.keys() | two.keys()):
            if one.get(name) != two.get(name):
                a, b = (None if value is None else str(value) for value in (one.get(name), two.get(name)))
                found[f"{what}.{name}"] = (a, b)
    return found


_MARKS = {"equal": "[green]same[/]     ", "different": "[red]different[/]", "unknown": "[yellow]unknown[/]  "}


def print_diff(diff: Diff, console: Console) -> None:
    """Print all steps, the figures and, last, the verdict."""

    def out(text: str, **style: Any) -> None:
        console.print(text, highlight=False, soft_wrap=True, **style)

    for number, step in enumerate(diff.steps, 1):
        out(f"{number} {step.name:8} {_MARKS[step.outcome]}  ", end="")
        for i, text in enumerate(step.says):
            out(" " * 23 * bool(i) + text, markup=False)
    if diff.about:
        table = Table(title="What the sides say of themselves, and is not the same", title_justify="left")
        for column in ("", diff.left, diff.right):
            table.add_column(column, overflow="fold")
        for name, values in diff.about.items():
            table.add_row(name, *(value or "-" for value in values))
        console.print(table)
    if diff.summary["all"]["tokens"]:
        console.print(_figures(diff.summary))
    out(diff.verdict, style="green bold" if diff.equal else "red bold", markup=False)


def _figures(summary: dict[str, Any]) -> Table:
    columns = {"all": summary["all"]}
    for what, label in (("by_version", "version"), ("by_staleness", "staleness")):
        if len(summary[what]) > 1:
            columns |= {f"{label} {name}": found for name, found in summary[what].items()}
    table = Table(title="Log-probabilities, a of the first side and b of the second", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    table.add_column("")
    table.add_row("tokens", *(f"{found['tokens']:,}" for found in columns.values()))
    table.add_row("exactly equal", *(_share(found) for found in columns.values()))
    for name, meaning in FIGURES.items():
        table.add_row(name, *(f"{found[name]:.6g}" if name in found else "" for found in columns.values()), meaning)
    return table


def _share(found: dict[str, float]) -> str:
    if not found["tokens"]:
        return "-"
    # Never 100 % where one differs.
    return f"{int(10000 * found['equal'] / found['tokens']) / 100:g} %"
