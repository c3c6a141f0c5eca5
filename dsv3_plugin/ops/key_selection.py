"""Which keys a query attends to, beyond that they are not after it: all of them in DeepSeek-V3, fewer in a relative
whose attention is sparse. The layer that has such a rule makes the selection; kernels that cannot follow one decline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_plugin.ops.checks import require


@dataclass(frozen=True, eq=False)
class KeySelection:
    """The keys of each query by their positions in its request; `ALL_KEYS` where there is no choice.

    Raises `InputError` for positions of another kind.
    """

    positions: torch.Tensor | None = None
    """int32 or int64 [T, K] in any order, more than once too; negative ones, and those after the query, are no keys.
    None: all keys."""

    def __post_init__(self) -> None:
        """Check shape and dtype."""
        require_positions(self.positions)

    def mask(self, queries: slice, length: int) -> torch.Tensor | None:
        """bool [queries, length], True where a key is selected of the request of these queries; None for all."""
        if self.positions is None:
            return None
        positions = self.positions[queries].long()
        positions = positions.where((positions >= 0) & (positions < length), length)
        selected = torch.zeros(len(positions), length + 1, dtype=torch.bool, device=positions.device)
        return selected.scatter_(1, positions, True)[:, :length]


def require_positions(positions: torch.Tensor | None) -> None:
    """Require integers [tokens, keys], or None."""
    if positions is not None:
        kind = f"positions are {positions.dtype} of shape {tuple(positions.shape)}"
        is_right = positions.dim() == 2 and positions.dtype in (torch.int32, torch.int64)
        require(is_right, "KeySelection", f"{kind}, expected integers [tokens, keys]")


ALL_KEYS = KeySelection()
