"""A result folder that follows the protocol, and everything that does not."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from command import run_cli
from engines import REFERENCE, in_fork, warm
from safetensors.torch import load_file, save_file

from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.protocol import json_schema, read_job, read_result
from dsv3_plugin.conformance.validate import problems
from dsv3_plugin.diff.sides import read_side
from dsv3_plugin.errors import ConformanceError, DSV3Error

RECORDED = Path(__file__).with_name("protocol_1.1.json")
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def kept(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kept run of the reference."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    cases = ("decode", "sampler")
    assert runner.run([in_fork(REFERENCE)], tiny_checkpoint("bf16"), lambda *_: None, keep=folder, only=cases).passed
    return folder


def test_a_reference_follows_it(kept: Path) -> None:
    assert problems(read_job(kept), kept / "reference") == []
    for message, file in ("job", kept / "job.json"), ("result", kept / "reference" / "result.json"):
        jsonschema.validate(json.loads(file.read_text()), json_schema(message))


def of_result(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "result.json"
        result = json.loads(file.read_text())
        change(result)
        file.write_text(json.dumps(result))

    return apply


def of_rows(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "decode.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return apply


def request_of(result: dict[str, Any], case: int = 0) -> dict[str, Any]:
    return result["cases"][case]["requests"][0]


def wide(tensors: dict[str, torch.Tensor]) -> None:
    tensors["logits"] = tensors["logits"].double()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda folder: (folder / "result.json").unlink(), "result.json: missing; the testee did not finish"),
        (lambda folder: (folder / "result.json").write_text("{"), "result.json: does not follow the protocol"),
        (of_result(lambda r: r.update(protocol_version="2.0")), "speaks version 2.0 of the protocol"),
        (of_result(lambda r: r.pop("protocol_version")), r"speaks version \(none\) of the protocol"),
        (of_result(lambda r: r.update(surprise=1)), "does not follow the protocol: surprise: Extra inputs are not"),
        (of_result(lambda r: r.update(layout="xp=2")), "'xp=2' is not one of tp=N"),
        (of_result(lambda r: request_of(r)["token_ids"].append(-1)), "case decode, request 0: -1 is no token id"),
        (of_result(lambda r: request_of(r)["token_ids"].append(2**40)), "request 0: 1099511627776 is no token id"),
        (of_result(lambda r: r["cases"].pop()), "cases decode, sampler were asked for, decode came"),
        (of_result(lambda r: r["cases"][0]["requests"].pop()), "case decode has 2 requests"),
        (lambda folder: (folder / "decode.safetensors").unlink(), "decode.safetensors: missing"),
        (lambda folder: (folder / "decode.safetensors").write_bytes(b"12"), "decode: .*does not follow the protocol"),
        (of_result(lambda r: request_of(r).update(logprobs=[])), "decode: request 0 has 0 logprobs, 12 were asked for"),
        (
            of_result(lambda r: request_of(r).update(logprobs=[0.5] * 12)),
            "decode: request 0 has logprobs that are none: NaN, or above 0",
        ),
        (
            of_result(lambda r: request_of(r).update(top_logprobs=[])),
            "decode: request 0 has the likeliest tokens beside 0",
        ),
        (of_result(lambda r: request_of(r)["token_ids"].pop()), "decode: request 0 has 11 tokens, 12 were asked for"),
        (of_result(lambda r: r["cases"][0].update(num_accepted_tokens=3)), "decode: 3 drafts were accepted, 0 were"),
        (of_rows(lambda t: t["logits.request"].fill_(7)), "decode: logits has rows of request 7, the case has 2"),
        (of_rows(lambda t: t["logits.position"].fill_(-1)), "decode: logits has rows at negative positions"),
        (of_rows(wide), "decode: logits is torch.float64"),
        (of_rows(lambda t: t.pop("logits.prefix")), "decode: no logits at all"),
    ],
    ids=range(21),
)
def test_what_does_not_is_named(kept: Path, tmp_path: Path, change: Change, problem: str) -> None:
    folder = shutil.copytree(kept / "reference", tmp_path / "reference")
    change(folder)
    found = "\n".join(problems(read_job(kept), folder)) + "\n"
    assert re.search(problem, found), found


def test_a_newer_minor_version_is_read(kept: Path, tmp_path: Path) -> None:
    """What is not known of it is passed over, at any depth. Twin: of this version it is refused."""
    folder = shutil.copytree(kept / "reference", tmp_path / "reference")
    of_result(lambda r: (r.update(new=1), request_of(r).update(newer=2), r.update(protocol_version="1.9")))(folder)
    known = read_result(kept / "reference").model_copy(update={"protocol_version": "1.9"})
    assert read_result(folder) == known
    of_result(lambda r: r.update(protocol_version="1.1"))(folder)
    with pytest.raises(ConformanceError, match="does not follow the protocol"):
        read_result(folder)


def test_the_protocol_is_that_of_its_version() -> None:
    """Whoever changes a message gives the protocol another version, and records it:

    dsv3 conformance schema job|result
    """
    assert json.loads(RECORDED.read_text()) == {message: json_schema(message) for message in ("job", "result")}


def test_command(kept: Path, tmp_path: Path) -> None:
    program = "core", Path(sys.executable).with_name("dsv3"), "conformance", "validate"
    done = warm(*program, kept / "reference")
    assert (done.returncode, done.stdout.split(": ")[-1]) == (0, "no problems (protocol 1.1)\n")
    folder = shutil.copytree(kept / "reference", tmp_path / "reference")
    of_result(lambda r: request_of(r).update(logprobs=[]))(folder)
    done = warm(*program, folder, "--job", kept)
    assert done.returncode == 1 and "decode: request 0 has 0 logprobs" in done.stdout
    assert done.stdout.endswith("reference: 2 problems (protocol 1.1)\n")
    done = warm(*program, tmp_path / "none")
    assert done.returncode == 2 and "none: no such folder; name a testee's" in done.stderr


def test_bad_input_is_one_line(kept: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for arguments, says in (
        ((kept,), f"{kept.parent}: holds no job.json; name the folder of the job with --job"),
        ((kept / "reference", "--job", tmp_path), f"{tmp_path}: holds no job.json; name the folder"),
        ((tmp_path / "none",), f"{tmp_path / 'none'}: no such folder; name a testee's"),
    ):
        assert run_cli(monkeypatch, "conformance", "validate", *arguments) == 2
        assert capsys.readouterr().err.startswith(f"error: {says}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (of_result(lambda r: r["cases"].pop()), "cases decode, sampler were asked for, decode came"),
        (of_result(lambda r: r["cases"][0]["requests"].pop()), "case decode has 2 requests"),
        (of_result(lambda r: request_of(r)["logprobs"].pop()), "decode/0 has log-probabilities of "),
    ],
)
def test_what_does_not_follow_it_is_not_diffed(kept: Path, tmp_path: Path, change: Change, says: str) -> None:
    shutil.copytree(kept, tmp_path / "run")
    read_side(tmp_path / "run" / "reference")
    change(tmp_path / "run" / "reference")
    with pytest.raises(DSV3Error, match=says):
        read_side(tmp_path / "run" / "reference")
