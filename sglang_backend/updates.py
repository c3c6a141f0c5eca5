"""SGLang's weight updates under our models: one is whole or refused, and nothing answers with a mixture.

SGLang hands the buckets of an update to each model as they come, forgets those that come no more, and keeps what it
computed with the old weights unless it is told otherwise. The hooks here stand around its calls:

* Requests that run are sent back to the queue before a weight is written, and all caches are emptied: what SGLang
  computed with old weights is never read with new ones, whatever `flush_cache` says.
* A bucket goes to the target and to its draft, or to neither. Which tensors came is counted by `WeightLoader`.
  A scheduler that has not all that was computed for a request, a pipeline stage or one side of disaggregated prefill
  and decode, cannot send it back: there an update is refused while a request is under way.
* While some tensors of an update have come and others have not, requests end with an error that says so. They cannot
  wait: over HTTP a bucket waits until no request is in flight.
* SGLang 0.5.23 says where an update begins and ends. Before it, one ends where it is whole, and where generation is
  paused or continued, a trainer joins or leaves, memory comes back, or `weight_version` is another.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import reduce
from http import HTTPStatus
from typing import Any, Literal

import torch
from torch import nn

from dsv3_plugin.checkpoint.fingerprint import Fingerprint, fingerprint
from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.engines import class_name, is_ours
from dsv3_plugin.errors import CheckpointError, DSV3Error
from dsv3_plugin.layers.model import derived_is_current, weights_changed
from dsv3_plugin.sglang_backend import compat
from dsv3_plugin.sglang_backend.layout import of_all_ranks
from dsv3_plugin.sglang_backend.stages import Answers

logger = logging.getLogger("sglang.dsv3_plugin")

Role = Literal["target", "draft"]
Bucket = list[tuple[str, torch.Tensor]]


class Updates:
    """The updates of what one scheduler serves: the target, and its draft if that is ours too."""

    def __init__(self, target: nn.Module, draft: nn.Module | None) -> None:
        self.models: dict[Role, Any] = {"target": target}
        if draft is not None:
            self.models["draft"] = draft
        self.started_as = compat.checkpoint()[1]
        """The server's own `load_format`, which SGLang fills in where an update from a folder names none."""
        self.refused: str | None = None
        """Why the update under way was refused: what still comes of it is refused too."""
        self.version: str | None = None
        """`weight_version` of the update under way."""
        self.in_session = False
        """Between SGLang's `begin_weight_update` and `end_weight_update`."""
        self.released = False
        """Whether the memory of the weights is given away."""
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.answers = Answers()

    @property
    def problem(self) -> str | None:
        """Why nothing may answer now, or None."""
        if self.released:
            return "the memory of its weights is released: /resume_memory_occupation"
        for role, loader in self.loaders().items():
            if problem := loader.problem:
                return f"the {role}: {problem}"
        return None

    def loaders(self, *roles: Role) -> dict[Role, WeightLoader]:
        """Of the named models, of all if none is named."""
        return {role: model.weight_loader for role, model in self.models.items() if not roles or role in roles}

    def begin(self, *roles: Role) -> None:
        """A new update begins. What came of one that was not finished is refused."""
        self.refused = self.version = None
        for loader in self.loaders(*roles).values():
            loader.begin()

    def abandon(self) -> None:
        """Whoever sent the update under way sends no more of it. In a session only its end says so."""
        if self.in_session:
            return
        self.refused = self.version = None
        for loader in self.loaders().values():
            with suppress(CheckpointError):
                loader.finish()

    def finish(self, *roles: Role) -> None:
        """The update of the named models ends here. Raises `CheckpointError` unless it is whole."""
        refused, self.refused, self.version = self.refused, None, None
        loaders = self.loaders(*roles).values()
        try:
            for loader in loaders:
                loader.finish()
            if refused is not None:
                raise CheckpointError(refused)
            for loader in loaders:
                loader.require_whole()
        except CheckpointError as error:
            for loader in loaders:
                loader.refuse(f"an update of its weights was refused: {error}")
            raise

    def take(self, bucket: Bucket, *roles: Role) -> None:
        """Give a bucket to the named models, or to none of them. Raises `CheckpointError`."""
        loaders = self.loaders(*roles).values()
        names = {name for name, _ in bucket}
        if all(loader.wanted <= names for loader in loaders):
            self.begin(*roles)
        if len(roles) < len(self.models):
            logger.warning("dsv3-plugin: an update of the %s alone; the other keeps its weights", " and ".join(roles))
        if self.refused is not None:
            raise CheckpointError(
                f"this update was refused before ({self.refused}): send all of it again, in one bucket, or after"
                " /pause_generation, or in a new session of SGLang 0.5.23"
            )
        for loader in loaders:
            loader.check(bucket)
        for loader in loaders:
            loader.load(bucket)
        if self.problem is None:
            self.version = None

    def refuse(self, reason: str) -> None:
        """The update under way ends here."""
        self.refused = reason
        for loader in self.loaders().values():
            loader.refuse(f"an update of its weights was refused: {reason}")

    def version_is(self, version: str | None) -> None:
        """The next bucket is of this `weight_version`, if it says so."""
        if version is not None:
            if self.version not in (None, version):
                self.abandon()
            self.version = version

    def take_folder(self, path: str) -> None:
        """All weights of a checkpoint. Raises `DSV3Error`; before anything is written where the folder is at fault."""
        reader = CheckpointReader(path)
        served = self.models["target"].config
        found = DeepseekV3Config.from_pretrained(path, compat.config_overrides())
        # The dtype is that of the server.
        if (found := found.model_copy(update={"torch_dtype": served.torch_dtype})) != served:
            differ = [name for name, value in served if getattr(found, name) != value]
            raise CheckpointError(f"{path}: its configuration is not the served one in {', '.join(differ)}")
        reader.validate()
        self.begin()
        for loader in self.loaders().values():
            loader.read(reader)
        self.finish()

    def rows(self, name: str, count: int) -> list[Any]:
        """The first rows of a checkpoint's tensor; all ranks of a stage make this call together.

        Raises `CheckpointError` where none of them holds it, or nothing may answer.
        """
        if self.problem is not None:
            raise CheckpointError(self.problem)
        held = [tensor for loader in self.loaders().values() if (tensor := loader.tensor(name)) is not None]
        answers = of_all_ranks(held[0][:count].float().tolist() if held else None)
        for answer in answers:
            if answer is not None:
                return answer
        raise CheckpointError(f"no tensor {name} is served here")

    def keep_buffers(self) -> None:
        """Keep the rotary tables, which come with no update, from what is about to befall all memory."""
        self.kept = [(buffer, buffer.clone()) for model in self.models.values() for buffer in model.buffers()]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put back what `keep_buffers` kept."""
        for buffer, value in self.kept:
            buffer.copy_(value)
        self.kept = []

    def state(self) -> dict[str, Any]:
        """What SGLang's internal state says of us under the key `dsv3`:

        * `main`, and `mtp` where there is a draft: the `class` that serves, and what its kernels are (`Ops.record`);
        * `problem`: why nothing may answer, or None;
        * `fingerprint`: `Fingerprint` of what both hold on all ranks of this stage, which make this call together; None
          with a problem.
        """
        problem, held = self.problem or self._stale(), Fingerprint(tensors={})
        problem = next((each for each in of_all_ranks(problem) if each is not None), None)
        for role, loader in self.loaders().items() if problem is None else ():
            held |= fingerprint(loader.model, self.models[role].config, loader.part, loader.layout)
        try:
            held = reduce(Fingerprint.__or__, of_all_ranks(held))
        except CheckpointError as error:
            problem = str(error)
        served = {
            model.weight_loader.part: {"class": class_name(model), **model.ops.record()}
            for model in self.models.values()
        }
        return served | {"problem": problem, "fingerprint": held.model_dump() if problem is None else None}

    def _stale(self) -> str | None:
        """Which model's derived weights are of others than it holds, or None."""
        stale = [role for role, model in self.models.items() if not derived_is_current(model)]
        return f"what the {stale[0]} derived from its weights is of other weights than it holds" if stale else None


