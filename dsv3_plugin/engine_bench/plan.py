"""Who is measured, and what.

A contender is an engine in one of its ways to serve the model. The engine's own model is `stock`; there may be several
of them, and the fastest whose rows mean something is what ours is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dsv3_plugin.contenders import Setting, chosen
from dsv3_plugin.engine_bench.limits import Model
from dsv3_plugin.engine_bench.protocol import UNTIMED, Measurement
from dsv3_plugin.errors import EngineError
from dsv3_plugin.profile import ATTENTION_VARIABLE
from dsv3_plugin.registry import MODE_VARIABLE
from dsv3_plugin.variables import KILL_SWITCH

Role = Literal["stock", "invariant", "strict", "fast", "two-form"]
OURS: tuple[Role, ...] = ("strict", "fast", "two-form")
GROUPS = ("prefill", "decode", "drafts")

PREFILLS = ("8x4096", "1x32768", "8x4096/2048")
BATCHES = (1, 8, 32, 128, 256)
CONTEXTS = (1024, 8192, 32768)
DRAFTS = (1, 3)
DRAFT_BATCHES = (1, 32)
ACCEPTANCE = 0.85
MOST_TOKENS = 1_200_000
"""Of the prompts of one measurement: 256 requests of 32,768 tokens take minutes before their first step."""


@dataclass(frozen=True)
class Contender:
    """An engine in one of its ways."""

    engine: str
    way: str
    role: Role
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of its environment."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the engine."""

    @property
    def name(self) -> str:
        """`vllm-stock`."""
        return f"{self.engine}-{self.way}"

    @property
    def is_ours(self) -> bool:
        """Whether it serves this package's model."""
        return self.role in OURS


_OFF = {KILL_SWITCH: "off"}
_DETERMINISTIC = {"enable_deterministic_inference": True}
_TWO_FORM = {MODE_VARIABLE: "strict", ATTENTION_VARIABLE: "two_form"}
CONTENDERS = (
    Contender("vllm", "stock", "stock", _OFF),
    Contender("vllm", "stock-triton", "stock", _OFF | {"VLLM_USE_DEEP_GEMM": "0"}),
    Contender("vllm", "invariant", "invariant", _OFF | {"VLLM_BATCH_INVARIANT": "1"}),
    Contender("vllm", "strict", "strict", {MODE_VARIABLE: "strict"}),
    Contender("vllm", "fast", "fast", {MODE_VARIABLE: "fast"}),
    Contender("vllm", "two-form", "two-form", _TWO_FORM),
    Contender("sglang", "stock", "stock", _OFF),
    Contender("sglang", "invariant", "invariant", _OFF, _DETERMINISTIC),
    Contender("sglang", "strict", "strict", {MODE_VARIABLE: "strict"}),
    Contender("sglang", "fast", "fast", {MODE_VARIABLE: "fast"}),
    Contender("sglang", "two-form", "two-form", _TWO_FORM),
)


def contenders(names: Sequence[str], settings: Iterable[str] = ()) -> list[Contender]:
    """Those of these names, all without any, with the user's settings.

    A setting is `WHO:NAME=VALUE`, where WHO is a contender or an engine. NAME in capitals is an environment variable,
    any other an argument of the engine. Raises `EngineError`.
    """
    known = {contender.name: contender for contender in CONTENDERS}
    asked = chosen(known, names)
    for text in settings:
        setting = Setting.parse(text, "vllm-stock:VLLM_USE_DEEP_GEMM=0")
        if setting.who not in known and setting.who not in {contender.engine for contender in CONTENDERS}:
            raise EngineError(f"--set {text}: {setting.who} is neither a contender nor an engine")
        for name, contender in asked.items():
            if setting.who in (name, contender.engine):
                variables, arguments = setting.added_to(contender.variables, contender.arguments)
                asked[name] = replace(contender, variables=variables, arguments=arguments)
    return list(asked.values())


@dataclass(frozen=True)
class Choice:
    """The user's choice of measurements; the defaults are everything."""

    only: Sequence[str] = GROUPS
    prefills: Sequence[str] = PREFILLS
    batches: Sequence[int] = BATCHES
    contexts: Sequence[int] = CONTEXTS
    drafts: Sequence[int] = DRAFTS
    acceptance: float = ACCEPTANCE
    most_tokens: int = MOST_TOKENS


def measurements(choice: Choice) -> list[Measurement]:
    """What is measured of each contender, in order. Raises `EngineError`."""
    if unknown := set(choice.only) - set(GROUPS):
        raise EngineError(f"--only {', '.join(sorted(unknown))}: unknown; there are {', '.join(GROUPS)}")
    chosen: list[Measurement] = []
    if "prefill" in choice.only:
        chosen += map(_prefill, choice.prefills)
    if "decode" in choice.only:
        chosen += [Measurement(kind="decode", requests=b, tokens=c) for c in choice.contexts for b in choice.batches]
    if "drafts" in choice.only:
        batches = [batch for batch in choice.batches if batch in DRAFT_BATCHES] or choice.batches[:1]
        context = min(choice.contexts)
        without = [Measurement(kind="decode", requests=batch, tokens=context) for batch in batches]
        chosen += [each for each in without if each not in chosen]
        for drafts in choice.drafts:
            for batch in batches:
                chosen += [
                    Measurement(kind="decode", requests=batch, tokens=context, drafts=drafts, acceptance=acceptance)
                    for acceptance in (choice.acceptance, None)
                ]
    return chosen


def _prefill(text: str) -> Measurement:
    """`8x4096`, or `8x4096/2048` where a pass takes 2048 tokens."""
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?:/([1-9]\d*))?", text)
    if sizes is None:
        raise EngineError(f"--prefill {text}: write REQUESTSxTOKENS or REQUESTSxTOKENS/CHUNK, each 1 or more")
    requests, tokens, chunk = sizes.groups()
    return Measurement(
        kind="prefill", requests=int(requests), tokens=int(tokens), chunk=None if chunk is None else int(chunk)
    )


def impossible(measurement: Measurement, steps: int, most_tokens: int, model: Model) -> str | None:
    """Why a measurement is not made by anyone; None where it is."""
    tokens, last = measurement.requests * measurement.tokens, measurement.tokens + steps * (measurement.drafts + 1)
    if tokens > most_tokens:
        return f"{tokens:,} tokens of prompts, more than --tokens {most_tokens:,}"
    if last >= model.max_positions:
        return f"ends at position {last:,}, the checkpoint knows {model.max_positions:,}"
    if model.vocab_size // measurement.requests <= (steps + UNTIMED) * (measurement.drafts + 1):
        return f"the vocabulary's {model.vocab_size:,} tokens are too few to tell so many requests apart"
    if measurement.drafts and not model.mtp_layers:
        return "the checkpoint has no MTP layer"
    return None
