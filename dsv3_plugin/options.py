"""An engine's options, each with a verdict: honoured, irrelevant, or refused with its reason.

An engine has hundreds of options. What this package's model does not look at would be ignored without a word, so an
adapter declares every option of its engine in one table, and a test compares the table with the options that the
installed engine really has: an engine upgrade then shows what is new.

    OPTIONS = Options(
        "vLLM",
        honoured("the engine's scheduler, by which no bit moves", "max_num_seqs", "max_num_batched_tokens"),
        irrelevant("names files that hold no weights", "tokenizer"),
        refused("the model serves on one rank", "tensor_parallel_size", unless=(1,)),
    )
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

from dsv3_plugin.errors import EngineError
from dsv3_plugin.variables import KILL_SWITCH

_LONGEST = 120
"""Characters of a value in a message."""

Verdict = Literal["honoured", "irrelevant", "refused"]


@dataclass(frozen=True)
class Rule:
    """What becomes of some options."""

    verdict: Verdict
    reason: str
    """Why nothing is lost (honoured, irrelevant), or why the option cannot be served."""
    names: tuple[str, ...]
    allows: Callable[[Any], bool] = lambda value: True
    """Of a refused option: whether a value asks for nothing that is not served."""


def honoured(reason: str, *names: str) -> Rule:
    """Options that do under this package's model what the engine says of them."""
    return Rule("honoured", reason, names)


def irrelevant(reason: str, *names: str) -> Rule:
    """Options that can change neither numbers nor placement nor memory of this package's model."""
    return Rule("irrelevant", reason, names)


def refused(reason: str, *names: str, unless: Iterable[Any] = (), allows: Callable[[Any], bool] | None = None) -> Rule:
    """Options that are not served: None, False and the values in `unless`, or those that `allows` accepts, ask for
    nothing and pass.
    """
    harmless = (None, False, *unless)
    # By type too: 1 == True, and 0 == False.
    passes = allows or (lambda value: any(type(value) is type(ok) and value == ok for ok in harmless))
    return Rule("refused", reason, names, passes)


class Options:
    """All options of one engine. An option has one rule."""

    def __init__(self, engine: str, *rules: Rule, otherwise: str | None = None) -> None:
        """`otherwise`: what a user can do about a refusal, where the plugin cannot be switched off."""
        self.engine = engine
        self.otherwise = otherwise or f"Leave them out, or set {KILL_SWITCH}=off for {engine}'s own model"
        self.rules: dict[str, Rule] = {}
        for rule in rules:
            for name in rule.names:
                if name in self.rules:
                    raise ValueError(f"the option {name} of {engine} has two rules")
                self.rules[name] = rule

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Those of an engine's options that no rule names."""
        return sorted(set(names) - set(self.rules))

    def require_supported(self, values: Mapping[str, Any]) -> None:
        """Raise `EngineError` that names every option whose value is refused.

        Args:
            values: the engine's options as it was started.
        """
        problems = [
            f"{name}={_written(values[name])}: {rule.reason}"
            for name, rule in self.rules.items()
            if rule.verdict == "refused" and name in values and not rule.allows(values[name])
        ]
        if problems:
            raise EngineError(
                f"dsv3-plugin does not serve these options of {self.engine}: {'; '.join(problems)}. {self.otherwise}"
            )


def require_layers(name: str, stages: int, layers: int) -> None:
    """Raise `EngineError`, with the engine's name of the option, for more pipeline stages than decoder layers."""
    if stages > layers:
        raise EngineError(f"{name}={stages}: each stage has a decoder layer at least, and the model has {layers}")


def _written(value: Any) -> str:
    """As a user gave it: an engine's enumerations show what they hold, its sections all fields that nobody typed."""
    if isinstance(value, Enum):
        return value.name
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{type(value).__name__}(...)"
