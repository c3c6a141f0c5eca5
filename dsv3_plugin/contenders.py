"""What benches have in common whose contenders are programs in processes of their own (`engine_bench`, `train_bench`).

A place in a run's folder holds numbered attempts. An attempt holds a job, and beside it what a program answered. A
program is run as `python -m MODULE ATTEMPT ATTEMPT/answers`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dsv3_plugin.conformance.layouts import RankOf
from dsv3_plugin.conformance.runner import python_of
from dsv3_plugin.errors import DSV3Error, EngineError

_Contender = TypeVar("_Contender")


class Message(BaseModel):
    """One JSON object."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


_Message = TypeVar("_Message", bound=Message)


def write_job(job: Message, folder: Path) -> None:
    """Write `job.json`."""
    (folder / "job.json").write_text(job.model_dump_json(indent=1) + "\n")


def read_job(kind: type[_Message], folder: Path) -> _Message:
    """Read `job.json`. Raises `EngineError`."""
    file = folder / "job.json"
    try:
        return kind.model_validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise EngineError(f"{file}: is no job: {error}") from None


def begin(folder: Path, settings: _Message, *free: str) -> tuple[_Message, bool]:
    """The settings of the run in a folder, and whether it is new there: then they are `settings`, and the caller writes
    them with `write_job` when all else of the run is there.

    Raises `EngineError` where the folder is none, holds other files, or a run of other settings than these, those in
    `free` left out.
    """
    if (folder / "job.json").exists():
        before = read_job(type(settings), folder)
        now = settings.model_dump()
        began = [(name, value) for name, value in before.model_dump().items() if name not in free]
        if other := [f"{name} {value}, not {now[name]}" for name, value in began if value != now[name]]:
            raise EngineError(f"{folder}: holds a run of another kind: {', '.join(other)}; name a new folder")
        return before, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = any(folder.iterdir())
    except OSError as error:
        raise EngineError(f"--out {folder}: cannot be a run's folder: {error.strerror}") from None
    if others:
        raise EngineError(f"{folder}: holds other files; name a new folder")
    return settings, True


def attempts(place: Path) -> list[Path]:
    """Those made so far, in order."""
    return sorted(place.glob("[0-9]*"), key=lambda attempt: int(attempt.name))


def new_attempt(place: Path, job: Message) -> Path:
    """The next one's folder, with its job."""
    attempt = place / str(1 + len(attempts(place)))
    attempt.mkdir(parents=True)
    write_job(job, attempt)
    return attempt


def command(environment: str, module: str, environments: Path, variables: Mapping[str, str]) -> tuple[str, ...]:
    """A program in an environment, with variables of its own. Raises `ConformanceError` where there is none."""
    python = python_of(environment, environments)
    words = [f"{name}={value}" for name, value in variables.items()]
    return (*(("env", *words) if words else ()), python, "-m", module)


def run_program(answer: Callable[[Path, Path], None]) -> None:
    """Call `answer` with the folders of job and results. Errors meant for the user end with status 2."""
    run_rank(lambda job_dir, result_dir, place: answer(job_dir, result_dir))


def run_rank(answer: Callable[[Path, Path, RankOf | None], None]) -> None:
    """The same of a program that `conformance.testees.ranks.start_ranks` may start, with its place if it was."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ports", help=argparse.SUPPRESS)
    parser.add_argument("job_dir", type=Path)
    parser.add_argument("result_dir", type=Path)
    options = parser.parse_args()
    try:
        place = RankOf.parse(options.layout, options.rank, options.ports) if options.layout else None
        answer(options.job_dir, options.result_dir, place)
    except DSV3Error as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def chosen(known: Mapping[str, _Contender], names: Sequence[str]) -> dict[str, _Contender]:
    """The contenders of these names, all without any. Raises `EngineError`."""
    for name in names:
        if name not in known:
            raise EngineError(f"--contender {name}: unknown; there are {', '.join(known)}")
    return {name: known[name] for name in known if not names or name in names}


class Setting(NamedTuple):
    """A user's `WHO:NAME=VALUE`. NAME in capitals is an environment variable."""

    who: str
    name: str
    text: str

    @classmethod
    def parse(cls, text: str, example: str) -> Setting:
        """Raises `EngineError`, which shows the example."""
        who, colon, rest = text.partition(":")
        name, equals, value = rest.partition("=")
        if not (colon and equals and name):
            raise EngineError(f"--set {text}: write WHO:NAME=VALUE, say {example}")
        return cls(who, name, value)

    def added_to(
        self, variables: Mapping[str, str], others: Mapping[str, Any]
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Variables and other settings with this one; another setting's value is JSON where it can be, else a text."""
        if self.name.isupper():
            return {**variables, self.name: self.text}, dict(others)
        try:
            value = json.loads(self.text)
        except ValueError:
            value = self.text
        return dict(variables), {**others, self.name: value}
