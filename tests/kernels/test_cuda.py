"""CUDA C++ without a GPU: what is written, and what the user reads where a compiler is missing."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dsv3_plugin.errors import KernelError
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.cuda.fp8_gemm import TileConfig


@pytest.mark.parametrize("width", [8, 16, 144, 256])
def test_wgmma_names_each_register_once(width):
    text = compiler.wgmma(width)
    instruction = re.search(r"m64n(\d+)k32\.f32\.e4m3\.e4m3 \{([^}]*)\}", text)
    assert instruction is not None and int(instruction[1]) == width
    registers = instruction[2].split(", ")
    assert registers == [f"%{i}" for i in range(width // 2)]
    assert text.count('"+f"') == width // 2


def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_key", lambda program: str(program.widths))
    built = []
    monkeypatch.setattr(compiler, "build", lambda program: built.append(program) or compiler.Built(b"code", "", ""))
    program = TileConfig(16, 16).filled().program()
    assert compiler.compile_program(program) == compiler.compile_program(program) == b"code"
    assert len(built) == 1
    compiler.compile_program(program._replace(widths=(8,)))
    assert len(built) == 2
    assert all(file.suffix == ".cubin" for file in (tmp_path / "cache").iterdir())


class _Driver:
    """What `compiler.launch` calls, which remembers it."""

    class CUfunction_attribute:  # noqa: N801 (the driver's name)
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = "shared bytes"

    CUlaunchConfig = SimpleNamespace

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.allowed: list[int] = []
        self.launched: list[int] = []

    def cuModuleLoadData(self, code):  # noqa: N802
        self.loaded.append(code)
        return 0, code

    def cuModuleGetFunction(self, module, name):  # noqa: N802
        return 0, (module, name)

    def cuFuncSetAttribute(self, handle, attribute, value):  # noqa: N802
        assert attribute == "shared bytes"
        self.allowed.append(value)
        return (0,)

    def cuLaunchKernelEx(self, config, handle, arguments, extra):  # noqa: N802
        self.launched.append(config.sharedMemBytes)
        return (0,)


def test_a_kernel_is_loaded_once_whatever_a_launch_takes(monkeypatch):
    """A CUDA graph's capture must not load modules, and a batch's rows decide how much shared memory a launch takes."""
    driver = _Driver()
    monkeypatch.setattr(compiler, "_driver", lambda: driver)
    monkeypatch.setattr(compiler, "compile_program", lambda program: b"code")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    compiler.function.cache_clear()
    try:
        taken = [0, 48 * 1024, compiler.SHARED_BYTES]
        for shared_bytes in taken:
            compiler.launch(compiler.Program("any.cu", (), ()), "any", compiler.Launch(1, 32, shared_bytes), (1,))
    finally:
        compiler.function.cache_clear()
    assert driver.loaded == [b"code"]
    assert driver.allowed == [compiler.SHARED_BYTES]
    assert driver.launched == taken


@pytest.mark.skipif(compiler.available(), reason="NVRTC is installed here")
def test_says_what_is_missing():
    with pytest.raises(KernelError, match="cuda-bindings"):
        compiler.build(TileConfig(16, 16).filled().program())
