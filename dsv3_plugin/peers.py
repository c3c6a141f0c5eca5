"""Memory that the ranks of one host write to, in place of the process group: for sums, gathers, and experts' rows.

Over it nothing waits for the host and no size depends on the data, so CUDA graphs hold passes of several ranks. The
bits are those of the process group: sums are the same tree, and the rest moves rows. `connected` gives it to a layout's
groups whose ranks are Hopper cards of one host that reach each other, once it has seen that what goes there is right;
other groups keep the process group, and the log says why.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import distributed as dist
from torch._C._distributed_c10d import _SymmetricMemory

from dsv3_plugin.errors import ConfigError, KernelError
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.cuda import peers as kernels
from dsv3_plugin.kernels.cuda.peers import View
from dsv3_plugin.layout import Group, Layout
from dsv3_plugin.ops.slices import tree_sum

T = TypeVar("T")
PEERS_VARIABLE = "DSV3_PEER_MEMORY"
"""`off` keeps the process groups: to see whether a difference comes from here."""


_FEWEST_TOKENS = 256


class PeerMemory:
    """What this rank does over memory of its group's ranks: `dsv3_plugin.layout.Peers`."""

    def __init__(self, allocate: Callable[[int], View], ranks: int, tokens: int) -> None:
        """`allocate` makes so many bytes on each rank, all of them together. `tokens`: of a rank, for which exchanges
        shall have room.
        """
        self._allocate = allocate
        self._ranks = ranks
        self._collectives = kernels.Collectives(allocate(kernels.Collectives.bytes_for(ranks)))
        self._exchanges: dict[kernels.Sizes, kernels.Exchange] = {}
        self.tokens = tokens
        self.most_tokens: int | None = None

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x is a whole number of words, not empty, and where the memory is."""
        return x.nbytes > 0 and x.nbytes % kernels.WORD == 0 and x.device == self._collectives.device

    def tree_sum(self, x: torch.Tensor) -> torch.Tensor:
        """See `Peers.tree_sum`."""
        return self._collectives.tree_sum(x)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See `Peers.gather`."""
        return list(self._collectives.gather(x))

    def exchange(self, slots: int, sent: tuple[int, ...], returned: int, own_rows: int) -> kernels.Exchange:
        """See `Peers.exchange`; layers of equal sizes share one, since they run one after the other. Raises
        `ConfigError` for rows of other sizes.
        """
        if odd := [width for width in (*sent, returned) if width % kernels.WORD]:
            raise ConfigError(f"rows of {odd[0]} bytes do not go over peer memory: set {PEERS_VARIABLE}=off")
        sizes = kernels.Sizes(slots, sent, returned, own_rows, own_rows * self._ranks)
        if sizes not in self._exchanges:
            view = self._allocate(kernels.Exchange.bytes_for(self._ranks, sizes))
            self._exchanges[sizes] = kernels.Exchange(view, sizes)
        return self._exchanges[sizes]


# A target and its draft have the same groups, and run one after the other.
_connected: dict[tuple[dist.ProcessGroup, int], PeerMemory | str] = {}


def connected(layout: Layout, device: torch.device, tokens: int) -> tuple[Layout, str | None]:
    """`layout` with peer memory in each group that can have it, and why one has none, in words for a log.

    Experts' rows have room for `tokens` of each rank, the largest CUDA graph's, and for some where there are no graphs.
    All ranks make this call together.
    """
    tokens = max(tokens, _FEWEST_TOKENS)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    tensor, experts = (_peers_of(group, device, tokens) for group in (layout.tensor, layout.experts))
    reasons = [found for found in (tensor, experts) if isinstance(found, str)]
    layout = replace(layout, tensor=_with(layout.tensor, tensor), experts=_with(layout.experts, experts))
    return layout, reasons[0] if reasons else None


def announcement(reason: str | None) -> str:
    """What an adapter writes to its engine's log where ranks share a model: of `connected`, why some have no peers."""
    if reason is None:
        return "dsv3-plugin: ranks write into each other's memory"
    return f"dsv3-plugin: ranks exchange through their process groups: {reason}"


def _peers_of(group: Group, device: torch.device, tokens: int) -> PeerMemory | str | None:
    """None for one rank."""
    if group.process_group is None:
        return None
    key = group.process_group, tokens
    if key not in _connected:
        _connected[key] = _connect(group, group.process_group, device, tokens)
    return _connected[key]


def _with(group: Group, peers: PeerMemory | str | None) -> Group:
    return replace(group, peers=peers) if isinstance(peers, PeerMemory) else group


@dataclass(frozen=True)
class _Place:
    """Where a rank is."""

    host: str
    card: str
    """Its UUID."""
    reason: str | None
    """Why it cannot have peers."""


def _connect(group: Group, process_group: dist.ProcessGroup, device: torch.device, tokens: int) -> PeerMemory | str:
    """The peers of a group, or why there are none, the same on all ranks."""
    places = _from_all(_place(group, device), group.size, process_group)
    if reason := next((place.reason for place in places if place.reason), None) or _unreachable(places):
        return reason
    failure: str | None = None
    try:
        kernels.load(group.size, torch.cuda.current_device())
    except KernelError as error:
        failure = str(error)
    if reason := _first(failure, group.size, process_group):
        return reason
    try:
        memory = PeerMemory(_Allocator(group, process_group, device), group.size, tokens)
    except RuntimeError as error:  # torch's, where the driver refuses
        failure = f"peer memory cannot be had: {' '.join(str(error).split())}"
    if reason := _first(failure, group.size, process_group):
        return reason
    return _first(_wrong(memory, group, device), group.size, process_group) or memory


