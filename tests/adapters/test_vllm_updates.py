"""Weight updates of vLLM servers: after each the answers, the drafts and the fingerprint are the new checkpoint's."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_probe import draft_digest
from engines import cut_short, predict_logprobs, warm
from paths import SUPPORT

from dsv3_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.loader import load_mtp
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.layers.model import bind_ops

PROGRAM = SUPPORT / "vllm_updates.py"
PROMPT = list(range(300, 340))
Told = dict[str, Any]


def run_updates(environment: str, job: dict[str, object], work_dir: Path) -> list[Told]:
    """What `vllm_updates.py` tells, in order."""
    file = work_dir / "job.json"
    file.write_text(json.dumps(job))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    settings |= {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    done = warm(environment, PROGRAM, file, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [json.loads(line.removeprefix("TOLD ")) for line in done.stdout.splitlines() if line.startswith("TOLD ")]


@lru_cache
def predicted(checkpoint: Path, token_ids: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The reference's greedy tokens after `PROMPT`, where those before are `token_ids`, and their log-probabilities."""
    rows = predict_logprobs(checkpoint, [*PROMPT, *token_ids])[len(PROMPT) - 1 : -1]
    best = rows.max(-1)
    return tuple(best.indices.tolist()), tuple(best.values.tolist())


@lru_cache
def fingerprint_of(checkpoint: Path) -> Fingerprint:
    return fingerprint_of_checkpoint(CheckpointReader(checkpoint))


@lru_cache
def draft_of(checkpoint: Path) -> str:
    reader = CheckpointReader(checkpoint)
    ops = bind_ops(reader.config, reader.profile(), torch.device("cpu"))
    return draft_digest(load_mtp(reader, ops), reader.config)


def holds(told: Told, checkpoint: Path) -> bool:
    """Whether a server answered as one that was started on `checkpoint`."""
    tokens = tuple(told["token_ids"])
    answered = tokens, tuple(told["logprobs"])
    kept = Fingerprint(tensors=told["fingerprint"]["tensors"])
    assert kept.digest == told["fingerprint"]["digest"]
    same = [
        answered == predicted(checkpoint, tokens),
        not kept.difference(fingerprint_of(checkpoint)),
        told["draft"] == draft_of(checkpoint),
    ]
    assert len(set(same)) == 1, same
    return same[0]


@pytest.mark.parametrize(
    ("environment", "dtype", "updates", "dummy"),
    [("vllm", "bf16", 20, False), ("vllm", "fp8", 8, True), ("vllm-0.27.1", "bf16", 4, True)],
)
def test_updates_in_a_row(
    tiny_checkpoint, tmp_path: Path, environment: str, dtype: str, updates: int, dummy: bool
) -> None:
    """Twenty in bf16 on the newest version; eight bring weights by each call twice."""
    checkpoints = [tiny_checkpoint(dtype)]
    for seed in (2, 3):
        checkpoints.append(tmp_path / f"seed-{seed}")
        make_checkpoint(read_config("tiny"), checkpoints[-1], seed, dtype=CheckpointDtype(dtype))
    another = tmp_path / "another"
    shutil.copytree(checkpoints[1], another)
    config = json.loads((another / "config.json").read_text()) | {"rms_norm_eps": 1e-5}
    (another / "config.json").write_text(json.dumps(config))
    job: dict[str, object] = {
        "checkpoints": list(map(str, checkpoints)),
        "updates": updates,
        "dummy": dummy,
        "broken": str(cut_short(checkpoints[1], tmp_path / "broken")),
        "another": str(another),
    }
    told = run_updates(environment, job, tmp_path)

    updated, rest = told[: updates + 1], told[updates + 1 :]
    ways = {"by_path", "by_iterator", "by_buckets", "by_transfer"}
    assert [len(updated), {one["way"] for one in updated[1:]}] == [updates + 1, ways]
    for i, one in enumerate(updated):
        holder = i % len(checkpoints)
        assert holds(one, checkpoints[holder]), (i, one["way"])
        assert one["same_addresses"], (i, one["way"])
        # A server on the old weights is seen.
        assert not holds(one, checkpoints[holder - 1])

    old, new = (checkpoints[(updates + i) % len(checkpoints)] for i in range(2))
    refusals = {one["way"]: one["refusal"] for one in rest if "refusal" in one}
    for one in rest:
        if one["way"] in ("wrong tensor", "nothing", "no folder", "broken folder", "another model", "kernel format"):
            assert holds(one, old), one["way"]
    assert "kv_b_proj.weight has shape [" in refusals["wrong tensor"]
    assert refusals["nothing"].startswith("CheckpointError: missing tensors of the main model (")
    assert "truncated or not a safetensors file" in refusals["broken folder"]
    assert "not that of the model that is served: rms_norm_eps: 1e-05, served is 1e-06" in refusals["another model"]
    assert refusals["kernel format"].startswith("EngineError: reload_weights(is_checkpoint_format=False)")
    by_way = {one["way"]: one for one in rest}
    assert refusals["killed sender"] == "ConnectionError: the sender is gone"
    assert "may not answer: an update of its weights was refused: the sender" in by_way["killed sender"]["fingerprint"]
    assert holds(by_way["again"], new)
    assert refusals["half"].startswith("CheckpointError: missing tensors of the main model (")
    reason, why = by_way["half"]["ended"]
    assert [by_way["half"]["token_ids"], reason] == [[], "error"]
    assert why.startswith("the main model may not answer: an update of its weights was not finished")

    for way, before, after in (
        ("by_path", old, new),
        ("by_buckets", new, old),
        ("by_transfer", old, new),
        ("by_iterator", new, old),
    ):
        one = by_way[f"across {way}"]
        tokens, kept = tuple(one["token_ids"]), one["old"]
        assert one["finish_reason"] == "length" and 0 < kept < len(tokens)
        expected = predicted(before, tokens)[1][:kept] + predicted(after, tokens)[1][kept:]
        assert tuple(one["logprobs"]) == expected, way
        # Old weights, or what vLLM goes on with by itself, would be seen.
        assert expected != predicted(before, tokens)[1]
    half = by_way["across half"]
    assert [half["finish_reason"], len(half["token_ids"])] == ["error", half["old"]]
    assert "an update of its weights is under way" in half["stop_reason"]
    assert holds(by_way["across rest"], old)
    assert refusals["no folder"] == "CheckpointError: /no/such/folder: no such folder"
