"""vLLM on several ranks: the bits of one, in real engines."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engines import REFERENCE, python_of, run
from paths import SUPPORT

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.layouts import ParallelLayout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What vLLM and Python would find out and compile again in each of so many processes."""
    return tmp_path_factory.mktemp("vllm-cache")


@pytest.fixture(autouse=True)
def _shared(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(cache))
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(cache / "bytecode"))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


def watched(environment: str, layout: str) -> runner.TesteeCommand:
    program = python_of(environment), str(SUPPORT / "watched_vllm.py")
    return runner.TesteeCommand("vllm", program).on(ParallelLayout.parse(layout))


def reads(work_dir: Path, layout: str) -> list[dict[str, Any]]:
    """What each rank's last engine read."""
    folder = work_dir / "kept" / f"vllm {layout}"
    return [json.loads(file.read_text()) for file in sorted(folder.glob("rank-*/reads.json"))]


@pytest.mark.parametrize(
    ("environment", "layout", "dtype", "slices"),
    [
        ("vllm", "dp=2,ep=2", "fp8", "1"),
        ("vllm", "tp=2", "bf16", "2"),
        ("vllm", "pp=2", "bf16", "1"),
        ("vllm-0.27.1", "dp=2,ep=2", "bf16", "1"),
    ],
)
def test_a_layout_has_the_bits_of_one_rank(
    tiny_checkpoint, tmp_path: Path, monkeypatch, environment: str, layout: str, dtype: str, slices: str
) -> None:
    """Prompts in chunks beside decodes, prefix hits, drafts, and a rank without requests in the last rounds."""
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", slices)
    testee = watched(environment, layout)
    checkpoint = tiny_checkpoint(dtype)
    report = run([REFERENCE, testee], checkpoint, tmp_path, "prefix_cache_chunked", "mtp_2")
    assert report.passed, (report.problems, [(v.problems, v.comparisons) for v in report.verdicts if not v.passed])
    drafts = report.results[testee.name].cases[-1]
    if layout == "pp=2":
        assert all("no drafter on the first" in (request.unsupported or "") for request in drafts.requests)
    else:
        assert 0 < drafts.num_accepted_tokens < drafts.num_draft_tokens
    for verdict in report.verdicts:
        if not verdict.declined:
            pair = verdict.between("reference", testee.name)
            assert pair is not None and pair.equal_rows > 500, verdict.case.name

    if environment != "vllm":
        return
    whole = len(list(CheckpointReader(checkpoint).headers()))
    for rank in reads(tmp_path, layout):
        # vLLM's own loader is asked for one tensor, so that it looks at the files.
        assert len(rank["theirs"]) <= 2, rank["theirs"]
        assert len(rank["ours"]) < whole
        assert rank["numbers"] >= rank["held"]


def test_experts_in_another_order_are_caught_and_named(tiny_checkpoint, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WATCHED_VLLM", "combine")
    testee = watched("vllm", "dp=2,ep=2")
    report = run([REFERENCE, testee], tiny_checkpoint("fp32"), tmp_path, "batch")
    assert not report.passed
    pair = report.verdicts[0].between("reference", testee.name)
    assert pair is not None and pair.first_difference is not None
    assert pair.first_difference.stream == "layers.1.mlp"


def test_rows_that_another_engine_left_are_answered_from(tiny_checkpoint, tmp_path: Path) -> None:
    """Prefill in one engine, decode in another: the same raw logits, and one bit of a row changed is seen."""
    settings = {"VLLM_MLA_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [python_of("vllm"), str(SUPPORT / "vllm_connector.py"), str(tiny_checkpoint("bf16")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines = [line.removeprefix("TOLD ") for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    told: dict[str, Any] = {name: engine for line in lines for name, engine in json.loads(line).items()}
    for drafts in 0, 1:
        alone, stores, finds = (told[f"{what} {drafts}"] for what in ("alone", "stores", "finds"))
        assert alone["digests"] == stores["digests"] == finds["digests"]
        assert alone["tokens"] == finds["tokens"]
        # Two pages of 16 tokens were found of a prompt of 45.
        assert (stores["passes"][0], finds["passes"][0]) == (45, 13)
    assert told["finds others"]["passes"][0] == 13
    assert told["finds others"]["digests"] != told["alone 0"]["digests"]
