"""What the pipeline stages of a server answer together.

SGLang's server hears the first stage alone. The others are asked once the first has passed a question on, so it cannot
wait for them there: they leave what they say in the store by which torch's processes found each other, and the first
stage answers in the turn of its loop in which all of it is there.
"""

from __future__ import annotations

import json
from typing import Any

from sglang.srt.distributed.parallel_state import get_pp_group, get_tp_group
from torch.distributed import distributed_c10d

from dsv3_plugin.checkpoint.fingerprint import Fingerprint
from dsv3_plugin.errors import CheckpointError


class Answers:
    """Of one rank, to questions that all ranks of all stages are asked in the same order."""

    def __init__(self) -> None:
        self.asked = 0
        self.open: list[tuple[int, Any, Any, dict[str, Any]]] = []
        """The number of a question, SGLang's request and answer, and what this stage says."""

    def say(self, request: Any, output: Any, said: dict[str, Any]) -> Any:
        """What to return to SGLang, which sends it: `output`, whose internal state has all stages' `dsv3`, or None."""
        stages = get_pp_group()
        if stages.world_size == 1:
            output.internal_state["dsv3"] = said
            return output
        self.asked += 1
        if stages.is_first_rank:
            self.open.append((self.asked, request, output, said))
        elif get_tp_group().is_first_rank:
            _store().set(_key(self.asked, stages.rank_in_group), json.dumps(said))
        return None

    def send(self, scheduler: Any) -> None:
        """Send what all stages have answered."""
        while self.open:
            number, request, output, said = self.open[0]
            keys = [_key(number, stage) for stage in range(1, get_pp_group().world_size)]
            if not _store().check(keys):
                return
            for other in (json.loads(_store().get(key)) for key in keys):
                said = together(said, other)
            output.internal_state["dsv3"] = said
            self.open.pop(0)
            scheduler.ipc_channels.send_to_tokenizer.send_output(output, request)


def together(said: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two stages say of the model that they share, see `updates.Updates.state`."""
    try:
        for stage in (said, other):
            if stage["problem"] is not None:
                raise CheckpointError(stage["problem"])
        held, of_other = (Fingerprint(tensors=stage["fingerprint"]["tensors"]) for stage in (said, other))
        return said | {"fingerprint": (held | of_other).model_dump()}
    except CheckpointError as error:
        return said | {"problem": str(error), "fingerprint": None}


def _store() -> Any:
    return distributed_c10d._get_default_store()


def _key(number: int, stage: int) -> str:
    return f"dsv3/{number}/{stage}"
