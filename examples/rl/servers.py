"""The servers that a policy samples in, as their own users call them: vLLM and SGLang over HTTP.

Prompts and answers are token ids. Each answered token comes with its log-probability, and each answer with the version
of the weights that made it, which `update` names. Both servers draw by the seeds of the requests.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hand_over import Weights

from dsv3_plugin.checkpoint.fingerprint import Fingerprint
from dsv3_plugin.checkpoint.fingerprint_cli import fingerprint_of_server
from dsv3_plugin.errors import EngineError

TIMEOUT_S = 600.0
COUNTED = ("preempted", "drafted", "accepted", "cached")
"""Requests; tokens of drafts, those of them that were accepted; tokens of prompts that were not computed again."""


@dataclass(frozen=True)
class Request:
    """A prompt to be answered `n` times, with the seeds `seed`, `seed` + 1, ..."""

    token_ids: list[int]
    temperature: float
    max_tokens: int
    seed: int
    n: int = 1
    ignore_eos: bool = False


@dataclass(frozen=True)
class Answer:
    """What was sampled, the end token included, and what the server says of it."""

    token_ids: list[int]
    logprobs: list[float]
    version: str
    """Of the weights that sampled it."""
    finish_reason: str
    """`stop`, `length` or, where the client has hung up, `abort`."""


class Server:
    """What a training loop asks of a server. The subclasses know their engine's names."""

    name: str

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.requests = ThreadPoolExecutor(64, thread_name_prefix=self.name)

    def sample(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """The answers to each request, which are sent all at once."""
        return list(self.requests.map(self.answers, requests))

    def answers(self, request: Request) -> list[Answer]:
        """The `n` answers to a request."""
        raise NotImplementedError

    def hang_up(self, request: Request, tokens: int) -> Answer:
        """Close the connection once `tokens` tokens have come: what came, while the server aborts the rest."""
        raise NotImplementedError

    def update(self, folder: Path, version: str) -> None:
        """Take the weights of a checkpoint in place. Requests that come in the meantime wait for them, and none has
        tokens of both.
        """
        raise NotImplementedError

    def update_from_memory(self, weights: Weights, version: str) -> None:
        """The same with weights of a process on the server's host, and no file."""
        raise NotImplementedError

    def counters(self) -> Counter[str]:
        """Of `COUNTED`, since the start."""
        raise NotImplementedError

    def fingerprint(self) -> Fingerprint:
        """Of the weights that it holds, its draft's included."""
        return fingerprint_of_server(self.address)

    def kernels(self) -> dict[str, Any]:
        """What serves, as `Ops.record` has it."""
        raise NotImplementedError

    def profile(self) -> str:
        """The arithmetic that it computes in. Raises `EngineError` where it is not this package's."""
        try:
            return str(self.kernels()["profile"])
        except (KeyError, TypeError):
            raise EngineError(f"{self.name}: {self.address}: does not serve this plugin's model") from None

    def engine_version(self) -> str:
        """Of the engine."""
        raise NotImplementedError

    def get(self, path: str) -> Any:
        """The JSON that it answers. Raises `EngineError`."""
        with self.open(urllib.request.Request(self.address + path)) as response:
            return json.load(response)

    def post(self, path: str, body: object = None) -> Any:
        """The JSON that it answers. Raises `EngineError`."""
        with self.open(self.request(path, body)) as response:
            return json.load(response)

    def request(self, path: str, body: object = None) -> urllib.request.Request:
        """A POST."""
        data = b"" if body is None else json.dumps(body).encode()
        return urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})

    @contextmanager
    def open(self, request: urllib.request.Request) -> Iterator[Any]:
        """The response. Raises `EngineError`."""
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                yield response
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace").strip()
            raise EngineError(f"{self.name}: {request.full_url}: status {error.code}: {said[:500]}") from None
        except OSError as error:
            raise EngineError(f"{self.name}: {request.full_url}: {getattr(error, 'reason', error)}") from None

    def events(self, path: str, body: object) -> Iterator[Any]:
        """The JSON objects of a stream; the connection is closed where the caller stops reading."""
        with self.open(self.request(path, body)) as response:
            for line in response:
                text = line.decode().strip().removeprefix("data: ")
                if text and text != "[DONE]":
                    yield json.loads(text)


