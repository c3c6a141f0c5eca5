"""mypy is less strict where kernels in Triton's language are: nothing but those kernels may lack types there."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from dsv3_plugin.kernels import provider

KERNELS = Path(provider.__file__).parent
CONFIG = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["mypy"]
RELAXED = [
    pattern.removeprefix("dsv3_plugin.kernels.")
    for override in CONFIG["overrides"]
    if override.get("disallow_untyped_defs") is False
    for pattern in override["module"]
]
JIT = ("triton.jit", "gluon.jit")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def is_a_kernel(function: Function) -> bool:
    return any(ast.unparse(decorator).partition("(")[0] in JIT for decorator in function.decorator_list)


def has_its_types(function: Function) -> bool:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    given = [argument for argument in named if argument is not None and argument.arg not in ("self", "cls")]
    return function.returns is not None and all(argument.annotation is not None for argument in given)


def without_types(source: str) -> list[str]:
    """The functions that mypy would have to ask for types."""
    return [f.name for f in functions(source) if not is_a_kernel(f) and not has_its_types(f)]


def relaxed_files() -> list[Path]:
    def name(file: Path) -> str:
        return ".".join(file.relative_to(KERNELS).with_suffix("").parts)

    return [file for file in KERNELS.rglob("*.py") if any(fnmatch(name(file), pattern) for pattern in RELAXED)]


@pytest.mark.parametrize("file", relaxed_files(), ids=lambda file: file.name)
def test_only_kernels_lack_types(file: Path) -> None:
    assert without_types(file.read_text()) == []


def test_mypy_is_strict_where_no_kernels_are() -> None:
    """All of this package but these files, each of which has a kernel or says what kernels share."""
    with_kernels = {file for file in KERNELS.rglob("*.py") if any(map(is_a_kernel, functions(file.read_text())))}
    assert with_kernels <= set(relaxed_files())
    assert {file.parent for file in relaxed_files()} == {KERNELS / "triton", KERNELS / "sm90"}


def test_a_function_without_types_is_seen() -> None:
    source = "@triton.jit\ndef kernel(x, N: tl.constexpr): ...\n\n\ndef launch(x: int{}): ...\n"
    assert without_types(source.format(", y")) == ["launch"]
    assert without_types(source.format("")) == ["launch"], "it returns something"
    assert without_types(source.replace("): ...\n\n\n", "): ...\n").replace("@triton.jit", "@cache").format("")) == [
        "kernel",
        "launch",
    ]
