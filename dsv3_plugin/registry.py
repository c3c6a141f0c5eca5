"""Choosing the kernel of every operation, once, when a model is built.

`strict` (the default) admits the contracts' own definitions, and kernels all of whose implementations have a
certificate for exactly what is here (`certificates`); where none is left for an operation the error names the
operation, what each candidate lacked, and how to certify it. `fast` admits anything that supports the setting. Either
way the choice is recorded: `Ops.provenance` says what really runs, and why the others do not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, cast, get_args

import torch

from dsv3_plugin import certificates, reference_kernels
from dsv3_plugin.certificates import Certificate
from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import Arithmetic, Kernel, Setting
from dsv3_plugin.ops.operation import Operation, operations
from dsv3_plugin.ops.slices import Slices
from dsv3_plugin.profile import ScaleFormat
from dsv3_plugin.providers import is_supported, offered_kernels
from dsv3_plugin.version import __version__

Mode = Literal["strict", "fast"]
MODE_VARIABLE = "DSV3_PLUGIN_MODE"

AnyOperation = Operation[..., Any]
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Part:
    """One implementation that a bound kernel runs."""

    implementation: str
    shapes: str
    """Which shapes it is given, in words."""
    certificate: Certificate | None
    """None of the contract's own definition, and in fast mode."""


@dataclass(frozen=True)
class Choice:
    """What serves one operation, and what else was offered."""

    op: str
    contract_version: int
    provider: str
    version: str
    parts: tuple[Part, ...]
    refused: tuple[str, ...]
    """The other kernels, each `provider version: why it does not serve`."""
    is_the_contract: bool = False
    """Whether it is the definition that others are compared with."""
    served: Callable[[], dict[str, str]] = dict
    """Of a kernel that chooses by shape: the shapes so far, each with its implementation."""

    @property
    def implementations(self) -> str:
        """Their names, where they say more than the operation's."""
        names = [part.implementation for part in self.parts]
        says_no_more = names in ([self.op], [f"{self.provider}.{self.op}"])
        return "" if self.is_the_contract or says_no_more else " or ".join(names)

    def __str__(self) -> str:
        """Provider, version and implementations."""
        implementations = f" ({self.implementations})" if self.implementations else ""
        return f"{self.provider} {self.version}{implementations}"

    def record(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "operation": self.op,
            "contract_version": self.contract_version,
            "provider": self.provider,
            "version": self.version,
            "is_the_contract": self.is_the_contract,
            "implementations": [
                {
                    "name": part.implementation,
                    "shapes": part.shapes,
                    "certificate": part.certificate and part.certificate.model_dump(mode="json"),
                }
                for part in self.parts
            ],
            "served_so_far": self.served(),
            "refused": list(self.refused),
        }


