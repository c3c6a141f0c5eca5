"""Megatron's distributed optimizer over torch's Adam, made to continue with the bits that it was saved with.

Without TransformerEngine or Apex, Megatron-Core saves one step count for all parameters and does not restore it:

* It asks for the count before it reads a checkpoint, when torch's Adam has no state yet.
* It gives every parameter the same tensor. Adam counts a step in each parameter's own, so that this one would count as
  many steps as there are parameters.
* It then looks for the count among each parameter's tensors, where there is none, or the one from before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def restore_exactly(optimizer: Any) -> None:
    """Prepare `optimizer`, of `get_megatron_optimizer` and before its first step, for reading a checkpoint.

    Does nothing to an optimizer that is not distributed or not torch's Adam.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = getattr(part, "optimizer", None)
        if isinstance(part, DistributedOptimizer) and isinstance(adam, (torch.optim.Adam, torch.optim.AdamW)):
            _initialise(adam)
            adam.register_load_state_dict_post_hook(_own_steps)
            part._set_main_param_and_optimizer_states = partial(
                _set_all_but_step, part._set_main_param_and_optimizer_states
            )


def _initialise(adam: torch.optim.Optimizer) -> None:
    """What Adam itself does in its first step."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            adam.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _own_steps(adam: torch.optim.Optimizer) -> None:
    """After a load: one tensor a parameter."""
    for state in adam.state.values():
        state["step"] = state["step"].clone()


# Without gradients: in fp32 the main parameters are the model's own weights, which autograd watches.
@torch.no_grad()
def _set_all_but_step(set_tensors: Callable[..., None], model_param: Any, tensors: dict[str, Any]) -> None:
    """Megatron's method; what is no tensor it passes over."""
    set_tensors(model_param, tensors | {"step": None})
