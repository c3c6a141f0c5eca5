"""A trainer's view of a checkpoint: it holds numbers, where an FP8 file holds values and scales.

With power-of-two scales a value times its scale is a bf16 number, and quantizing it again gives the same number. It
gives the same bytes, too, if the block's scale was the smallest that fits its largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dsv3_plugin.checkpoint.names import BIAS_SUFFIX, SCALE_SUFFIX, checkpoint_tensors
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import FP8_BLOCK, DeepseekV3Config
from dsv3_plugin.ops.quantize import E4M3, dequantize_weight, quantize_weight
from dsv3_plugin.profile import ScaleFormat, profile_for


def dequantize_weights(reader: CheckpointReader, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """The wanted weights of a checkpoint; fp8 weights as the fp32 numbers that they stand for.

    Memory is needed for one tensor, and for an fp8 weight or scale until its other half comes.
    """
    halves: dict[str, torch.Tensor] = {}
    for name, tensor in reader.tensors(lambda name: wanted(name.removesuffix(SCALE_SUFFIX))):
        weight = name.removesuffix(SCALE_SUFFIX)
        is_scale = name != weight
        if not is_scale and tensor.dtype != E4M3:
            yield name, tensor
        elif weight not in halves:
            halves[weight] = tensor
        else:
            other = halves.pop(weight)
            yield weight, dequantize_weight(other, tensor) if is_scale else dequantize_weight(tensor, other)


def as_written(name: str, tensor: torch.Tensor, config: DeepseekV3Config) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint of this configuration holds for a master weight: a weight, and its scale if it is quantized.

    A router's bias stays in fp32, all else has the profile's dtype.
    """
    profile = profile_for(config)
    if name + SCALE_SUFFIX in checkpoint_tensors(config):
        assert profile.scale_format is not None
        quantized, scale = _quantize(tensor, profile.scale_format)
        yield name, quantized
        yield name + SCALE_SUFFIX, scale
    else:
        yield name, tensor.to(torch.float32 if name.endswith(BIAS_SUFFIX) else profile.dtype)


def _quantize(weight: torch.Tensor, scale_format: ScaleFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_weight` of [N, K], on a CPU by rows of blocks, which a core's cache holds: at a real model's width four
    times as fast as all at once.
    """
    if weight.device.type != "cpu":
        return quantize_weight(weight, scale_format)
    parts = [quantize_weight(rows, scale_format) for rows in weight.split(FP8_BLOCK)]
    quantized, scales = zip(*parts, strict=True)
    return torch.cat(quantized), torch.cat(scales)
