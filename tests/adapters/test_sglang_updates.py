"""Weight updates in a real SGLang scheduler, by the calls that RL frameworks make."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import REFERENCE, predict_logits, run, warm_testee
from paths import SUPPORT
from safetensors.torch import load_file

from dsv3_plugin.checkpoint.fingerprint import fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.sampling import processed_logprobs

OLD_WEIGHTS_ANSWER = {
    "folder lacks a tensor": "missing tensors (1): model.layers.1.mlp.gate.weight",
    "folder of another model": "its configuration is not the served one in routed_scaling_factor",
    "no such folder": "/nowhere: no such folder",
    "dummy weights": "load_format=dummy: a checkpoint is read from safetensors files",
    "wrong first tensor": "the configuration gives [",
    "unknown format": "Unknown load_format=made_up",
}
NOTHING_ANSWERS = {
    "half": "tensors have not come: model.embed_tokens.weight",
    "wrong in the middle": "the configuration gives [",
    "twice": "came twice in one update",
    "killed sender": "Failed to ",
}


@cache
def predicted(checkpoint: Path, token_ids: tuple[int, ...], temperature: float) -> torch.Tensor:
    return processed_logprobs(predict_logits(checkpoint, list(token_ids)), temperature)


def is_answer_of(answer: dict[str, Any], prompt: int, checkpoints: list[Path], temperature: float = 1) -> bool:
    """Whether each sampled token has the log-probability that the reference gives it with the weights of its own time.

    `checkpoints` are those of the sampled tokens in order.
    """
    tokens = tuple(answer["token_ids"])
    rows = {path: predicted(path, tokens, temperature) for path in set(checkpoints)}
    expected = [rows[path][prompt + i - 1, tokens[prompt + i]].item() for i, path in enumerate(checkpoints)]
    return answer["logprobs"] == expected


@pytest.mark.parametrize(
    ("environment", "dtype", "updates", "cases"),
    [
        ("sglang", "bf16", 20, ("mtp_2", "sampler_mtp_2")),
        ("sglang", "fp8", 7, ("batch", "prefix_cache_chunked", "mtp_2")),
        ("sglang-0.5.17", "bf16", 4, ("prefix_cache_chunked", "sampler", "sampler_mtp_2")),
        ("sglang-0.5.23", "bf16", 4, ("prefix_cache_chunked", "sampler", "sampler_mtp_2")),
    ],
)
def test_updates_under_running_requests(
    tiny_checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: str,
    dtype: str,
    updates: int,
    cases: tuple[str, ...],
) -> None:
    """Twenty in a row in bf16 on the newest version; seven bring weights by each call once."""
    right, other = tiny_checkpoint(dtype), tmp_path / "other"
    make_checkpoint(read_config("tiny"), other, 2, dtype=CheckpointDtype(dtype))
    for name, value in {
        "OTHER": other,
        "UPDATES": updates,
        "RECORD": tmp_path / "record",
        "TMP_FOLDER": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    program = SUPPORT / "sglang_updates.py"
    report = run([REFERENCE, warm_testee(environment, str(program))], right, tmp_path, *cases)
    # Logits, drafts and log-probabilities are those of the checkpoint that came last.
    assert report.passed, (report.problems, [(v.problems, v.comparisons) for v in report.verdicts if not v.passed])
    result = report.results["sglang"]
    assert result.served.model_class.startswith("dsv3_plugin.") and result.served.draft_class.startswith("dsv3_plugin.")
    assert result.served.profile == dtype
    if "-" in environment:
        assert result.versions["sglang"] == environment.partition("-")[2]
        assert "is tested with" not in (tmp_path / "kept" / "sglang" / "log.txt").read_text()
    record = json.loads((tmp_path / "record").read_text())
    expected = {str(path): fingerprint_of_checkpoint(CheckpointReader(path)).digest for path in (right, other)}
    prompt = len(record["start"]["token_ids"]) - 5
    assert record["start"]["fingerprint"] == expected[str(other)]
    assert is_answer_of(record["start"], prompt, [other] * 5)

    folders = [Path(update["folder"]) for update in record["updates"]]
    assert len(folders) == updates
    for update, folder in zip(record["updates"], folders, strict=True):
        assert update["success"], update
        assert update["fingerprint"] == expected[str(folder)], update["way"]
        assert is_answer_of(update, prompt, [folder] * 5), update["way"]
        # The twin: a server that still has the weights before.
        before = other if folder == right else right
        assert update["fingerprint"] != expected[str(before)]
        assert not is_answer_of(update, prompt, [before] * 5)
    assert record["in_place"]

    # Those that ran all the time went on with new weights, and with nothing that the old ones computed.
    for request, temperature, prompt_length in zip(record["running"], (1, 0.8), (prompt, prompt - 3), strict=True):
        count = len(request["logprobs"])
        updates_before = [sum(start <= i for start in request["spans"]) for i in range(count)]
        assert len(set(updates_before)) > updates // 2
        checkpoints = [[other, *folders][number] for number in updates_before]
        assert is_answer_of(request, prompt_length, checkpoints, temperature)
        assert not is_answer_of(request, prompt_length, [right] * count, temperature)

    seen = {refusal["name"]: refusal for refusal in record["refusals"]}
    assert seen.keys() == OLD_WEIGHTS_ANSWER.keys() | NOTHING_ANSWERS.keys()
    for name, message in OLD_WEIGHTS_ANSWER.items():
        refusal = seen[name]
        assert message in refusal["messages"][0], refusal
        assert refusal["problem"] is None and refusal["fingerprint"] == refusal["before"]
        assert is_answer_of(refusal["probe"], prompt, [folders[-1]] * 5), name
        assert is_answer_of(refusal["running"], prompt, [folders[-1]] * 40), name
    for name, message in NOTHING_ANSWERS.items():
        refusal = seen[name]
        assert message in refusal["problem"], refusal
        assert refusal["fingerprint"] is None
        for request in (refusal["running"], refusal["probe"]):
            assert refusal["problem"] in request["error"]
        assert refusal["probe"]["logprobs"] == []
    assert all(refusal["after"] == refusal["before"] for refusal in seen.values())

    assert "the memory of its weights is released" in record["released"][0]
    assert record["released"][0] in record["released"][1]
    assert "its weights were released, and no new ones have come" in record["released"][2]
    assert record["resumed"]["buffers"] and is_answer_of(record["resumed"], prompt, [folders[-1]] * 5)
    assert "/weights_checker reset its weights" in record["reset"]
    assert record["last"] == {"success": True, "fingerprint": expected[str(right)]}
    held = load_file(right / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    assert record["by_name"] == held[:2].float().tolist()
