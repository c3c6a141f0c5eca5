"""The third step: which formula made a side's log-probabilities of its logits?

Equal logits do not give equal log-probabilities where one program computes log_softmax and another a cross-entropy:
the forms round differently. Each known one is computed here, and the one that gives a side's numbers, every bit, named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dsv3_plugin.conformance.compare import bits
from dsv3_plugin.diff.samples import Sample
from dsv3_plugin.diff.sides import Pair, Side
from dsv3_plugin.diff.steps import Step, counted

DEFINITION = "log_softmax(logits / temperature)"
"""What this project's servers and trainer answer (`conformance.sampling`)."""
MOST_TOKENS = 4096
"""That are computed: more prove nothing more."""


def _log_softmax(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return _at(x.log_softmax(-1), token)


def _cross_entropy(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """As `megatron.core.tensor_parallel.cross_entropy` on one rank: the shifted logit minus the logarithm of a sum."""
    shifted = x - x.max(-1, keepdim=True).values
    return -(shifted.exp().sum(-1).log() - _at(shifted, token))


def _minus_logsumexp(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return _at(x, token) - x.logsumexp(-1)


def _log_of_softmax(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return _at(x.softmax(-1), token).log()


def _at(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """x [n, vocab_size] at token int64 [n]."""
    return x.gather(-1, token[:, None])[:, 0]


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "log_softmax({})": _log_softmax,
    "Megatron's cross-entropy of {}": _cross_entropy,
    "x - logsumexp(x) of x = {}": _minus_logsumexp,
    "log(softmax({}))": _log_of_softmax,
}
"""Of logits fp32 [n, vocab_size], at temperature 1, and tokens int64 [n], to fp32 [n]."""


def _scaled(logits: torch.Tensor, sample: Sample, tempered: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """The logits as a formula may take them, the definition's way first. At temperature 1 all ways are one; they are
    told apart where other samples are `tempered`.
    """
    for name, x in (("logits", logits), ("logits rounded to bf16", logits.bfloat16().float())):
        if sample.temperature == 1 and not tempered:
            yield f"{name} / temperature", x
            continue
        temperature = x.new_tensor(sample.temperature)
        yield f"{name} / temperature", x / temperature
        yield f"{name} * (1 / temperature)", x * (1 / temperature)
        yield f"{name}, the temperature forgotten", x


def candidates(
    logits: torch.Tensor, token: torch.Tensor, sample: Sample, *, tempered: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each known formula and what it makes of logits fp32 [n, vocab_size] at token int64 [n]: fp32 [n]. `tempered`:
    whether some sample has another temperature than 1.
    """
    for of, x in _scaled(logits, sample, tempered):
        for form, compute in FORMS.items():
            yield form.format(of), compute(x, token)
    scaled = logits / logits.new_tensor(sample.temperature)
    exact = _log_softmax(scaled, token)
    yield f"{DEFINITION} rounded to bf16", exact.bfloat16().float()
    if sample.top_p < 1:
        yield f"{DEFINITION} of what top_p leaves", _log_softmax(_nucleus(scaled, sample.top_p), token)


def _nucleus(x: torch.Tensor, top_p: float) -> torch.Tensor:
    """x [n, vocab_size] with -inf for the tokens that top-p cuts."""
    probs, order = x.softmax(-1).sort(stable=True, dim=-1, descending=True)
    cut = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, order, probs.cumsum(-1) - probs > top_p)
    return x.masked_fill(cut, -torch.inf)


class Source(NamedTuple):
    """Whose numbers are looked for in whose logits."""

    numbers: str
    logits: str


@dataclass
class Matches:
    """How often each formula gave a side's number, bit for bit."""

    tokens: int = 0
    equal: dict[str, int] = field(default_factory=dict)

    @property
    def exact(self) -> list[str]:
        """Formulas that gave all numbers."""
        return [name for name, count in self.equal.items() if count == self.tokens]

    @property
    def nearest(self) -> tuple[str, int]:
        """The formula that gave most."""
        return max(self.equal.items(), key=lambda pair: pair[1])


def compare_formulas(left: Side, right: Side, pairs: Sequence[Pair], device: str = "cpu") -> Step:
    """Name each side's formula, from its own logits where it told them, else from the other's."""
    matches = _matches(left, right, pairs, device)
    if not matches:
        return Step("formula", "unknown", ("no logits to compute log-probabilities from",))
    says = [_told(source, found) for source, found in matches.items()]
    found = {
        f"{source.numbers} of {source.logits}": {
            "tokens": m.tokens,
            "exact": m.exact,
            "nearest": dict([m.nearest]),
        }
        for source, m in matches.items()
    }
    by_side: dict[str, set[str]] = {}
    for source, m in matches.items():
        by_side.setdefault(source.numbers, set()).update(m.exact)
    names = by_side.get(left.name, set()), by_side.get(right.name, set())
    if names[0] & names[1]:
        return Step("formula", "equal", tuple(says), found)
    told = names[0] and names[1]
    # A side's numbers that no formula makes of its own logits; those of the other side's may just be other logits.
    strange = any(not m.exact and source.numbers == source.logits for source, m in matches.items())
    if not told and not strange:
        return Step("formula", "unknown", tuple(says), found)
    # First the side that strays from the definition.
    return Step("formula", "different", tuple(sorted(says, key=lambda text: f"answers {DEFINITION}," in text)), found)


def _matches(left: Side, right: Side, pairs: Sequence[Pair], device: str) -> dict[Source, Matches]:
    found: dict[Source, Matches] = {}
    tokens = 0
    tempered = any(sample.temperature != 1 for pair in pairs for sample in (pair.left, pair.right))
    for pair in pairs:
        if not pair.tokens or tokens >= MOST_TOKENS:
            continue
        logits = [side.logits(sample, pair.tokens) for side, sample in ((left, pair.left), (right, pair.right))]
        tokens += len(pair.tokens)
        numbers = pair.logprobs()
        for side, own, other, value, sample in (
            (left, (left, logits[0]), (right, logits[1]), numbers[0], pair.left),
            (right, (right, logits[1]), (left, logits[0]), numbers[1], pair.right),
        ):
            of, x = own if own[1] is not None else other
            if x is None:
                continue
            matches = found.setdefault(Source(side.name, of.name), Matches())
            _count(matches, x.to(device), value, sample, pair.tokens, tempered)
    return found


def _count(
    matches: Matches,
    logits: torch.Tensor,
    value: torch.Tensor,
    sample: Sample,
    tokens: Sequence[int],
    tempered: bool,
) -> None:
    token = torch.tensor([sample.token_ids[i] for i in tokens], device=logits.device)
    matches.tokens += len(tokens)
    for name, made in candidates(logits, token, sample, tempered=tempered):
        equal = int((bits(made.cpu()) == bits(value)).sum())
        matches.equal[name] = matches.equal.get(name, 0) + equal


def _told(source: Source, matches: Matches) -> str:
    whose = "its own logits" if source.numbers == source.logits else f"the logits of {source.logits}"
    if exact := matches.exact:
        name = DEFINITION if DEFINITION in exact else " or ".join(exact)
        return f"{source.numbers} answers {name}, of {whose}: {counted(matches.tokens, 'token')}, every bit"
    name, count = matches.nearest
    return (
        f"{source.numbers}: no known formula gives its numbers from {whose}; the nearest is {name},"
        f" {count:,} of {matches.tokens:,}"
    )
