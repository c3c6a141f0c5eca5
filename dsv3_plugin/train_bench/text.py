"""What contenders read: the texts and then the modules that every Python ships, so that no token is seen twice.

They come in pieces whose order is drawn, so that each step reads of everything. In the order of their files, losses
leap where one kind of text ends and another begins, and there say more of the step than of the arithmetic.
"""

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
            save_file({"tokens": _mixed(torch.tensor(tokens[:count]))}, file)
            return
    raise EngineError(f"the texts that Python ships have {len(tokens):,} tokens, and {count:,} are asked for")


def read(file: Path) -> torch.Tensor:
    """All of them, int64."""
    return load_file(file)["tokens"]


_PIECE = 256


def _mixed(tokens: torch.Tensor) -> torch.Tensor:
    """The same, in pieces of 256 in a drawn order; what is over stays last."""
    pieces = tokens.split(_PIECE)
    order = torch.randperm(len(tokens) // _PIECE, generator=torch.Generator().manual_seed(0)).tolist()
    return torch.cat([*(pieces[i] for i in order), *pieces[len(order) :]])


_MODULES = 100
"""That are one text: a tokenizer takes longer to load than a module takes to read."""


def _texts() -> Iterator[str]:
    yield real_text()
    library = Path(sysconfig.get_path("stdlib"))
    modules = sorted(m for m in library.rglob("*.py") if not {"site-packages", "dist-packages"} & set(m.parts))
    for first in range(0, len(modules), _MODULES):
        yield "\n\n".join(m.read_text("utf-8", errors="replace") for m in modules[first : first + _MODULES])
