"""`dsv3 kernels` on a machine without a GPU."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from dsv3_plugin.commands.cli import app
from dsv3_plugin.errors import KernelError
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.registry import MODE_VARIABLE

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run(*arguments: str):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["kernels", *arguments])


@pytest.mark.parametrize("device, provider", [("cpu", "reference"), ("hopper-model", "sm90-model")])
def test_list_names_who_serves_each_operation(device, provider):
    result = run("list", "--profile", "fp8", "--device", device)
    assert result.exit_code == 0, result.output
    serving = [line for line in result.output.splitlines() if "│ yes" in line]
    assert len(serving) == len(operations())
    assert all(provider in line for line in serving)
    assert "DeepGEMM" in result.output or "deep-gemm" in result.output


def test_list_says_why_a_kernel_does_not_serve():
    text = " ".join(run("list", "--profile", "fp32", "--device", "hopper").output.split())
    assert "the tensor core multiplies bf16 or fp8" in text
    assert "│ yes" not in text, "nothing computes in fp32 on a GPU"


def test_fast_mode_is_named_and_a_wrong_mode_refused(monkeypatch):
    monkeypatch.setenv(MODE_VARIABLE, "fast")
    assert "fast mode" in run("list", "--device", "cpu").output
    monkeypatch.setenv(MODE_VARIABLE, "quick")
    assert "use strict or fast" in str(run("list", "--device", "cpu").exception)


@WITHOUT_GPU
@pytest.mark.parametrize("command", ["check", "check --device hopper", "check --record golden.safetensors", "tune"])
def test_what_needs_a_gpu_says_so(command):
    result = run(*command.split())
    assert isinstance(result.exception, KernelError)
    assert "this machine has none" in str(result.exception)


def test_a_file_that_is_no_selection_is_refused(tmp_path):
    (tmp_path / "table.json").write_text("{}")
    result = run("selection", str(tmp_path / "table.json"))
    assert isinstance(result.exception, KernelError)
    assert "table.json is no table of `dsv3 kernels tune`" in str(result.exception)
    assert "# fp8 products on an NVIDIA H200" in run("selection").output


def test_check_refuses_an_operation_that_there_is_not():
    result = run("check", "--op", "fp8_linaer")
    assert isinstance(result.exception, KernelError)
    assert "no operation fp8_linaer; the operations are " in str(result.exception)
