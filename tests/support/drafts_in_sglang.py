"""The SGLang testee, whose drafts go on as they do on a card: SGLang asks one function of a CUDA kernel for the next
token and position, with requirements of its own, which elsewhere torch computes.

`DRAFTS_IN_SGLANG=padded` leaves a rank without requests the positions with which SGLang padded its draft pass.
"""

from __future__ import annotations

import os

import torch

from dsv3_plugin.conformance.testees import program, sglang
from dsv3_plugin.sglang_backend import compat


def next_drafts(
    next_token_logits: torch.Tensor, positions: torch.Tensor, draft_tokens: torch.Tensor | None = None, column: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's `draft_topk1_postprocess`, with what it requires."""
    assert next_token_logits.ndim == 2 and next_token_logits.stride(1) == 1
    assert positions.ndim == 1 and positions.is_contiguous()
    assert positions.shape[0] == next_token_logits.shape[0]
    best = next_token_logits.argmax(-1, keepdim=True)
    if draft_tokens is not None:
        assert draft_tokens.shape[0] == next_token_logits.shape[0]
        draft_tokens[:, column : column + 1] = best
    positions.add_(1)
    return torch.ones_like(best, dtype=torch.float32), best


class OnACard(sglang.SglangTestee):
    def start_engine(self, num_speculative_tokens: int) -> None:
        from sglang.srt.speculative import eagle_worker_v2 as worker

        worker.draft_topk1_postprocess = next_drafts
        worker._is_cuda = False
        super().start_engine(num_speculative_tokens)
        worker._is_cuda = True


def main() -> None:
    if os.environ.get("DRAFTS_IN_SGLANG") == "padded":
        compat.cut_idle_draft = lambda forward, *args, **kwargs: forward(*args, **kwargs)
    program.main(OnACard, OnACard)


if __name__ == "__main__":
    main()
