"""The comparison that certifies kernels catches every saboteur of every operation, on small random cases."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from saboteurs import SABOTEURS, Fault, without_saboteurs

from dsv3_plugin.hooks import Implementation
from dsv3_plugin.kernels.certify.compare import check_case
from dsv3_plugin.kernels.certify.findings import Result
from dsv3_plugin.kernels.certify.targets import Target
from dsv3_plugin.ops.drawing import SMALL, in_fp32
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.reference_kernels import dsv3_kernels

CASES = 40
"""In which each must be caught; a certificate takes hundreds, and larger ones."""
AT = SMALL._replace(rows=(1, 3, 5, 40), depths=(128, 512), head_sizes=(32, 128))


def judged(name: str, run: Fault, number: int) -> Result:
    """One case, as `dsv3 kernels check` judges it: every other one in fp32."""
    op = operations()[name]
    case = op.draw(random.Random(f"{name}/{number}"), AT)
    if number % 2 and not op.fp8:
        case = in_fp32(case)
    (kernel,) = (kernel for kernel in dsv3_kernels() if kernel.op == name)
    wrong = replace(kernel, provider="saboteur", run=run)
    return check_case(Target(wrong, Implementation(name, run, "")), number, case, op(*case.args, **case.kwargs), "cpu")


def test_every_operation_has_saboteurs() -> None:
    assert not without_saboteurs(), "tests/support/saboteurs.py says what one is"
    assert SABOTEURS.keys() == operations().keys()


@pytest.mark.parametrize("name", SABOTEURS)
def test_the_reference_is_right_and_saboteurs_are_caught(name: str) -> None:
    for number in range(CASES):
        assert not judged(name, operations()[name], number).wrong_cases, number
    caught = {
        fault: next((number for number in range(CASES) if judged(name, run, number).wrong_cases), None)
        for fault, run in SABOTEURS[name].items()
    }
    print(f"{name}: the first case that differs: {caught}")
    assert not [fault for fault, number in caught.items() if number is None]
