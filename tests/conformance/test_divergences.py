"""What `docs/divergences.md` says of transformers: its router's ties are all that parts it from the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3ForCausalLM

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.traps import Token
from dsv3_plugin.conformance.protocol import Job
from dsv3_plugin.conformance.testees.reference import ReferenceTestee

VOCAB = 1024
PROMPT = (*range(3, 80), *(token.id(VOCAB) for token in Token), 5)


def stable_topk(x: torch.Tensor, k: int, dim: int = -1, sorted: bool = True) -> object:
    """The lower index of two that tie."""
    values, indices = torch.sort(x, dim=dim, descending=True, stable=True)
    return torch.return_types.topk((values.narrow(dim, 0, k), indices.narrow(dim, 0, k)))


def test_ties_are_all_that_parts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = make_checkpoint(read_config("traps"), tmp_path / "traps", 0, dtype=CheckpointDtype("fp32"))
    testee = ReferenceTestee(Job(checkpoint=str(reader.path), block_size=32, cases=()))
    model = DeepseekV3ForCausalLM.from_pretrained(reader.path, dtype=torch.float32).eval()

    @torch.no_grad()
    def kl() -> float:
        found = model(torch.tensor([PROMPT[:-1]])).logits[0].double().log_softmax(-1)
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    with torch.inference_mode():
        testee.whole_sequence(PROMPT, len(PROMPT)).save(tmp_path / "rows")
    expected = load_file(tmp_path / "rows")["logits"].double().log_softmax(-1)
    own = kl()
    monkeypatch.setattr(torch, "topk", stable_topk)
    stable = kl()
    print(f"KL mean {own:.2e} nats; with ties to the lower expert {stable:.2e}")
    assert own > 1e-4 and stable < 1e-10
