"""Forcing an engine's tokens, and seeing what its passes compute, with next to no work of their own.

*Tokens.* Between the model and the sampler three small kernels write a large number into each row of logits, at the
token that follows the row's own. A greedy sampler, and a greedy verification of drafts, then choose it. All contenders
do the same.

*Experts.* A router's choice is a tensor that a CUDA graph writes again at each replay. Whoever keeps that tensor when
the graph is captured keeps its memory from being used for graphs that are captured later, and finds the choice of any
later replay there: no kernel is added. So routers are watched before an engine is built. Graphs that were captured
earlier write over it: where they run behind the model's, as drafts do in vLLM, the choice is copied before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from dsv3_plugin.engine_bench.contenders.ranks import Visited
from dsv3_plugin.engine_bench.tokens import Circle, Place

_LARGE = 1e30
LOGIT_ROWS = 4
"""Requests whose logits are kept of a measurement."""


class Routers:
    """What the routers chose, each known by the object that it is.

    Args:
        replicas: data-parallel ranks. An engine's own routers may choose for the tokens of all.
    """

    def __init__(self, replicas: int = 1) -> None:
        self.replicas = replicas
        self.gathered = False
        """Whether the routers see the tokens of all replicas: one replica's behind the other's, equally many rows for
        each where a graph pads.
        """
        self.captured: dict[int, dict[int, list[torch.Tensor]]] = {}
        """By router and rows: where graphs write. Some engines have two of a size, for prompts and for decodes."""
        self.copied: dict[int, dict[int, list[torch.Tensor]]] = {}
        """Of these, what was copied in the pass that is on its way."""
        self.before: dict[tuple[int, int, int], torch.Tensor] = {}
        """By router, rows and graph: what stood there at the last look."""
        self.last: dict[int, torch.Tensor] = {}
        """By router: of the pass that is on its way, if it runs without a graph."""

    def watch(self, owner: type, method: str, chosen: Callable[[Any], torch.Tensor | None]) -> None:
        """From now on see what a method of all routers of a class returns, of which `chosen` picks the expert ids,
        if there are any.
        """
        original = getattr(owner, method)

        @wraps(original)
        def watched(router: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(router, *args, **kwargs)
            if (ids := chosen(result)) is not None:
                self.note(id(router), ids)
            return result

        setattr(owner, method, watched)

    def note(self, router: int, ids: torch.Tensor) -> None:
        """Keep ids [rows, k]."""
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured.setdefault(router, {}).setdefault(len(ids), []).append(ids)
        else:
            self.last[router] = ids

    def begin_pass(self) -> None:
        """What is noted from now on is of a new pass."""
        self.last.clear()
        self.copied.clear()

    def copy(self, rows: int) -> None:
        """What graphs of so many rows wrote, before other graphs write over it."""
        for router, graphs in self.captured.items():
            self.copied[router] = {rows: [ids.clone() for ids in graphs.get(rows, ())]}

    def visited_by_each(self, routers: list[int], rows: Sequence[int], own: int, experts: int) -> Visited | None:
        """`visited` of each layer's router; None where one of them was not seen."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # an engine may be a pass ahead, on another stream
        sets = [self.visited(router, rows, own, experts) for router in routers]
        seen = tuple(visited for visited in sets if visited is not None)
        return seen if seen and len(seen) == len(sets) else None

    def visited(self, router: int, rows: Sequence[int], own: int, experts: int) -> frozenset[int] | None:
        """Experts that a router chose in the latest pass, in which the replicas had `rows` tokens and this is the
        `own`-th; None where nobody saw.

        A fused shared expert counts not: its number is not below `experts`.
        """
        ids = self.last.get(router)
        if ids is None:
            # Replicas pad to the one that has the most.
            least = max(rows) * (self.replicas if self.gathered else 1)
            graphs = self.copied.get(router) or self.captured.get(router, {})
            fitting = [size for size in graphs if size >= least]
            ids = self._written(router, graphs, min(fitting)) if fitting else None
        if ids is None:
            return None
        if not self.gathered:
            ids = ids[: rows[own]]
        elif len(ids) > sum(rows):
            blocks = ids.tensor_split(self.replicas)
            ids = torch.cat([block[:count] for block, count in zip(blocks, rows, strict=True)])
        return frozenset(expert for expert in ids.unique().tolist() if 0 <= expert < experts)

    def _written(self, router: int, graphs: Mapping[int, list[torch.Tensor]], rows: int) -> torch.Tensor | None:
        """What was written since the last look by one of the graphs of so many rows; None where that was not one."""
        written = []
        for number, ids in enumerate(graphs[rows]):
            before = self.before.get((router, rows, number))
            if before is None or not torch.equal(before, ids):
                self.before[router, rows, number] = ids.clone()
                written.append(ids)
        if len(graphs[rows]) == 1:
            return graphs[rows][0]
        return written[0] if len(written) == 1 else None


