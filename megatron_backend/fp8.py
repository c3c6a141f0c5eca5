"""Megatron's own words for FP8: `--fp8-format e4m3 --fp8-recipe blockwise`.

What is FP8 in a model its checkpoint says, and the layers follow that with or without these arguments. Given, they must
say the same; and they ask for TransformerEngine, so its kernels go before others wherever they have the contract's bits
(`dsv3_plugin.kernels.vendors.transformer_engine`). Megatron itself is not told: it would run the layers in
TransformerEngine's autocast, which knows none of them.
"""

from __future__ import annotations

import argparse
import os

from dsv3_plugin.errors import EngineError
from dsv3_plugin.profile import Profile

TRANSFORMER_ENGINE = "transformer-engine"
"""The provider of its kernels."""
FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
"""Read by TransformerEngine when its recipes are imported: `1` for fp32 scales, else they are powers of two."""


def take_format(args: argparse.Namespace, profile: Profile) -> None:
    """Take `args.fp8` out of Megatron's arguments, and note in `args.preferred_kernels` whose kernels it asks for.

    Another format than e4m3 stays, and is refused with the other options. Raises `EngineError` where the arguments and
    the checkpoint do not say the same.
    """
    args.preferred_kernels = getattr(args, "preferred_kernels", None)
    if args.fp8 != "e4m3":
        return
    if not profile.is_fp8:
        raise EngineError(
            f"fp8=e4m3 (--fp8-format), and the checkpoint of --hf-config is in {profile.name}: convert it to fp8, or"
            " leave --fp8-format out"
        )
    if args.fp8_recipe != "blockwise":
        raise EngineError(
            f"fp8_recipe={args.fp8_recipe} with --fp8-format, and the checkpoint has a scale for each block: give"
            " --fp8-recipe blockwise"
        )
    if profile.scale_format == "float32":
        raise EngineError(
            "fp8=e4m3 (--fp8-format), and the checkpoint of --hf-config has fp32 scales: a weight that is read with"
            " them and quantized again is not the same, by this package's formula nor by TransformerEngine's, which is"
            " another. Take a checkpoint with power-of-two scales (scale_fmt ue8m0), or train in bf16 after dsv3"
            " convert to-megatron --dequantize"
        )
    if os.environ.get(FP32_SCALES, "0") == "1":
        raise EngineError(
            f"{FP32_SCALES}=1 gives TransformerEngine fp32 scales, and the checkpoint of --hf-config has power-of-two"
            " ones: unset it"
        )
    args.fp8, args.preferred_kernels = None, TRANSFORMER_ENGINE
