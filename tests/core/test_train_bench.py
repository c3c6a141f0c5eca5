"""`dsv3 bench train` without Megatron: who is asked for what, how a step is divided, and what is said of losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConfigError, EngineError
from dsv3_plugin.profile import profile_for
from dsv3_plugin.train_bench import board, plan, report, runner, text, weights
from dsv3_plugin.train_bench.board import Board, Record, relative_losses
from dsv3_plugin.train_bench.protocol import End, Job, Start, Step, heard, say
from dsv3_plugin.train_bench.stopwatch import REST, Stopwatch

CPU = torch.device("cpu")


# Parts of a step.


class _Slow(torch.autograd.Function):
    """Takes 20 ms forward and 40 ms backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.02)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.04)
        return grad * 2


class Layer(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        x = _Slow.apply(x)
        return (x if self.inner is None else self.inner(x)[0] + 1), None


def timed(watch: Callable[[Stopwatch, Layer], None]) -> tuple[dict[str, float], float]:
    """The parts of a step of two layers, one in the other, and how long all of it took."""
    stopwatch, layer = Stopwatch(CPU), Layer(Layer())
    watch(stopwatch, layer)
    x = torch.ones(3, requires_grad=True)
    layer(x * 1)[0].sum().backward()  # of no step
    began = time.perf_counter()
    with stopwatch.step():
        layer(x * 1)[0].sum().backward()
        with stopwatch.during("optimizer"):
            time.sleep(0.03)
    return stopwatch.seconds(), time.perf_counter() - began


def test_a_step_is_divided_into_its_parts():
    def watch(stopwatch: Stopwatch, layer: Layer) -> None:
        stopwatch.watch(layer, "outer")
        stopwatch.watch(layer.inner, "inner", around="outer")

    parts, whole = timed(watch)
    assert set(parts) == {f"{part}, {way}" for part in ("outer", "inner") for way in ("forward", "backward")} | {
        "optimizer",
        REST,
    }
    expected = {"forward": 0.02, "backward": 0.04, "optimizer": 0.03}
    for part, seconds in parts.items():
        assert part == REST or seconds == pytest.approx(expected[part.rpartition(", ")[2]], abs=0.015), parts
    assert sum(parts.values()) == pytest.approx(whole, rel=0.05)


def test_a_part_that_nobody_watches_is_time_of_the_one_around_it():
    parts, _ = timed(lambda stopwatch, layer: stopwatch.watch(layer, "outer"))
    assert parts["outer, backward"] == pytest.approx(0.08, abs=0.02)


# Who trains, and what.


def test_settings_reach_the_contender_that_they_name():
    fast, te = plan.contenders(["te", "fast"], ["te:moe_permute_fusion=false", "te:NVTE_X=1", "bf16:NVTE_X=1"])
    assert (fast.name, te.name) == ("fast", "te")
    assert te.settings["moe_permute_fusion"] is False and te.settings["fp8"] == "e4m3"
    assert te.variables == {"NVTE_X": "1"} and "NVTE_X" not in fast.variables


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["tee"], [], "--contender tee: unknown; there are strict, fast"),
        ([], ["te:fp8"], "write WHO:NAME=VALUE"),
        ([], ["them:fp8=e4m3"], "them is no contender"),
    ],
)
def test_unknown_names_are_refused(names, settings, said):
    with pytest.raises(EngineError, match=said):
        plan.contenders(names, settings)


def test_the_model_has_the_reports_widths():
    config = plan.read_model(plan.TWO_LAYERS, None)
    assert (config["hidden_size"], config["num_attention_heads"], config["n_routed_experts"]) == (7168, 128, 256)
    for contender in plan.CONTENDERS:
        model = DeepseekV3Config.from_dict(plan.for_contender(config, contender))
        assert profile_for(model).is_fp8 == (contender.fp8 and contender.layers == "ours"), contender.name


def test_as_many_experts_as_fit():
    config = plan.read_model(plan.TWO_LAYERS, None)
    of_h200 = plan.fitting_experts(config, 4096, 150 * 10**9)
    assert of_h200 == 16
    assert plan.fitting_experts(config, 4096, 300 * 10**9) > of_h200
    assert plan.fitting_experts(config, 4096, 10**13) == 256
    with pytest.raises(EngineError, match="no room to train the model with 16 experts a layer"):
        plan.fitting_experts(config, 4096, 80 * 10**9)


