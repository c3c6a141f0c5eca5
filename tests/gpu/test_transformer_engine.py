"""What TransformerEngine's bits are on a card: its quantizer's formula for fp32 scales, that its recipe and layer take
it, and the order of its sums.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from bits import same_bits
from hopper_card import needs_hopper

from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.ops.elementary import fma
from dsv3_plugin.ops.quantize import quantize_fp8, quantize_weight, to_e4m3

needs_te = pytest.mark.skipif(
    find_spec("transformer_engine") is None, reason="TransformerEngine is not installed in this environment"
)
CARD = torch.device("cuda")
SEEN = 64
"""Rows and columns of a product that are compared."""


def quantized(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks as TransformerEngine's source has it, where a division is one."""
    scale = torch.tensor(448.0) / x.abs().amax(dims, keepdim=True)
    return to_e4m3(x * scale), 1 / scale


def of_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = quantized(x.unflatten(1, (-1, 128)), (2,))
    return values.flatten(1), scales[..., 0]


def of_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scales = quantized(weight.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)), (1, 3))
    return values.flatten(2).flatten(0, 1).contiguous(), scales[:, 0, :, 0].contiguous()


@needs_hopper
@needs_te
def test_its_quantizer_with_fp32_scales() -> None:
    from dsv3_plugin.kernels.vendors import transformer_engine as ours

    x = torch.randn(256, 7168, generator=torch.Generator().manual_seed(0)).bfloat16()
    values, scales = of_rows(x.float())
    theirs = ours._quantizer(False, 1).quantize(x.to(CARD))
    assert torch.equal(theirs._rowwise_data.cpu(), values.view(torch.uint8))
    assert same_bits(theirs._rowwise_scale_inv[:, : len(x)].t().cpu().contiguous(), scales.contiguous())


@needs_te
@pytest.mark.parametrize(("variable", "power_of_two"), [("1", False), ("0", True), (None, True)])
def test_its_recipe_reads_the_variable_when_it_is_imported(variable: str | None, power_of_two: bool) -> None:
    """Set later, it changes nothing; so each in a process of its own."""
    name = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    program = (
        "import os\n"
        "from transformer_engine.common.recipe import Float8BlockScaling\n"
        f"os.environ['{name}'] = {'0' if variable == '1' else '1'!r}\n"
        "recipe = Float8BlockScaling()\n"
        "of_all = recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad\n"
        "print([(each.power_2_scale, each.amax_epsilon) for each in of_all])"
    )
    environment = {key: value for key, value in os.environ.items() if key != name}
    if variable is not None:
        environment[name] = variable
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == str([(power_of_two, 0.0)] * 3)


@needs_hopper
@needs_te
def test_its_layer_with_fp32_scales() -> None:
    """`te.Linear` multiplies what its quantizer's formula gives, by the contract's product; what the contract's own
    scales give is another.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import Float8BlockScaling, QParams

    draw = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(rows, 4096, generator=draw).bfloat16() for rows in (256, 512))
    layer = te.Linear(4096, 512, bias=False, params_dtype=torch.bfloat16, device="cuda")
    recipe = Float8BlockScaling()  # whose fields the variable fills are no arguments
    recipe.fp8_quant_fwd_inp = recipe.fp8_quant_fwd_weight = QParams(power_2_scale=False, amax_epsilon=0.0)
    with torch.no_grad(), te.autocast(enabled=True, recipe=recipe):
        layer.weight.copy_(weight)
        found = layer(x.to(CARD)).cpu()

    def product(operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
        from dsv3_plugin.kernels.triton import fp8_linear as ours

        return ours.fp8_linear(*(each.to(CARD) for each in operands)).cpu()

    assert same_bits(found, product((*of_rows(x.float()), *of_blocks(weight.float()))))
    by_contract = product((*quantize_fp8(x, "float32"), *quantize_weight(weight, "float32")))
    print(f"{float((found != by_contract).double().mean()):.1%} differ from the contract's")
    assert not same_bits(found, by_contract)


@needs_hopper
@needs_te
@pytest.mark.parametrize(
    ("rows", "columns", "depth", "parts"),
    [(64, 576, 1024, 1), (64, 576, 4096, 1), (4096, 576, 4096, 1), (4096, 7168, 7168, 1), (64, 576, 7168, 2)],
)
def test_its_sums(rows: int, columns: int, depth: int, parts: int) -> None:
    """K in `parts` that are summed alone and then added; another number of them is seen."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    from dsv3_plugin.kernels.vendors import transformer_engine as ours

    draw = torch.Generator().manual_seed(1)
    x, x_scale = of_rows(torch.randn(rows, depth, generator=draw))
    padded = -columns % 128
    weight, weight_scale = of_blocks(
        torch.nn.functional.pad(torch.randn(columns, depth, generator=draw), (0, 0, 0, padded))
    )
    weight = weight[:columns].contiguous()
    of_x = ours._tensor(x.to(CARD).view(torch.uint8), x_scale.t().contiguous().to(CARD), 1)
    of_weight = ours._tensor(weight.to(CARD), weight_scale.to(CARD), 2)
    found = general_gemm(of_weight, of_x, out_dtype=torch.float32)[0][:SEEN, :SEEN].cpu()

    def summed(parts: int) -> torch.Tensor:
        total = torch.zeros(0)
        for blocks in torch.arange(depth // 128).chunk(parts):
            part = torch.zeros(SEEN, SEEN)
            for k in blocks.tolist():
                block = slice(128 * k, 128 * k + 128)
                operands = x[:SEEN, block].contiguous().to(CARD), weight[:SEEN, block].contiguous().to(CARD)
                raw = sm90_model.PRODUCTS.fp8_linear(*operands).cpu()
                scales = (x_scale[:SEEN, k, None] * weight_scale[None, 0, k]).expand_as(raw).contiguous()
                part = fma(raw, scales, part)
            total = total + part if total.numel() else part
        return total

    assert same_bits(found, summed(parts))
    assert not same_bits(found, summed(3 - parts))
