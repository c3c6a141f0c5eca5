"""The Megatron testee: the training forward, gradients and losses included, over whole sequences.

A trainer has no cache and no decode, so it does not follow a case's schedule, and says so. It computes the same
sequences: it generates greedily, each token by a whole pass over the round's requests as one padded batch, and then
evaluates all sequences of the case in one packed pass. Its rows are compared with every server's, which is what
training on a server's samples rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import distributed as dist

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.protocol import Case, Job, RequestResult, Served, prefix_digest
from dsv3_plugin.conformance.rows import RowKey, RowRecorder, layer_streams
from dsv3_plugin.conformance.sampling import next_token
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.megatron_backend import compat
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint

Hook = Callable[[Any, Any, Any], None]


class MegatronTestee:
    """A job's checkpoint in a `GPTModel`, in training mode."""

    name = "megatron"
    schedule_not_followed = "a trainer has no cache; it computed the same sequences whole, padded and packed"

    def __init__(self, job: Job) -> None:
        _start_one_rank()
        reader = CheckpointReader(Path(job.checkpoint))
        self.config = reader.config
        settings = transformer_config(self.config, reader.profile(), perform_initialization=False)
        self.gpt = build_model(self.config, settings, profile=reader.profile())
        self.model = Float16Module(settings, self.gpt) if settings.bf16 else self.gpt
        load_checkpoint(self.model, job.checkpoint)
        self.model.train()
        self.watch = _Watch(self.gpt, self.config.num_hidden_layers)

    def versions(self) -> dict[str, str]:
        """Megatron-Core's."""
        return {"megatron-core": compat.megatron_version()}

    def served(self) -> Served:
        """The class of the model; MTP is part of it."""
        kind = type(self.gpt)
        name = f"{kind.__module__}.{kind.__qualname__}"
        ops = self.gpt.binding.ops
        return Served(
            model_class=name,
            draft_class=name if self.config.num_nextn_predict_layers else None,
            profile=ops.setting.profile.name,
            kernels=program.kernels_of(ops),
        )

    @torch.inference_mode(False)
    @torch.enable_grad()
    def run(self, case: Case) -> program.Outcome:
        """Generate round by round, then evaluate everything that came out."""
        outcome = program.Outcome()
        self.watch.recorder = outcome.recorder
        sequences: list[list[int]] = []
        logprobs: list[list[float]] = []
        for requests in case.rounds:
            batch = [list(request.prompt_token_ids) for request in requests]
            logprobs += [[] for _ in requests]
            left = [request.max_tokens for request in requests]
            while any(left):
                going = [i for i, tokens in enumerate(left) if tokens]
                logits = self.padded([(len(sequences) + i, batch[i]) for i in going])
                for i, of_sequence in zip(going, logits, strict=True):
                    token, logprob = next_token(of_sequence, requests[i], len(batch[i]))
                    if logprob is not None:
                        logprobs[len(sequences) + i].append(logprob)
                    batch[i].append(token)
                    left[i] -= 1
            sequences += batch
        self.packed(list(enumerate(sequences)))
        outcome.requests = [
            RequestResult(token_ids=tuple(tokens), num_cached_tokens=0, logprobs=tuple(of_tokens))
            for tokens, of_tokens in zip(sequences, logprobs, strict=True)
        ]
        return outcome

    def padded(self, sequences: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
        """One pass over a batch [b, s], padded at the end; returns each sequence's logits [vocab_size] at its end."""
        longest = max(len(tokens) for _, tokens in sequences)
        input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        rows: list[_Row] = []
        draft_rows: list[_Row] = []
        for b, (request, tokens) in enumerate(sequences):
            input_ids[b, : len(tokens)] = torch.tensor(tokens)
            keys = _keys(request, tokens)
            rows += [_Row(p, b, key) for p, key in enumerate(keys)]
            draft_rows += [_Row(p, b, successor) for p, successor in enumerate(keys[1:])]
        positions = torch.arange(longest).expand(len(sequences), -1)
        logits = self.forward(input_ids, positions, rows, draft_rows)
        return [logits[b, len(tokens) - 1] for b, (_, tokens) in enumerate(sequences)]

    def packed(self, sequences: list[tuple[int, list[int]]]) -> None:
        """One pass over all sequences, one after the other. The row of a last token that was never fed is left out."""
        lengths = [len(tokens) for _, tokens in sequences]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        rows: list[_Row] = []
        draft_rows: list[_Row] = []
        for start, (request, tokens) in zip(starts.tolist(), sequences, strict=False):
            keys = _keys(request, tokens)
            rows += [_Row(start + p, 0, key) for p, key in enumerate(keys[:-1])]
            draft_rows += [_Row(start + p, 0, successor) for p, successor in enumerate(keys[1:])]
        input_ids = torch.tensor([token for _, tokens in sequences for token in tokens])
        positions = torch.cat([torch.arange(n) for n in lengths])
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts.int(),
            cu_seqlens_kv=starts.int(),
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )
        self.forward(input_ids.unsqueeze(0), positions.unsqueeze(0), rows, draft_rows, packed_seq_params=packing)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        rows: list[_Row],
        draft_rows: list[_Row],
        **kwargs: Any,
    ) -> torch.Tensor:
        """A training step's forward pass, recorded; input_ids and positions [b, s] to logits [b, s, vocab_size]."""
        self.watch.start(rows, draft_rows)
        logits = self.model(input_ids, positions, None, **kwargs)
        self.watch.stop()
        return logits.detach()