def test_no_token_is_read_twice(tiny_checkpoint, tmp_path):
    text.write(700_000, tiny_checkpoint("bf16"), tmp_path / "tokens.safetensors")
    tokens = text.read(tmp_path / "tokens.safetensors")
    assert tokens.shape == (700_000,) and tokens.dtype == torch.int64
    windows = tokens[:699_904].view(-1, 256)
    assert len(windows.unique(dim=0)) > 0.99 * len(windows)


# Weights.


def model_of(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """One with parameters of these names."""
    model = nn.Module()
    for name, shape in shapes.items():
        *modules, leaf = name.split(".")
        place = model
        for module in modules:
            if not hasattr(place, module):
                place.add_module(module, nn.Module())
            place = getattr(place, module)
        place.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)))
    return model


OURS = {
    "embedding.word_embeddings.weight": (16, 8),
    "decoder.layers.0.pre_mlp_layernorm.weight": (8,),
    "decoder.layers.1.self_attention.core.q_a_layernorm.weight": (4,),
    "decoder.layers.1.mlp.experts.core.down_proj.weight": (2, 8, 6),
    "mtp.layers.0.mtp_model_layer.mlp.shared_experts.core.gate_up_proj.weight": (12, 8),
}
THEIRS = {
    "embedding.word_embeddings.weight": (16, 8),
    "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": (8,),
    "decoder.layers.1.self_attention.linear_q_up_proj.layer_norm_weight": (4,),
    "decoder.layers.1.mlp.experts.linear_fc2.weight0": (8, 6),
    "decoder.layers.1.mlp.experts.linear_fc2.weight1": (8, 6),
    "mtp.layers.0.mtp_model_layer.mlp.shared_experts.linear_fc1.weight": (12, 8),
}


def test_both_kinds_of_layers_begin_with_the_same_weights():
    config = DeepseekV3Config.from_dict(plan.read_model("tiny", None))
    ours, theirs = model_of(OURS), model_of(THEIRS)
    digest = weights.fill(ours, config, 0)
    assert digest == weights.fill(theirs, config, 0)
    filled = dict(weights.tensors(theirs, config))
    for key, tensor in weights.tensors(ours, config):
        assert torch.equal(tensor, filled.pop(key)), key
        assert (
            (tensor == 1).all() if tensor.dim() == 1 else 0.5 < float(tensor.detach().float().std()) / weights.STD < 1.5
        )
    assert not filled
    first, second = ours.get_parameter("decoder.layers.1.mlp.experts.core.down_proj.weight")
    assert not torch.equal(first, second)
    # Of another seed, and of a model without one of the experts.
    assert weights.fill(ours, config, 1) != digest
    assert weights.fill(model_of(dict(list(THEIRS.items())[:-2])), config, 0) != digest


# A run.


def job(**changes: object) -> Job:
    known = {"layers": "ours", "config": {}, "device": "cpu", "tokens": "t", "sequence": 8, "steps": 20, "profiled": 1}
    return Job.model_validate(known | {"learning_rate": 1.0, "seed": 0, "settings": {}, "variables": {}} | changes)


START = Start(device="cpu", versions={"torch": "1"}, model="GPTModel", optimizer="torch AdamW", weights=7, initial="a")


def record(name: str, *, seconds: float = 0.2, factor: float = 1.0, steps: int = 20, initial: str = "a") -> Record:
    """One whose loss falls from 7, times `factor`; it needs three seconds for its first step."""
    made = [
        Step(seconds=seconds if n else 3.0, loss=factor * (7 - n / 10), mtp_loss=6.0, gradient_norm=1.0)
        for n in range(steps)
    ]
    end = End(peak_bytes=2**31, parts={REST: 0.05, "head, forward": 0.15}, profiled_seconds=0.2)
    return Record(
        name=name,
        job=job(),
        start=START.model_copy(update={"initial": initial}),
        steps=tuple(made),
        end=end if steps == 20 else None,
        failure=None if steps == 20 else "out of memory",
    )


def of(*records: Record) -> Board:
    return Board(date="2026-01-01", model="tiny: 1 layer", tokens=8, steps=20, records=records)


