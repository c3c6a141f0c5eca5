"""The SGLang testee, started on one checkpoint and updated to that of its job, in SGLang's own environment.

`python tests/support/sglang_updates.py JOB RESULT`: `OTHER` names the checkpoint that it starts on, `UPDATES` how many
updates it gets, by all calls in turn, while requests run. What it sees goes to `RECORD` as one JSON object.

`python tests/support/sglang_updates.py send PORT FOLDER ...` is a trainer that sends checkpoints through a process
group: as one flat tensor a bucket where a name ends with `+`; where one ends with `!`, it kills itself in the middle.
gloo takes no fp8 tensors but flat ones.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch.multiprocessing import reductions

GROUP = "trainer"
NAMES_A_BUCKET = 40
MTP_STEPS = 2


def buckets_of(folder: str) -> list[dict[str, torch.Tensor]]:
    """A checkpoint's tensors in buckets; both ends of a group cut them alike."""
    tensors = load_file(f"{folder}/model.safetensors")
    names = iter(sorted(tensors, key=lambda name: name[::-1]))
    return [
        {name: tensors[name] for name in bucket}
        for bucket in iter(lambda: [*itertools.islice(names, NAMES_A_BUCKET)], [])
    ]


def send(port: str, *folders: str) -> None:
    """Join a server's group as its trainer, and broadcast."""
    from torch.distributed import distributed_c10d as c10d

    store, rank, size = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 0, 2, timeout=c10d.default_pg_timeout))
    prefixed = c10d.PrefixStore(GROUP, store)
    group, _ = c10d._new_process_group_helper(
        size, rank, [], c10d.Backend("gloo"), prefixed, group_name=GROUP, timeout=c10d.default_pg_timeout
    )
    c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    for folder in folders:
        for number, bucket in enumerate(buckets_of(folder.rstrip("!+"))):
            tensors = list(bucket.values())
            if "+" in folder:
                tensors = [torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])]
            for sent, tensor in enumerate(tensors):
                if folder.endswith("!") and number and sent == len(tensors) // 2:
                    os._exit(0)
                torch.distributed.broadcast(tensor, src=0, group=group)


class Trainer:
    """Brings new weights to a scheduler in this process, by the calls that it answers."""

    def __init__(self, scheduler: Any) -> None:
        from sglang.srt.managers import io_struct

        self.scheduler, self.manager, self.io = scheduler, scheduler.weight_updater, io_struct
        self.draw = random.Random(0)
        self.sender: subprocess.Popen[bytes] | None = None

    def from_disk(self, folder: str, load_format: str | None = None) -> Any:
        request = self.io.UpdateWeightFromDiskReqInput(model_path=folder, load_format=load_format)
        return self.manager.update_weights_from_disk(request)

    def bucket(self, tensors: Any, load_format: str | None = None, **options: Any) -> Any:
        from sglang.srt.utils import MultiprocessingSerializer

        # What SGLang puts in its place to read from a GPU serializes nothing on a CPU.
        reduce = getattr(reductions, "_reduce_tensor_original", reductions.reduce_tensor)
        ForkingPickler.register(torch.Tensor, reduce)
        return self.manager.update_weights_from_tensor(
            self.io.UpdateWeightsFromTensorReqInput(
                serialized_named_tensors=[MultiprocessingSerializer.serialize(tensors)],
                load_format=load_format,
                **options,
            )
        )

    def from_tensor(self, folder: str) -> Any:
        """All in one bucket."""
        return self.in_session(lambda: self.bucket(list(load_file(f"{folder}/model.safetensors").items())))

    def from_buckets(self, folder: str, load_format: str | None = None) -> Any:
        """In any order."""
        buckets = buckets_of(folder)
        self.draw.shuffle(buckets)
        return self.in_session(*(lambda b=bucket: self.bucket(list(b.items()), load_format) for bucket in buckets))

    def direct(self, folder: str) -> Any:
        return self.from_buckets(folder, "direct")

    def flattened(self, folder: str) -> Any:
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        def flat(bucket: dict[str, torch.Tensor]) -> Any:
            made = FlattenedTensorBucket(named_tensors=list(bucket.items()))
            tensors = {"flattened_tensor": made.get_flattened_tensor(), "metadata": made.get_metadata()}
            return self.bucket(tensors, "flattened_bucket", flush_cache=False)

        return self.in_session(*(lambda b=bucket: flat(b) for bucket in buckets_of(folder)))

    def in_session(self, *buckets: Callable[[], Any]) -> Any:
        """The last answer, or the first that is no success; between SGLang 0.5.23's begin and end."""
        begun = hasattr(self.manager, "begin_weight_update")
        if begun:
            self.manager.begin_weight_update(self.io.BeginWeightUpdateReqInput())
        answers = [bucket() for bucket in buckets]
        if begun:
            answers.append(self.manager.end_weight_update(self.io.EndWeightUpdateReqInput()))
        return next((answer for answer in answers if not answer.success), answers[-1])

    def join(self, *folders: str) -> None:
        """A trainer's process joins."""
        from sglang.srt.utils.network import get_open_port

        port = get_open_port()
        self.sender = subprocess.Popen([sys.executable, __file__, "send", str(port), *folders])
        request = self.io.InitWeightsUpdateGroupReqInput(
            master_address="127.0.0.1", master_port=port, rank_offset=1, world_size=2, group_name=GROUP, backend="gloo"
        )
        answer = self.manager.init_weights_update_group(request)
        assert answer.success, answer.message

    def leave(self) -> None:
        self.manager.destroy_weights_update_group(self.io.DestroyWeightsUpdateGroupReqInput(group_name=GROUP))
        assert self.sender is not None
        self.sender.wait(60)

    def from_distributed(self, folder: str, load_format: str | None = None) -> Any:
        def receive(bucket: dict[str, torch.Tensor]) -> Any:
            request = self.io.UpdateWeightsFromDistributedReqInput(
                names=list(bucket),
                dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in bucket.values()],
                shapes=[list(tensor.shape) for tensor in bucket.values()],
                group_name=GROUP,
                load_format=load_format,
            )
            return self.manager.update_weights_from_distributed(request)

        return self.in_session(*(lambda b=bucket: receive(b) for bucket in buckets_of(folder)))


