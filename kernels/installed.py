"""What is installed beside this package."""

from __future__ import annotations

import importlib.metadata


def version_of(*distributions: str) -> str | None:
    """The version of the first of `distributions` that is installed, or None."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
