"""Starting contenders one after the other, and making a board of what they said.

A run's state is its folder, and nothing else: `{contender}/{drafts}/{attempt}` holds a job and what its program
answered. A contender that dies keeps the rows that it had measured, and is started again for those behind the one that
it died of. A run that dies goes on with its folder: what is missing of what is asked for is measured, and the board
shows all that the folder holds, so that a run may be made in parts. The reference comes last, because it is asked for
the positions that the others have kept.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.conformance.programs import Program, Progress, run_programs
from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.contenders import Message, attempts, begin, command, new_attempt, read_job, write_job
from dsv3_plugin.engine_bench.contenders.reference import Asked, ReferenceJob, distance, places_in
from dsv3_plugin.engine_bench.judge import Board, Record, seconds
from dsv3_plugin.engine_bench.limits import Model, read_model
from dsv3_plugin.engine_bench.plan import CONTENDERS, Contender, impossible
from dsv3_plugin.engine_bench.protocol import (
    Answers,
    Job,
    Measurement,
    Row,
    heard,
    logits_file,
    say,
)
from dsv3_plugin.errors import ConformanceError, EngineError
from dsv3_plugin.profile import (
    ATTENTION_VARIABLE,
    attention_from_environment,
    reduction_slices_from_environment,
)

_PACKAGE = "dsv3_plugin.engine_bench.contenders"
_EAGER = "eager"
_REFERENCE = "reference"
_TIMED_OUT = 124
"""Status of `timeout`."""


class Settings(Message):
    """What all attempts of a folder have in common."""

    checkpoint: str
    device: Device
    steps: int
    passes: int
    seed: int
    layout: str = "one"
    reduction_slices: int = 1
    date: str


@dataclass(frozen=True)
class Bench:
    """One run: its folder, and who is asked for what."""

    folder: Path
    settings: Settings
    model: Model
    contenders: Sequence[Contender]
    measurements: Sequence[Measurement]
    impossible: dict[str, str]
    environments: Path
    rounds: int
    """How often each contender is started, all of them in turns."""
    limit: int
    """Seconds that a program may take."""
    progress: Progress
    changed: Callable[[Board], None]
    """Called with the board after every row."""

    def run(self) -> Board:
        """Measure what is missing."""
        for round_ in range(1, self.rounds + 1):
            for contender in self.contenders:
                for drafts in dict.fromkeys(m.drafts for m in self.possible):
                    self._measure(contender, drafts, round_, eager=False)
                # Ours is the reference's own arithmetic; and without a card nobody has graphs.
                if self.settings.device == "cuda" and not contender.is_ours:
                    self._measure(contender, 0, 1, eager=True)
        self._ask_reference()
        board = self.board()
        self.changed(board)
        return board

    @property
    def possible(self) -> list[Measurement]:
        """What contenders are asked for."""
        return [m for m in self.measurements if str(m) not in self.impossible]

    def board(self) -> Board:
        """What the folder holds, of earlier commands too."""
        asked = {contender.name for contender in self.contenders}
        present = [c for c in CONTENDERS if c.name in asked or (self.folder / c.name).is_dir()]
        records = tuple(map(self._record, present))
        devices = [record.start.device for record in records if record.start is not None]
        measured = [row.measurement for record in records for row in record.rows]
        return Board(
            device=devices[0] if devices else self.settings.device,
            date=self.settings.date,
            model=self.model,
            layout=self.settings.layout,
            measurements=tuple(sorted({*self.measurements, *measured}, key=Measurement.order)),
            impossible=self.impossible,
            records=records,
            passes=self.settings.passes,
            steps=self.settings.steps,
            reference_failure=_answers(self.folder / _REFERENCE).failure,
        )

    def _measure(self, contender: Contender, drafts: int, round_: int, *, eager: bool) -> None:
        """What is missing until after a round, in as many starts as it takes."""
        place = _place(self.folder, contender.name, drafts, eager)
        name = contender.name + (f" {drafts} drafts" if drafts else "") + (f" {_EAGER}" if eager else "")
        words = _command(contender.engine, self.environments, contender.variables)
        _remember_settings(self.folder / contender.name, contender)
        if round_ > 1 and _answers(place).start is None:
            return
        while missing := self._missing(place, drafts, round_):
            failure = self._attempt(name, words, place, self._job(contender, missing, round_, eager))
            if failure is None:
                return
            answers = _last_attempt(place) / "answers"
            if heard(answers).start is None:
                return
            died_of = next(iter(self._missing(place, drafts, round_)), None)
            if died_of is not None:
                say(answers, Row(measurement=died_of, absent=failure))

    def _missing(self, place: Path, drafts: int, rounds: int) -> tuple[Measurement, ...]:
        """What was made less often than in so many rounds, and could be made so far."""
        made = _by_measurement(_answers(place).rows)
        failed = {m for m, rows in made.items() if rows[-1].absent is not None}
        asked = (m for m in self.possible if m.drafts == drafts and m not in failed)
        return tuple(m for m in asked if len(made[m]) < rounds)

    def _job(self, contender: Contender, measurements: tuple[Measurement, ...], round_: int, eager: bool) -> Job:
        settings = self.settings
        return Job(
            checkpoint=settings.checkpoint,
            device=settings.device,
            measurements=measurements,
            # Nobody asks an eager mode for its time.
            steps=2 if eager else settings.steps,
            passes=1 if eager else settings.passes,
            seed=settings.seed,
            layout=settings.layout,
            eager=eager,
            keeps_logits=round_ == 1,
            arguments=dict(contender.arguments),
        )

    def _attempt(self, name: str, words: Sequence[str], place: Path, job: Message) -> str | None:
        """Run a program in a new folder of `place`; returns why it failed, which stands beside its answers, too."""
        attempt = new_attempt(place, job)

        def progress(program: str, what: str) -> None:
            self.progress(program, what)
            self.changed(self.board())

        limited = ("timeout", str(self.limit), *words)
        try:
            run_programs({name: Program(limited, attempt, attempt / "answers")}, progress)
        except ConformanceError as error:
            failure = str(error)
            if f"failed with status {_TIMED_OUT}:" in failure:
                failure = f"took longer than --limit {self.limit} s"
            (attempt / "failure.txt").write_text(f"{failure}\n")
            self.progress(name, failure)
            return failure
        return None

    def _ask_reference(self) -> None:
        """For all kept logits that it has not answered yet, with the form of attention of who has kept them."""
        place, settings = self.folder / _REFERENCE, self.settings
        known = {asked.file for attempt in attempts(place) for asked in _asked(attempt)}
        kept: dict[str | None, list[Asked]] = defaultdict(list)
        for c in CONTENDERS:
            form = _settings(self.folder / c.name, c).get(ATTENTION_VARIABLE)
            kept[form] += [asked for asked in _kept(self.folder, c.name) if asked.file not in known]
        for form, asked in kept.items():
            if asked:
                job = ReferenceJob(
                    checkpoint=settings.checkpoint, device=settings.device, seed=settings.seed, asked=tuple(asked)
                )
                variables = {} if form is None else {ATTENTION_VARIABLE: form}
                self._attempt(_REFERENCE, _command(_REFERENCE, self.environments, variables), place, job)

    def _record(self, contender: Contender) -> Record:
        places = [_place(self.folder, contender.name, drafts, False) for drafts in _drafts(self.folder, contender.name)]
        answers = [_answers(place) for place in places]
        made = _by_measurement(row for answer in answers for row in answer.rows)
        eager = _place(self.folder, contender.name, 0, True)
        return Record(
            name=contender.name,
            engine=contender.engine,
            way=contender.way,
            role=contender.role,
            settings=_settings(self.folder / contender.name, contender),
            start=next((answer.start for answer in answers if answer.start is not None), None),
            rows=tuple(map(_best, made.values())),
            rounds=_rounds(made),
            failure="; ".join(answer.failure for answer in answers if answer.failure) or None,
            eager_failure=_answers(eager).failure,
            distances=_distances(self.folder, places),
            eager_distances=_distances(self.folder, [eager]),
        )


def prepare(
    folder: Path,
    checkpoint: Path,
    *,
    device: Device,
    layout: ParallelLayout,
    steps: int,
    passes: int,
    seed: int,
    most_tokens: int,
    contenders: Sequence[Contender],
    measurements: Sequence[Measurement],
    environments: Path,
    rounds: int,
    limit: int,
    progress: Progress,
    changed: Callable[[Board], None],
) -> Bench:
    """A run in a folder, new or begun before. Raises `EngineError` where that was of something else, where the
    checkpoint cannot be spread so, or where the environment chooses a form of attention, which contenders do by their
    names, and `ConformanceError` where an engine is not installed.
    """
    if (form := attention_from_environment()) != "absorbed":
        raise EngineError(
            f"{ATTENTION_VARIABLE}={form} would be every contender's: unset it, and name those that end in -two-form"
        )
    settings = Settings(
        checkpoint=str(checkpoint.resolve()),
        device=device,
        steps=steps,
        passes=passes,
        seed=seed,
        layout=str(layout),
        reduction_slices=reduction_slices_from_environment(),
        date=time.strftime("%Y-%m-%d"),
    )
    for engine in dict.fromkeys(contender.engine for contender in contenders):
        _command(engine, environments, {})
    if layout.pp > 1:
        raise EngineError(f"--layout {layout}: stages are not timed; name tp, dp and ep")
    reader = CheckpointReader(checkpoint)
    if (heads := reader.config.num_attention_heads) % layout.tp:
        raise EngineError(f"--layout {layout}: {checkpoint} has {heads} heads, which {layout.tp} ranks cannot share")
    if any(contender.is_ours for contender in contenders):
        layout.require_possible(reader.config, reader.profile())
    model = read_model(checkpoint)
    settings, is_new = begin(folder, settings, "date")
    if is_new:
        write_job(settings, folder)
    reasons = {str(m): reason for m in measurements if (reason := impossible(m, steps, most_tokens, model))}
    return Bench(
        folder, settings, model, contenders, measurements, reasons, environments, rounds, limit, progress, changed
    )


def _command(name: str, environments: Path, variables: Mapping[str, str]) -> tuple[str, ...]:
    """A program of the package, in its engine's environment."""
    return command(name, f"{_PACKAGE}.{name}", environments, variables)


