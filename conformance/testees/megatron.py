"""The Megatron testee: the training forward, gradients and losses included, over whole sequences.

A trainer has no cache and no decode, so it does not follow a case's schedule, and says so. It computes the same
sequences: it generates them, each token by a pass over everything before it, and then evaluates all of them twice as
training would, packed one after the other and as padded batches. It is told where prompts end. Its rows are compared
with every server's, which is what training on a server's samples rests on.

On several ranks (`--layout`) each of them computes all sequences, those of data parallelism too, which share experts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import distributed as dist

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.layouts import ALONE, RankOf
from dsv3_plugin.conformance.protocol import Case, Job, RequestResult, Served, prefix_digests
from dsv3_plugin.conformance.rows import Pass, RowKey, RowRecorder, layer_streams
from dsv3_plugin.conformance.sampling import Answer, next_token, prompt_answer
from dsv3_plugin.conformance.taps import OperationRecorder
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.engines import class_name
from dsv3_plugin.megatron_backend import compat
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.documents import with_prompt_lens
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint

Hook = Callable[[Any, Any, Any], None]


class MegatronTestee:
    """A job's checkpoint in a `GPTModel`, or in a stage of one, in training mode."""

    name = "megatron"
    schedule_not_followed = "a trainer has no cache; it computed the same sequences whole, padded and packed"
    preferred_kernels: str | None = None
    """See `build_model`."""

    def __init__(self, job: Job, rank: RankOf = ALONE) -> None:
        _start(rank)
        reader = CheckpointReader(Path(job.checkpoint))
        self.config = reader.config
        profile = reader.profile()
        sizes = _sizes(rank) | ({"pipeline_dtype": profile.dtype} if rank.layout.pp > 1 else {})
        settings = transformer_config(self.config, profile, perform_initialization=False, **sizes)
        self.stages = _Stages(rank)
        self.gpt = build_model(
            self.config,
            settings,
            pre_process=self.stages.is_first,
            post_process=self.stages.is_last,
            profile=profile,
            preferred_kernels=self.preferred_kernels,
        )
        self.model = Float16Module(settings, self.gpt) if settings.bf16 else self.gpt
        load_checkpoint(self.model, job.checkpoint)
        self.model.train()
        self.ranks = settings.tensor_model_parallel_size
        self.device = compat.require_device()
        self.watch = _Watch(self.gpt, self.config.num_hidden_layers, self.stages)
        if job.operations:
            OperationRecorder(self.gpt, self.gpt.binding.ops, self.watch.current, _stream, job.capture)

    def versions(self) -> dict[str, str]:
        """Megatron-Core's."""
        return {"megatron-core": compat.megatron_version()}

    def served(self) -> Served:
        """The class of the model; MTP is part of it."""
        name = class_name(self.gpt)
        ops = self.gpt.binding.ops
        return Served(
            model_class=name,
            draft_class=name if self.config.num_nextn_predict_layers else None,
            profile=str(ops.setting.profile),
            kernels=program.kernels_of(ops),
        )

    @torch.inference_mode(False)
    def run(self, case: Case) -> program.Outcome:
        """Generate all requests, then evaluate what came out."""
        outcome = program.Outcome()
        self.watch.recorder = outcome.recorder
        outcome.requests = self.generate(case)
        sequences = [
            _Sequence(index, list(result.token_ids), len(request.prompt_token_ids))
            for index, (request, result) in enumerate(zip(case.requests, outcome.requests, strict=True))
        ]
        self.packed(sequences)
        of_rounds = iter(sequences)
        for requests in case.single_rounds:
            self.padded([next(of_rounds) for _ in requests])
        return outcome

    @torch.no_grad()
    def generate(self, case: Case) -> list[RequestResult]:
        """All requests at once: rounds are for caches."""
        tokens = [list(request.prompt_token_ids) for request in case.requests]
        of_prompt: list[list[Answer]] = [[] for _ in tokens]
        generated: list[list[Answer]] = [[] for _ in tokens]
        for step in range(max(request.max_tokens for request in case.requests)):
            going = [(i, request) for i, request in enumerate(case.requests) if step < request.max_tokens]
            wanted = [len(tokens[i]) if step == 0 and request.prompt_logprobs else 1 for i, request in going]
            prompt_lens = [len(request.prompt_token_ids) for _, request in going]
            logits = self.last_logits([tokens[i] for i, _ in going], prompt_lens, wanted)
            for (i, request), rows in zip(going, logits, strict=True):
                of_prompt[i] += [prompt_answer(row, request, position) for position, row in enumerate(rows[:-1], 1)]
                generated[i].append(next_token(rows[-1], request, tokens[i]))
                tokens[i].append(generated[i][-1].token)
        return [program.request_result(*of_request) for of_request in zip(tokens, generated, of_prompt, strict=True)]

    def last_logits(
        self, sequences: list[list[int]], prompt_lens: list[int], wanted: list[int]
    ) -> tuple[torch.Tensor, ...]:
        """Logits [wanted, vocab_size] of each sequence's last tokens, without the MTP layer and the other logits."""
        batch = _Packed(sequences, prompt_lens, self.ranks, self.device)
        input_ids, positions, packing = batch
        starts = with_prompt_lens(batch.starts, batch.prompt_lens)
        embedded = self.gpt.embedding(input_ids, positions) if self.stages.is_first else None
        hidden = self.stages.run(
            self.gpt, input_ids, lambda: self.gpt.decoder(embedded, attention_mask=starts, packed_seq_params=packing)
        )
        ends = batch.starts[1:].tolist()
        rows = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, wanted, strict=False)])
        logits = torch.empty(len(rows), self.config.vocab_size, device=self.device)
        if self.stages.is_last and self.ranks == 1:
            logits = self.gpt.output_layer(hidden[rows])[0][:, 0]
        elif self.stages.is_last:
            # The head of a sequence-parallel rank gathers all tokens itself.
            logits = gather_from_tensor_model_parallel_region(self.gpt.output_layer(hidden)[0])[rows, 0]
        return self.stages.of_last(logits).split(wanted)

    @torch.enable_grad()
    def packed(self, sequences: list[_Sequence]) -> None:
        """One pass over all sequences, one after the other. The row of a last token that was never fed is left out."""
        prompt_lens = [sequence.prompt_len for sequence in sequences]
        batch = _Packed([sequence.tokens for sequence in sequences], prompt_lens, self.ranks, self.device)
        rows: list[_Row] = []
        draft_rows: list[_Row] = []
        for start, (request, tokens, _) in zip(batch.starts.tolist(), sequences, strict=False):
            keys = _keys(request, tokens)
            rows += [_Row(start + p, 0, key) for p, key in enumerate(keys[:-1])]
            draft_rows += [_Row(start + p, 0, successor) for p, successor in enumerate(keys[1:])]
        self.forward(*batch, prompt_lens=batch.prompt_lens, rows=rows, draft_rows=draft_rows)

    @torch.enable_grad()
    def padded(self, sequences: list[_Sequence]) -> None:
        """One pass over a batch [b, s], padded at the end."""
        longest = max(len(sequence.tokens) for sequence in sequences)
        longest += -longest % self.ranks
        input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64, device=self.device)
        rows: list[_Row] = []
        draft_rows: list[_Row] = []
        for b, (request, tokens, _) in enumerate(sequences):
            input_ids[b, : len(tokens)] = torch.tensor(tokens, device=self.device)
            keys = _keys(request, tokens)
            rows += [_Row(p, b, key) for p, key in enumerate(keys[:-1])]
            draft_rows += [_Row(p, b, successor) for p, successor in enumerate(keys[1:])]
        positions = torch.arange(longest, device=self.device).expand(len(sequences), -1)
        prompt_lens = [sequence.prompt_len for sequence in sequences]
        self.forward(input_ids, positions, prompt_lens=prompt_lens, rows=rows, draft_rows=draft_rows)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        packing: PackedSeqParams | None = None,
        *,
        prompt_lens: list[int],
        rows: list[_Row],
        draft_rows: list[_Row],
    ) -> None:
        """A training step's forward pass over input_ids and positions [b, s], of which `rows` are recorded."""
        self.watch.start(rows, draft_rows, is_packed=packing is not None)
        self.stages.run(
            self.gpt,
            input_ids,
            lambda: self.model(input_ids, positions, None, packed_seq_params=packing, prompt_lens=prompt_lens),
        )
        self.watch.stop()


