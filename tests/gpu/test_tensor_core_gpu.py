"""The model's products on a GPU print what they print on a CPU: here by Triton's interpreter, on CPU tensors.

The interpreter must be chosen before Triton is imported, so that the comparison has a process of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch

from dsv3_plugin.kernels.certify.compare import bits_differ
from dsv3_plugin.kernels.sm90 import tensor_core


def numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Magnitudes far apart, so that terms are cut off."""
    sizes = torch.exp2(3 * torch.randn(shape, generator=generator))
    return (torch.randn(shape, generator=generator) * sizes).clamp(-448, 448)


def compare() -> None:
    from dsv3_plugin.kernels.sm90 import tensor_core_gpu

    generator = torch.Generator().manual_seed(0)
    formats = ((tensor_core.BF16, torch.bfloat16), (tensor_core.FP8, torch.float8_e4m3fn))
    sizes = ((3, 5, 40), (17, 20, 200), (1, 1, 16))
    for (instruction, dtype), (rows, columns, depth) in itertools.product(formats, sizes):
        a, b = (numbers(generator, n, depth).to(dtype) for n in (rows, columns))
        c = numbers(generator, rows, columns) if dtype == torch.bfloat16 else torch.zeros(rows, columns)
        expected = tensor_core.dot(instruction, a, b, c)
        coarser = dataclasses.replace(instruction, fraction_bits=instruction.fraction_bits - 6)
        counts = [bits_differ(expected, tensor_core_gpu.dot(kind, a, b, c)) for kind in (instruction, coarser)]
        print(dtype, (rows, columns, depth), "differ:", counts[0], "with 6 bits less:", counts[1])
        assert counts[0] == 0 and counts[1] > 0, "the twin must be seen"


def test_on_a_gpu_the_steps_are_the_same():
    pytest.importorskip("triton", reason="Triton is not installed: `make test` runs this in .envs/kernels")
    ran = subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode()
    print(ran.stdout.decode())


if __name__ == "__main__":
    compare()
