"""The report's course: each change at its step, at the report's own length and in a small run of Megatron's loop."""

from __future__ import annotations

import json
import math
import re
import subprocess
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Folders
from megatron_programs import LOOP, convert, needs_megatron, printed, warm
from paths import ROOT, SUPPORT, TESTS

from dsv3_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend import recipe
from dsv3_plugin.megatron_backend.recipe import Course

REPORT = Course(14_800_000_000_000 // 4096)
"""The report's own run, in sequences of 4,096 tokens."""
BATCHES = REPORT.batches(15_360)


def steps(course: Course, batches: list[tuple[int, int]], first: int, last: int) -> dict[int, int]:
    """Samples before each step from `first` to `last`, counted from 0."""
    consumed, found = 0, {}
    for step in range(last + 1):
        found[step] = consumed
        consumed += [size for begin, size in batches if begin <= consumed][-1]
    return {step: found[step] for step in range(first, last + 1)}


def billions(samples: int) -> float:
    return samples * 4096 / 1e9


def test_the_learning_rate_at_the_report_s_own_length() -> None:
    assert REPORT.samples * 4096 == 14_800_000_000_000
    around = steps(REPORT, BATCHES, 1_999, 2_001)
    rates = [REPORT.learning_rate(consumed) for consumed in around.values()]
    assert rates == [2.2e-4 * (1_999 / 2_000), 2.2e-4, 2.2e-4] and REPORT.learning_rate(0) == 0.0
    for begins, tokens in (
        (REPORT.decay_begins, 10_000.0),
        (REPORT.decay_ends, 14_300.0),
        (REPORT.last_rate_begins, 14_633.0),
    ):
        assert billions(begins - 1) < tokens <= billions(begins)
    before, after = REPORT.decay_begins - 1, REPORT.decay_begins
    assert REPORT.learning_rate(before) == REPORT.learning_rate(after) == 2.2e-4 > REPORT.learning_rate(after + 15_360)
    halfway = (REPORT.decay_begins + REPORT.decay_ends) // 2
    assert math.isclose(REPORT.learning_rate(halfway), (2.2e-4 + 2.2e-5) / 2, rel_tol=1e-8)
    assert REPORT.learning_rate(REPORT.decay_ends - 15_360) > REPORT.learning_rate(REPORT.decay_ends)
    assert math.isclose(REPORT.learning_rate(REPORT.decay_ends), 2.2e-5)
    assert REPORT.learning_rate(REPORT.last_rate_begins - 1) == REPORT.learning_rate(REPORT.decay_ends)
    for consumed in (REPORT.last_rate_begins, REPORT.samples - 1, REPORT.samples):
        assert math.isclose(REPORT.learning_rate(consumed), 7.3e-6)


def test_batches_at_the_report_s_own_length() -> None:
    assert [size for _, size in BATCHES] == [3_072, 6_144, 9_216, 12_288, 15_360]
    assert billions(BATCHES[-1][0] - 1) < 469 <= billions(BATCHES[-1][0])
    assert {end - begin for (begin, _), (end, _) in pairwise(BATCHES)} <= {28_625_488, 28_625_489, 28_625_490}


def test_losses_and_bias_at_the_report_s_own_length() -> None:
    config, seen = SimpleNamespace(), []
    for consumed in (0, REPORT.decay_begins - 1, REPORT.decay_begins, REPORT.decay_ends - 1, REPORT.decay_ends):
        REPORT.follow(config, consumed, 1e-3)
        seen.append((config.mtp_loss_scaling_factor, config.moe_router_bias_update_rate))
    assert seen == [(0.3, 1e-3), (0.3, 1e-3), (0.1, 1e-3), (0.1, 1e-3), (0.1, 0.0)]


def test_the_documentation_shows_the_report_s_own_course() -> None:
    shown = (ROOT / "docs" / "megatron.md").read_text("utf-8")
    assert "\n".join(REPORT.described(15_360, 1e-3)) in shown and f"--train-samples {REPORT.samples} " in shown


@pytest.mark.parametrize(("samples", "largest"), [(740, 10), (148, 10), (1_000_003, 640)])
def test_what_is_printed_is_what_happens(samples: int, largest: int) -> None:
    """The step of each change, found by counting one after the other."""
    course = Course(samples, 1e-3)
    batches = course.batches(largest)
    end, _ = recipe.step_at(samples, batches)
    consumed = steps(course, batches, 0, end)
    assert consumed[end - 1] < samples <= consumed[end]
    for line in course.described(largest, 1e-3):
        step, sample = (int(number.replace(",", "")) for number in re.findall(r"(?:step|sample) +([\d,]+)", line))
        assert consumed[step] == sample
        if found := re.search(r"lr (\S+?)(?: \w+)?, MTP (\S+), bias ([\d.]+)", line):
            expected = course.learning_rate(sample), course.mtp_loss_factor(sample)
            assert (found[1], found[2]) == (f"{expected[0]:.3e}", str(expected[1]))
            assert found[3] == str(course.bias_update_rate(sample, 1e-3))
    for change in (course.warmup, course.decay_begins, course.decay_ends, course.last_rate_begins):
        step, first = recipe.step_at(change, batches)
        assert first == consumed[step] >= change and (step == 0 or consumed[step - 1] < change)


def test_a_run_that_has_no_course_is_refused() -> None:
    for largest in 8, 4, 0, -5:
        with pytest.raises(
            EngineError, match=f"batches grow by fifths: global_batch_size={largest} is no multiple of 5 above"
        ):
            Course(1_000).batches(largest)
    with pytest.raises(EngineError, match=r"in the first 3.2% of a run, in 4 steps: 94 .* too few .*, 95 are enough"):
        Course(94).batches(10)
    assert len(Course(95).batches(10)) == 5
    with pytest.raises(EngineError, match="a run of 0 samples has no course"):
        Course(0)


def test_batches_grow_as_megatron_s_older_argument_says() -> None:
    """By its own rule: after c samples a batch has START + INCREMENT * floor(c * steps / SAMPLES)."""
    assert recipe.batch_size_schedule(None, 8) == "0:8"
    schedule = recipe.batch_size_schedule((16, 8, 300_000), 1024)
    pairs = [tuple(map(int, step.split(":"))) for step in schedule.split()]
    grown = (1024 - 16) // 8
    for consumed in (0, 1, 2_380, 2_381, 150_000, 299_999, 300_000, 1_000_000):
        expected = min(1024, 16 + 8 * (consumed * grown // 300_000))
        assert [batch for first, batch in pairs if first <= consumed][-1] == expected, consumed


@pytest.mark.parametrize("rampup", [(2, 4, 12), (2, 0, 12), (8, 2, 12), (16, 2, 12), (2, 2, 1)])
def test_batches_that_cannot_grow_so_are_refused(rampup: tuple[int, int, int]) -> None:
    with pytest.raises(EngineError, match="batches cannot grow"):
        recipe.batch_size_schedule(rampup, 8)


# In Megatron's loop

PRETRAIN = ROOT / "examples" / "pretrain_megatron.py"
TRACKER = "latest_checkpointed_iteration.txt"
SAMPLES, LARGEST, SEQUENCE = 148, 10, 16


@needs_megatron
def test_a_run_follows_the_course_and_continues_where_it_was_cut(mini: Folders, tmp_path: Path) -> None:
    """Each step's rate and batch are the course's; what continues in its middle learns the same bits."""
    course = Course(SAMPLES, 1e-3)
    batches = course.batches(LARGEST)
    end, _ = recipe.step_at(SAMPLES, batches)
    consumed = steps(course, batches, 0, end)
    middle = end // 2

    def run(name: str, *flags: object) -> tuple[list[tuple[str, ...]], Fingerprint]:
        """What each iteration printed, and the weights that it ends with."""
        file = tmp_path / f"{name}.json"
        model = "--hf-config", mini["bf16"], "--tokenizer-type", "NullTokenizer", "--vocab-size", 319, "--mock-data"
        size = "--micro-batch-size", 2, "--global-batch-size", LARGEST, "--seq-length", SEQUENCE
        length = "--report-recipe", "--train-samples", SAMPLES, "--lr", 1e-3, "--eval-iters", 0, "--eval-interval", 99
        machine = "--transformer-impl", "local", "--distributed-backend", "gloo", "--log-interval", 1
        average = "--ema-decay", 0.75, "--save", tmp_path / name, "--save-interval", middle
        program = partial(warm, TESTS / "pretrain_on_cpu.py", SUPPORT / "pretrain_probe.py", file, *model, *size)
        done = program(*length, *machine, *average, *flags, ranks=1, modules=LOOP)
        assert file.exists(), printed(done)[-3000:]
        assert "\n".join(course.described(LARGEST, 1e-3)) in done.stdout
        assert len(re.findall(r"exp_avg(?:_sq)?_dtype \.+ torch\.bfloat16\n", done.stdout)) == 2
        pattern = r"samples: +(\d+) .*?rate: (\S+) .*?batch size: +(\d+) .*?lm loss: (\S+) .*?grad norm: (\S+)"
        return re.findall(pattern, done.stdout), Fingerprint.model_validate_json(file.read_text())

    whole, learned = run("whole")
    # Megatron prints the rate of the step that follows.
    assert [line[:3] for line in whole] == [
        (str(consumed[step + 1]), f"{course.learning_rate(consumed[step + 1]):.6E}", str(after - before))
        for step, (before, after) in enumerate(pairwise(consumed.values()))
    ]
    # Cut in its middle: with it goes on the average of the weights, which is not the weights.
    (tmp_path / "whole" / TRACKER).write_text(str(middle))
    rest, learned_again = run("rest", "--load", tmp_path / "whole")
    assert rest == whole[middle:] and learned_again == learned
    for name in ("whole", "rest"):
        convert("to-hf", tmp_path / name / "ema", tmp_path / f"{name} average", "--like", mini["bf16"])
    averages = [fingerprint_of_checkpoint(CheckpointReader(tmp_path / f"{name} average")) for name in ("whole", "rest")]
    assert averages[0] == averages[1]
    assert len(averages[0].difference(learned)) > 0.9 * len(learned.tensors)


@needs_megatron
def test_two_phases_extend_the_context(mini: Folders, tmp_path: Path) -> None:
    """As in section 4.3: what was trained on short sequences goes on with YaRN on longer, then on longest ones."""
    described = json.loads((mini["bf16"] / "config.json").read_text())
    yarn = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    long = described | {"rope_scaling": yarn | {"original_max_position_embeddings": 16}, "max_position_embeddings": 640}
    for name, config in ("short", described | {"max_position_embeddings": 16}), ("long", long):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))

    def run(name: str, length: int, model: str, *flags: object) -> subprocess.CompletedProcess[str]:
        described = "--hf-config", tmp_path / f"{model}.json", "--tokenizer-type", "NullTokenizer", "--vocab-size", 319
        size = "--micro-batch-size", 1, "--global-batch-size", 2, "--seq-length", length, "--train-iters", 1
        course = "--lr", 7.3e-6, "--lr-decay-style", "constant", "--eval-iters", 0, "--eval-interval", 9, "--mock-data"
        machine = "--transformer-impl", "local", "--distributed-backend", "gloo", "--log-interval", 1
        save = "--save", tmp_path / name, "--save-interval", 1
        example = TESTS / "pretrain_on_cpu.py", PRETRAIN, *described, *size, *course, *machine, *save, *flags
        return warm(*example, ranks=1, modules=LOOP)

    begun = run("4K", 16, "short")
    first = run("32K", 128, "long", "--load", tmp_path / "4K", "--finetune")
    second = run("128K", 512, "long", "--load", tmp_path / "32K", "--finetune")
    for done in begun, first, second:
        assert "lm loss" in done.stdout, printed(done)[-3000:]
    # The twin: without the other configuration the sequences are too long.
    refused = run("none", 128, "short", "--load", tmp_path / "4K", "--finetune")
    assert "max_position_embeddings (16) must be greater than or equal to seq_length (128)" in printed(refused)
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text(json.dumps(long))
    convert("to-hf", tmp_path / "128K", tmp_path / "hf", "--like", tmp_path / "like")
    assert CheckpointReader(tmp_path / "hf").config.rope_scaling is not None
