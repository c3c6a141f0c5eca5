"""What goes wrong between an engine and the model, in the reference as it serves: the suite names where it shows first.

All testees run in this process. That adapters' own mistakes are caught is shown where their engines run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from mini_checkpoint import Folders
from stale_page import read_stale

from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.programs import Program, Progress
from dsv3_plugin.conformance.protocol import Case, Job, Request, read_job
from dsv3_plugin.conformance.rows import RowRecorder
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.conformance.testees.reference import ReferenceTestee

PROMPTS = [tuple(i * 7 % 300 for i in range(start, start + length)) for start, length in ((3, 11), (20, 24))]
CASE = Case(
    name="drafts",
    title="two prompts and a draft token each",
    rounds=(tuple(Request(prompt_token_ids=prompt, max_tokens=8) for prompt in PROMPTS),),
    num_speculative_tokens=1,
    prompt_logits=True,
)


class Sabotaged(ReferenceTestee):
    """Whose own passes over whole sequences nobody asks for: the reference's are the specification."""

    name = "sabotaged"

    def whole_sequence(self, token_ids: tuple[int, ...], prompt_len: int) -> RowRecorder:
        return RowRecorder()


def a_position_late(testee: Sabotaged) -> None:
    """Of each pass that goes on with a request."""
    testee.model.register_forward_pre_hook(lambda model, args: (args[0], args[1] + (args[1][0] > 0).long(), *args[2:]))


def a_stale_row(testee: Sabotaged) -> None:
    """The newest row of the cache is its oldest."""
    read_stale(testee.ops)


def experts_swapped(testee: Sabotaged) -> None:
    """Two experts of a layer lie in each other's place, as if they had moved and the map had not."""
    experts = testee.model.get_submodule("model.layers.1.mlp.experts")
    for weight in experts.parameters():
        weight.data[[0, 1]] = weight.data[[1, 0]]


def bias_in_bf16(testee: Sabotaged) -> None:
    """Every router's; few tokens choose others by it."""
    for name, weight in testee.model.named_parameters():
        if name.endswith("e_score_correction_bias"):
            weight.data = weight.data.bfloat16().float()


def a_weight_of_before(testee: Sabotaged) -> None:
    """An update left one behind: here it is off by the last bit of one number."""
    testee.model.get_parameter("model.layers.1.self_attn.o_proj.weight").data.view(torch.int16)[0, 0] ^= 1


def hidden_of_before(testee: Sabotaged) -> None:
    """The draft continues from the row before the one that was accepted."""
    assert testee.mtp is not None
    testee.mtp.register_forward_pre_hook(lambda mtp, args: (*args[:2], args[2].roll(1, 0), *args[3:]))


def rows_dropped(stream: str, count: int) -> Callable[[Sabotaged], None]:
    """The last rows of a stream are not told."""

    def sabotage(testee: Sabotaged) -> None:
        run = testee.run

        def without(case: Case) -> program.Outcome:
            outcome = run(case)
            keys, values = outcome.recorder._keys, outcome.recorder._values
            for _ in range(count):
                keys[stream].pop()
                *before, last = values[stream]
                values[stream] = [*before, *([last[:-1]] if len(last) > 1 else [])]
            return outcome

        testee.run = without  # type: ignore[method-assign]

    return sabotage


SABOTEURS: dict[str, tuple[Callable[[Sabotaged], None], str]] = {
    "position": (a_position_late, r"layers\.0\.self_attn"),
    "page": (a_stale_row, r"layers\.0\.self_attn"),
    "experts": (experts_swapped, r"layers\.1\.mlp"),
    "bias": (bias_in_bf16, r"layers\.\d\.mlp"),
    "weight": (a_weight_of_before, r"layers\.1\.self_attn"),
    "hidden": (hidden_of_before, r"mtp\.0"),
    "logits": (rows_dropped("logits", 1), r"has no logits at position \d+"),
    "draft": (rows_dropped("mtp.0", 6), r"\d+ rows of the draft for \d+ draft tokens that were verified"),
}
"""What is done, and the stream that differs first, or what is said to lack."""


def test_each_is_caught_where_it_shows_first(mini: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_programs(programs: Mapping[str, Program], progress: Progress, timeout: float | None = None) -> None:
        for name, (_, job_dir, result_dir, _) in programs.items():

            def make(job: Job, name: str = name) -> ReferenceTestee:
                if name == "reference":
                    return ReferenceTestee(job)
                testee = Sabotaged(job)
                if name in SABOTEURS:
                    SABOTEURS[name][0](testee)
                return testee

            program.run_job(make, read_job(job_dir), result_dir)

    monkeypatch.setattr(runner, "run_programs", run_programs)
    monkeypatch.setattr(runner, "cases_of", lambda *_: (CASE,))
    testees = [runner.TesteeCommand(name, ()) for name in ("reference", "innocent", *SABOTEURS)]
    report = runner.run(testees, mini["bf16"], lambda *_: None, keep=tmp_path / "kept")
    assert not report.passed

    def shown(name: str) -> list[str]:
        """Where it differs from the reference first, then what is said of it."""
        pairs = [verdict.between("reference", name) for verdict in report.verdicts]
        first = [pair.first_difference.stream for pair in pairs if pair is not None and pair.first_difference]
        said = [text for verdict in report.verdicts for text in verdict.problems]
        return first[:1] + [text for text in said if text.startswith(f"{name}: ")]

    assert shown("innocent") == []
    for name, (_, expected) in SABOTEURS.items():
        assert shown(name) and re.search(expected, shown(name)[0]), (name, shown(name))