def _place(group: Group, device: torch.device) -> _Place:
    return _Place(_host(), _card(device), _reason(group, device))


def _host() -> str:
    """This boot of this machine, whatever it is called."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return socket.gethostname()


def _card(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _reason(group: Group, device: torch.device) -> str | None:
    setting = os.environ.get(PEERS_VARIABLE, "")
    if setting not in ("", "off"):
        raise ConfigError(f"{PEERS_VARIABLE}={setting}: leave it out, or set it to off")
    if setting == "off":
        return f"{PEERS_VARIABLE}=off"
    if device.type != "cuda":
        return "ranks are not CUDA devices"
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "the kernels over peer memory need compute capability 9.0"
    if group.size > kernels.MOST_RANKS:
        return f"{group.size} ranks share something, peer memory serves {kernels.MOST_RANKS} at most"
    return compiler.missing()


def _unreachable(places: list[_Place]) -> str | None:
    """Why ranks cannot write into each other's memory."""
    if len({place.host for place in places}) > 1:
        return "ranks are on several hosts"
    visible = {_card(torch.device("cuda", i)): i for i in range(torch.cuda.device_count())}
    # Cards that this process does not see it cannot ask about: whether they are reached is then seen by trying.
    cards = [visible[place.card] for place in places if place.card in visible]
    for one in cards:
        for other in cards:
            if one != other and not torch.cuda.can_device_access_peer(one, other):
                return f"cards {one} and {other} do not reach each other's memory"
    return None


def _from_all(own: T, ranks: int, process_group: dist.ProcessGroup) -> list[T]:
    answers = [own] * ranks
    dist.all_gather_object(answers, own, group=process_group)
    return answers


def _first(failure: str | None, ranks: int, process_group: dist.ProcessGroup) -> str | None:
    """What failed first, on any rank."""
    return next((str(each) for each in _from_all(failure, ranks, process_group) if each), None)


class _Allocator:
    """Memory of torch's symmetric memory, which it keeps: handles are what keeps other ranks' memory mapped."""

    def __init__(self, group: Group, process_group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._process_group, self._device = group, process_group, device
        self._handles: list[object] = []

    def __call__(self, size: int) -> View:
        name = self._process_group.group_name
        own = _SymmetricMemory.empty_strided_p2p((size,), [1], torch.uint8, self._device, name)
        handle = _SymmetricMemory.rendezvous(own)
        self._handles.append(handle)
        assert own.data_ptr() == handle.buffer_ptrs[self._group.rank]
        own.fill_(kernels.FILL)
        torch.cuda.synchronize(self._device)
        dist.barrier(group=self._process_group)  # nobody writes to another's before all are filled
        return View(own, tuple(handle.buffer_ptrs), self._group.rank)


def _wrong(memory: PeerMemory, group: Group, device: torch.device) -> str | None:
    """What is wrong first with what goes over the memory; None if nothing. Whatever is found, all calls are made: the
    other ranks wait in them.
    """
    return next(iter([*_wrong_sums(memory, group, device), *_wrong_rows(memory, group, device)]), None)


def _wrong_sums(memory: PeerMemory, group: Group, device: torch.device) -> list[str]:
    """Of sums and gathers, small and large, some of them in a row."""
    found = []
    for call, words in enumerate((1, 700, 70_000, 3, 2_000_000, 700)):
        parts = [_drawn(call, rank, words).view(-1).to(device) for rank in range(group.size)]
        own = parts[group.rank]
        if not torch.equal(torch.stack(memory.gather(own)), torch.stack(parts)):
            found.append(f"{own.nbytes} bytes arrive wrong over peer memory")
        if group.size.bit_count() == 1 and not torch.equal(memory.tree_sum(own), tree_sum(parts)):
            found.append(f"a sum of {own.nbytes} bytes is wrong over peer memory")
    return found


def _wrong_rows(memory: PeerMemory, group: Group, device: torch.device) -> list[str]:
    """Of experts' rows, there and back: few, many, and of ranks that have none."""
    held, most = 3, 96
    slots = held * group.size
    exchange = memory.exchange(slots, (kernels.WORD,), kernels.WORD, most)
    found = []
    for call in range(4):
        counts = [(37 * call + 61 * rank) % most for rank in range(group.size)]
        rows = [_drawn(call, rank, count).to(device) for rank, count in enumerate(counts)]
        # The slots of a rank's rows, in order.
        chosen = [torch.arange(count, device=device) * slots // max(count, 1) for count in counts]
        own, first = rows[group.rank], held * group.rank
        slot_counts = torch.bincount(chosen[group.rank], minlength=slots)
        (came,), _ = exchange.send((own,), slot_counts, most * group.size)
        expected = torch.cat([rows[r][chosen[r] == first + i] for i in range(held) for r in range(group.size)])
        came = came[: len(expected)].view(torch.float32)
        if not torch.equal(came, expected):
            found.append("experts' rows arrive wrong over peer memory")
        if not torch.equal(exchange.send_back(2 * expected, len(own)), 2 * own):
            found.append("experts' rows come back wrong over peer memory")
    return found


def _drawn(call: int, rank: int, words: int) -> torch.Tensor:
    """What a rank sends, fp32 [words, 4], on the CPU, whatever dtype and device an engine has set."""
    generator = torch.Generator("cpu").manual_seed(8 * call + rank)
    return torch.randn(words, kernels.WORD // 4, generator=generator, dtype=torch.float32, device="cpu")
