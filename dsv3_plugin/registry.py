"""Choosing the kernel of every operation, once, when a model is built.

`strict` (the default) admits only kernels with a certificate that match the contract's version; where none is left
for an operation the error names the operation and what each candidate lacked. `fast` admits anything that supports
the setting. Either way the choice is recorded: `Ops.provenance` says what really runs, and why the others do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal, cast, get_args

import pluggy

from dsv3_plugin import hooks, reference_kernels
from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import Kernel, Setting
from dsv3_plugin.ops import combine, fp8, fused, linear, mla_attention, rms_norm, rope, router, silu_and_mul
from dsv3_plugin.ops.contract import Contract
from dsv3_plugin.ops.slices import Slices
from dsv3_plugin.version import __version__

Mode = Literal["strict", "fast"]
MODE_VARIABLE = "DSV3_PLUGIN_MODE"

CONTRACTS: tuple[Contract, ...] = (
    linear.LINEAR,
    linear.HEAD_LINEAR,
    linear.GROUPED_LINEAR,
    fp8.QUANTIZE_FP8,
    fp8.FP8_LINEAR,
    fp8.GROUPED_FP8_LINEAR,
    rms_norm.RMS_NORM,
    rope.ROPE,
    silu_and_mul.SILU_AND_MUL,
    router.ROUTER_LINEAR,
    router.ROUTE,
    router.MOE_ROUTER,
    combine.COMBINE,
    mla_attention.MLA_ATTENTION,
    fused.ADD_RMS_NORM,
    fused.RMS_NORM_FP8,
    fused.ADD_RMS_NORM_FP8,
    fused.SILU_AND_MUL_FP8,
    fused.PERMUTE,
    fused.PERMUTE_FP8,
)
_FP8_OPS = {contract.op for contract in CONTRACTS if "fp8" in contract.op}


@dataclass(frozen=True)
class Choice:
    """What serves one operation, and what else was offered."""

    op: str
    contract_version: int
    provider: str
    version: str
    certificate: str | None
    refused: tuple[str, ...]
    """The other kernels, each `provider version: why it does not serve`."""


@dataclass(frozen=True)
class MasterWeights:
    """How a trainer multiplies with FP8 weights that it holds in the profile's dtype; each call quantises anew."""

    linear: Callable[..., Any]
    """x [M, K], weight [N, K] to [M, N], with fp8_linear's `out_dtype`."""
    grouped_linear: Callable[..., Any]
    """x [M, K] sorted by expert, expert_counts [E], weight [E, N, K] to [M, N]."""
    quantized: Callable[..., Any]
    """weight [N, K] to the numbers that it stands for once quantised, in its own dtype."""


@dataclass(frozen=True)
class Ops:
    """The bound kernels of a model, one callable an operation, with the signature of its reference in
    `dsv3_plugin.ops`.
    """

    setting: Setting
    mode: Mode
    provenance: tuple[Choice, ...]
    linear: Callable[..., Any]
    head_linear: Callable[..., Any]
    grouped_linear: Callable[..., Any]
    rms_norm: Callable[..., Any]
    rope: Callable[..., Any]
    silu_and_mul: Callable[..., Any]
    router_linear: Callable[..., Any]
    route: Callable[..., Any]
    moe_router: Callable[..., Any]
    combine: Callable[..., Any]
    mla_attention: Callable[..., Any]
    quantize_fp8: Callable[..., Any]
    fp8_linear: Callable[..., Any]
    grouped_fp8_linear: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    rms_norm_fp8: Callable[..., Any]
    add_rms_norm_fp8: Callable[..., Any]
    silu_and_mul_fp8: Callable[..., Any]
    permute: Callable[..., Any]
    permute_fp8: Callable[..., Any]
    slices: Slices
    """Of the products that tensor-parallel ranks share, those that this process holds."""
    master_weights: MasterWeights | None = None
    """Only in training, in the FP8 profile: the layers then hold no FP8 weights."""

    @property
    def quantizes_ahead(self) -> bool:
        """Whether what makes an activation also quantises it, once for all FP8 projections that read it.

        In training, and where products are cut into slices, each projection does that itself.
        """
        profile = self.setting.profile
        return profile.is_fp8 and self.master_weights is None and profile.reduction_slices == 1

    def announcement(self, served: str) -> str:
        """What an adapter writes to its engine's log when it builds the model class `served`."""
        arithmetic = f"profile {self.setting.profile}, {self.mode} mode"
        return f"dsv3-plugin {__version__} serves {served}: {arithmetic}, kernels: {self.describe()}"

    def describe(self) -> str:
        """One line for a log: each provider with the operations that it serves."""
        served: dict[str, list[str]] = {}
        for choice in self.provenance:
            served.setdefault(f"{choice.provider} {choice.version}", []).append(choice.op)
        return "; ".join(f"{provider}: {', '.join(ops)}" for provider, ops in served.items())


