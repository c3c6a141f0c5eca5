"""`dsv3 kernels check` on a CPU: the model of Hopper checked against itself, and against itself with a bit turned."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv3_plugin.errors import InputError
from dsv3_plugin.hooks import Kernel
from dsv3_plugin.kernels import check, cublas, sm90_model

CASES, SEED = 3, 1


def model_kernel(op: str) -> Kernel:
    (kernel,) = [kernel for kernel in sm90_model.kernels() if kernel.op == op]
    return kernel


def with_one_bit_turned(kernel: Kernel) -> Kernel:
    """The first output of every call differs in its last bit."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = kernel.run(*args, **kwargs)
        out.view(torch.int16).view(-1)[0] ^= 1
        return out

    return replace(kernel, run=run)


@pytest.mark.parametrize("op", ["rope", "combine"])
def test_the_model_is_equal_to_itself(op):
    result = check.check(model_kernel(op), CASES, SEED, device="cpu")
    assert (result.cases, result.wrong_cases, result.wrong_outputs, result.failed) == (CASES, 0, 0, False)
    assert str(result).endswith("equal")


@pytest.mark.parametrize("op", ["rope", "combine"])
def test_a_turned_bit_fails_where_the_kernel_is_meant_to_be_exact(op):
    result = check.check(with_one_bit_turned(model_kernel(op)), CASES, SEED, device="cpu")
    assert (result.wrong_cases, result.wrong_outputs, result.failed) == (CASES, CASES, True)
    assert "3 cases differ; case 0: 1 outputs" in str(result)


def test_of_a_kernel_without_certificate_the_share_and_the_largest_difference_are_told():
    kernel = replace(with_one_bit_turned(model_kernel("rope")), provider=cublas.PROVIDER, uncertified="turns a bit")
    result = check.check(kernel, CASES, SEED, device="cpu")
    assert result.wrong_outputs == CASES and not result.failed
    assert 0 < result.largest_difference < 1
    assert f"no certificate: 3 cases and {3 / result.outputs:.4%} of the outputs differ, by " in str(result)


def test_an_output_nobody_wrote_is_infinitely_far():
    expected = torch.ones(4)
    assert check.largest_difference(expected, torch.tensor([1, 1, torch.nan, 1])) == torch.inf
    assert check.largest_difference((expected, expected), (expected, expected * 1.5)) == 0.5
    assert check.largest_difference(expected, expected) == 0


def test_shapes_are_refused_by_other_peoples_kernels_only():
    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise InputError("not this shape")

    other = replace(model_kernel("rope"), provider=cublas.PROVIDER, run=refuse, uncertified="refuses")
    result = check.check(other, CASES, SEED, device="cpu")
    assert (result.cases, result.refused_cases) == (0, CASES)
    with pytest.raises(InputError):
        check.check(replace(other, provider="triton"), CASES, SEED, device="cpu")


def check_alike(*kernels: Kernel) -> list[check.Finding]:
    return check.check_alike(list(kernels), CASES, SEED, device="cpu")


def test_a_kernel_that_breaks_is_named_and_the_others_are_checked():
    def breaks(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no such symbol")

    good = model_kernel("rope")
    text, passed = check.verdict([*check_alike(good), *check_alike(model_kernel("combine"))])
    assert passed and text.startswith("6 cases, ") and text.endswith("outputs: equal in every bit")
    findings = check_alike(replace(good, run=breaks), good)
    assert str(findings[0]).endswith("broke: RuntimeError: no such symbol") and str(findings[1]).endswith("equal")
    text, passed = check.verdict(findings)
    assert not passed and text.endswith("; 1 kernels broke")


def test_only_kernels_that_claim_the_bits_decide_the_verdict():
    turned = with_one_bit_turned(model_kernel("rope"))
    assert check.verdict(check_alike(turned))[1] is False
    # One of this package's whose certificate is lost claims them all the same.
    assert check.verdict(check_alike(replace(turned, uncertified="has changed")))[1] is False
    other = replace(turned, provider=cublas.PROVIDER, uncertified="turns a bit")
    assert check.verdict(check_alike(other))[1] is True


def test_the_model_runs_once_for_all_kernels_of_an_operation(monkeypatch):
    calls = []
    model = model_kernel("rope")
    counted = replace(model, run=lambda *args, **kwargs: calls.append(1) or model.run(*args, **kwargs))
    monkeypatch.setattr(check.sm90_model, "kernels", lambda: [counted])
    assert check.verdict(check_alike(model, model, model))[1]
    assert len(calls) == CASES


def of_the_model(op: str) -> list[check.Finding]:
    """What a process does for an operation; that of `combine` dies as one does whose kernel ends it."""
    if op == "combine":
        os._exit(3)
    return check_alike(model_kernel(op))


def test_operations_have_processes_of_their_own():
    findings = {finding.op: finding for finding in check.in_processes(of_the_model, ["rope", "combine", "rms_norm"])}
    assert isinstance(findings["rope"], check.Result) and isinstance(findings["rms_norm"], check.Result)
    assert findings["combine"] == check.Broken("combine", "all", "the process died")
    assert not check.verdict(list(findings.values()))[1]
