"""The servers' attention code: a layer with sparse attention needs none of it changed, and no step reads a number of
its device.
"""

from __future__ import annotations

import pytest
from conftest import TinyCheckpoint
from engines import warm
from paths import SUPPORT


@pytest.mark.parametrize("environment", ["vllm", "vllm-0.27.1", "sglang", "sglang-0.5.17", "sglang-0.5.23"])
def test_a_sparse_layer_and_a_step_without_reads(environment: str, tiny_checkpoint: TinyCheckpoint) -> None:
    program = SUPPORT / f"attention_in_{environment.partition('-')[0]}.py"
    done = warm(environment, program, tiny_checkpoint("bf16"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "sparse equals whole sequences: True" in lines, done.stdout
    # Only requests with tokens are part of a pass of SGLang.
    starts = (0, 1, 2) if "sglang" in environment else (0, 1, 2, 2)
    told = {"ran": True, "host_query_start_loc": starts}
    # The twins.
    assert "without the selection: False" in lines, done.stdout
    assert f"reads: {told | {'checked as on a CPU': 'raises', 'seq_lens': 'raises'}}" in lines, done.stdout
    in_graphs = "between graphs: True never again: False"
    if "sglang" in environment:
        in_graphs = "drafts recorded, of SGLang's backend, over ranks, without graphs: [True, False, False, False]"
    assert in_graphs in lines, done.stdout
    pages = "on a GPU, on a CPU: [64, 16]"
    if "sglang" in environment:
        pages = "on a GPU, on a CPU, of SGLang's, with odd chunks, named: [64, 1, 1, 1, None]"
    assert f"keys of a page {pages}" in lines, done.stdout
