"""What a trainer's ranks send to servers: the whole checkpoint, on every rank, in every layout."""

from __future__ import annotations

import pytest
from conftest import TinyCheckpoint
from megatron_programs import needs_megatron, printed, warm

pytestmark = needs_megatron

MODULES = "dsv3_plugin.megatron_backend.export", "dsv3_plugin.megatron_backend.model"

PROGRAM = """
import json, sys
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import distributed as dist
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.export import hf_tensors
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.pipeline import embedding_ranks
from dsv3_plugin.megatron_backend.weights import load_checkpoint

checkpoint, sizes, twin = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(expert_tensor_parallel_size=1, **sizes)
model_parallel_cuda_manual_seed(0)
reader = CheckpointReader(checkpoint)
config = transformer_config(reader.config, reader.profile(), perform_initialization=False, **sizes)
pre_process, post_process = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
model = build_model(reader.config, config, pre_process, post_process)
model = Float16Module(config, model) if config.bf16 else model
load_checkpoint(model, checkpoint)
if twin == "stale" and dist.get_rank() == dist.get_world_size() - 1:
    dict(model.named_parameters())["module.mtp.layers.0.hnorm.weight"].data[0] += 1
sent = list(hf_tensors([model], reader.config))
held = dict(reader.tensors())
copies = [name for name in held if name.endswith(("layers.4.embed_tokens.weight", "shared_head.head.weight"))]
names = [name for name, _ in sent]
assert len(set(names)) == len(names) and set(names) == held.keys() - set(copies), set(names) ^ held.keys()
assert names.index("lm_head.weight") == len(names) - 1
of_mtp = lambda name: name.startswith("model.layers.4.")
assert [name for name, _ in hf_tensors([model], reader.config, of_mtp)] == list(filter(of_mtp, names))
differ = [name for name, tensor in sent if tensor.dtype != held[name].dtype or not torch.equal(tensor, held[name])]
if differ or dist.get_rank() == 0:
    # A line in one piece: both ranks write to one output.
    sys.stdout.write(f"{dist.get_rank()} {len(sent)} tensors, differ: {differ}\\n")
"""


@pytest.mark.parametrize(
    ("dtype", "ranks", "sizes"),
    [
        ("fp8", 1, "{}"),
        ("bf16", 4, '{"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}'),
        ("fp32", 2, '{"tensor_model_parallel_size": 2}'),
    ],
    ids=["one", "stages and experts", "tensor"],
)
def test_every_rank_is_given_the_bytes_of_the_checkpoint(
    dtype: str, ranks: int, sizes: str, tiny_checkpoint: TinyCheckpoint
) -> None:
    slices = "2" if "tensor" in sizes else "1"
    arguments = tiny_checkpoint(dtype), sizes, ""
    done = warm("-c", PROGRAM, *arguments, ranks=ranks, modules=MODULES, DSV3_REDUCTION_SLICES=slices)
    assert done.returncode == 0, printed(done)[-3000:]
    (line,) = done.stdout.splitlines()
    assert line.endswith("differ: []")
    print(line)


def test_a_weight_that_one_stage_has_not_handed_on_is_seen_on_every_rank(tiny_checkpoint: TinyCheckpoint) -> None:
    sizes = '{"pipeline_model_parallel_size": 2}'
    done = warm("-c", PROGRAM, tiny_checkpoint("bf16"), sizes, "stale", ranks=2, modules=MODULES)
    lines = sorted(line for line in done.stdout.splitlines() if "differ" in line)
    assert [line.split("differ: ")[1] for line in lines] == ["['model.layers.4.hnorm.weight']"] * 2, printed(done)
