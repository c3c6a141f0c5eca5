"""Do the GPU kernels print the contract's bits? Random cases of every operation against the model of Hopper.

    dsv3 kernels check [--cases 40] [--op fp8_linear] [--provider cublas] [--seed 0]
                       [--record golden.safetensors] [--certify certificates.json]

Expected values come from `sm90_model` on the CPU. Memory that a kernel allocates is filled with NaN first, so that an
output nobody wrote is seen. Exits with status 1 if a bit differs of a kernel of this package, or of another's with a
certificate. Of another's without (it serves in fast mode only) the share of differing outputs and the largest
difference are told. Each operation has a process of its own: compiling and the model take the time, and a kernel that
breaks the card's state breaks it for its operation alone.

`--record` writes small cases and what the GPU printed to a file, for tests on machines without one. `--certify` writes
`certificates` of this package's kernels.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file

from dsv3_plugin.errors import InputError, KernelError
from dsv3_plugin.hooks import Kernel, Setting
from dsv3_plugin.kernels import certificates, flash_mla, provider, sm90_model, third_party
from dsv3_plugin.kernels.certificates import Certificate
from dsv3_plugin.ops.fp8 import quantize_fp8, quantize_weight
from dsv3_plugin.profile import FP8_UE8M0, ScaleFormat
from dsv3_plugin.registry import CONTRACTS

# Products that the model may be asked for in one case, some ns each.
_BUDGET = 1 << 25
# Cases whose expected results are made at a time.
_AHEAD = 32
_FORMATS: tuple[ScaleFormat, ...] = ("ue8m0", "float32")


class Sizes(NamedTuple):
    """What a case's sizes are drawn from."""

    rows: tuple[int, ...]
    depths: tuple[int, ...]
    columns: tuple[int, ...]
    heads: tuple[int, ...]
    head_sizes: tuple[int, ...]
    groups: tuple[int, ...]
    latents: tuple[tuple[int, int], ...]
    keys: int


LARGE = Sizes(
    rows=(1, 2, 3, 7, 8, 16, 17, 33, 64, 65, 100, 128, 129, 200, 257, 512, 1000, 4096),
    depths=(128, 256, 512, 1536, 2048, 7168),
    columns=(64, 128, 192, 256, 320, 576, 2112),
    heads=(1, 4, 16, 128),
    head_sizes=(64, 128, 512),
    groups=(1, 4, 8, 16, 24),
    latents=((512, 64), (128, 32), (64, 16)),
    keys=5000,
)
# A few kilobytes a case, for files that live in a repository.
SMALL = Sizes((1, 3, 5), (128, 256), (16,), (1, 4), (32,), (1, 3), ((64, 16),), 70)


