"""Other people's kernels as providers: what they say of themselves, and what they refuse before they are called."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3_plugin import registry
from dsv3_plugin.certificates import Certificate, Subject
from dsv3_plugin.errors import InputError, KernelError
from dsv3_plugin.hooks import Kernel, Setting, always
from dsv3_plugin.kernels import hopper, installed, provider
from dsv3_plugin.kernels.certify.targets import Target, Where
from dsv3_plugin.kernels.hopper import V3_LATENT
from dsv3_plugin.kernels.vendors import cublas, deep_gemm, flash_mla, transformer_engine
from dsv3_plugin.ops.mla_attention import mla_attention
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.quantize import E4M3
from dsv3_plugin.profile import BF16, FP8_FLOAT32, FP8_UE8M0, FP32
from dsv3_plugin.registry import bind, with_training

HOPPER = Setting("cuda", "sm90", FP8_UE8M0, (9, 0), V3_LATENT)
OF_TRANSFORMER_ENGINE = {(transformer_engine.PROVIDER, op) for op in ("fp8_linear", "fp8_wgrad")}
KERNELS = [kernel for module in provider.OTHERS for kernel in module.kernels()]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: f"{kernel.provider}-{kernel.op}")
def test_each_can_be_certified_or_says_why_not(kernel):
    can_be = kernel.provider == deep_gemm.PROVIDER or (kernel.provider, kernel.op) in OF_TRANSFORMER_ENGINE
    assert can_be == (kernel.uncertified is None)
    for elsewhere in (
        Setting("cpu", "cpu", BF16),
        Setting("cpu", "sm90", BF16),
        Setting("cuda", "sm90", FP32, (9, 0), V3_LATENT),
        Setting("cuda", "sm90", BF16, (10, 0), V3_LATENT),
    ):
        assert not kernel.is_supported(elsewhere), elsewhere


def test_what_is_not_installed_is_named():
    is_supported = hopper.on_hopper_with(lambda: "a lab's kernel is not installed")
    assert is_supported(HOPPER).reason == "a lab's kernel is not installed"
    assert hopper.on_hopper_with(lambda: None)(HOPPER)
    assert installed.version_of("no-such-distribution", "pluggy")
    assert installed.version_of("no-such-distribution") is None


def test_flash_mla_attends_with_the_latent_of_v3_only(monkeypatch):
    monkeypatch.setattr(flash_mla, "missing", lambda: None)
    (kernel,) = flash_mla.kernels()
    assert kernel.is_supported(HOPPER)
    other = Setting("cuda", "sm90", FP8_UE8M0, (9, 0), {"kv_lora_rank": 128, "qk_rope_head_dim": 64})
    assert "kv_lora_rank" in str(kernel.is_supported(other).reason)


def test_transformer_engine_multiplies_what_it_sums_in_order_and_for_one_weight(monkeypatch):
    monkeypatch.setattr(transformer_engine, "version_of", lambda *_: "2.13.0")
    kernels = {kernel.op: kernel for kernel in transformer_engine.kernels()}
    for op in ("fp8_linear", "fp8_wgrad"):
        formats = {"ue8m0", "float32"} if op == "fp8_linear" else {"ue8m0"}
        assert kernels[op].is_supported(HOPPER)
        assert bool(kernels[op].is_supported(replace(HOPPER, profile=FP8_FLOAT32))) == ("float32" in formats)
        (target, *_) = (Target(kernels[op], part) for part in kernels[op].parts)
        assert set(target.sizes(Where()).scale_formats) == formats, "what its cases are drawn from"
    values, ones = (torch.zeros(16, 4224).to(E4M3), torch.ones(16, 33)), torch.ones(1, 33)
    with pytest.raises(InputError, match="sums up to 4096 products in order, not 4224"):
        transformer_engine.linear_alone(values[0], values[1], values[0], ones)
    for rows, counts in ((12, [128]), (8, [64, 64]), (8, [4224])):
        grad, x = (torch.zeros(n, sum(counts)).to(E4M3) for n in (rows, 128))
        blocks = torch.ones(128, sum(counts) // 128)
        with pytest.raises(InputError, match=r"TransformerEngine takes one weight of whole 8 rows and up to 4096"):
            transformer_engine.wgrad_alone(grad, blocks[:rows], x, blocks, torch.tensor(counts))


def test_the_preferred_provider_goes_first_where_it_may_serve(monkeypatch):
    monkeypatch.setattr(registry.certificates, "find", lambda subject, dtype, shipped: CERTIFICATE)
    own = [kernel for kernel in provider.dsv3_kernels() if kernel.provider in ("triton", "cuda")]
    everyone = [_without_refusal(kernel) for kernel in [*own, *KERNELS]]

    def of(provider: str, **asked: str) -> set[str]:
        ops = with_training(bind(HOPPER, "strict", everyone, **asked), everyone)
        return {choice.op for choice in ops.provenance if choice.provider == provider}

    assert of("transformer-engine") == set()
    assert of("transformer-engine", preferred="transformer-engine") == {"fp8_linear", "fp8_wgrad"}
    assert "quantize_fp8" in of("triton", preferred="transformer-engine"), "not one that has no certificate"
    assert of("nobody", preferred="nobody") == set() and of("triton", preferred="nobody") == of("triton")


def test_strict_mode_never_takes_one_without_certificate(monkeypatch):
    """On a Hopper card with all of them installed, and certificates for all that can have one; fast mode may."""
    monkeypatch.setattr(registry.certificates, "find", lambda subject, dtype, shipped: CERTIFICATE)
    own = [kernel for kernel in provider.dsv3_kernels() if kernel.provider in ("triton", "cuda")]
    forced = [_without_refusal(kernel) for kernel in [*own, *KERNELS]]
    forced = [kernel for kernel in forced if kernel.provider != deep_gemm.PROVIDER]
    strict = {choice.provider for choice in bind(HOPPER, "strict", forced).provenance}
    assert strict <= {"triton", "cuda"}
    others_first = [_first(kernel) if kernel.uncertified else kernel for kernel in forced]
    assert {choice.provider for choice in bind(HOPPER, "strict", others_first).provenance} == strict
    fast = {choice.provider for choice in bind(HOPPER, "fast", others_first).provenance}
    assert {"cublas", "flash-mla", "transformer-engine"} & fast


CERTIFICATE = Certificate(
    subject=Subject(
        operation="any",
        contract_version=1,
        arithmetic="sm90",
        implementation="any",
        entry="any:any",
        digest="0",
        versions={},
        card="a card",
        capability="9.0",
    ),
    seed=0,
    cases=1000,
    refused_cases=0,
    cases_on_cpu=63,
    dtypes=("bfloat16",),
    page_sizes=(1, 32, 64),
)


def test_strict_mode_refuses_where_only_such_a_kernel_serves():
    with pytest.raises(KernelError) as error:
        bind(HOPPER, "strict", [_without_refusal(kernel) for kernel in KERNELS if kernel.uncertified])
    message = str(error.value)
    for kernel in KERNELS:
        if kernel.uncertified is not None:
            reason = f"has no certificate, which strict mode needs: {kernel.uncertified}"
            assert f"{kernel.provider} {kernel.version}: {reason}" in message
    assert "--certify" not in message, "a check would not help"
    assert message.endswith("DSV3_PLUGIN_MODE=fast takes kernels without certificate")


def _without_refusal(kernel: Kernel) -> Kernel:
    return replace(kernel, is_supported=always)


def _first(kernel: Kernel) -> Kernel:
    return replace(kernel, priority=100)


def test_bad_input_is_named():
    values = torch.zeros(2, 128).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="cuBLASLt needs weight rows in multiples of 16, not 24"):
        cublas.fp8_linear(values, torch.ones(2, 1), torch.zeros(24, 128).to(values.dtype), torch.ones(1, 1))
    q, pages, starts = torch.zeros(1, 4, 576), torch.zeros(4, 16, 576), torch.tensor([0, 1])
    batch = PagedBatch.of(q, pages, torch.zeros(1, 1, dtype=torch.int64), starts[1:], starts)
    with pytest.raises(InputError, match="FlashMLA reads pages of 64 keys, these have 16"):
        flash_mla.mla_attention(q, pages, batch, scale=1.0, kv_lora_rank=512)


def test_products_of_torch_are_the_operations_to_rounding():
    """On a CPU, whose torch has these products too: strides and dtypes, not bits."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 3, 32, generator=generator), torch.randn(3, 16, 32, generator=generator)
    wide = torch.randn(5, 3, 48, generator=generator)
    for case in (x, wide[..., :32]):
        out = cublas.head_linear(case, weight)
        torch.testing.assert_close(out, torch.einsum("mhk,hnk->mhn", case, weight))
        assert out.is_contiguous()
    torch.testing.assert_close(cublas.linear(x[:, 0].contiguous(), weight[0]), x[:, 0] @ weight[0].t())