class Vllm(Server):
    """`vllm serve`. Before 0.32 no answer says which weights made it. They are then those of the last update: it waits
    for the requests that run.
    """

    name = "vllm"
    route = "/inference/v1/generate"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.held = "unknown"

    def answers(self, request: Request) -> list[Answer]:
        """One request with vLLM's `n`."""
        choices = self.post(self.route, self._body(request))["choices"]
        return [self._answer([choice]) for choice in sorted(choices, key=lambda choice: choice["index"])]

    def hang_up(self, request: Request, tokens: int) -> Answer:
        """The chunks of a stream are what is new."""
        chunks: list[Any] = []
        for event in self.events(self.route, self._body(request) | {"stream": True}):
            chunks += event["choices"]
            if sum(len(chunk["token_ids"] or ()) for chunk in chunks) >= tokens:
                break
        # Of a stream only the end says which weights made it; nobody updates them now.
        return self._answer(chunks, {"finish_reason": "abort", "weight_versions": [{"version": self.held}]})

    def _body(self, request: Request) -> dict[str, Any]:
        names = ("temperature", "max_tokens", "seed", "n", "ignore_eos")
        settings = {name: getattr(request, name) for name in names} | {"logprobs": 0}
        return {"token_ids": request.token_ids, "sampling_params": settings}

    def _answer(self, chunks: list[Any], end: dict[str, Any] | None = None) -> Answer:
        end = end or chunks[-1]
        spans = end.get("weight_versions") or [{"version": self.held}]
        content = [token for chunk in chunks for token in (chunk["logprobs"] or {"content": ()})["content"]]
        return Answer(
            [token for chunk in chunks for token in chunk["token_ids"] or ()],
            [token["logprob"] for token in content],
            one_version(self.name, [span["version"] for span in spans]),
            end["finish_reason"],
        )

    def update(self, folder: Path, version: str) -> None:
        """By vLLM's reload."""
        with self.updating(version):
            self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    def update_from_memory(self, weights: Weights, version: str) -> None:
        """By vLLM's weight transfer, which takes the target's weights and then the draft's."""
        with self.updating(version):
            self.post("/init_weight_transfer_engine", {"init_info": {}})
            for start in ("/start_weight_update", "/start_draft_weight_update"):
                is_draft = start == "/start_draft_weight_update"
                if is_draft and weights.of_draft is None:
                    continue
                self.post(start)
                for bucket in weights.buckets(draft=is_draft):
                    self.post("/update_weights", bucket.for_vllm())
                self.post("/finish_weight_update")

    @contextmanager
    def updating(self, version: str) -> Iterator[None]:
        """Between a pause, which waits for the requests that run, and its end."""
        self.post("/pause?mode=wait")
        try:
            yield
            if self.tells_versions():
                self.post("/update_weight_version", {"new_version": version})
            self.held = version
        finally:
            self.post("/resume")

    def tells_versions(self) -> bool:
        """Whether its answers do."""
        try:
            self.get("/weight_info")
        except EngineError:
            return False
        return True

    def kernels(self) -> dict[str, Any]:
        """Of its first worker."""
        found: dict[str, Any] = self.post("/collective_rpc", {"method": "dsv3_provenance"})["results"][0]["main"]
        return found

    def engine_version(self) -> str:
        """vLLM's."""
        return str(self.get("/version")["version"])

    def counters(self) -> Counter[str]:
        """Of its metrics."""
        with self.open(urllib.request.Request(f"{self.address}/metrics")) as response:
            text = response.read().decode()
        names = {
            "preempted": "num_preemptions",
            "drafted": "spec_decode_num_draft_tokens",
            "accepted": "spec_decode_num_accepted_tokens",
            "cached": "prefix_cache_hits",
        }
        found = {name: re.findall(rf"^vllm:{metric}_total\S* (\S+)$", text, re.M) for name, metric in names.items()}
        return Counter({name: sum(int(float(value)) for value in values) for name, values in found.items()})


