"""Imports go down only: pyproject's contracts hold, and an import that goes up is caught by the one that it breaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from installed import install
from paths import ROOT

PYPROJECT = ROOT / "pyproject.toml"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return install(tmp_path)


def lint_imports(folder: Path) -> tuple[int, list[str]]:
    """The exit status and the broken contracts."""
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-logo", "--no-cache", str(PYPROJECT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"COLUMNS": "1000"})
    broken = [line.split(" BROKEN")[0] for line in done.stdout.splitlines() if " BROKEN" in line]
    return done.returncode, broken


def test_imports_go_down_only(copy):
    assert lint_imports(copy) == (0, [])


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("ops/rope.py", "from dsv3_plugin import registry", "From the commands down to the operations"),
        ("hooks.py", "from dsv3_plugin.commands import doctor", "From the commands down to the operations"),
        ("layers/moe.py", "from dsv3_plugin import autograd", "From the commands down to the operations"),
        ("kernels/sm90/tensor_core.py", "import dsv3_plugin.registry", "From the commands down to the operations"),
        ("vllm_backend/model.py", "import dsv3_plugin.sglang_backend", "From the commands down to the operations"),
        ("registry.py", "from dsv3_plugin.kernels import provider", "Kernels are found through their entry point"),
        ("kernels/hopper.py", "import dsv3_plugin.kernels.own", "Kernels: providers over languages and vendors"),
        ("kernels/provider.py", "import dsv3_plugin.layers.moe", "Kernels know no model, no checkpoint and no adapter"),
        ("layers/moe.py", "import vllm.config", "Only the vLLM adapter knows vLLM"),
        ("sglang_backend/attention.py", "import vllm", "Only the vLLM adapter knows vLLM"),
        ("conformance/runner.py", "import sglang.srt", "Only the SGLang adapter knows SGLang"),
        ("engine_bench/runner.py", "import vllm", "Only the vLLM adapter knows vLLM"),
        ("train_bench/runner.py", "import megatron.core", "Only the Megatron adapter knows Megatron-Core"),
        ("conformance/runner.py", "import dsv3_plugin.engine_bench", "From the commands down to the operations"),
        ("autograd/bind.py", "from megatron.core import optimizer", "Only the Megatron adapter knows Megatron-Core"),
        ("megatron_backend/export.py", "import dsv3_plugin.hosts.slime", "From the commands down to the operations"),
        (
            "megatron_backend/export.py",
            "import mbridge",
            "Only its host module knows a framework of reinforcement learning",
        ),
        ("registry.py", "import triton.language as tl", "Only kernels are written in Triton"),
    ],
)
def test_an_import_that_goes_up_is_caught(copy, module, line, contract):
    # Inside a function too, where no cycle makes it fail.
    with (copy / "dsv3_plugin" / module).open("a") as file:
        file.write(f"\n\ndef _sabotage():\n    {line}\n")
    status, broken = lint_imports(copy)
    assert status == 1 and contract in broken


def test_a_module_without_a_place_is_caught(copy):
    (copy / "dsv3_plugin/elsewhere.py").touch()
    assert lint_imports(copy)[0] == 1
