"""`make mutants`: of a sample of small changes to the source, how many the tests notice; the others are printed.

Cosmic Ray says which changes there are: another operator, number, condition or decorator, a loop that does not run. Of
each place in the source that it can change in one manner, one change is drawn. It is made in a copy of the package,
where the nearest tests (`affected.py`) run until one fails, in a fork of a Python that has imported torch; `--jobs` of
them at a time, each with a copy of its own. Changes of annotations, of what an error says, and of what draws random
cases, are left out. A mutant's number names it again: `--only 17`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import parso  # noqa: F401  # Cosmic Ray's own import of it is circular
from affected import COMPILERS, ENGINES, affected, imports
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec
from paths import ROOT
from pytest import ExitCode
from warm import WarmPython

PLACES = "dsv3_plugin/ops", "dsv3_plugin/layers", "dsv3_plugin/autograd", "dsv3_plugin/layout.py"
LEFT_OUT = "dsv3_plugin/ops/drawing.py", "dsv3_plugin/layers/warm_up.py"
"""What draws cases, and what compiles kernels of a card before they are used."""
FARTHEST = 2
"""Chain of imports from a mutant to a test that is asked."""
NEAREST = 3
"""Files that are asked first, by themselves: to import all the others takes longer than most mutants live."""
SECONDS = 120
"""For the tests of one mutant; those that have not begun then are not asked."""
WARM = "torch", "pytest", "numpy", "safetensors.torch", "pydantic", "typer"


KILLER = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)


class Mutant(NamedTuple):
    """One change."""

    number: int
    spec: MutationSpec

    def __str__(self) -> str:
        line, _ = self.spec.start_pos
        return f"{self.number} {self.spec.module_path}:{line} {self.spec.operator_name.removeprefix('core/')}"


class Fate(NamedTuple):
    """What became of it."""

    killed: bool
    seconds: float
    by: str
    """The test that failed; or the last words of pytest."""
    diff: str


def all_mutants(places: Sequence[str]) -> list[Mutant]:
    """Of the modules at these places, in an order that depends on nothing but the source."""
    files = [f for p in map(Path, places) for f in ([p] if p.is_file() else sorted(p.glob("*.py")))]
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/session.sqlite", WorkDB.Mode.create) as session:
        init([file for file in files if str(file) not in LEFT_OUT], session, {})
        specs = [item.mutations[0] for item in session.work_items]
    specs.sort(key=lambda spec: (str(spec.module_path), spec.start_pos, spec.operator_name, spec.occurrence))
    return [Mutant(number, spec) for number, spec in enumerate(specs)]


def drawn(mutants: Sequence[Mutant], count: int, rng: random.Random) -> list[Mutant]:
    """So many places, and of each one change; in the order in which they were drawn."""
    places: dict[tuple[object, ...], list[Mutant]] = {}
    for mutant in mutants:
        spec = mutant.spec
        manner = spec.operator_name.split("_")[0]
        places.setdefault((spec.module_path, spec.start_pos, manner), []).append(mutant)
    chosen = [rng.choice(of_place) for of_place in places.values()]
    return rng.sample(chosen, min(count, len(chosen)))


def meaning(source: str) -> str | None:
    """A module's syntax without what changes nothing that a test should notice; None where it has none."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        match node:
            case ast.arg():
                node.annotation = None
            case ast.AnnAssign():
                node.annotation = ast.Constant(None)
            case ast.FunctionDef():
                node.returns = None
                if any(isinstance(by, ast.Attribute) and by.attr == "cases" for by in node.decorator_list):
                    node.body = []
            case ast.Call(func=ast.Name(id="require")):
                del node.args[1:]
            case ast.Raise(exc=ast.Call() as error):
                error.args.clear()
            case ast.ClassDef(bases=[ast.Attribute(attr="Function")]):
                # torch calls these by the class, never by an instance: they need not be static.
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        own = [by for by in method.decorator_list if ast.unparse(by) != "staticmethod"]
                        method.decorator_list = own
    return ast.dump(tree)


def nearest_tests(file: str, graph: dict[str, list[str]]) -> list[str]:
    """Test files that need no engine, no card and no compiler, nearest and cheapest first."""
    found = affected({file}, graph)
    name = f"test_{Path(file).stem}.py"
    places = "tests/core/ops/", "tests/kernels/test_saboteurs.py", "tests/core/", "tests/conformance/", "tests/kernels/"

    def is_asked(test: str) -> bool:
        text = (ROOT / test).read_text()
        near = found[test] <= FARTHEST and test.startswith(places)
        return near and not ENGINES.search(text) and COMPILERS not in text

    def order(test: str) -> tuple[object, ...]:
        place = next(i for i, place in enumerate(places) if test.startswith(place))
        return found[test], not test.endswith(f"/{name}"), place, test

    return sorted(filter(is_asked, found), key=order)