def _place(folder: Path, name: str, drafts: int, eager: bool) -> Path:
    return folder / name / (_EAGER if eager else str(drafts))


def _drafts(folder: Path, name: str) -> list[int]:
    """Numbers of drafts that a contender was started with."""
    places = (folder / name).glob("*")
    return sorted(int(place.name) for place in places if place.name.isdigit())


def _last_attempt(place: Path) -> Path:
    return attempts(place)[-1]


def _settings(folder: Path, contender: Contender) -> dict[str, str]:
    """With which a contender was measured here, else those of now."""
    file = folder / "settings.json"
    if file.exists():
        return json.loads(file.read_text())
    return {name: str(value) for name, value in {**contender.variables, **contender.arguments}.items()}


def _remember_settings(folder: Path, contender: Contender) -> None:
    """Raise `EngineError` where the folder has rows of other settings."""
    now = {name: str(value) for name, value in {**contender.variables, **contender.arguments}.items()}
    if (before := _settings(folder, contender)) != now:
        raise EngineError(f"{folder}: holds rows of other settings, {before}; name a new --out")
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(now) + "\n")


def _answers(place: Path) -> Answers:
    """Of all attempts, in their order."""
    start, rows, failure = None, list[Row](), None
    for attempt in attempts(place):
        answers = heard(attempt / "answers")
        start = start or answers.start
        rows += answers.rows
        failed = attempt / "failure.txt"
        failure = failed.read_text().strip() if failed.exists() else None
    return Answers(start=start, rows=tuple(rows), failure=failure)


