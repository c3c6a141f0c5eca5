"""Reading the suite's TOML files: what is wrong with one is a line that names the option, the file and the place."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from dsv3_plugin.conformance.protocol import first_mistake
from dsv3_plugin.errors import ConformanceError

_T = TypeVar("_T", bound=BaseModel)


def read_toml(kind: type[_T], file: Path, option: str) -> _T:
    """A file that an `option` named. Raises `ConformanceError` where it is none."""
    try:
        return kind.model_validate(tomllib.loads(file.read_text("utf-8")))
    except OSError as error:
        raise ConformanceError(f"{option} {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConformanceError(f"{option} {file}: {error}") from None
    except ValidationError as error:
        raise ConformanceError(f"{option} {file}: {first_mistake(error)}") from None
