"""`dsv3 conformance`."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from dsv3_plugin.checkpoint.writer import require_writable
from dsv3_plugin.conformance import report as reports
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.card import cards, read_report, unclaimed
from dsv3_plugin.conformance.claims import Claims, shipped
from dsv3_plugin.conformance.expectations import Expectations
from dsv3_plugin.conformance.layouts import ONE_RANK, ParallelLayout
from dsv3_plugin.conformance.programs import Progress
from dsv3_plugin.conformance.protocol import JOB_FILE, PROTOCOL_VERSION, Device, json_schema, read_job
from dsv3_plugin.conformance.validate import problems
from dsv3_plugin.errors import ConformanceError

app = typer.Typer(help="Prove that engines print the same logits, bit for bit.", no_args_is_help=True)


@app.command()
def run(
    testee: Annotated[
        list[str],
        typer.Option(
            help="A testee of the suite (reference, core, vllm, sglang, megatron), or NAME=COMMAND for your own;"
            " NAME@LAYOUT for one in a layout of its own. Repeat it."
        ),
    ],
    checkpoint: Annotated[Path, typer.Option(help="A DeepSeek-V3 checkpoint folder.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the full report to this new file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report as a page to this new file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this new file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the report as Markdown to this new file.")] = None,
    device: Annotated[Device, typer.Option(help="Where every testee runs the model.")] = "cpu",
    case: Annotated[list[str] | None, typer.Option(help="Run only this case. Repeat it.")] = None,
    environments: Annotated[Path, typer.Option(help="Folder with an environment NAME for each testee.")] = Path(
        ".envs"
    ),
    layout: Annotated[
        list[str] | None,
        typer.Option(help="Run the engines spread over ranks: one, tp=2, dp=2,ep=2, tp=2,pp=2. Repeat it."),
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep job, results and logs in this new folder.")] = None,
    expect: Annotated[
        Path | None, typer.Option(help="A TOML file of known failures and skips, each with its reason.")
    ] = None,
    claims: Annotated[
        list[Path] | None, typer.Option(help="Claim files of your own testees; those of this package's are known.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that a testee may take; then the run fails.")] = None,
) -> None:
    """Run testees on one checkpoint, compare every row, and exit with status 1 if any bit differs."""
    _require_new(json_file, html, junit, markdown)
    if keep is not None and keep.exists():
        raise ConformanceError(f"{keep}: exists already and is not overwritten")
    if timeout is not None and not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ConformanceError(f"--timeout {timeout:g}: give seconds, above zero and at most {threading.TIMEOUT_MAX:g}")
    testees = testee_commands(testee, layout or [], environments)
    expectations = None if expect is None else Expectations.read(expect)
    all_claims = [*shipped(), *map(Claims.read, claims or ())]
    console = Console()
    with _LiveProgress(console) as progress:
        report = runner.run(
            testees,
            checkpoint,
            progress,
            device=device,
            keep=keep,
            only=case or (),
            expectations=expectations,
            claims=all_claims,
            timeout=timeout,
        )
    reports.print_report(report, console)
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
    if html is not None:
        html.write_text(reports.to_html(report))
    if junit is not None:
        junit.write_text(reports.to_junit(report))
    if markdown is not None:
        markdown.write_text(reports.to_markdown(report))
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def validate(
    result: Annotated[Path, typer.Argument(help="A testee's result folder.")],
    job: Annotated[
        Path | None, typer.Option(help="The folder of the job that it answers; by default the one around the result.")
    ] = None,
) -> None:
    """Tell everything in which a result folder does not follow the protocol, and exit with status 1 if anything."""
    folder = job or result.absolute().parent
    if not result.is_dir():
        raise ConformanceError(f"{result}: no such folder; name a testee's, as `run --keep` leaves it")
    if not (folder / JOB_FILE).is_file():
        raise ConformanceError(f"{folder}: holds no {JOB_FILE}; name the folder of the job with --job")
    found = problems(read_job(folder), result)
    for problem in found:
        typer.echo(problem)
    typer.echo(f"{result}: {len(found) or 'no'} problem{'' if len(found) == 1 else 's'} (protocol {PROTOCOL_VERSION})")
    raise typer.Exit(1 if found else 0)


@app.command()
def card(
    report: Annotated[list[Path], typer.Argument(help="Reports that `run --json` wrote.")],
    output: Annotated[Path, typer.Option(help="The folder for the cards, one a version and kind of device.")],
    claims: Annotated[
        list[Path] | None, typer.Option(help="Claim files; by default those of this package's backends.")
    ] = None,
    update: Annotated[
        bool, typer.Option(help="Complete cards that are there: of two lines of a claim the better evidence stays.")
    ] = False,
) -> None:
    """Write verification cards, name what reports show and nobody claims, and exit with status 1 if a claim failed or
    was not tested.
    """
    reports = [read_report(file) for file in report]
    tried = {result["testee"] for each in reports for result in each["testees"].values()}
    all_claims = [Claims.read(file) for file in claims] if claims else [c for c in shipped() if c.testee in tried]
    made = [each for of in all_claims for each in cards(of, reports)]
    if not made:
        raise ConformanceError(f"no claims are of {', '.join(sorted(tried))}: give a file with --claims")
    there = {each.name for each in made if (output / each.name).exists()}
    if there and not update:
        raise ConformanceError(f"{output / min(there)}: exists already and is not overwritten; --update completes it")
    made = [each.completing(output / each.name) if each.name in there else each for each in made]
    output.mkdir(parents=True, exist_ok=True)
    for each in made:
        (output / each.name).write_text(each.to_yaml())
        counts = Counter(line.status for line in each.lines)
        told = ", ".join(f"{count} {status}" for status, count in counts.items())
        typer.echo(f"{output / each.name}: {told or 'nothing is claimed'}")
    for file, each_report in zip(report, reports, strict=True):
        for of in all_claims:
            for text in unclaimed(of, each_report):
                typer.echo(f"note: {file}: {text}", err=True)
    raise typer.Exit(0 if all(each.complete for each in made) else 1)


@app.command()
def schema(message: Annotated[Literal["job", "result"], typer.Argument(help="Which message.")]) -> None:
    """Print the JSON schema of the protocol's messages."""
    typer.echo(json.dumps(json_schema(message), indent=1))


