"""One vLLM engine with drafts, updated by every call that trainers make; prints what it answers after each update.

    python vllm_updates.py JOB.json

Run by an engine's environment. The job: {"checkpoints": [folder, ...], "updates": n, "dummy": bool}. Update i brings
the weights of checkpoint i % len(checkpoints). Requests are running all the time. On standard output, a JSON object a
line: what a probe was answered, the fingerprint, and a digest of the draft's logits.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

import torch
from draft_probe import draft_digest
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

Tensors = dict[str, torch.Tensor]
PROMPT = list(range(300, 340))


@dataclass
class _Init(WeightTransferInitInfo):
    pass


@dataclass
class _Update(WeightTransferUpdateInfo):
    tensors: Tensors


class InProcess(WeightTransferEngine[_Init, _Update]):
    """What `nccl` and `ipc` do to a model; the transport is this process. Theirs need a GPU."""

    init_info_cls = _Init
    update_info_cls = _Update

    def init_transfer_engine(self, init_info: _Init) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: _Update) -> None:
        self.model.load_weights(list(update_info.tensors.items()))
        # The trainer's buffers are used again.
        for tensor in update_info.tensors.values():
            tensor.view(torch.uint8).fill_(255)

    def shutdown(self) -> None: ...

    @staticmethod
    def trainer_send_weights(*args: Any) -> None:
        """Abstract in versions before 0.32."""


WeightTransferEngineFactory.register_engine("in_process", InProcess)


class Trainer:
    """Sends weights in its own order, by each of vLLM's calls in turn."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.ways = [self.by_path, self.by_iterator, self.by_buckets, self.by_transfer]

    def send(self, folder: str, i: int) -> str:
        way = self.ways[i % len(self.ways)]
        tensors = shuffled(folder, i)
        way(folder, tensors)
        return way.__name__

    def by_path(self, folder: str, tensors: Tensors) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})

    def by_iterator(self, folder: str, tensors: Tensors) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})

    def by_buckets(self, folder: str, tensors: Tensors) -> None:
        """verl: each bucket to target and draft, and no end."""
        for bucket in buckets(tensors):
            self.llm.collective_rpc(load_bucket, args=(list(bucket.items()),))

    def by_transfer(self, folder: str, tensors: Tensors) -> None:
        """Under `vllm serve` POST /start_weight_update and so on."""
        for start in ("start_weight_update", "start_draft_weight_update"):
            self.llm.collective_rpc(start)
            for bucket in buckets(tensors):
                self.llm.collective_rpc("update_weights", args=({"tensors": bucket},))
            self.llm.collective_rpc("finish_weight_update")


def load_bucket(worker: Any, bucket: list[tuple[str, torch.Tensor]]) -> None:
    worker.model_runner.model.load_weights(bucket)
    worker.model_runner.drafter.model.load_weights(bucket)


def shuffled(folder: str, seed: int) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return dict(random.Random(seed).sample(sorted(tensors.items()), len(tensors)))


def buckets(tensors: Tensors) -> Iterator[Tensors]:
    size = 25
    names = list(tensors)
    for first in range(0, len(names), size):
        yield {name: tensors[name].clone() for name in names[first : first + size]}