def updates_of(engine: Any) -> Updates | None:
    """The updates of a scheduler or of its weight updater; None where it serves another model than ours."""
    target = engine.tp_worker.model_runner.model
    if not is_ours(target):
        return None
    if target.updates is None:
        draft = compat.draft_model(engine.draft_worker)
        target.updates = Updates(target, draft if is_ours(draft) else None)
    target.follow_experts()
    return target.updates


# What follows stands around SGLang's own functions (`HOOKS`): each gets the original, then its arguments.

Original = Callable[..., Any]


def update_weights_from_disk(original: Original, manager: Any, request: Any) -> Any:
    """SGLang writes before it looks, goes back to the folder that it could not read, and takes the format that the
    server was started with, `dummy` too.
    """
    if (updates := updates_of(manager)) is None:
        return original(manager, request)

    def take() -> None:
        if request.load_format not in (None, "auto", "safetensors", updates.started_as):
            raise CheckpointError(
                f"load_format={request.load_format}: a checkpoint is read from safetensors files, load_format=auto"
            )
        if not request.model_path:
            raise CheckpointError("model_path: is empty; name a checkpoint folder")
        updates.take_folder(request.model_path)

    if (problem := under_way(manager.scheduler)) is not None:
        return compat.answer("UpdateWeightFromDiskReqOutput", False, problem)
    with manager._observe_weight_load("disk"), new_weights(manager.scheduler):
        problem = attempt(updates, take)
    if problem is None:
        compat.record_update(manager, request.weight_version)
        compat.record_folder(manager, request.model_path)
    message = problem or "Succeeded to update model weights."
    return compat.answer("UpdateWeightFromDiskReqOutput", problem is None, message)