class Client:
    """Requests to a scheduler in this process, and which weights each of their tokens was sampled with."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.numbers = itertools.count(1000)

    def submit(self, prompt: list[int], **params: Any) -> Any:
        from sglang.srt.sampling.sampling_params import SamplingParams

        from dsv3_plugin.conformance.protocol import Request
        from dsv3_plugin.conformance.testees.sglang import tokenized_request

        request = Request(prompt_token_ids=tuple(prompt), max_tokens=1)
        tokenized = tokenized_request(next(self.numbers), request, False)
        tokenized.sampling_params = SamplingParams(**{"temperature": 0, "ignore_eos": True} | params)
        tokenized.sampling_params.normalize(None)
        tokenized.return_logprob = True
        self.scheduler.process_input_requests([tokenized])
        return self.scheduler.waiting_queue[-1]

    def turns(self, count: int | None = None) -> None:
        from dsv3_plugin.conformance.testees.sglang import steps

        for _ in itertools.islice(steps(self.scheduler), count):
            pass

    def finish(self, request: Any) -> dict[str, Any]:
        """What a request was answered, once it is."""
        while not request.finished():
            self.turns(2)
        return answer(request)


def answer(request: Any) -> dict[str, Any]:
    end = request.finished_reason
    return {
        "token_ids": list(request.origin_input_ids) + list(request.output_ids_through_stop),
        # SGLang verifies a step to its end, also beyond the last token that a request asked for.
        "logprobs": list(request.logprob.output_token_logprobs_val)[: len(request.output_ids_through_stop)],
        "drafts": [request.spec_verify_ct, request.spec_num_correct_drafts],
        "error": getattr(end, "message", None),
    }


class MemorySaver:
    """Stands in for the library that gives a card's memory away: what comes back holds anything."""

    enabled = True

    def __init__(self, *models: Any) -> None:
        self.models = models

    @torch.no_grad()
    def pause(self, tag: str) -> None:
        if tag == "weights":
            for model in self.models:
                for tensor in (*model.parameters(), *model.buffers()):
                    tensor.copy_(torch.full_like(tensor, 100.0))

    def resume(self, tag: str) -> None:
        pass


