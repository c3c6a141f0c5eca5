"""Texts and conversations as token ids: fill-in-the-middle, split tokens, answers to be learned."""

# ruff: noqa: RUF001 (DeepSeek's special tokens have full-width bars)

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dsv3_plugin.checkpoint.tokenizer import DEEPSEEK_VOCAB, tokenizer_files
from dsv3_plugin.conformance.texts import real_text
from dsv3_plugin.errors import DSV3Error, InputError
from dsv3_plugin.megatron_backend.corpus import Corpus, read_corpus

TEXTS = [text for text in real_text().split("\n\n\n") if text.strip()]
END, BEGIN = "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"
PSM = re.compile(rf"<｜fim▁begin｜>(.*)<｜fim▁hole｜>(.*)<｜fim▁end｜>(.*){END}", re.DOTALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Corpus]:
    """`made(fim_rate=0.5)`: the corpus of DeepSeek's own tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, text in tokenizer_files(DEEPSEEK_VOCAB).items():
        (folder / name).write_text(text, "utf-8")
    return partial(read_corpus, folder)


@pytest.fixture(scope="module")
def tokenizer(made: Callable[..., Corpus]) -> Any:
    """DeepSeek's own."""
    return made().tokenizer


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def test_a_tenth_of_the_documents_has_its_middle_filled_in(made: Callable[..., Corpus], tokenizer: Any) -> None:
    """In the report's form, with no character lost; the others are as they were."""
    corpus, plain, texts = made(), made(fim_rate=0.0), [text[:300] for text in TEXTS * 20][:600]
    filled = []
    for number, text in enumerate(texts):
        said = decoded(tokenizer, corpus.text(number, text))
        if found := PSM.fullmatch(said):
            prefix, suffix, middle = found.groups()
            assert prefix + middle + suffix == text
            filled.append((number, len(prefix), len(middle)))
        else:
            assert said == text + END
    assert 40 <= len(filled) <= 80 and len(set(filled)) == len(filled)
    assert all(not PSM.fullmatch(decoded(tokenizer, plain.text(n, texts[n]))) for n, *_ in filled)


def test_what_is_random_is_the_seed_s_and_the_document_s(made: Callable[..., Corpus]) -> None:
    """Whatever was read before, so that a corpus can be written in parts."""
    corpus = made(fim_rate=1.0, split_rate=0.5)
    whole = [corpus.text(number, TEXTS[0]) for number in range(5)]
    assert made(fim_rate=1.0, split_rate=0.5).text(3, TEXTS[0]) == whole[3]
    # The twins: another document, another seed.
    assert whole[2] != whole[3] != made(fim_rate=1.0, split_rate=0.5, seed=1).text(3, TEXTS[0])


def test_combined_tokens_are_split_at_their_rate(made: Callable[..., Corpus], tokenizer: Any) -> None:
    """And say the same; nothing else is split."""
    text = "\n".join(TEXTS)[:100_000]
    plain, half, all_split = (made(fim_rate=0.0, split_rate=rate).text(0, text) for rate in (0.0, 0.5, 1.0))
    assert decoded(tokenizer, plain) == decoded(tokenizer, half) == decoded(tokenizer, all_split) == text + END
    assert plain == [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id(END)]
    combined = [t for t in map(tokenizer.decode, ([n] for n in plain)) if re.fullmatch(r" ?[^\w\s]+[\r\n]+", t)]
    assert len(combined) > 200
    left = [t for t in map(tokenizer.decode, ([n] for n in all_split)) if re.fullmatch(r" ?[^\w\s]+[\r\n]+", t)]
    assert left == [] and len(all_split) - len(plain) >= len(combined)
    assert 0.45 < (len(half) - len(plain)) / (len(all_split) - len(plain)) < 0.55


def test_answers_are_learned_and_nothing_else(made: Callable[..., Corpus], tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    segments = made().conversation(messages)
    whole = decoded(tokenizer, [number for ids, _ in segments for number in ids])
    assert whole == f"{BEGIN}Be brief.<｜User｜>1 + 1?<｜Assistant｜>2{END}<｜User｜>Sure?<｜Assistant｜>Yes.{END}"
    assert [decoded(tokenizer, ids) for ids, learned in segments if learned] == [f"2{END}", f"Yes.{END}"]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "a conversation is a list of messages"),
        (["hello"], "a conversation is a list of messages"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "a message of role 'system'"),
        (5, "a conversation is a list of messages"),
        ([{"role": ["user"], "content": "a"}], r"a message of role \['user'\]"),
        ([{"role": "system", "content": 7}], "a system's message is no text: int"),
        ([{"role": "user", "content": "\ud800"}], "a text is no string of characters: 'utf-8' codec can't encode"),
        ([{"role": "user", "content": "a"}], "without an assistant's answer has nothing to learn"),
        ([{"role": "user"}], "a message of role 'user': give user or assistant, with content"),
    ],
)
def test_other_messages_are_refused(messages: Any, expected: str, made: Callable[..., Corpus]) -> None:
    with pytest.raises(InputError, match=expected):
        made().conversation(messages)


def test_a_tokenizer_without_the_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DSV3Error, match=r"tokenizer_config\.json"):
        read_corpus(tmp_path)
    for name, text in tokenizer_files(300).items():
        (tmp_path / name).write_text(text, "utf-8")
    plain = read_corpus(tmp_path, fim_rate=0.0)
    assert decoded(plain.tokenizer, plain.text(0, "a")) == "a<|end_of_sentence|>"
    with pytest.raises(InputError, match="the tokenizer has no <｜fim▁begin｜>"):
        read_corpus(tmp_path, fim_rate=1.0).text(0, "a")
