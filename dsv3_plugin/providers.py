"""What kernel providers offer, asked once, when a model is built. What one does wrong is told with its name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from typing import Any, cast

import pluggy

from dsv3_plugin import hooks, reference_kernels
from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import Kernel, Setting, Support
from dsv3_plugin.ops.operation import operations

_HOOK = hooks.dsv3_kernels.__name__


def plugin_manager() -> pluggy.PluginManager:
    """A manager with the reference kernels and every installed provider.

    Raises `KernelError` that names a provider whose import fails, or that has not our hook.
    """
    manager = pluggy.PluginManager(hooks.ENTRY_POINT_GROUP)
    manager.add_hookspecs(hooks)
    manager.register(reference_kernels, "reference")
    for entry_point in metadata.entry_points(group=hooks.ENTRY_POINT_GROUP):
        named = (
            f"the kernel provider {entry_point.name} ({entry_point.value}, entry-point group"
            f" {hooks.ENTRY_POINT_GROUP!r})"
        )
        with hooks.errors_of(f"{named} cannot be loaded"):
            plugin = entry_point.load()
            manager.register(plugin, entry_point.name)
        found = [caller.name for caller in manager.get_hookcallers(plugin) or ()]
        if found != [_HOOK]:
            raise KernelError(
                f"{named} implements {', '.join(found) or 'no hook'}: define a function {_HOOK}, decorated with"
                " dsv3_plugin.hooks.hookimpl, and no other"
            )
    return manager


def offered_kernels(manager: pluggy.PluginManager | None = None) -> list[Kernel]:
    """All kernels of all providers. Raises `KernelError` that names one which offers none, or something else."""
    manager = manager or plugin_manager()
    # One by one, so that an error has a name; pluggy asks the last first.
    providers = reversed(manager.hook.dsv3_kernels.get_hookimpls())
    return [kernel for provider in providers for kernel in _offer(provider)]


def _offer(provider: pluggy.HookImpl) -> list[Kernel]:
    named = f"the kernel provider {provider.plugin_name}"
    with hooks.errors_of(f"{named} does not tell its kernels"):
        kernels = list(cast(Iterable[Any], provider.function()))
    for kernel in kernels:
        if not isinstance(kernel, Kernel):
            raise KernelError(f"{named} offers {type(kernel).__name__} {kernel!r:.80}, not a dsv3_plugin.hooks.Kernel")
        if kernel.op not in operations():
            names = ", ".join(operations())
            raise KernelError(f"{named} offers a kernel for {kernel.op!r}, which is no operation; they are {names}")
    return kernels


def is_supported(kernel: Kernel, setting: Setting) -> Support:
    """What a kernel itself says of a setting. Raises `KernelError` that names its provider if it raises, or answers
    something else.
    """
    with hooks.errors_of(f"the kernel provider {kernel.provider} cannot tell whether its {kernel.op} serves"):
        answer: Any = kernel.is_supported(setting)
    if not isinstance(answer, Support):
        raise KernelError(
            f"the kernel provider {kernel.provider} answers {type(answer).__name__} {answer!r:.80} where asked whether"
            f" its {kernel.op} serves, not a dsv3_plugin.hooks.Support"
        )
    return answer
