"""The trainer of a policy: Megatron's model, packing, optimizer and checkpoints, and copies of earlier weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hand_over import Weights
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import distributed as dist

from dsv3_plugin.checkpoint.fingerprint import Fingerprint
from dsv3_plugin.checkpoint.names import checkpoint_tensors
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.export import hf_tensors
from dsv3_plugin.megatron_backend.log_probs import log_probs
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import fingerprint, load_checkpoint, save_checkpoint


class Packed(NamedTuple):
    """Sequences one after the other, as Megatron packs them."""

    inputs: dict[str, Any]
    rows: torch.Tensor
    """int64 [N]: the positions whose logits the tokens were sampled from."""
    tokens: torch.Tensor
    """int64 [N]: the tokens of all answers."""
    temperatures: torch.Tensor
    """fp32 [N]."""


def pack(sequences: Sequence[tuple[list[int], list[int], float]]) -> Packed:
    """Of (prompt, answer, temperature)."""
    device = torch.device(torch.cuda.current_device())
    lengths = [len(prompt) + len(answer) for prompt, answer, _ in sequences]
    starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    is_answer = [i >= len(prompt) for prompt, answer, _ in sequences for i in range(len(prompt) + len(answer))]
    answered = torch.tensor(is_answer, device=device)
    tokens = torch.tensor([token for prompt, answer, _ in sequences for token in (*prompt, *answer)], device=device)
    at = answered.nonzero()[:, 0]
    inputs = {
        "input_ids": tokens[None],
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "attention_mask": None,
        "packed_seq_params": PackedSeqParams(
            "thd", starts, starts, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
        ),
        "prompt_lens": [len(prompt) for prompt, _, _ in sequences],
        "loss_mask": answered[None].float(),  # of the MTP layer, whose labels Megatron takes from the inputs
    }
    temperatures = [temperature for _, answer, temperature in sequences for _ in answer]
    return Packed(inputs, at - 1, tokens[at], torch.tensor(temperatures, device=device))


class Trainer:
    """A model of Megatron's, its optimizer and what a step does with them."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        seed: int,
        clip_grad: float,
        mtp_loss_scaling_factor: float,
        moe_router_bias_update_rate: float,
    ) -> None:
        reader = CheckpointReader(checkpoint)
        self.checkpoint, self.hf_config = checkpoint, reader.config
        if reader.config.num_nextn_predict_layers == 0:
            raise EngineError(f"{checkpoint}: has no MTP layer, and the servers draft with it")
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        config = transformer_config(
            reader.config,
            reader.profile(),
            moe_router_bias_update_rate=moe_router_bias_update_rate,
            mtp_loss_scaling_factor=mtp_loss_scaling_factor,
        )
        self.gpt = build_model(reader.config, config)
        load_checkpoint(self.gpt, checkpoint)
        model = Float16Module(config, self.gpt) if config.bf16 else self.gpt
        self.model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.0,  # `gradients` sets it
                adam_beta1=0.9,
                adam_beta2=0.95,
                weight_decay=0.0,
                clip_grad=clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
            ),
            [self.model],
        )

    def log_probs(self, packed: Packed) -> torch.Tensor:
        """Of every answered token, at its temperature, fp32 [N]: the servers' numbers."""
        return log_probs(self.logits(packed), packed.tokens, packed.temperatures)

    def logits(self, packed: Packed) -> torch.Tensor:
        """The rows that the answered tokens were sampled from, fp32 [N, vocab_size]."""
        rows: torch.Tensor = self.model(**packed.inputs)[0][packed.rows]
        return rows

    @contextmanager
    def gradients(self, lr: float) -> Iterator[dict[str, float]]:
        """Around what computes a loss and calls `backward`: an optimizer step follows. Says its gradient's norm.

        Raises `EngineError` where that is no number, and the weights none any more.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        said: dict[str, float] = {"lr": lr}
        yield said
        finalize_model_grads([self.model])  # moves the router's bias, too
        _, norm, _ = self.optimizer.step()
        said["gradient_norm"] = float(norm)
        if not math.isfinite(norm):
            raise EngineError(f"the gradients' norm is {norm}; nothing is saved of this step")

    @staticmethod
    def weigh(share: float) -> None:
        """The next backward pass is of answers with a share of the tokens that an optimizer step learns from: by it
        count the losses that a model adds itself, of its MTP layer and of its experts' balance.
        """
        for loss in MTPLossAutoScaler, MoEAuxLossAutoScaler:
            loss.set_loss_scale(torch.tensor(share, device=torch.cuda.current_device()))

    def weights(self) -> list[torch.Tensor]:
        """A copy of all that the forward pass reads."""
        return [tensor.detach().clone() for tensor in self._state()]

    def weights_of(self, folder: Path) -> list[torch.Tensor]:
        """Those of a Hugging Face checkpoint."""
        own = self.weights()
        load_checkpoint(self.gpt, folder)
        read = self.weights()
        self._set(own)
        return read

    @contextmanager
    def holding(self, weights: list[torch.Tensor]) -> Iterator[None]:
        """With other weights, without gradients."""
        own = self.weights()
        with torch.no_grad():
            self._set(weights)
            try:
                yield
            finally:
                self._set(own)

    def _state(self) -> Iterator[torch.Tensor]:
        return chain(self.gpt.parameters(), self.gpt.buffers())

    def _set(self, weights: list[torch.Tensor]) -> None:
        for tensor, value in zip(self._state(), weights, strict=True):
            tensor.data.copy_(value)

    def fingerprint(self) -> Fingerprint:
        """Of the weights as `export` writes them."""
        return fingerprint(self.gpt, self.hf_config)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face checkpoint, for the servers."""
        save_checkpoint(self.gpt, self.checkpoint, folder)

    def in_memory(self, *, drafts: bool) -> Weights:
        """The same tensors without a file, for servers on this host; they draft or not."""
        specs = checkpoint_tensors(self.hf_config)
        return Weights(
            lambda wanted: hf_tensors(self.gpt, self.hf_config, wanted),
            (lambda name: "main" not in specs[name].targets) if drafts else None,
        )

    def save(self, folder: Path) -> None:
        """Write Megatron's distributed checkpoint into an empty folder."""
        dist_checkpointing.save(self._sharded(is_loading=False), str(folder))

    def load(self, folder: Path) -> None:
        """Continue from it, with equal bits."""
        state = dist_checkpointing.load(self._sharded(is_loading=True), str(folder))
        self.gpt.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _sharded(self, *, is_loading: bool) -> dict[str, Any]:
        model = self.gpt.sharded_state_dict()
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading=is_loading)}


def formulas(logits: torch.Tensor, packed: Packed) -> dict[str, torch.Tensor]:
    """Other numbers that are taken for a log-probability, and the right one first, each fp32 [N]."""
    tempered = logits / packed.temperatures[:, None]
    return {
        "log-softmax(logits / temperature)": log_probs(logits, packed.tokens, packed.temperatures),
        "log-softmax(logits), without the temperature": log_probs(logits, packed.tokens),
        "Megatron's cross-entropy of logits / temperature": -vocab_parallel_cross_entropy(tempered, packed.tokens),
        "log-softmax of bf16 logits / temperature": log_probs(
            logits.bfloat16().float(), packed.tokens, packed.temperatures
        ),
    }
