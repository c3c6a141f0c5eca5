"""What a function is made of, as a digest: the code that it takes from its own package and from this one.

Every name that the function uses is followed to the statement that defines it, and from there on: functions, classes,
constants, what a module does when it is imported, CUDA sources that a string names and their includes. Comments, blank
lines and docstrings do not count, nor do this package's checks of arguments (`require...`) and the decorators that
declare an operation or its kernel: a contract's version is compared itself. Other packages are not followed: their
versions stand beside the digest.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from dsv3_plugin.errors import KernelError

_CORE = __package__ or "dsv3_plugin"
# What a library wraps a kernel in says nothing of the kernel.
_LIBRARIES = sys.stdlib_module_names | {"torch", "triton"}
# Decorators that say what a function is, and leave it as it is.
_DECLARATIONS = {f"{_CORE}.ops.operation:{name}" for name in ("operation", "matrix_operation", "implements")}
_INCLUDE = re.compile(r'^\s*#include "(.+)"', re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_IMPORTS = (ast.Import, ast.ImportFrom)


def digest(
    entries: Iterable[str], *, without: Iterable[str] = (), constants_of: Iterable[str] = (), settings: str = ""
) -> str:
    """Of all that the functions `entries` are made of, in hexadecimal; each as `module:name`.

    Functions in `without` are not followed. Of what `constants_of` are made of the constants count alone. `settings`
    is anything else that counts. Raises `KernelError` where a function's source is not to be found.
    """
    code = collect(entries, without=without)
    code |= collect(constants_of, constants_only=True)
    code["settings"] = settings
    return hashlib.sha256("\n".join(f"{name}\n{text}" for name, text in sorted(code.items())).encode()).hexdigest()[:16]


def collect(entries: Iterable[str], *, without: Iterable[str] = (), constants_only: bool = False) -> dict[str, str]:
    """The statements that the functions `entries` are made of, by `module:name`, and files by `module/name`."""
    return _follow(entries, without, constants_only)[0]


def libraries(entries: Iterable[str], *, without: Iterable[str] = ()) -> list[str]:
    """The distributions of the packages that the functions `entries` use and that are not followed."""
    packages = _follow(entries, without, constants_only=False)[1] - sys.stdlib_module_names
    return sorted({name for package in packages for name in _distributions().get(package, [package])})


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _follow(entries: Iterable[str], without: Iterable[str], constants_only: bool) -> tuple[dict[str, str], set[str]]:
    """What `collect` returns, and the packages at which it ends."""
    waiting = list(entries)
    packages = frozenset({_CORE} | {_package(entry) for entry in waiting})
    left_out = set(without)
    for entry in waiting:
        if _package(entry) in _LIBRARIES or not _is_there(entry, packages):
            raise KernelError(f"the source of {entry} is not to be found: name the kernel's implementations")
    found: dict[str, str] = {}
    others: set[str] = set()
    seen: set[str] = set()
    while waiting:
        reference = waiting.pop()
        if reference in seen or reference in left_out:
            continue
        seen.add(reference)
        if _package(reference) not in packages:
            others.add(_package(reference))
            continue
        for name, text, is_constant, used in _read(reference, packages):
            if is_constant or not constants_only:
                found[name] = text
            waiting += used
    return found, others


def _is_there(entry: str, packages: frozenset[str]) -> bool:
    """Whether a function's module has the function, perhaps in a branch."""
    module, _, name = entry.partition(":")
    file = file_of(module) if _exists(module) else None
    if _package(entry) not in packages or file is None or file.suffix != ".py":
        return False
    parsed = _parse(module, file, file.stat().st_mtime_ns)
    return name in parsed.defined or name in parsed.imported or any(name in _bound_in(each) for each in parsed.others)


