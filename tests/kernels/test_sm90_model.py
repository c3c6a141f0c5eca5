"""The provider that models Hopper on a CPU: what holds for its results, and when it serves."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dsv3_plugin.errors import InputError, KernelError
from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels import provider
from dsv3_plugin.kernels.certify.compare import bits_differ
from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.ops.drawing import SMALL
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.profile import BF16, FP8_UE8M0, FP32
from dsv3_plugin.registry import bind

MODEL = {kernel.op: kernel.run for kernel in sm90_model.kernels()}
ROW_WISE = ("linear", "head_linear", "fp8_linear", "quantize_fp8", "rms_norm", "rope", "silu_and_mul", "route")
# Arguments of these operations that have a row for each token.
TOKEN_ARGUMENTS = {"fp8_linear": (0, 1), "rope": (0, 1, 2)}


@pytest.mark.parametrize("op", ROW_WISE)
def test_a_row_does_not_depend_on_its_batch(op):
    case = operations()[op].draw(random.Random(op), SMALL._replace(rows=(5,)))
    order = torch.tensor([3, 0, 4])
    own = TOKEN_ARGUMENTS.get(op, (0,))
    fewer = [x[order].contiguous() if i in own else x for i, x in enumerate(case.args)]
    whole, part = MODEL[op](*case.args, **case.kwargs), MODEL[op](*fewer, **case.kwargs)
    whole, part = (x if isinstance(x, tuple) else (x,) for x in (whole, part))
    assert bits_differ(tuple(x[order] for x in whole), part) == 0


@pytest.mark.parametrize("op", MODEL)
def test_temporaries_are_made_where_the_operands_are(op):
    """The card may run the model too. A tensor on the default device, here one without memory, would break it."""
    case = operations()[op].draw(random.Random(op), SMALL)
    expected = MODEL[op](*case.args, **case.kwargs)
    with torch.device("meta"):
        assert torch.zeros(1).is_meta, "the twin: what forgets its device is on this one"
        assert bits_differ(expected, MODEL[op](*case.args, **case.kwargs)) == 0


class OnlyWhatEveryDeviceRoundsAlike(TorchFunctionMode):
    """Fails where an operation is called that torch rounds in another way on a GPU than on a CPU."""

    OTHERWISE = re.compile(r"exp|log|sin|cos|tan|pow|sigmoid|softmax|rsqrt|ldexp|addc|mm|matmul|linear|mean|norm|lerp")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        assert not self.OTHERWISE.search(name.removeprefix("expand")), name
        if name == "sqrt":
            assert args[0].dtype == torch.float64, "ATen's fp32 root is not correctly rounded"
        if "div" in name and "floor" not in name and not name.startswith("__r") and args[0].is_floating_point():
            divisor = args[1]
            exact = isinstance(divisor, torch.Tensor) or math.frexp(divisor)[0] == 0.5
            assert exact, f"{name} by {divisor}: a GPU multiplies by the reciprocal"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", MODEL)
def test_a_gpu_rounds_what_the_model_is_made_of_as_a_cpu_does(op):
    case = operations()[op].draw(random.Random(op), SMALL)
    with OnlyWhatEveryDeviceRoundsAlike():
        MODEL[op](*case.args, **case.kwargs)


@pytest.mark.parametrize(
    "otherwise", [lambda x: x / 3, torch.exp, torch.sqrt, lambda x: x @ x, lambda x: torch.div(x, 448.0)]
)
def test_what_a_gpu_rounds_in_another_way_is_seen(otherwise):
    x = torch.ones(3)
    with OnlyWhatEveryDeviceRoundsAlike(), pytest.raises(AssertionError):
        otherwise(x)


def attention(q, cache, length):
    table = torch.arange(len(cache)).unsqueeze(0)
    starts, lengths = torch.tensor([0, len(q)]), torch.tensor([length])
    batch = PagedBatch.of(q, cache, table, lengths, starts)
    return MODEL["mla_attention"](q, cache, batch, kv_lora_rank=64, scale=0.1)


def test_chunks_of_a_prompt_and_single_tokens_give_equal_bits():
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(3, 64, 80, generator=generator).bfloat16()
    q = torch.randn(150, 2, 80, generator=generator).bfloat16()
    whole = attention(q, cache, 150)
    chunks = torch.cat([attention(q[:70], cache, 70), attention(q[70:149], cache, 149), attention(q[149:], cache, 150)])
    assert bits_differ(whole, chunks) == 0


def test_splits_are_cut_at_absolute_positions():
    generator = torch.Generator().manual_seed(4)
    cache = torch.randn(17, 64, 80, generator=generator).bfloat16()
    q = torch.randn(8, 1, 80, generator=generator).bfloat16()
    whole = attention(q, cache, 1028)
    for i in range(8):
        assert bits_differ(whole[i : i + 1], attention(q[i : i + 1], cache, 1021 + i)) == 0
    assert bits_differ(whole[:5], attention(q[:5], cache, 1025)) == 0


def test_what_lies_behind_the_last_key_is_not_read():
    generator = torch.Generator().manual_seed(2)
    cache = torch.randn(2, 64, 80, generator=generator).bfloat16()
    q = torch.randn(3, 2, 80, generator=generator).bfloat16()
    clean = attention(q, cache, 70)
    cache[1, 6:] = torch.nan
    assert bits_differ(clean, attention(q, cache, 70)) == 0


def test_root_mean_square_is_correctly_rounded():
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(4096, 64, generator=generator).bfloat16(), torch.ones(64).bfloat16()
    together = MODEL["rms_norm"](x, weight, 1e-6)
    one_by_one = torch.cat([MODEL["rms_norm"](row, weight, 1e-6) for row in x.split(1)])
    assert bits_differ(together, one_by_one) == 0


@pytest.mark.parametrize("profile", [BF16, FP8_UE8M0], ids=["bf16", "fp8"])
def test_binds_on_a_cpu_that_asks_for_hopper(profile):
    ops = bind(Setting("cpu", "sm90", profile), "strict", provider.dsv3_kernels())
    assert {choice.provider for choice in ops.provenance} == {sm90_model.PROVIDER}


def test_says_why_it_does_not_serve():
    with pytest.raises(KernelError, match=r"the profile computes in torch\.float32"):
        bind(Setting("cpu", "sm90", FP32), "strict", provider.dsv3_kernels())
    with pytest.raises(KernelError, match=r"needs compute capability 9\.0, this card has \(8, 0\)"):
        bind(Setting("cuda", "sm90", BF16, (8, 0)), "strict", provider.dsv3_kernels())


def test_refuses_inputs_by_name():
    x, weight = torch.zeros(2, 96).to(torch.float8_e4m3fn), torch.zeros(16, 96).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=r"fp8_linear: K=96 is not a multiple of 128"):
        MODEL["fp8_linear"](x, torch.ones(2, 1), weight, torch.ones(1, 1))
    with pytest.raises(InputError, match=r"linear: x is torch\.float32"):
        MODEL["linear"](torch.zeros(2, 16), torch.zeros(2, 16))


def test_the_provider_imports_no_gpu_library():
    code = (
        "import sys, dsv3_plugin.kernels.provider as p; p.dsv3_kernels();"
        "print([m for m in ('triton', 'deep_gemm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
