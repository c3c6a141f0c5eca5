"""A model whose layers use fused operations prints the bits of one that uses their parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint

from dsv3_plugin.checkpoint.loader import load_model
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers.attend import WholeSequences
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.ops.linear import head_linear_fp8
from dsv3_plugin.ops.operation import Operation
from dsv3_plugin.ops.permute import permute_fp8
from dsv3_plugin.ops.quantize import quantize_fp8
from dsv3_plugin.ops.rms_norm import add_rms_norm_fp8, rms_norm_fp8
from dsv3_plugin.ops.silu_and_mul import silu_and_mul_fp8
from dsv3_plugin.registry import Ops

FUSED_FP8: tuple[Operation[..., Any], ...]
FUSED_FP8 = rms_norm_fp8, add_rms_norm_fp8, head_linear_fp8, silu_and_mul_fp8, permute_fp8


def logits(
    checkpoint: TinyCheckpoint, calls: list[str], kernels: dict[Operation[..., Any], Any] | None = None
) -> torch.Tensor:
    """fp32 [70, vocab_size] of a tiny fp8 model; the names of the operations that ran are added to `calls`."""
    reader = CheckpointReader(checkpoint("fp8"))
    ops = bind_ops(reader.config, reader.profile(), torch.device("cpu"))

    def counted(op: Operation[..., Any]) -> Any:
        kernel = (kernels or {}).get(op, ops[op])

        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(op.name)
            return kernel(*args, **kwargs)

        return run

    ops = replace(ops, kernels={**ops.kernels, **{op: counted(op) for op in (quantize_fp8, *FUSED_FP8)}})
    model = load_model(reader, ops)
    tokens = torch.randint(reader.config.vocab_size, (70,), generator=torch.Generator().manual_seed(0))
    out: torch.Tensor = model.lm_head(model(tokens, torch.arange(70), WholeSequences(ops, reader.config)))
    return out


def test_fused_operations_change_no_bit(tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[str] = []
    expected = logits(tiny_checkpoint, fused)
    assert {op.name for op in FUSED_FP8} <= set(fused)
    parts: list[str] = []
    monkeypatch.setattr(Ops, "quantizes_ahead", False)
    assert torch.equal(logits(tiny_checkpoint, parts).view(torch.int32), expected.view(torch.int32))
    assert set(parts) == {"quantize_fp8"}
    # Each activation is quantized where it is made, once for all that read it.
    print(f"{parts.count('quantize_fp8')} activations are quantized by projections, none when fused")
    assert "quantize_fp8" not in fused


def unrounded(gate_up: torch.Tensor, scale_format: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU quantized without the rounding to bf16 between."""
    gate, up = gate_up.float().chunk(2, 1)
    return quantize_fp8((gate * gate.sigmoid() * up).contiguous(), scale_format)


def test_a_rounding_left_away_shows_in_the_logits(tiny_checkpoint: TinyCheckpoint) -> None:
    """The twin."""
    expected = logits(tiny_checkpoint, [])
    assert not torch.equal(logits(tiny_checkpoint, [], {silu_and_mul_fp8: unrounded}), expected)