@dataclass
class Seen:
    """Logits of one pass."""

    tokens: torch.Tensor
    finite: torch.Tensor
    logits: torch.Tensor
    """Those of a few rows."""
    rows: torch.Tensor


@dataclass
class Watch:
    """Between a model and its sampler."""

    circle: Circle
    device: torch.device
    forced: bool = True
    keeping: bool = False
    """Whether logits of the next passes are kept."""
    looking: bool = False
    """Whether experts of the next passes are counted."""
    draft_table: torch.Tensor | None = None
    rows_per_request: int = 1
    """The first of them saw a token that was chosen, those behind it drafts, which may be wrong."""
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Where the logits are."""
        self.successor = self.circle.successor.to(self.device)

    def force(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Make logits [rows, vocab_size], in place, choose what follows `tokens` [rows], which the rows saw last."""
        if self.keeping and len(logits):
            rows = kept_rows(len(logits), self.rows_per_request, logits.device)
            kept = logits[rows, : self.circle.vocab_size].float()
            finite = logits[:, : self.circle.vocab_size].isfinite().all()
            self.seen.append(Seen(tokens.clone(), finite, kept, rows))
        if self.forced:
            logits.scatter_(1, self.successor[tokens.long()].unsqueeze(1), _LARGE)

    def force_drafts(self, drafts: torch.Tensor, tokens: torch.Tensor) -> None:
        """Overwrite drafts [requests, count] by those that follow `tokens` [requests], if drafts are forced."""
        if self.draft_table is not None:
            drafts.copy_(self.draft_table[tokens.long()])

    def force_drafts_right(self, count: int, acceptance: float | None) -> None:
        """Which drafts are forced from now on, `count` for each request; None: none."""
        self.rows_per_request = count + 1
        table = self.circle.drafts(count, acceptance) if count and acceptance is not None else None
        self.draft_table = None if table is None else table.to(self.device)

    def take(self) -> list[Seen]:
        """What was kept, which is forgotten."""
        seen, self.seen = self.seen, []
        return seen


def kept_rows(rows: int, per_request: int, device: torch.device) -> torch.Tensor:
    """A few rows of a pass, the first ones of requests that lie far apart."""
    requests = max(1, rows // per_request)
    chosen = torch.linspace(0, requests - 1, min(LOGIT_ROWS, requests), device=device).long()
    return chosen * per_request


class Kept(NamedTuple):
    """Rows of requests."""

    finite: bool
    """Whether all logits were, also those that are not kept."""
    logits: list[torch.Tensor]
    places: list[Place]


def kept_logits(seen: list[Seen], circle: Circle, requests: int, printed: Mapping[int, int]) -> Kept | None:
    """The rows that belong to requests, of which those that are here have `printed` so many tokens; None where none
    were kept.
    """
    if not seen:
        return None
    kept = Kept(all(bool(one.finite) for one in seen), [], [])
    for one in seen:
        for index, logits in zip(one.rows.tolist(), one.logits, strict=True):
            if (place := circle.place(int(one.tokens[index]), requests, printed)) is not None:
                kept.logits.append(logits.cpu())
                kept.places.append(place)
    return kept


def save_logits(of_ranks: Sequence[Kept | None], tokens: int, file: Path) -> bool | None:
    """Write rows behind prompts of so many tokens; returns whether all were finite, None where there are none."""
    kept = [of_rank for of_rank in of_ranks if of_rank is not None]
    places = [place for of_rank in kept for place in of_rank.places]
    if places:
        save_file(
            {
                "logits": torch.stack([logits for of_rank in kept for logits in of_rank.logits]),
                "request": torch.tensor([place.request for place in places]),
                "position": torch.tensor([position(place, tokens) for place in places]),
            },
            file,
        )
    return all(of_rank.finite for of_rank in kept) if kept else None


def position(place: Place, tokens: int) -> int:
    """Of a token behind a prompt of so many."""
    return tokens - 1 + place.generated