def buffers(*models: Any) -> list[torch.Tensor]:
    return [buffer.clone() for model in models for buffer in model.buffers()]


def release(trainer: Trainer, *models: Any) -> list[torch.Tensor]:
    """Give the memory of everything away; returns what the buffers held."""
    held = buffers(*models)
    trainer.manager.memory_saver_adapter = MemorySaver(*models)
    trainer.manager.release_memory_occupation(trainer.io.ReleaseMemoryOccupationReqInput())
    return held


def resume(trainer: Trainer) -> None:
    trainer.manager.resume_memory_occupation(trainer.io.ResumeMemoryOccupationReqInput())


PROMPT = [(7 * i * i + 13 * i + 5) % 700 + 300 for i in range(24)]


def run_updates(scheduler: Any, other: str, right: str, updates: int) -> dict[str, Any]:
    """Starts with the weights of `other`, and ends with those of `right`."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    trainer, client = Trainer(scheduler), Client(scheduler)
    io = trainer.io
    target, draft = scheduler.tp_worker.model_runner.model, scheduler.draft_worker.draft_worker.draft_runner.model

    def addresses() -> list[int]:
        """Of all that a CUDA graph may read."""
        modules = [module for model in (target, draft) for module in model.modules()]
        derived = [tensor for module in modules for tensor in getattr(module, "_absorbed", None) or ()]
        parameters = [tensor for model in (target, draft) for tensor in (*model.parameters(), *model.buffers())]
        return [tensor.data_ptr() for tensor in parameters + derived]

    record: dict[str, Any] = {"updates": [], "refusals": []}
    folders = itertools.cycle((right, other))

    def state() -> dict[str, Any]:
        return scheduler.get_internal_state(io.GetInternalStateReq()).internal_state["dsv3"]

    def digest() -> str | None:
        held = state()["fingerprint"]
        return held and held["digest"]

    def probe() -> dict[str, Any]:
        return client.finish(client.submit(PROMPT, max_new_tokens=5))

    started = probe() | {"fingerprint": digest()}
    record["start"] = started
    before = addresses()
    # Requests that run through all updates, and which update each of their tokens comes after.
    running = [
        client.submit(PROMPT, max_new_tokens=400),
        client.submit(PROMPT[3:], max_new_tokens=400, temperature=0.8),
    ]
    spans: list[list[int]] = [[], []]
    plain = (None, "") if draft.ops.setting.profile.name != "fp8" else ("flattened_bucket", "+")
    trainer.join(right + plain[1], other + "+")
    ways = [
        ("distributed", lambda folder: trainer.from_distributed(folder, plain[0])),
        ("distributed flattened", lambda folder: trainer.from_distributed(folder, "flattened_bucket")),
        ("disk", trainer.from_disk),
        ("tensor", trainer.from_tensor),
        ("buckets", trainer.from_buckets),
        ("direct", trainer.direct),
        ("flattened", trainer.flattened),
    ]
    for number in range(updates):
        way, update = ways[number] if number < 2 else ways[2 + number % 5]
        folder = next(folders)
        client.turns(2)
        for span, request in zip(spans, running, strict=True):
            span.append(len(request.output_ids))
        if number == 2:
            trainer.leave()
        if number % 3 == 2:
            # Paused in place, SGLang would go on with what the requests computed before.
            scheduler.pause_generation(io.PauseGenerationReqInput(mode="in_place"))
        done = update(folder)
        if number % 3 == 2:
            scheduler.continue_generation(io.ContinueGenerationReqInput(torch_empty_cache=False))
        served = {"way": way, "folder": folder, "success": done.success, "message": done.message}
        record["updates"].append(served | {"fingerprint": digest()} | probe())
    record["running"] = [answer(request) | {"spans": span} for request, span in zip(running, spans, strict=True)]
    record["in_place"] = addresses() == before
    scheduler.abort_request(io.AbortReq(abort_all=True))
    client.turns()

    # Each of these leaves the old weights, or nothing that answers; then all weights come again.
    def refusal(name: str, attempt: Callable[[], list[Any]]) -> None:
        last = record["updates"][-1]
        request = client.submit(PROMPT, max_new_tokens=40)
        client.turns(2)
        answers = [item.message for item in attempt() if not item.success]
        seen = {"name": name, "messages": answers, "problem": state()["problem"], "fingerprint": digest()}
        seen |= {"running": client.finish(request), "probe": probe(), "before": last["fingerprint"]}
        scheduler.pause_generation(io.PauseGenerationReqInput(mode="retract"))
        done = trainer.from_tensor(last["folder"])
        scheduler.continue_generation(io.ContinueGenerationReqInput(torch_empty_cache=False))
        assert done.success, done.message
        seen["after"] = digest()
        record["refusals"].append(seen)

    tensors = load_file(f"{other}/model.safetensors")
    names = list(tensors)

    def folder_with(tensors: dict[str, torch.Tensor], **config: Any) -> str:
        folder = Path(tempfile.mkdtemp(dir=os.environ["TMP_FOLDER"])) / "checkpoint"
        shutil.copytree(other, folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return str(folder)

    def in_session(*buckets: list[tuple[str, torch.Tensor]]) -> list[Any]:
        results: list[Any] = []
        results.append(
            trainer.in_session(*(lambda b=b: results.append(trainer.bucket(b)) or results[-1] for b in buckets))
        )
        return results

    without = {name: tensor for name, tensor in tensors.items() if name != "model.layers.1.mlp.gate.weight"}
    half = [(name, tensors[name]) for name in names[::2]]
    rest = [(name, tensors[name]) for name in names[1::2]]
    wrong = [(names[1], tensors[names[1]][:1])]
    refusal("folder lacks a tensor", lambda: [trainer.from_disk(folder_with(without))])
    refusal("folder of another model", lambda: [trainer.from_disk(folder_with(tensors, routed_scaling_factor=2.0))])
    refusal("no such folder", lambda: [trainer.from_disk("/nowhere")])
    refusal("dummy weights", lambda: [trainer.from_disk(other, "dummy")])
    refusal("wrong first tensor", lambda: in_session(wrong))
    refusal("unknown format", lambda: [trainer.in_session(lambda: trainer.bucket(half, "made_up"))])
    refusal("half", lambda: in_session(half))
    refusal("wrong in the middle", lambda: in_session(half, wrong, rest))
    refusal("twice", lambda: in_session(half, half[:3]))

    def killed() -> list[Any]:
        trainer.join(other + plain[1] + "!")
        done = trainer.from_distributed(other, plain[0])
        trainer.leave()
        return [done]

    refusal("killed sender", killed)
    held = release(trainer, target, draft)
    record["released"] = [state()["problem"]]
    request = client.submit(PROMPT, max_new_tokens=5)
    record["released"].append(client.finish(request)["error"])
    resume(trainer)
    record["released"].append(state()["problem"])
    assert trainer.from_tensor(record["updates"][-1]["folder"]).success
    record["resumed"] = {"buffers": all(map(torch.equal, held, buffers(target, draft)))} | probe()

    scheduler.weight_updater.check_weights(io.CheckWeightsReqInput(action="reset_tensors"))
    record["reset"] = state()["problem"]
    record["last"] = {"success": trainer.from_disk(right).success, "fingerprint": digest()}
    ask = io.GetWeightsByNameReqInput(name="model.layers.1.mlp.gate.weight", truncate_size=2)
    record["by_name"] = scheduler.weight_updater.get_weights_by_name(ask).parameter
    return record


def testee() -> Any:
    from dsv3_plugin.conformance.testees import sglang

    class Updated(sglang.SglangTestee):
        """Runs its cases on weights that came by updates."""

        def start_engine(self, num_speculative_tokens: int) -> None:
            job, other = self.job, os.environ["OTHER"]
            self.job = job.model_copy(update={"checkpoint": other})
            super().start_engine(num_speculative_tokens)
            self.job = job
            if num_speculative_tokens != MTP_STEPS:
                assert Trainer(self.scheduler).from_disk(job.checkpoint).success
                return
            record = run_updates(self.scheduler, other, job.checkpoint, int(os.environ["UPDATES"]))
            Path(os.environ["RECORD"]).write_text(json.dumps(record))

    return Updated


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(*sys.argv[2:])
    else:
        from dsv3_plugin.conformance.testees import program

        program.main(testee())