def test_cublaslt_gets_rows_in_whole_fours():
    x, scale = torch.ones(5, 256).to(E4M3), torch.arange(10.0).view(5, 2)
    values, scales = cublas.whole_rows(x, scale)
    assert values.dtype == E4M3 and scales.stride() == (1, 8)
    assert torch.equal(values.float(), F.pad(x.float(), (0, 0, 0, 3)))
    assert torch.equal(scales, F.pad(scale, (0, 0, 0, 3)))
    whole, _ = cublas.whole_rows(values, scales)
    assert whole is values


def attend_alike(q, latent_cache, block_table, seq_lens, scale):
    """What FlashMLA is asked for, by the reference: q [num_reqs, queries, H, 576]."""
    starts = torch.arange(len(q) + 1) * q.shape[1]
    rows = q.flatten(0, 1)
    batch = PagedBatch.of(rows, latent_cache, block_table, seq_lens, starts)
    out = mla_attention(rows, latent_cache, batch, kv_lora_rank=512, scale=scale)
    return out.unflatten(0, q.shape[:2])


@pytest.mark.parametrize("counts", [(1, 1, 1), (4,), (2, 1, 2, 3), (1, 0, 3), (2, 0)])
def test_flash_mla_gets_requests_with_as_many_queries_together(monkeypatch, counts):
    monkeypatch.setattr(flash_mla, "_attend", attend_alike)
    generator = torch.Generator().manual_seed(1)
    requests, starts = len(counts), torch.tensor([0, *counts]).cumsum(0)
    lengths = torch.tensor(counts) + torch.randint(0, 100, (requests,), generator=generator)
    cache = torch.randn(3 * requests, 64, 576, generator=generator)
    table = torch.randperm(3 * requests, generator=generator).view(requests, 3)
    q = torch.randn(int(starts[-1]), 2, 576, generator=generator)
    arguments = (q, cache, PagedBatch.of(q, cache, table, lengths, starts))
    expected = mla_attention(*arguments, kv_lora_rank=512, scale=0.05)
    assert torch.equal(flash_mla.mla_attention(*arguments, kv_lora_rank=512, scale=0.05), expected)
    # The twin: the same queries given to the requests in another order are other rows.
    shuffled = PagedBatch.of(q, cache, table.flip(0), lengths, starts)
    other = flash_mla.mla_attention(q, cache, shuffled, kv_lora_rank=512, scale=0.05)
    assert requests == 1 or not torch.equal(other, expected)
