"""`dsv3 bench engines` without an engine: forced tokens, limits, flags, passes, and a run that dies."""

from __future__ import annotations

import math
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from boards import DECODE, DRAFTS, MODEL, NAME, OURS, PREFILL, STOCK, VOCAB, board, record, row
from engines import predict_logits
from safetensors.torch import load_file, save_file

from dsv3_plugin.conformance.layouts import ONE_RANK, ParallelLayout, RankOf
from dsv3_plugin.conformance.runner import TesteeCommand as OneTestee
from dsv3_plugin.contenders import command, read_job
from dsv3_plugin.engine_bench import judge, limits, plan, plot, report, runner
from dsv3_plugin.engine_bench.contenders import program, reference
from dsv3_plugin.engine_bench.contenders.ranks import Ranks, Visited, devices
from dsv3_plugin.engine_bench.contenders.watch import Routers, Watch, kept_rows
from dsv3_plugin.engine_bench.judge import Board
from dsv3_plugin.engine_bench.protocol import Job, Measurement, Row, Start, heard, logits_file
from dsv3_plugin.engine_bench.tokens import Circle, Place
from dsv3_plugin.errors import ConformanceError, EngineError
from dsv3_plugin.profile import BF16, SLICES_VARIABLE

# Tokens.


def test_each_token_says_whose_it_is_and_what_follows():
    circle = Circle(VOCAB, 3)
    assert sorted(circle.tokens.tolist()) == list(range(VOCAB))
    prompts, printed = circle.prompts(5, 40), dict.fromkeys(range(5), 60)
    for request, prompt in enumerate(prompts):
        token = prompt[-1]
        assert len(prompt) == 40 and circle.place(token, 5, printed) == Place(request, 0)
        for generated, follows in enumerate(circle.continuation(request, 5, 60), 1):
            token = int(circle.successor[token])
            read = Place(request, generated) if generated < 60 else None
            assert token == follows and circle.place(token, 5, printed) == read
    ends = {prompt[-1] for prompt in prompts}
    assert len(ends) == 5 and not any(ends & set(prompt[:-1]) for prompt in prompts)
    assert circle.prompts(5, 40) == Circle(VOCAB, 3).prompts(5, 40) != Circle(VOCAB, 4).prompts(5, 40)


