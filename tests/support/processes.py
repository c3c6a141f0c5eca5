"""Other processes, by their numbers: who is alive, who comes from whom."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that comes soon."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    return _state_and_parent(pid)[0] != "Z"


def descendants(pid: int) -> set[int]:
    """The children of a process, their children, and so on."""
    parents = {int(folder.name): _state_and_parent(int(folder.name))[1] for folder in Path("/proc").glob("[0-9]*")}
    found, new = set[int](), {pid}
    while new := {child for child, parent in parents.items() if parent in new}:
        found |= new
    return found


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return "Z", 0
    return state, int(parent)
