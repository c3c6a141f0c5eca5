"""Work beside other work: at once where no CUDA graph is captured, else on a second stream between two waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from dsv3_plugin.layers import beside as module
from dsv3_plugin.layers.beside import beside

CUDA = torch.device("cuda")


class FakeStream:
    """Writes down what it is told."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: FakeStream) -> None:
        self.told.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A graph is being captured by fakes; what they are told."""
    told: list[str] = []
    streams = [FakeStream("first", told)]
    second = FakeStream("second", told)

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(module, "_second_stream", lambda device: second)
    return told


def work(told: list[str], name: str) -> str:
    told.append(f"{name} on {torch.cuda.current_stream(CUDA).name}")  # type: ignore[attr-defined]
    return name


def test_a_graph_has_the_work_on_a_second_stream_between_two_waits(told: list[str]) -> None:
    join = beside(lambda: work(told, "this"), CUDA)
    work(told, "that")
    assert join() == "this"
    assert told == ["second waits for first", "this on second", "that on first", "first waits for second"]


def test_what_nobody_joins_is_not_waited_for(told: list[str]) -> None:
    """The twin: it is the join that makes the result safe to read."""
    beside(lambda: work(told, "this"), CUDA)
    assert told == ["second waits for first", "this on second"]


def test_without_a_graph_it_runs_where_it_is_written(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    join = beside(lambda: work(told, "this"), CUDA)
    work(told, "that")
    assert join() == "this"
    assert told == ["this on first", "that on first"]


def test_a_cpu_is_asked_for_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: pytest.fail("a CPU has none"))
    assert beside(lambda: 3, torch.device("cpu"))() == 3