def test_of_several_requests_that_print_a_token_the_last_one_is_told():
    """Those that begin first print more tokens than lie between two requests, the last ones beyond the circle's end."""
    circle, requests = Circle(VOCAB, 1), 64  # 16 tokens apart
    printed = {request: 50 - request // 2 for request in range(requests)}
    for request, count in printed.items():
        for generated in range(count - 10, count):
            token = int(circle.tokens[(request * 16 + generated) % VOCAB])
            assert circle.place(token, requests, printed) == Place(request, generated)
    assert circle.place(int(circle.tokens[16]), requests, {3: 9, 5: 4}) is None, "another rank's"


def test_drafts_are_right_as_often_as_asked():
    circle = Circle(VOCAB, 0)
    drafts = circle.drafts(2, 0.85)
    second = circle.successor[circle.successor]
    for column, right in zip(drafts.T, (circle.successor, second), strict=True):
        assert 0.8 < (column == right).float().mean() < 0.9
    assert torch.equal(circle.drafts(1, 1.0)[:, 0], circle.successor)
    assert not (circle.drafts(1, 0.0)[:, 0] == circle.successor).any()


def test_a_greedy_sampler_takes_the_forced_token():
    circle = Circle(VOCAB, 0)
    watch = Watch(circle, torch.device("cpu"))
    tokens = torch.tensor([5, 900, 17])
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    watch.keeping = True
    untouched = logits.clone()
    watch.force(logits, tokens)
    assert torch.equal(logits.argmax(1), circle.successor[tokens])
    watch.forced = False
    free = untouched.clone()
    watch.force(free, tokens)
    assert torch.equal(free, untouched)
    first, _ = watch.take()
    assert torch.equal(first.logits, untouched) and first.finite and not watch.take()


def test_kept_rows_saw_no_draft():
    device = torch.device("cpu")
    assert kept_rows(40, 1, device).tolist() == [0, 13, 26, 39]
    assert kept_rows(40, 4, device).tolist() == [0, 12, 24, 36]
    assert kept_rows(3, 1, device).tolist() == [0, 1, 2]


def test_logits_that_are_not_finite_are_seen():
    watch = Watch(Circle(VOCAB, 0), torch.device("cpu"), keeping=True)
    logits = torch.zeros(40, VOCAB)
    logits[7, 3] = torch.nan  # in a row that is not kept
    watch.force(logits, torch.arange(40))
    assert not watch.take()[0].finite


def test_experts_are_counted_of_the_latest_pass():
    class Layer:
        def choose(self, ids: list[list[int]]) -> torch.Tensor:
            return torch.tensor(ids)

    routers, layer = Routers(), Layer()
    routers.watch(Layer, "choose", lambda ids: ids)
    layer.choose([[0, 1], [2, 1], [7, 6]])
    assert routers.visited(id(layer), [2], 0, 8) == {0, 1, 2}, "padding counts not"
    layer.choose([[3, 8], [3, 8]])
    assert routers.visited(id(layer), [2], 0, 8) == {3}, "a fused shared expert counts not"
    assert routers.visited_by_each([id(layer)], [2], 0, 8) == ({3},)
    assert routers.visited_by_each([id(layer), 1], [2], 0, 8) is None
    routers.begin_pass()
    assert routers.visited(id(layer), [2], 0, 8) is None
    for_decodes, for_prompts = torch.tensor([[0, 1], [2, 3], [4, 4], [5, 5]]), torch.zeros(4, 2)
    routers.captured[id(layer)] = {4: [for_decodes], 8: [torch.zeros(8, 2)]}
    assert routers.visited(id(layer), [3], 0, 8) == {0, 1, 2, 3, 4}, "of the smallest graph that fits"
    routers.captured[id(layer)][4].append(for_prompts)
    assert routers.visited(id(layer), [3], 0, 8) == {0}, "of the one that was written"
    assert routers.visited(id(layer), [3], 0, 8) is None
    for_decodes[:] = 7
    assert routers.visited(id(layer), [3], 0, 8) == {7}
    for_decodes[:] = 6
    routers.copy(4)
    for_decodes[:] = 5
    assert routers.visited(id(layer), [3], 0, 8) == {6}, "a draft's graph wrote there since"
    routers.begin_pass()
    assert routers.visited(id(layer), [3], 0, 8) == {5}


def test_experts_of_replicas_are_counted_of_their_own_rows():
    """Of a router that sees all replicas' tokens, or this one's alone."""
    ids = torch.tensor([[0], [1], [6], [2], [3], [7]])
    gathered, own = Routers(2), Routers(2)
    gathered.gathered = True
    for routers in (gathered, own):
        routers.captured = {1: {2: [torch.full((2, 1), 5)], 4: [torch.full((4, 1), 5)], 6: [ids]}}
    assert gathered.visited(1, [2, 3], 0, 8) == {0, 1, 2, 3, 7}, "each behind the other's padding"
    assert gathered.visited(1, [3, 3], 0, 8) == {0, 1, 2, 3, 6, 7}
    assert own.visited(1, [2, 5], 0, 8) == {0, 1}, "padded to the other's number"
    gathered.last = {1: ids}
    assert gathered.visited(1, [5, 1], 1, 8) == {0, 1, 2, 3, 6, 7}, "without padding"


# Limits.


def test_bytes_of_a_step():
    read = 1e9 + 14 * 1e8
    assert limits.step_bytes(MODEL, row(DECODE)) == read + 4 * 100 * 1000 * 3
    assert limits.step_bytes(MODEL, row(DRAFTS)) == read + 3e8 + 4 * 100 * 1000 * 4
    assert limits.step_bytes(MODEL, row(DECODE, experts=None)) is None
    replicas = ParallelLayout(dp=8, ep=8)
    assert limits.step_bytes(MODEL, row(DRAFTS), replicas) == read + 3e8 + 3 * 4e8 + 4 * 100 * 1000 * 4, "of 4 requests"


def test_least_time_of_a_card():
    card = limits.card_of("NVIDIA H200 1a2b")
    assert card is not None and limits.card_of("cpu") is None
    least = limits.least_seconds(MODEL, row(DECODE), card)
    assert least == pytest.approx((2.4012e9 - (50 << 20)) / 4.8e12)
    products, attention = limits.prefill_operations(MODEL, PREFILL)
    assert (products, attention) == (128 * 1e10, 2 * 64 * 65 / 2 * 1e6)
    alone = products / 1979e12 + attention / 989.5e12
    assert limits.least_seconds(MODEL, row(PREFILL), card) == alone
    tensor = ParallelLayout(tp=2)
    assert limits.least_seconds(MODEL, row(DECODE), card, tensor) == pytest.approx((1.2006e9 - (50 << 20)) / 4.8e12)
    assert limits.least_seconds(MODEL, row(PREFILL), card, tensor) == alone / 2


def test_sizes_of_a_checkpoint(mini: dict[str, Path]):
    model = limits.read_model(mini["bf16"])
    headers = limits.CheckpointReader(mini["bf16"]).headers()
    size = {name: math.prod(header.shape) for name, header in headers.items()}
    main = {name: n for name, n in size.items() if f"layers.{model.layers}." not in name and "embed" not in name}
    experts = sum(n for name, n in main.items() if ".experts." in name and "shared" not in name)
    in_fp32 = sum(n for name, n in main.items() if name.endswith("e_score_correction_bias"))
    assert model.step_bytes == 2 * (sum(main.values()) - experts) + 2 * in_fp32
    assert model.attention_bytes == 2 * sum(n for name, n in main.items() if ".self_attn." in name)
    assert model.expert_bytes * model.experts * model.expert_layers == 2 * experts


# Flags: a sound board has none, and each way to be wrong is caught.


def test_a_sound_row_has_a_ratio_and_no_flag():
    sound = board(STOCK, OURS)
    assert judge.errors(sound) == {}
    assert judge.against(sound, OURS, DECODE, "stock") == judge.Against(pytest.approx(1.25), "vllm-stock")
    assert judge.against(sound, OURS, DECODE, "invariant") is None
    assert judge.against(sound, OURS, PREFILL, "stock") is None


@pytest.mark.parametrize(
    ("wrong", "known", "flag"),
    [
        ({"finite": False}, {}, "not finite"),
        ({"as_forced": False}, {}, "not the forced ones"),
        ({"step_ms": (0.4, 0.4, 0.4)}, {}, "beats the card: 0.4 ms"),
        ({"experts": (1.0, 1.0)}, {}, "visits 1 experts a layer, others 7"),
        ({}, {"distances": {NAME: 0.5}}, "0.5 from the reference, without compilers and graphs 0.09"),
        ({}, {"distances": {NAME: float("nan")}}, "nan from the reference"),
        ({}, {"distances": {NAME: 1.4}, "eager_distances": {}}, "1.4 from the reference"),
        ({}, {"distances": {NAME: 1.4}, "eager_distances": {NAME: 1.4}}, "1.4 from the reference"),
        ({}, {"start": STOCK.start.model_copy(update={"device": "H200 2"})}, "on another device"),  # type: ignore[union-attr]
    ],
)
def test_a_row_that_means_nothing_is_flagged_and_makes_no_ratio(wrong, known, flag):
    measured = STOCK.rows[0].model_copy(update=wrong)
    opponent = STOCK.model_copy(update={"rows": (measured,), **known})
    flagged = board(opponent, OURS, device="H200 1")
    assert [flag in text for text in judge.errors(flagged)["vllm-stock"]] == [True]
    assert judge.against(flagged, OURS, DECODE, "stock") is None
    page = report.markdown(flagged)
    assert flag in page and "**error**" in page and "1.25" not in page
    assert plot.lines(flagged) == []


def test_several_cards_may_take_less_time():
    fast = STOCK.model_copy(update={"rows": (row(DECODE, step_ms=(0.25, 0.25, 0.25)),)})
    assert judge.errors(board(fast, layout="tp=2")) == {}
    assert "beats the 2 cards: 0.25 ms" in judge.errors(board(fast, layout="dp=2,ep=2"))["vllm-stock"][0], (
        "each reads the weights of its own attention"
    )
    page = report.markdown(board(fast, OURS, layout="tp=2"))
    assert "layout tp=2 of 2 ranks" in page and "| 0.16 |" in page


def test_ours_is_to_be_the_reference():
    far = OURS.model_copy(update={"distances": {NAME: 0.05}})
    assert "0.05 from the reference" in judge.errors(board(STOCK, far))["vllm-strict"][0]


def test_the_fastest_stock_that_means_something_is_compared_with():
    wrong = record("vllm-stock", "stock", row(DECODE, step_ms=(1.0, 1.0, 1.0), finite=False))
    slow = record("vllm-stock-triton", "stock", row(DECODE, step_ms=(4.0, 4.0, 4.0)))
    other = record("sglang-stock", "stock", row(DECODE, step_ms=(1.2, 1.2, 1.2)))
    assert judge.against(board(wrong, slow, other, OURS), OURS, DECODE, "stock") == judge.Against(
        pytest.approx(2.5), "vllm-stock-triton"
    )


def test_what_drafts_bring():
    drafted = row(DRAFTS, step_ms=(2.0, 2.0, 2.0), tokens_per_step=1.5, experts=(8.0, 8.0))
    ours = record("vllm-strict", "strict", row(DECODE, step_ms=(1.6, 1.6, 1.6)), drafted)
    assert judge.speed_up(board(ours), ours, drafted) == pytest.approx(1.6 / (2.0 / 1.5))
    # Two experts more and a draft's weights, less what a cache may hold.
    reads, cache = (1.4e9 + 1e9 + 1.2e6, 1.6e9 + 1.3e9 + 1.6e6), 50 << 20
    allowed = 1.5 * (reads[0] - cache) / (reads[1] - cache)
    assert judge.speed_up_by_bytes(board(ours), ours, drafted) == pytest.approx(allowed)
    assert f"| 1.20 | {allowed:.2f} |" in report.markdown(board(ours))
    alone = record("vllm-strict", "strict", drafted)
    assert judge.speed_up(board(alone), alone, drafted) is judge.speed_up_by_bytes(board(alone), alone, drafted) is None


def test_the_page_says_what_is_missing_and_who_waited():
    stalled = record("vllm-strict", "strict", row(DECODE, pass_seconds=(9.0, 1.0)), failure="it was killed")
    absent = record("vllm-stock", "stock", Row(measurement=DECODE, absent="needs room for 9 tokens"))
    page = report.markdown(
        board(stalled, absent, impossible={str(PREFILL): "too long"}, reference_failure="no certificate")
    )
    assert "* reference: nothing is known of distances: no certificate" in page
    assert f"vllm-strict: {DECODE}: 9.00 s, then 1.00 s" in page
    assert f"* {PREFILL}: too long" in page
    assert f"* vllm-stock: {DECODE}: needs room for 9 tokens" in page
    assert f"* vllm-strict: {DRAFTS}: it was killed" in page
    assert "rehearsal" not in page
    assert "rehearsal" in report.markdown(board(device="cpu")).lower()


# Passes.


class Fake:
    """An engine of two requests a pass of prompts, that decodes beside them."""

    max_batched_tokens = 128

    def __init__(self, *, wrong: bool = False, ends_early: bool = False, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.watch = Watch(Circle(VOCAB, 0), torch.device("cpu"))
        self.start = Start(device="cpu", versions={}, served="Fake", import_seconds=0, up_seconds=0, cache_tokens=5000)
        self.wrong, self.ends_early = wrong, ends_early
        self.ended = self.passes = 0

    def run(
        self, prompts: Sequence[list[int]], max_tokens: int, chunk: int, turn: Callable[[program.New], bool]
    ) -> None:
        last = {request: prompt[-1] for request, prompt in enumerate(prompts)}
        begun = 0
        printed = dict.fromkeys(last, 0)
        for step in range(10_000):
            self.passes += 1
            begun = min(len(prompts), begun + max(1, chunk // len(prompts[0]) if prompts else 1))
            running = [r for r in range(begun) if printed[r] < (2 if self.ends_early else max_tokens)]
            if not running:
                if self.ranks.replicas == 1 or not turn({}):
                    return
                continue
            tokens = torch.tensor([last[request] for request in running])
            logits = torch.randn(len(running), VOCAB)
            self.watch.force(logits, tokens)
            new = logits.argmax(1)
            if self.wrong and step == 3:
                new = (new + 1) % VOCAB
            for request, token in zip(running, new.tolist(), strict=True):
                last[request] = token
                printed[request] += 1
            if not turn({request: [last[request]] for request in running}):
                self.ended += 1
                return

    def experts(self, rows: Sequence[int]) -> Visited:
        return frozenset(range(3)), frozenset(range(5))


def job(*measurements: Measurement, steps: int = 6) -> Job:
    return Job(checkpoint="", device="cpu", measurements=measurements, steps=steps, passes=2, seed=0)


def test_a_decode_is_timed_once_all_requests_print(tmp_path):
    engine = Fake()
    measured = program.measure(engine, DECODE, job(DECODE), tmp_path / "0.safetensors")
    assert measured.absent is None and measured.as_forced and measured.finite
    assert engine.ended == len(measured.pass_seconds) == 2
    assert measured.tokens_per_step == 1 and measured.experts == (3, 5)
    # The timed steps begin with 1 + 4 + 1 tokens printed, of the two requests that began a pass earlier one more.
    assert measured.cached_tokens == 64 + 6.5 + 6 / 2
    kept = load_file(tmp_path / "0.safetensors")
    assert set(kept["request"].tolist()) == {0, 1, 2, 3} and kept["position"].min() >= 64


def test_a_prefill_ends_with_the_last_first_token(tmp_path):
    measured = program.measure(Fake(), PREFILL, job(PREFILL), tmp_path / "0.safetensors")
    mean, last = measured.first_token_seconds
    assert 0 < mean <= last and not measured.step_ms and measured.as_forced
    kept = load_file(tmp_path / "0.safetensors")
    assert kept["position"].tolist() == [63, 63] and kept["request"].tolist() == [0, 1]


def test_other_tokens_than_the_forced_ones_are_seen(tmp_path):
    assert program.measure(Fake(wrong=True), DECODE, job(DECODE), tmp_path / "0.safetensors").as_forced is False


def test_what_was_not_measured_says_why(tmp_path):
    early = program.measure(Fake(ends_early=True), DECODE, job(DECODE), tmp_path / "0.safetensors")
    assert early.absent == "the first requests were done before the last ones had begun"
    many = Measurement(kind="decode", requests=32, tokens=1024)
    assert "the cache has 5,000" in str(program.measure(Fake(), many, job(many), tmp_path / "1.safetensors").absent)


# Ranks.


class Table:
    """Where threads that are ranks say something and hear the others."""

    def __init__(self, ranks: int) -> None:
        self.said: list[object] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=20)


class Seated(Ranks):
    """A rank that is a thread."""

    def __init__(self, place: RankOf, table: Table) -> None:
        super().__init__(place)
        self.table = table

    def told(self, value: Any) -> list[Any]:
        self.table.said[self.place.rank] = value
        self.table.barrier.wait()
        said = list(self.table.said)
        self.table.barrier.wait()
        return said

    def all(self, flag: bool) -> bool:
        return all(self.told(flag))


def measured_by(layout: ParallelLayout, measurement: Measurement, folder: Path, **fault: bool) -> list[tuple[Row, int]]:
    """What the ranks of a fake engine return, the last of which may have a fault, and how many passes each made."""
    table = Table(layout.ranks)

    def measure(rank: int) -> tuple[Row, int]:
        wrong = fault if rank == layout.ranks - 1 else {}
        engine = Fake(ranks=Seated(RankOf(layout, rank, ()), table), **wrong)
        row = program.measure(engine, measurement, job(measurement), folder / "0.safetensors")
        return row, engine.passes

    with ThreadPoolExecutor(layout.ranks) as threads:
        return list(threads.map(measure, range(layout.ranks)))


DATA, TENSOR = ParallelLayout(dp=2, ep=2), ParallelLayout(tp=2)


@pytest.mark.parametrize("requests", [1, 4, 5])
@pytest.mark.parametrize("layout", [DATA, TENSOR, ParallelLayout(tp=2, dp=2, ep=4)], ids=str)
def test_ranks_measure_together(layout: ParallelLayout, requests: int, tmp_path: Path):
    decode = Measurement(kind="decode", requests=requests, tokens=64)
    (first, passes), *others = measured_by(layout, decode, tmp_path)
    assert first.absent is None and first.as_forced and first.finite and first.tokens_per_step == 1
    assert len(first.step_ms) == 3 and first.experts == (3, 5)
    # All have waited for the one that began last, and a rank without requests has gone along.
    assert {count for _, count in others} == {passes}
    assert len({row.model_copy(update={"finite": None}) for row, _ in [(first, passes), *others]}) == 1
    kept = set(load_file(tmp_path / "0.safetensors")["request"].tolist())
    assert {0, requests - 1} <= kept <= set(range(requests)), "of all replicas"
    prefill = measured_by(layout, Measurement(kind="prefill", requests=requests, tokens=64), tmp_path)
    assert all(row.absent is None and len(row.pass_seconds) == 2 for row, _ in prefill)


@pytest.mark.parametrize("layout", [DATA, TENSOR], ids=str)
def test_what_is_wrong_with_one_rank_is_wrong_with_all(layout: ParallelLayout, tmp_path: Path):
    assert [row.as_forced for row, _ in measured_by(layout, DECODE, tmp_path, wrong=True)] == [False, False]


def test_the_slowest_rank_counts():
    def of_rank(requests: int, ms: float, printed: tuple[int, int]) -> program.Pass:
        first = tuple(ms / 1e3 for _ in range(requests))
        return program.Pass(requests, ms / 100, first, (ms,) * 6, printed, ((frozenset({1}),),), True, None)

    # Of the passes the first is better, though one of its ranks is slower than in the second.
    made = [[of_rank(3, 2, (30, 48)), of_rank(1, 5, (10, 16))], [of_rank(3, 6, (30, 48)), of_rank(1, 4, (10, 16))]]
    of_all = program._row(DECODE, made, None)
    assert of_all.step_ms == (5, 5, 5) and of_all.pass_seconds == (0.05, 0.06)
    assert of_all.tokens_per_step == 1 and of_all.cached_tokens == 64 + 13
    assert of_all.first_token_seconds == pytest.approx(((3 * 2 + 5) / 4e3, 5e-3)) and of_all.experts == (1,)


def test_experts_of_ranks_are_united():
    ranks = Ranks()
    ranks.told = lambda visited: [visited, (), (frozenset({2}), frozenset({3}))]  # type: ignore[assignment, return-value]
    assert ranks.united((frozenset({1, 2}), frozenset())) == ({1, 2}, {3})
    assert ranks.united(None) is None


def test_devices_of_ranks():
    assert devices(["cpu", "cpu"]) == "cpu"
    assert devices(["NVIDIA H200 1a", "NVIDIA H200 2b"]) == "2 x NVIDIA H200 1a, 2b"
    assert devices(["NVIDIA H200 1a", "NVIDIA H100 2b"]) == "NVIDIA H200 1a, NVIDIA H100 2b"


# The reference.


def test_the_reference_answers_at_any_position(mini: dict[str, Path], tmp_path):
    circle = Circle(limits.read_model(mini["bf16"]).vocab_size, 0)
    asked = tmp_path / "asked.safetensors"
    places = [(1, 15), (0, 18), (1, 17)]
    save_file(
        {"request": torch.tensor([r for r, _ in places]), "position": torch.tensor([p for _, p in places])}, asked
    )
    measurement = Measurement(kind="decode", requests=2, tokens=16)
    answers = reference.Asked(measurement=measurement, file=str(asked))
    of = reference.ReferenceJob(checkpoint=str(mini["bf16"]), device="cpu", seed=0, asked=(answers,))
    with torch.inference_mode():
        reference.answer(of, tmp_path / "reference.safetensors")
    found = load_file(tmp_path / "reference.safetensors")["0"]
    for (request, position), logits in zip(places, found, strict=True):
        tokens = circle.prompts(2, 16)[request] + circle.continuation(request, 2, 8)
        assert torch.equal(predict_logits(mini["bf16"], tokens[: position + 1])[-1], logits)


def test_distance_of_logits():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    other = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    assert reference.distance(logits, logits) == 0
    assert reference.distance(logits + 0.01 * other, logits) == pytest.approx(0.01, rel=0.1)
    assert reference.distance(other, logits) == pytest.approx(2**0.5, rel=0.1)
    logits[1, 5] = torch.nan
    assert reference.distance(logits, other) != reference.distance(logits, other), "NaN"


# The choice.


def test_settings_go_to_the_contenders_that_they_name():
    chosen = plan.contenders(
        ["vllm-stock", "sglang-stock"], ["vllm:VLLM_X=1", "sglang-stock:attention_backend=triton", "vllm:a=[1, 2]"]
    )
    vllm, sglang = chosen
    assert vllm.variables == {"DSV3_PLUGIN": "off", "VLLM_X": "1"} and vllm.arguments == {"a": [1, 2]}
    assert sglang.arguments == {"attention_backend": "triton"}
    for names, settings, message in (
        (["vllm-best"], [], "unknown; there are vllm-stock"),
        ([], ["vllm"], "write WHO:NAME=VALUE"),
        ([], ["lmdeploy:A=1"], "neither a contender nor an engine"),
    ):
        with pytest.raises(EngineError, match=message):
            plan.contenders(names, settings)


def test_measurements_are_chosen():
    assert [str(m) for m in plan.measurements(plan.Choice(only=("prefill",), prefills=("2x64/32",)))] == [
        "prefill 2 x 64, passes of 32"
    ]
    drafts = plan.measurements(plan.Choice(only=("drafts",), batches=(1, 8), contexts=(64,), drafts=(3,)))
    assert [str(m) for m in drafts] == [
        "decode 1 at 64",
        "decode 1 at 64, 3 drafts, 85% right",
        "decode 1 at 64, 3 drafts, its own",
    ]
    assert len(plan.measurements(plan.Choice(only=("decode",)))) == len(plan.BATCHES) * len(plan.CONTEXTS)
    for wrong in "8", "0x4", "4x0", "4x4/0", "4x4/", "-1x4", "4xx4", "4x4.5":
        with pytest.raises(EngineError, match=f"--prefill {wrong}: write REQUESTSxTOKENS"):
            plan.measurements(plan.Choice(prefills=(wrong,)))
    with pytest.raises(EngineError, match="--only speed"):
        plan.measurements(plan.Choice(only=("speed",)))


def test_what_nobody_can_measure():
    assert plan.impossible(DECODE, 8, 1000, MODEL) is None
    assert "more than --tokens 100" in str(plan.impossible(DECODE, 8, 100, MODEL))
    short, plain = (MODEL.model_copy(update=known) for known in ({"max_positions": 64}, {"mtp_layers": 0}))
    assert "the checkpoint knows 64" in str(plan.impossible(DECODE, 8, 1000, short))
    assert "no MTP layer" in str(plan.impossible(DRAFTS, 8, 1000, plain))
    many = Measurement(kind="decode", requests=1024, tokens=64)
    assert "too few to tell so many requests apart" in str(plan.impossible(many, 64, 1 << 20, MODEL))
    assert plan.impossible(many, 64, 1 << 20, MODEL.model_copy(update={"vocab_size": 129280})) is None


# A run.

FAKE = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    from dsv3_plugin.contenders import read_job
    from dsv3_plugin.engine_bench.protocol import Job, Row, Start, say
    job, out = read_job(Job, Path(sys.argv[1])), Path(sys.argv[2])
    if (how := os.environ.get("FAKE")) == "no start":
        sys.exit("RuntimeError: no such device")
    say(out, Start(device="cpu", versions={}, served="Fake", import_seconds=1, up_seconds=2))
    for measurement in job.measurements:
        if measurement.requests == 2 and how == "dies":
            print("RuntimeError: CUDA error: out of memory")
            os.kill(os.getpid(), 9)
        if measurement.requests == 2 and how == "hangs":
            time.sleep(60)
        attempt = int(out.parent.name)
        last = 20 if how == "slower" else 10 - attempt
        times = {"first_token_seconds": (1, last), "pass_seconds": (10 - attempt, 2)}
        say(out, Row(measurement=measurement, as_forced=how != "slower", **times))
    """
)


@pytest.fixture
def run(mini: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Board]:
    """Runs of a contender that is none, in one folder."""
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE)
    monkeypatch.setattr(runner, "_command", lambda *args: (sys.executable, str(fake)))

    def run(
        how: str,
        prefills: Sequence[str] = ("1x8", "2x8", "4x8"),
        *,
        seed: int = 0,
        setting: str = "",
        layout: ParallelLayout = ONE_RANK,
        rounds: int = 1,
    ) -> Board:
        monkeypatch.setenv("FAKE", how)
        boards: list[Board] = []
        made = runner.prepare(
            tmp_path / "run",
            mini["bf16"],
            device="cpu",
            layout=layout,
            steps=4,
            passes=1,
            seed=seed,
            most_tokens=1000,
            contenders=plan.contenders(["vllm-strict"], [setting] if setting else []),
            measurements=plan.measurements(plan.Choice(only=("prefill",), prefills=prefills)),
            environments=tmp_path,
            rounds=rounds,
            limit=5 if how == "hangs" else 100,
            progress=lambda name, what: None,
            changed=boards.append,
        ).run()
        assert boards[-1] == made
        return made

    return run


def rows(made: Board) -> dict[str, str | None]:
    return {str(row.measurement): row.absent for row in made.records[0].rows}


@pytest.mark.parametrize(
    ("how", "why"), [("dies", "killed by SIGKILL: RuntimeError: CUDA error: out of memory"), ("hangs", "--limit 5 s")]
)
def test_a_contender_that_dies_keeps_what_it_has_and_starts_again(run, how, why):
    made = run(how)
    found = rows(made)
    assert why in str(found.pop("prefill 2 x 8"))
    assert found == {"prefill 1 x 8": None, "prefill 4 x 8": None} and judge.measured(made)
    assert why in report.markdown(made) and made.rehearsal


def test_a_contender_that_does_not_start_is_not_tried_again_and_again(run, tmp_path):
    made = run("no start")
    assert rows(made) == {} and "RuntimeError: no such device" in str(made.records[0].failure)
    assert "no such device" in report.markdown(made) and not judge.measured(made)
    assert len(rows(run("works"))) == 3, "but by the next command"
    assert [path.name for path in sorted((tmp_path / "run/vllm-strict/0").iterdir())] == ["1", "2"]


def test_rounds_have_the_best_row_and_the_first_passes(run, tmp_path):
    def seen(made: Board) -> list[tuple[Any, Any]]:
        return [(row.first_token_seconds, row.pass_seconds) for row in made.records[0].rows]

    attempts = tmp_path / "run/vllm-strict/0"
    assert seen(run("works", ("1x8",))) == [((1, 9), (9, 2))]
    made = run("works", ("1x8", "4x8"), rounds=2)
    assert seen(made) == [((1, 7), (9, 2)), ((1, 7), (8, 2))], "starts 1 and 3, 2 and 3"
    assert made.records[0].rounds == 2 and "| Fake | 2 |" in report.markdown(made)
    assert [read_job(Job, attempt).keeps_logits for attempt in sorted(attempts.iterdir())] == [True, True, False]
    assert not judge.errors(made)
    made = run("slower", ("1x8",), rounds=4)
    assert seen(made)[0] == ((1, 7), (9, 2))
    assert judge.errors(made) == {"vllm-strict": ["prefill 1 x 8: its tokens are not the forced ones"]}, "in one round"
    assert run("works", ("1x8",), rounds=5).records[0].rounds == 2, "of what was made least often"
    attempted = len(list(attempts.iterdir()))
    run("dies", ("2x8",), rounds=9)
    assert len(list(attempts.iterdir())) == attempted + 1, "what failed is not made nine times"


def test_a_run_is_made_in_parts_of_one_kind(run, monkeypatch):
    run("works", ("1x8",))
    made = run("works", ("4x8", "1x8"))
    assert rows(made) == {"prefill 1 x 8": None, "prefill 4 x 8": None}
    assert [str(m) for m in made.measurements] == ["prefill 1 x 8", "prefill 4 x 8"]
    with pytest.raises(EngineError, match="holds a run of another kind"):
        run("works", seed=1)
    with pytest.raises(EngineError, match=r"another kind: layout one, not dp=2,ep=2; name a new folder"):
        run("works", layout=ParallelLayout(dp=2, ep=2))
    with monkeypatch.context() as slices, pytest.raises(EngineError, match="reduction_slices 1, not 2"):
        slices.setenv(SLICES_VARIABLE, "2")
        run("works")
    with monkeypatch.context() as form, pytest.raises(EngineError, match="DSV3_ATTENTION=two_form would be every"):
        form.setenv("DSV3_ATTENTION", "two_form")
        run("works")
    with pytest.raises(EngineError, match="stages are not timed"):
        run("works", layout=ParallelLayout(pp=2))
    with pytest.raises(ConformanceError, match="DSV3_REDUCTION_SLICES"):
        run("works", layout=ParallelLayout(tp=2))
    with pytest.raises(EngineError, match="has 2 heads, which 4 ranks cannot share"):
        run("works", layout=ParallelLayout(tp=4))
    with pytest.raises(ConformanceError, match="whose number is a power of two"):
        ParallelLayout(tp=3).require_slices(BF16)
    with pytest.raises(EngineError, match="holds rows of other settings"):
        run("works", setting="vllm:A=1")


def test_a_last_line_that_was_cut_is_left_out(tmp_path):
    start = Start(device="cpu", versions={}, served="Fake", import_seconds=1, up_seconds=2)
    text = f"{start.model_dump_json()}\n{row(DECODE).model_dump_json()}\n{row(PREFILL).model_dump_json()[:50]}"
    (tmp_path / "rows.jsonl").write_text(text)
    assert heard(tmp_path).rows == (row(DECODE),)
    assert logits_file(tmp_path, 3).name == "3.safetensors"


def test_an_engine_that_is_missing_is_named_in_the_commands_own_words(tmp_path):
    missing = r"vllm and dsv3-plugin are not both installed for .*python.*; set up .*vllm with both"
    with pytest.raises(ConformanceError, match=f"^{missing}$"):
        command("vllm", "program", tmp_path, {})
    with pytest.raises(ConformanceError, match=f"^--testee vllm: {missing}, or give vllm='PYTHON -m "):
        OneTestee.parse("vllm", tmp_path)
