"""The `two_form` profile: attention of prompts' tokens by heads, of generated ones absorbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from bits import generator, normal, same_bits
from conftest import TinyCheckpoint

from dsv3_plugin.autograd.bind import differentiable
from dsv3_plugin.checkpoint.loader import load_model, load_mtp
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConfigError, EngineError, InputError, KernelError
from dsv3_plugin.layers import two_form
from dsv3_plugin.layers.attend import Attend, Compute, Select, WholeSequences, attending, select_all
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layers.rotary import RotaryTable
from dsv3_plugin.ops.head_attention import head_attention
from dsv3_plugin.ops.paged_batch import PagedBatch, whole_sequence
from dsv3_plugin.ops.prompt_batch import PromptBatch, no_requests, with_prompts
from dsv3_plugin.profile import ATTENTION_VARIABLE, BF16, SLICES_VARIABLE, Profile, profile_for
from dsv3_plugin.registry import Ops

CPU = torch.device("cpu")
CONFIG = DeepseekV3Config.from_dict(read_config("small"))
TWO_FORM = replace(BF16, attention="two_form")


# Schedules

PAGE, PAGES = 16, 64
PROMPTS, LENGTHS = (140, 30, 9), (146, 36, 20)
Step = dict[int, tuple[int, int]]
"""Of each request in a pass its first position and the one behind its last."""


@dataclass
class Pages:
    """An engine's `Attend` over shuffled pages, which are NaN until they are written."""

    ops: Ops
    config: DeepseekV3Config

    def __post_init__(self) -> None:
        shape = self.config.num_hidden_layers + 1, PAGES, PAGE, self.config.cached_dim
        self.pages = torch.full(shape, torch.nan, dtype=self.ops.setting.profile.dtype)
        self.free = torch.randperm(PAGES, generator=generator(3)).tolist()
        self.blocks: dict[int, list[int]] = {}
        self.batch: PromptBatch | None = None
        self.slots = torch.zeros(0, dtype=torch.int64)

    def begin(self, step: Step) -> torch.Tensor:
        """Take the requests of a pass; their positions."""
        for request, (first, last) in step.items():
            if first == 0:  # begun, or begun again after it was preempted
                self.blocks[request] = []
            while len(self.blocks[request]) * PAGE < last:
                self.blocks[request].append(self.free.pop())
        width = max(map(len, self.blocks.values()))
        table = torch.tensor([self.blocks[request] + [0] * (width - len(self.blocks[request])) for request in step])
        counts = torch.tensor([last - first for first, last in step.values()])
        positions = torch.cat([torch.arange(*span) for span in step.values()])
        requests = torch.arange(len(step)).repeat_interleave(counts)
        self.slots = table[requests, positions // PAGE] * PAGE + positions % PAGE
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        lengths = torch.tensor([last for _, last in step.values()])
        batch = PagedBatch(table, lengths, starts, len(positions), PAGES, PAGE)
        self.batch = with_prompts(batch, (PROMPTS[request] for request in step))
        return positions

    def has_prompts(self) -> bool:
        assert self.batch is not None
        return self.batch.has_prompts

    def over_pages(self, layer_idx: int, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        pages = self.pages[layer_idx]
        pages.view(-1, pages.shape[-1])[self.slots] = cached
        assert self.batch is not None
        return compute(pages, self.batch)

    def __call__(
        self, layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all
    ) -> torch.Tensor:
        return self.over_pages(layer_idx, cached, attending(self.ops, self.config, q, select))


class Served:
    """A tiny model and its draft in the profile `attention`, and what its requests' tokens are."""

    def __init__(self, checkpoint: TinyCheckpoint, dtype: str, attention: str = "two_form") -> None:
        reader = CheckpointReader(checkpoint(dtype))
        self.config = reader.config
        profile = replace(reader.profile(), attention=attention)  # type: ignore[arg-type]
        self.ops = bind_ops(reader.config, profile, CPU)
        self.model: DeepseekV3 = load_model(reader, self.ops)
        drawn = generator(8)
        self.draft = load_mtp(reader, self.ops)
        self.tokens = [torch.randint(self.config.vocab_size, (length + 1,), generator=drawn) for length in LENGTHS]

    def run(self, tokens: list[torch.Tensor], positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states of the model and of its draft, side by side, for each request's tokens but the last."""
        own, following = torch.cat([x[:-1] for x in tokens]), torch.cat([x[1:] for x in tokens])
        hidden = self.model(own, positions, attend)
        return torch.cat((hidden, self.draft(following, positions, hidden, attend)), 1)

    def whole(self) -> list[torch.Tensor]:
        """Of each request in one pass over the finished sequence."""
        found = []
        for tokens, length, prompt in zip(self.tokens, LENGTHS, PROMPTS, strict=True):
            batch = with_prompts(whole_sequence(length), (prompt,))
            found.append(self.run([tokens], torch.arange(length), WholeSequences(self.ops, self.config, batch)))
        return found

    def by_steps(self, steps: list[Step], attend: Attend | None = None) -> list[torch.Tensor]:
        """The same in passes. What the next one of a request computes again, in the same pages, was a wrong draft."""
        pages = Pages(self.ops, self.config)
        found: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
        for i, step in enumerate(steps):
            positions, tokens = pages.begin(step), []
            for request, (first, last) in step.items():
                following = next((later[request][0] for later in steps[i + 1 :] if request in later), 0)
                own = self.tokens[request].clone()
                if 0 < following < last:  # from the next token on: the draft's row at `following` reads that one
                    own[following + 1 :] = (own[following + 1 :] + 1) % self.config.vocab_size
                tokens.append(own[first : last + 1])
            out = self.run(tokens, positions, attend or pages)
            counts = [last - first for first, last in step.values()]
            for (request, (first, _)), rows in zip(step.items(), out.split(counts), strict=True):
                found[request][first:] = rows
        return [torch.stack(rows) for rows in found]


def chunks(request: int, *ends: int) -> list[Step]:
    return [{request: span} for span in zip((0, *ends), (*ends, LENGTHS[request]), strict=True)]


def decodes(request: int, first: int, last: int) -> list[Step]:
    return [{request: (position, position + 1)} for position in range(first, last)]


def together(*of_requests: list[Step]) -> list[Step]:
    """Step by step in one batch, the later ones first, as long as each has steps."""
    most = max(map(len, of_requests))
    return [
        {k: v for steps in reversed(of_requests) for k, v in (steps[i : i + 1] or [{}])[0].items()} for i in range(most)
    ]


SCHEDULES: dict[str, list[Step]] = {
    "prompts, then drafts verified": [s for i in range(3) for s in chunks(i, PROMPTS[i], PROMPTS[i] + 3)],
    "chunks, then a token at a time": [
        *chunks(0, 1, 64, 128, 129, 140)[:-1],
        *decodes(0, 140, 146),
        *chunks(1, 29, 30)[:-1],
        *decodes(1, 30, 36),
        *decodes(2, 0, 20),
    ],
    "drafts, of which some are wrong": together(
        [{0: (0, 139)}, {0: (139, 140)}, {0: (140, 144)}, {0: (141, 145)}, {0: (144, 146)}],
        [{1: (0, 30)}, {1: (30, 34)}, {1: (31, 35)}, {1: (35, 36)}],
        [{2: (0, 9)}, {2: (9, 12)}, {2: (10, 13)}, {2: (13, 20)}],
    ),
    "a batch of all": together(
        [*chunks(0, 100, 140)[:-1], *decodes(0, 140, 146)],
        [*chunks(1, 30, 31)[:-1], *decodes(1, 31, 36)],
        [*chunks(2, 9)[:-1], *decodes(2, 9, 20)],
    ),
    "preempted after some tokens, and computed again": [
        *chunks(0, 140, 141, 144)[:-1],
        {0: (0, 145)},
        *decodes(0, 145, 146),
        *chunks(1, 30)[:-1],
        *decodes(1, 30, 33),
        {1: (0, 20), 2: (0, 9)},
        {2: (9, 10), 1: (20, 34)},
        {1: (34, 36), 2: (10, 20)},
        {2: (0, 20)},
    ],
}


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp8"])
def served(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> tuple[Served, list[torch.Tensor]]:
    """A model, and the hidden states of whole sequences."""
    own = Served(tiny_checkpoint, request.param)
    return own, own.whole()


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(same_bits(*each) for each in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_changes_a_bit(name: str, served: tuple[Served, list[torch.Tensor]]) -> None:
    own, whole = served
    assert all(rows.isfinite().all() for rows in whole)
    assert equal(own.by_steps(SCHEDULES[name]), whole)


@pytest.mark.parametrize("served", ["bf16"], indirect=True)
def test_heads_that_take_turns_have_the_same_bits(
    served: tuple[Served, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, whole = served
    kernel, heads = own.ops[head_attention], []

    def counted(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        heads.append(q.shape[1])
        return kernel(q, *args, **kwargs)

    monkeypatch.setitem(own.ops.kernels, head_attention, counted)  # type: ignore[arg-type]
    of_a_head = PROMPTS[0] * 2 * own.config.v_head_dim * 2
    monkeypatch.setattr(two_form, "KEYS_AND_VALUES", 3 * of_a_head)
    assert equal(own.whole(), whole)
    # Three of the four heads of the longest prompt, then the other one.
    assert set(heads) == {3, 1, 4}


def by_schedule(batch: PromptBatch) -> tuple[int, ...]:
    """As engines tell prefill from decode: more than one query is a prompt."""
    counts = batch.query_start_loc.diff().tolist()
    return tuple(count if count > 1 else 0 for count in counts)


def by_phase(batch: PromptBatch) -> tuple[int, ...]:
    """What begins inside of a prompt is one as a whole."""
    counts = batch.query_start_loc.diff()
    begins = batch.seq_lens - counts < torch.tensor(batch.prompt_lens)
    return tuple((counts * begins).tolist())


@pytest.mark.parametrize("served", ["bf16"], indirect=True)
@pytest.mark.parametrize(
    ("rule", "caught"),
    [
        (by_schedule, set(SCHEDULES) - {"a batch of all"}),
        (by_phase, {"preempted after some tokens, and computed again"}),
    ],
)
def test_rows_told_apart_by_their_schedule_are_caught(
    rule: object, caught: set[str], served: tuple[Served, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twins. One is right where all chunks have several tokens, the other where none reaches behind its prompt."""
    own, whole = served
    monkeypatch.setattr(PromptBatch, "prompt_counts", property(rule))  # type: ignore[arg-type]
    assert {name for name, steps in SCHEDULES.items() if not equal(own.by_steps(steps), whole)} == caught


def test_generated_tokens_alone_have_the_absorbed_bits(tiny_checkpoint: TinyCheckpoint) -> None:
    """Without a prompt the profile is the other one; with a prompt its numbers are near."""
    two_form, absorbed = (Served(tiny_checkpoint, "fp32", attention) for attention in ("two_form", "absorbed"))
    expected = absorbed.whole()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptBatch, "prompt_counts", property(lambda batch: (0,) * batch.num_reqs))
        assert equal(two_form.whole(), expected)
    found = two_form.whole()
    for rows, near in zip(found, expected, strict=True):
        far = float((rows.float() - near.float()).norm() / near.float().norm())
        print(f"{far:.1e} from the absorbed form")
        assert 0 < far < 1e-4


# Training


class WithPages:
    """An `Attend` of which a layer knows only that it has pages: no gradient by heads."""

    def __init__(self, attend: WholeSequences) -> None:
        self.over_pages, self.has_prompts = attend.over_pages, attend.has_prompts


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-5), ("bf16", 2**-6)])
def test_gradients_are_those_of_the_absorbed_form(
    dtype: str, bound: float, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CheckpointReader(tiny_checkpoint(dtype))
    config = reader.config
    tokens, prompt = 150, 135
    positions = torch.arange(tokens)

    def run(attention: str, form: Callable[[WholeSequences], Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the layer computes, and its gradients, those of the input last."""
        profile = replace(reader.profile(), attention=attention)  # type: ignore[arg-type]
        ops = differentiable(bind_ops(config, profile, CPU))
        mla = MLA(ops, config, 0)
        for seed, parameter in enumerate(mla.parameters()):
            drawn = normal(*parameter.shape, seed=seed) * parameter.shape[-1] ** -0.5
            parameter.data.copy_(drawn if parameter.dim() > 1 else 1 + drawn)
            parameter.requires_grad_()
        x = normal(tokens, config.hidden_size, seed=90).to(profile.dtype).requires_grad_()
        batch = with_prompts(whole_sequence(tokens), (prompt,))
        out = mla(x, *RotaryTable(config)(positions), form(WholeSequences(ops, config, batch)))
        grad = normal(*out.shape, seed=91).to(out.dtype)
        return out.detach(), list(torch.autograd.grad(out, (*mla.parameters(), x), grad))

    _, expected = run("absorbed", partial)
    out, by_heads = run("two_form", lambda attend: attend)
    other_out, each_by_its_own = run("two_form", WithPages)
    assert same_bits(out, other_out)
    for found in by_heads, each_by_its_own:
        far = distance(found, expected)
        print(f"{dtype}: {far:.1e} from the absorbed form")
        assert far < bound
    # The twin: nothing goes back through the rows of prompts.
    honest = head_attention._gradient
    assert honest is not None
    monkeypatch.setattr(head_attention, "_gradient", lambda *args, **kwargs: honest(*args, **kwargs).detach())
    assert distance(run("two_form", WithPages)[1], expected) > 10 * bound


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True))


# Which rows are of prompts


def three_requests(**changes: Any) -> PromptBatch:
    """At positions 7 to 11, 7, and 0 to 2; prompts of 10, 8 and 1; in pages of 4."""
    batch = PagedBatch(
        torch.tensor([[5, 3, 1], [0, 2, 9], [4, 9, 9]]),
        torch.tensor([12, 8, 3]),
        torch.tensor([0, 5, 6, 9]),
        **{"num_tokens": 9, "num_blocks": 6, "block_size": 4},
    )
    return with_prompts(batch, **{"prompt_lens": (10, 8, 1)} | changes)


def test_a_row_is_a_prompts_by_its_position() -> None:
    batch = three_requests()
    assert batch.prompt_counts == (3, 1, 1)
    prompts, generated = batch.prompts, batch.generated
    assert prompts is not None and generated is not None
    assert prompts.rows.tolist() == [0, 1, 2, 5, 6] and generated.rows.tolist() == [3, 4, 7, 8]
    assert (prompts.query_starts.tolist(), prompts.key_starts.tolist()) == ([0, 3, 4, 5], [0, 10, 18, 19])
    pages = [*range(20, 24), *range(12, 16), 4, 5], [*range(4), *range(8, 12)], [16]
    assert prompts.keys.tolist() == [key for of_request in pages for key in of_request]
    assert generated.batch.query_start_loc.tolist() == [0, 2, 2, 4]
    assert generated.batch.read_seq_lens() == (12, 8, 3)
    assert batch.has_prompts and not three_requests(prompt_lens=(7, 7, 0)).has_prompts
    assert three_requests(prompt_lens=(7, 7, 0)).prompts is None
    assert three_requests(prompt_lens=(99, 99, 99)).generated is None
    # Beyond its prompt a request's first position is not needed exactly: an engine may not know it yet.
    guessed = three_requests(prompt_lens=(10, 7, 1), first_positions=(7, 9, 0))
    assert guessed.prompt_counts == (3, 0, 1) and guessed.prompts is not None
    assert guessed.prompts.key_starts.tolist() == [0, 10, 11]


def test_nothing_is_read_of_a_device_whose_numbers_the_engine_has() -> None:
    """Reading a tensor on "meta" raises, as the twin shows."""
    own = three_requests()
    on_device = [x.to("meta") for x in own.tensors]
    batch = PagedBatch(*on_device, *own.sizes, host_query_start_loc=own.host_query_start_loc)
    found = with_prompts(batch, own.prompt_lens, own.first_positions)
    assert own.prompts is not None and own.generated is not None
    assert found.prompts is not None and found.prompts.keys.shape == own.prompts.keys.shape
    assert found.generated is not None and found.generated.batch.read_query_start_loc() == (0, 2, 2, 4)
    with pytest.raises(RuntimeError, match="meta"):
        with_prompts(batch, own.prompt_lens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_lens": (1, 2)}, r"prompt_lens has 2 numbers, there are 3 requests"),
        ({"prompt_lens": (1, -2, 3)}, r"prompt_lens \(1, -2, 3\) has a negative number"),
        ({"first_positions": (7, 7)}, r"first_positions has 2 numbers, there are 3 requests"),
        ({"first_positions": (7, 6, 0)}, r"request 1 begins at position 7, first_positions has 6"),
    ],
)
def test_wrong_prompts_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^PromptBatch: {message}"):
        three_requests(**changes)


def test_a_pass_that_is_nobody_s_has_no_rows() -> None:
    batch = no_requests(CPU)
    assert (batch.num_reqs, batch.num_tokens, batch.has_prompts) == (0, 0, False)
    assert batch.prompts is None and batch.generated is None


# What is refused


@pytest.mark.parametrize("served", ["bf16"], indirect=True)
def test_an_engine_that_knows_no_prompts_is_refused(served: tuple[Served, list[torch.Tensor]]) -> None:
    own, _ = served
    pages = Pages(own.ops, own.config)

    def attend(layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all) -> torch.Tensor:
        return pages(layer_idx, q, cached, select)

    with pytest.raises(EngineError, match=r"^the two_form profile is not yet served here: unset DSV3_ATTENTION$"):
        own.by_steps(chunks(2, 9), attend)
    with pytest.raises(
        InputError, match=r"^PagedBatch\(1 requests, 20 tokens.*: the two_form profile needs the lengths"
    ):
        own.model(own.tokens[2][:20], torch.arange(20), WholeSequences(own.ops, own.config))


# The setting


def test_the_profile_says_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile_for(CONFIG) is BF16 and BF16.attention == "absorbed"
    monkeypatch.setenv(ATTENTION_VARIABLE, "absorbed")
    assert profile_for(CONFIG) is BF16
    monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")
    assert profile_for(CONFIG) == TWO_FORM != BF16
    assert str(TWO_FORM) == "bf16 two_form"
    monkeypatch.setenv(SLICES_VARIABLE, "2")
    assert str(profile_for(CONFIG)) == "bf16 two_form in 2 reduction slices"


@pytest.mark.parametrize("text", ["", "heads", "TWO_FORM"])
def test_another_word_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTENTION_VARIABLE, text)
    with pytest.raises(ConfigError, match=f"^DSV3_ATTENTION={text!r}; use absorbed or two_form$"):
        profile_for(CONFIG)


def bound(profile: Profile) -> Ops:
    return bind_ops(CONFIG, profile, CPU)


def test_provenance_names_the_profile_and_its_operation() -> None:
    record = bound(TWO_FORM).record()
    assert record["profile"] == "bf16 two_form"
    assert "head_attention" in [choice["operation"] for choice in record["operations"]]
    assert "profile bf16 two_form, strict mode" in bound(TWO_FORM).announcement("x")
    # The twin: other profiles have no kernel of it.
    assert "head_attention" not in [choice["operation"] for choice in bound(BF16).record()["operations"]]
    with pytest.raises(KernelError, match="head_attention was called in the bf16 profile, which does not use it"):
        bound(BF16)[head_attention](scale=1.0)  # type: ignore[call-arg]