def testee_commands(testees: list[str], layouts: list[str], environments: Path) -> list[runner.TesteeCommand]:
    """What `--testee` names, each in every `--layout`; without one on one rank. Raises `ConformanceError`."""
    parsed = [ParallelLayout.parse(text) for text in layouts or [str(ONE_RANK)]]
    return [command for text in testees for command in _spread(text, parsed, environments)]


def _require_new(*files: Path | None) -> None:
    """Raise `ConformanceError`, or `InputError` where nothing can be written, unless each is a file of its own that can
    be made, before hours of work go into it.
    """
    named = [file for file in files if file is not None]
    for file in named:
        if file.exists():
            raise ConformanceError(f"{file}: exists already and is not overwritten")
        if not file.parent.is_dir():
            raise ConformanceError(f"{file}: there is no folder {file.parent}")
        if sum(file.resolve() == other.resolve() for other in named) > 1:
            raise ConformanceError(f"{file}: two reports cannot be one file")
        require_writable(file.parent, str(file))


def _spread(text: str, layouts: list[ParallelLayout], environments: Path) -> list[runner.TesteeCommand]:
    """A testee in each layout; the reference is what one rank computes."""
    name, at, own = text.partition("@")
    if "=" in name:
        name, at = text, ""
    command = runner.TesteeCommand.parse(name, environments)
    if at:
        return [command.on(ParallelLayout.parse(own))]
    return [command.on(layout) for layout in ([ONE_RANK] if command.name == runner.REFERENCE else layouts)]


class _LiveProgress:
    """One line a testee on a terminal; a line for each event elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.state: dict[str, str] = {}
        self.live = Live(console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.live.start()
        return self.update

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(self, testee: str, what: str) -> None:
        self.state[testee] = what
        if self.console.is_terminal:
            self.live.update(Text("\n".join(f"{name}: {state}" for name, state in self.state.items())))
        else:
            self.console.print(f"{testee}: {what}", highlight=False)
