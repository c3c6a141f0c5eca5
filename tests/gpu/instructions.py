"""Tensor-core instructions by themselves: operands near zero and far apart, and what a card makes of them.

    python tests/gpu/instructions.py FILE     # on a Hopper card: record operands and results

Each sort of operands is multiplied with and without an accumulator, in one instruction and in a chain of several.
"""
# ruff: noqa: N803 (compile-time parameters are written in capitals)

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from safetensors.torch import save_file

_ROWS, _COLUMNS = 64, 16
# How far apart exponents are that one sum may meet: more than it keeps.
_FAR = 40


@triton.jit
def _dot(a, b, c, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, ACCUMULATES: tl.constexpr):
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    x = tl.load(a + row[:, None] * DEPTH + k[None, :])
    y = tl.load(b + column[None, :] * DEPTH + k[:, None])
    at = row[:, None] * COLUMNS + column[None, :]
    if ACCUMULATES:
        acc = tl.dot(x, y, tl.load(c + at))
    else:
        acc = tl.dot(x, y)
    tl.store(out + at, acc)


class Operands(NamedTuple):
    """a [_ROWS, K] and b [_COLUMNS, K] of bf16 or e4m3, c fp32 [_ROWS, _COLUMNS]."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor


def numbers(generator: torch.Generator, shape: tuple[int, int], exponents: range, zeros: float) -> torch.Tensor:
    """fp32 numbers with exponents out of a range, a share of them zero; rows of plus, of minus and of both."""
    exponent = torch.randint(exponents.start, exponents.stop, shape, generator=generator)
    mantissa = 1 + torch.randint(0, 128, shape, generator=generator).double() / 128
    drawn = torch.randint(0, 2, shape, generator=generator)
    row = torch.randint(0, 3, (shape[0], 1), generator=generator)
    sign = 1.0 - 2 * torch.where(row == 2, drawn, row)
    kept = torch.rand(shape, generator=generator) >= zeros
    return (sign * kept * mantissa * torch.exp2(exponent.double())).float()


def operands() -> Iterator[tuple[str, Operands]]:
    """Every sort of operands; exponents of a, b and c, and the share of zeros in a and b."""
    small, ordinary = range(-149, -118), range(-20, 8)
    sorts = {
        "plain": (range(-3, 4), range(-3, 4), ordinary, 0.0),
        "far apart": (range(_FAR), range(3), range(_FAR // 2), 0.1),
        "cancelling": (range(-3, 4), range(-3, 4), range(-40, -10), 0.0),
        "nothing but zeros": (range(-3, 4), range(-3, 4), small, 1.0),
        "zeros times large numbers": (range(-130, 120), range(-130, -120), small, 0.9),
        "products near the smallest number": (range(-80, -70), range(-80, -70), range(-149, -145), 0.1),
        "products below the smallest number": (range(-90, -70), range(-90, -60), range(-149, -140), 0.6),
        "subnormal operands": (range(-133, -119), range(-20, 20), small, 0.3),
    }
    for depth in (16, 64):
        for name, (of_a, of_b, of_c, zeros) in sorts.items():
            generator = torch.Generator().manual_seed(depth)
            a = numbers(generator, (_ROWS, depth), of_a, zeros).bfloat16()
            b = numbers(generator, (_COLUMNS, depth), of_b, zeros).bfloat16()
            if name == "cancelling":
                a[:, 1::2], b[:, 1::2] = a[:, ::2], -b[:, ::2]
            yield f"bf16/{name}/{depth}", Operands(a, b, numbers(generator, (_ROWS, _COLUMNS), of_c, 0.1))
    for zeros in (0.0, 0.5, 1.0):
        generator = torch.Generator().manual_seed(1)
        a = numbers(generator, (_ROWS, 128), range(-9, 8), zeros).to(torch.float8_e4m3fn)
        b = numbers(generator, (_COLUMNS, 128), range(-9, 8), zeros).to(torch.float8_e4m3fn)
        yield f"fp8/{zeros:.0%} zeros/128", Operands(a, b, torch.zeros(_ROWS, _COLUMNS))


def on_the_card(operands: Operands, accumulates: bool) -> torch.Tensor:
    """What the tensor core prints, fp32 [_ROWS, _COLUMNS], on the CPU."""
    out = torch.empty(_ROWS, _COLUMNS, device="cuda")
    kernel = _dot[(1,)](*(x.cuda() for x in operands), out, _ROWS, _COLUMNS, operands.a.shape[1], accumulates)
    assert "wgmma" in kernel.asm["ptx"], "compiled without wgmma"
    return out.cpu()


if __name__ == "__main__":
    tensors: dict[str, torch.Tensor] = {}
    for name, x in operands():
        tensors |= {f"{name}/a": x.a, f"{name}/b": x.b, f"{name}/c": x.c}
        tensors[f"{name}/sum"] = on_the_card(x, accumulates=False)
        if x.a.dtype == torch.bfloat16:  # sums of fp8 start from zero
            tensors[f"{name}/sum on c"] = on_the_card(x, accumulates=True)
    save_file(tensors, Path(sys.argv[1]), metadata={"card": torch.cuda.get_device_name(), "torch": torch.__version__})
