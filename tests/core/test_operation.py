"""Declarations of operations: found in their files, complete, and mirrored by the kernels in Triton."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3_plugin
from dsv3_plugin.kernels import own
from dsv3_plugin.ops import drawing
from dsv3_plugin.ops.fp8_linear import fp8_linear
from dsv3_plugin.ops.linear import linear
from dsv3_plugin.ops.operation import Operation, operation, operations
from dsv3_plugin.ops.products import CPU
from dsv3_plugin.ops.rope import rope

KERNELS = Path(own.__file__).parent


def test_every_declaration_is_found_in_the_order_of_files() -> None:
    found = [f"{op.module}.{name}" for name, op in operations().items()]
    assert [place.partition(".")[0] for place in found] == sorted(place.partition(".")[0] for place in found)
    declared = []
    for file in sorted((Path(dsv3_plugin.__file__).parent / "ops").glob("*.py")):
        for statement in ast.parse(file.read_text()).body:
            if isinstance(statement, ast.FunctionDef) and "operation(" in "".join(
                map(ast.unparse, statement.decorator_list)
            ):
                declared.append(f"{file.stem}.{statement.name}")
    assert found == declared


def test_the_order_does_not_depend_on_what_is_imported_first() -> None:
    code = (
        "import dsv3_plugin.ops.router, dsv3_plugin.ops.combine;"
        "from dsv3_plugin.ops.operation import operations; print(*operations())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(operations())


def test_a_contract_s_version_changes_here_too() -> None:
    """A recording or a certificate of another version counts for nothing: none is changed by a slip."""
    changed = {name: op.version for name, op in operations().items() if op.version != 1}
    assert changed == {"mla_attention": 4, "rms_norm": 2, "route": 2, "silu_and_mul": 2}


@pytest.mark.parametrize("name", operations())
def test_a_declaration_is_complete(name: str) -> None:
    op = operations()[name]
    assert op.summary and op.version > 0 and len(op.__doc__ or "") > 20
    case = op.draw(random.Random(name), drawing.SMALL)
    op.signature.bind(*case.args, **case.kwargs)
    assert "products" not in op.signature.parameters
    # FP8 operations train through master weights; nothing differentiates a gradient.
    assert (op.fp8 or op.training) == (op._gradient is None)


def kernels_of(source: str) -> set[str]:
    """The functions that say which contract of their module they implement, by the contract's name."""
    return {
        statement.name
        for statement in ast.parse(source).body
        if isinstance(statement, ast.FunctionDef)
        and f"implements(contracts.{statement.name})" in map(ast.unparse, statement.decorator_list)
    }


def test_each_has_a_kernel_in_triton_in_the_file_of_the_same_name() -> None:
    for op in operations().values():
        assert op.name in kernels_of((KERNELS / "triton" / f"{op.module}.py").read_text()), op


def test_a_kernel_that_does_not_say_what_it_implements_is_seen() -> None:
    source = (KERNELS / "triton" / "rope.py").read_text()
    assert kernels_of(source) == {"rope"}
    assert kernels_of(source.replace("@implements(contracts.rope)", "")) == set()


def test_it_is_called_copied_and_pickled_as_the_function_that_it_is() -> None:
    assert copy.deepcopy(rope) is rope and pickle.loads(pickle.dumps(linear)) is linear
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    assert torch.equal(linear(x, weight), linear.on(CPU)(x, weight))
    assert rope.on(CPU) is rope, "without matrix products every machine's is the same"
    assert fp8_linear.fp8 and not linear.fp8


def test_an_operation_is_declared_by_its_reference() -> None:
    @operation(version=7, summary="twice")
    def twice(x: torch.Tensor) -> torch.Tensor:
        """x of any shape, to twice x."""
        return x + x

    calls: list[Any] = []

    @twice.gradient
    def differentiable(ops: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(ops)
        return ops[twice](x)

    assert isinstance(twice, Operation) and (twice.name, twice.version) == ("twice", 7)
    assert list(inspect.signature(twice).parameters) == ["x"] and "to twice x" in twice.__doc__
    ops = {twice: lambda x: x * 2}
    assert twice.differentiable(ops)(torch.ones(1)).item() == 2 and calls == [ops]
    with pytest.raises(AssertionError, match=r"twice has no cases: declare them with @twice\.cases"):
        twice.draw(random.Random(0), drawing.SMALL)
    assert "twice" not in operations(), "only those of dsv3_plugin.ops are"
