"""`make check` finds the tests of what changed, nearest first, and says what it had no time for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import affected
import pytest
from installed import install
from paths import ROOT, SUPPORT

THIS = "tests/core/test_affected.py"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = install(tmp_path_factory.mktemp("installed"))
    code = "import affected, json, sys; print(json.dumps(affected.imports(sys.argv[1])))"
    command = [sys.executable, "-c", code, str(folder)]
    return json.loads(subprocess.check_output(command, env=os.environ | {"PYTHONPATH": str(SUPPORT)}))


def reached(changed, graph):
    """By distance; this file names what it asks about."""
    found = affected.affected({changed}, graph)
    return {file: distance for file, distance in found.items() if file != THIS}


@pytest.mark.parametrize(
    ("changed", "first", "later"),
    [
        ("dsv3_plugin/ops/rope.py", "core/ops/test_rope.py", "adapters/test_convert.py"),
        ("dsv3_plugin/layers/moe.py", "core/test_oracle.py", "adapters/test_megatron.py"),
        ("kernels/cuda/fp8_gemm.cu", "kernels/test_fp8_emulated.py", "kernels/test_bench.py"),
        ("conformance/compare.py", "conformance/test_logprobs.py", "core/test_fingerprint_cli.py"),
        ("tests/support/aot.py", "kernels/test_aot.py", None),
        ("tests/kernels/golden_h200.safetensors", "kernels/test_tensor_core.py", None),
        ("tests/adapters/test_train.py", "adapters/test_train.py", None),
        # Found by all that ask for all operations, though none imports it.
        ("dsv3_plugin/ops/silu_and_mul.py", "core/ops/test_silu_and_mul.py", "kernels/test_certificates.py"),
    ],
)
def test_what_a_file_reaches_is_found_nearest_first(graph, changed, first, later):
    found = reached(changed, graph)
    assert found[f"tests/{first}"] == min(found.values())
    if later:
        assert found[f"tests/{later}"] > found[f"tests/{first}"]
    else:
        assert list(found) == [f"tests/{first}"]


def test_what_nothing_names_reaches_nothing_and_a_requirement_everything(graph):
    assert reached("LICENSE", graph) == {}
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")} - {THIS}
    assert reached("requirements/core.txt", graph).keys() == tests


def test_what_does_not_begin_in_time_is_skipped_and_named_unless_it_changed_itself():
    file = "tests/core/ops/test_combine.py"

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "pytest", file, "--seconds=0.000001", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout

    printed = run()
    assert re.search(rf"^not run for want of time: \d+ tests of {file}$", printed, re.M)
    assert "1 passed" in printed, "the time begins with the first test"
    printed = run(f"--always={file}")
    assert "not run" not in printed and "skipped" not in printed
