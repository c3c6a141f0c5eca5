"""The tensor-core model: by hand, and against what an H200 printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dsv3_plugin.kernels.certify.compare import bits_differ
from dsv3_plugin.kernels.certify.golden import recorded
from dsv3_plugin.kernels.sm90 import sm90_model, tensor_core
from dsv3_plugin.ops.operation import operations

# Recorded on an NVIDIA H200, 2026-11-30:
#   dsv3 kernels check --record tests/kernels/golden_h200.safetensors
RECORDING = Path(__file__).with_name("golden_h200.safetensors")
GOLDEN = recorded(RECORDING)
with safe_open(RECORDING, "pt") as file:
    RECORDED_CONTRACTS = json.loads(file.metadata()["contracts"])
CONTRACT_VERSIONS = {op.name: op.version for op in operations().values()}
# Recorded on an NVIDIA H200, 2026-11-22:
#   python tests/gpu/instructions.py tests/kernels/instructions_h200.safetensors
INSTRUCTIONS = load_file(Path(__file__).with_name("instructions_h200.safetensors"))
MODEL = {kernel.op: kernel.run for kernel in sm90_model.kernels()}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_equals_the_h200(name):
    case, printed = GOLDEN[name]
    op = name.split("/")[0]
    if RECORDED_CONTRACTS[op] != CONTRACT_VERSIONS[op]:
        pytest.skip(f"recorded with version {RECORDED_CONTRACTS[op]} of {op}: record it again on a Hopper card")
    outputs = MODEL[op](*case.args, **case.kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    print(name, sum(x.numel() for x in printed), "outputs")
    assert bits_differ(outputs, printed) == 0


def test_every_operation_is_recorded():
    missing = set(MODEL) - {name.split("/")[0] for name in GOLDEN}
    assert all(operations()[name].training or operations()[name].two_form for name in missing), missing
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))}: to be recorded on a Hopper card")


def sums_that_differ(name: str, **changes: int) -> int:
    """Of a recorded sort of operands: how many sums of an instruction so changed are not the card's."""
    a, b, c = (INSTRUCTIONS[f"{name}/{operand}"] for operand in "abc")
    instruction = replace(tensor_core.BF16 if a.dtype == torch.bfloat16 else tensor_core.FP8, **changes)
    wrong = bits_differ(INSTRUCTIONS[f"{name}/sum"], tensor_core.dot(instruction, a, b))
    if (on_c := INSTRUCTIONS.get(f"{name}/sum on c")) is not None:
        wrong += bits_differ(on_c, tensor_core.dot(instruction, a, b, c))
    return wrong


@pytest.mark.parametrize("name", sorted({name.rpartition("/")[0] for name in INSTRUCTIONS}))
def test_an_instruction_equals_the_h200s(name):
    assert sums_that_differ(name) == 0


@pytest.mark.parametrize("changes", [{"fraction_bits": 24}, {"fraction_bits": 26}, {"result_bits": 22}, {"depth": 32}])
def test_another_width_is_not_the_h200s(changes):
    assert sums_that_differ("bf16/far apart/64", **changes) > 0


@pytest.mark.parametrize("floor", [-132, -134])
def test_another_floor_is_not_the_h200s(floor):
    assert sums_that_differ("bf16/products near the smallest number/16", floor=floor) > 0


def test_a_zero_with_an_exponent_is_not_the_h200s(monkeypatch):
    monkeypatch.setattr(tensor_core, "NO_EXPONENT", -126)
    assert sums_that_differ("bf16/zeros times large numbers/16") > 0


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.bfloat16)


def test_bf16_keeps_25_bits_below_the_largest_term():
    one_and = row(1.0, 1.0)
    assert tensor_core.dot(tensor_core.BF16, row(1.0, 2.0**-23), one_and).item() == 1 + 2.0**-23
    # 2**-25 is kept while summing; two of them are 2**-24, which the accumulator cuts off.
    assert tensor_core.dot(tensor_core.BF16, row(1.0, 2.0**-25, 2.0**-25), row(1, 1, 1)).item() == 1
    four = row(1.0, *[2.0**-25] * 4)
    assert tensor_core.dot(tensor_core.BF16, four, row(*[1.0] * 5)).item() == 1 + 2.0**-23
    # 2**-26 is gone at once: four of them would be as much as two of the above.
    eight = row(1.0, *[2.0**-26] * 8)
    assert tensor_core.dot(tensor_core.BF16, eight, row(*[1.0] * 9)).item() == 1


def test_fp8_keeps_13_bits_below_the_largest_term():
    def e4m3(*values: float) -> torch.Tensor:
        return torch.tensor([values]).to(torch.float8_e4m3fn)

    ones = [1.0] * 3
    assert tensor_core.dot(tensor_core.FP8, e4m3(16, 2.0**-9, 0), e4m3(*ones)).item() == 16 + 2.0**-9
    assert tensor_core.dot(tensor_core.FP8, e4m3(32, 2.0**-9, 2.0**-9), e4m3(*ones)).item() == 32


def test_cuts_towards_zero_on_both_sides():
    small = 2.0**-26
    for sign in (1.0, -1.0):
        assert tensor_core.dot(tensor_core.BF16, row(sign, sign * small), row(1.0, 1.0)).item() == sign


def test_later_instructions_round_again():
    depth = tensor_core.BF16.depth
    a = torch.zeros(1, 2 * depth, dtype=torch.bfloat16)
    a[0, 0], a[0, depth : depth + 4] = 1.0, 2.0**-25
    b = torch.ones_like(a)
    assert tensor_core.dot(tensor_core.BF16, a, b).item() == 1 + 2.0**-23
    # In the other order the small terms meet first and lose nothing.
    assert tensor_core.dot(tensor_core.BF16, a.flip(1), b).item() == 1 + 2.0**-23
    a[0, depth + 1 : depth + 4] = 0
    assert tensor_core.dot(tensor_core.BF16, a, b).item() == 1


@pytest.mark.parametrize("instruction", [tensor_core.BF16, tensor_core.FP8], ids=["bf16", "fp8"])
def test_close_to_the_exact_sum(instruction):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if instruction is tensor_core.BF16 else torch.float8_e4m3fn
    a = torch.randn(37, 200, generator=generator).to(dtype)
    b = torch.randn(700, 200, generator=generator).to(dtype)
    exact = a.double() @ b.double().t()
    error = (tensor_core.dot(instruction, a, b) - exact).abs().max().item()
    print(f"largest error {error:.3g}")
    assert error < (1e-4 if instruction is tensor_core.BF16 else 0.2)