def mode_from_environment() -> Mode:
    """`DSV3_PLUGIN_MODE`, `strict` where unset. Raises `KernelError` for another word."""
    mode = os.environ.get(MODE_VARIABLE, "strict")
    if mode not in get_args(Mode):
        raise KernelError(f"{MODE_VARIABLE}={mode!r}; use {' or '.join(get_args(Mode))}")
    return cast(Mode, mode)


def plugin_manager() -> pluggy.PluginManager:
    """A manager with the reference kernels and every installed provider.

    Raises `KernelError` that names a provider whose import fails.
    """
    manager = pluggy.PluginManager(hooks.ENTRY_POINT_GROUP)
    manager.add_hookspecs(hooks)
    manager.register(reference_kernels, "reference")
    for entry_point in metadata.entry_points(group=hooks.ENTRY_POINT_GROUP):
        try:
            manager.register(entry_point.load(), entry_point.name)
        except Exception as error:
            raise KernelError(
                f"the kernel provider {entry_point.name} ({entry_point.value}, entry-point group"
                f" {hooks.ENTRY_POINT_GROUP!r}) cannot be loaded: {type(error).__name__}: {error}"
            ) from error
    return manager


def offered_kernels(manager: pluggy.PluginManager | None = None) -> list[Kernel]:
    """All kernels of all providers."""
    manager = manager or plugin_manager()
    return [kernel for offer in manager.hook.dsv3_kernels() for kernel in offer]


def bind(setting: Setting, mode: Mode | None = None, kernels: Iterable[Kernel] | None = None) -> Ops:
    """Choose a kernel for every operation that the setting's profile uses.

    Raises `KernelError` that names each operation for which none may serve, and what each candidate lacked.
    """
    mode = mode or mode_from_environment()
    kernels = list(offered_kernels() if kernels is None else kernels)
    bound: dict[str, Callable[..., Any]] = {}
    provenance: list[Choice] = []
    missing: dict[Contract, str] = {}
    for contract in CONTRACTS:
        if contract.op in _FP8_OPS and not setting.profile.is_fp8:
            bound[contract.op] = partial(_not_bound, contract.op, setting.profile.name)
            continue
        best, refused = _choose(contract, setting, mode, kernels)
        if best is None:
            missing[contract] = f"{contract.op} ({'; '.join(refused) or 'nothing offered'})"
            continue
        bound[contract.op] = best.run
        provenance.append(Choice(contract.op, contract.version, best.provider, best.version, best.certificate, refused))
    if missing:
        fast_helps = any(_choose(contract, setting, "fast", kernels)[0] for contract in missing)
        advice = f". {MODE_VARIABLE}=fast takes kernels without certificate" if fast_helps else ""
        which = "; ".join(missing.values())
        raise KernelError(f"no kernel may serve in {mode} mode on {setting.device_type}: {which}{advice}")
    slices = Slices(setting.profile.reduction_slices)
    return Ops(setting=setting, mode=mode, provenance=tuple(provenance), slices=slices, master_weights=None, **bound)


def _choose(
    contract: Contract, setting: Setting, mode: Mode, kernels: list[Kernel]
) -> tuple[Kernel | None, tuple[str, ...]]:
    """The best admissible kernel of an operation, and why each other one does not serve."""
    refused: list[str] = []
    admitted: list[Kernel] = []
    for kernel in kernels:
        if kernel.op != contract.op:
            continue
        reason = refusal(kernel, contract, setting, mode)
        if reason is None:
            admitted.append(kernel)
        else:
            refused.append(f"{kernel.provider} {kernel.version}: {reason}")
    if not admitted:
        return None, tuple(refused)
    best = max(admitted, key=lambda kernel: kernel.priority)
    lower = (f"{k.provider} {k.version}: lower priority than {best.provider}" for k in admitted if k is not best)
    return best, (*refused, *lower)


def refusal(kernel: Kernel, contract: Contract, setting: Setting, mode: Mode) -> str | None:
    """Why a kernel may not serve a setting, or None if it may."""
    if kernel.contract_version != contract.version:
        return f"meets contract version {kernel.contract_version}, version {contract.version} is needed"
    reason = kernel.refuses(setting)
    if reason is None and mode == "strict" and kernel.certificate is None:
        why = f": {kernel.uncertified}" if kernel.uncertified else ""
        return f"has no certificate, which strict mode needs{why}"
    return reason


def _not_bound(op: str, profile: str, *args: Any, **kwargs: Any) -> Any:
    raise KernelError(f"{op} was called in the {profile} profile, which does not use it")
