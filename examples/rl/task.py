"""Tasks whose answers a rule can check, made on the spot: the prompts, the right answers and the reward.

A problem is a line of text, "3141=", and its answer the text that ends it, "1134". A model that has seen a few hundred
solved ones writes answers of the right form, some of them right: what reinforcement learning then improves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_plugin.checkpoint.tokenizer import read_tokenizer
from dsv3_plugin.config import read_json_object
from dsv3_plugin.errors import CheckpointError

RIGHT, WRONG = "+", "-"
"""What a judge writes behind an answer."""


class Conversation(NamedTuple):
    """One question and its answer, as files of conversations have them."""

    user: str
    assistant: str

    @classmethod
    def parse(cls, record: Any) -> Conversation:
        """Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
        user, assistant = record["messages"]
        if (user["role"], assistant["role"]) != ("user", "assistant"):
            raise ValueError("not one user and one assistant")
        for text in (user["content"], assistant["content"]):
            if not isinstance(text, str):
                raise TypeError("content is no text")
            text.encode()  # half of a surrogate pair, which JSON can escape, is no text
        return cls(user["content"], assistant["content"])

    def record(self) -> dict[str, Any]:
        """For JSON."""
        roles = ("user", self.user), ("assistant", self.assistant)
        return {"messages": [{"role": role, "content": content} for role, content in roles]}


class Problem(NamedTuple):
    """A prompt and the one right answer."""

    prompt: str
    answer: str

    def reward(self, answer: str) -> float:
        """1 for the right answer, else 0."""
        return float(answer == self.answer)

    def solved(self) -> Conversation:
        """With the right answer."""
        return Conversation(self.prompt, self.answer)

    def verdict(self, answer: str) -> Conversation:
        """What a judge says of an answer."""
        return Conversation(self.prompt + answer, RIGHT if self.reward(answer) else WRONG)


def sort(draw: random.Random) -> Problem:
    """Four digits in order."""
    digits = [str(draw.randrange(10)) for _ in range(4)]
    return Problem("".join(digits) + "=", "".join(sorted(digits)))


def add(draw: random.Random) -> Problem:
    """The sum of two numbers below 100, three digits."""
    one, other = draw.randrange(100), draw.randrange(100)
    return Problem(f"{one:02}+{other:02}=", f"{one + other:03}")


def brackets(draw: random.Random) -> Problem:
    """The brackets that close four open ones."""
    opened = draw.choices("([{<", k=4)
    return Problem("".join(opened) + "=", "".join(")]}>"["([{<".index(bracket)] for bracket in reversed(opened)))


TASKS: dict[str, Callable[[random.Random], Problem]] = {"sort": sort, "add": add, "brackets": brackets}


def problems(task: str, count: int, *seed: object) -> list[Problem]:
    """`count` problems of a task in `TASKS`, the same for the same seed on every machine."""
    draw = random.Random(repr(seed))
    return [TASKS[task](draw) for _ in range(count)]


class Words:
    """Problems as token ids, by a checkpoint's tokenizer. Raises `CheckpointError` where it has none."""

    def __init__(self, checkpoint: Path) -> None:
        config, file = read_json_object(checkpoint / "config.json"), checkpoint / "tokenizer.json"
        if not file.exists() or not {"bos_token_id", "eos_token_id"} <= config.keys():
            raise CheckpointError(
                f"{checkpoint}: needs tokenizer.json, and bos_token_id and eos_token_id in config.json"
            )
        self.begin, self.end = config["bos_token_id"], config["eos_token_id"]
        self.tokenizer = read_tokenizer(file)

    def prompt(self, text: str) -> list[int]:
        """With the token that begins a sequence."""
        return [self.begin, *self.ids(text)]

    def answer(self, text: str) -> list[int]:
        """With the token that ends a sequence."""
        return [*self.ids(text), self.end]

    def text(self, tokens: list[int]) -> str | None:
        """Of an answer; None for one that does not end."""
        if not tokens or tokens[-1] != self.end:
            return None
        return str(self.tokenizer.decode(tokens[:-1], skip_special_tokens=False))

    def reward(self, problem: Problem, tokens: list[int]) -> float:
        """Of an answer; one that does not end is wrong."""
        text = self.text(tokens)
        return 0.0 if text is None else problem.reward(text)

    def ids(self, text: str) -> list[int]:
        """Without tokens that begin or end something."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids
