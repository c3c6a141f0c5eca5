"""What a host writes for `dsv3 diff`: a folder, of which only the first file is needed.

    samples.jsonl       one `Sample` a line
    weights.json        {version: what `dsv3 fingerprint --json` says of it}: the weights of that version, as held here
    logits.safetensors  {id of a sample: fp32 [tokens with mask 1, vocab_size]}, before temperature
    about.json          `About`: versions, kernels and settings

A trainer and a server write such a folder each, of the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from dsv3_plugin.checkpoint.fingerprint import Fingerprint
from dsv3_plugin.conformance.protocol import first_mistake
from dsv3_plugin.errors import DiffError

SAMPLES = "samples.jsonl"
WEIGHTS = "weights.json"
LOGITS = "logits.safetensors"
ABOUT = "about.json"

T = TypeVar("T")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True, ser_json_inf_nan="constants")


class Sample(_Strict):
    """One sequence: prompt and answer, and what one side says of its tokens."""

    id: str
    """Of the sequence: by it the two sides' samples are matched."""
    token_ids: tuple[int, ...]
    """Prompt and answer."""
    mask: tuple[int, ...]
    """For each token 1 where its log-probability counts, which is where it was sampled, else 0."""
    logprobs: tuple[float | None, ...]
    """For each token its log-probability given the tokens before it. Read where the mask is 1."""
    positions: tuple[int, ...] | None = None
    """For each token its position; 0, 1, 2, ... if not given."""
    temperature: float = Field(default=1.0, gt=0)
    """That `logprobs` were computed with."""
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    version: int | None = None
    """Of the weights that `logprobs` were computed with: how many updates they have seen."""

    @model_validator(mode="after")
    def _one_a_token(self) -> Sample:
        for name in ("mask", "logprobs", "positions"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.token_ids):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.token_ids)} tokens")
        if any(value not in (0, 1) for value in self.mask):
            raise ValueError("mask has other numbers than 0 and 1")
        return self

    @property
    def counted(self) -> list[int]:
        """Indices of the tokens with mask 1."""
        return [i for i, value in enumerate(self.mask) if value]


class About(_Strict):
    """What a side says of itself. Where the two differ, `dsv3 diff` prints both."""

    name: str | None = None
    versions: dict[str, str] = {}
    """Package to version."""
    kernels: dict[str, str] = {}
    """Operation to what computes it."""
    settings: dict[str, Any] = {}
    """Anything that may matter: options, layout, dtype."""


def read_samples(file: Path) -> dict[str, Sample]:
    """By their ids. Raises `DiffError` that names the line which is no `Sample`, or whose id another has."""
    found: dict[str, Sample] = {}
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            # As bytes, so that a line of another encoding is named as any other wrong one.
            if not line.strip():
                continue
            sample = _validated(TypeAdapter(Sample), line, f"{file}:{number}")
            if sample.id in found:
                raise DiffError(f"{file}:{number}: a second sample with the id {sample.id!r}; ids must be different")
            found[sample.id] = sample
    if not found:
        raise DiffError(f"{file}: no samples in it")
    return found


def read_weights(file: Path) -> dict[int, Fingerprint]:
    """Fingerprints by version. Raises `DiffError`."""
    return _validated(TypeAdapter(dict[int, Fingerprint]), file.read_bytes(), str(file))


def read_about(file: Path) -> About:
    """Raises `DiffError`."""
    return _validated(TypeAdapter(About), file.read_bytes(), str(file))


def _opened(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise DiffError(f"{file}: cannot be read: {error.strerror}") from None


def _validated(kind: TypeAdapter[T], text: bytes, where: str) -> T:
    try:
        return kind.validate_json(text)
    except ValidationError as error:
        raise DiffError(f"{where}: {first_mistake(error)}") from None