def _by_measurement(rows: Iterable[Row]) -> defaultdict[Measurement, list[Row]]:
    """Those of each, in their order."""
    found: defaultdict[Measurement, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.measurement].append(row)
    return found


def _rounds(made: Mapping[Measurement, Sequence[Row]]) -> int:
    """How often the measurement was made that was made least often, of those that were."""
    counts = (sum(row.absent is None for row in rows) for rows in made.values())
    return min(filter(None, counts), default=1)


def _best(rows: Sequence[Row]) -> Row:
    """The fastest. What the first one compiled, later starts find, and logits are the first one's. Tokens are as forced
    where all are.
    """
    measured = [row for row in rows if row.absent is None]
    if not measured:
        return rows[-1]
    best = min(measured, key=lambda row: seconds(row) or math.inf)
    of_all = {"as_forced": False} if any(row.as_forced is False for row in measured) else {}
    of_first = {"pass_seconds": measured[0].pass_seconds, "finite": measured[0].finite}
    return best.model_copy(update=of_first | of_all)


def _kept(folder: Path, name: str) -> Iterator[Asked]:
    """Files of logits of a contender, eager ones too."""
    for place in sorted((folder / name).glob("*")):
        for attempt in attempts(place):
            yield from _kept_in(attempt)


def _kept_in(attempt: Path) -> Iterator[Asked]:
    for number, measurement in enumerate(read_job(Job, attempt).measurements):
        file = logits_file(attempt / "answers", number)
        if file.exists():
            yield Asked(measurement=measurement, file=str(file.resolve()))


def _asked(attempt: Path) -> Sequence[Asked]:
    """What the reference has answered in an attempt."""
    answered = (attempt / "answers" / "reference.safetensors").exists()
    return read_job(ReferenceJob, attempt).asked if answered else ()


def _distances(folder: Path, places: Sequence[Path]) -> dict[str, float]:
    """Measurement to the distance of the kept logits, of those that the reference has answered."""
    cache = folder / _REFERENCE
    found: dict[str, float] = {}
    for attempt in attempts(cache):
        of_attempt = attempt / "distances.json"
        if not of_attempt.exists() and _asked(attempt):
            of_attempt.write_text(json.dumps(_compare(attempt)))
        if of_attempt.exists():
            for file, (measurement, far) in json.loads(of_attempt.read_text()).items():
                if any(Path(file).is_relative_to(place.resolve()) for place in places):
                    found[measurement] = far
    return found


def _compare(attempt: Path) -> dict[str, tuple[str, float]]:
    """File to its measurement and its logits' distance from what the reference has answered."""
    answers = load_file(attempt / "answers" / "reference.safetensors")
    compared = {}
    for number, asked in enumerate(_asked(attempt)):
        logits, reference = load_file(asked.file)["logits"], answers[str(number)]
        assert len(places_in(Path(asked.file))) == len(reference)
        compared[asked.file] = str(asked.measurement), distance(logits, reference)
    return compared
