"""`make check`: the tests of what changed, nearest first, for as long as there is time; and what was not run.

A test file is as near to a changed module as the chain of imports between them is short: 1 where it names the module
itself, in an import or in a program that it runs, 0 where it changed itself. A file that is no module (.cu, .json)
counts as the modules that name it. What git compares with is where the branch left `main`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable

import grimp
from paths import ROOT

SECONDS = 75
"""That tests may take, so that with lint and pytest's own start it is under two minutes on two cores."""
ENGINES = re.compile(r"\b(python_of|shipped_testee|needs_megatron)\b|\.envs")
"""What a test names that runs in an engine's environment: minutes, so it runs here only where it changed itself."""
COMPILERS = "in .envs/kernels"
"""What a test says that needs the compilers of that environment."""
EVERYTHING = ("tests/conftest.py", "pyproject.toml", "Makefile", "requirements/")
_IMPORT = re.compile(
    r"^ *from ([\w.]+) import (\([^)]*\)|[\w, ]+)|^ *import ([\w.]+)|(dsv3_plugin(?:\.\w+)+)", re.MULTILINE
)


def modules_of(files: Iterable[str], packages: dict[str, str], sources: dict[str, str]) -> set[str]:
    """The modules that are among `files` or name one of them. `packages` are folders by package, `sources` texts."""
    found = set()
    for file in files:
        folder, _, name = file.rpartition("/")
        package = next((p for p, where in packages.items() if folder == where or folder.startswith(where + "/")), None)
        if package is None:
            continue
        inside = folder.removeprefix(packages[package]).replace("/", ".")
        if name.endswith(".py"):
            found.add(f"{package}{inside}.{name[:-3]}".removesuffix(".__init__"))
        else:
            found |= {module for module, text in sources.items() if name in text}
    return found


def names_in(text: str, known: set[str]) -> set[str]:
    """Those of the `known` modules that a file's text imports or names."""
    found = set()
    for module, names, imported, named in _IMPORT.findall(text):
        found |= {f"{module}.{name}" for name in re.findall(r"\w+", names)} | {module, imported, named}
    return found & known


def imports(folder: str) -> dict[str, list[str]]:
    """What each module of the copy of this package in `folder` imports."""
    sys.path.insert(0, folder)
    graph = grimp.build_graph("dsv3_plugin", cache_dir=None)
    found = {module: sorted(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    # Who asks for all operations has them without an import.
    found["dsv3_plugin.ops.operation"] += [module for module in found if module.startswith("dsv3_plugin.ops.")]
    return found


def distances(changed: set[str], graph: dict[str, list[str]]) -> dict[str, int]:
    """Modules by the length of their shortest chain of imports to one that changed, which is at 1."""
    found: dict[str, int] = {}
    front, distance = changed & graph.keys(), 1
    while front:
        found |= dict.fromkeys(front, distance)
        front = {module for module in graph if front.intersection(graph[module])} - found.keys()
        distance += 1
    return found


def affected(changed: set[str], graph: dict[str, list[str]]) -> dict[str, int]:
    """The test files that `changed` files reach, by their distance."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {**settings["package-dir"], "dsv3_plugin": "dsv3_plugin"}
    sources = {}
    for package, folder in packages.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = f"{package}.{path.relative_to(ROOT / folder).with_suffix('').as_posix().replace('/', '.')}"
            sources[name.removesuffix(".__init__")] = path.read_text()
    near = distances(modules_of(changed, packages, sources), graph)
    support = {path.stem: path.read_text() for path in (ROOT / "tests/support").glob("*.py")}
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        texts, helpers = [path.read_text()], set()
        while new := names_in("\n".join(texts), support.keys()) - helpers:
            helpers |= new
            texts += [support[name] for name in new]
        text = "\n".join(texts)
        own = {file, *(f"tests/support/{name}.py" for name in helpers)}
        reached = [near[module] for module in names_in(text, set(near))]
        reached += [1 for each in changed if not each.endswith(".py") and each.rpartition("/")[2] in text]
        if own & changed:
            found[file] = 0
        elif reached or any(each.startswith(EVERYTHING) for each in changed):
            found[file] = min(reached, default=99)
    return found


def main() -> int:
    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.splitlines() if done.returncode == 0 else []

    base = git("merge-base", "HEAD", "main") or git("merge-base", "HEAD", "origin/main") or ["HEAD"]
    changed = {*git("diff", "--name-only", base[0]), *git("ls-files", "--others", "--exclude-standard")}
    found = affected(changed, imports(sys.argv[1]))
    texts = {file: (ROOT / file).read_text() for file in found}
    compiled = {file for file in found if COMPILERS in texts[file]}
    slow = {file for file in found if file.startswith("tests/adapters/") or ENGINES.search(texts[file])}
    chosen = sorted(
        (file for file in found if file not in compiled and (found[file] == 0 or file not in slow)),
        key=lambda file: (found[file], file in slow, file),
    )
    print(
        f"{len(changed)} files changed since {base[0][:9]}; they reach {len(found)} test files, {len(chosen)} run here"
    )
    for file in sorted(found.keys() - set(chosen)):
        why, python = ("runs engines", "core") if file not in compiled else ("compiles kernels", "kernels")
        print(f"not run: {file} {why}; `make test` runs it, or `.envs/{python}/bin/python -m pytest {file}`")
    sys.stdout.flush()
    if not chosen:
        return 0
    pytest = [sys.executable, "-m", "pytest", "-q", "--numprocesses", "2", "--dist", "load", f"--seconds={SECONDS}"]
    pytest += [f"--always={file}" for file in chosen if found[file] == 0]
    return subprocess.run([*pytest, *chosen], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