def update_weights_from_tensor(original: Original, manager: Any, request: Any) -> Any:
    """A bucket in a process's or a card's memory. With `direct` SGLang writes into parameters, past what a model knows
    of them: here the same tensors go by their names.
    """
    if getattr(request, "load_format", None) == "direct":
        request = copy.copy(request)
        request.load_format = None
    return update_weights_from_bucket(original, manager, request, "UpdateWeightsFromTensorReqOutput")


def update_weights_from_distributed(original: Original, manager: Any, request: Any) -> Any:
    """A bucket from a process group. Before 0.5.23 SGLang gives it to the target alone: here to its draft too."""
    return update_weights_from_bucket(
        original, manager, request, "UpdateWeightsFromDistributedReqOutput", to_all=not compat.has_sessions(manager)
    )


def update_weights_from_bucket(
    original: Original, manager: Any, request: Any, output_class: str, *, to_all: bool = False
) -> Any:
    """SGLang receives the tensors; what it would have loaded, our models take here."""
    if (updates := updates_of(manager)) is None:
        return original(manager, request)
    ours = copy.copy(request)
    # Both here, once the weights are taken.
    ours.flush_cache, ours.weight_version = False, None
    output = version = None

    def take() -> None:
        nonlocal output, version
        updates.version_is(request.weight_version)
        version = updates.version
        with receiving(updates) as received:
            output = original(manager, ours)
        if not output.success:
            raise CheckpointError(output.message)
        for bucket in list(received.values())[:1]:
            updates.take(bucket, *(updates.models if to_all else received))

    if (problem := under_way(manager.scheduler)) is None:
        with new_weights(manager.scheduler):
            problem = attempt(updates, take)
    if problem is not None:
        updates.refuse(problem)
        return compat.answer(output_class, False, problem)
    if updates.problem is None:
        compat.record_update(manager, version)
    return output


def update_weights_from_ipc(original: Original, manager: Any, request: Any) -> Any:
    """SGLang fills one buffer again and again within a call, and stops half way where it fails."""
    if updates_of(manager) is None:
        return original(manager, request)
    problem = "dsv3-plugin does not take weights from update_weights_from_ipc: use update_weights_from_tensor"
    return compat.answer("UpdateWeightsFromIPCReqOutput", False, problem)


def begin_weight_update(original: Original, manager: Any, request: Any) -> Any:
    """From SGLang 0.5.23 on."""
    updates = updates_of(manager)
    output = original(manager, request)
    if updates is not None and output.success:
        updates.begin(*roles(updates, request.selector))
        updates.in_session = True
    return output


