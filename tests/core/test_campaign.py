"""The list of what is measured on a card, and how it is run."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT

CAMPAIGN = ROOT / "tests/gpu/campaign.py"
JOBS = """
[[job]]
name = "first"
run = 'echo $OUT >$OUT/first; echo "cards: $CUDA_VISIBLE_DEVICES."'
cards = 0
processors = 1
seconds = 30

[[job]]
name = "second"
run = "cat $OUT/first; exit 3"
cards = 0
processors = 1
seconds = 30
after = ["first"]

[[job]]
name = "third"
run = "true"
cards = 0
processors = 1
seconds = 30
after = ["second"]

[[job]]
name = "endless"
run = "sleep 987 & sleep 987"
cards = 0
processors = 1
seconds = 1
"""


def campaign(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CAMPAIGN, *map(str, words)], capture_output=True, text=True, timeout=120)


def test_what_became_of_each_job(tmp_path: Path) -> None:
    file, out = tmp_path / "jobs.toml", tmp_path / "out"
    file.write_text(JOBS)
    done = campaign(out, "--jobs", file)
    assert done.returncode == 1, done.stderr
    assert json.loads((out / "jobs.json").read_text()) == {
        "first": "succeeded",
        "second": "failed",
        "third": "left out",
        "endless": "too long",
    }
    assert (out / "first.log").read_text() == "cards: .\n" and (out / "second.log").read_text() == f"{out}\n"
    left = subprocess.run(["pgrep", "--full", "--exact", "sleep 987"], capture_output=True)
    assert left.returncode == 1, "what a job started ends with it"
    file.write_text(JOBS.replace("exit 3", "exit 0"))
    began = time.monotonic()
    again = campaign(out, "--jobs", file, "--only", "third")
    assert again.returncode == 0 and time.monotonic() - began < 60
    assert "first" not in again.stdout and "third: succeeded" in again.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--only", "frist"], r"has no job frist; it has first"), (["--only", "wide"], r"wide needs 64 cards")],
)
def test_what_cannot_be_run_is_named(words: list[str], said: str, tmp_path: Path) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(JOBS + '[[job]]\nname = "wide"\nrun = "true"\ncards = 64\nseconds = 1\n')
    done = campaign(tmp_path / "out", "--jobs", file, *words)
    assert done.returncode == 1 and said in done.stderr and not (tmp_path / "out").exists()


def test_the_list_fits_a_machine_of_two_cards() -> None:
    module = runpy.run_path(str(CAMPAIGN))
    jobs = module["read_jobs"](module["JOBS"], [], 2, 32)
    order = [job.name for job in jobs]
    assert len(set(order)) == len(order)
    assert all(order.index(before) < order.index(job.name) for job in jobs for before in job.after)


def test_cards_are_shared_as_far_as_their_memory_goes() -> None:
    module = runpy.run_path(str(CAMPAIGN))
    machine, make = module["Machine"]([1.0, 1.0], list(range(8))), module["Job"]
    half, both = make(name="half", run="", seconds=1, share=0.5), make(name="both", run="", seconds=1, cards=2)
    places = [machine.take(half) for _ in range(2)]
    assert [place.cards for place in places] == [[0], [1]]
    assert machine.take(both) is None and machine.take(half) is None, "no processors"
    machine.give_back(half, places[0])
    assert machine.take(both) is None
    machine.give_back(half, places[1])
    assert machine.take(both).cards == [0, 1]
