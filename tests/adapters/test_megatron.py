"""Megatron's forward on one process and on two, the settings that it refuses, and the stand-ins for CUDA."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TinyCheckpoint
from engines import REFERENCE, in_fork
from megatron_programs import PYTHON, fresh, needs_megatron, printed, warm
from megatron_programs import testee as of_megatron
from paths import SUPPORT

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.errors import ConformanceError

pytestmark = needs_megatron

SABOTAGED = str(SUPPORT / "sabotaged_megatron.py")
CASES = ("batch", "mtp_1")


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_the_training_forward_has_the_references_bits(dtype: str, tiny_checkpoint: TinyCheckpoint) -> None:
    megatron = of_megatron("dsv3_plugin.conformance.testees.megatron")
    report = runner.run([in_fork(REFERENCE), megatron], tiny_checkpoint(dtype), lambda *_: None, only=CASES)
    assert report.passed, report.to_json()
    assert report.results["megatron"].schedule_not_followed
    compared = [c for v in report.verdicts for c in v.comparisons if {"megatron", "reference"} == {c.left, c.right}]
    print(f"{sum(c.equal_rows for c in compared):,} rows equal")


def test_other_kernels_than_transformer_engines_are_not_taken_for_its(tiny_checkpoint: TinyCheckpoint) -> None:
    """Its own serve on a card; with the trainer's usual ones `megatron-te` would prove nothing of them."""
    without = of_megatron("dsv3_plugin.conformance.testees.megatron_te")
    with pytest.raises(ConformanceError, match=r"no kernel of transformer-engine serves .* on cpu"):
        runner.run([without], tiny_checkpoint("fp8"), lambda *_: None, only=("batch",))
    with pytest.raises(ConformanceError, match="is in bf16: TransformerEngine's products are looked at in fp8"):
        runner.run([without], tiny_checkpoint("bf16"), lambda *_: None, only=("batch",))


