"""A run's report for people and for machines: the terminal's summary, one HTML page, Markdown, JUnit.

All of them say the same: what served, which rows are equal, the first difference, and what is not claimed.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv3_plugin.conformance.card import Card, cards
from dsv3_plugin.conformance.layouts import ONE_RANK as _ONE_RANK
from dsv3_plugin.conformance.plot import drift_plot
from dsv3_plugin.conformance.traps import FEATURES
from dsv3_plugin.conformance.verdicts import SPECIFICATION, CaseVerdict, Report

ONE_RANK = str(_ONE_RANK)
MOST_DIFFERENCES = 200
"""That the page and the terminal tell; the rest is in the JSON."""


def claimed(report: Report) -> list[Card]:
    """What is claimed of the versions that ran, each claim with what this run shows of it: a claim that it did not test
    is said to be not tested.
    """
    tried = {(result.testee, package) for result in report.results.values() for package in result.versions}
    of_these = [claims for claims in report.claims if (claims.testee, claims.package) in tried]
    return [card for claims in of_these for card in cards(claims, [report.to_json()])]


def untested(card: Card) -> str:
    """The claims that a run did not test, in words."""
    lines = [line for line in card.lines if line.status == "not tested"]
    return ", ".join(line.profile if line.layout == ONE_RANK else f"{line.profile} {line.layout}" for line in lines)


def not_claimed(report: Report) -> tuple[str, ...]:
    """What a reader might take a run for, and it is not."""
    layouts = [result.layout for result in report.results.values() if result.layout != ONE_RANK]
    return (
        "equality with other versions of dsv3-plugin, torch or the CPU's matrix library",
        "equality between kinds of device, or with engines' own DeepSeek-V3",
        "tensor, pipeline or expert parallel layouts" + (" but those that were run" if layouts else ""),
        "which tokens an engine's random numbers draw",
    )


@dataclass(frozen=True)
class LayoutCell:
    """A testee in one layout."""

    equal: int
    """Rows, of all ranks, equal to those of one rank: the specification's."""
    different: int
    declined: tuple[str, ...]
    """Cases that it cannot run so, each with the reason."""


def layout_matrix(report: Report) -> dict[str, dict[str, LayoutCell]]:
    """Testee and layout to what came of it; empty where only one rank was asked for."""
    matrix: dict[str, dict[str, LayoutCell]] = {}
    for name, result in report.results.items():
        comparisons = [c for v in report.verdicts if (c := v.between(SPECIFICATION, name)) is not None]
        declined = tuple(
            f"{verdict.case.name}: {next(iter(verdict.unsupported[name].values()))}"
            for verdict in report.verdicts
            if verdict.declined_by(name)
        )
        equal, different = sum(c.equal_rows for c in comparisons), sum(c.different_rows for c in comparisons)
        matrix.setdefault(result.testee, {})[result.layout] = LayoutCell(equal, different, declined)
    return matrix if any(result.layout != ONE_RANK for result in report.results.values()) else {}


def print_report(report: Report, console: Console) -> None:
    """Print the summary of a run."""
    for name, result in report.results.items():
        versions = ", ".join(f"{package} {version}" for package, version in result.versions.items())
        console.print(f"[bold]{name}[/bold]: {result.served.model_class} ({versions})", highlight=False)
        if result.served.draft_class:
            console.print(f"    draft: {result.served.draft_class}", highlight=False)
        if result.schedule_not_followed:
            console.print(f"    schedules not followed: {result.schedule_not_followed}", highlight=False)
        kernels = sorted(set(result.served.kernels.values()))
        console.print(
            f"    profile {result.served.profile}, kernels: {', '.join(kernels) or 'unknown'}", highlight=False
        )
    console.print(_table(report))
    if matrix := layout_matrix(report):
        _print_layouts(matrix, console)
    for closeness in report.closeness:
        for line in closeness.describe():
            console.print(line, highlight=False)
    for verdict in report.verdicts:
        _print_problems(verdict, console)
    for problem in (*report.problems, *report.overdue):
        console.print(f"[red]{problem}[/red]", highlight=False)
    for failure, entry in report.expected:
        console.print(f"[yellow]{failure.case}, {failure.testee}[/]: expected: {entry.reason}", highlight=False)
    for entry in report.untried:
        console.print(f"Not in this run, though expected: {entry}", style="dim", highlight=False)
    for card in claimed(report):
        if text := untested(card):
            told = f"Claimed of {card.testee} {card.version} and not tested in this run: {text}."
            console.print(told, style="dim", highlight=False)
    if traps := report.guarded:
        names = ", ".join(trap.name for trap, _ in traps)
        told = f"{_count(len(traps), 'known mistake')} would have shown: {names}."
        console.print(told, style="dim", highlight=False)
    console.print("Not claimed: " + "; ".join(not_claimed(report)) + ".", style="dim", highlight=False)
    style = "red bold" if not report.passed else "yellow bold" if falls_short(report) else "green bold"
    console.print(headline(report), style=style, highlight=False)


