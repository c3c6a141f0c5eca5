"""What the providers of other people's kernels share: on which card they serve, and whether they are installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

from dsv3_plugin.hooks import Setting, whole_sums_only


def version_of(*distributions: str) -> str | None:
    """The version of the first of `distributions` that is installed, or None."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def on_hopper_with(name: str, installed: Callable[[], bool]) -> Callable[[Setting], str | None]:
    """A kernel that serves a Hopper card where `name` is installed."""

    def refuses(setting: Setting) -> str | None:
        if (setting.device_type, setting.arithmetic, setting.capability) != ("cuda", "sm90", (9, 0)):
            return f"computes arithmetic sm90 on Hopper, not {setting.arithmetic} on {setting.device_type}"
        if not installed():
            return f"{name} is not installed"
        return whole_sums_only(setting)

    return refuses
