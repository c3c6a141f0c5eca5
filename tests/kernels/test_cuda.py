"""CUDA C++ without a GPU: what is written, and what the user reads where a compiler is missing."""

from __future__ import annotations

import re

import pytest

from dsv3_plugin.errors import KernelError
from dsv3_plugin.kernels import cuda
from dsv3_plugin.kernels.fp8_stream import Shape


@pytest.mark.parametrize("width", [8, 16, 144, 256])
def test_wgmma_names_each_register_once(width):
    text = cuda.wgmma(width)
    instruction = re.search(r"m64n(\d+)k32\.f32\.e4m3\.e4m3 \{([^}]*)\}", text)
    assert instruction is not None and int(instruction[1]) == width
    registers = instruction[2].split(", ")
    assert registers == [f"%{i}" for i in range(width // 2)]
    assert text.count('"+f"') == width // 2


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv(cuda.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cuda, "_key", lambda program: str(program.widths))
    built = []
    monkeypatch.setattr(cuda, "build", lambda program: built.append(program) or cuda.Built(b"code", "", ""))
    program = Shape(16, 16).filled().program()
    assert cuda.compile_program(program) == cuda.compile_program(program) == b"code"
    assert len(built) == 1
    cuda.compile_program(program._replace(widths=(8,)))
    assert len(built) == 2
    assert all(file.suffix == ".cubin" for file in (tmp_path / "cache").iterdir())


@pytest.mark.skipif(cuda.available(), reason="NVRTC is installed here")
def test_says_what_is_missing():
    with pytest.raises(KernelError, match="cuda-bindings"):
        cuda.build(Shape(16, 16).filled().program())
