"""The two sides of a comparison: a dump that a host wrote (`samples`), or a testee's result folder of the suite."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from dsv3_plugin.checkpoint.fingerprint import Fingerprint
from dsv3_plugin.conformance.compare import RowFile
from dsv3_plugin.conformance.protocol import JOB_FILE, Job, Request, Result, prefix_digest, read_job, tensor_file
from dsv3_plugin.conformance.validate import require_answers
from dsv3_plugin.diff.samples import ABOUT, LOGITS, SAMPLES, WEIGHTS, About, Sample, read_about, read_samples
from dsv3_plugin.diff.samples import read_weights as read_weights_file
from dsv3_plugin.errors import DiffError


class Logits(Protocol):
    """Where a side's logits are found."""

    def __call__(self, sample: Sample, tokens: Sequence[int]) -> torch.Tensor | None:
        """fp32 [len(tokens), vocab_size], the rows that the sample's tokens at these indices were sampled from; None
        where they are not there.
        """


def no_logits(sample: Sample, tokens: Sequence[int]) -> torch.Tensor | None:
    """Of a side that has none."""
    return None


@dataclass(frozen=True)
class Side:
    """What is known of one side."""

    name: str
    about: About
    samples: Mapping[str, Sample]
    weights: Mapping[int, Fingerprint] = field(default_factory=dict)
    logits: Logits = no_logits
    rows: Mapping[str, RowFile] = field(default_factory=dict)
    """What its modules computed, by case."""
    chooses_tokens: bool = False
    """Whether it sampled for itself, so that behind the first token that differs nothing can be compared."""


def read_side(path: Path) -> Side:
    """A folder of the suite (`dsv3 conformance run --keep`), a dump's folder, or its file of samples alone.

    Raises `DiffError`, or `ConformanceError` for a result folder that does not follow the protocol.
    """
    if path.is_file():
        return Side(str(path), About(), read_samples(path))
    if (path / "result.json").is_file():
        return _of_suite(path)
    if not (path / SAMPLES).is_file():
        raise DiffError(f"{path}: neither a dump, which has {SAMPLES}, nor a testee's results, which have result.json")
    about = read_about(path / ABOUT) if (path / ABOUT).is_file() else About()
    return Side(
        name=about.name or str(path),
        about=about,
        samples=read_samples(path / SAMPLES),
        weights=read_weights_file(path / WEIGHTS) if (path / WEIGHTS).is_file() else {},
        logits=_LogitsOfDump(path / LOGITS) if (path / LOGITS).is_file() else no_logits,
    )


class _LogitsOfDump:
    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.tensors: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DiffError(f"{file}: cannot be read: {error}") from None
        self.ids = set(self.tensors.keys())

    def __call__(self, sample: Sample, tokens: Sequence[int]) -> torch.Tensor | None:
        if sample.id not in self.ids:
            return None
        logits: torch.Tensor = self.tensors.get_tensor(sample.id)
        counted = sample.counted
        if logits.dtype != torch.float32 or logits.dim() != 2 or len(logits) != len(counted):
            raise DiffError(
                f"{self.file}: {sample.id} is {logits.dtype} {tuple(logits.shape)}, expected fp32 rows for"
                f" {len(counted)} tokens with mask 1"
            )
        row_of = {token: row for row, token in enumerate(counted)}
        return logits[[row_of[token] for token in tokens]]


def _of_suite(folder: Path) -> Side:
    if not (folder.parent / JOB_FILE).is_file():
        raise DiffError(f"{folder.parent / JOB_FILE}: missing; a testee's results are compared beside their job")
    job = read_job(folder.parent)
    result = require_answers(job, folder)
    # Penalties and biases change logits behind the model.
    plain = {
        f"{case.name}/{i}"
        for case in job.cases
        for i, request in enumerate(case.requests)
        if not request.settings.keys() - {"temperature", "top_p", "top_k", "min_p"}
    }
    rows = {case.name: RowFile(tensor_file(folder, case.name)) for case in job.cases}
    settings = {"profile": result.served.profile, "layout": result.layout, "device": job.device}
    return Side(
        name=folder.name,
        about=About(
            name=folder.name,
            versions=result.versions,
            kernels=result.served.kernels,
            settings=settings | {"model_class": result.served.model_class},
        ),
        samples={sample.id: sample for sample in _samples(job, result)},
        logits=_LogitsOfSuite(rows, plain),
        rows=rows,
        chooses_tokens=True,
    )


