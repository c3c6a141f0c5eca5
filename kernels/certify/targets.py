"""What is checked: the implementations of the kernels that serve here, on which devices, and what their cases hold."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Any, NamedTuple

import torch

from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import Arithmetic, Implementation, Kernel, Setting
from dsv3_plugin.kernels import provider
from dsv3_plugin.kernels.hopper import V3_LATENT
from dsv3_plugin.ops.drawing import LARGE, ON_CPU, SCALE_FORMATS, Sizes
from dsv3_plugin.ops.operation import Operation, operations
from dsv3_plugin.profile import FP8_UE8M0, FP32, ScaleFormat
from dsv3_plugin.providers import is_supported, offered_kernels
from dsv3_plugin.registry import is_a_definition

# One case of so many is computed on the CPU too where the model runs on the card.
_ON_CPU_TOO = 16
# What is compiled for every shape or number of requests gets few.
_FEW: dict[str, dict[str, Any]] = {
    "triton.mla_attention": {"requests": (1, 3)},
    "deep_gemm.fp8_gemm_nt": {"depths": (512, 7168), "columns": (64, 192)},
    "deep_gemm.bf16_gemm_nt": {"depths": (512, 7168), "columns": (64, 192)},
    "deep_gemm.m_grouped_fp8_gemm_nt_contiguous": {"depths": (512, 7168), "columns": (64, 192)},
}


class Where(NamedTuple):
    """Which arithmetic is checked, and on which devices."""

    kernels: str = "cuda"
    model: str = "cuda"
    cpu_every: int = _ON_CPU_TOO
    """One case of so many has the model run on the CPU too; none if 0."""
    arithmetic: Arithmetic = "sm90"

    def settings(self, **dims: int) -> list[Setting]:
        """In bf16, with fp8 weights, and on a CPU in fp32 too."""
        capability = (9, 0) if self.kernels == "cuda" else None
        profiles = (FP8_UE8M0, FP32) if self.arithmetic == "cpu" else (FP8_UE8M0,)
        return [Setting(self.kernels, self.arithmetic, profile, capability, dims) for profile in profiles]


class Device(StrEnum):
    """Where expected values are computed."""

    cuda = "cuda"
    cpu = "cpu"


class DeviceName(StrEnum):
    """Where operations run: `hopper` and its model on a CPU print the same bits, `cpu` others."""

    cpu = "cpu"
    hopper = "hopper"
    hopper_model = "hopper-model"


def this_machine() -> DeviceName:
    """`hopper` where there is such a card."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return DeviceName.hopper if hopper else DeviceName.cpu


def where_of(device: DeviceName, model_device: Device = Device.cuda) -> Where:
    """On which devices a check for `device` runs."""
    if device is DeviceName.hopper:
        return Where() if model_device is Device.cuda else Where(model="cpu", cpu_every=0)
    return Where("cpu", "cpu", 0, "cpu" if device is DeviceName.cpu else "sm90")


class Target(NamedTuple):
    """An implementation to check, and the kernel that hands to it."""

    kernel: Kernel
    part: Implementation

    @property
    def op(self) -> Operation[..., Any]:
        """What it computes."""
        return operations()[self.kernel.op]

    @property
    def is_meant_exact(self) -> bool:
        """Whether a bit that differs is a fault."""
        return self.kernel.uncertified is None

    @property
    def must_take_all(self) -> bool:
        """Whether it is the whole of one of this package's kernels, which refuse no case."""
        return self.kernel.provider in (provider.PROVIDER, provider.CUDA_PROVIDER) and len(self.kernel.parts) == 1

    def settings(self, where: Where) -> list[Setting]:
        """Those that its kernel serves; with each latent of the cases, where it may be particular about that."""
        latents = [V3_LATENT]
        if self.op.dims:
            latents = [dict(zip(self.op.dims, latent, strict=True)) for latent in LARGE.latents]
        settings = [setting for latent in latents for setting in where.settings(**latent)]
        return [setting for setting in settings if is_supported(self.kernel, setting)]

    def scale_formats(self, where: Where) -> tuple[ScaleFormat, ...]:
        """Of fp8 scales, those that its kernel serves."""

        def with_format(setting: Setting, scale_format: ScaleFormat) -> Setting:
            return replace(setting, profile=replace(setting.profile, scale_format=scale_format))

        served = self.settings(where)
        return tuple(
            scale_format
            for scale_format in SCALE_FORMATS
            if any(is_supported(self.kernel, with_format(setting, scale_format)) for setting in served)
        )

    def sizes(self, where: Where) -> Sizes:
        """What its cases are drawn from."""
        sizes = (ON_CPU if where.kernels == "cpu" else LARGE)._replace(**_FEW.get(self.part.name, {}))
        sizes = sizes._replace(scale_formats=self.scale_formats(where))
        if self.op.dims:
            served = [tuple(setting.dims[name] for name in self.op.dims) for setting in self.settings(where)]
            return sizes._replace(latents=tuple(latent for latent in LARGE.latents if latent in served))
        return sizes

    def dtypes(self, where: Where) -> tuple[torch.dtype, ...]:
        """The profiles' dtypes that it serves; its cases are drawn in each by turns."""
        return tuple(dict.fromkeys(setting.profile.dtype for setting in self.settings(where)))


def chosen(ops: list[str] | None, provider_names: list[str] | None, where: Where) -> list[Target]:
    """The implementations of these operations, all where None, by these providers, those meant to be exact where None.

    Raises `KernelError` that names a provider that there is not.
    """
    kernels = [kernel for kernel in offered_kernels() if not is_a_definition(kernel)]
    providers = sorted({kernel.provider for kernel in kernels})
    if unknown := sorted(set(provider_names or ()) - set(providers)):
        raise KernelError(f"there is no provider {', '.join(unknown)}; the providers are {', '.join(providers)}")
    targets: dict[tuple[str, str, str], Target] = {}
    for kernel in kernels:
        is_meant = kernel.provider in provider_names if provider_names else kernel.uncertified is None
        if is_meant and (not ops or kernel.op in ops):
            for part in kernel.parts:
                # Kernels that hand to the same implementation share its certificate.
                targets.setdefault((kernel.op, part.name, part.entry), Target(kernel, part))
    return list(targets.values())


def that_run(targets: list[Target], where: Where) -> list[Target]:
    """Those whose kernels serve here; of others it is told why not."""
    not_checked: dict[tuple[str, str], list[str]] = {}
    for target in targets:
        if not target.settings(where):
            reason = str(is_supported(target.kernel, where.settings(**V3_LATENT)[0]).reason)
            not_checked.setdefault((target.kernel.provider, reason), []).append(target.kernel.op)
    for (provider_name, reason), ops in not_checked.items():
        print(f"{provider_name}: not checked ({reason}): {', '.join(dict.fromkeys(ops))}", flush=True)
    return [target for target in targets if target.settings(where)]
