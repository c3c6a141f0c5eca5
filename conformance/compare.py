"""Comparing rows: bit patterns, matched by request and token prefix.

Two testees agree on a case if every row that both computed has the same bits. A row that several passes computed (a
prompt's last token that was scored and sampled, a draft that was rejected and tried again) counts each time. Where
they differ, the first difference is the one at the lowest position, and there in the first module of the model: what
comes after it follows from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsv3_plugin.conformance.protocol import Case, RequestResult, prefix_digest
from dsv3_plugin.conformance.rows import ORDER, layer_streams
from dsv3_plugin.errors import ConformanceError

Key = tuple[int, int]
_AT_ONCE = 1024
"""Rows that are compared in one operation."""


@dataclass(frozen=True)
class Difference:
    """One element of one row that differs."""

    stream: str
    request: int
    position: int
    column: int
    left: float
    right: float
    ulps: int
    """Representable numbers between the two, in the row's dtype."""
    left_bits: str
    """The pattern, in hexadecimal digits."""
    right_bits: str

    def describe(self) -> str:
        """For the report."""
        return (
            f"{self.stream}, request {self.request}, position {self.position}, column {self.column}:"
            f" {self.left!r} and {self.right!r}, {self.ulps} ulp apart"
        )


@dataclass(frozen=True)
class Comparison:
    """Two testees on one case."""

    case: str
    left: str
    right: str
    equal_rows: int
    different_rows: int
    first_difference: Difference | None

    @property
    def equal(self) -> bool:
        """Whether every common row has the same bits, and there are some."""
        return self.different_rows == 0 and self.equal_rows > 0

    def describe(self) -> str:
        """For the report."""
        if self.equal:
            return f"{self.equal_rows:,} rows equal"
        if self.first_difference is not None:
            return f"first difference in {self.first_difference.describe()}"
        return "no rows in common, or of different dtypes"


class RowFile:
    """A testee's tensor file, read stream by stream.

    Raises `ConformanceError` where it does not follow the protocol.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._file: Any = safe_open(file, framework="pt")
            names = set(self._file.keys())
            order = json.loads((self._file.metadata() or {}).get(ORDER, "[]"))
            streams = sorted(name for name in names if f"{name}.prefix" in names)
            self.streams = [name for name in order if name in streams] or streams
            for stream in self.streams:
                rows, *_ = self._file.get_slice(stream).get_shape()
                of_rows = [f"{stream}.{what}" for what in ("request", "position", "prefix")]
                if any(self._file.get_slice(name).get_shape() != [rows] for name in of_rows):
                    raise ConformanceError(
                        f"{file}: {', '.join(of_rows)} must have {rows} numbers, as {stream} has rows"
                    )
        except (SafetensorError, OSError) as error:
            raise ConformanceError(f"{file}: does not follow the protocol: {error}") from None

    def keys(self, stream: str) -> list[Key]:
        """(request, prefix digest) of each row."""
        requests = self._file.get_tensor(f"{stream}.request").tolist()
        return list(zip(requests, self._file.get_tensor(f"{stream}.prefix").tolist(), strict=True))

    def positions(self, stream: str) -> torch.Tensor:
        """int32 [rows]."""
        return self._file.get_tensor(f"{stream}.position")

    def values(self, stream: str) -> torch.Tensor:
        """[rows, width]."""
        return self._file.get_tensor(stream)


def compare_case(case: str, left: tuple[str, RowFile], right: tuple[str, RowFile]) -> Comparison:
    """Compare all streams that both sides have."""
    (left_name, left_rows), (right_name, right_rows) = left, right
    equal = different = 0
    differences: list[Difference] = []
    for stream in right_rows.streams:
        if stream not in left_rows.streams:
            continue
        stream_equal, stream_different, first_of_stream = _compare_stream(stream, left_rows, right_rows)
        equal, different = equal + stream_equal, different + stream_different
        if first_of_stream is not None:
            differences.append(first_of_stream)
    first = min(differences, key=_order_of(right_rows.streams), default=None)
    return Comparison(case, left_name, right_name, equal, different, first)


def rows_alone(name: str, sides: dict[str, RowFile]) -> int:
    """How many rows of side `name` no other side computed, so that nothing is known of them."""
    count = 0
    for stream in sides[name].streams:
        others = [side.keys(stream) for other, side in sides.items() if other != name and stream in side.streams]
        known = {key for keys in others for key in keys}
        count += sum(key not in known for key in sides[name].keys(stream))
    return count


def streams_in_order(rows: RowFile) -> list[str]:
    """The main model's modules that a file has, in the order in which they run, and the logits."""
    layers = sum(1 for stream in rows.streams if stream.startswith("layers.") and stream.count(".") == 1)
    return [stream for stream in (*layer_streams(layers), "logits") if stream in rows.streams]