def _bound_in(statement: ast.stmt) -> set[str]:
    """What the branches of a statement define."""
    nodes = list(ast.walk(statement))
    functions = {node.name for node in nodes if isinstance(node, _DEFINITIONS)}
    return functions | {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _package(reference: str) -> str:
    return reference.partition(":")[0].partition(".")[0]


def _read(reference: str, packages: frozenset[str]) -> Iterator[tuple[str, str, bool, list[str]]]:
    """(name, text, whether it is a constant, what it uses) of the statements that a reference stands for."""
    module, _, name = reference.partition(":")
    if _package(reference) not in packages or not _exists(module):
        return
    file = file_of(module)
    if file is None:
        return
    if file.suffix != ".py":
        yield module, hashlib.sha256(file.read_bytes()).hexdigest(), False, []
        return
    parsed = _parse(module, file, file.stat().st_mtime_ns)
    if not name:  # the module itself is used as a value
        for each in parsed.defined:
            yield from _statement(parsed, each)
        return
    if name in parsed.defined:
        yield from _statement(parsed, name)
    elif name in parsed.imported:
        yield reference, "", False, [parsed.imported[name]]
    for number, statement in enumerate(parsed.others):
        yield f"{module}:#{number}", parsed.text(statement), False, parsed.uses(statement)


def _statement(parsed: _Module, name: str) -> Iterator[tuple[str, str, bool, list[str]]]:
    if _is_only_a_check(parsed.name, name):
        return
    statement = parsed.defined[name]
    is_constant = isinstance(statement, _ASSIGNMENTS)
    yield f"{parsed.name}:{name}", parsed.text(statement), is_constant, parsed.uses(statement)
    for file in parsed.files(statement):
        yield f"{parsed.name}/{file.name}", _text_of(file), False, []


def _is_only_a_check(module: str, name: str) -> bool:
    return module.startswith(f"{_CORE}.ops.") and name.startswith("require")


def file_of(module: str) -> Path | None:
    """Where a module's code lies; None where it has no file, as a package without `__init__.py`."""
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


class _Module:
    """A parsed module: what it defines, what it imports, and what it does besides."""

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file
        source = file.read_text()
        tree = ast.parse(source)
        self.lines = source.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, *_DEFINITIONS)) and ast.get_docstring(node) is not None:
                first = node.body[0]
                end = first.end_lineno or first.lineno
                self.lines[first.lineno - 1 : end] = [""] * (end - first.lineno + 1)
        self.defined: dict[str, ast.stmt] = {}
        self.others: list[ast.stmt] = []
        self.imported: dict[str, str] = {}
        self._uses: dict[ast.stmt, list[str]] = {}
        self._strings: dict[ast.stmt, list[str]] = {}
        for statement in tree.body:
            if isinstance(statement, _DEFINITIONS):
                self._leave_out_declarations(statement)
                self.defined[statement.name] = statement
            elif isinstance(statement, _ASSIGNMENTS):
                for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
                    self.defined |= {node.id: statement for node in ast.walk(target) if isinstance(node, ast.Name)}
            elif isinstance(statement, _IMPORTS):
                self.imported |= self._imports(statement)
            elif not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
                self.others.append(statement)
                self.imported |= self._imports(statement)

    def _leave_out_declarations(self, statement: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        kept = []
        for decorator in statement.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            if not isinstance(called, ast.Name) or self.imported.get(called.id) not in _DECLARATIONS:
                kept.append(decorator)
                continue
            end = decorator.end_lineno or decorator.lineno
            self.lines[decorator.lineno - 1 : end] = [""] * (end - decorator.lineno + 1)
        statement.decorator_list = kept

    def _imports(self, statement: ast.stmt) -> dict[str, str]:
        """What the imports in a statement call by which name: `module:name`, or `module:`."""
        is_package = self.file.name == "__init__.py"
        names: dict[str, str] = {}
        for node in ast.walk(statement):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    names[alias.asname or alias.name.partition(".")[0]] = f"{alias.name}:"
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = self.name.split(".")[: len(self.name.split(".")) - node.level + is_package]
                    base = ".".join([*package, *([base] if base else [])])
                for alias in node.names:
                    names[alias.asname or alias.name] = f"{base}:{alias.name}"
        return names

    def text(self, statement: ast.stmt) -> str:
        """Its lines, decorators first, without comments and docstrings."""
        decorators = getattr(statement, "decorator_list", [])
        first = min([statement.lineno, *(node.lineno for node in decorators)])
        return _code(self.lines[first - 1 : statement.end_lineno], "#")

    def uses(self, statement: ast.stmt) -> list[str]:
        """References to all that the statement names, types of arguments too: their methods are called."""
        if statement not in self._uses:
            self._uses[statement] = self._find_uses(statement)
        return self._uses[statement]

    def _find_uses(self, statement: ast.stmt) -> list[str]:
        imported = self.imported | self._imports(statement)
        used: list[str] = []
        waiting: list[ast.AST] = [statement]
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                used.append(_attribute(imported[node.value.id], node.attr))
                continue  # the module's name alone would stand for all of it
            waiting += ast.iter_child_nodes(node)
            if isinstance(node, ast.Name) and node.id in imported:
                used.append(_as_module(imported[node.id]))
            elif isinstance(node, ast.Name) and node.id in self.defined:
                used.append(f"{self.name}:{node.id}")
        return used

    def files(self, statement: ast.stmt) -> list[Path]:
        """Files beside the module that a string of the statement names, and what they include."""
        if statement not in self._strings:
            values = [node.value for node in ast.walk(statement) if isinstance(node, ast.Constant)]
            self._strings[statement] = [x for x in values if isinstance(x, str) and re.fullmatch(r"[\w-]+\.\w+", x)]
        waiting = list(self._strings[statement])
        files: dict[str, Path] = {}
        while waiting:
            name = waiting.pop()
            file = self.file.parent / name
            # An include that is no file here is made at run time, by code that counts.
            if name not in files and file.is_file():
                files[name] = file
                waiting += _INCLUDE.findall(file.read_text()) if file.suffix in _C_LIKE else []
        return list(files.values())


_C_LIKE = (".cu", ".cuh", ".c", ".h", ".cpp", ".hpp")


@functools.lru_cache(maxsize=512)
def _parse(module: str, file: Path, modified: int) -> _Module:
    return _Module(module, file)


def _attribute(reference: str, attribute: str) -> str:
    """What `attribute` is of an imported name: of a module its own name, of a class or a constant the whole."""
    as_module = _as_module(reference)
    return as_module + attribute if as_module.endswith(":") else as_module


def _as_module(reference: str) -> str:
    """`a:b` is `a.b:` where b is a module of the package a."""
    module, _, name = reference.partition(":")
    return f"{module}.{name}:" if name and _is_submodule(module, name) else reference


@functools.lru_cache(maxsize=4096)
def _is_submodule(module: str, name: str) -> bool:
    file = file_of(module) if _exists(module) else None
    if file is None or file.name != "__init__.py":
        return False
    return _exists(f"{module}.{name}")


def _text_of(file: Path) -> str:
    if file.suffix in _C_LIKE:
        return _code(file.read_text().splitlines(), "//")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _code(lines: list[str], comment: str) -> str:
    return "\n".join(line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith(comment))