class Case(NamedTuple):
    """Arguments of one call, on the CPU."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def bits_differ(expected: Any, actual: Any) -> int:
    """How many numbers of two results differ in a bit; tensors, or tuples of them, of equal shapes and dtypes."""
    if isinstance(expected, tuple):
        return sum(bits_differ(e, a) for e, a in zip(expected, actual, strict=True))
    assert expected.shape == actual.shape and expected.dtype == actual.dtype, (expected.shape, actual.shape)
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    difference = expected.contiguous().view(as_integer) != actual.cpu().contiguous().view(as_integer)
    return int(difference.sum())


def largest_difference(expected: Any, actual: Any) -> float:
    """How far a number is from the expected one, by the largest expected one of its tensor; infinitely if it is NaN."""
    if isinstance(expected, tuple):
        return max(largest_difference(e, a) for e, a in zip(expected, actual, strict=True))
    wanted = expected.double()
    difference = (wanted - actual.cpu().double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return float(difference.max() / wanted.abs().max().clamp_min(torch.finfo().tiny))


def numbers(rng: random.Random, *shape: int) -> torch.Tensor:
    """Normal bf16 numbers; each row has a magnitude of its own, some numbers are zero, some far above the rest."""
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    x = torch.randn(shape, generator=generator)
    rows = torch.randn((*shape[:-1], 1), generator=generator)
    spikes = torch.rand(shape, generator=generator)
    x = x * torch.exp2(2 * rows).where(torch.tensor(rng.random() < 0.5), torch.ones(()))
    x = torch.where(spikes < 0.01, x * 64, x)
    return torch.where(spikes > 0.98, torch.zeros(()), x).bfloat16()


def sizes(rng: random.Random, at: Sizes) -> tuple[int, int, int]:
    """Rows, columns and depth of a product inside the budget."""
    rows, depth = rng.choice(at.rows), rng.choice(at.depths)
    columns = min(rng.choice(at.columns), max(64, _BUDGET // (rows * depth) // 64 * 64))
    return rows, columns, depth


def experts(rng: random.Random, at: Sizes, rows: int) -> torch.Tensor:
    """Rows of each expert: some have none, some have many."""
    groups = rng.choice(at.groups)
    favourites = rng.sample(range(groups), rng.randint(1, groups))
    chosen = torch.tensor([rng.choice(favourites) for _ in range(rows)])
    return torch.bincount(chosen, minlength=groups)


def linear_case(rng: random.Random, at: Sizes) -> Case:
    """Depths that are no multiple of an instruction, columns that fill no tile, both output dtypes."""
    rows, columns, depth = sizes(rng, at)
    depth -= rng.choice((0, 0, 8, 120))
    weight = numbers(rng, columns - rng.choice((0, 0, 8)), depth)
    return Case((numbers(rng, rows, depth), weight), {"out_dtype": rng.choice((None, torch.float32))})


def head_linear_case(rng: random.Random, at: Sizes) -> Case:
    """x is a view with gaps, as the layers pass it."""
    rows, heads, depth = rng.choice(at.rows), rng.choice(at.heads), rng.choice(at.head_sizes)
    columns = min(rng.choice(at.head_sizes), max(32, _BUDGET // (rows * heads * depth) // 32 * 32))
    wide = numbers(rng, rows, heads, depth + 64)
    return Case((wide[..., :depth], numbers(rng, heads, columns, depth)), {})


def grouped_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Experts without rows, and one with all."""
    rows, columns, depth = sizes(rng, at)
    counts = experts(rng, at, rows)
    return Case((numbers(rng, rows, depth), counts, numbers(rng, len(counts), columns, depth)), {})


def quantize_case(rng: random.Random, at: Sizes) -> Case:
    """From subnormal to near overflow, both scale formats."""
    x = numbers(rng, rng.choice(at.rows), rng.choice(at.depths))
    x = x * 2.0 ** rng.choice((-130, -20, 0, 0, 0, 20, 100))
    return Case((x if rng.random() < 0.8 else x.float(), rng.choice(_FORMATS)), {})


def fp8_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Both scale formats; columns that fill no scale block."""
    rows, columns, depth = sizes(rng, at)
    scale_format = rng.choice(_FORMATS)
    weight = quantize_weight(numbers(rng, columns - rng.choice((0, 0, 8)), depth), scale_format)
    return Case((*quantize_fp8(numbers(rng, rows, depth), scale_format), *weight), {})


def grouped_fp8_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Both scale formats; experts without rows, and one with all."""
    rows, columns, depth = sizes(rng, at)
    counts = experts(rng, at, rows)
    scale_format = rng.choice(_FORMATS)
    weights = [quantize_weight(numbers(rng, columns, depth), scale_format) for _ in counts]
    values, scales = (torch.stack(parts) for parts in zip(*weights, strict=True))
    return Case((*quantize_fp8(numbers(rng, rows, depth), scale_format), counts, values, scales), {})


def rms_norm_case(rng: random.Random, at: Sizes) -> Case:
    """Widths that fill no block of 128, and no power of two."""
    width = rng.choice(at.depths) + rng.choice((0, 64, 72))
    return Case((numbers(rng, rng.choice(at.rows), width), numbers(rng, width), 1e-6), {})


