"""The package's environment variables by name, and what is wrong with those that would change nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches

KILL_SWITCH = "DSV3_PLUGIN"
OFF, _ON = ("off", "0", "false"), ("", "on", "1", "true")
"""Values of the kill switch, in any case of letters."""

NAMES = (
    KILL_SWITCH,
    "DSV3_ATTENTION",
    "DSV3_PEER_MEMORY",
    "DSV3_PLUGIN_CACHE",
    "DSV3_PLUGIN_CERTIFICATES",
    "DSV3_PLUGIN_MODE",
    "DSV3_REDUCTION_SLICES",
)
"""All of them."""


def wrong_variables(variables: Mapping[str, str] = os.environ) -> Iterator[str]:
    """What is wrong with variables that are meant for this package and would change nothing: a name that is almost one
    of ours, and a switch that says neither on nor off.
    """
    for name in sorted(variables):
        if name.startswith("DSV") and name not in NAMES and (meant := get_close_matches(name, NAMES, 1, 0.7)):
            yield f"{name} is no variable of dsv3-plugin, {meant[0]} is: rename it, or unset it"
    switch = variables.get(KILL_SWITCH, "")
    if switch.lower() not in (*OFF, *_ON):
        yield f"{KILL_SWITCH}={switch!r}; use off, or leave it out"