def end_weight_update(original: Original, manager: Any, request: Any) -> Any:
    """From SGLang 0.5.23 on: an update that is not whole ends in an error."""
    updates, session = updates_of(manager), manager._session
    if updates is not None and session is not None:
        updates.in_session = False
        if (problem := attempt(updates, lambda: updates.finish(*roles(updates, session.selector)))) is not None:
            manager._session = None
            return compat.answer("EndWeightUpdateReqOutput", False, problem)
    return original(manager, request)


def end_of_update(original: Original, engine: Any, *args: Any) -> Any:
    """Around what a trainer does before or after an update: what is not whole by then stays so."""
    if (updates := updates_of(engine)) is not None:
        updates.abandon()
    return original(engine, *args)


def release_memory_occupation(original: Original, manager: Any, request: Any) -> Any:
    """SGLang's own needs a server without a request, and looks after the target's buffers, not the draft's."""
    updates = updates_of(manager)
    if updates is None or not compat.asks_for_weights(request):
        return original(manager, request)
    updates.abandon()
    updates.keep_buffers()
    with new_weights(manager.scheduler), nothing_waits(manager.scheduler):
        output = original(manager, request)
    updates.released = True
    return output


def resume_memory_occupation(original: Original, manager: Any, request: Any) -> Any:
    """Weights that were not kept elsewhere are gone: new ones must come."""
    output = original(manager, request)
    updates = updates_of(manager)
    if updates is None or not compat.asks_for_weights(request):
        return output
    updates.released = False
    updates.restore_buffers()
    kept = compat.keeps_weights(manager)
    for role, model in updates.models.items():
        if not kept[role]:
            model.weight_loader.discard("its weights were released, and no new ones have come")
        # What was derived may have been in memory that was released.
        with torch.no_grad():
            weights_changed(model)
    return output


def check_weights(original: Original, manager: Any, request: Any) -> Any:
    """`reset_tensors` makes noise of all weights and buffers, to see that an update writes them; no update brings our
    buffers.
    """
    updates = updates_of(manager)
    if updates is None or request.action != "reset_tensors":
        return original(manager, request)
    updates.keep_buffers()
    with new_weights(manager.scheduler):
        output = original(manager, request)
    updates.restore_buffers()
    for loader in updates.loaders().values():
        loader.discard("/weights_checker reset its weights, and no new ones have come")
    return output