def add_rms_norm_case(rng: random.Random, at: Sizes) -> Case:
    """Widths that fill no block of 128, and no power of two."""
    (x, weight, eps), _ = rms_norm_case(rng, at)
    return Case((x, numbers(rng, *x.shape), weight, eps), {})


def rms_norm_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """Widths of whole scale blocks, no power of two; both scale formats."""
    width = rng.choice(at.depths) + rng.choice((0, 128))
    x, weight = numbers(rng, rng.choice(at.rows), width), numbers(rng, width)
    return Case((x, weight, 1e-6, rng.choice(_FORMATS)), {})


def add_rms_norm_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """The same behind a sum."""
    (x, *rest), _ = rms_norm_fp8_case(rng, at)
    return Case((x, numbers(rng, *x.shape), *rest), {})


def rope_case(rng: random.Random, at: Sizes) -> Case:
    """x is a view with gaps, as the layers pass it."""
    rows, heads, pairs = rng.choice(at.rows), rng.choice(at.heads), rng.choice((16, 32))
    angles = torch.rand(rows, pairs, generator=torch.Generator().manual_seed(rng.getrandbits(48))) * 7
    wide = numbers(rng, rows, heads, 128 + 2 * pairs)
    return Case((wide[..., 128:], angles.cos(), angles.sin()), {})


def silu_and_mul_case(rng: random.Random, at: Sizes) -> Case:
    """Widths of an expert and of no power of two."""
    return Case((numbers(rng, rng.choice(at.rows), 2 * (rng.choice(at.depths) + rng.choice((0, 64)))),), {})


def silu_and_mul_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """Widths of whole scale blocks, both scale formats."""
    width = rng.choice(at.depths) + rng.choice((0, 128))
    return Case((numbers(rng, rng.choice(at.rows), 2 * width), rng.choice(_FORMATS)), {})


def permute_case(rng: random.Random, at: Sizes) -> Case:
    """Rows in any order, some never, some several times."""
    x = numbers(rng, rng.choice(at.rows), rng.choice(at.depths) + rng.choice((0, 72)))
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    return Case((x, torch.randint(len(x), (rng.choice(at.rows),), generator=generator)), {})


def permute_fp8_case(rng: random.Random, at: Sizes) -> Case:
    """The same with scales."""
    values, scales = quantize_fp8(numbers(rng, rng.choice(at.rows), rng.choice(at.depths)), rng.choice(_FORMATS))
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    return Case((values, scales, torch.randint(len(values), (rng.choice(at.rows),), generator=generator)), {})


def route_case(rng: random.Random, at: Sizes) -> Case:
    """Routers of V3, Kimi-K2 and Moonlight and a tiny one; half of the cases have ties."""
    experts_, n_group, topk_group, topk = rng.choice(((256, 8, 4, 8), (384, 1, 1, 8), (64, 1, 1, 6), (16, 4, 2, 4)))
    rows = rng.choice(at.rows)
    logits = numbers(rng, rows, experts_).float()
    if rng.random() < 0.5:  # ties
        logits = (logits * 4).round() / 4
    bias = torch.zeros(experts_) if rng.random() < 0.5 else numbers(rng, experts_).float() * 0.1
    return Case(
        (logits, bias),
        {
            "num_experts_per_tok": topk,
            "n_group": n_group,
            "topk_group": topk_group,
            "norm_topk_prob": rng.random() < 0.8,
            "routed_scaling_factor": 2.5,
        },
    )


def router_linear_case(rng: random.Random, at: Sizes) -> Case:
    """Depths that fill no slice."""
    rows, columns, depth = sizes(rng, at)
    depth += rng.choice((0, 0, 8, 120))
    return Case((numbers(rng, rows, depth), numbers(rng, min(columns, 512), depth)), {})