class _Stages:
    """This rank's place in a pipeline, whose stages hand on activations [s, b, hidden]."""

    def __init__(self, rank: RankOf) -> None:
        self.is_first = rank.pp_rank == 0
        self.is_last = rank.is_last_stage

    def run(self, gpt: Any, input_ids: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What this stage computes of input_ids [b, s], given what the stage before did."""
        config = gpt.config
        if not self.is_first:
            b, s = input_ids.shape
            shape = s // config.tensor_model_parallel_size, b, config.hidden_size
            came = torch.empty(shape, dtype=config.pipeline_dtype, device=input_ids.device)
            dist.recv(came, parallel_state.get_pipeline_model_parallel_prev_rank())
            gpt.set_input_tensor(came)
        out = compute()
        if not self.is_last:
            dist.send(out.detach().contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return out

    def of_last(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's x, on every stage."""
        if not (self.is_first and self.is_last):
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(x, last, group=parallel_state.get_pipeline_model_parallel_group())
        return x


class _Sequence(NamedTuple):
    """A finished request."""

    request: int
    tokens: list[int]
    prompt_len: int


class _Packed:
    """Sequences one after the other, as arguments of `MegatronTestee.forward`.

    Sequence-parallel ranks share the tokens evenly, so that a sequence of zeros may follow.
    """

    def __init__(self, sequences: list[list[int]], prompt_lens: list[int], ranks: int, device: torch.device) -> None:
        padding = -sum(map(len, sequences)) % ranks
        if padding:
            sequences, prompt_lens = [*sequences, [0] * padding], [*prompt_lens, 0]
        self.prompt_lens = prompt_lens
        lengths = [len(tokens) for tokens in sequences]
        self.starts = torch.tensor([0, *lengths], device=device).cumsum(0)
        self.input_ids = torch.tensor([token for tokens in sequences for token in tokens], device=device)
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])

    def __iter__(self) -> Iterator[Any]:
        starts, longest = self.starts.int(), int(self.starts.diff().max())
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return iter((self.input_ids.unsqueeze(0), self.positions.unsqueeze(0), packing))


