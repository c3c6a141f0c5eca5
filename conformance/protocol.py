"""The testee protocol: a job folder goes in, a result folder comes out.

    python -m my_testee JOB_DIR RESULT_DIR

`JOB_DIR/job.json` is a `Job`. The testee writes `RESULT_DIR/result.json`, a `Result`, and for each case
`RESULT_DIR/{case}.safetensors` with the rows that it computed. A *row* is what one token's position yields: its
logits, or a layer's output. It is known by the request it belongs to and by the token prefix that it saw, so that
rows of different engines can be matched whatever their schedules. A tensor file holds for each *stream*

    {stream}          [rows, width]  fp32 or bf16
    {stream}.request  int32 [rows]   index of the request within its case
    {stream}.position int32 [rows]   position of the last token that the row saw
    {stream}.prefix   int64 [rows]   digest of the tokens 0..position

Streams: `logits`; `mtp.0`, `mtp.1`, ... (the draft's logits of each draft step; position and prefix include the next
token, which the draft saw); `embed_tokens`, `layers.{i}.self_attn`, `layers.{i}.mlp`, `layers.{i}`, `norm` (the main
model's modules in the order in which they run); where the job asks for `operations`, what each of them computes
(`taps`), integers and fp8 patterns as uint8 among them. A file's metadata may tell the order of its streams.

On standard output a testee prints progress as lines `DSV3-PROGRESS {"case": ...}`; everything else that it prints goes
to a log.

The protocol has a version, MAJOR.MINOR. A new minor one adds fields that have defaults, and kinds of streams: whoever
reads an older message finds the defaults, whoever reads a newer one passes over what it does not know. Anything else
is a new major version, which an old reader refuses by name.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from dsv3_plugin.errors import ConformanceError

PROTOCOL_VERSION = "1.1"
PROGRESS_PREFIX = "DSV3-PROGRESS "
JOB_FILE = "job.json"
OWN_MODEL = "-own"
"""Behind a testee's name: of the model that an engine has itself."""
OWN_MODEL_OPTION = "--own-model"
"""By which a testee that ships with the suite is asked for it."""

Device = Literal["cpu", "cuda"]
Claim = Literal["equality", "closeness"]

_T = TypeVar("_T", bound=BaseModel)


def tell_progress(what: str) -> None:
    """Print a line of progress."""
    # One write with its end of line: ranks share the pipe, and `print` makes two.
    sys.stdout.write(f"{PROGRESS_PREFIX}{json.dumps({'case': what})}\n")
    sys.stdout.flush()


class _Message(BaseModel):
    # NaN and infinities are written as such: to be judged, not refused.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Request(_Message):
    """A prompt and how many tokens to generate; the end-of-sequence token does not stop it."""

    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    """0: greedy."""
    seed: int = 0
    """Of the random numbers at a temperature above 0: the same request draws the same tokens in every batch."""
    n: int = 1
    """Sequences to draw. They count as n requests one after the other, with the seeds seed, seed + 1, ..."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Of every token of the prompt and of those generated: a positive logit is divided by it, another multiplied."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit as often as the token was generated."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    logprobs: bool = True
    """Whether log-probabilities of the generated tokens are wanted. Without, an engine may schedule otherwise: SGLang
    mixes no request with them into another's chunk.
    """
    top_logprobs: int = 0
    """How many of the most likely tokens are answered beside each token whose log-probability is."""
    prompt_logprobs: bool = False
    """Whether log-probabilities of the prompt's tokens are wanted; such a request reads no prefix cache."""
    generated_token_ids: tuple[int, ...] = ()
    """Of a finished request that the suite lets the reference compute once more: what was generated. No testee is asked
    for it.
    """

    @property
    def settings(self) -> dict[str, object]:
        """What the request asks of a sampler beyond its defaults: what a testee may decline by `unsupported`."""
        plain = ("prompt_token_ids", "max_tokens", "seed", "logprobs", "top_logprobs", "prompt_logprobs")
        return {
            name: value for name, value in self if name not in plain and value != type(self).model_fields[name].default
        }