def moe_router_case(rng: random.Random, at: Sizes) -> Case:
    """The routers of `route_case`, from hidden states."""
    (logits, bias), settings = route_case(rng, at)
    depth = min(rng.choice(at.depths), _BUDGET // logits.numel() // 8 * 8 + 8)
    weight = numbers(rng, logits.shape[1], depth) * depth**-0.5
    return Case((numbers(rng, len(logits), depth), weight, bias), settings)


def combine_case(rng: random.Random, at: Sizes) -> Case:
    """Experts in any order of rows."""
    rows, topk, width = rng.choice(at.rows), rng.choice((1, 4, 8)), rng.choice(at.depths) + rng.choice((0, 72))
    generator = torch.Generator().manual_seed(rng.getrandbits(48))
    slots = torch.randperm(rows * topk, generator=generator).view(rows, topk)
    weights = torch.rand(rows, topk, generator=generator)
    return Case((numbers(rng, rows * topk, width), slots, weights, numbers(rng, rows, width)), {})


def mla_attention_case(rng: random.Random, at: Sizes) -> Case:
    """Requests of prefill, verify and decode together, shuffled pages, unwritten memory behind each."""
    heads, (rank, rotary) = rng.choice(at.heads), rng.choice(at.latents)
    block_size = rng.choice((16, 64))
    lengths, queries = [], []
    budget = _BUDGET // (heads * (2 * rank + rotary))
    for _ in range(rng.randint(1, 5 if at.keys > 100 else 2)):
        count = min(rng.choice((1, 1, 2, 5, 70)), max(1, budget // 512), at.keys // 16)
        length = count + rng.randint(0, max(0, min(at.keys, budget // count // 2 - count)))
        if budget < count * length:
            break
        budget -= count * length
        queries.append(count)
        lengths.append(length)
    if not queries:
        queries, lengths = [1], [rng.randint(1, 64)]
    blocks = [-(-length // block_size) for length in lengths]
    pages = list(range(sum(blocks) + 3))
    rng.shuffle(pages)
    table = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
    for request, count in enumerate(blocks):
        table[request, :count] = torch.tensor([pages.pop() for _ in range(count)])
    cache = numbers(rng, sum(blocks) + 3, block_size, rank + rotary)
    # What no request has written yet may hold anything.
    for request, length in enumerate(lengths):
        if length % block_size:
            cache[table[request, blocks[request] - 1], length % block_size :] = math.nan
    starts = torch.tensor([0, *queries]).cumsum(0).to(torch.int32)
    args = (
        numbers(rng, sum(queries), heads, rank + rotary) * 0.3,
        cache,
        table,
        torch.tensor(lengths, dtype=torch.int32),
        starts,
    )
    return Case(args, {"kv_lora_rank": rank, "scale": (rank + rotary) ** -0.5})


CASES: dict[str, Callable[[random.Random, Sizes], Case]] = {
    "linear": linear_case,
    "head_linear": head_linear_case,
    "grouped_linear": grouped_linear_case,
    "quantize_fp8": quantize_case,
    "fp8_linear": fp8_linear_case,
    "grouped_fp8_linear": grouped_fp8_linear_case,
    "rms_norm": rms_norm_case,
    "rope": rope_case,
    "silu_and_mul": silu_and_mul_case,
    "router_linear": router_linear_case,
    "route": route_case,
    "moe_router": moe_router_case,
    "combine": combine_case,
    "mla_attention": mla_attention_case,
    "add_rms_norm": add_rms_norm_case,
    "rms_norm_fp8": rms_norm_fp8_case,
    "add_rms_norm_fp8": add_rms_norm_fp8_case,
    "silu_and_mul_fp8": silu_and_mul_fp8_case,
    "permute": permute_case,
    "permute_fp8": permute_fp8_case,
}


def to_device(value: Any, device: str) -> Any:
    """A tensor with its strides on `device`; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_contiguous() or value.element_size() == 1:
        return value.to(device)
    # A view keeps its gaps: the storage moves, not the elements.
    whole = value.as_strided((value.untyped_storage().size() // value.element_size(),), (1,), 0).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


class Result(NamedTuple):
    """What checking one kernel showed."""

    op: str
    provider: str
    cases: int
    outputs: int
    wrong_cases: int
    wrong_outputs: int
    first_wrong: str
    seconds: float
    exact: bool = True
    """Whether the kernel is meant to print the contract's bits."""
    refused_cases: int = 0
    """Cases whose shapes the kernel does not take."""
    largest_difference: float = 0.0
    """Of an output from the expected one, by the largest expected one of its case."""
    full_card: bool = False
    """Whether the cases are requests of `check_full_card`."""

    @property
    def failed(self) -> bool:
        """Whether bits differ that may not."""
        return self.exact and self.wrong_cases > 0

    def __str__(self) -> str:
        """One line for a terminal."""
        if not self.wrong_cases:
            verdict = "equal"
        elif self.exact:
            verdict = f"{self.wrong_cases} cases differ; {self.first_wrong}"
        else:
            verdict = (
                f"no certificate: {self.wrong_cases} cases and {self.wrong_outputs / self.outputs:.4%} of the outputs"
                f" differ, by {self.largest_difference:.1e} of a case's largest at the most; {self.first_wrong}"
            )
        refused = f", {self.refused_cases} refused" if self.refused_cases else ""
        kernel = f"{self.op:20} {self.provider + ', full' * self.full_card:12}"
        return f"{kernel} {self.cases:5} cases{refused} {self.outputs:12} outputs {self.seconds:6.1f} s  {verdict}"


class Broken(NamedTuple):
    """A kernel that was not checked to the end, or all of an operation's."""

    op: str
    provider: str
    why: str

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{self.op:20} {self.provider:12} broke: {self.why}"


Finding = Result | Broken


def is_meant_exact(kernel: Kernel) -> bool:
    """Whether a bit that differs is a fault: in all of this package's kernels, and in others with a certificate."""
    return kernel.uncertified is None or kernel.provider not in OTHERS


@functools.cache
def expect(op: str, seed: int, number: int) -> tuple[Case, Any]:
    """A random case and what the model makes of it, kept for the operation's other kernels."""
    model = next(kernel for kernel in sm90_model.kernels() if kernel.op == op)
    case = CASES[op](random.Random(f"{op}/{seed}/{number}"), LARGE)
    return case, model.run(*case.args, **case.kwargs)


def check(kernel: Kernel, cases: int, seed: int, device: str = "cuda") -> Result:
    """Run `cases` random cases of a kernel; one whose bits differ is described by shapes and its number."""
    outputs = wrong_cases = wrong_outputs = refused = 0
    first_wrong, largest = "", 0.0
    began = time.perf_counter()
    # The model is the slow part. Some cases are made ahead, on a thread each.
    with ThreadPoolExecutor() as pool:
        for start in range(0, cases, _AHEAD):
            numbers_ = range(start, min(cases, start + _AHEAD))
            expectations = pool.map(partial(expect, kernel.op, seed), numbers_)
            for number, (case, expected) in zip(numbers_, expectations, strict=True):
                try:
                    actual = kernel.run(*(to_device(x, device) for x in case.args), **case.kwargs)
                except InputError:
                    if kernel.provider not in OTHERS:
                        raise
                    refused += 1
                    continue
                wrong = bits_differ(expected, actual)
                outputs += sum(x.numel() for x in (expected if isinstance(expected, tuple) else (expected,)))
                if wrong:
                    wrong_cases += 1
                    wrong_outputs += wrong
                    largest = max(largest, largest_difference(expected, actual))
                    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in case.args]
                    first_wrong = first_wrong or f"case {number}: {wrong} outputs, {shapes} {case.kwargs}"
    return Result(
        op=kernel.op,
        provider=kernel.provider,
        cases=cases - refused,
        outputs=outputs,
        wrong_cases=wrong_cases,
        wrong_outputs=wrong_outputs,
        first_wrong=first_wrong,
        seconds=time.perf_counter() - began,
        exact=is_meant_exact(kernel),
        refused_cases=refused,
        largest_difference=largest,
    )


def check_full_card(kernel: Kernel, seed: int, device: str = "cuda") -> Result:
    """Attention of a batch that fills the card, where a tile's splits are walked in order, against each request alone,
    whose splits are apart. The model is too slow for such sizes; it has seen single requests.
    """
    began = time.perf_counter()
    generator = torch.Generator(device).manual_seed(seed)
    requests, heads, longest = 150, 128, 4200
    lengths = torch.randint(1, longest, (requests,), generator=generator, device=device, dtype=torch.int32)
    pages = -(-longest // 64)
    table = torch.randperm(requests * pages, generator=generator, device=device).to(torch.int32).view(requests, pages)
    cache = torch.randn(requests * pages, 64, 576, generator=generator, device=device, dtype=torch.bfloat16)
    q = torch.randn(requests, heads, 576, generator=generator, device=device, dtype=torch.bfloat16)
    starts = torch.arange(requests + 1, device=device, dtype=torch.int32)
    sizes = {"kv_lora_rank": 512, "scale": 576**-0.5}
    together = kernel.run(q, cache, table, lengths, starts, **sizes)
    wrong = [
        bits_differ(
            kernel.run(q[i : i + 1], cache, table[i : i + 1], lengths[i : i + 1], starts[:2], **sizes).cpu(),
            together[i : i + 1],
        )
        for i in range(requests)
    ]
    first_wrong = next((f"request {i} of {int(lengths[i])} keys: {n} outputs" for i, n in enumerate(wrong) if n), "")
    seconds = time.perf_counter() - began
    wrong_cases = sum(n > 0 for n in wrong)
    return Result(
        op=kernel.op,
        provider=kernel.provider,
        cases=requests,
        outputs=together.numel(),
        wrong_cases=wrong_cases,
        wrong_outputs=sum(wrong),
        first_wrong=first_wrong,
        seconds=seconds,
        exact=is_meant_exact(kernel),
        full_card=True,
    )


def record(path: Path, *, per_op: int = 2, device: str = "cuda") -> None:
    """Write `per_op` small cases of each operation with the results of this package's own kernels."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, str] = {"card": torch.cuda.get_device_name()}
    for kernel in gpu_kernels():
        if kernel.provider != provider.PROVIDER:
            continue
        for number in range(per_op):
            name = f"{kernel.op}/{number}"
            case = CASES[kernel.op](random.Random(f"golden/{name}"), SMALL)
            # Views carry gaps of the tensors that they were cut from.
            args = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in case.args]
            results = kernel.run(*(to_device(x, device) for x in args), **case.kwargs)
            for i, x in enumerate(args):
                if isinstance(x, torch.Tensor):
                    tensors[f"{name}/arg{i}"] = x
            for i, x in enumerate(results if isinstance(results, tuple) else (results,)):
                tensors[f"{name}/out{i}"] = x.cpu().contiguous()
            kwargs = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in case.kwargs.items()}
            plain[name] = json.dumps([[None if isinstance(x, torch.Tensor) else x for x in args], kwargs])
    save_file(tensors, path, metadata=plain)


def recorded(path: Path) -> dict[str, tuple[Case, tuple[torch.Tensor, ...]]]:
    """The cases of a file that `record` wrote, by name, each with what the GPU printed."""
    cases: dict[str, tuple[Case, tuple[torch.Tensor, ...]]] = {}
    with safe_open(path, "pt") as file:
        for name, text in file.metadata().items():
            if "/" not in name:
                continue
            plain, kwargs = json.loads(text)
            args = [file.get_tensor(f"{name}/arg{i}") if x is None else x for i, x in enumerate(plain)]
            if "out_dtype" in kwargs:
                kwargs["out_dtype"] = getattr(torch, str(kwargs["out_dtype"]).removeprefix("torch."), None)
            outs = sorted(key for key in file.keys() if key.startswith(f"{name}/out"))  # noqa: SIM118
            cases[name] = Case(tuple(args), kwargs), tuple(file.get_tensor(key) for key in outs)
    return cases


# What other people's kernels are asked for before they are checked: a Hopper card and the latent of V3.
_HERE = Setting("cuda", "sm90", FP8_UE8M0, (9, 0), flash_mla.LATENT)
# They need not take every shape.
OTHERS = {module.PROVIDER for module in provider.OTHERS}


def gpu_kernels() -> list[Kernel]:
    """What this package offers for a GPU."""
    return [kernel for kernel in provider.dsv3_kernels() if kernel.provider != sm90_model.PROVIDER]


def with_each_maker(kernels: list[Kernel]) -> list[Kernel]:
    """The fp8 products choose among makers by shape; here each maker is a kernel of its own, at every shape."""
    from dsv3_plugin.kernels import deep_gemm, fp8_linear, fp8_stream
    from dsv3_plugin.kernels.selection import Choice

    def made_by(maker: str, kernel: Kernel) -> Callable[..., torch.Tensor]:
        grouped = kernel.op == "grouped_fp8_linear"

        def run(*args: torch.Tensor) -> torch.Tensor:
            weight = args[3 if grouped else 2]
            if maker not in fp8_linear.makers(weight.shape[-2], grouped):
                return kernel.run(*args)
            draw = random.Random(str([tuple(x.shape) for x in args]))
            shape = draw.choice(fp8_stream.GROUPED_SAMPLE if grouped else fp8_stream.DENSE_SAMPLE)
            cut = shape._replace(groups=len(weight) if grouped else 1).filled()
            choice = Choice(maker, cut if maker == "stream" else None)
            serve = fp8_linear.grouped_fp8_linear if grouped else fp8_linear.fp8_linear
            return serve(*args, choice=choice)  # type: ignore[operator]

        return run

    expanded = []
    for kernel in kernels:
        if kernel.op == "fp8_linear" and kernel.provider == deep_gemm.PROVIDER:
            expanded.append(replace(kernel, run=deep_gemm.product))
        elif kernel.op not in ("fp8_linear", "grouped_fp8_linear") or kernel.provider != provider.PROVIDER:
            expanded.append(kernel)
        else:
            expanded += [replace(kernel, provider=m, run=made_by(m, kernel)) for m in fp8_linear.OWN_MAKERS]
    return expanded


def main(
    cases: Annotated[int, typer.Option(min=1, help="Random cases of each kernel.")] = 40,
    op: Annotated[list[str] | None, typer.Option(help="Only this operation. Repeat it.")] = None,
    provider_names: Annotated[
        list[str] | None, typer.Option("--provider", help="Only kernels of this provider. Repeat it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed makes other cases.")] = 0,
    record_to: Annotated[
        Path | None, typer.Option("--record", help="Write small cases and this card's results to a file instead.")
    ] = None,
    certify: Annotated[
        Path | None, typer.Option(help="Write certificates of what was equal to a file; others in it stay.")
    ] = None,
) -> None:
    """Compare every kernel for a GPU with the model of Hopper on this machine's CPU, bit for bit."""
    unknown = sorted(set(op or ()) - set(CASES))
    if unknown:
        raise KernelError(f"there is no operation {', '.join(unknown)}; the operations are {', '.join(CASES)}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise KernelError("the kernels to check run on a Hopper GPU, and this machine has none")
    if certify is not None and provider_names:
        raise KernelError("--certify is of whole operations, by all their makers: leave --provider out")
    if record_to is not None:
        record(record_to)
        return
    ops = []
    for kernel in chosen(op, provider_names):
        if reason := kernel.refuses(_HERE):
            print(f"{kernel.op:20} {kernel.provider:12} not checked: {reason}", flush=True)
        elif kernel.op not in ops:
            ops.append(kernel.op)
    if not ops:
        raise KernelError("there is no kernel to check: none of those asked for serves on this machine")
    work = partial(check_operation, provider_names=provider_names, cases=cases, seed=seed)
    findings: list[Finding] = []
    for finding in in_processes(work, ops):
        print(finding, flush=True)
        findings.append(finding)
    text, passed = verdict(findings)
    print(text)
    if certify is not None:
        certificates.write(certify, earned(findings))
        print(f"wrote {certify}; the certificates in use are in {certificates.TABLE}")
    if not passed:
        raise typer.Exit(1)


def earned(findings: list[Finding]) -> dict[str, Certificate]:
    """Certificates of the operations whose own kernels are all equal to the model."""
    earned_ = {}
    for contract in CONTRACTS:
        own = [finding for finding in findings if finding.op == contract.op and finding.provider not in OTHERS]
        equal = [finding for finding in own if isinstance(finding, Result) and not finding.wrong_cases]
        if own and len(equal) == len(own):
            earned_[contract.op] = Certificate(
                contract_version=contract.version,
                sources=certificates.digest(provider.OWN_MODULES[contract.op]),
                cases=min(result.cases for result in equal if not result.full_card),
                card=torch.cuda.get_device_name(),
                torch=str(torch.__version__),
                triton=third_party.version_of("triton") or "absent",
            )
    return earned_


def chosen(ops: list[str] | None, provider_names: list[str] | None) -> list[Kernel]:
    """The kernels of these operations and providers, all where None."""
    kernels = with_each_maker(gpu_kernels())
    kernels = [kernel for kernel in kernels if not ops or kernel.op in ops]
    return [kernel for kernel in kernels if not provider_names or kernel.provider in provider_names]


def in_processes(work: Callable[[str], list[Finding]], ops: Iterable[str]) -> Iterator[Finding]:
    """What `work` finds for each operation, in a process of its own, as they end. A process that dies is a finding."""

    def run(op: str) -> list[Finding]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            try:
                return process.submit(work, op).result()
            except BrokenProcessPool:
                return [Broken(op, "all", "the process died")]

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for future in as_completed([threads.submit(run, op) for op in ops]):
            yield from future.result()


def check_operation(op: str, *, provider_names: list[str] | None, cases: int, seed: int) -> list[Finding]:
    """Check the kernels of one operation that serve a Hopper card, on this machine's."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    torch.set_num_threads(1)
    return check_alike([kernel for kernel in chosen([op], provider_names) if not kernel.refuses(_HERE)], cases, seed)


def check_alike(kernels: list[Kernel], cases: int, seed: int, device: str = "cuda") -> list[Finding]:
    """Check kernels of one operation."""
    findings: list[Finding] = []
    for kernel in kernels:
        try:
            findings.append(check(kernel, cases, seed, device))
            if kernel.op == "mla_attention":
                findings.append(check_full_card(kernel, seed, device))
        except Exception as error:  # the others are checked, and the answer says that one was not
            findings.append(Broken(kernel.op, kernel.provider, f"{type(error).__name__}: {error}"))
    expect.cache_clear()
    return findings


def verdict(findings: list[Finding]) -> tuple[str, bool]:
    """The last words, and whether all kernels with a certificate are equal and none broke."""
    exact = [finding for finding in findings if isinstance(finding, Result) and finding.exact]
    broken = sum(isinstance(finding, Broken) for finding in findings)
    failed = any(result.failed for result in exact)
    cases, outputs = sum(result.cases for result in exact), sum(result.outputs for result in exact)
    text = f"{cases} cases, {outputs:,} outputs: {'bits differ' if failed else 'equal in every bit'}"
    return text + (f"; {broken} kernels broke" if broken else ""), not (failed or broken)


if __name__ == "__main__":
    typer.run(main)