class Laboratory:
    """A copy of the package whose modules are changed, and a Python that runs tests with it."""

    def __init__(self, copy: Path, packages: Path, graph: dict[str, list[str]]) -> None:
        """`graph`: what the modules of `packages` import."""
        self.copy, self.graph = copy, graph
        shutil.copytree(packages, copy, ignore=shutil.ignore_patterns("__pycache__"))
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        self.environment = dict(os.environ)
        self.python = WarmPython(sys.executable, WARM)
        self.left_out: list[str] = []

    def try_out(self, mutant: Mutant) -> Fate | None:
        """None where the change has no meaning."""
        spec = mutant.spec
        operator = get_operator(spec.operator_name)(**spec.operator_args)
        tests = nearest_tests(str(spec.module_path), self.graph)
        began = time.monotonic()
        while True:
            with use_mutation(self.copy / spec.module_path, operator, spec.occurrence) as (before, after):
                if after is None or meaning(after) in (None, meaning(before)):
                    return None
                status, said = self.ask(tests)
            killer = KILLER.search(said)
            # pytest that fails names a test: without one it was ended from outside, which says nothing of the mutant.
            assert status != ExitCode.TESTS_FAILED or killer, f"{mutant}: {said[-200:]}"
            if not status or killer is None or self.is_sound(killer[1]):
                break
            self.left_out.append(killer[1])
        changes = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
        diff = "\n".join(line for line in list(changes)[2:] if not line.startswith("@@"))
        return Fate(status != 0, time.monotonic() - began, killer[1] if killer else said[-200:], diff)

    @functools.cache  # noqa: B019  # laboratories last as long as the program
    def is_sound(self, test: str) -> bool:
        """Whether a test passes without a change."""
        return self.test(test, *([] if "::" in test else ["--collect-only"]))[0] == 0

    def ask(self, tests: Sequence[str]) -> tuple[int, str]:
        """`test` of the nearest files, and of the others if those pass, until one fails or there is no time left."""
        began = time.monotonic()
        status, said = self.test(*tests[:NEAREST], "-x", f"--seconds={SECONDS}")
        left = SECONDS - (time.monotonic() - began)
        if status or left <= 0 or len(tests) <= NEAREST:
            return status, said
        return self.test(*tests[NEAREST:], "-x", f"--seconds={left}")

    def test(self, *words: str) -> tuple[int, str]:
        """The exit status of pytest, 0 where it found nothing to run, and what it printed."""
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-rfE", "--timeout=300", *words]
        done = self.python.run([*command, *(f"--deselect={test}" for test in self.left_out)], [self.environment])
        return done.returncode * (done.returncode != ExitCode.NO_TESTS_COLLECTED), done.stdout


def tried(mutants: Sequence[Mutant], laboratories: Sequence[Laboratory]) -> Iterator[tuple[Mutant, Fate]]:
    """Each mutant that has a meaning, as soon as it is known; a laboratory tries one at a time."""
    free: SimpleQueue[Laboratory] = SimpleQueue()
    for laboratory in laboratories:
        free.put(laboratory)

    def try_out(mutant: Mutant) -> tuple[Mutant, Fate | None]:
        laboratory = free.get()
        try:
            return mutant, laboratory.try_out(mutant)
        finally:
            free.put(laboratory)

    with ThreadPoolExecutor(len(laboratories)) as pool:
        try:
            for done in as_completed([pool.submit(try_out, mutant) for mutant in mutants]):
                mutant, fate = done.result()
                if fate is not None:
                    yield mutant, fate
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("packages", type=Path, help="an installed copy of the package, as `make lint` makes it")
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", action="append", help="modules or folders; all of them if not given")
    parser.add_argument("--only", type=int, action="append", help="the mutants of these numbers")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--record", type=Path, help="a file that gets a line of JSON for each")
    options = parser.parse_args()
    everyone = all_mutants(options.place or PLACES)
    if options.only:
        chosen = [everyone[number] for number in options.only]
    else:
        chosen = drawn(everyone, options.sample, random.Random(options.seed))
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        copies, graph = [Path(folder) / f"{job}" for job in range(options.jobs)], imports(str(options.packages))
        laboratories = [Laboratory(copy, options.packages, graph) for copy in copies]
        for mutant, fate in tried(chosen, laboratories):
            counts["killed" if fate.killed else "lived"] += 1
            print(f"{'killed' if fate.killed else 'LIVED '} {mutant} {fate.seconds:.0f} s: {fate.by}", flush=True)
            if not fate.killed:
                print(fate.diff, flush=True)
            if options.record:
                with options.record.open("a") as record:
                    print(json.dumps({"mutant": str(mutant), **fate._asdict()}), file=record)
        if left_out := {test for laboratory in laboratories for test in laboratory.left_out}:
            print("not asked, for they fail without a change:", *sorted(left_out), sep="\n  ")
    share = counts["killed"] / max(1, counts.total())
    print(f"{counts['killed']} of {counts.total()} mutants died ({share:.1%}), of {len(everyone)} that there are")
    return 0


if __name__ == "__main__":
    sys.exit(main())
