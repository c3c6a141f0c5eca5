"""`dsv3 kernels check` on a CPU: the model of Hopper checked against itself, and against itself with a bit turned."""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsv3_plugin.errors import InputError, KernelError
from dsv3_plugin.hooks import Implementation, Kernel, always
from dsv3_plugin.kernels import hopper, provider
from dsv3_plugin.kernels.certify import check, compare, processes
from dsv3_plugin.kernels.certify.findings import Broken, Finding, Result
from dsv3_plugin.kernels.certify.targets import Target, Where, chosen
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.kernels.vendors import cublas, deep_gemm, flash_mla
from dsv3_plugin.ops import drawing
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.registry import definitions

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


def check_alike(*kernels: Kernel, cpu_every: int = 0) -> list[Finding]:
    targets = [Target(kernel, part) for kernel in kernels for part in kernel.parts]
    return compare.check_alike(targets, range(CASES), SEED, Where("cpu", "cpu", cpu_every))


def define(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """The definition of its operation from now on."""
    monkeypatch.setattr(compare, "definitions", lambda arithmetic: {kernel.op: kernel})


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


def test_a_kernel_that_changes_its_arguments_is_wrong():
    model = model_kernel("rope")

    def run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        out = model.run(x, cos, sin)
        cos.mul_(0.5)
        return out

    (result,) = check_alike(replace(model, run=run))
    assert (result.wrong_cases, result.wrong_outputs, result.failed) == (CASES, 0, True)
    assert "case 0: it changes argument 1, [" in str(result)


def test_a_kernel_that_changes_its_batch_is_wrong():
    model = model_kernel("mla_attention")

    def run(q, cache, batch, *args, **kwargs):
        out = model.run(q, cache, batch, *args, **kwargs)
        batch.block_table[0, -1] += 1
        return out

    (result,) = check_alike(replace(model, run=run))
    assert (result.wrong_cases, result.wrong_outputs) == (CASES, 0)
    assert "case 0: it changes argument 2, [" in str(result)


def test_a_kernel_that_returns_one_buffer_again_is_wrong():
    model, buffers = model_kernel("rope"), {}

    def run(*args: torch.Tensor) -> torch.Tensor:
        out = model.run(*args)
        return buffers.setdefault((out.shape, out.dtype), torch.empty_like(out)).copy_(out)

    (result,) = check_alike(replace(model, run=run))
    assert (result.wrong_cases, result.wrong_outputs, result.failed) == (CASES, 0, True)
    assert "case 0: a call returns the memory of the result before, [" in str(result)


def test_a_kernel_that_is_right_once_is_wrong():
    model, calls = model_kernel("rope"), itertools.count()
    turned = with_one_bit_turned(model)
    (result,) = check_alike(replace(model, run=lambda *args: (turned if next(calls) % 2 else model).run(*args)))
    assert (result.wrong_cases, result.wrong_outputs) == (CASES, CASES)


def test_slices_that_are_added_from_left_to_right_are_wrong():
    model, product = model_kernel("sliced_linear"), model_kernel("linear").run

    def run(x: torch.Tensor, weight: torch.Tensor, slices: int, *, out_dtype: torch.dtype | None = None) -> Any:
        parts = zip(x.chunk(slices, 1), weight.chunk(slices, 1), strict=True)
        total, *sums = [product(a.contiguous(), b.contiguous(), out_dtype=torch.float32) for a, b in parts]
        for of_slice in sums:
            total = total + of_slice
        return total.to(out_dtype or x.dtype)

    drawn = drawing.SMALL._replace(depths=(512,))
    targets = [Target(replace(model, run=run), replace(part, run=run)) for part in model.parts]
    targets += [Target(model, part) for part in model.parts]
    wrong, right = compare._check_group(targets, drawn, (torch.bfloat16,), range(20), SEED, Where("cpu", "cpu", 0))
    assert wrong.failed and wrong.wrong_cases > 3 and not right.wrong_cases


def test_a_zero_of_the_other_sign_is_wrong(monkeypatch):
    model = model_kernel("mla_attention")

    def zero(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(model.run(*args, **kwargs))

    define(monkeypatch, replace(model, run=zero))
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

    define(monkeypatch, replace(model, run=run))
    of_kernel, of_model = check_alike(model, cpu_every=1)
    assert not of_kernel.wrong_cases and of_model.wrong_cases == CASES
    text, passed = check.verdict([of_kernel, of_model])
    assert not passed and "bits differ" in text and "model on the CPU" in str(of_model)


def test_an_output_nobody_wrote_is_infinitely_far():
    expected = torch.ones(4)
    assert compare.largest_difference(expected, torch.tensor([1, 1, torch.nan, 1])) == torch.inf
    assert compare.largest_difference((expected, expected), (expected, expected * 1.5)) == 0.5
    assert compare.largest_difference(expected, expected) == 0


def refuse(*args: Any, **kwargs: Any) -> torch.Tensor:
    raise InputError("not this shape")


def test_shapes_are_refused_by_other_peoples_kernels_only():
    other = replace(model_kernel("rope"), provider="a lab", run=refuse)
    (result,) = check_alike(other)
    assert (result.cases, result.refused_cases) == (0, CASES)
    assert check.verdict([result])[0] == "no kernel that is meant to be equal was compared"
    (broken,) = check_alike(replace(other, provider="triton"))
    assert broken == Broken("rope", "triton", "refuse", "InputError: not this shape")


def test_each_implementation_of_a_kernel_is_checked_by_itself():
    """One that takes no shape and one that turns a bit, whichever the kernel itself would run."""
    model = model_kernel("rope")
    parts = {"none": refuse, "wrong": with_one_bit_turned(model).run, "right": model.run}
    chooses = replace(model, implementations=tuple(Implementation(name, run, "") for name, run in parts.items()))
    found = {result.implementation: result for result in check_alike(chooses)}
    assert {name: (r.cases, r.refused_cases, r.wrong_cases) for name, r in found.items()} == {
        "none": (0, CASES, 0),
        "wrong": (CASES, 0, CASES),
        "right": (CASES, 0, 0),
    }
    assert "triton wrong" in str(found["wrong"])


def test_cases_tell_which_pages_and_dtypes_they_had():
    where = Where("cpu", "cpu", 0, "cpu")
    kernel = replace(model_kernel("mla_attention"), provider="a lab", is_supported=always)
    (part,) = kernel.parts
    drawn = drawing.SMALL._replace(requests=(1,))
    model = definitions("cpu")["mla_attention"]
    define_parts = [Target(replace(kernel, run=model.run), replace(part, run=model.run))]
    (result,) = compare._check_group(define_parts, drawn, (torch.bfloat16, torch.float32), range(24), SEED, where)
    assert result.cases == 24 and not result.wrong_cases
    assert result.page_sizes == {1, 16, 32, 64} and result.dtypes == {"bfloat16", "float32"}


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
    other = replace(turned, provider=cublas.PROVIDER, uncertified="turns a bit")
    text, passed = check.verdict(check_alike(other))
    assert passed and text == "no kernel that is meant to be equal was compared"


def test_the_model_runs_once_for_all_kernels_of_an_operation(monkeypatch):
    calls = []
    model = model_kernel("rope")
    counted = replace(model, run=lambda *args, **kwargs: calls.append(1) or model.run(*args, **kwargs))
    define(monkeypatch, counted)
    assert check.verdict(check_alike(model, model, model))[1]
    assert len(calls) == CASES


def of_the_model(share: processes.Share) -> list[Finding]:
    """What a process does for a share; that of the first ones of `combine` dies as one does whose kernel ends it."""
    if share.op == "combine" and share.numbers.start == 0:
        os._exit(3)
    where = Where("cpu", "cpu", 0)
    kernel = model_kernel(share.op)
    return compare.check_alike([Target(kernel, *kernel.parts)], share.numbers, SEED, where)


def test_processes_share_an_operations_cases_and_outlive_one_that_dies(monkeypatch):
    monkeypatch.setattr(processes, "SHARE", 2)
    shares = processes.shares(["rope", "combine"], CASES)
    assert [(share.op, share.numbers) for share in shares] == [
        ("rope", range(2)),
        ("combine", range(2)),
        ("rope", range(2, 3)),
        ("combine", range(2, 3)),
    ]
    ended = list(processes.in_processes(of_the_model, shares))
    for op in ("rope", "combine"):
        assert [share.numbers.start for share, _ in ended if share.op == op] == [0, 2], "the first goes ahead"
    findings = {found[0].op: found for found in processes.by_operation(ended, 2)}
    (of_rope,) = findings["rope"]
    assert (of_rope.cases, of_rope.wrong_cases) == (CASES, 0)
    of_rest, died = findings["combine"]
    assert of_rest.cases == 1 and died == Broken("combine", "all", "all", "the process died")
    assert not check.verdict([of_rope, of_rest, died])[1]


def test_results_of_shares_are_one_result():
    """The first fault is that of the lowest case, whichever process ended first."""

    def share(start: int, **more: Any) -> tuple[processes.Share, list[Finding]]:
        result = Result("rope", "triton", "rope", 10, 100, **more)
        other = Result("rope", "cublas", "rope", 9, exact=False)
        return processes.Share("rope", range(start, start + 10)), [result, other]

    late = share(10, wrong_cases=1, wrong_outputs=2, first_wrong="case 11", largest_difference=0.5)
    early = share(0, wrong_cases=2, wrong_outputs=3, first_wrong="case 4", largest_difference=0.25)
    ((ours, theirs),) = processes.by_operation([late, early], 2)
    assert ours == Result(
        "rope", "triton", "rope", 20, 200, wrong_cases=3, wrong_outputs=5, first_wrong="case 4", largest_difference=0.5
    )
    assert theirs.cases == 18 and not list(processes.by_operation([late], 2))


def test_all_that_are_meant_to_be_exact_are_checked_or_those_that_are_named():
    def providers(*names: str) -> set[str]:
        targets = chosen(["linear", "mla_attention"], list(names) or None, Where())
        return {target.kernel.provider for target in targets}

    assert providers() == {"triton", "cuda", deep_gemm.PROVIDER}
    assert providers(cublas.PROVIDER, flash_mla.PROVIDER) == {cublas.PROVIDER, flash_mla.PROVIDER}
    with pytest.raises(KernelError, match="there is no provider cubals; the providers are cublas, cuda, deep-gemm, "):
        providers("cubals")


def test_what_two_kernels_hand_to_is_checked_once():
    names = [target.part.name for target in chosen(["linear"], None, Where())]
    assert sorted(names) == ["deep_gemm.bf16_gemm_nt", "triton.linear"]
    names = [target.part.name for target in chosen(["linear"], [deep_gemm.PROVIDER], Where())]
    assert sorted(names) == ["deep_gemm.bf16_gemm_nt", "triton.linear"]


def test_implementations_get_cases_that_they_take_and_few_that_they_are_compiled_for(monkeypatch):
    def sizes(kernel: Kernel) -> drawing.Sizes:
        return Target(kernel, kernel.parts[0]).sizes(Where())

    monkeypatch.setattr(provider, "is_supported", hopper.on_hopper_with(lambda: None))
    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.setattr(flash_mla, "missing", lambda: None)
    monkeypatch.setattr(deep_gemm, "missing", lambda: None)
    own = {kernel.op: kernel for kernel in map(provider.own_kernel, operations().values())}
    assert sizes(provider.v3_attention()).latents == sizes(flash_mla.kernels()[0]).latents == ((512, 64),)
    of_any_latent = sizes(own["mla_attention"])
    assert of_any_latent.latents == ((128, 32), (64, 16)) and of_any_latent.requests == (1, 3)
    assert sizes(own["linear"]) == drawing.LARGE
    few = sizes(next(kernel for kernel in deep_gemm.kernels() if kernel.op == "linear"))._replace(rows=(7, 99))
    weights = {operations()["linear"].draw(random.Random(number), few).args[1].shape for number in range(100)}
    assert 12 < len(weights) <= 36
