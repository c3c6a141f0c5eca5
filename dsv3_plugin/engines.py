"""What the adapters have in common: the kill switch, whose a model is, and the warning for an untested engine."""

from __future__ import annotations

import os

KILL_SWITCH = "DSV3_PLUGIN"


def switched_off() -> bool:
    """Whether `DSV3_PLUGIN=off` leaves the engine's own model in place."""
    return os.environ.get(KILL_SWITCH, "").lower() in ("off", "0", "false")


def is_ours(model: object) -> bool:
    """Whether a model that an engine has built is of this package."""
    return type(model).__module__.startswith("dsv3_plugin.")


def untested_version_warning(engine: str, version: str, tested: tuple[str, str]) -> str | None:
    """A warning for an engine's version outside the tested range (first, last), else None."""
    # Every engine depends on it; the core does not.
    from packaging.version import Version

    low, high = tested
    if Version(low) <= Version(Version(version).public) <= Version(high):
        return None
    return (
        f"dsv3-plugin is tested with {engine} {low} to {high}, this is {version}:"
        f" run `dsv3 conformance run --testee {engine.lower()}` before you rely on its bits"
    )
