"""Servers as their own users start them, for a training loop: exact numbers, drafts, seeds, weight updates."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

from servers import SERVERS, Server

from dsv3_plugin.conformance import keeper
from dsv3_plugin.errors import EngineError
from dsv3_plugin.profile import attention_from_environment

ENVIRONMENTS = Path(__file__).parents[2] / ".envs"
START_S = 600.0
MODEL_LEN = 256


@dataclass(frozen=True)
class Launch:
    """How servers are started."""

    checkpoint: Path
    on_cpu: bool
    kv_tokens: int
    """The room of a server's cache: where the running requests outgrow it, some are preempted."""
    stock: bool = False
    """The engines' own DeepSeek-V3, without this plugin."""
    drafts: bool = True
    from_memory: bool = False
    """They are to take weights out of the trainer's memory."""
    environments: Path = ENVIRONMENTS
    """A folder with an environment for each engine; where it has none, this Python's."""
    options: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """More of each engine's own."""

    def python(self, name: str) -> Path:
        """Of an engine's environment."""
        python = self.environments / name / "bin" / "python"
        return python if python.exists() else Path(sys.executable)

    def require(self, name: str, address: str = "") -> None:
        """Raise `EngineError` where no server answers at an address, or without one an engine is not installed, or
        lacks what it is to do.
        """
        if address:
            if urlsplit(address).scheme not in ("http", "https") or not answers(SERVERS[name](address)):
                raise EngineError(f"--server {name}={address}: none answers there; write {name}=http://HOST:PORT")
            return
        if self.environments != ENVIRONMENTS and not self.environments.is_dir():
            raise EngineError(f"--environments {self.environments}: no such folder")
        python, needed = self.python(name), [name] if self.stock else [name, "dsv3_plugin"]
        if subprocess.run([python, "-c", _ARE_INSTALLED, *needed]).returncode:
            raise EngineError(
                f"--server {name}: {python} lacks {' or '.join(needed)}; --environments names a folder with an"
                f" environment {name}, or name a server that runs, {name}=http://HOST:PORT"
            )
        if name == "vllm" and self.from_memory and _of_vllm(python, _LACKS_RAY):
            raise EngineError("this vLLM's ipc imports ray: pip install ray beside it, or --hand-over files")

    def command(self, name: str, port: int) -> list[str]:
        """What a user types."""
        where = ["--host", "127.0.0.1", "--port", str(port)]
        line = self._vllm(where) if name == "vllm" else self._sglang(where)
        return [*line, *self.options.get(name, ())]

    def _vllm(self, where: list[str]) -> list[str]:
        python = self.python("vllm")
        line = [str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(self.checkpoint), *where]
        line += ["--logprobs-mode", "processed_logprobs", "--max-num-seqs", "64", "--max-model-len", str(MODEL_LEN)]
        if self.drafts:
            line += ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}']
        if self.from_memory:
            line += ["--weight-transfer-config", '{"backend": "ipc"}']
        if _of_vllm(python, _HAS_SCALE_OUT):
            line += ["--enable-scale-out"]
        # The prompts are short, and only whole blocks are shared.
        block_size = 2 if self.on_cpu and not self.stock else 64
        line += ["--block-size", str(block_size), "--num-gpu-blocks-override", str(self.kv_tokens // block_size)]
        # On a card that others use: the cache has its size, and nothing is measured.
        return line if self.on_cpu else [*line, "--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "1G"]

    def _sglang(self, where: list[str]) -> list[str]:
        line = [str(self.python("sglang")), "-m", "sglang.launch_server", "--model-path", str(self.checkpoint), *where]
        # Else a scheduler without requests polls for them, and a processor is lost to the trainer.
        line += ["--context-length", str(MODEL_LEN), "--sleep-on-idle"]
        if self.drafts:
            line += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "1"]
            line += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"]
        line += ["--max-running-requests", "64", "--max-total-tokens", str(self.kv_tokens)]
        if not self.stock:
            line += ["--attention-backend", "dsv3", "--enable-deterministic-inference"]
            if attention_from_environment() == "two_form":
                line += ["--disable-radix-cache"]
        # On a card that others use: the cache has its size, and this is how full they all may make it.
        more = ["--device", "cpu", "--disable-cuda-graph"] if self.on_cpu else ["--mem-fraction-static", "0.95"]
        return [*line, *more]

    def environment(self) -> dict[str, str]:
        """Of its process."""
        # Weights by HTTP: on a trusted network only.
        variables = os.environ | {"VLLM_SERVER_DEV_MODE": "1"}
        if self.from_memory:
            variables |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # handles are pickled
        if self.stock:
            variables |= {"DSV3_PLUGIN": "off"}
        if self.on_cpu:
            variables |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
            variables |= {"VLLM_MLA_DISABLE": "1"}  # else vLLM switches its prefix cache off
        return variables


def _of_vllm(python: Path, question: str) -> bool:
    """What an expression says over a Python's `vllm`, the folder, and `importlib.util`; False where it has none."""
    look = "import importlib.util, pathlib; vllm = pathlib.Path(importlib.util.find_spec('vllm').origin).parent"
    done = subprocess.run([python, "-c", f"{look}; print({question})"], capture_output=True, text=True)
    return done.stdout.strip().endswith("True")


_ARE_INSTALLED = (
    "import importlib.util, sys; sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))"
)
# Its route for token ids is behind an option; before, it was always there.
_HAS_SCALE_OUT = "'enable_scale_out' in (vllm / 'entrypoints/scale_out/factories.py').read_text()"
_LACKS_RAY = (
    "'\\nimport ray\\n' in (vllm / 'distributed/weight_transfer/ipc_engine.py').read_text()"
    " and importlib.util.find_spec('ray') is None"
)


_NEVER = Event()


@contextmanager
def started(name: str, launch: Launch, log: Path, ending: Event = _NEVER) -> Iterator[Server]:
    """A server that this program starts. However this program ends, the server ends with all its processes, by
    `dsv3_plugin.conformance.keeper`. Raises `EngineError` where it ends early, or this program, by `ending`, before it
    answers.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("w") as out:
        command = launch.command(name, port)
        kept = keeper.start("serve", *command, stdout=out, stderr=out, env=launch.environment())
    try:
        server = SERVERS[name](f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + START_S
        while not answers(server):
            if kept.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"{name} did not start; the reason is in {log}")
            if ending.wait(0.5):
                raise EngineError(f"{name} was not waited for")
        yield server
    finally:
        keeper.end(kept)


def answers(server: Server) -> bool:
    """Whether it is ready for requests."""
    try:
        urllib.request.urlopen(f"{server.address}/health", timeout=5).close()
    except OSError:
        return False
    return True


def exit_on_sigterm() -> None:
    """Leave this program by its `with` statements, which end the servers; asked again meanwhile, it goes on with that.
    `timeout` asks twice.
    """

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("SIGTERM: this run ends, its servers first", file=sys.stderr, flush=True)
        sys.exit(143)

    signal.signal(signal.SIGTERM, leave)