def headline(report: Report) -> str:
    """The run in one sentence."""
    comparisons = [c for v in report.verdicts for c in v.comparisons]
    equal, different = sum(c.equal_rows for c in comparisons), sum(c.different_rows for c in comparisons)
    logprobs = [c for v in report.verdicts for c in v.logprobs if report.results[c.testee].claim == "equality"]
    equal_logprobs, different_logprobs = sum(c.equal for c in logprobs), sum(c.different for c in logprobs)
    if report.passed and report.expected:
        text = f"{equal:,} rows and {equal_logprobs:,} log-probabilities equal, bit for bit ({report.profile})"
        text += f"; {_count(len(report.expected), 'case')} failed as expected"
    elif report.passed and comparisons:
        text = f"All {equal:,} rows and {equal_logprobs:,} log-probabilities equal, bit for bit ({report.profile})"
    elif report.passed:
        text = f"Nothing claims equality ({report.profile})"
    else:
        text = f"FAILED: {different:,} of {equal + different:,} rows differ ({report.profile})"
        if not comparisons:
            text = f"FAILED ({report.profile}): what claims closeness is far"
        if different_logprobs:
            text += f", and {different_logprobs:,} of {equal_logprobs + different_logprobs:,} log-probabilities"
    for closeness in report.closeness if report.passed else ():
        text += f"; {closeness.testee} is close in {closeness.distance.rows:,} rows"
    if count := declined(report):
        text += f"; nothing is known of {_count(count, 'request')} declined as unsupported"
    return text + "."


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def falls_short(report: Report) -> bool:
    """Whether a run that passed says less than that all is equal."""
    return declined(report) > 0 or bool(report.expected)


def declined(report: Report) -> int:
    """Requests that some testee cannot do."""
    return sum(len(of_testee) for verdict in report.verdicts for of_testee in verdict.unsupported.values())


def to_html(report: Report) -> str:
    """The report as one page that needs no other file."""
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("report.html.jinja")
    return page.render(
        report=report,
        headline=headline(report),
        not_claimed=not_claimed(report),
        layouts=layout_matrix(report),
        claimed=claimed(report),
        features=FEATURES,
        drift_plot=drift_plot,
        differences=_differences(report),
        most_differences=MOST_DIFFERENCES,
        by_reason=_by_reason,
    )


def _differences(report: Report) -> list[tuple[str, str]]:
    """Everything that is wrong in a case: where, and what."""
    found: list[tuple[str, str]] = []
    for verdict in report.verdicts:
        name = verdict.case.name
        found += [(name, problem) for problem in verdict.problems]
        found += [(f"{name}, {c.testee}", c.describe()) for c in verdict.logprobs if c.different]
        found += [(f"{name}, {c.left} and {c.right}", c.describe()) for c in verdict.comparisons if not c.equal]
    return found


def to_markdown(report: Report) -> str:
    """The report as Markdown, short enough for the summary of a CI step."""
    names = list(report.results)
    lines = [f"### {'✅' if report.passed else '❌'} {headline(report)}", ""]
    lines += [f"| case | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for verdict in report.verdicts:
        cells = [_plain(_cell(name, verdict, report)) for name in names]
        lines.append(f"| {'' if verdict.passed else '❌ '}{verdict.case.title} | {' | '.join(cells)} |")
    found = [*report.problems, *report.overdue]
    found += [f"{failure.case}, {failure.testee}: {text}" for failure in report.unexpected for text in failure.found]
    lines += ["", *(f"* {text}" for text in found)] if found else []
    expected = [f"* {failure.case}, {failure.testee}: {entry.reason}" for failure, entry in report.expected]
    lines += ["", "Fails as expected:", "", *expected] if expected else []
    served = [f"{name}: `{result.served.model_class}`" for name, result in report.results.items()]
    lines += ["", f"Served: {'; '.join(served)}. Not claimed: {'; '.join(not_claimed(report))}."]
    lines += ["", f"`{report.command}`"]
    return "\n".join(lines) + "\n"


def _plain(cell: str) -> str:
    return Text.from_markup(cell).plain.replace("\n", "<br>")


def to_junit(report: Report) -> str:
    """The report as JUnit XML: a test for each case and pair, and one for each thing that was wrong beside the bits."""
    suite = ElementTree.Element("testsuite", name=f"dsv3-plugin conformance: {report.checkpoint} ({report.profile})")
    failures = 0
    expected = {(failure.testee, failure.case): entry.reason for failure, entry in report.expected}

    def add(case: str, name: str, failure: str | None, *testees: str) -> None:
        nonlocal failures
        test = ElementTree.SubElement(suite, "testcase", classname=f"conformance.{case}", name=name)
        reason = next((expected[testee, case] for testee in testees if (testee, case) in expected), None)
        if failure is not None and reason is not None:
            ElementTree.SubElement(test, "skipped", message=f"fails as expected ({reason}): {failure}")
        elif failure is not None:
            failures += 1
            ElementTree.SubElement(test, "failure", message=failure)

    for verdict in report.verdicts:
        for comparison in verdict.comparisons:
            name = f"{comparison.left} = {comparison.right}, {comparison.equal_rows:,} rows"
            failure = None if comparison.equal else comparison.describe()
            add(verdict.case.name, name, failure, comparison.left, comparison.right)
        for logprobs in verdict.logprobs:
            name = f"{logprobs.testee}, {logprobs.equal:,} log-probabilities"
            add(verdict.case.name, name, logprobs.describe() if logprobs.different else None, logprobs.testee)
        for name, requests in verdict.unsupported.items():
            for index, reason in requests.items():
                test = ElementTree.SubElement(
                    suite, "testcase", classname=f"conformance.{verdict.case.name}", name=f"{name}, request {index}"
                )
                ElementTree.SubElement(test, "skipped", message=reason)
        at_fault = [testee for fault in verdict.faults for testee in fault.testees]
        add(verdict.case.name, "the case was run as it says", "; ".join(verdict.problems) or None, *at_fault)
    for closeness in report.closeness:
        name = f"{closeness.testee} is close, {closeness.distance.rows:,} rows"
        add("closeness", name, "; ".join(closeness.beyond()) or None)
    add("served", "every testee served what it should", "; ".join((*report.problems, *report.overdue)) or None)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(failures))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _print_layouts(matrix: dict[str, dict[str, LayoutCell]], console: Console) -> None:
    layouts = list(dict.fromkeys(layout for row in matrix.values() for layout in row))
    table = Table(title="Rows of every rank equal to one rank's", title_justify="left")
    table.add_column("testee")
    for layout in layouts:
        table.add_column("one rank" if layout == ONE_RANK else layout, justify="right")
    for testee, row in matrix.items():
        cells = []
        for layout in layouts:
            cell = row.get(layout)
            text = "" if cell is None else f"[green]{cell.equal:,}[/]"
            if cell is not None and cell.different:
                text = f"[red]{cell.different:,} differ[/]"
            cells.append(text + (f"\n[yellow]{len(cell.declined)} cases declined[/]" if cell and cell.declined else ""))
        table.add_row(testee, *cells)
    console.print(table)


