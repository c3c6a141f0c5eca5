"""Layouts in the suite: a testee on several ranks is compared with one rank, whoever computes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from engines import in_fork
from paths import SUPPORT

from dsv3_plugin.conformance import report as reports
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.layouts import ONE_RANK, ParallelLayout, RankOf
from dsv3_plugin.conformance.protocol import CaseResult, RequestResult
from dsv3_plugin.conformance.testees import ranks
from dsv3_plugin.errors import ConformanceError

CORE = runner.TesteeCommand("core", (sys.executable, "-m", "dsv3_plugin.conformance.testees.core"))
SPREAD = runner.TesteeCommand("spread", (sys.executable, str(SUPPORT / "spread_testee.py")))


def test_layouts_are_read_as_they_are_written() -> None:
    assert ParallelLayout.parse("one") == ONE_RANK
    for text in ("tp=2", "tp=2,pp=2", "dp=2,ep=2", "tp=2,dp=2,ep=4"):
        assert str(ParallelLayout.parse(text)) == text
    for text in ("", "tp", "tp=0", "tp=2,tp=2", "cp=2", "tp=2;pp=2"):
        with pytest.raises(ConformanceError, match="is not one of tp=N"):
            ParallelLayout.parse(text)
    with pytest.raises(ConformanceError, match="ep=4"):
        ParallelLayout.parse("tp=2,dp=2,ep=2")


def test_a_rank_knows_its_place() -> None:
    layout = ParallelLayout.parse("tp=2,dp=2,pp=2")
    places = [(r.dp_rank, r.pp_rank, r.tp_rank) for r in (RankOf(layout, rank, ()) for rank in range(layout.ranks))]
    assert places == [(d, p, t) for d in range(2) for p in range(2) for t in range(2)]
    assert [rank for rank in range(8) if RankOf(layout, rank, ()).has(3)] == [4, 5, 6, 7]


def run(
    checkpoint: Path, work_dir: Path, layout: str, *cases: str, testee: runner.TesteeCommand = SPREAD
) -> runner.Report:
    testees = [in_fork(testee.on(ParallelLayout.parse(layout)))]
    return runner.run(testees, checkpoint, lambda name, what: None, keep=work_dir / "kept", only=cases or ("batch",))


def test_ranks_are_put_together(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    report = run(tiny_checkpoint("bf16"), tmp_path, "dp=2,ep=2")
    assert report.passed, report.problems
    cell = reports.layout_matrix(report)["spread"]["dp=2,ep=2"]
    assert cell.equal > 100 and not cell.different and not cell.declined
    assert "spread dp=2,ep=2" in reports.to_html(report)
    assert "but those that were run" in " ".join(reports.not_claimed(report))


def test_a_rank_with_other_bits_is_caught(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPREAD_TESTEE", "one ulp")
    report = run(tiny_checkpoint("bf16"), tmp_path, "dp=2,ep=2")
    assert not report.passed
    assert reports.layout_matrix(report)["spread"]["dp=2,ep=2"].different > 0


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("dies", "was killed by SIGKILL|failed with status"),
        ("another token", "ranks answered request 0 differently"),
        ("another class", "ranks served different things"),
    ],
)
def test_ranks_that_fail_or_disagree_are_named(
    what: str, message: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPREAD_TESTEE", what)
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    with pytest.raises(ConformanceError, match=message):
        run(tiny_checkpoint("bf16"), tmp_path, "tp=2")


@pytest.mark.parametrize(("killed", "status"), [(0, 0), (1, 0), (1, 7)])
def test_a_rank_that_is_killed_is_named(killed: int, status: int) -> None:
    """Whatever another says in what is left of it."""
    code = "import os, signal, sys; own, killed, status = map(int, sys.argv[1:]);"
    code += " os.kill(os.getpid(), signal.SIGKILL) if own == killed else sys.exit(status)"
    words = [[sys.executable, "-c", code, str(rank), str(killed), str(status)] for rank in range(2)]
    processes = [subprocess.Popen(each) for each in words]
    for process in processes:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # so that both are seen at once
    with pytest.raises(ConformanceError, match=f"rank {killed} of 2 was killed by SIGKILL"):
        ranks.wait_for_ranks(processes)


def test_a_case_that_cannot_run_so_is_named(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPREAD_TESTEE", "declines")
    report = run(tiny_checkpoint("bf16"), tmp_path, "pp=2", "batch", "decode")
    assert report.passed, report.problems
    assert reports.layout_matrix(report)["spread"]["pp=2"].declined == ("decode: no decode over stages",)
    assert "decode: no decode over stages" in reports.to_html(report)


def test_the_core_alone_runs_tensor_parallel_ranks(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "4")
    report = run(tiny_checkpoint("bf16"), tmp_path, "tp=2", "batch", testee=CORE)
    assert report.passed, report.problems
    cell = reports.layout_matrix(report)["core"]["tp=2"]
    assert cell.equal > 100 and not cell.different and not cell.declined
    with pytest.raises(ConformanceError, match="--layout dp=2,ep=2: the core alone runs tensor-parallel ranks"):
        run(tiny_checkpoint("bf16"), tmp_path / "other", "dp=2,ep=2", testee=CORE)


def test_slices_are_asked_for(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ConformanceError, match="--layout tp=2: set DSV3_REDUCTION_SLICES"):
        run(tiny_checkpoint("bf16"), tmp_path, "tp=2")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("pp=99", "each stage has a decoder layer at least, and the model has 4, so pp=4 at most"),
        ("dp=7,ep=7", "7 ranks cannot share the model's 16 routed experts in equal parts"),
        ("dp=1000", "no case has more than 256 requests at a time"),
        ("tp=3", "whose number is a power of two"),
    ],
)
def test_a_layout_that_cannot_be_starts_no_process(
    layout: str, message: str, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(ConformanceError, match=f"--layout {layout}: .*{message}"):
        run(tiny_checkpoint("bf16"), tmp_path, layout)
    assert not (tmp_path / "kept" / "spread").exists()


def test_a_layout_that_the_core_does_not_run_starts_no_rank(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(ConformanceError, match="--layout pp=4: the core alone runs tensor-parallel ranks"):
        run(tiny_checkpoint("bf16"), tmp_path, "pp=4", testee=CORE)
    assert not list((tmp_path / "kept").glob("*/rank-*"))


def test_the_last_stage_answers() -> None:
    """Stages before it know the tokens, and nothing of the prompt's log-probabilities."""
    first = RequestResult(token_ids=(3, 4), num_cached_tokens=0, logprobs=(-1.0,))
    last = first.model_copy(update={"prompt_logprobs": (-2.0,)})
    layout = ParallelLayout.parse("pp=2")

    def answer(*answers: RequestResult) -> RequestResult:
        outcomes = [
            CaseResult(name="prefill", requests=(a,), num_draft_tokens=0, num_accepted_tokens=0, seconds=1.0)
            for a in answers
        ]
        return ranks._request([outcomes], 0, layout)

    assert answer(first, last) == last
    with pytest.raises(ConformanceError, match="case prefill: ranks answered request 0 differently"):
        answer(first.model_copy(update={"token_ids": (3, 5)}), last)