def _samples(job: Job, result: Result) -> Iterator[Sample]:
    for case in job.cases:
        for i, (request, answer) in enumerate(zip(case.requests, result.outcome_of(case).requests, strict=True)):
            if answer.unsupported is None:
                yield _sample(f"{case.name}/{i}", request, answer.token_ids, answer.logprobs, answer.prompt_logprobs)


def _sample(
    name: str, request: Request, token_ids: tuple[int, ...], generated: Sequence[float], of_prompt: Sequence[float]
) -> Sample:
    prompt = len(request.prompt_token_ids)
    # A prompt's first token has none.
    unknown: list[float | None] = [None] * len(token_ids)
    before = [*unknown[:1], *of_prompt] if of_prompt else unknown[:prompt]
    logprobs = [*before, *(generated or unknown[prompt:])]
    if len(logprobs) != len(token_ids):
        raise DiffError(f"{name} has log-probabilities of {len(logprobs)} tokens, and {len(token_ids)} tokens")
    return Sample(
        id=name,
        token_ids=token_ids,
        mask=tuple(int(value is not None) for value in logprobs),
        logprobs=tuple(logprobs),
        temperature=request.temperature or 1.0,  # what a greedy request counts as
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
    )


class _LogitsOfSuite:
    def __init__(self, rows: Mapping[str, RowFile], plain: set[str]) -> None:
        self.rows = rows
        self.plain = plain

    def __call__(self, sample: Sample, tokens: Sequence[int]) -> torch.Tensor | None:
        case, _, request = sample.id.rpartition("/")
        if sample.id not in self.plain:
            return None
        keys = [(int(request), prefix_digest(sample.token_ids[:token])) for token in tokens]
        index = self._index(case)
        if not all(key in index for key in keys):
            return None
        return self._values(case)[[index[key] for key in keys]].float()

    @functools.cache  # noqa: B019 - as long as the side itself
    def _index(self, case: str) -> dict[tuple[int, int], int]:
        rows = self.rows[case]
        return {key: i for i, key in enumerate(rows.keys("logits"))} if "logits" in rows.streams else {}

    @functools.cache  # noqa: B019 - as long as the side itself
    def _values(self, case: str) -> torch.Tensor:
        return self.rows[case].values("logits")


@dataclass(frozen=True)
class Pair:
    """The same sequence on both sides."""

    left: Sample
    right: Sample
    tokens: tuple[int, ...]
    """Indices of the tokens whose log-probabilities are compared: both sides count and give them, after equal tokens.
    """
    missing: tuple[int, ...] = ()
    """Indices of such tokens that both sides count, and a side gives no log-probability of."""

    @property
    def staleness(self) -> int | None:
        """By how many updates the right side's weights are older; None where a version is not told."""
        if self.left.version is None or self.right.version is None:
            return None
        return self.left.version - self.right.version

    def logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `tokens`, as fp32, which both sides computed: JSON's digits are those of fp32 or of what holds it."""
        left, right = (
            torch.tensor([side.logprobs[i] for i in self.tokens], dtype=torch.float32)
            for side in (self.left, self.right)
        )
        return left, right


def matched(left: Side, right: Side) -> list[Pair]:
    """The samples that both have. Raises `DiffError` where there are none."""
    common = [name for name in left.samples if name in right.samples]
    if not common:
        ids = ", ".join(next(iter(side.samples), "none") for side in (left, right))
        raise DiffError(f"{left.name} and {right.name} have no sample in common; their ids begin with: {ids}")
    return [_pair(left.samples[name], right.samples[name]) for name in common]


def _pair(left: Sample, right: Sample) -> Pair:
    tokens: list[int] = []
    missing: list[int] = []
    for i, (a, b) in enumerate(zip(left.token_ids, right.token_ids, strict=False)):
        if a != b:
            break
        if left.mask[i] and right.mask[i]:
            (missing if None in (left.logprobs[i], right.logprobs[i]) else tokens).append(i)
    return Pair(left, right, tuple(tokens), tuple(missing))
