"""Megatron's optimizers over torch's Adam, made to continue with the bits that they were saved with.

What a checkpoint holds of an optimizer beside its tensors is the first rank's and read by all, so that a rank without
parameters must know it too. Megatron has an optimizer of its own for experts, and a pipeline stage may hold none.

* An optimizer without parameters counts no steps. Here it does.
* The plain optimizer writes the empty list of its parameters as the list of everyone's. Here it writes none.

Without TransformerEngine or Apex, the distributed optimizer saves one step count for all parameters and does not
restore it:

* It asks for the count before it reads a checkpoint, when torch's Adam has no state yet.
* It gives every parameter the same tensor. Adam counts a step in each parameter's own, so that this one would count as
  many steps as there are parameters.
* It then looks for the count among each parameter's tensors, where there is none, or the one from before.

Megatron's training loop builds its optimizers and reads a checkpoint in one go, so that the classes are mended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

_NOBODY = "no parameter"
"""The key of an optimizer's state under which one without parameters counts its steps."""
_MAIN = "fp32_from_fp16_params"


def restore_exactly() -> None:
    """From now on, optimizers over torch's Adam continue exactly. Called when a model is built."""
    if getattr(DistributedOptimizer, "restores_exactly", False):
        return
    DistributedOptimizer.restores_exactly = True
    _wrap(DistributedOptimizer, "__init__", _distributed)
    _wrap(DistributedOptimizer, "_set_main_param_and_optimizer_states", _all_but_step)
    for plain in (Float16OptimizerWithFloat16Params, FP32Optimizer):
        _wrap(plain, "__init__", _plain)
        _wrap(plain, "sharded_state_dict", _numbered)
        _wrap(plain, "load_state_dict", _listed)


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Put `wrapper(method, self, ...)` in the place of a method."""
    method = getattr(owner, name)

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(method, self, *args, **kwargs)

    setattr(owner, name, call)


def _is_torchs_adam(optimizer: Any) -> bool:
    return isinstance(optimizer.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _is_empty(adam: torch.optim.Optimizer) -> bool:
    return not any(group["params"] for group in adam.param_groups)


def _distributed(construct: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    construct(self, *args, **kwargs)
    if _is_torchs_adam(self):
        _initialize(self.optimizer)
        _count_for_nobody(self.optimizer)
        self.optimizer.register_load_state_dict_post_hook(_own_steps)


def _plain(construct: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    construct(self, *args, **kwargs)
    if _is_torchs_adam(self):
        _count_for_nobody(self.optimizer)


def _initialize(adam: torch.optim.Optimizer) -> None:
    """What Adam itself does in its first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _count_for_nobody(adam: torch.optim.Optimizer) -> None:
    """Let an optimizer without parameters count its steps."""
    if _is_empty(adam):
        adam.state[_NOBODY] = {"step": torch.zeros(())}  # type: ignore[index]
        adam.register_step_post_hook(lambda adam, *_: adam.state[_NOBODY]["step"].add_(1))  # type: ignore[index]


def _own_steps(adam: torch.optim.Optimizer) -> None:
    """After a load: one tensor a parameter."""
    for state in adam.state.values():
        state["step"] = state["step"].clone()


# Without gradients: in fp32 the main parameters are the model's own weights, which autograd watches.
@torch.no_grad()
def _all_but_step(set_tensors: Callable[..., None], self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
    """What is no tensor Megatron passes over."""
    set_tensors(self, model_param, tensors | {"step": None} if _is_torchs_adam(self) else tensors)


def _numbered(make: Callable[..., dict[str, Any]], self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The lists of main parameters by number: an empty list is written as everyone's, and missing numbers are not."""
    state = make(self, *args, **kwargs)
    state.get("optimizer", state)["state"].pop(_NOBODY, None)
    if _MAIN in state:
        state[_MAIN] = {i: dict(enumerate(group)) for i, group in enumerate(state[_MAIN]) if group}
    return state


def _listed(load: Callable[..., None], self: Any, state: dict[str, Any]) -> None:
    """The other way round. Megatron sets the count of steps for every entry of the state: here for nobody, too."""
    if _is_torchs_adam(self) and _is_empty(self.optimizer):
        state.get("optimizer", state)["state"][_NOBODY] = {"step": torch.zeros(())}
    if isinstance(numbered := state.get(_MAIN), dict):
        groups = enumerate(self.fp32_from_float16_groups)
        state[_MAIN] = [[numbered[i][j] for j in range(len(group))] for i, group in groups]
    load(self, state)
