"""The pluggy interface: how kernel providers are found.

A provider is a pluggy plugin under the entry-point group `dsv3_plugin` (or registered by hand) with one hook,
`dsv3_kernels`. The hook runs once, when a model is built; the callables that win are bound to the model, so no hook
call sits in the hot path.

    # pyproject.toml of a provider
    [project.entry-points."dsv3_plugin"]
    my_kernels = "my_package.provider"

    # my_package/provider.py
    @dsv3_plugin.hooks.hookimpl
    def dsv3_kernels() -> list[Kernel]: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import pluggy

from dsv3_plugin.profile import Profile

ENTRY_POINT_GROUP = "dsv3_plugin"

Arithmetic = Literal["cpu", "sm90"]

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)
hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@dataclass(frozen=True)
class Setting:
    """Where an operation will run: what a kernel may look at when it says whether it can serve."""

    device_type: str
    """`cpu` or `cuda`."""
    arithmetic: Arithmetic
    """Whose sums: `cpu`, this machine's tiled products, or `sm90`, those of Hopper's tensor cores, which a CPU can
    model.
    """
    profile: Profile
    capability: tuple[int, int] | None = None
    """CUDA compute capability, (9, 0) for Hopper; None on a CPU."""
    dims: dict[str, int] = field(default_factory=dict)
    """Sizes of the model by their configuration names, e.g. `kv_lora_rank`."""


def always(setting: Setting) -> str | None:
    """A kernel that serves every setting."""
    return None


def whole_sums_only(setting: Setting) -> str | None:
    """A kernel that cannot keep the sums of reduction slices apart (`dsv3_plugin.ops.slices`)."""
    slices = setting.profile.reduction_slices
    return None if slices == 1 else f"keeps no fp32 sums of slices, {slices} reduction slices were asked for"


@dataclass(frozen=True)
class Kernel:
    """One implementation of one operation.

    `run` takes the arguments of the operation's reference in `dsv3_plugin.ops`. `refuses` returns why the kernel
    cannot serve a setting, or None if it can. `certificate` names the evidence that it meets the contract bit for
    bit; a kernel without one is used in fast mode only, and `uncertified` may say why it has none: what was measured.
    Among kernels that may serve, the highest `priority` wins.
    """

    op: str
    contract_version: int
    provider: str
    version: str
    run: Callable[..., Any]
    refuses: Callable[[Setting], str | None] = always
    certificate: str | None = None
    uncertified: str | None = None
    priority: int = 0


@hookspec
def dsv3_kernels() -> list[Kernel]:
    """The kernels that this provider offers."""
    raise NotImplementedError
