"""What a run says of itself: a line a step, `metrics.jsonl`, TensorBoard as Megatron has it, and a plot."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from dsv3_plugin.checkpoint.writer import require_writable_file
from dsv3_plugin.errors import EngineError, InputError

WINDOW = 5  # steps that the plot's mean is of: each has other prompts
console = Console(highlight=False, soft_wrap=True)


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        """The time since the last one was for `name`."""
        now = time.monotonic()
        self.laps[name], self.last = round(now - self.last, 3), now


class Record:
    """Writes each step as it ends. Raises `EngineError` where TensorBoard is asked for and missing."""

    def __init__(self, run: Path, tensorboard_dir: Path | None) -> None:
        self.file = run / "metrics.jsonl"
        self.writer: Any = None
        if tensorboard_dir is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise EngineError(f"--tensorboard-dir: {error}; pip install tensorboard") from None
            self.writer = SummaryWriter(tensorboard_dir)

    def add(self, of_step: dict[str, Any]) -> None:
        """A step's numbers."""
        with self.file.open("a") as file:
            print(json.dumps(of_step), file=file)
        console.print(line(of_step))
        for name, value in of_step.items() if self.writer is not None else ():
            if isinstance(value, int | float):
                self.writer.add_scalar(name, value, of_step["step"])


def line(of_step: dict[str, Any]) -> str:
    """For the terminal."""
    rewards = ", ".join(f"{name} {reward:.3f}" for name, reward in of_step["rewards"].items())
    seconds = ", ".join(f"{name} {time:.1f}" for name, time in of_step["seconds"].items())
    tokens = sum(of_step["tokens"].values())
    drafts = of_step["accepted"] / max(1, of_step["drafted"])
    return " | ".join(
        [
            f"step {of_step['step']}",
            f"reward {of_step['reward']:.3f} ({rewards})",
            f"{tokens:,} tokens: max |difference| {of_step['max_difference']!r},"
            f" ratios {of_step['ratio_min']!r} to {of_step['ratio_max']!r}",
            f"drafts accepted {drafts:.0%}, preempted {of_step['preempted']}, aborted {of_step['aborted']},"
            f" cut {of_step['cut']}, cached {of_step['cached']}",
            f"s: {seconds}",
            f"weights {of_step['weights'][:8]}",
        ]
    )


def steps(run: Path) -> list[dict[str, Any]]:
    """What a run has recorded; a last line that was cut, as a killed run may leave one, is left out.

    Raises `InputError` for another line that is no step.
    """
    if not (file := run / "metrics.jsonl").exists():
        return []
    found, lines = [], file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            of_step = json.loads(line)
            of_step["step"] + 0
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise InputError(f"{file}:{number}: is no step of a run; remove the line") from None
        found.append(of_step)
    return found


def forget_from(run: Path, step: int) -> None:
    """Drop the steps from `step` on, which are run again."""
    kept = [of_step for of_step in steps(run) if of_step["step"] < step]
    part = run / "metrics.jsonl.part"  # so that a run killed here keeps what it had
    part.write_text("".join(json.dumps(of_step) + "\n" for of_step in kept))
    part.replace(run / "metrics.jsonl")


def require_plot(path: Path) -> None:
    """Raise `InputError` for a file that `draw` cannot write, and `EngineError` where matplotlib is missing."""
    if path.suffix not in (".svg", ".png"):
        raise InputError(f"--plot {path}: name a file that ends in .svg or .png")
    require_writable_file(path, f"--plot {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise EngineError("--plot needs matplotlib: pip install 'dsv3-plugin[plot]'")


def draw(run: Path, path: Path) -> None:
    """Write an SVG or PNG: the rewards, and how far the trainer's log-probabilities are from the servers'.

    Raises `InputError` where there is nothing to draw.
    """
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "rl"
    recorded = steps(run)
    if not recorded:
        raise InputError(f"{run}: no step is recorded, and there is nothing to draw")
    at = [of_step["step"] for of_step in recorded]
    figure, (rewards, differences) = pyplot.subplots(
        2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    for name in recorded[0]["rewards"]:
        rewards.plot(at, [of_step["rewards"][name] for of_step in recorded], linewidth=1, alpha=0.5, label=name)
    means = [fmean(of_step["reward"] for of_step in recorded[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(at))]
    rewards.plot(at, means, color="black", linewidth=2, label=f"all answers of the last {WINDOW} steps")
    rewards.set_ylabel("mean reward of a step's answers")
    rewards.set_ylim(bottom=0)
    rewards.legend(frameon=False, loc="lower right")
    differences.plot(at, [of_step["max_difference"] for of_step in recorded], "o-", color="firebrick", markersize=3)
    differences.set_ylabel("max |difference|")
    differences.set_title("log-probabilities of all sampled tokens, trainer against servers", fontsize=9)
    if not any(of_step["max_difference"] for of_step in recorded):
        differences.set_ylim(-1e-4, 1e-3)
    differences.set_xlabel("step")
    for axes in (rewards, differences):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