@dataclass(frozen=True)
class _Row:
    """Where a pass has the row of `key`, in activations [s, b, ...]."""

    s: int
    b: int
    key: RowKey


def _keys(request: int, token_ids: list[int]) -> list[RowKey]:
    return [RowKey(request, p, digest) for p, digest in enumerate(prefix_digests(token_ids))]


class _Watch:
    """Records Megatron's modules under the suite's names, by forward hooks.

    Rows are copied at once: Megatron's residual sums and its loss write into what the hooks see.
    """

    def __init__(self, gpt: Any, num_hidden_layers: int, stages: _Stages) -> None:
        self.recorder: RowRecorder | None = None
        self.sequence_parallel = gpt.config.sequence_parallel
        self.rows: dict[str, list[_Row]] = {}
        self.is_packed = False
        self.head_calls: Iterator[str] = itertools.repeat("")
        self.with_mtp: bool = gpt.mtp_process
        if stages.is_first:
            gpt.embedding.register_forward_hook(self._record_first("embed_tokens"))
        for layer in gpt.decoder.layers:
            i = layer.layer_number - 1
            for stream, module in ("self_attn", layer.self_attention), ("mlp", layer.mlp):
                module.register_forward_hook(self._record(f"layers.{i}.{stream}"))
            layer.register_forward_hook(self._record(f"layers.{i}"))
        if stages.is_last:
            gpt.decoder.final_layernorm.register_forward_hook(self._record("norm"))
            gpt.output_layer.register_forward_hook(self._record_head)
        self.streams = layer_streams(num_hidden_layers)

    def start(self, rows: list[_Row], draft_rows: list[_Row], *, is_packed: bool) -> None:
        """A pass begins: which rows of the main model and of MTP are wanted."""
        self.is_packed = is_packed
        self.rows = dict.fromkeys([*self.streams, "logits"], rows) | {"mtp.0": draft_rows}
        # Megatron runs the head for MTP first. While tokens are generated nothing is recorded.
        self.head_calls = iter(("mtp.0", "logits") if self.with_mtp else ("logits",))

    def current(self) -> Pass | None:
        """The pass that runs, if its activations [s, 1, ...] are tokens one after the other."""
        rows = self.rows.get("norm")
        if not rows or not self.is_packed or self.recorder is None:
            return None
        return Pass(self.recorder, [row.key for row in rows], [row.s for row in rows])

    def stop(self) -> None:
        """The pass is over."""
        self.rows, self.head_calls = {}, itertools.repeat("")

    def _add(self, stream: str, output: Any) -> None:
        rows = self.rows.get(stream)
        if not rows:
            return
        activations = (output[0] if isinstance(output, tuple) else output).detach()
        if stream in ("logits", "mtp.0"):
            activations = gather_from_tensor_model_parallel_region(activations)
        elif self.sequence_parallel:
            activations = gather_from_sequence_parallel_region(activations)
        if self.recorder is not None:
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


