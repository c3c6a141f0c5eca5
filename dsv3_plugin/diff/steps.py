"""What each step of `dsv3 diff` answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["equal", "different", "unknown"]


@dataclass(frozen=True)
class Step:
    """One question, answered."""

    name: str
    outcome: Outcome
    says: tuple[str, ...]
    """The first line is the answer; the others say more."""
    found: dict[str, Any] = field(default_factory=dict)
    """The same as data."""

    def record(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def counted(n: int, what: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"
