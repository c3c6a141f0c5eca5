"""AdamW with moments in a dtype of choice: TransformerEngine's `FusedAdam`, where that is not installed.

`--use-precision-aware-optimizer` hands main parameters and moments to the optimizer: Megatron asks for them by
`FusedAdam`'s names. The formula is `FusedAdam`'s, computed in fp32 one rounded operation at a time, so that no bit
depends on how parameters are cut over ranks. Moments are rounded to the nearest of their dtype when they are stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig

from dsv3_plugin.errors import EngineError

_FUSED_ADAM = "transformer_engine.pytorch.optimizers"


class PreciseAdam(torch.optim.Optimizer):
    """`FusedAdam` as Megatron's precision-aware optimizer uses it.

    With `master_weights` its parameters are the model's, in any dtype, and the state has their fp32 `master_param`;
    without, they are the fp32 main parameters themselves. Gradients are in `decoupled_grad` or `grad`. The state also
    has `exp_avg` and `exp_avg_sq` in their dtypes; steps are counted in the parameter groups.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        master_weight_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        """Raises `EngineError` for what only TransformerEngine's own does."""
        if master_weight_dtype != torch.float32 or not adam_w_mode:
            raise EngineError(
                "without TransformerEngine the precision-aware optimizer has fp32 main parameters and AdamW's decay:"
                " install TransformerEngine, or leave --main-params-dtype out"
            )
        if capturable:
            raise EngineError("without TransformerEngine no optimizer's step is captured in a CUDA graph")
        self.gradient = "decoupled_grad" if use_decoupled_grad else "grad"
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}
        if master_weights:
            self.dtypes["master_param"] = torch.float32
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def initialize_state(self, param: torch.Tensor) -> None:
        """The parameter as it is, and moments of zero."""
        state = {name: torch.zeros_like(param, dtype=dtype) for name, dtype in self.dtypes.items()}
        if "master_param" in state:
            state["master_param"].copy_(param.detach())
        self.state[param] = state

    def get_unscaled_state(self, param: torch.Tensor, state_name: str) -> torch.Tensor:
        """fp32, as checkpoints hold it."""
        found: torch.Tensor = self.state[param][state_name]
        return found.float()

    def set_scaled_state(self, param: torch.Tensor, state_name: str, unscaled_state: torch.Tensor) -> None:
        """From a checkpoint."""
        if not self.state[param]:
            self.initialize_state(param)
        self.state[param][state_name].copy_(unscaled_state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch's, which would cast all state to the parameter's dtype."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        parameters = (param for group in self.param_groups for param in group["params"])
        for number, param in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                self.state[param] = {
                    name: state_dict["state"][number][name].to(dtype) for name, dtype in self.dtypes.items()
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Of all parameters that have a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if getattr(param, self.gradient, None) is not None:
                    if not self.state[param]:
                        self.initialize_state(param)
                    self._step(param, group)

    def _step(self, param: Any, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        gradient = getattr(param, self.gradient).float()
        mean = state["exp_avg"].float() * beta1 + gradient * (1 - beta1)
        square = state["exp_avg_sq"].float() * beta2 + gradient * gradient * (1 - beta2)
        root = (square / (1 - beta2 ** group["step"])).sqrt_() + group["eps"]
        main = state.get("master_param", param)
        update = mean / (1 - beta1 ** group["step"]) / root + main * group["weight_decay"]
        main -= update * group["lr"]
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)
        if main is not param:
            param.copy_(main)


def provide_precise_adam() -> None:
    """Let Megatron find `PreciseAdam` where it looks for `FusedAdam`, unless TransformerEngine is installed."""
    if find_spec("transformer_engine") is not None or megatron_optimizer.Adam is PreciseAdam:
        return
    stand_in = ModuleType(_FUSED_ADAM)
    stand_in.FusedAdam = PreciseAdam  # type: ignore[attr-defined]
    check = OptimizerConfig.__post_init__

    @wraps(check)
    def check_with_stand_in(self: Any) -> None:
        # Its check imports FusedAdam. Nobody else is to take it for TransformerEngine.
        sys.modules[_FUSED_ADAM] = stand_in
        try:
            check(self)
        finally:
            del sys.modules[_FUSED_ADAM]

    OptimizerConfig.__post_init__ = check_with_stand_in
    megatron_optimizer.Adam = PreciseAdam
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    # Steps are counted as FusedAdam does.
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
