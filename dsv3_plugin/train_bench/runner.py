"""Starting contenders one after the other, and making a board of what they said.

A run's state is its folder, and nothing else: `{contender}/{attempt}` holds a job and what its program answered. A run
that ended early goes on in its folder: who made all steps is not asked again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_plugin.checkpoint.tokenizer import tokenizer_files
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.conformance.programs import Program, Progress, run_programs
from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.contenders import Message, attempts, begin, command, new_attempt, read_job, write_job
from dsv3_plugin.errors import ConformanceError, EngineError
from dsv3_plugin.train_bench import plan, text
from dsv3_plugin.train_bench.board import Board, Record
from dsv3_plugin.train_bench.plan import CONTENDERS, Contender
from dsv3_plugin.train_bench.protocol import Job, heard

_PROGRAM = "dsv3_plugin.train_bench.contender"
_TOKENS = "tokens.safetensors"


class Settings(Message):
    """What all contenders of a folder have in common."""

    model: str
    config: dict[str, Any]
    device: Device
    sequence: int
    steps: int
    profiled: int
    learning_rate: float
    seed: int
    date: str


@dataclass(frozen=True)
class Bench:
    """One run: its folder, and who is asked."""

    folder: Path
    settings: Settings
    contenders: Sequence[Contender]
    environments: Path
    limit: int
    """Seconds that a contender may take."""
    progress: Progress
    changed: Callable[[Board], None]
    """Called with the board after each contender."""

    def run(self) -> Board:
        """Ask those who have not made all steps."""
        for contender in self.contenders:
            place = self.folder / contender.name
            if self._record(contender).end is None:
                self._attempt(contender, place)
            self.changed(self.board())
        return self.board()

    def board(self) -> Board:
        """What the folder holds, of earlier commands too."""
        asked = {contender.name: contender for contender in self.contenders}
        present = [asked.get(c.name, c) for c in CONTENDERS if c.name in asked or (self.folder / c.name).is_dir()]
        settings = self.settings
        return Board(
            date=settings.date,
            model=describe(settings.model, settings.config),
            tokens=settings.sequence,
            steps=settings.steps,
            records=tuple(map(self._record, present)),
        )

    def require_same_jobs(self) -> None:
        """Raise `EngineError` where the folder has answers to another job than a contender is given now."""
        for contender in self.contenders:
            for attempt in attempts(self.folder / contender.name):
                if read_job(Job, attempt) != self._job(contender):
                    raise EngineError(f"{attempt}: was asked for with other settings; name a new --out")

    def _attempt(self, contender: Contender, place: Path) -> None:
        attempt = new_attempt(place, self._job(contender))
        words = _command(self.environments, contender.variables)
        try:
            run_programs(
                {contender.name: Program(words, attempt, attempt / "answers")}, self.progress, float(self.limit)
            )
        except ConformanceError as error:
            (attempt / "failure.txt").write_text(f"{error}\n")
            self.progress(contender.name, str(error))

    def _job(self, contender: Contender) -> Job:
        settings = self.settings
        return Job(
            layers=contender.layers,
            config=plan.for_contender(settings.config, contender),
            device=settings.device,
            tokens=str((self.folder / _TOKENS).resolve()),
            sequence=settings.sequence,
            steps=settings.steps,
            profiled=settings.profiled,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            settings=dict(contender.settings),
            variables=dict(contender.variables),
        )

    def _record(self, contender: Contender) -> Record:
        """Of its last attempt."""
        made = attempts(self.folder / contender.name)
        if not made:
            return Record(name=contender.name, job=self._job(contender))
        last = made[-1]
        answers = heard(last / "answers")
        failed = last / "failure.txt"
        return Record(
            name=contender.name,
            job=read_job(Job, last),
            start=answers.start,
            steps=answers.steps,
            end=answers.end,
            failure=failed.read_text().strip() if failed.exists() else None,
        )


def prepare(
    folder: Path,
    *,
    model: str,
    config: dict[str, Any],
    device: Device,
    sequence: int,
    steps: int,
    profiled: int,
    learning_rate: float,
    seed: int,
    contenders: Sequence[Contender],
    environments: Path,
    limit: int,
    progress: Progress,
    changed: Callable[[Board], None],
) -> Bench:
    """A run in a folder, new or begun before. Raises `EngineError` where that was of something else, a sequence is too
    long or the learning rate no number above zero, `ConfigError` for a configuration that is no model of this package,
    and `ConformanceError` where Megatron-Core is not installed.
    """
    parsed = DeepseekV3Config.from_dict(config, where=model)
    if not 0 < learning_rate < math.inf:
        raise EngineError(f"--lr {learning_rate}: above zero, and finite")
    if sequence > parsed.max_position_embeddings:
        raise EngineError(f"--tokens {sequence:,}: the model knows {parsed.max_position_embeddings:,} positions")
    settings = Settings(
        model=model,
        config=config,
        device=device,
        sequence=sequence,
        steps=steps,
        profiled=profiled,
        learning_rate=learning_rate,
        seed=seed,
        date=time.strftime("%Y-%m-%d"),
    )
    _command(environments, {})
    settings, is_new = begin(folder, settings, "date")
    if is_new:
        for name, content in tokenizer_files(parsed.vocab_size).items():
            (folder / name).write_text(content, "utf-8")
        text.write((steps + profiled) * sequence + 1, folder, folder / _TOKENS)
        write_job(settings, folder)
    bench = Bench(folder, settings, contenders, environments, limit, progress, changed)
    bench.require_same_jobs()
    return bench


def describe(name: str, config: dict[str, Any]) -> str:
    """A model in words."""
    model = DeepseekV3Config.from_dict(config)
    dense = model.first_k_dense_replace
    return (
        f"{name}: {plan.count_weights(model) / 1e9:.2f} billion weights, hidden size {model.hidden_size:,},"
        f" {model.num_attention_heads} heads, {dense} dense layers, {model.num_hidden_layers - dense} with"
        f" {model.n_routed_experts} experts, {model.num_nextn_predict_layers} MTP"
    )


def _command(environments: Path, variables: Mapping[str, str]) -> tuple[str, ...]:
    """The program, in Megatron's environment."""
    return command("megatron", _PROGRAM, environments, variables)
