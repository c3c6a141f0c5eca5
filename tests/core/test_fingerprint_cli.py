"""`dsv3 fingerprint` of folders, and of stand-ins for servers; real servers are asked in the adapters' tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsv3_plugin.checkpoint.fingerprint import fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.make import make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.commands.cli import app
from dsv3_plugin.errors import EngineError


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["fingerprint", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


class StandIn(BaseHTTPRequestHandler):
    answers: dict[str, tuple[int, Any]]

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path, (404, {}))
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked == {"method": "dsv3_fingerprint"}
        self.do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), StandIn) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_folders(tiny_checkpoint, tmp_path: Path) -> None:
    one = tiny_checkpoint("bf16")
    other = make_checkpoint(read_config("tiny"), tmp_path / "other", 2).path
    expected = fingerprint_of_checkpoint(CheckpointReader(one))
    status, out, _ = run(one)
    assert status == 0 and out == f"{expected.digest}  {one} ({len(expected.tensors):,} tensors)\n"
    assert run(one, one)[0] == 0
    status, out, err = run(one, other, "--json")
    assert status == 1 and f"{other}: " in err and "tensors are not those of" in err
    assert json.loads(out)[str(one)]["digest"] == expected.digest
    status, out, _ = run(one, "--tensors")
    assert sorted(line.split() for line in out.splitlines()[1:]) == sorted([d, n] for n, d in expected.tensors.items())


def test_a_folder_as_it_is_held(tiny_checkpoint) -> None:
    wide = tiny_checkpoint("fp32")
    assert run(wide)[1].split()[0] != run(wide, "--dtype", "bfloat16")[1].split()[0]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_servers(tiny_checkpoint, server: str, engine: str) -> None:
    folder = tiny_checkpoint("bf16")
    held = fingerprint_of_checkpoint(CheckpointReader(folder)).model_dump()
    sglang = {"/server_info": (200, {"internal_states": [{"dsv3": {"fingerprint": held, "problem": None}}]})}
    vllm = {"/collective_rpc": (200, {"results": [held]}), "/server_info": (500, "of its own")}
    StandIn.answers = {"vllm": vllm, "sglang": sglang}[engine]
    status, out, _ = run(folder, server)
    assert status == 0 and out.count(held["digest"]) == 2
    name = next(iter(held["tensors"]))
    held["tensors"][name] = "0" * 16
    status, _, err = run(folder, f"{server}/")
    assert status == 1 and f"1 tensors are not those of {folder}: {name}" in err


def test_a_server_without_drafts_is_compared_in_what_it_holds(tiny_checkpoint, server: str) -> None:
    folder = tiny_checkpoint("bf16")
    held = fingerprint_of_checkpoint(CheckpointReader(folder)).model_dump()
    of_mtp = [name for name in held["tensors"] if name.startswith("model.layers.4.")]
    for name in of_mtp:
        del held["tensors"][name]
    StandIn.answers = {"/collective_rpc": (200, {"results": [held]})}
    for sources in (folder, server), (server, folder):
        status, _, err = run(*sources)
        assert status == 0 and f"{server}: drafts nothing and holds no MTP layer, whose {len(of_mtp)} tensors" in err
    held["tensors"]["model.norm.weight"] = "0" * 16
    assert run(folder, server)[0] == 1
    del held["tensors"]["model.norm.weight"]
    assert run(folder, server)[0] == 1


def _said(digest: str) -> dict[str, Any]:
    """What an SGLang rank says of a norm."""
    return {"dsv3": {"fingerprint": {"tensors": {"model.norm.weight": digest}}, "problem": None}}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "is no server of dsv3-plugin, or a vLLM without VLLM_SERVER_DEV_MODE=1"),
        ({"/server_info": (200, {"internal_states": [{}]})}, "is no server of dsv3-plugin"),
        (
            {"/server_info": (200, {"internal_states": [{"dsv3": {"fingerprint": None, "problem": "half done"}}]})},
            "its weights may not answer: half done",
        ),
        (
            {
                "/server_info": (
                    200,
                    {"internal_states": [_said("1"), {"dsv3": {"fingerprint": None, "problem": "no"}}]},
                )
            },
            "its weights may not answer: no",
        ),
        (
            {"/server_info": (200, {"internal_states": [_said("1"), _said("2")]})},
            "its ranks hold different weights: model.norm.weight",
        ),
        ({"/collective_rpc": (500, "CheckpointError: half done")}, "status 500: CheckpointError: half done"),
        ({"/collective_rpc": (200, {"results": [{"tensors": 3}]})}, "something else than a fingerprint"),
        ({"/collective_rpc": (200, "<html>")}, "something else than a fingerprint"),
    ],
)
def test_servers_that_do_not_say(server: str, answers: dict[str, tuple[int, Any]], message: str) -> None:
    StandIn.answers = answers
    with pytest.raises(EngineError, match=message):
        run(server)


def test_no_server() -> None:
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9/collective_rpc: no answer"):
        run("http://127.0.0.1:9")
