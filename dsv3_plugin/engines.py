"""What the adapters have in common: the kill switch, whose a model is, the warning for an untested engine, and how a
variable that changes an engine's numbers is described.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsv3_plugin.variables import KILL_SWITCH, OFF

Level = Literal["fine", "note", "problem"]


@dataclass(frozen=True)
class Variable:
    """An environment variable that changes numbers."""

    effect: str
    harmless: tuple[str, ...] = ()
    """Its values that change nothing, in any case of letters."""
    level: Level = "problem"


def switched_off(variables: Mapping[str, str] = os.environ) -> bool:
    """Whether `DSV3_PLUGIN=off` leaves the engine's own model in place."""
    return variables.get(KILL_SWITCH, "").lower() in OFF


def class_name(model: object) -> str:
    """A model's class as module.name, by which logs, results and servers say what serves."""
    return f"{type(model).__module__}.{type(model).__qualname__}"


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
