"""Log-probabilities of tokens as the servers answer them, for a policy gradient and for comparing trainer and server.

They are torch's log-softmax of logits / temperature. Megatron's `vocab_parallel_cross_entropy` is another number: it
subtracts x - max from the logarithm of a sum, which rounds differently for most tokens and differently again for each
number of tensor-parallel ranks. A model that is called without labels returns the logits that this module takes.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch.distributed import ProcessGroup

from dsv3_plugin.errors import InputError


def log_probs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float | torch.Tensor = 1.0,
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """log-softmax(logits / temperature) at the labels, fp32 [...], with gradients for the logits.

    The bits are those of one rank whatever the number of tensor-parallel ranks: each gathers the whole rows.

    Args:
        logits: fp32 [..., vocab_size]; of tensor-parallel ranks each one's part, [..., vocab_size / ranks].
        labels: int64 [...], tokens of the whole vocabulary.
        temperature: above 0; one for all tokens, or one each, [...].
        group: the tensor-parallel ranks; Megatron's by default. Every one of them makes this call.

    Raises `InputError` for what has other dtypes, shapes or values.
    """
    if logits.dtype != torch.float32:
        raise InputError(
            f"log-probabilities are of float32 logits, not {logits.dtype}: rounded ones are another model's"
        )
    if logits.shape[:-1] != labels.shape:
        raise InputError(
            f"logits {tuple(logits.shape)} need labels {tuple(logits.shape[:-1])}, not {tuple(labels.shape)}"
        )
    # A tensor of the logits' device: by a Python number a GPU multiplies with the reciprocal, which the servers do not.
    divisor = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    if divisor.dim() and divisor.shape != labels.shape:
        raise InputError(f"temperatures {tuple(divisor.shape)} are neither one nor one a label, {tuple(labels.shape)}")
    if not bool((divisor > 0).all()):
        raise InputError("a temperature must be above 0: at 0 a token has no log-probability")
    if group is None and parallel_state.model_parallel_is_initialized():
        group = parallel_state.get_tensor_model_parallel_group()
    if group is not None and group.size() > 1:
        logits = gather_from_tensor_model_parallel_region(logits, group=group)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[-1]:
        raise InputError(f"labels must be tokens of a vocabulary of {logits.shape[-1]}")
    of_all = torch.log_softmax(logits / (divisor[..., None] if divisor.dim() else divisor), dim=-1)
    return of_all.gather(-1, labels[..., None])[..., 0]