def get_next_batch_to_run(original: Original, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """With weights that may not answer no request is computed: each ends with an error that says why."""
    updates = updates_of(scheduler)
    if updates is not None:
        updates.answers.send(scheduler)
    if updates is not None and scheduler.waiting_queue and (problem := updates.problem) is not None:
        from sglang.srt.managers.io_struct import AbortReq
        from sglang.srt.managers.schedule_batch import FINISH_ABORT

        message = f"dsv3-plugin cannot answer, {problem}"
        logger.error(message)
        for request in scheduler.waiting_queue:
            request.finished_reason = FINISH_ABORT(message, HTTPStatus.SERVICE_UNAVAILABLE, "WeightsNotWhole")
            ended = AbortReq(rid=request.rid, finished_reason=request.finished_reason.to_json())
            scheduler.ipc_channels.send_to_tokenizer.send_output(ended, request)
        scheduler.waiting_queue.clear()
    return original(scheduler, *args, **kwargs)


def get_internal_state(original: Original, scheduler: Any, request: Any) -> Any:
    """Adds what `Updates.state` says, of all stages."""
    output, updates = original(scheduler, request), updates_of(scheduler)
    return output if updates is None else updates.answers.say(request, output, updates.state())


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

HOOKS: Mapping[str, Original] = {
    f"{_MANAGER}.update_weights_from_disk": update_weights_from_disk,
    f"{_MANAGER}.update_weights_from_tensor": update_weights_from_tensor,
    f"{_MANAGER}.update_weights_from_distributed": update_weights_from_distributed,
    f"{_MANAGER}.update_weights_from_ipc": update_weights_from_ipc,
    f"{_MANAGER}.begin_weight_update": begin_weight_update,
    f"{_MANAGER}.end_weight_update": end_weight_update,
    f"{_MANAGER}.init_weights_update_group": end_of_update,
    f"{_MANAGER}.destroy_weights_update_group": end_of_update,
    f"{_SCHEDULER}.pause_generation": end_of_update,
    f"{_SCHEDULER}.continue_generation": end_of_update,
    f"{_MANAGER}.release_memory_occupation": release_memory_occupation,
    f"{_MANAGER}.resume_memory_occupation": resume_memory_occupation,
    f"{_MANAGER}.check_weights": check_weights,
    f"{_SCHEDULER}.get_next_batch_to_run": get_next_batch_to_run,
    f"{_SCHEDULER}.get_internal_state": get_internal_state,
}
"""By the name of what they stand around."""


def attempt(updates: Updates, action: Callable[[], None]) -> str | None:
    """Do it; returns what went wrong on any rank of this stage, which all make this call, or None. A weight that cannot
    be taken must not end the scheduler; a rank that answers while another may not would wait for it.
    """
    problem = None
    try:
        action()
    except Exception as error:
        problem = str(error) if isinstance(error, DSV3Error) else f"{type(error).__name__}: {error}"
        logger.error("dsv3-plugin refused an update of the weights: %s", problem)
    answers = of_all_ranks(problem)
    problems = [each for each in answers if each is not None]
    if 0 < len(problems) < len(answers):
        for loader in updates.loaders().values():
            loader.discard(f"{len(problems)} of {len(answers)} ranks refused an update of the weights: {problems[0]}")
    return problems[0] if problems else None


def roles(updates: Updates, selector: str) -> list[Role]:
    """The models that SGLang's selector (`target`, `draft`, `all`) names."""
    return [role for role in updates.models if selector in ("all", role)]


def is_disaggregated(scheduler: Any) -> bool:
    """Whether prefill and decode are in different servers, of which this is one."""
    return bool(scheduler.disaggregation_mode.value != "null")


def under_way(scheduler: Any) -> str | None:
    """Why no weight may be written now, or None."""
    if not is_disaggregated(scheduler) and scheduler.pp_group.world_size == 1:
        return None
    if all(of_all_ranks(scheduler.is_fully_idle())):
        return None
    return "requests are under way, of which this scheduler has a part: update the weights when they have ended"


def not_whole(scheduler: Any) -> str | None:
    """Why a request must not begin, or None. Servers of disaggregated prefill or decode ask when it comes, the others
    when it would be computed (`get_next_batch_to_run`).
    """
    updates = updates_of(scheduler) if is_disaggregated(scheduler) else None
    return None if updates is None else updates.problem


@contextmanager
def receiving(updates: Updates) -> Iterator[dict[Role, Bucket]]:
    """What SGLang tells our models to load is kept, and is in the yielded dictionary at the end."""
    received: dict[Role, Bucket] = {}
    for model in updates.models.values():
        model.received = []
    try:
        yield received
        received |= {role: model.received for role, model in updates.models.items() if model.received}
    finally:
        for model in updates.models.values():
            model.received = None


@contextmanager
def new_weights(scheduler: Any) -> Iterator[None]:
    """Weights are written here: what runs goes back to the queue, and what was computed before is forgotten."""
    if scheduler.running_batch.reqs or scheduler.last_batch or scheduler.chunked_req is not None:
        paused = scheduler._engine_paused
        compat.retract(scheduler)
        scheduler._engine_paused = paused
    try:
        yield
    finally:
        with nothing_waits(scheduler):
            scheduler.flush_cache(empty_cache=False)


@contextmanager
def nothing_waits(scheduler: Any) -> Iterator[None]:
    """SGLang does some things without any request only. One that waits has computed nothing."""
    grammars = scheduler.grammar_manager
    waiting = scheduler.waiting_queue, grammars.grammar_queue
    scheduler.waiting_queue, grammars.grammar_queue = [], []
    try:
        yield
    finally:
        scheduler.waiting_queue, grammars.grammar_queue = waiting