class Case(_Message):
    """Requests and the schedule under which they run, starting from an empty cache."""

    name: str
    title: str
    rounds: tuple[tuple[Request, ...], ...]
    """The requests of a round arrive together; a round starts when the one before has finished. Caches stay."""
    max_num_batched_tokens: int | None = None
    """Tokens that a step may process; a longer prompt is prefilled in chunks. None: no limit."""
    num_speculative_tokens: int = 0
    """Draft tokens that MTP proposes a step."""
    prompt_logits: bool = False
    """Whether logits are wanted at every position of the prompts."""
    min_cached_tokens: int = 0
    """Tokens that each request of the last round must find in the prefix cache, else the case did not test what it
    says.
    """
    min_accepted_tokens: int = 0
    """Draft tokens that must be accepted in all."""

    @property
    def single_rounds(self) -> tuple[tuple[Request, ...], ...]:
        """The rounds with each request of n sequences as n requests of one."""
        return tuple(
            tuple(
                request.model_copy(update={"n": 1, "seed": request.seed + i})
                for request in requests
                for i in range(request.n)
            )
            for requests in self.rounds
        )

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests of one sequence in order; a row's request index counts through the rounds."""
        return tuple(request for requests in self.single_rounds for request in requests)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, so that testees go on with different ones."""
        return any(request.temperature > 0 for request in self.requests)


class Capture(_Message):
    """A call of an operation to be saved, arguments and all (`calls`), in `call_file`: that of the first pass of a case
    that has the row in question.
    """

    case: str
    stream: str
    """Of the operation, as `taps` names it, with or without the number of an output."""
    prefix: int
    """Of the row."""


class Job(_Message):
    """What a testee is asked to do."""

    protocol_version: str = PROTOCOL_VERSION
    checkpoint: str
    device: Device = "cpu"
    """Where the model runs; on another kind of device the bits are others."""
    block_size: int
    cases: tuple[Case, ...]
    operations: bool = False
    """Whether streams of each operation's outputs are wanted too (`taps`); a testee that has none leaves them out."""
    capture: Capture | None = None
    """A call to save, by a testee that answers with operations."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max((len(r.prompt_token_ids) + r.max_tokens for case in self.cases for r in case.requests), default=0)

    @property
    def most_requests(self) -> int:
        """Of one sequence that arrive together."""
        return max((len(requests) for case in self.cases for requests in case.single_rounds), default=0)


TopLogprobs = tuple[tuple[int, float], ...]
"""(token, log-probability) of the most likely tokens, in any order."""


class RequestResult(_Message):
    """What became of a request of one sequence. What its log-probabilities are, `sampling` defines."""

    token_ids: tuple[int, ...]
    """Prompt and generated tokens."""
    num_cached_tokens: int
    logprobs: tuple[float, ...] = ()
    """Of each generated token, greedy ones too."""
    top_logprobs: tuple[TopLogprobs, ...] = ()
    """For each generated token the request's number of most likely ones."""
    prompt_logprobs: tuple[float, ...] = ()
    """Of each token of the prompt but the first, where the request asks for them."""
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()
    """For each of these the request's number of most likely ones."""
    unsupported: str | None = None
    """Why this engine cannot do exactly what the request's `settings` ask, or not run its case on several ranks.
    Nothing else is then read; the report counts it and names the reason.
    """


class CaseResult(_Message):
    """What became of a case. The rows are in the tensor file."""

    name: str
    requests: tuple[RequestResult, ...]
    num_draft_tokens: int
    num_accepted_tokens: int
    seconds: float


class Served(_Message):
    """Which class and which kernels really ran."""

    model_class: str
    draft_class: str | None
    profile: str
    kernels: dict[str, str]
    """Operation to provider and version."""


