"""Texts and conversations as token ids, the way DeepSeek-V3's report prepares them (sections 4.1 and 5.1).

What is random is drawn once, when a corpus is written, from the seed and the document's number: runs that are cut and
resumed, or that read with other numbers of ranks and workers, see the same tokens.

* Fill-in-the-middle: a tenth of the documents become prefix, suffix, middle (PSM).
* The tokenizer has tokens for punctuation with line breaks after it, which a prompt that ends with the punctuation
  would not have. A share of them is split in two. The report does not say how many.
* Conversations are in DeepSeek-V3's format; the assistant's answers are to be learned.
"""

# ruff: noqa: RUF001 (DeepSeek's special tokens have full-width bars)

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from dsv3_plugin.checkpoint.tokenizer import read_tokenizer
from dsv3_plugin.config import read_json_object
from dsv3_plugin.errors import InputError

_COMBINED = re.compile(r"( ?[^\w\s]+)([\r\n]+)")
_FIM = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
_ROLES = {"user": "<｜User｜>", "assistant": "<｜Assistant｜>"}

Segment = tuple[list[int], bool]
"""Token ids, and whether they are to be learned."""


def read_corpus(folder: Path, **rates: Any) -> Corpus:
    """The corpus of a checkpoint's tokenizer; `rates` and seed as `Corpus` has them.

    Raises `InputError` for a folder without a tokenizer, `CheckpointError` for one that cannot be read.
    """
    names: dict[str, Any] = {}
    for key, field in ("bos_token", "begin"), ("eos_token", "end"):
        token = read_json_object(folder / "tokenizer_config.json").get(key)
        names[field] = token.get("content") if isinstance(token, dict) else token
        if not isinstance(names[field], str):
            raise InputError(f"{folder / 'tokenizer_config.json'}: has no {key}")
    if not (file := folder / "tokenizer.json").is_file():
        raise InputError(f"{file}: no such file; name a checkpoint's folder with a tokenizer")
    return Corpus(read_tokenizer(file), **names, **rates)


@dataclass(frozen=True)
class Corpus:
    """How documents become token ids."""

    tokenizer: Any
    """A `tokenizers.Tokenizer`, with DeepSeek's special tokens for what is asked of it."""
    begin: str
    """The token before a conversation."""
    end: str
    """The token after a document or an answer."""
    fim_rate: float = 0.1
    """Share of the documents whose middle is to be filled in."""
    split_rate: float = 0.0
    """Share of the tokens of punctuation and line breaks that are split."""
    seed: int = 1234

    def text(self, number: int, text: str) -> list[int]:
        """Document `number`, to its end token. Raises `InputError` for what is no text, and where the tokenizer lacks a
        special token.
        """
        if not isinstance(text, str):
            raise InputError(f"a text is no string of characters: {type(text).__name__}")
        random = Random(f"{self.seed} {number}")
        if random.random() >= self.fim_rate:
            return [*self._split(self._encode(text), random), self._special(self.end)]
        cuts = sorted(random.randint(0, len(text)) for _ in range(2))
        prefix, middle, suffix = text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :]
        ids = []
        for special, part in zip(_FIM, (prefix, suffix, middle), strict=True):
            ids += [self._special(special), *self._split(self._encode(part), random)]
        return [*ids, self._special(self.end)]

    def conversation(self, messages: list[Mapping[str, str]]) -> list[Segment]:
        """Messages of `role` and `content`: an optional system's, then user's and assistant's.

        An answer is learned with the token that ends it. Raises `InputError` for other messages.
        """
        are_messages = isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)
        if not messages or not are_messages:
            raise InputError("a conversation is a list of messages, each with role and content")
        begin = [self._special(self.begin)]
        if messages[0].get("role") == "system":
            if not isinstance(said := messages[0].get("content", ""), str):
                raise InputError(f"a system's message is no text: {type(said).__name__}")
            begin += self._encode(said)
            messages = messages[1:]
        segments: list[Segment] = [(begin, False)]
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
                raise InputError(
                    f"a message of role {role!r}: give user or assistant, with content, after the system's"
                )
            segments.append(([self._special(_ROLES[role])], False))
            ids = self._encode(content)
            segments.append(([*ids, self._special(self.end)], True) if role == "assistant" else (ids, False))
        if not any(is_learned for _, is_learned in segments):
            raise InputError("a conversation without an assistant's answer has nothing to learn")
        return [segment for segment in segments if segment[0]]

    def _encode(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a text is no string of characters: {error}") from None
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _special(self, token: str) -> int:
        number: int | None = self.tokenizer.token_to_id(token)
        if number is None:
            raise InputError(f"the tokenizer has no {token}, which DeepSeek-V3's has")
        return number

    def _split(self, ids: list[int], random: Random) -> list[int]:
        if not self.split_rate:
            return ids
        split = []
        for number in ids:
            halves = self._combined.get(number)
            split += halves if halves is not None and random.random() < self.split_rate else [number]
        return split

    @cached_property
    def _combined(self) -> dict[int, list[int]]:
        """Each token of punctuation and line breaks, and what its two halves are encoded to."""
        found = {}
        for number in range(self.tokenizer.get_vocab_size()):
            if halves := _COMBINED.fullmatch(self.tokenizer.decode([number], skip_special_tokens=False)):
                found[number] = self._encode(halves[1]) + self._encode(halves[2])
        return found
