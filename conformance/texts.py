"""Real text for the suite's prompts: the language reference that every Python ships (`pydoc_data.topics`)."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from dsv3_plugin.checkpoint.tokenizer import read_tokenizer
from dsv3_plugin.errors import ConformanceError


def real_text() -> str:
    """English prose with code, over half a megabyte, in a fixed order."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenize(text: str, checkpoint: Path) -> list[int]:
    """Token ids of `text` by the checkpoint's own `tokenizer.json`.

    Raises `ConformanceError` where the tokenizer is missing, `CheckpointError` where it cannot be read.
    """
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise ConformanceError(f"{file}: missing; the suite's prompts are text and need the checkpoint's tokenizer")
    return list(read_tokenizer(file).encode(text, add_special_tokens=False).ids)