@dataclass(frozen=True)
class _Row:
    """Where a pass has the row of `key`, in activations [s, b, ...]."""

    s: int
    b: int
    key: RowKey


def _keys(request: int, token_ids: list[int]) -> list[RowKey]:
    return [RowKey(request, p, prefix_digest(token_ids[: p + 1])) for p in range(len(token_ids))]


class _Watch:
    """Records Megatron's modules under the suite's names, by forward hooks.

    Rows are copied at once: Megatron's residual sums and its loss write into what the hooks see.
    """

    def __init__(self, gpt: Any, num_hidden_layers: int) -> None:
        self.recorder = RowRecorder()
        self.rows: dict[str, list[_Row]] = {}
        self.head_calls: Iterator[str] = iter(())
        self.with_mtp: bool = gpt.mtp_process
        gpt.embedding.register_forward_hook(self._record_first("embed_tokens"))
        for i, layer in enumerate(gpt.decoder.layers):
            for stream, module in ("self_attn", layer.self_attention), ("mlp", layer.mlp):
                module.register_forward_hook(self._record(f"layers.{i}.{stream}"))
            layer.register_forward_hook(self._record(f"layers.{i}"))
        gpt.decoder.final_layernorm.register_forward_hook(self._record("norm"))
        gpt.output_layer.register_forward_hook(self._record_head)
        self.streams = layer_streams(num_hidden_layers)

    def start(self, rows: list[_Row], draft_rows: list[_Row]) -> None:
        """A pass begins: which rows of the main model and of MTP are wanted."""
        self.rows = dict.fromkeys([*self.streams, "logits"], rows) | {"mtp.0": draft_rows}
        # Megatron runs the head for MTP first.
        self.head_calls = iter(("mtp.0", "logits") if self.with_mtp else ("logits",))

    def stop(self) -> None:
        """The pass is over."""
        self.rows = {}

    def _add(self, stream: str, output: Any) -> None:
        rows = self.rows.get(stream)
        if rows:
            activations = output[0] if isinstance(output, tuple) else output
            values = activations[[row.s for row in rows], [row.b for row in rows]]
            self.recorder.add(stream, [row.key for row in rows], values)

    def _record(self, stream: str) -> Hook:
        return lambda module, args, output: self._add(stream, output)

    def _record_first(self, stream: str) -> Hook:
        """Of a module that MTP calls again."""

        def record(module: Any, args: Any, output: Any) -> None:
            self._add(stream, output)
            self.rows.pop(stream, None)

        return record

    def _record_head(self, module: Any, args: Any, output: Any) -> None:
        self._add(next(self.head_calls), output)


def _start_one_rank() -> None:
    """A world of one, which Megatron needs for its process groups."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
    model_parallel_cuda_manual_seed(0)


if __name__ == "__main__":
    program.main(MegatronTestee)
