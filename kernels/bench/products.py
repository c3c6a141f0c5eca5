"""Products in fp8, dense and by expert, and in bf16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from dsv3_plugin.kernels.bench import peers
from dsv3_plugin.kernels.bench.case import (
    DEVICE,
    EXPERT_SIZE,
    EXPERTS,
    HIDDEN,
    MOST_ROWS,
    TOPK,
    Case,
    Contenders,
    Weight,
    bf16,
    fp8_weight,
    peer,
    random_experts,
    served,
)
from dsv3_plugin.kernels.bench.measure import Call, Rows
from dsv3_plugin.kernels.triton import fp8_linear, linear, quantize, sliced_linear
from dsv3_plugin.kernels.vendors import cublas
from dsv3_plugin.ops import fp8_linear as fp8_contracts
from dsv3_plugin.ops import linear as contracts
from dsv3_plugin.ops.permute import permute_fp8, sort_by_expert


def dense_cases() -> Iterator[Case]:
    """fp8 projections: decode with 1 to 128 tokens, prefill with 4096."""
    decoded = ((2112, 7168), (24576, 1536), (7168, 16384))
    shapes = [(m, n, k) for n, k in decoded for m in (1, 16, 64, 128, 4096)]
    shapes += [(4096, n, k) for n, k in ((36864, 7168), (7168, 18432))]
    rows = {(n, k): partial(_dense_rows, n, k) for _, n, k in shapes}
    for m, n, k in shapes:

        def make(m: int = m, n: int = n, k: int = k) -> Contenders:
            weight = fp8_weight(n, k)
            x = quantize.quantize_fp8(bf16(m, k), "float32")
            out = torch.empty(m, n, dtype=torch.bfloat16, device=DEVICE)

            def deep_gemm() -> Call:
                import deep_gemm

                def call() -> torch.Tensor:
                    deep_gemm.fp8_gemm_nt(x, weight, out)
                    return out

                return call

            def cublaslt() -> Call:
                operands = *cublas.whole_rows(*x), weight[0], F.pad(weight[1], (0, -weight[1].shape[1] % 4))
                return lambda: cublas.product(*operands)[:m]

            return Contenders(
                lambda: fp8_linear.fp8_linear(*x, *weight),
                {"DeepGEMM": peer(deep_gemm), "cuBLASLt": peer(cublaslt)},
                served=lambda: served()[fp8_contracts.fp8_linear](*x, *weight),
            )

        moved = m * k + n * k + 2 * m * n
        yield Case(f"fp8 {m} x {n} x {k}", make, moved, fp8_operations=2 * m * n * k, rows=rows[n, k])


def _dense_rows(n: int, k: int) -> Rows:
    weight = fp8_weight(n, k)
    values, scales = quantize.quantize_fp8(bf16(MOST_ROWS, k), "float32")
    return Rows(MOST_ROWS, lambda i: fp8_linear.fp8_linear(*permute_fp8(values, scales, i), *weight))


_SLICES = 8


def sliced_cases() -> Iterator[Case]:
    """What slices cost one rank: the projections whose sums tensor-parallel ranks share, attention's and the shared
    expert's, beside what a model runs without slices.
    """
    depths = (16384, 2048)
    rows = {k: (partial(_sliced_fp8_rows, k), partial(_sliced_rows, k)) for k in depths}
    for m, k in [(m, k) for k in depths for m in (1, 16, 128, 4096)]:

        def in_fp8(m: int = m, k: int = k) -> Contenders:
            weight, x = fp8_weight(HIDDEN, k), quantize.quantize_fp8(bf16(m, k), "float32")
            return Contenders(
                lambda: sliced_linear.sliced_fp8_linear(*x, *weight, _SLICES),
                invariant={"not in slices": lambda: served()[fp8_contracts.fp8_linear](*x, *weight)},
            )

        def in_bf16(m: int = m, k: int = k) -> Contenders:
            weight, x = bf16(HIDDEN, k), bf16(m, k)
            return Contenders(
                lambda: sliced_linear.sliced_linear(x, weight, _SLICES),
                invariant={"not in slices": lambda: served()[contracts.linear](x, weight)},
            )

        shape = f"{m} x {HIDDEN} x {k} in {_SLICES} slices"
        inputs, outputs, work = (m + HIDDEN) * k, m * HIDDEN, 2 * m * HIDDEN * k
        yield Case(f"fp8 {shape}", in_fp8, inputs + 2 * outputs, fp8_operations=work, rows=rows[k][0])
        yield Case(f"bf16 {shape}", in_bf16, 2 * (inputs + outputs), bf16_operations=work, rows=rows[k][1])


def _sliced_fp8_rows(k: int) -> Rows:
    weight = fp8_weight(HIDDEN, k)
    values, scales = quantize.quantize_fp8(bf16(MOST_ROWS, k), "float32")
    return Rows(MOST_ROWS, lambda i: sliced_linear.sliced_fp8_linear(*permute_fp8(values, scales, i), *weight, _SLICES))


def _sliced_rows(k: int) -> Rows:
    x, weight = bf16(MOST_ROWS, k), bf16(HIDDEN, k)
    return Rows(MOST_ROWS, lambda i: sliced_linear.sliced_linear(x[i], weight, _SLICES))


_LOCAL_EXPERTS = 32


def grouped_cases() -> Iterator[Case]:
    """All experts of a layer on one card, and 32 of them with as many rows each. DeepGEMM gets rows that lie as it
    wants them already, at no cost.
    """
    for n, k in ((2 * EXPERT_SIZE, HIDDEN), (HIDDEN, EXPERT_SIZE)):
        weight = fp8_weight(EXPERTS, n, k)
        rows = partial(_grouped_rows, weight)
        for tokens in (128, 1024, 4096):

            def make(tokens: int = tokens, n: int = n, k: int = k, weight: Weight = weight) -> Contenders:
                counts = torch.bincount(random_experts(tokens).flatten(), minlength=EXPERTS)
                return _grouped_contenders(counts, weight, masked=tokens <= 128)

            hit = EXPERTS * (1 - (1 - TOPK / EXPERTS) ** tokens)
            yield _grouped_case(f"grouped fp8 T={tokens}, 256 x {n} x {k}", make, hit, tokens * TOPK, n, k, rows)
        for each in (16, 1024):

            def local(each: int = each, weight: Weight = weight) -> Contenders:
                few = (weight[0][:_LOCAL_EXPERTS], weight[1][:_LOCAL_EXPERTS])
                counts = torch.full((_LOCAL_EXPERTS,), each, device=DEVICE)
                return _grouped_contenders(counts, few, masked=True)

            name = f"grouped fp8 {_LOCAL_EXPERTS} experts x {each} rows, {n} x {k}"
            yield _grouped_case(name, local, _LOCAL_EXPERTS, _LOCAL_EXPERTS * each, n, k, rows)


def _grouped_case(
    name: str, make: Callable[[], Contenders], experts: float, rows: int, n: int, k: int, check: Callable[[], Rows]
) -> Case:
    return Case(name, make, experts * n * k + rows * (k + 2 * n), fp8_operations=2 * rows * n * k, rows=check)


def _grouped_contenders(counts: torch.Tensor, weight: Weight, *, masked: bool) -> Contenders:
    """counts integers [E]; weight [E, N, K] and its scales."""
    experts, n, k = weight[0].shape
    rows = int(counts.sum())
    x = quantize.quantize_fp8(bf16(rows, k), "float32")

    def contiguous() -> Call:
        import deep_gemm

        align = deep_gemm.get_mk_alignment_for_contiguous_layout()
        padded = (counts + align - 1) // align * align
        expert = torch.repeat_interleave(torch.arange(experts, device=DEVICE), padded).to(torch.int32)
        wide = quantize.quantize_fp8(bf16(len(expert), k), "float32")
        out = torch.empty(len(expert), n, dtype=torch.bfloat16, device=DEVICE)
        return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(wide, weight, out, expert)

    def masked_layout() -> Call:
        import deep_gemm

        rows_each = max(128, -(-int(counts.max()) // 128) * 128)
        values, scales = quantize.quantize_fp8(bf16(experts * rows_each, k), "float32")
        # Scales of neighbouring rows lie side by side, as DeepGEMM reads them; otherwise it copies them in each call.
        by_row = scales.reshape(experts, rows_each, -1).transpose(1, 2).contiguous().transpose(1, 2)
        wide = values.view(experts, rows_each, k), by_row
        out = torch.empty(experts, rows_each, n, dtype=torch.bfloat16, device=DEVICE)
        used, expected = counts.to(torch.int32), -(-rows // experts)
        return lambda: deep_gemm.fp8_m_grouped_gemm_nt_masked(wide, weight, out, used, expected)

    theirs = {"DeepGEMM contiguous": peer(contiguous)}
    if masked:
        theirs["DeepGEMM masked"] = peer(masked_layout)
    return Contenders(
        lambda: fp8_linear.grouped_fp8_linear(*x, counts, *weight),
        theirs,
        served=lambda: served()[fp8_contracts.grouped_fp8_linear](*x, counts, *weight),
    )


def _grouped_rows(weight: Weight) -> Rows:
    """A row is a token with its eight experts."""
    ids, tokens = random_experts(MOST_ROWS), bf16(MOST_ROWS, weight[0].shape[2])

    def of(rows: torch.Tensor) -> torch.Tensor:
        source, slots, counts = sort_by_expert(ids[rows], EXPERTS)
        x = quantize.quantize_fp8(tokens[rows][source], "float32")
        return fp8_linear.grouped_fp8_linear(*x, counts, *weight)[slots].flatten(1)

    return Rows(MOST_ROWS, of)


def bf16_cases() -> Iterator[Case]:
    """Router, output head and absorbed projections."""
    shapes = ((1, 256, 7168), (128, 256, 7168), (4096, 256, 7168), (1, 129280, 7168), (128, 129280, 7168))
    rows = {(n, k): partial(_bf16_rows, n, k) for _, n, k in shapes}
    for m, n, k in shapes:

        def make(m: int = m, n: int = n, k: int = k) -> Contenders:
            x, weight = bf16(m, k), bf16(n, k)

            def deep_gemm() -> Call:
                import deep_gemm

                out = torch.empty(m, n, dtype=torch.bfloat16, device=DEVICE)

                def call() -> torch.Tensor:
                    deep_gemm.bf16_gemm_nt(x, weight, out)
                    return out

                return call

            return Contenders(
                lambda: linear.linear(x, weight),
                {"cuBLAS": lambda: F.linear(x, weight), "DeepGEMM": peer(deep_gemm)},
                {"vLLM": peer(peers.vllm_invariant_matmul, x, weight)},
                served=lambda: served()[contracts.linear](x, weight),
            )

        moved = 2 * (m * k + n * k + m * n)
        yield Case(f"bf16 {m} x {n} x {k}", make, moved, bf16_operations=2 * m * n * k, rows=rows[n, k])

    # The halves of kv_b_proj: queries to the latent, and the latent's sum to values.
    for name, n, k in (("W_UK", 512, 128), ("W_UV", 128, 512)):

        def absorbed(n: int = n, k: int = k) -> Contenders:
            x, weight = bf16(128, 128, k), bf16(128, n, k)
            return Contenders(
                lambda: linear.head_linear(x, weight),
                {"cuBLAS bmm": lambda: cublas.head_linear(x, weight)},
            )

        def heads_of(n: int = n, k: int = k) -> Rows:
            x, weight = bf16(MOST_ROWS, 128, k), bf16(128, n, k)
            return Rows(MOST_ROWS, lambda i: linear.head_linear(x[i], weight))

        moved = 2 * 128 * (128 * k + n * k + 128 * n)
        operations = 2 * 128 * 128 * n * k
        yield Case(f"{name} T=128, 128 x {n} x {k}", absorbed, moved, bf16_operations=operations, rows=heads_of)


def _bf16_rows(n: int, k: int) -> Rows:
    x, weight = bf16(MOST_ROWS, k), bf16(n, k)
    return Rows(MOST_ROWS, lambda i: linear.linear(x[i], weight))
