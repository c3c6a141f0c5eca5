"""`dsv3 bench layouts` measures shared models, and sees bits that differ."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dsv3_plugin.commands import layouts
from dsv3_plugin.commands.bench import app
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConformanceError

WRONG = """
import torch
from dsv3_plugin.commands import layouts
from dsv3_plugin.layers.expert_parallel import ExpertParallelMoE
ExpertParallelMoE._chosen_slots = lambda self, topk_ids: topk_ids.flip(1) // 2
layouts.main()
"""


def bench(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["layouts", *map(str, arguments)], catch_exceptions=False)
    return done.exit_code, done.output


def test_measures_and_compares(mini: dict[str, Path]) -> None:
    status, printed = bench(mini["bf16"], "--layout", "dp=2,ep=2", "--tokens", 3, "--tokens", 5, "--repeats", 3)
    assert status == 0
    assert printed.count("dp=2,ep=2") == printed.count("equal") == 2


def test_measures_sums_beside_others(mini: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    status, printed = bench(mini["bf16"], "--layout", "tp=2", "--tokens", 3, "--repeats", 3)
    assert status == 0
    assert "tree, gloo, fp32" in printed and "gloo all-reduce, bf16" in printed
    assert "tp=2: a sum of all ranks, [tokens, 7168], median us" in " ".join(printed.split())


def test_other_bits_are_seen(mini: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "wrong.py"
    program.write_text(WRONG)
    start = layouts.start_ranks
    monkeypatch.setattr(
        layouts, "start_ranks", lambda command, *rest: start((sys.executable, str(program), *command[3:]), *rest)
    )
    status, printed = bench(mini["bf16"], "--layout", "dp=2,ep=2", "--tokens", 5, "--repeats", 3)
    assert status == 1
    assert "differ" in printed


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tp=2", "set DSV3_REDUCTION_SLICES"),
        ("pp=2", "stages only hand on"),
        ("one", "is what every layout is compared with; name tp"),
    ],
)
def test_what_cannot_be_measured_is_refused(layout: str, message: str, mini: dict[str, Path]) -> None:
    with pytest.raises(ConformanceError, match=message):
        bench(mini["bf16"], "--layout", layout)


def test_a_card_that_is_not_there_is_not_replaced_by_the_host(mini: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConformanceError, match=r"--device cuda: torch .* finds no card"):
        bench(mini["bf16"], "--layout", "dp=2,ep=2", "--device", "cuda")


def test_more_tokens_than_positions_are_refused(mini: dict[str, Path]) -> None:
    longest = DeepseekV3Config.from_pretrained(mini["bf16"]).max_position_embeddings
    with pytest.raises(ConformanceError, match=f"--tokens {longest + 1:,}: the model knows {longest:,} positions"):
        bench(mini["bf16"], "--layout", "dp=2,ep=2", "--tokens", longest + 1)
    for wrong in 0, -3:
        status, printed = bench(mini["bf16"], "--layout", "dp=2,ep=2", "--tokens", wrong)
        assert status == 2 and "Invalid value for '--tokens'" in printed
