"""Real text for the suite's prompts: the language reference that every Python ships (`pydoc_data.topics`)."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

from dsv3_plugin.errors import ConformanceError


def real_text() -> str:
    """English prose with code, over half a megabyte, in a fixed order."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def tokenize(text: str, checkpoint: Path) -> list[int]:
    """Token ids of `text` by the checkpoint's own `tokenizer.json`.

    Raises `ConformanceError` where the tokenizer or the library is missing.
    """
    file = checkpoint / "tokenizer.json"
    if not file.is_file():
        raise ConformanceError(f"{file}: missing; the suite's prompts are text and need the checkpoint's tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConformanceError("tokenizers is not installed: pip install 'dsv3-plugin[conformance]'") from None
    return list(Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids)