class Sglang(Server):
    """`python -m sglang.launch_server`."""

    name = "sglang"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.seen: Counter[str] = Counter()
        self.turn = threading.Condition()
        self.asking = 0
        """Requests under way."""
        self.is_updating = False

    def answers(self, request: Request) -> list[Answer]:
        """As many prompts as answers: SGLang's `n` gives all of them one seed."""
        count = range(request.n)
        settings = [self._settings(request) | {"sampling_seed": request.seed + i} for i in count]
        body = {"input_ids": [request.token_ids for _ in count], "sampling_params": settings, "return_logprob": True}
        with self.between_updates():
            return [self._answer(answer) for answer in self.post("/generate", body)]

    def hang_up(self, request: Request, tokens: int) -> Answer:
        """An event of a stream has all that came so far."""
        settings = self._settings(request) | {"sampling_seed": request.seed}
        body = {"input_ids": request.token_ids, "sampling_params": settings, "return_logprob": True, "stream": True}
        event: Any = None
        with self.between_updates():
            for event in self.events("/generate", body):
                if len(event["output_ids"]) >= tokens:
                    break
            return self._answer(event, "abort")

    def _settings(self, request: Request) -> dict[str, Any]:
        names = {"temperature": "temperature", "max_tokens": "max_new_tokens", "ignore_eos": "ignore_eos"}
        return {theirs: getattr(request, ours) for ours, theirs in names.items()}

    def _answer(self, answer: Any, finish_reason: str | None = None) -> Answer:
        about = answer["meta_info"]
        reason = finish_reason or about["finish_reason"]["type"]
        if reason == "abort" and finish_reason is None:
            raise EngineError(f"{self.name}: {about['finish_reason'].get('message')}")
        self.seen.update(
            preempted=about.get("num_retractions", 0),
            drafted=about.get("spec_num_proposed_drafts", 0),
            accepted=about.get("spec_num_correct_drafts", 0),
            cached=about["cached_tokens"],
        )
        spans = about.get("weight_versions") or [{"version": about["weight_version"]}]
        versions = [span["version"] for span in spans]
        logprobs = [logprob for logprob, *_ in about["output_token_logprobs"]]
        return Answer(answer["output_ids"], logprobs, one_version(self.name, versions), reason)

    def update(self, folder: Path, version: str) -> None:
        """SGLang itself waits for the requests that run, and lets others wait."""
        self.post("/update_weights_from_disk", {"model_path": str(folder), "weight_version": version})

    def update_from_memory(self, weights: Weights, version: str) -> None:
        """SGLang's pauses wait for nobody, and without one it answers between two buckets: so this waits here for the
        requests under way. Those of other clients are aborted.
        """
        with self.updating():
            self.post("/pause_generation", {"mode": "abort"})
            try:
                if self.has_sessions:
                    self.post("/begin_weight_update", {})
                for bucket in weights.buckets():
                    self.post("/update_weights_from_tensor", bucket.for_sglang(version))
                if self.has_sessions:
                    self.post("/end_weight_update", {})
            finally:
                self.post("/continue_generation", {})

    @cached_property
    def has_sessions(self) -> bool:
        """Whether an update has a begin and an end: from SGLang 0.5.23 on."""
        return "/begin_weight_update" in self.get("/openapi.json")["paths"]

    @contextmanager
    def between_updates(self) -> Iterator[None]:
        """A request of this client."""
        with self.turn:
            self.turn.wait_for(lambda: not self.is_updating)
            self.asking += 1
        try:
            yield
        finally:
            with self.turn:
                self.asking -= 1
                self.turn.notify_all()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """No request of this client is under way, and those that come wait."""
        with self.turn:
            self.is_updating = True
            self.turn.wait_for(lambda: not self.asking)
        try:
            yield
        finally:
            with self.turn:
                self.is_updating = False
                self.turn.notify_all()

    def kernels(self) -> dict[str, Any]:
        """Of its first scheduler."""
        found: dict[str, Any] = self.get("/server_info")["internal_states"][0]["dsv3"]["main"]
        return found

    def engine_version(self) -> str:
        """SGLang's."""
        return str(self.get("/server_info")["version"])

    def counters(self) -> Counter[str]:
        """Of what its answers said."""
        return Counter(self.seen)


def counted(servers: Sequence[Server]) -> dict[str, int]:
    """The counters of all servers together."""
    counters = [server.counters() for server in servers]
    return {name: sum(counter[name] for counter in counters) for name in COUNTED}


SERVERS: dict[str, type[Server]] = {server.name: server for server in (Vllm, Sglang)}


def one_version(name: str, versions: list[str]) -> str:
    """Raises `EngineError` for an answer of several."""
    if len(set(versions)) != 1:
        raise EngineError(f"{name}: an answer has tokens of the weights {' and '.join(versions)}")
    return str(versions[0])
