"""Certificates of this package's kernels: of which sources a card has printed the contract's bits.

certificates.json is written on a Hopper card by `dsv3 kernels check --certify`. An entry holds for the sources that it
was made of: of everything that the operation's module takes from this folder, blank lines, whole-line comments and
docstrings left out; of the table of `selection` the ways to cut a kernel, not their times. A kernel that has changed
since, or is cut in another way, has no certificate until a card has compared it again, so strict mode refuses it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from dsv3_plugin.kernels import selection
from dsv3_plugin.ops.contract import Contract

TABLE = Path(__file__).with_name("certificates.json")
_PACKAGE = __package__ or "dsv3_plugin.kernels"
_NAMED = (".cu", ".cuh", ".json")
_INCLUDE = re.compile(r'^\s*#include "(.+)"', re.MULTILINE)


class Certificate(BaseModel):
    """What one operation's kernels were when every random case was equal to `sm90_model`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    contract_version: int
    sources: str
    """The digest of them."""
    cases: int
    """Of each maker of the operation."""
    cases_on_cpu: int
    """Of the operation: those whose expected bits were computed on a CPU too, not on the card alone."""
    card: str
    torch: str
    triton: str

    def __str__(self) -> str:
        """As `dsv3 kernels list` shows it."""
        return (
            f"equal to sm90-model in every bit in {self.cases} random cases on one {self.card}, the model itself on a"
            f" CPU too in {self.cases_on_cpu} (torch {self.torch}, Triton {self.triton}; dsv3 kernels check)"
        )


_Table = TypeAdapter(dict[str, Certificate])


def read(path: Path) -> dict[str, Certificate]:
    """The certificates in a file, by operation; none where there is no file."""
    return _Table.validate_json(path.read_bytes()) if path.exists() else {}


def write(path: Path, certificates: dict[str, Certificate]) -> None:
    """Put `certificates` into a file; those of other operations in it stay."""
    path.write_bytes(_Table.dump_json(dict(sorted((read(path) | certificates).items())), indent=1) + b"\n")


def certified(contract: Contract, module: str) -> tuple[str | None, str | None]:
    """Of an operation that `module` serves: (its certificate, None), or (None, why it has none)."""
    found = _shipped().get(contract.op)
    if found is None:
        return None, "no card has compared it with the contract yet"
    if found.contract_version != contract.version:
        return None, f"version {found.contract_version} of its contract was compared"
    if found.sources != digest(module):
        return None, "its sources have changed since a card compared them: dsv3 kernels check --certify"
    return str(found), None


@functools.cache
def _shipped() -> dict[str, Certificate]:
    return read(TABLE)


@functools.cache
def digest(module: str, folder: Path = TABLE.parent) -> str:
    """Of the code of a module of this package and of all that it takes from `folder`, in hexadecimal."""
    hashed = hashlib.sha256()
    for name, code in sorted(_sources(f"{module}.py", folder).items()):
        hashed.update(f"{name}\n{code}\n".encode())
    return hashed.hexdigest()[:16]


def _sources(file: str, folder: Path, seen: dict[str, str] | None = None) -> dict[str, str]:
    """Code by file name, from `file` on."""
    seen = {} if seen is None else seen
    text = (folder / file).read_text()
    if file.endswith(".py"):
        tree = ast.parse(text)
        seen[file], used = _python_code(text, tree), _used_by_python(tree)
    elif file.endswith(".json"):
        seen[file], used = _cuts(text), []
    else:
        seen[file], used = _code(text.splitlines(), "//"), _INCLUDE.findall(text)
    for name in used:
        # An include that is no file here is made at run time, by code that is hashed.
        if name not in seen and (folder / name).exists():
            _sources(name, folder, seen)
    return seen


def _used_by_python(tree: ast.Module) -> list[str]:
    """Modules of this package that are imported, and CUDA sources and tables that are named."""
    files: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == _PACKAGE:
            files += [f"{alias.name}.py" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_PACKAGE}."):
            files.append(f"{(node.module or '').removeprefix(f'{_PACKAGE}.')}.py")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(_NAMED):
            files.append(node.value)
    return files


def _python_code(text: str, tree: ast.Module) -> str:
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * ((first.end_lineno or first.lineno) - first.lineno + 1)
    return _code(lines, "#")


def _cuts(text: str) -> str:
    """Of a table of `selection`, how fp8_stream.cu is cut for dense products and for experts."""
    rows = selection.Table.model_validate_json(text).rows
    cuts = {(row.groups > 0, *sorted(row.stream.items())) for row in rows}
    return "\n".join(sorted(map(str, cuts)))


def _code(lines: list[str], comment: str) -> str:
    return "\n".join(line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith(comment))
