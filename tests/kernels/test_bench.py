"""What `dsv3 bench kernels` makes of a case, on a CPU: clock and allocator are replaced, the rest runs."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: `make test` runs this in .envs/kernels")

from dsv3_plugin.kernels.bench import bench, measure, scoreboard
from dsv3_plugin.kernels.bench.case import Case, Contenders, peer, why_not
from dsv3_plugin.kernels.bench.measure import Call, RowBits, Time

OURS = torch.arange(6.0).bfloat16()
THEIRS = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 7.0]).bfloat16()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of buffers of every contender that was timed."""
    timed: list[int] = []

    def capture(calls: list[Call]) -> str:
        calls[0]()
        timed.append(len(calls))
        return "a graph"

    def time_in_turns(graphs: dict[int, str], calls: int) -> dict[int, Time]:
        assert set(timed) == {calls}
        return {index: Time(10.0 + index, 9.0, 12.0) for index in graphs}

    monkeypatch.setattr(bench, "capture", capture)
    monkeypatch.setattr(bench, "time_in_turns", time_in_turns)
    monkeypatch.setattr(bench, "workspace_bytes", lambda call: 512)
    monkeypatch.setattr(bench, "copy_of", lambda bytes_moved: lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return timed


def case(**more: object) -> Case:
    def make() -> Contenders:
        def breaks() -> torch.Tensor:
            raise RuntimeError("too many resources\nand a trace")

        return Contenders(
            lambda: OURS,
            {"theirs": lambda: THEIRS, "absent": peer(lambda: __import__("no_such_peer")), "breaks": breaks},
            {"theirs": lambda: OURS},
            served=lambda: OURS,
        )

    return Case("a case", make, **{"bytes_moved": 100e6, **more})


def test_every_contender_has_a_record_with_its_role(clock):
    records = bench.measure("group", case(), rotate=True, rows=RowBits(1000, 0))
    found = [(record.contender, record.role) for record in records]
    assert found == [
        ("ours", "ours"),
        ("served", "served"),
        ("theirs", "peer"),
        ("absent", "peer"),
        ("breaks", "peer"),
        ("theirs", "invariant"),
        ("copy", "copy"),
    ]
    ours, served, theirs, absent, breaks, invariant, copy = records
    assert served.differs == 0
    assert (ours.median_us, ours.workspace_bytes, ours.rows_compared, ours.rows_differ) == (10.0, 512, 1000, 0)
    assert (theirs.differs, theirs.outputs) == (1, 6) and invariant.differs == 0 and copy.differs is None
    assert (theirs.median_us, invariant.median_us) == (12.0, 15.0), "of one name, each with a time of its own"
    assert "no_such_peer" in str(absent.absent) and absent.median_us is None
    assert breaks.absent == "not timed: too many resources" and breaks.median_us is None
    assert clock == [2, 2, 2, 2, 2], "each timed on two buffers, which a cache of 250 MB cannot hold together"


def test_contenders_take_turns_each_on_a_rested_card(monkeypatch):
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: seen.append("rest"))

    def burst(graph: str, calls: int, replays: int) -> list[float]:
        seen.append(graph)
        return [len(seen) / calls] * replays

    monkeypatch.setattr(measure, "_burst", burst)
    times = measure.time_in_turns({0: "a", 1: "b", 2: "c"}, 2)
    assert seen[::2] == ["rest"] * 9 and seen[1::2] == [*"abc", *"bca", *"cab"]
    assert times[0].median == 12 / 2, "its places are 2, 12 and 16"


def test_buffers_are_not_rotated_where_one_is_larger_than_the_cache(clock):
    bench.measure("group", case(), rotate=False, rows=None)
    assert set(clock) == {1}


def test_what_is_bound_by_arithmetic_has_no_copy_beside_it(clock):
    records = bench.measure("group", case(bf16_operations=1e15), rotate=False, rows=None)
    assert [record.role for record in records] == ["ours", "served", "peer", "peer", "peer", "invariant"]
    assert records[0].floor_us == 1e15 / 790e6


def test_a_case_that_fails_is_named_and_the_others_are_measured(clock, monkeypatch, tmp_path, capsys):
    def breaks() -> Contenders:
        raise ValueError("no such tile")

    cases = [Case("broken", breaks, 1e6), case()]
    monkeypatch.setitem(bench.GROUPS, "dense", lambda: iter(cases))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    path = tmp_path / "board.json"
    with pytest.raises(bench.KernelError, match="not measured: broken: ValueError: no such tile"):
        bench.main(["dense"], path, True)
    assert "a case" in capsys.readouterr().out
    assert {record.case for record in scoreboard.read(path).records} == {"a case"}


def test_why_a_peer_was_not_timed_is_said_in_a_few_words():
    library = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic( x )`")
    assert why_not(library) == "does not take this shape"
    assert why_not(NotImplementedError("takes one token a request")) == "takes one token a request"
    assert why_not(ValueError("no such tile\nand a trace")) == "ValueError: no such tile"


def test_tokens_ascend_in_each_projection():
    cases = [case.name.removeprefix("fp8 ").split(" x ", 1) for case in bench.dense_cases()]
    for product in dict(reversed(case) for case in cases):
        tokens = [int(count) for count, of in cases if of == product]
        assert tokens == sorted(tokens)


def test_a_group_that_there_is_not_is_named():
    with pytest.raises(bench.KernelError, match="there is no group dens; the groups are dense, attention"):
        bench.main(["dens"], None, True)


def test_measurements_overwrite_nothing(tmp_path):
    path = tmp_path / "board.json"
    path.write_text("mine")
    with pytest.raises(bench.KernelError, match=r"board\.json exists"):
        bench.main(None, path, True)