def halves(folder: str) -> Iterator[list[tuple[str, torch.Tensor]]]:
    items = list(shuffled(folder, 0).items())
    yield from (items[: len(items) // 2], items[len(items) // 2 :])


class Probe:
    """Asks the engine and its draft."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.addresses: dict[str, int] | None = None

    def places(self) -> dict[str, int]:
        target, draft = self.worker.model_runner.model, self.worker.model_runner.drafter.model
        tensors = dict(target.named_parameters()) | {f"draft.{name}": p for name, p in draft.named_parameters()}
        for i, layer in enumerate((*target.model.layers.values(), draft.model.layer)):
            tensors |= {f"derived.{i}.{j}": tensor for j, tensor in enumerate(layer.self_attn.absorbed_weights())}
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def ask(self) -> dict[str, Any]:
        """A greedy request with log-probabilities, alone in the engine but for what runs there."""
        engine = self.llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, detokenize=False)
        engine.add_request("probe", {"prompt_token_ids": PROMPT}, params)
        output = None
        while output is None:
            output = next((o for o in engine.step() if o.request_id == "probe" and o.finished), None)
        answer = output.outputs[0]
        self.addresses = self.addresses or self.places()
        draft = self.worker.model_runner.drafter.model
        shared = self.worker.model_runner.model.lm_head is draft.lm_head is draft.model.lm_head
        return {
            "token_ids": list(answer.token_ids),
            "logprobs": [step[t].logprob for t, step in zip(answer.token_ids, answer.logprobs, strict=True)],
            "fingerprint": self.llm.collective_rpc("dsv3_fingerprint")[0],
            "draft": draft_digest(draft.model, draft.config),
            "same_addresses": self.places() == self.addresses and shared,
        }


def error_of(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def across(llm: LLM, update: Callable[[], object]) -> dict[str, Any]:
    """What a greedy request was answered that `update` finds under way, with two tokens."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0, detokenize=False)
    llm.llm_engine.add_request("across", {"prompt_token_ids": PROMPT}, params)
    outputs: list[Any] = []

    def step() -> None:
        outputs.extend(o.outputs[0] for o in llm.llm_engine.step() if o.request_id == "across")

    while not outputs or len(outputs[-1].token_ids) < 2:
        step()
    old = len(outputs[-1].token_ids)
    update()
    while outputs[-1].finish_reason is None:
        step()
    answer = outputs[-1]
    return {
        "old": old,
        "token_ids": list(answer.token_ids),
        "logprobs": [step[t].logprob for t, step in zip(answer.token_ids, answer.logprobs, strict=True)],
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }


def run_requests(llm: LLM) -> None:
    """Two requests that the next update finds under way."""
    llm.llm_engine.abort_request(["running-0", "running-1"])
    params = SamplingParams(temperature=0.8, max_tokens=300, ignore_eos=True, detokenize=False)
    for i in range(2):
        llm.llm_engine.add_request(f"running-{i}", {"prompt_token_ids": PROMPT[i : 30 + 5 * i]}, params)
    for _ in range(3):
        llm.llm_engine.step()


def say(**what: Any) -> None:
    print("TOLD " + json.dumps(what), flush=True)


def main(job: dict[str, Any]) -> None:
    checkpoints = job["checkpoints"]
    llm = LLM(
        model=checkpoints[0],
        dtype="bfloat16",
        load_format="dummy" if job["dummy"] else "auto",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
        logprobs_mode="processed_logprobs",
        speculative_config={"method": "mtp", "num_speculative_tokens": 1},
        weight_transfer_config=WeightTransferConfig(backend="in_process"),
    )
    trainer, probe = Trainer(llm), Probe(llm)
    llm.collective_rpc("init_weight_transfer_engine", args=({},))
    if not job["dummy"]:
        say(way="start", **probe.ask())
    else:
        # verl's start: the first weights come in buckets.
        trainer.by_buckets(checkpoints[0], shuffled(checkpoints[0], 0))
        say(way="dummy", **probe.ask())
    for i in range(1, job["updates"] + 1):
        run_requests(llm)
        way = trainer.send(checkpoints[i % len(checkpoints)], i)
        say(way=way, **probe.ask())

    # Requests that run, and the cached prefix of the probe's: each token is of the weights that were there.
    newest = checkpoints[(job["updates"] + 1) % len(checkpoints)]
    last = checkpoints[job["updates"] % len(checkpoints)]
    for way, folder in (("by_path", newest), ("by_buckets", last), ("by_transfer", newest), ("by_iterator", last)):
        update = partial(getattr(trainer, way), folder, shuffled(folder, 0))
        say(way=f"across {way}", **across(llm, update))
    first, rest = (list(half) for half in halves(last))
    say(way="across half", **across(llm, lambda: llm.collective_rpc(load_bucket, args=(first,))))
    llm.collective_rpc(load_bucket, args=(rest,))
    say(way="across rest", **probe.ask())
    missing = error_of(lambda: llm.collective_rpc("reload_weights", kwargs={"weights_path": "/no/such/folder"}))
    say(way="no folder", refusal=missing, **probe.ask())

    # Refused before anything is written: the weights of the last update answer.
    old, new = (checkpoints[(job["updates"] + i) % len(checkpoints)] for i in range(2))
    tensors = shuffled(new, 0)
    wrong = dict(tensors)
    name = next(name for name in wrong if name.endswith("kv_b_proj.weight"))
    wrong[name] = wrong[name][:-1]
    send = partial(llm.collective_rpc, "update_weights")
    llm.collective_rpc("start_weight_update")
    refusal = error_of(lambda: send(args=({"tensors": wrong},)))
    say(way="wrong tensor", refusal=refusal, **probe.ask())
    llm.collective_rpc("start_weight_update")
    refusal = error_of(lambda: llm.collective_rpc("finish_weight_update"))
    say(way="nothing", refusal=refusal, **probe.ask())
    refusal = error_of(lambda: llm.collective_rpc("reload_weights", kwargs={"weights_path": job["broken"]}))
    say(way="broken folder", refusal=refusal, **probe.ask())
    refusal = error_of(lambda: llm.collective_rpc("reload_weights", kwargs={"weights_path": job["another"]}))
    say(way="another model", refusal=refusal, **probe.ask())
    kernel_format = {"weights_iterator": iter(()), "is_checkpoint_format": False}
    refusal = error_of(lambda: llm.collective_rpc("reload_weights", kwargs=kernel_format))
    say(way="kernel format", refusal=refusal, **probe.ask())

    # A mixture answers nobody, and the next whole update ends it.
    def killed() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(tensors.items())[: len(tensors) // 2]
        raise ConnectionError("the sender is gone")

    refusal = error_of(lambda: llm.collective_rpc("reload_weights", kwargs={"weights_iterator": killed()}))
    fingerprint = error_of(lambda: llm.collective_rpc("dsv3_fingerprint"))
    say(way="killed sender", refusal=refusal, fingerprint=fingerprint)
    trainer.by_transfer(new, tensors)
    say(way="again", **probe.ask())

    llm.collective_rpc("start_weight_update")
    half = next(buckets(shuffled(old, 1)))
    send(args=({"tensors": half},))
    refusal = error_of(lambda: llm.collective_rpc("finish_weight_update"))
    prompt = {"prompt_token_ids": PROMPT}
    answer = llm.generate([prompt], SamplingParams(detokenize=False), use_tqdm=False)[0].outputs[0]
    say(way="half", refusal=refusal, token_ids=answer.token_ids, ended=[answer.finish_reason, answer.stop_reason])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
