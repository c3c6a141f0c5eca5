"""A step's answers: what the servers are asked, what they answered, what it is worth."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from record import console
from servers import Answer, Request, Server
from task import Words, problems
from trainer import Packed, pack

from dsv3_plugin.errors import DSV3Error

HANG_UP_AFTER = 3  # tokens


class MismatchError(DSV3Error):
    """Trainer and server do not hold the same weights, or do not agree on a number."""


@dataclass(frozen=True)
class Sample:
    """A sampled answer."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    """The server's, of `tokens`."""
    temperature: float
    server: str
    version: int
    """How many steps the weights had learned that sampled it."""
    finish_reason: str
    group: int | None = None
    """Which of the step's prompts it answers; None of an aborted answer."""
    reward: float = 0.0
    advantage: float | None = None
    """None of an aborted answer, which is compared and not learned from."""


def roll_out(
    servers: list[Server], words: Words, step: int, version: int, arguments: argparse.Namespace
) -> list[Sample]:
    """A step's answers, from all servers at a time.

    Raises `MismatchError` where one is of other weights than `version`.
    """
    asked = problems(arguments.task, arguments.prompts, arguments.seed, "rl", step)
    seeds = random.Random(repr((arguments.seed, "seeds", step))).sample(range(2**31 - arguments.samples), len(asked))

    def sample(k: int) -> list[Sample]:
        server, mine = servers[k], range(len(asked))[k :: len(servers)]
        requests = [
            Request(
                words.prompt(asked[i].prompt),
                temperature=arguments.temperature[j % len(arguments.temperature)],
                max_tokens=arguments.max_tokens,
                seed=seeds[i],
                n=arguments.samples,
            )
            for j, i in enumerate(mine)
        ]
        hang_up = [replace(r, n=1, max_tokens=64, ignore_eos=True) for r in requests[: arguments.hang_up]]
        aborted = [server.requests.submit(server.hang_up, request, HANG_UP_AFTER) for request in hang_up]
        samples: list[Sample] = []
        for i, request, answers in zip(mine, requests, server.sample(requests), strict=True):
            for answer in answers:
                reward = words.reward(asked[i], answer.token_ids)
                samples.append(replace(sampled(server, request, answer), group=i, reward=reward))
        return samples + [sampled(server, r, a.result()) for r, a in zip(hang_up, aborted, strict=True)]

    with ThreadPoolExecutor() as threads:
        samples = [sample for part in threads.map(sample, range(len(servers))) for sample in part]
    if others := [sample for sample in samples if sample.version != version]:
        raise MismatchError(f"step {step}: {others[0].server} answered with weights {others[0].version}, not {version}")
    return with_advantages(samples)


def with_advantages(samples: list[Sample]) -> list[Sample]:
    """Rewards normalised within each prompt's answers (DeepSeek-V3's report, arXiv:2412.19437, section 5.2.2)."""
    groups: dict[int, list[float]] = {}
    for sample in samples:
        if sample.group is not None:
            groups.setdefault(sample.group, []).append(sample.reward)
    scales = {group: (fmean(r), stdev(r) if len(r) > 1 else 0.0) for group, r in groups.items()}

    def advantage(sample: Sample) -> float | None:
        if sample.group is None:
            return None
        mean, deviation = scales[sample.group]
        return (sample.reward - mean) / (deviation + 1e-6)

    return [replace(sample, advantage=advantage(sample)) for sample in samples]


def sampled(server: Server, request: Request, answer: Answer) -> Sample:
    """An answer, as it is learned from."""
    what = answer.token_ids, answer.logprobs, request.temperature, server.name
    return Sample(request.token_ids, *what, int(answer.version), answer.finish_reason)


def say_greedy_reward(servers: list[Server], words: Words, arguments: argparse.Namespace) -> None:
    """Print the mean reward of greedy answers to prompts that no step has."""
    if not arguments.eval_prompts:
        return
    asked = problems(arguments.task, arguments.eval_prompts, arguments.seed, "eval")
    requests = [Request(words.prompt(problem.prompt), 0.0, arguments.max_tokens, seed=0) for problem in asked]
    answers = servers[0].sample(requests)
    reward = fmean(words.reward(problem, answer.token_ids) for problem, (answer,) in zip(asked, answers, strict=True))
    console.print(f"greedy answers to {len(asked)} other prompts: reward {reward:.3f}")


def packed_of(samples: Sequence[Sample]) -> Packed:
    """For the training forward."""
    return pack([(sample.prompt, sample.tokens, sample.temperature) for sample in samples])


def per_token(
    samples: Sequence[Sample], value: Callable[[Sample], Sequence[float]], like: torch.Tensor
) -> torch.Tensor:
    """fp32 [N], in the order of `packed_of`."""
    return torch.tensor([number for sample in samples for number in value(sample)], device=like.device)


def measure(samples: list[Sample]) -> dict[str, Any]:
    """What to log of a step's answers."""
    learned = [sample for sample in samples if sample.advantage is not None]
    names = sorted({sample.server for sample in samples})
    return {
        "reward": fmean(sample.reward for sample in learned),
        "rewards": {name: fmean(s.reward for s in learned if s.server == name) for name in names},
        "tokens": {name: sum(len(s.tokens) for s in samples if s.server == name) for name in names},
        "versions": sorted({sample.version for sample in samples}),
        "cut": sum(sample.finish_reason == "length" for sample in learned),
        "aborted": len(samples) - len(learned),
        "of_mixed_groups": sum(bool(sample.advantage) for sample in learned) / len(learned),
    }
