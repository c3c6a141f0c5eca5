"""Where sequences begin: Megatron's packing, positions and attention mask, as the starts that attention takes.

Attention is causal over each sequence. Several documents may share a row of a batch and not see each other: by
Megatron's packing, or by positions that begin anew (`--reset-position-ids --reset-attention-mask`). A mask adds nothing
to that; one that forbids or allows something else is refused, and so are positions that are no count from 0.

Where the first tokens of a sequence are a prompt that a server answered, the length of the prompt goes with its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsv3_plugin.errors import InputError


def require_packing(packed_seq_params: Any, shape: tuple[int, int]) -> None:
    """Raise `InputError` unless Megatron's packing is of one row of a batch of `shape` [b, s], and of all of it."""
    starts = packed_starts(packed_seq_params)
    if shape[0] != 1 or int(starts[0]) != 0 or int(starts[-1]) != shape[1]:
        raise InputError(
            f"packed sequences from {int(starts[0])} to {int(starts[-1])} are not the one row of tokens {tuple(shape)}"
        )


def packed_starts(packed_seq_params: Any) -> torch.Tensor:
    """Starts [n + 1] of packed sequences; padding after a sequence belongs to it."""
    padded: torch.Tensor | None = packed_seq_params.cu_seqlens_q_padded
    return packed_seq_params.cu_seqlens_q if padded is None else padded


def with_prompt_lens(starts: torch.Tensor, prompt_lens: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Starts [n + 1] of sequences, to int64 [2, n + 1]: under each the length of its prompt, and 0 under the end.

    It is a tensor, so that layers that are computed again are given it again.

    Raises `InputError` unless each sequence has a length, a whole number of 0 or more.
    """
    try:
        lens = torch.as_tensor(prompt_lens, device="cpu")  # to be looked at without waiting for a device
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"prompt_lens {prompt_lens!r} are no list of whole numbers: {error}") from None
    is_whole = not lens.is_floating_point() and lens.dtype != torch.bool
    if not is_whole or lens.shape != (len(starts) - 1,) or bool((lens < 0).any()):
        raise InputError(
            f"prompt_lens {lens.tolist()} are not the lengths of {len(starts) - 1} sequences' prompts:"
            " give each sequence a whole number of 0 or more, in their order"
        )
    return torch.stack((starts.long(), torch.nn.functional.pad(lens.long(), (0, 1)).to(starts.device)))


def packed_prompts(packed_seq_params: Any, prompt_lens: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """`with_prompt_lens` of packed sequences. Raises `InputError`, also for a prompt that reaches into the padding."""
    told = with_prompt_lens(packed_starts(packed_seq_params), prompt_lens)
    if packed_seq_params.cu_seqlens_q_padded is not None:  # else attention has the same lengths, and looks itself
        require_prompts_fit(told[1, :-1].tolist(), packed_seq_params.cu_seqlens_q.diff().tolist())
    return told


def require_prompts_fit(prompt_lens: Sequence[int], lengths: Sequence[int]) -> None:
    """Raise `InputError` where a prompt is longer than its sequence."""
    if any(prompt > length for prompt, length in zip(prompt_lens, lengths, strict=True)):
        raise InputError(f"prompt_lens {prompt_lens} are longer than the sequences, of {lengths} tokens")


def row_starts(b: int, s: int, device: torch.device) -> torch.Tensor:
    """Starts int64 [b + 1] of a batch [b, s] of which each row is a sequence."""
    return torch.arange(b + 1, device=device) * s


def document_starts(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The starts of a batch's documents, row after row, int64 [n + 1]; None where each row is one.

    Args:
        position_ids: int64 [b, s] or None, which count from 0 in each document.
        attention_mask: bool [b or 1, 1, s, s] or None, True where attention is forbidden.

    Raises `InputError` for positions or a mask that are no causal attention over whole documents.
    """
    if position_ids is None:
        if attention_mask is not None:
            raise InputError("an attention mask needs position_ids, which say where documents begin")
        return None
    begins = position_ids == 0
    follows = position_ids[:, 1:] == position_ids[:, :-1] + 1
    if not bool(begins[:, 0].all() and (begins[:, 1:] | follows).all()):
        raise InputError("position_ids must count from 0 in each document: other positions are not served")
    if attention_mask is not None and not _is_causal(attention_mask, begins):
        raise InputError(
            "the attention mask is not the causal one over the documents that position_ids say: give"
            " --reset-position-ids and --reset-attention-mask both or neither, and no other mask"
        )
    if not bool(begins[:, 1:].any()):
        return None
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_tensor([begins.numel()])))


def _is_causal(mask: torch.Tensor, begins: torch.Tensor) -> bool:
    b, s = begins.shape
    document = begins.cumsum(1)
    seen = document[:, :, None] == document[:, None, :]
    expected = ~(seen & torch.ones(s, s, dtype=torch.bool, device=mask.device).tril())
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:] != (1, s, s) or mask.shape[0] not in (1, b):
        return False
    return torch.equal(mask[:, 0].expand(b, s, s), expected)