def test_experts_added_up_in_megatrons_order_are_caught(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SABOTAGE", "experts")
    sabotaged = of_megatron(SABOTAGED)
    report = runner.run([in_fork(REFERENCE), sabotaged], tiny_checkpoint("bf16"), lambda *_: None, only=("batch",))
    assert not report.passed
    comparisons = {(c.left, c.right): c for c in report.verdicts[0].comparisons}
    first = comparisons["reference", "megatron"].first_difference
    assert first is not None and first.stream == "layers.1.mlp"


@pytest.fixture(scope="session")
def sliceable_fp8_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` in fp8 with heads and a shared expert that have two slices of whole blocks of 128."""
    path = tmp_path_factory.mktemp("sliceable") / "fp8"
    wider = {"num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2}
    make_checkpoint(read_config("tiny") | wider, path, 1, dtype=CheckpointDtype.FP8)
    return path


@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        ("bf16", ("tp=2", "tp=2,pp=2")),
        ("fp32", ("tp=2,ep=2", "dp=2,ep=2")),
        ("fp8", ("tp=2", "pp=2")),
    ],
    ids=["bf16", "fp32", "fp8"],
)
def test_two_ranks_have_the_bits_of_one(
    dtype: str,
    layouts: tuple[str, ...],
    tiny_checkpoint: TinyCheckpoint,
    sliceable_fp8_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every row of every layer on every rank, in as many slices as tensor-parallel ranks."""
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    checkpoint = sliceable_fp8_checkpoint if dtype == "fp8" else tiny_checkpoint(dtype)
    megatron = of_megatron("dsv3_plugin.conformance.testees.megatron")
    commands = [megatron.on(ParallelLayout.parse(layout)) for layout in layouts]
    report = runner.run([in_fork(REFERENCE), *commands], checkpoint, lambda *_: None, only=("mtp_1",))
    assert report.passed, report.to_json()
    assert report.profile == f"{dtype} in 2 reduction slices"
    compared = [c for v in report.verdicts for c in v.comparisons if "reference" in (c.left, c.right)]
    print(f"{sum(c.equal_rows for c in compared):,} rows equal")


def test_partial_sums_that_travel_in_bf16_are_caught(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    monkeypatch.setenv("SABOTAGE", "reduction")
    sabotaged = of_megatron(SABOTAGED).on(ParallelLayout.parse("tp=2"))
    report = runner.run([in_fork(REFERENCE), sabotaged], tiny_checkpoint("bf16"), lambda *_: None, only=("batch",))
    assert not report.passed
    comparisons = {(c.left, c.right): c for c in report.verdicts[0].comparisons}
    first = comparisons["reference", "megatron tp=2"].first_difference
    assert first is not None and first.stream == "layers.0.self_attn"


REFUSED = """
import sys
from types import SimpleNamespace
import torch
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from torch import distributed as dist
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.pipeline import require_embedding_group
from dsv3_plugin.profile import profile_for
config = DeepseekV3Config.from_pretrained(sys.argv[1])
for settings in ({"moe_token_dispatcher_type": "allgather"}, {"hidden_dropout": 0.1}, {"layernorm_epsilon": 1e-5},
                 {"context_parallel_size": 2}, {"moe_expert_capacity_factor": 1.0},
                 {"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": False},
                 {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}):
    try:
        build_model(config, transformer_config(config, profile_for(config), **settings))
    except EngineError as error:
        print(error)

# As if this were the first of two pipeline stages, with the group of first and last stage that is Megatron's default.
parallel_state.get_pipeline_model_parallel_world_size = lambda: 2
parallel_state.get_pipeline_model_parallel_group = parallel_state.get_embedding_group = lambda **_: "both"
dist.get_rank, dist.get_process_group_ranks = (lambda: 0), (lambda group: [0, 1])
for layout in "Etttt|mL", "Ettttm|L", "E|tt|ttm|L":
    stages = PipelineParallelLayerLayout(layout, 2)
    try:
        require_embedding_group(SimpleNamespace(mtp_num_layers=1, pipeline_model_parallel_layout=stages))
        print("accepted", layout)
    except EngineError as error:
        print(error)
"""


def test_settings_that_the_layers_cannot_honour_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    lines = printed(warm("-c", REFUSED, tiny_checkpoint("bf16"))).strip().splitlines()
    refused = [line.split(": ")[1] for line in lines if line.startswith("dsv3-plugin does not serve these options")]
    assert refused == [
        "moe_token_dispatcher_type='allgather'",
        "hidden_dropout=0.1",
        "context_parallel_size=2",
        "moe_expert_capacity_factor=1.0",
    ], lines
    others = [line for line in lines if not line.startswith("dsv3-plugin does not serve")]
    assert "layernorm_epsilon=1e-05, and the checkpoint's configuration says 1e-06" in others.pop(0)
    assert "tensor_model_parallel_size=2 needs sums in as many slices" in others[0]
    assert "set DSV3_REDUCTION_SLICES=2" in others.pop(0)
    assert others.pop(0).startswith("sequence_parallel=False with tensor_model_parallel_size=2")
    assert "recompute_modules=core_attn is not supported, layernorm, mla_up_proj, " in others[0]
    assert others[1] == "accepted Etttt|mL"
    assert others[2].startswith("the embedding is on ranks [0] of the pipeline [0, 1], and the process group")
    assert others[3].startswith("pipeline_model_parallel_layout has the MTP layer on the first rank")


# The stand-ins


UNTOUCHED = """
import torch
before = torch.cuda.current_device, torch.zeros, torch.Tensor.type, torch.distributed.all_to_all_single
import dsv3_plugin.autograd.bind, dsv3_plugin.layers.model
after = torch.cuda.current_device, torch.zeros, torch.Tensor.type, torch.distributed.all_to_all_single
assert before == after and "megatron_cpu" not in __import__("sys").modules
torch.cuda.is_available = lambda: True
import megatron_cpu
megatron_cpu.install()
assert all(getattr(owner, name) is not function for owner, name, function in megatron_cpu.PATCHES)
print("untouched")
"""


def test_no_stand_in_without_megatron_or_on_a_gpu() -> None:
    assert fresh(PYTHON, "-c", UNTOUCHED).stdout.strip() == "untouched"


NO_DEVICE = """
from dsv3_plugin.errors import EngineError
from dsv3_plugin.megatron_backend import compat
try:
    compat.require_device()
except EngineError as error:
    print(error)
"""


def test_without_stand_ins_a_cpu_is_refused_in_one_line() -> None:
    (line,) = fresh(PYTHON, "-c", NO_DEVICE).stdout.strip().splitlines()
    assert line.startswith("Megatron-Core needs a GPU")
