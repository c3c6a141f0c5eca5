"""Megatron's distributed optimizer over torch's Adam, made to continue with the bits that it was saved with.

Without TransformerEngine or Apex, Megatron-Core saves one step count for all parameters and does not restore it:

* It asks for the count before it reads a checkpoint, when torch's Adam has no state yet.
* It gives every parameter the same tensor. Adam counts a step in each parameter's own, so that this one would count as
  many steps as there are parameters.
* It then looks for the count among each parameter's tensors, where there is none, or the one from before.

Megatron's training loop builds its optimizer and reads a checkpoint in one go, so that the class itself is mended.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def restore_exactly() -> None:
    """From now on, distributed optimizers over torch's Adam continue exactly. Called when a model is built."""
    if getattr(DistributedOptimizer.__init__, "restores_exactly", False):
        return
    construct, set_tensors = DistributedOptimizer.__init__, DistributedOptimizer._set_main_param_and_optimizer_states

    @wraps(construct)
    def construct_with_state(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if _is_torchs_adam(self):
            _initialize(self.optimizer)
            self.optimizer.register_load_state_dict_post_hook(_own_steps)

    # Without gradients: in fp32 the main parameters are the model's own weights, which autograd watches.
    @wraps(set_tensors)
    @torch.no_grad()
    def set_all_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # What is no tensor Megatron passes over.
        set_tensors(self, model_param, tensors | {"step": None} if _is_torchs_adam(self) else tensors)

    construct_with_state.restores_exactly = True  # type: ignore[attr-defined]
    DistributedOptimizer.__init__ = construct_with_state
    DistributedOptimizer._set_main_param_and_optimizer_states = set_all_but_step


def _is_torchs_adam(optimizer: DistributedOptimizer) -> bool:
    return isinstance(optimizer.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _initialize(adam: torch.optim.Optimizer) -> None:
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