def _by_reason(requests: dict[int, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for index, reason in requests.items():
        reasons.setdefault(reason, []).append(str(index))
    return reasons


def _table(report: Report) -> Table:
    """A row a case, a column a testee: rows equal to every other side, or how many are not."""
    table = Table(title=f"{report.checkpoint} ({report.profile})", title_justify="left")
    table.add_column("case")
    for name in report.results:
        table.add_column(name, justify="right")
    for verdict in report.verdicts:
        mark = "" if verdict.passed else "[red]✗[/] "
        table.add_row(mark + verdict.case.title, *(_cell(name, verdict, report) for name in report.results))
    return table


def _cell(name: str, verdict: CaseVerdict, report: Report) -> str:
    comparisons = [c for c in verdict.comparisons if name in (c.left, c.right)]
    different = sum(c.different_rows for c in comparisons)
    total = different + sum(c.equal_rows for c in comparisons)
    if report.results[name].claim == "closeness":
        lines = [
            f"{c.distance.rows:,} rows, KL {c.distance.kl_mean:.1e}" for c in verdict.closeness if c.testee == name
        ]
    else:
        lines = [f"[red]{different:,} of {total:,} differ[/]" if different else f"[green]{total:,} equal[/]"]
    for c in verdict.logprobs:
        if c.testee == name and c.different:
            lines.append(f"[red]{c.different:,} of {c.equal + c.different:,} log-probabilities differ[/]")
    if verdict.unsupported[name]:
        lines.append(f"[yellow]{len(verdict.unsupported[name])} unsupported[/]")
    if verdict.rows_alone[name]:
        lines.append(f"[yellow]{verdict.rows_alone[name]:,} without counterpart[/]")
    outcome = report.results[name].outcome_of(verdict.case)
    if report.results[name].schedule_not_followed:
        return "\n".join([*lines, "schedule not followed"])
    if verdict.case.min_cached_tokens:
        lines.append(f"{sum(r.num_cached_tokens for r in outcome.requests)} tokens cached")
    if verdict.case.num_speculative_tokens:
        lines.append(f"{outcome.num_accepted_tokens} of {outcome.num_draft_tokens} drafts accepted")
    return "\n".join(lines)


def _print_problems(verdict: CaseVerdict, console: Console) -> None:
    for problem in verdict.problems:
        console.print(f"[red]{verdict.case.name}[/]: {problem}", highlight=False)
    for logprobs in verdict.logprobs:
        if logprobs.different:
            console.print(f"[red]{verdict.case.name}, {logprobs.testee}[/]: {logprobs.describe()}", highlight=False)
    for name, requests in verdict.unsupported.items():
        for reason, indices in _by_reason(requests).items():
            console.print(
                f"[yellow]{verdict.case.name}, {name}[/]: unsupported, request {', '.join(indices)}: {reason}",
                highlight=False,
            )
    for comparison in verdict.comparisons:
        if not comparison.equal:
            pair = f"{verdict.case.name}, {comparison.left} and {comparison.right}"
            console.print(f"[red]{pair}[/]: {comparison.describe()}", highlight=False)
