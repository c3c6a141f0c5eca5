"""examples/rl/grpo.py with a fault in it: `python rl_twins.py TWIN STEP ARGUMENT ...`, with the arguments of grpo.py.

TWIN is the name of a tensor, which the servers get as it was a step before when they get the weights of step STEP; or
`temperature` or `prompts`, which the trainer forgets in step STEP: at which it sampled, and where prompts end; or
`kernel:FOLDER`: the trainer has been started in fast mode, where a provider is installed in FOLDER.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "rl"))

import grpo
from hand_over import Weights
from trainer import Packed, Trainer


def keep_stale(name: str, version: int) -> None:
    """In each step's folder, or in what is handed over from memory."""
    export, in_memory = Trainer.export, Trainer.in_memory
    handed_over: list[dict[str, torch.Tensor]] = []

    def in_memory_all_but_one(trainer: Trainer, *, drafts: bool) -> Weights:
        weights = in_memory(trainer, drafts=drafts)
        now = {each: tensor.clone() for each, tensor in weights.tensors(lambda name: True)}
        handed_over.append(now)
        if len(handed_over) == version + 1:
            now[name] = handed_over[-2][name]
        return replace(weights, tensors=lambda wanted: ((each, now[each]) for each in now if wanted(each)))

    def export_all_but_one(trainer: Trainer, folder: Path) -> None:
        export(trainer, folder)
        if folder.name == str(version) and not handed_over:
            file = folder / "model.safetensors"
            tensors, before = load_file(file), load_file(folder.with_name(str(version - 1)) / file.name)
            save_file(tensors | {name: before[name]}, file, {"format": "pt"})

    Trainer.export, Trainer.in_memory = export_all_but_one, in_memory_all_but_one


def without_temperature(packed: Packed) -> Packed:
    return packed._replace(temperatures=packed.temperatures.clone().fill_(1))


def without_prompts(packed: Packed) -> Packed:
    return packed._replace(inputs=packed.inputs | {"prompt_lens": None})


def forget(without: Callable[[Packed], Packed], step: int) -> None:
    learn, log_probs = grpo.learn, Trainer.log_probs

    def forgetful(trainer: Trainer, packed: Packed) -> Any:
        return log_probs(trainer, without(packed))

    def learn_forgetfully(*arguments: Any) -> Any:
        if arguments[2] == step:
            Trainer.log_probs = forgetful
        return learn(*arguments)

    grpo.learn = learn_forgetfully


if __name__ == "__main__":
    twin, step = sys.argv.pop(1), int(sys.argv.pop(1))
    if twin in ("temperature", "prompts"):
        forget(without_temperature if twin == "temperature" else without_prompts, step)
    elif twin.startswith("kernel:"):
        sys.path.insert(0, twin.removeprefix("kernel:"))
        os.environ["DSV3_PLUGIN_MODE"] = "fast"
    else:
        keep_stale(twin, step)
    grpo.main()