def test_losses_are_compared_part_by_part():
    losses = [7 - n / 10 for n in range(20)]
    assert relative_losses(losses, losses) == [0.0] * 9
    assert relative_losses([2 * loss for loss in losses], losses) == pytest.approx([1.0] * 9)
    others = [*losses[:-2], *(2 * loss for loss in losses[-2:])]
    assert relative_losses(losses, others)[-1] == pytest.approx(-0.5) and not any(relative_losses(losses, others)[:-1])


def test_the_report_says_how_ours_compares():
    page = report.markdown(
        of(record("strict"), record("fast"), record("bf16", factor=1.001), record("te", seconds=0.1))
    )
    assert "| strict | 200.0 (200.0-200.0) | 40 | 0.50 | 3.0 s | - | 2.0 GiB |" in page
    assert "| te | 100.0 (100.0-100.0) | 80 | 1.00 |" in page
    assert "| head, forward | 150.0 (75%) | 150.0 (75%) |" in page and "| all | 200.0 |" in page
    assert "| strict | 1.0000 | 7.0000 | 5.1500 | 6.0000 | -0.10%, -0.10% (-0.10%) | +0.00%, +0.00% (+0.00%) |" in page
    assert "* strict and fast: 20 of 20 losses are one number" in page and "A rehearsal" in page


def test_the_faster_one_of_theirs_is_compared():
    measured = of(record("fast"), record("te", seconds=0.4), record("te-plain", seconds=0.1))
    assert measured.fastest_of_theirs() == measured.record("te-plain")
    assert of(record("fast"), record("te", steps=3)).fastest_of_theirs() is None


def test_who_is_missing_is_named():
    absent = Record(name="te", job=job(layers="theirs"), failure="TransformerEngine is not installed")
    said = report.remarks(of(record("strict", steps=3), record("bf16", initial="b"), absent))
    assert said == [
        "strict: 3 steps: out of memory",
        "te: 0 steps: TransformerEngine is not installed",
        "not all contenders began with the same weights: their losses are those of different runs",
    ]


def test_answers_are_heard_up_to_a_line_that_was_cut(tmp_path: Path):
    step = Step(seconds=1.0, loss=float("nan"), gradient_norm=1.0)
    for message in (START, step, step):
        say(tmp_path, message)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"kind":"step","sec')
    answers = heard(tmp_path)
    assert answers.start == START and len(answers.steps) == 2 and answers.end is None


def prepare(folder: Path, **changes: object) -> runner.Bench:
    known: dict[str, object] = {"model": "tiny", "config": plan.read_model("tiny", None), "device": "cpu"}
    known |= {"sequence": 16, "steps": 2, "profiled": 1, "learning_rate": 1e-3, "seed": 0, "limit": 60}
    known |= {"contenders": plan.contenders(["strict"]), "environments": folder.parent / "none"}
    known |= {"progress": lambda *_: None, "changed": lambda _: None}
    return runner.prepare(folder, **(known | changes))  # type: ignore[arg-type]


def test_a_run_goes_on_only_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner, "_command", lambda *_: ("false",))
    run = tmp_path / "run"
    assert prepare(run).run().records[0].failure
    assert not board.Board.model_validate_json(prepare(run).board().model_dump_json()).records[0].steps
    with pytest.raises(EngineError, match="holds a run of another kind: steps 2, not 3; name a new folder"):
        prepare(run, steps=3)
    with pytest.raises(EngineError, match="was asked for with other settings"):
        prepare(run, contenders=plan.contenders(["strict"], ["strict:X=1"]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(EngineError, match="holds other files"):
        prepare(tmp_path / "full")
    with pytest.raises(EngineError, match=r"--out .*mine: cannot be a run's folder: File exists"):
        prepare(tmp_path / "full" / "mine")
    with pytest.raises(EngineError, match=r"--tokens 9,000: the model knows 4,096 positions"):
        prepare(tmp_path / "long", sequence=9000)
    for rate in 0.0, -1.0, math.nan, math.inf:
        with pytest.raises(EngineError, match=f"--lr {rate}: above zero, and finite"):
            prepare(tmp_path / "rate", learning_rate=rate)
    with pytest.raises(ConfigError, match=r"^tiny: config: n_routed_experts=3 is not a multiple"):
        prepare(tmp_path / "experts", config=plan.read_model("tiny", 3))
    assert not (tmp_path / "rate").exists() and not (tmp_path / "experts").exists()
