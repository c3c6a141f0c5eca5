"""What contenders read: the texts and then the modules that every Python ships, so that no token is seen twice."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dsv3_plugin.conformance.texts import real_text, tokenize
from dsv3_plugin.errors import EngineError


def write(count: int, tokenizer: Path, file: Path) -> None:
    """The first `count` tokens, by the tokenizer of a checkpoint folder. Raises `EngineError` where there are fewer."""
    tokens: list[int] = []
    for text in _texts():
        tokens += tokenize(text, tokenizer)
        if len(tokens) >= count:
            save_file({"tokens": torch.tensor(tokens[:count])}, file)
            return
    raise EngineError(f"the texts that Python ships have {len(tokens):,} tokens, and {count:,} are asked for")


def read(file: Path) -> torch.Tensor:
    """All of them, int64."""
    return load_file(file)["tokens"]


def _texts() -> Iterator[str]:
    yield real_text()
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(library.rglob("*.py")):
        if not {"site-packages", "dist-packages"} & set(module.parts):
            yield module.read_text("utf-8", errors="replace")
