"""Sums, gathers and the experts' exchange over memory that the ranks of one host write to (peers.cu).

Launches only: the memory, and whether there is any, is `dsv3_plugin.peers`'s business. All ranks make each call
together, with the same sizes, on one stream each. Sizes depend on no data, so a CUDA graph holds every call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_plugin.kernels.cuda import compiler

MOST_RANKS = 8
WORD = 16
"""Bytes that a thread moves at once."""
_THREADS = 512
# Words that a CTA of a sum takes at a time, at most, and CTAs of a sum.
_CHUNK = 2048
_CTAS = 128
# A sum goes without flags if a rank has no more bytes to send, to all others together. Of a larger one, each adds a
# share, where there are more than two.
_AT_ONCE_BYTES = 4 * 1024 * 1024
# Words that a thread waits for without flags, of all ranks together, and a multiple of which a CTA takes.
_AT_ONCE_WORDS = 8
_AT_ONCE_STEP = 128
# CTAs that carry one rank's rows for one slot.
_PARTS = 4
_PATIENCE_SECONDS = 600
_COUNTS_AT = 128
# For the sums of 32 warps.
_SHARED_BYTES = 128
FILL = 0xFF
"""What every byte is before the first call: no flag has come, and no word (NOTHING in peers.cu)."""
_NAMES = ("fold_at_once", "fold_all", "fold_shares", "gather", "exchange_counts", "move_rows", "arrive")


@dataclass(frozen=True)
class View:
    """What one rank sees of memory to which all ranks write: full of `FILL` on all of them before any makes a call."""

    own: torch.Tensor
    """Its own part, uint8 [bytes]."""
    addresses: tuple[int, ...]
    """Where each rank's part begins, for this process."""
    rank: int

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.addresses)


def program(ranks: int) -> compiler.Program:
    """The kernels for so many ranks."""
    parameters = {
        "RANKS": ranks,
        "THREADS": _THREADS,
        "CHUNK": _CHUNK,
        "PARTS": _PARTS,
        "PATIENCE_SECONDS": _PATIENCE_SECONDS,
        "ROOM_AT": _room_at(ranks),
        "AT_ONCE": _AT_ONCE_WORDS // ranks,
        "AT_ONCE_AT": _at_once_at(ranks),
        "COUNTS_AT": _COUNTS_AT,
    }
    return compiler.Program("peers.cu", tuple(parameters.items()), ())


def load(ranks: int, device: int) -> None:
    """Compile and load the kernels: a CUDA graph's capture must not. Raises `KernelError`."""
    for name in _NAMES:
        compiler.function(program(ranks), name, device)


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


def _room_at(ranks: int) -> int:
    return _up(4 * _CTAS * ranks, 128)


def _at_once_at(ranks: int) -> int:
    return _room_at(ranks) + _CTAS * 2 * ranks * _CHUNK * WORD


class _Launcher:
    """Kernels on one rank's view."""

    def __init__(self, view: View, ctas: int) -> None:
        self.view = view
        self.epochs = torch.zeros(ctas, dtype=torch.int32, device=view.own.device)
        self.program = program(view.ranks)

        class Peers(ctypes.Structure):
            """The struct `Peers` of peers.cu."""

            _fields_ = (
                ("memory", ctypes.c_void_p * view.ranks),
                ("epochs", ctypes.c_void_p),
                ("rank", ctypes.c_int),
            )

            def getPtr(self) -> int:  # noqa: N802 (what the driver's bindings ask an argument for)
                return ctypes.addressof(self)

        self.peers = Peers((ctypes.c_void_p * view.ranks)(*view.addresses), self.epochs.data_ptr(), view.rank)

    def launch(self, name: str, ctas: int, *arguments: Any, threads: int | None = None) -> None:
        how = compiler.Launch(ctas, threads or _THREADS, _SHARED_BYTES)
        compiler.launch(self.program, name, how, (self.peers, *arguments))