class Observe(Protocol):
    """What stands in the place of a kernel (`Ops.tap`)."""

    def __call__(self, op: AnyOperation, run: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """What the kernel `run` of `op` gives for these arguments."""


class MasterWeights(Protocol):
    """How a trainer multiplies with FP8 weights that it holds in the profile's dtype; each call quantizes anew."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [M, K], weight [N, K] to [M, N]."""

    def sliced_linear(
        self, x: torch.Tensor, weight: torch.Tensor, slices: int, *, out_dtype: torch.dtype
    ) -> torch.Tensor:
        """The same with K in slices, as `sliced_fp8_linear` does it."""

    def grouped_linear(self, x: torch.Tensor, expert_counts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [M, K] sorted by expert, expert_counts [E], weight [E, N, K] to [M, N]."""

    def quantized(self, weight: torch.Tensor) -> torch.Tensor:
        """weight [N, K] to the numbers that it stands for once quantized, in its own dtype."""


@dataclass(frozen=True)
class Ops:
    """The bound kernels of a model: `ops[linear](x, weight)` calls that of `dsv3_plugin.ops.linear.linear`."""

    setting: Setting
    mode: Mode
    provenance: tuple[Choice, ...]
    kernels: dict[AnyOperation, Callable[..., Any]]
    """One an operation, with the signature of its declaration."""
    slices: Slices
    """Of the products that tensor-parallel ranks share, those that this process holds."""
    master_weights: MasterWeights | None = None
    """Only in training, in the FP8 profile: the layers then hold no FP8 weights."""
    preferred: str | None = None
    """The provider that was asked for: its kernels serve wherever they may."""

    def __getitem__(self, op: Operation[P, R]) -> Callable[P, R]:
        """The kernel that is bound to an operation."""
        return cast(Callable[P, R], self.kernels[op])

    def with_kernel(self, op: Operation[P, R], run: Callable[P, R]) -> Ops:
        """The same with another kernel of one operation."""
        return replace(self, kernels={**self.kernels, op: run})

    def tap(self, observe: Observe) -> None:
        """From now on call `observe` in the place of each kernel, wherever these kernels are bound: in a model that is
        built already, and in its relatives with other `slices`. A CUDA graph that was captured before replays without.
        """
        for op, run in self.kernels.items():
            self.kernels[op] = partial(observe, op, run)

    @property
    def scale_format(self) -> ScaleFormat:
        """Of the FP8 profile; no other has one."""
        found = self.setting.profile.scale_format
        assert found is not None, f"the {self.setting.profile.name} profile has no FP8 scales"
        return found

    @property
    def columns_are_alone(self) -> bool:
        """Whether an output of an unquantized product has the same bits however many outputs there are: a tensor core
        has no other way, a CPU's library has.
        """
        return self.setting.arithmetic != "cpu"

    @property
    def quantizes_ahead(self) -> bool:
        """Whether what makes an activation also quantizes it, once for all FP8 projections that read it.

        In training each projection does that itself.
        """
        return self.setting.profile.is_fp8 and self.master_weights is None

    def announcement(self, served: str) -> str:
        """What an adapter writes to its engine's log when it builds the model class `served`."""
        arithmetic = f"profile {self.setting.profile}, {self.mode} mode"
        return f"dsv3-plugin {__version__} serves {served}: {arithmetic}, kernels: {self.describe()}"

    def describe(self) -> str:
        """One line for a log: each provider with the operations that it serves, and what implements them."""
        served: dict[str, list[str]] = {}
        for choice in self.provenance:
            by = f" by {choice.implementations}" if choice.implementations else ""
            served.setdefault(f"{choice.provider} {choice.version}", []).append(f"{choice.op}{by}")
        return "; ".join(f"{provider}: {', '.join(ops)}" for provider, ops in served.items())

    def record(self) -> dict[str, Any]:
        """What really runs, as plain data for JSON: an adapter answers it where its engine is asked.

        `served_so_far` names, of kernels that choose by shape, the implementation of each shape that was met.
        """
        return {
            "version": __version__,
            "mode": self.mode,
            "profile": str(self.setting.profile),
            "device_type": self.setting.device_type,
            "arithmetic": self.setting.arithmetic,
            "operations": [choice.record() for choice in self.provenance],
        }


def mode_from_environment() -> Mode:
    """`DSV3_PLUGIN_MODE`, `strict` where unset. Raises `KernelError` for another word."""
    mode = os.environ.get(MODE_VARIABLE, "strict")
    if mode not in get_args(Mode):
        raise KernelError(f"{MODE_VARIABLE}={mode!r}; use {' or '.join(get_args(Mode))}")
    return cast(Mode, mode)


def definitions(arithmetic: Arithmetic) -> dict[str, Kernel]:
    """The kernels that define an arithmetic, by operation: what others are compared with. They need no certificate."""
    if arithmetic == "cpu":
        return {kernel.op: kernel for kernel in reference_kernels.dsv3_kernels()}
    # Kernels know this module, which knows of theirs only the model that defines Hopper's sums.
    from dsv3_plugin.kernels.sm90 import sm90_model

    return {kernel.op: kernel for kernel in sm90_model.kernels()}


def is_a_definition(kernel: Kernel) -> bool:
    """Whether a kernel is the definition of its operation in one of the arithmetics."""
    arithmetics: tuple[Arithmetic, ...] = get_args(Arithmetic)
    found = (definitions(arithmetic).get(kernel.op) for arithmetic in arithmetics)
    return any(definition is not None and kernel.run is definition.run for definition in found)


@dataclass(frozen=True)
class Candidate:
    """A kernel that was offered for an operation, and whether it may serve."""

    kernel: Kernel
    refusal: str | None
    """Why it may not."""
    found: tuple[Certificate | str, ...]
    """For each of the kernel's parts its certificate, or why it has none. Empty where no certificate is asked for."""
    is_the_contract: bool

    @property
    def can_be_certified(self) -> bool:
        """Whether it lacks a certificate only, which a check on this machine may give it."""
        return self.refusal is not None and any(isinstance(found, str) for found in self.found)


def judge(kernel: Kernel, op: AnyOperation, setting: Setting, mode: Mode) -> Candidate:
    """Whether a kernel may serve a setting; it is asked for certificates in strict mode, and only if all else fits."""
    is_the_contract = kernel.run is definitions(setting.arithmetic)[op.name].run
    found: tuple[Certificate | str, ...] = ()
    refusal_: str | None
    if kernel.contract_version != op.version:
        refusal_ = f"meets contract version {kernel.contract_version}, version {op.version} is needed"
    else:
        refusal_ = is_supported(kernel, setting).reason
    if refusal_ is None and mode == "strict" and not is_the_contract:
        if kernel.uncertified is not None:
            refusal_ = f"has no certificate, which strict mode needs: {kernel.uncertified}"
        else:
            try:
                subjects = [certificates.subject_of(part, op, setting) for part in kernel.parts]
            except KernelError as error:
                refusal_ = f"has no certificate, which strict mode needs: {error}"
            else:
                found = tuple(certificates.find(each, setting.profile.dtype, kernel.certificates) for each in subjects)
                if lacking := _lacking(kernel, found):
                    refusal_ = f"has no certificate, which strict mode needs: {lacking}"
    return Candidate(kernel, refusal_, found, is_the_contract)


def _lacking(kernel: Kernel, found: tuple[Certificate | str, ...]) -> str:
    """Why a kernel's parts have no certificates; which of them, where it is not all for one reason."""
    of_part = {part.name: why for part, why in zip(kernel.parts, found, strict=True) if isinstance(why, str)}
    if len(set(of_part.values())) == 1 and len(of_part) == len(kernel.parts):
        return next(iter(of_part.values()))
    return "; ".join(f"{name}: {why}" for name, why in of_part.items())


def refusal(kernel: Kernel, op: AnyOperation, setting: Setting, mode: Mode) -> str | None:
    """Why a kernel of `op` may not serve a setting, or None if it may."""
    return judge(kernel, op, setting, mode).refusal


def candidates(
    op: AnyOperation, setting: Setting, mode: Mode, kernels: Iterable[Kernel], preferred: str | None = None
) -> tuple[Candidate | None, list[Candidate]]:
    """The kernel that serves an operation, if one may, and all that were offered for it."""
    judged = [judge(kernel, op, setting, mode) for kernel in kernels if kernel.op == op.name]
    admitted = [candidate for candidate in judged if candidate.refusal is None]

    def rank(candidate: Candidate) -> tuple[bool, int]:
        return candidate.kernel.provider == preferred, candidate.kernel.priority

    return max(admitted, key=rank, default=None), judged


def bind(
    setting: Setting,
    mode: Mode | None = None,
    kernels: Iterable[Kernel] | None = None,
    *,
    training: bool = False,
    preferred: str | None = None,
) -> Ops:
    """Choose a kernel for every operation that the setting's profile uses; with `training`, for those that only its
    backward pass calls. Kernels of the provider `preferred` go before all others that may serve.

    Raises `KernelError` that names each operation for which none may serve, what each candidate lacked, and what to
    type to certify those that lack a certificate for this machine.
    """
    mode = mode or mode_from_environment()
    kernels = list(offered_kernels() if kernels is None else kernels)
    bound: dict[AnyOperation, Callable[..., Any]] = {}
    provenance: list[Choice] = []
    missing: dict[AnyOperation, list[Candidate]] = {}
    for op in operations().values():
        if not op.is_used_by(setting.profile, training=training):
            bound[op] = partial(_not_bound, op.name, str(setting.profile))
            continue
        best, offered = candidates(op, setting, mode, kernels, preferred)
        if best is None:
            missing[op] = offered
            continue
        bound[op] = best.kernel.run
        provenance.append(_choice(op, best, offered))
    if missing:
        raise KernelError(_nothing_serves(missing, setting, mode, kernels))
    slices = Slices(setting.profile.reduction_slices)
    return Ops(setting, mode, tuple(provenance), bound, slices, preferred=preferred)


def with_training(ops: Ops, kernels: Iterable[Kernel] | None = None) -> Ops:
    """`ops` with kernels of the operations that only backward passes call. Raises `KernelError` as `bind` does."""
    added = bind(ops.setting, ops.mode, kernels, training=True, preferred=ops.preferred)
    chosen = {op: run for op, run in added.kernels.items() if op.is_used_by(ops.setting.profile, training=True)}
    return replace(ops, kernels={**ops.kernels, **chosen}, provenance=(*ops.provenance, *added.provenance))


def _choice(op: AnyOperation, best: Candidate, offered: list[Candidate]) -> Choice:
    kernel = best.kernel
    parts = tuple(
        Part(part.name, part.shapes, found if isinstance(found, Certificate) else None)
        for part, found in zip(kernel.parts, best.found or [None] * len(kernel.parts), strict=True)
    )
    lower = (
        f"{_named(candidate)}: lower priority than {kernel.provider}"
        for candidate in offered
        if candidate.refusal is None and candidate is not best
    )
    return Choice(
        op=op.name,
        contract_version=op.version,
        provider=kernel.provider,
        version=kernel.version,
        parts=parts,
        refused=(*_refusals(offered), *lower),
        is_the_contract=best.is_the_contract,
        served=kernel.served,
    )


def _nothing_serves(
    missing: dict[AnyOperation, list[Candidate]], setting: Setting, mode: Mode, kernels: list[Kernel]
) -> str:
    """What a user reads where operations are left without a kernel, and what to do."""
    alike: dict[str, list[str]] = {}
    for op, offered in missing.items():
        alike.setdefault("; ".join(_refusals(offered)) or "nothing offered", []).append(op.name)
    which = "; ".join(f"{', '.join(ops)} ({why})" for why, ops in alike.items())
    text = f"no kernel may serve in {mode} mode on {setting.device_type}: {which}"
    if command := certify_command(candidate for offered in missing.values() for candidate in offered):
        text += f". To certify them on this machine: {command}"
    if any(candidates(op, setting, "fast", kernels)[0] for op in missing):
        text += f". {MODE_VARIABLE}=fast takes kernels without certificate"
    return text


def certify_command(judged: Iterable[Candidate]) -> str | None:
    """What to type to certify the candidates that lack only a certificate for this machine; None if none does."""
    providers = dict.fromkeys(candidate.kernel.provider for candidate in judged if candidate.can_be_certified)
    return certificates.command(providers) if providers else None


def _refusals(offered: list[Candidate]) -> tuple[str, ...]:
    return tuple(f"{_named(candidate)}: {candidate.refusal}" for candidate in offered if candidate.refusal is not None)


def _named(candidate: Candidate) -> str:
    return f"{candidate.kernel.provider} {candidate.kernel.version}"


def _not_bound(op: str, profile: str, *args: Any, **kwargs: Any) -> Any:
    raise KernelError(f"{op} was called in the {profile} profile, which does not use it")