class Result(_Message):
    """A testee's answer."""

    protocol_version: str = PROTOCOL_VERSION
    testee: str
    versions: dict[str, str]
    served: Served
    cases: tuple[CaseResult, ...]
    claim: Claim = "equality"
    """What the testee is judged by: `equality`, every bit; `closeness`, a distance that the report measures."""
    layout: str = "one"
    """Over which ranks the model was spread (`layouts.ParallelLayout`)."""
    schedule_not_followed: str | None = None
    """Why this testee computed the cases' sequences and not their schedules: a trainer has no cache. Its rows are
    compared; of caches and drafts nothing is claimed.
    """

    def outcome_of(self, case: Case) -> CaseResult:
        """What became of `case`, which the result must have."""
        return next(outcome for outcome in self.cases if outcome.name == case.name)


def prefix_digest(token_ids: Sequence[int]) -> int:
    """A signed 64-bit digest of a token prefix: BLAKE2b over little-endian int32."""
    tokens = array("i", token_ids)
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little", signed=True)


def prefix_digests(token_ids: Sequence[int], first: int = 0) -> list[int]:
    """`prefix_digest` of each prefix that ends at position `first` or later, in one reading."""
    digest = hashlib.blake2b(array("i", token_ids[:first]).tobytes(), digest_size=8)
    found = []
    for token in array("i", token_ids[first:]):
        digest.update(array("i", (token,)).tobytes())
        found.append(int.from_bytes(digest.copy().digest(), "little", signed=True))
    return found


def read_job(job_dir: Path) -> Job:
    """Read `job.json`. Raises `ConformanceError` where it does not follow the protocol."""
    return _read(Job, job_dir / JOB_FILE)


def read_result(result_dir: Path) -> Result:
    """Read `result.json`. Raises `ConformanceError` where it is missing or does not follow the protocol."""
    return _read(Result, result_dir / "result.json")


def write_message(message: Job | Result, folder: Path) -> None:
    """Write `job.json` or `result.json`."""
    name = JOB_FILE if isinstance(message, Job) else "result.json"
    (folder / name).write_text(message.model_dump_json(indent=1))


def tensor_file(result_dir: Path, case_name: str) -> Path:
    """Where a case's rows are."""
    return result_dir / f"{case_name}.safetensors"


def call_file(result_dir: Path) -> Path:
    """Where the call is that a job wants captured."""
    return result_dir / "call.safetensors"


def specification_file(result_dir: Path, case_name: str) -> Path:
    """Where the reference puts the same sequences computed in one pass each."""
    return result_dir / f"{case_name}.specification.safetensors"


def json_schema(message: Literal["job", "result"]) -> dict[str, Any]:
    """Of `job.json` or `result.json`, for whoever writes one in another language."""
    kind = Job if message == "job" else Result
    return kind.model_json_schema() | {"$id": f"dsv3-plugin conformance {message} {PROTOCOL_VERSION}"}


class _Version(BaseModel):
    protocol_version: str = ""


def _read(kind: type[_T], file: Path) -> _T:
    try:
        content = file.read_bytes()
        version = _Version.model_validate_json(content).protocol_version
        if not _is_newer_minor(version, file):
            return kind.model_validate_json(content)
        return kind.model_validate_json(content, extra="ignore")
    except FileNotFoundError:
        raise ConformanceError(f"{file}: missing; the testee did not finish") from None
    except ValidationError as error:
        raise ConformanceError(f"{file}: does not follow the protocol: {first_mistake(error)}") from None


def first_mistake(error: ValidationError) -> str:
    """What pydantic found first, in one line: `cases.3.name: Field required`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def _is_newer_minor(version: str, file: Path) -> bool:
    """Raises `ConformanceError` for another major version, or none."""
    parts, own = re.fullmatch(r"(\d+)\.(\d+)", version), PROTOCOL_VERSION.split(".")
    if parts is None or parts[1] != own[0]:
        raise ConformanceError(
            f"{file}: speaks version {version or '(none)'} of the protocol, this dsv3-plugin {PROTOCOL_VERSION}"
        )
    return int(parts[2]) > int(own[1])