# What the servers call the same numbers. Megatron adds its residuals itself, and sorts experts' rows in its dispatcher.
_STREAMS = (
    (r"decoder\.final_layernorm/rms_norm", "norm/add_rms_norm.1"),
    (r"decoder\.layers\.0\.input_layernorm/rms_norm", "layers.0.input_layernorm/rms_norm"),
    (r"decoder\.layers\.0\.pre_mlp_layernorm/rms_norm", "layers.0/add_rms_norm.1"),
    (r"decoder\.(layers\.\d+)\.input_layernorm/rms_norm", r"\1/add_rms_norm.1"),
    (r"decoder\.(layers\.\d+)\.pre_mlp_layernorm/rms_norm", r"\1/add_rms_norm@1.1"),
    (r"decoder\.(layers\.\d+)\.mlp\.router/route", r"\1.mlp.gate/moe_router"),
    (r"decoder\.(layers\.\d+)\.self_attention\.core(.*)", r"\1.self_attn\2"),
    (r"decoder\.(layers\.\d+\.mlp\.shared_experts)\.core(.*)", r"\1\2"),
    (r"decoder\.(layers\.\d+\.mlp)(?:\.core)?((?:\.gate_up_proj|\.down_proj)?/.*)", r"\1\2"),
)


def _stream(name: str) -> str | None:
    found = ((re.fullmatch(pattern, name), ours) for pattern, ours in _STREAMS)
    return next((match.expand(ours) for match, ours in found if match is not None), None)


def _sizes(rank: RankOf) -> dict[str, int]:
    """A layout in Megatron's words."""
    layout = rank.layout
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
    }


def _start(rank: RankOf) -> None:
    """Megatron's process groups: of the layout's ranks, each with a GPU of its own, or of one that is alone."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank.rank)
    store: Any = dist.HashStore()  # type: ignore[attr-defined]
    if rank.ports:
        is_first = rank.rank == 0
        store = dist.TCPStore("127.0.0.1", rank.ports[0], rank.layout.ranks, is_first)  # type: ignore[attr-defined]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.layout.ranks)
    parallel_state.initialize_model_parallel(
        create_gloo_process_groups=True, expert_tensor_parallel_size=1, **_sizes(rank)
    )
    model_parallel_cuda_manual_seed(0)


def main() -> None:
    """See the module."""
    program.main(MegatronTestee, MegatronTestee)


if __name__ == "__main__":
    main()
