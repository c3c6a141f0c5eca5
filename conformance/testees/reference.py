"""The reference testee: a small serving engine around the core, written to be read.

It is the executable specification of what an engine may do to a model: cut prompts into chunks, batch requests, page
the cache, reuse the pages of a common prefix, and verify drafts. None of that may change a bit. `whole_sequence` is
the specification of the numbers themselves: one pass over a finished sequence, nothing cached, nothing batched.
With `--replays` a job's requests are finished ones, which other testees answered, and only that is computed.
In the `two_form` profile a token's row is another one in a prompt, so nobody finds a page with generated tokens.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3_plugin.checkpoint.loader import load_model, load_mtp, load_weights
from dsv3_plugin.checkpoint.masters import dequantize_weights
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.protocol import Case, Job, Request, Served, prefix_digests
from dsv3_plugin.conformance.rows import LayerRecorder, RowKey, RowRecorder, TokenTracker, pick
from dsv3_plugin.conformance.sampling import Answer, next_token, prompt_answer
from dsv3_plugin.conformance.taps import OperationRecorder
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.engines import class_name
from dsv3_plugin.layers.attend import Compute, Select, WholeSequences, attending, select_all
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.layout import WHOLE, Layout
from dsv3_plugin.ops.paged_batch import PagedBatch, whole_sequence
from dsv3_plugin.ops.prompt_batch import of_prompts, with_prompts
from dsv3_plugin.profile import BF16, FP32
from dsv3_plugin.registry import Ops

PRECISIONS = {"fp32": FP32, "bf16": BF16}
"""Other arithmetics than the checkpoint's own, for its main model: how far they are is the reference's own spread."""


class PagedCache:
    """The latent vectors of all layers in pages, and which pages hold which prefix: the core's `Attend`."""

    def __init__(self, ops: Ops, config: DeepseekV3Config, num_layers: int, num_blocks: int, block_size: int) -> None:
        shape = num_layers, num_blocks, block_size, config.cached_dim
        self.ops = ops
        self.config = config
        self.block_size = block_size
        # NaN, so that a page that is read before it is written shows.
        self.pages = torch.full(shape, torch.nan, dtype=ops.setting.profile.dtype)
        self.free = list(range(num_blocks))
        self.block_of_prefix: dict[int, int] = {}
        self.batch: Batch | None = None

    def __call__(
        self, layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all
    ) -> torch.Tensor:
        """Store what is cached for the batch's tokens, and attend."""
        return self.over_pages(layer_idx, cached, attending(self.ops, self.config, q, select))

    def has_prompts(self) -> bool:
        """Whether rows of the batch are of prompts."""
        assert self.batch is not None
        return of_prompts(self.batch.paged).has_prompts

    def over_pages(self, layer_idx: int, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        """Store what is cached for the batch's tokens, and compute."""
        assert self.batch is not None
        pages = self.pages[layer_idx]
        pages[self.batch.slots // self.block_size, self.batch.slots % self.block_size] = cached
        return compute(pages, self.batch.paged)

    def cached_blocks(self, token_ids: list[int]) -> list[int]:
        """Pages that hold the longest known prefix of `token_ids`, in whole blocks."""
        blocks: list[int] = []
        for digest in self._digests(token_ids):
            block = self.block_of_prefix.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def remember(self, token_ids: list[int], blocks: list[int]) -> None:
        """Let later requests find the full pages of `token_ids`."""
        for digest, block in zip(self._digests(token_ids), blocks, strict=False):
            self.block_of_prefix.setdefault(digest, block)

    def _digests(self, token_ids: list[int]) -> list[int]:
        """Of each prefix that ends with a page."""
        return prefix_digests(token_ids)[self.block_size - 1 :: self.block_size]


class Batch(NamedTuple):
    """The tokens of one pass, flattened, where they are kept, and the batch as attention takes it."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    paged: PagedBatch


@dataclass
class Sequence:
    """A request on its way."""

    index: int
    request: Request
    token_ids: list[int]
    blocks: list[int]
    num_computed: int
    num_cached: int
    drafts: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    prompt_answers: list[Answer] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all tokens were generated."""
        return len(self.token_ids) >= len(self.request.prompt_token_ids) + self.request.max_tokens

    def choose(self, logits: torch.Tensor) -> None:
        """Append the token that logits [vocab_size] yield."""
        answer = next_token(logits, self.request, self.token_ids)
        self.token_ids.append(answer.token)
        self.answers.append(answer)

    def answer_prompt(self, position: int, logits: torch.Tensor) -> None:
        """Say what is asked of the prompt's token after `position`, from logits [vocab_size]."""
        if self.request.prompt_logprobs and position + 1 < len(self.request.prompt_token_ids):
            self.prompt_answers.append(prompt_answer(logits, self.request, position + 1))


class Piece(NamedTuple):
    """What a step does for one sequence: feed `token_ids` from position `start` on."""

    sequence: Sequence
    start: int
    token_ids: list[int]


class ReferenceTestee:
    """Serves a job's checkpoint with the core alone; or, where `replays`, only computes given sequences whole, in the
    checkpoint's profile or in another precision.
    """

    name = "reference"
    schedule_not_followed = None

    def __init__(
        self, job: Job, *, replays: bool = False, precision: str | None = None, layout: Layout = WHOLE
    ) -> None:
        self.replays = replays
        reader = CheckpointReader(Path(job.checkpoint))
        reader.validate()
        self.config = reader.config
        if job.device != "cpu":  # a default takes time in every call
            torch.set_default_device(job.device)
        profile = reader.profile() if precision is None else PRECISIONS[precision]
        self.ops = bind_ops(self.config, profile, torch.device(job.device), layout=layout)
        self.mtp: DeepseekV3MTP | None = None
        if precision is None:
            self.model = load_model(reader, self.ops, layout)
            if any(case.num_speculative_tokens for case in job.cases):
                self.mtp = load_mtp(reader, self.ops, layout)
        else:
            # Its FP8 weights as the numbers that they stand for.
            self.config = self.config.model_copy(update={"quantization_config": None})
            self.model = DeepseekV3(self.ops, self.config)
            load_weights(self.model, self.config, dequantize_weights(reader, lambda name: True), part="main")
        self.block_size = job.block_size
        self.layers = LayerRecorder(self.model.model, self.config.num_hidden_layers)
        if job.operations:
            OperationRecorder(self.model.model, self.ops, self.layers.current, capture=job.capture)

    def versions(self) -> dict[str, str]:
        """Nothing beyond what every testee reports."""
        return {}

    def served(self) -> Served:
        """The core's classes and kernels."""
        return Served(
            model_class=class_name(self.model),
            draft_class=class_name(self.mtp) if self.mtp is not None else None,
            profile=str(self.ops.setting.profile),
            kernels=program.kernels_of(self.ops),
        )

    def run(self, case: Case) -> program.Outcome:
        """Run the case's schedule, then each finished sequence in one pass."""
        if self.replays:
            finished = [request.prompt_token_ids + request.generated_token_ids for request in case.requests]
            outcome = program.Outcome(requests=[program.request_result(token_ids, ()) for token_ids in finished])
        else:
            outcome = Engine(self, case).run()
        specification = outcome.specification = RowRecorder()
        whole = functools.cache(self.whole_sequence)
        for index, (request, result) in enumerate(zip(case.requests, outcome.requests, strict=True)):
            specification.extend(whole(result.token_ids, len(request.prompt_token_ids)), index)
        return outcome

    def whole_sequence(self, token_ids: tuple[int, ...], prompt_len: int) -> RowRecorder:
        """The specification of the numbers: all positions at once, each layer's latent vectors as one page.

        The first `prompt_len` tokens are the prompt. The rows are those of a request 0. The last token is left out: it
        was generated and never fed.
        """
        recorder = self.layers.recorder = RowRecorder()
        inputs, successors = token_ids[:-1], token_ids[1:]
        keys = [RowKey(0, p, digest) for p, digest in enumerate(prefix_digests(token_ids))]
        positions = torch.arange(len(inputs))
        self.layers.keys = keys[:-1]
        batch = with_prompts(whole_sequence(len(inputs), positions.device), (prompt_len,))
        attend = WholeSequences(self.ops, self.config, batch)
        hidden = self.model(torch.tensor(inputs), positions, attend)
        self.layers.keys = None
        recorder.add("logits", keys[:-1], self.model.lm_head(hidden))
        if self.mtp is not None:
            drafted = self.mtp(torch.tensor(successors), positions, hidden, attend)
            recorder.add("mtp.0", keys[1:], self.mtp.lm_head(drafted))
        return recorder


class Engine:
    """One case: scheduler, cache and sampler."""

    def __init__(self, testee: ReferenceTestee, case: Case) -> None:
        config = testee.config
        self.testee = testee
        self.case = case
        self.outcome = program.Outcome()
        self.recorder = testee.layers.recorder = self.outcome.recorder
        tokens = sum(len(r.prompt_token_ids) + r.max_tokens + case.num_speculative_tokens for r in case.requests)
        num_blocks = tokens // testee.block_size + len(case.requests)
        num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
        self.cache = PagedCache(testee.ops, config, num_layers, num_blocks, testee.block_size)
        self.seen = TokenTracker()
        self.seen_by_draft = TokenTracker()

    def run(self) -> program.Outcome:
        """Run all rounds."""
        index = 0
        for requests in self.case.single_rounds:
            sequences = [self.admit(index + i, request) for i, request in enumerate(requests)]
            index += len(requests)
            while any(not sequence.finished for sequence in sequences):
                self.step([sequence for sequence in sequences if not sequence.finished])
            self.outcome.requests += [
                program.request_result(s.token_ids, s.answers, s.prompt_answers, num_cached_tokens=s.num_cached)
                for s in sequences
            ]
        return self.outcome

    def admit(self, index: int, request: Request) -> Sequence:
        """Start a request on the pages of its longest cached prefix.

        At least one token is computed, for its logits. With MTP the last page found is not used: the draft's entry
        for its last token depends on the token after it, which another request chose.
        """
        prompt = list(request.prompt_token_ids)
        blocks = [] if request.prompt_logprobs else self.cache.cached_blocks(prompt[:-1])
        if self.case.num_speculative_tokens:
            blocks = blocks[:-1]
        cached = len(blocks) * self.cache.block_size
        self.seen.start(index, prompt)
        self.seen_by_draft.start(index, prompt)
        return Sequence(index, request, prompt, blocks, cached, cached)

    def step(self, sequences: list[Sequence]) -> None:
        """One pass: schedule, run the model, sample and verify, draft."""
        pieces = self.schedule(sequences)
        keys = [self.observe(self.seen, piece, 0) for piece in pieces]
        flat_keys = [key for piece_keys in keys for key in piece_keys]

        batch = self.cache.batch = self.batch(pieces)
        self.testee.layers.keys = flat_keys
        hidden = self.testee.model(batch.input_ids, batch.positions, self.cache)
        self.testee.layers.keys = None

        wanted = [i for i, key in enumerate(flat_keys) if self.wants_logits(pieces, key)]
        logits = self.testee.model.lm_head(hidden[wanted])
        self.recorder.add("logits", pick(flat_keys, wanted), logits)
        logits_of = dict(zip(wanted, logits, strict=True))
        sequence_of = {piece.sequence.index: piece.sequence for piece in pieces}
        for row, of_row in logits_of.items():
            key = flat_keys[row]
            sequence_of[key.request].answer_prompt(key.position, of_row)

        kept: list[Piece] = []
        kept_rows: list[int] = []
        for piece, first_row in zip(pieces, batch.paged.read_query_start_loc(), strict=False):
            count = self.accept(piece, {row - first_row: of_row for row, of_row in logits_of.items()})
            kept.append(Piece(piece.sequence, piece.start, piece.token_ids[:count]))
            kept_rows += range(first_row, first_row + count)
            self.cache.remember(self.shared_prefix(piece.sequence), piece.sequence.blocks)
        if self.testee.mtp is not None and self.case.num_speculative_tokens:
            self.draft(kept, hidden[kept_rows])

    def shared_prefix(self, sequence: Sequence) -> list[int]:
        """The computed tokens of which other requests may use the pages."""
        in_two_forms = self.testee.ops.setting.profile.attention == "two_form"
        end = len(sequence.request.prompt_token_ids) if in_two_forms else sequence.num_computed
        return sequence.token_ids[: min(sequence.num_computed, end)]

    def schedule(self, sequences: list[Sequence]) -> list[Piece]:
        """Give each sequence its next tokens, oldest first, within the step's budget."""
        budget = self.case.max_num_batched_tokens or sum(len(s.token_ids) + len(s.drafts) for s in sequences)
        pieces = []
        for s in sequences:
            token_ids = (s.token_ids[s.num_computed :] + s.drafts)[:budget]
            if token_ids:
                pieces.append(Piece(s, s.num_computed, token_ids))
                budget -= len(token_ids)
        return pieces

    def batch(self, pieces: list[Piece]) -> Batch:
        """Flatten pieces, and give their sequences the pages that they need."""
        size = self.cache.block_size
        for sequence, start, token_ids in pieces:
            while len(sequence.blocks) * size < start + len(token_ids):
                sequence.blocks.append(self.cache.free.pop(0))
        width = max(len(piece.sequence.blocks) for piece in pieces)
        positions = [p for piece in pieces for p in range(piece.start, piece.start + len(piece.token_ids))]
        slots = [
            piece.sequence.blocks[p // size] * size + p % size
            for piece in pieces
            for p in range(piece.start, piece.start + len(piece.token_ids))
        ]
        queries = [len(piece.token_ids) for piece in pieces]
        paged = PagedBatch(
            block_table=torch.tensor([p.sequence.blocks + [0] * (width - len(p.sequence.blocks)) for p in pieces]),
            seq_lens=torch.tensor([piece.start + len(piece.token_ids) for piece in pieces]),
            query_start_loc=torch.tensor([0, *queries]).cumsum(0),
            num_tokens=len(positions),
            num_blocks=self.cache.pages.shape[1],
            block_size=size,
        )
        return Batch(
            input_ids=torch.tensor([token for piece in pieces for token in piece.token_ids]),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            paged=with_prompts(paged, (len(piece.sequence.request.prompt_token_ids) for piece in pieces)),
        )

    def observe(self, tracker: TokenTracker, piece: Piece, shift: int) -> list[RowKey]:
        """The keys of a piece's rows; `shift` is 1 for the draft, which sees the next token."""
        start = piece.start + shift
        positions = range(start, start + len(piece.token_ids))
        return tracker.observe(piece.sequence.index, positions, piece.token_ids)

    def wants_logits(self, pieces: list[Piece], key: RowKey) -> bool:
        """Rows that are sampled from: the last known token and the drafts; and the prompt's, if the case asks."""
        sequence = next(p.sequence for p in pieces if p.sequence.index == key.request)
        in_prompt = key.position < len(sequence.request.prompt_token_ids)
        asked = self.case.prompt_logits or sequence.request.prompt_logprobs
        return key.position >= len(sequence.token_ids) - 1 or (in_prompt and asked)

    def accept(self, piece: Piece, logits: dict[int, torch.Tensor]) -> int:
        """Append the tokens that a piece's rows yield: drafts as long as they are what the model chooses, then its
        own choice.

        Returns how many of the piece's tokens stay.
        """
        s = piece.sequence
        end = piece.start + len(piece.token_ids)
        if end < len(s.token_ids):
            s.num_computed = end
            return len(piece.token_ids)
        count = len(s.token_ids) - piece.start
        s.choose(logits[count - 1])
        drafts = piece.token_ids[count:]
        self.outcome.num_draft_tokens += len(drafts)
        for draft in drafts:
            if s.finished or draft != s.token_ids[-1]:
                break
            self.outcome.num_accepted_tokens += 1
            count += 1
            s.choose(logits[count - 1])
        s.drafts = []
        s.num_computed = piece.start + count
        return count

    def draft(self, kept: list[Piece], hidden: torch.Tensor) -> None:
        """Run MTP over the tokens that stayed, each with its successor, then over its own drafts."""
        mtp = self.testee.mtp
        assert mtp is not None
        successors = [
            Piece(s, start, s.token_ids[start + 1 : start + 1 + len(token_ids)]) for s, start, token_ids in kept
        ]
        for step in range(self.case.num_speculative_tokens):
            keys = [self.observe(self.seen_by_draft, piece, 1)[-1] for piece in successors]
            batch = self.cache.batch = self.batch(successors)
            hidden = mtp(batch.input_ids, batch.positions, hidden, self.cache)
            hidden = hidden[batch.paged.query_start_loc[1:] - 1]
            logits = mtp.lm_head(hidden)
            self.recorder.add(f"mtp.{step}", keys, logits)
            drafts = logits.argmax(1).tolist()
            for piece, token in zip(successors, drafts, strict=True):
                s = piece.sequence
                if s.num_computed == len(s.token_ids) - 1:
                    s.drafts.append(token)
            successors = [
                Piece(piece.sequence, piece.start + len(piece.token_ids), [token])
                for piece, token in zip(successors, drafts, strict=True)
            ]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--replays", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS)
    options, sys.argv[1:] = parser.parse_known_args()
    program.main(functools.partial(ReferenceTestee, **vars(options)))


if __name__ == "__main__":
    main()
