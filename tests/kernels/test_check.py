"""`dsv3 kernels check` on a CPU: the model of Hopper checked against itself, and against itself with a bit turned."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv3_plugin.errors import InputError
from dsv3_plugin.hooks import Kernel
from dsv3_plugin.kernels import cases, check, cublas, deep_gemm, flash_mla, sm90_model

CASES, SEED = 3, 1


def model_kernel(op: str) -> Kernel:
    (kernel,) = [kernel for kernel in sm90_model.kernels() if kernel.op == op]
    return replace(kernel, provider="triton")


def with_one_bit_turned(kernel: Kernel) -> Kernel:
    """The first output of every call differs in its last bit."""

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = kernel.run(*args, **kwargs)
        out.view(torch.int16).view(-1)[0] ^= 1
        return out

    return replace(kernel, run=run)


def check_alike(*kernels: Kernel, cpu_every: int = 0) -> list[check.Finding]:
    return check.check_alike(list(kernels), range(CASES), SEED, check.Where("cpu", "cpu", cpu_every))


@pytest.mark.parametrize("op", ["rope", "combine"])
def test_the_model_is_equal_to_itself(op):
    (result,) = check_alike(model_kernel(op))
    assert (result.cases, result.wrong_cases, result.wrong_outputs, result.failed) == (CASES, 0, 0, False)
    assert str(result).endswith("equal")


@pytest.mark.parametrize("op", ["rope", "combine"])
def test_a_turned_bit_fails_where_the_kernel_is_meant_to_be_exact(op):
    (result,) = check_alike(with_one_bit_turned(model_kernel(op)))
    assert (result.wrong_cases, result.wrong_outputs, result.failed) == (CASES, CASES, True)
    assert "3 cases differ; case 0: 1 outputs" in str(result)


def test_a_zero_of_the_other_sign_is_wrong(monkeypatch):
    model = model_kernel("mla_attention")

    def zero(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(model.run(*args, **kwargs))

    monkeypatch.setattr(check, "model_of", lambda op: replace(model, run=zero))
    (result,) = check_alike(replace(model, run=lambda *args, **kwargs: -zero(*args, **kwargs)))
    assert result.wrong_cases == CASES and result.failed


def test_of_a_kernel_without_certificate_the_share_and_the_largest_difference_are_told():
    kernel = replace(with_one_bit_turned(model_kernel("rope")), provider=cublas.PROVIDER, uncertified="turns a bit")
    (result,) = check_alike(kernel)
    assert result.wrong_outputs == CASES and not result.failed
    assert 0 < result.largest_difference < 1
    assert f"no certificate: 3 cases and {3 / result.outputs:.4%} of the outputs differ, by " in str(result)


def test_a_sample_of_expectations_is_computed_on_a_cpu_too():
    of_kernel, of_model = check_alike(model_kernel("rope"), cpu_every=2)
    assert (of_kernel.cases, of_model.cases, of_model.is_of_model) == (CASES, 2, True)
    assert check.verdict([of_kernel, of_model])[0].endswith("; 2 of the expectations were computed on the CPU too")


def test_an_expectation_that_the_cpu_contradicts_fails(monkeypatch):
    """The model prints another bit each second time: in the sample, as another device would."""
    model, calls = model_kernel("rope"), itertools.count()

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        printed = with_one_bit_turned(model) if next(calls) % 2 else model
        return printed.run(*args, **kwargs)

    monkeypatch.setattr(check.sm90_model, "kernels", lambda: [replace(model, provider=sm90_model.PROVIDER, run=run)])
    of_kernel, of_model = check_alike(model, cpu_every=1)
    assert not of_kernel.wrong_cases and of_model.wrong_cases == CASES
    text, passed = check.verdict([of_kernel, of_model])
    assert not passed and "bits differ" in text and "model on the CPU" in str(of_model)


def test_an_output_nobody_wrote_is_infinitely_far():
    expected = torch.ones(4)
    assert check.largest_difference(expected, torch.tensor([1, 1, torch.nan, 1])) == torch.inf
    assert check.largest_difference((expected, expected), (expected, expected * 1.5)) == 0.5
    assert check.largest_difference(expected, expected) == 0


def test_shapes_are_refused_by_other_peoples_kernels_only():
    def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise InputError("not this shape")

    other = replace(model_kernel("rope"), provider=cublas.PROVIDER, run=refuse, uncertified="refuses")
    (result,) = check_alike(other)
    assert (result.cases, result.refused_cases) == (0, CASES)
    (broken,) = check_alike(replace(other, provider="triton"))
    assert broken == check.Broken("rope", "triton", "InputError: not this shape")


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
    text, passed = check.verdict(check_alike(other))
    assert passed and text == "no kernel that is meant to be equal was checked"


def test_the_model_runs_once_for_all_kernels_of_an_operation(monkeypatch):
    calls = []
    model = model_kernel("rope")
    counted = replace(model, run=lambda *args, **kwargs: calls.append(1) or model.run(*args, **kwargs))
    monkeypatch.setattr(check.sm90_model, "kernels", lambda: [counted])
    assert check.verdict(check_alike(model, model, model))[1]
    assert len(calls) == CASES


def of_the_model(share: check.Share) -> list[check.Finding]:
    """What a process does for a share; that of the first ones of `combine` dies as one does whose kernel ends it."""
    if share.op == "combine" and share.numbers.start == 0:
        os._exit(3)
    where = check.Where("cpu", "cpu", 0)
    return check.check_alike([model_kernel(share.op)], share.numbers, SEED, where)


def test_processes_share_an_operations_cases_and_outlive_one_that_dies(monkeypatch):
    monkeypatch.setattr(check, "_SHARE", 2)
    shares = check.shares(["rope", "combine"], CASES)
    assert [(share.op, share.numbers) for share in shares] == [
        ("rope", range(2)),
        ("combine", range(2)),
        ("rope", range(2, 3)),
        ("combine", range(2, 3)),
    ]
    ended = list(check.in_processes(of_the_model, shares))
    for op in ("rope", "combine"):
        assert [share.numbers.start for share, _ in ended if share.op == op] == [0, 2], "the first goes ahead"
    findings = {found[0].op: found for found in check.by_operation(ended, 2)}
    (of_rope,) = findings["rope"]
    assert (of_rope.cases, of_rope.wrong_cases) == (CASES, 0)
    of_rest, died = findings["combine"]
    assert of_rest.cases == 1 and died == check.Broken("combine", "all", "the process died")
    assert not check.verdict([of_rope, of_rest, died])[1]


def test_results_of_shares_are_one_result():
    """The first fault is that of the lowest case, whichever process ended first."""

    def share(start: int, **more: Any) -> tuple[check.Share, list[check.Finding]]:
        result = check.Result("rope", "triton", 10, 100, **more)
        return check.Share("rope", range(start, start + 10)), [result, check.Result("rope", "cublas", 9, exact=False)]

    late = share(10, wrong_cases=1, wrong_outputs=2, first_wrong="case 11", largest_difference=0.5)
    early = share(0, wrong_cases=2, wrong_outputs=3, first_wrong="case 4", largest_difference=0.25)
    ((ours, theirs),) = check.by_operation([late, early], 2)
    assert ours == check.Result(
        "rope", "triton", 20, 200, wrong_cases=3, wrong_outputs=5, first_wrong="case 4", largest_difference=0.5
    )
    assert theirs.cases == 18 and not list(check.by_operation([late], 2))


def test_other_providers_are_checked_where_they_are_named(monkeypatch):
    monkeypatch.setattr(check, "with_each_maker", lambda kernels: kernels)  # needs Triton
    assert not {kernel.provider for kernel in check.chosen(["linear"], None)} & check.OTHERS
    named = check.chosen(["linear"], [cublas.PROVIDER, deep_gemm.PROVIDER])
    assert {kernel.provider for kernel in named} == {cublas.PROVIDER, deep_gemm.PROVIDER}


def test_kernels_get_cases_that_they_take_and_few_that_they_are_compiled_for():
    def sizes(op: str, name: str) -> cases.Sizes:
        return check.sizes_of(replace(model_kernel(op), provider=name))

    assert sizes("mla_attention", "cuda").latents == sizes("mla_attention", flash_mla.PROVIDER).latents == ((512, 64),)
    assert sizes("mla_attention", "triton").latents == ((128, 32), (64, 16))
    assert sizes("linear", "triton") == cases.LARGE
    few = sizes("linear", deep_gemm.PROVIDER)._replace(rows=(7, 99))
    weights = {cases.linear_case(random.Random(number), few).args[1].shape for number in range(100)}
    assert 12 < len(weights) <= 36