def _order_of(streams: list[str]) -> Any:
    """Sort differences by position, then by the order in which modules run; logits and drafts last.

    A file tells the order of its streams only where operations are among them, which have no other.
    """
    layers = sum(1 for stream in streams if stream.startswith("layers.") and stream.count(".") == 1)
    of_main = [stream for stream in streams if not stream.startswith("mtp.")]
    ordered = of_main if any("/" in stream for stream in streams) else [*layer_streams(layers), "logits"]
    rank = {stream: i for i, stream in enumerate(ordered)}

    def order(difference: Difference) -> tuple[int, int, int]:
        # A draft's position includes the token after the one that the main model was at.
        position = difference.position - difference.stream.startswith("mtp.")
        return position, rank.get(difference.stream, len(rank)), difference.request

    return order


def _compare_stream(stream: str, left: RowFile, right: RowFile) -> tuple[int, int, Difference | None]:
    """(equal, different, first difference) of the rows that both sides have."""
    pairs = matched_rows(stream, left, right)
    if not pairs:
        return 0, 0, None
    left_values, right_values = left.values(stream), right.values(stream)
    if left_values.dtype != right_values.dtype or left_values.shape[1] != right_values.shape[1]:
        return 0, len(pairs), None
    positions = right.positions(stream)
    different: list[tuple[int, int]] = []
    for start in range(0, len(pairs), _AT_ONCE):
        some = pairs[start : start + _AT_ONCE]
        of_left, of_right = (list(places) for places in zip(*some, strict=True))
        differs = (bits(left_values[of_left]) != bits(right_values[of_right])).any(1)
        different += [some[k] for k in differs.nonzero().flatten().tolist()]
    first = None
    if different:
        i, j = min(different, key=lambda pair: int(positions[pair[1]]))
        request = right.keys(stream)[j][0]
        first = first_difference(stream, request, int(positions[j]), left_values[i], right_values[j])
    return len(pairs) - len(different), len(different), first


def matched_rows(stream: str, left: RowFile, right: RowFile) -> list[tuple[int, int]]:
    """Each pair of rows of the same tokens, by their places on both sides; in the right side's order."""
    row_of: dict[Key, list[int]] = {}
    for i, key in enumerate(left.keys(stream)):
        row_of.setdefault(key, []).append(i)
    return [(i, j) for j, key in enumerate(right.keys(stream)) for i in row_of.get(key, ())]


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor, as integers of its width."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def first_difference(stream: str, request: int, position: int, left: torch.Tensor, right: torch.Tensor) -> Difference:
    """The first column in which two rows have different bits."""
    column = int((bits(left) != bits(right)).nonzero()[0])
    a, b = left[column], right[column]
    ulps = abs(_ordinal(a) - _ordinal(b))
    patterns = (f"0x{int(bits(x)) % (1 << 8 * x.element_size()):0{2 * x.element_size()}x}" for x in (a, b))
    return Difference(stream, request, position, column, a.item(), b.item(), ulps, *patterns)


def _ordinal(x: torch.Tensor) -> int:
    """The rank of a float among the numbers of its dtype, so that neighbours differ by one."""
    pattern = int(bits(x))
    lowest = -(1 << (8 * x.element_size() - 1))
    return pattern if pattern >= 0 else lowest - pattern


def tokens_differ(left: RequestResult, right: RequestResult) -> int | None:
    """The first position at which two requests' tokens differ, else None."""
    for position, (a, b) in enumerate(zip(left.token_ids, right.token_ids, strict=False)):
        if a != b:
            return position
    return None if len(left.token_ids) == len(right.token_ids) else min(len(left.token_ids), len(right.token_ids))


def missing_rows(case: Case, requests: tuple[RequestResult, ...], rows: RowFile) -> str | None:
    """Why a tensor file does not hold the logits that its case promises, else None.

    Promised: the row that each generated token was chosen from, and every row of the prompt where the case or the
    request's log-probabilities ask for them; of requests that the testee can do.
    """
    if "logits" not in rows.streams:
        return "no logits at all"
    found = set(rows.keys("logits"))
    for index, (request, result) in enumerate(zip(case.requests, requests, strict=True)):
        if result.unsupported is not None:
            continue
        prompt = len(request.prompt_token_ids)
        if result.token_ids[:prompt] != request.prompt_token_ids:
            return f"request {index} has another prompt than it was given"
        if len(result.token_ids) != prompt + request.max_tokens:
            return f"request {index} has {len(result.token_ids) - prompt} tokens, {request.max_tokens} were asked for"
        first = 0 if case.prompt_logits or request.prompt_logprobs else prompt - 1
        for position in range(first, len(result.token_ids) - 1):
            if (index, prefix_digest(result.token_ids[: position + 1])) not in found:
                return f"request {index} has no logits at position {position}"
    return None