class Collectives:
    """Sums and gathers of tensors of any size that is a whole number of `WORD`s."""

    def __init__(self, view: View) -> None:
        self._launcher, self._at_once = _Launcher(view, _CTAS), _Launcher(view, _CTAS)
        self._ranks = view.ranks
        self.device = view.own.device

    @staticmethod
    def bytes_for(ranks: int) -> int:
        """Of memory, what each rank's part has."""
        return _at_once_at(ranks) + _CTAS * 2 * ranks * _THREADS * (_AT_ONCE_WORDS // ranks) * WORD

    def tree_sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, contiguous fp32: `dsv3_plugin.ops.slices.tree_sum` of them in their order. There
        are a power of two of ranks.
        """
        out = torch.empty_like(x)
        if (self._ranks - 1) * x.nbytes <= _AT_ONCE_BYTES:
            words = x.nbytes // WORD
            chunk = _up(-(-words // _CTAS), _AT_ONCE_STEP)
            threads = min(_THREADS, chunk)
            self._at_once.launch("fold_at_once", -(-words // chunk), x, out, words, chunk, threads=threads)
        else:
            self._launch("fold_shares" if self._ranks > 2 else "fold_all", x, out)
        return out

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Contiguous x [...] of every rank, in their order, to [ranks, ...]."""
        out = x.new_empty(self._ranks, *x.shape)
        self._launch("gather", x, out)
        return out

    def _launch(self, name: str, x: torch.Tensor, out: torch.Tensor) -> None:
        words = x.nbytes // WORD
        chunk = min(_CHUNK, max(_THREADS, -(-words // _CTAS)))
        self._launcher.launch(name, min(_CTAS, -(-words // chunk)), x, out, words, chunk)


@dataclass(frozen=True)
class Sizes:
    """What an exchange has room for."""

    slots: int
    """Of experts, on all ranks; as many on each."""
    sent: tuple[int, ...]
    """Bytes of a row on its way to an expert, in each of the tensors that hold it; whole `WORD`s."""
    returned: int
    """Bytes of a row on its way back."""
    own_rows: int
    """Rows that a rank sends."""
    rows: int
    """Rows that come to a rank's experts."""


class Exchange:
    """Rows that go to the ranks of their experts, and back to where they came from.

    What `send` and `send_back` return lies in memory that the next exchange writes to.
    """

    def __init__(self, view: View, sizes: Sizes) -> None:
        self._view, self._sizes = view, sizes
        self._launcher = _Launcher(view, 1)

    @staticmethod
    def bytes_for(ranks: int, sizes: Sizes) -> int:
        """Of memory, what each rank's part has."""
        return _Places(ranks, sizes).end

    def send(
        self, rows: Sequence[torch.Tensor], slot_counts: torch.Tensor, rows_there: int
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Rows sorted by slot, each tensor contiguous with `Sizes.sent` bytes a row, and how many go to each slot,
        int64 [slots], to what came, uint8 [rows_there, ...], sorted by own slot and then by rank, and how many came for
        each, int64 [own slots]. Behind those the rows that came mean nothing.
        """
        view, sizes = self._view, self._sizes
        own_counts = slot_counts.new_empty(sizes.slots // view.ranks)
        self._launcher.launch("exchange_counts", 1, slot_counts, own_counts, sizes.slots)
        places = _Places(view.ranks, sizes)
        for x, at, width in zip(rows, places.sent, sizes.sent, strict=True):
            self._move(x, width, at, back=False)
        self._launcher.launch("arrive", 1)
        came = [self._at(at, rows_there, width) for at, width in zip(places.sent, sizes.sent, strict=True)]
        return came, own_counts

    def send_back(self, x: torch.Tensor, own_rows: int) -> torch.Tensor:
        """What the experts made of the rows that came, contiguous [rows_there, N], to what they made of this rank's
        own, [own_rows, N] as these were sorted.
        """
        at = _Places(self._view.ranks, self._sizes).returned
        self._move(x, self._sizes.returned, at, back=True)
        self._launcher.launch("arrive", 1)
        return self._at(at, own_rows, self._sizes.returned).view(x.dtype)

    def _move(self, x: torch.Tensor, width: int, at: int, *, back: bool) -> None:
        slots = self._sizes.slots
        self._launcher.launch("move_rows", slots * _PARTS, x, slots, width // WORD, at // WORD, int(back))

    def _at(self, at: int, rows: int, width: int) -> torch.Tensor:
        return self._view.own[at : at + rows * width].view(rows, width)


class _Places:
    """Where an exchange's parts begin."""

    def __init__(self, ranks: int, sizes: Sizes) -> None:
        at = _up(_COUNTS_AT + 4 * ranks * sizes.slots, 128)
        self.sent = []
        for width in sizes.sent:
            self.sent.append(at)
            at = _up(at + width * sizes.rows, 128)
        self.returned = at
        self.end = _up(at + sizes.returned * sizes.own_rows, 128)
