"""The names at the package's top: all there, and free until they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import dsv3_plugin


@pytest.mark.parametrize("name", dsv3_plugin.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(dsv3_plugin, name) is not None


def test_another_name_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DeepseekV4'"):
        _ = dsv3_plugin.DeepseekV4


HEAVY = ("torch", "triton", "vllm", "sglang", "megatron", "pluggy", "pydantic")


def imported_by(code: str) -> set[str]:
    loaded = f"import sys; {code}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_imports_nothing_until_it_is_asked() -> None:
    assert imported_by("import dsv3_plugin") == set()
    # The twin, which needs no engine either.
    assert imported_by("from dsv3_plugin import *") == {"torch", "pluggy", "pydantic"}
