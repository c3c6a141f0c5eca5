"""`dsv3 convert`: both ways, what is exact, every layout, Megatron's own names, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from megatron_programs import DSV3, convert, fresh, needs_megatron, warm, weights
from safetensors.torch import load_file, save_file

from dsv3_plugin.checkpoint.make import make_checkpoint
from dsv3_plugin.checkpoint.names import SCALE_SUFFIX
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.ops.quantize import E4M3, dequantize_weight

DTYPES = ("bf16", "fp32", "fp8")
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"

pytestmark = needs_megatron


def refusal(direction: str, *arguments: object) -> str:
    """The one line of an error; the destination, the last argument, must not be touched."""
    done = warm(DSV3, "convert", direction, *arguments)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), done.stderr[-3000:]
    return line


def equal_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    if a.keys() != b.keys():
        return False
    return all(a[n].dtype == b[n].dtype and torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)


def with_tensors(checkpoint: Path, copy: Path, changed: dict[str, torch.Tensor | None]) -> Path:
    """A copy of a checkpoint with other tensors; None removes one."""
    shutil.copytree(checkpoint, copy)
    tensors = load_file(copy / "model.safetensors") | changed
    (copy / "model.safetensors").unlink()
    save_file({n: t for n, t in tensors.items() if t is not None}, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def converted(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Megatron's checkpoint of the tiny model in each dtype, from processes as a user starts them."""
    root = tmp_path_factory.mktemp("converted")
    for dtype in DTYPES:
        done = fresh(DSV3, "convert", "to-megatron", tiny_checkpoint(dtype), root / dtype)
        assert done.returncode == 0, done.stderr[-3000:]
    return {dtype: root / dtype for dtype in DTYPES}


# There and back


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back_every_byte_is_the_same(
    dtype: str, converted: dict[str, Path], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    convert("to-hf", converted[dtype], tmp_path / "hf")
    original = tiny_checkpoint(dtype)
    files = {file.name: file.read_bytes() for file in original.iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()} == files
    print(f"{len(files)} files, {sum(map(len, files.values())):,} bytes")


def test_several_files_hold_the_same(
    converted: dict[str, Path], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    printed = convert("to-hf", converted["bf16"], tmp_path / "hf", "--max-shard-size", "0.004")
    count = len(list((tmp_path / "hf").glob("model-*-of-*.safetensors")))
    assert count > 3 and f"{count} files" in printed
    assert equal_bytes(weights(tmp_path / "hf"), weights(tiny_checkpoint("bf16")))


SWAPPED = """
import sys
from dsv3_plugin.megatron_backend import convert
from megatron.core.dist_checkpointing import ShardedTensor

original = ShardedTensor.from_rank_offsets

def swapped(key, data, *offsets, **kwargs):
    halves = [(axis, 1 - part if of == 2 else part, of) for axis, part, of in offsets]
    return original(key, data, *halves, **kwargs)

ShardedTensor.from_rank_offsets = swapped
convert.to_megatron(sys.argv[1], sys.argv[2])
"""


@pytest.fixture(scope="module")
def swapped(tiny_checkpoint: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Megatron's checkpoint of the tiny model with gate and up in each other's place."""
    path = tmp_path_factory.mktemp("swapped") / "megatron"
    done = warm("-c", SWAPPED, tiny_checkpoint("bf16"), path)
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def test_gate_and_up_swapped_are_caught(swapped: Path, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    convert("to-hf", swapped, tmp_path / "hf")
    found, expected = weights(tmp_path / "hf"), weights(tiny_checkpoint("bf16"))
    different = {name for name in expected if not torch.equal(found[name], expected[name])}
    assert different == {name for name in expected if ".gate_proj." in name or ".up_proj." in name}


# Every layout

LOAD = """
import os, sys
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist
from dsv3_plugin.checkpoint.masters import dequantize_weights
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import local_tensors

source, original, tensor_, pipeline, expert = sys.argv[1], CheckpointReader(sys.argv[2]), *map(int, sys.argv[3:])
dist.init_process_group("gloo")
sizes = dict(tensor_model_parallel_size=tensor_, pipeline_model_parallel_size=pipeline,
             expert_model_parallel_size=expert, expert_tensor_parallel_size=1)
parallel_state.initialize_model_parallel(**sizes, create_gloo_process_groups=True)
model_parallel_cuda_manual_seed(0)
settings = transformer_config(original.config, original.profile(), sequence_parallel=tensor_ > 1, **sizes)
model = build_model(original.config, settings, parallel_state.is_pipeline_first_stage(),
                    parallel_state.is_pipeline_last_stage())
state, missing, unexpected = dist_checkpointing.load(
    {"model": model.sharded_state_dict()}, source + "/release", strict="return_all")
assert not missing and not [key for key in unexpected if not key.startswith("common_state")], (missing, unexpected)
model.load_state_dict(state["model"])
places = local_tensors(model, original.config)

def part(tensor, shape):
    for dim, size in enumerate(shape):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, parallel_state.get_tensor_model_parallel_rank() * size, size)
    return tensor

wrong = [name for name, tensor in dequantize_weights(original, places.__contains__)
         if not torch.equal(places[name], part(tensor, places[name].shape).to(places[name].dtype))]
print(f"rank {dist.get_rank()}: {len(places)} tensors, {len(wrong)} wrong {wrong[:3]}", flush=True)
dist.barrier()
"""


def load_on_two_ranks(source: Path, original: Path, tensor: int, pipeline: int, expert: int) -> str:
    sizes = tensor, pipeline, expert
    done = warm("-c", LOAD, source, original, *sizes, ranks=2, DSV3_REDUCTION_SLICES=str(tensor))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("dtype", "tensor", "pipeline", "expert"),
    [("bf16", 1, 1, 2), ("bf16", 1, 2, 1), ("bf16", 2, 1, 1), ("bf16", 2, 1, 2), ("fp8", 1, 1, 2)],
)
def test_one_process_converts_for_every_layout(
    dtype: str, tensor: int, pipeline: int, expert: int, converted: dict[str, Path], tiny_checkpoint: TinyCheckpoint
) -> None:
    printed = load_on_two_ranks(converted[dtype], tiny_checkpoint(dtype), tensor, pipeline, expert)
    print(printed)
    assert printed.count(" 0 wrong []") == 2


def test_gate_and_up_swapped_are_caught_by_the_model(swapped: Path, tiny_checkpoint: TinyCheckpoint) -> None:
    """A mistake that both ways shared would come back unseen; the model's own loader finds it."""
    printed = load_on_two_ranks(swapped, tiny_checkpoint("bf16"), 1, 1, 2)
    assert "gate_proj.weight" in printed and " 0 wrong" not in printed


MEGATRONS_KEYS = """
import sys
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.post_training.modelopt.gpt import model_specs
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.megatron_backend.config import transformer_config

class NoAttention(torch.nn.Module):
    def __init__(self, *args, **kwargs):
        super().__init__()

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=True)
model_parallel_cuda_manual_seed(0)
reader = CheckpointReader(sys.argv[1])
config = transformer_config(reader.config, reader.profile(), qk_layernorm=True)
block = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
mtp = get_gpt_mtp_block_spec(config, block.layer_specs[-1], use_transformer_engine=False)
# How Megatron itself gives its modules without TransformerEngine the keys of those with it.
model_specs.DotProductAttention = NoAttention
keyed = model_specs.get_gpt_modelopt_spec(config, local_core_attention=True, remap_te_layernorm=True).layer_specs
layers = [*block.layer_specs, mtp.layer_specs[0].submodules.mtp_model_layer]
for layer, like in zip(layers, [*keyed, keyed[-1]], strict=True):
    layer.submodules.self_attention.submodules.core_attention = NoAttention
    layer.submodules.sharded_state_dict_keys_map = like.submodules.sharded_state_dict_keys_map
model = GPTModel(config, block, reader.config.vocab_size, 64, position_embedding_type="rope",
                 share_embeddings_and_output_weights=False, mtp_block_spec=mtp)
state = model.sharded_state_dict()
apply_factories(state)
tensors = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
megatrons = {tensor.key: tuple(tensor.global_shape) for tensor in tensors}
stored = dist_checkpointing.load_tensors_metadata(sys.argv[2] + "/release")
ours = {key: tuple(tensor.global_shape) for key, tensor in stored.items()}
print("different", sorted(megatrons.items() ^ ours.items()))
print("equal", len(megatrons.items() & ours.items()))
"""


def test_keys_and_shapes_are_those_of_megatrons_own_layers(
    converted: dict[str, Path], tiny_checkpoint: TinyCheckpoint
) -> None:
    done = warm("-c", MEGATRONS_KEYS, tiny_checkpoint("bf16"), converted["bf16"])
    assert "different []\nequal 78\n" in done.stdout, done.stdout + done.stderr[-2000:]


# What is exact in fp8


def test_fp8_numbers_come_back_and_bytes_if_scales_were_the_smallest(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    before = weights(tiny_checkpoint("fp8"))
    weight, scale = before[name].clone(), before[name + SCALE_SUFFIX].clone()
    # Its first block's scale is twice the smallest: the same numbers by other bytes. Its last block is zero.
    halved = weight[:128, :128].float() / 2
    assert torch.equal(halved.to(E4M3).float(), halved) or (halved.to(E4M3).float() - halved).abs().max() < 1e-2
    weight[:128, :128] = halved.to(E4M3)
    scale[0, 0] *= 2
    weight[-128:, -128:] = 0
    scale[-1, -1] = 4.0
    source = with_tensors(tiny_checkpoint("fp8"), tmp_path / "in", {name: weight, name + SCALE_SUFFIX: scale})
    convert("to-megatron", source, tmp_path / "megatron")
    convert("to-hf", tmp_path / "megatron", tmp_path / "out")
    after = weights(tmp_path / "out")
    numbers = dequantize_weight(weight, scale)
    assert torch.equal(dequantize_weight(after[name], after[name + SCALE_SUFFIX]), numbers)
    assert not torch.equal(after[name].view(torch.uint8), weight.view(torch.uint8))
    assert after[name + SCALE_SUFFIX][-1, -1] == 1.0
    del after[name], after[name + SCALE_SUFFIX], before[name], before[name + SCALE_SUFFIX]
    assert equal_bytes(after, before)


def test_fp32_scales_are_refused_and_dequantized(tmp_path: Path) -> None:
    settings = read_config("tiny")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    settings["quantization_config"] = quantization | {"weight_block_size": [128, 128]}
    make_checkpoint(settings, tmp_path / "in", 1)
    line = refusal("to-megatron", tmp_path / "in", tmp_path / "megatron")
    assert "fp32 scales" in line and "--dequantize" in line
    assert not (tmp_path / "megatron").exists()

    convert("to-megatron", tmp_path / "in", tmp_path / "megatron", "--dequantize")
    convert("to-hf", tmp_path / "megatron", tmp_path / "out")
    reader = CheckpointReader(tmp_path / "out")
    assert reader.profile().name == "bf16"
    before, after = weights(tmp_path / "in"), weights(tmp_path / "out")
    quantized = [name for name in before if name + SCALE_SUFFIX in before]
    assert len(quantized) > 100
    for name in quantized:
        numbers = dequantize_weight(before[name], before[name + SCALE_SUFFIX])
        assert torch.equal(after[name], numbers.bfloat16())


def test_scales_that_contradict_the_configuration_are_refused(tmp_path: Path) -> None:
    """fp32 scales under scale_fmt ue8m0: quantizing again would change every weight."""
    settings = read_config("tiny")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    settings["quantization_config"] = quantization
    make_checkpoint(settings, tmp_path / "in", 1)
    settings["quantization_config"] = quantization | {"scale_fmt": "ue8m0"}
    (tmp_path / "in" / "config.json").write_text(json.dumps(settings))
    line = refusal("to-megatron", tmp_path / "in", tmp_path / "megatron")
    assert "_scale_inv is 0.0" in line and "scale_fmt ue8m0 in config.json says that scales are powers of two" in line


def test_every_tensor_comes_back_in_its_dtype(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    """bf16 biases and a bf16 norm in an fp32 model, MTP without copies; Megatron holds all of it wider."""
    before = weights(tiny_checkpoint("fp32"))
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    copies = ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight")
    odd = {name: before[name].bfloat16() for name in (*biases, "model.norm.weight", EXPERT)}
    source = with_tensors(tiny_checkpoint("fp32"), tmp_path / "in", odd | dict.fromkeys(copies))
    convert("to-megatron", source, tmp_path / "megatron")
    convert("to-hf", tmp_path / "megatron", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_several_mtp_layers_are_refused(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    make_checkpoint(read_config("tiny") | {"num_nextn_predict_layers": 2, "vocab_size": 64}, tmp_path / "in", 1)
    line = refusal("to-megatron", tmp_path / "in", tmp_path / "out")
    assert "num_nextn_predict_layers is 2: several MTP layers are not implemented" in line


# Remarks


def test_what_changes_is_said(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    original = weights(tiny_checkpoint("bf16"))
    copy, norm = "model.layers.4.shared_head.head.weight", "model.norm.weight"
    source = with_tensors(
        tiny_checkpoint("bf16"), tmp_path / "in", {copy: original[copy] + 1, norm: original[norm].float()}
    )
    printed = convert("to-megatron", source, tmp_path / "megatron")
    assert f"note: {copy} differs from lm_head.weight and is dropped" in printed
    assert "note: 1 tensors were float32 and are bfloat16 now" in printed


# Refusals


def test_a_missing_expert_is_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = with_tensors(tiny_checkpoint("bf16"), tmp_path / "in", {EXPERT: None})
    assert EXPERT in refusal("to-megatron", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_named(tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_checkpoint("bf16"), tmp_path / "in")
    os.truncate(source / "model.safetensors", 10_000_000)
    assert str(source / "model.safetensors") in refusal("to-megatron", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_needs_a_size(tmp_path: Path) -> None:
    line = refusal("to-hf", tmp_path / "in", "--max-shard-size", "nan", tmp_path / "out")
    assert line.startswith("error: --max-shard-size nan: ")


def test_a_truncated_megatron_file_is_refused(converted: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(converted["bf16"], tmp_path / "in")
    for file in (source / "release").glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    assert f"{source / 'release'}: cannot be read" in refusal("to-hf", source, tmp_path / "out")
    (source / "release" / ".metadata").write_bytes(b"garbage")
    assert f"{source / 'release'}: cannot be read: AssertionError" in refusal("to-hf", source, tmp_path / "out")
    torch.save({"hugging_face": {"lm_head.weight": "another dtype"}}, source / "release" / "common.pt")
    assert f"{source / 'release'}: cannot be read: KeyError" in refusal("to-hf", source, tmp_path / "out")
    for content, said in (b"", "EOFError"), (b"garbage", ""), (b"\x80\x02.", ""):
        (source / "release" / "common.pt").write_bytes(content)
        line = refusal("to-hf", source, tmp_path / "out")
        assert f"{source / 'release'}: cannot be read: {said}" in line, line
    for content, said in ("{", "Expecting"), ("{}", "TypeError"), ("[]", ""):
        (source / "release" / "metadata.json").write_text(content)
        assert f"{source / 'release'}: cannot be read: {said}" in refusal("to-hf", source, tmp_path / "out")
    (source / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe")
    assert f"{source / 'latest_checkpointed_iteration.txt'}: cannot be read: 'utf-8' codec" in refusal(
        "to-hf", source, tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_an_existing_folder_is_not_overwritten(
    direction: str, converted: dict[str, Path], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    source = tiny_checkpoint("bf16") if direction == "to-megatron" else converted["bf16"]
    assert "nothing is overwritten" in refusal(direction, source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_folders_that_are_no_checkpoint_are_refused(
    converted: dict[str, Path], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert "no such folder" in refusal("to-megatron", tmp_path / "nowhere", out)
    assert "config.json: no such file" in refusal("to-megatron", tmp_path / "empty", out)
    assert "no such folder" in refusal("to-hf", tmp_path / "nowhere", out)
    assert "is no distributed checkpoint of Megatron" in refusal("to-hf", tmp_path / "empty", out)
    assert "is no distributed checkpoint of Megatron" in refusal("to-hf", tiny_checkpoint("bf16"), out)
    bare = shutil.copytree(converted["bf16"] / "release", tmp_path / "alone" / "release")
    assert "has no config.json" in refusal("to-hf", bare, out)
    assert not out.exists()


def test_another_models_checkpoint_is_refused(converted: dict[str, Path], tmp_path: Path) -> None:
    settings = json.loads((converted["bf16"] / "config.json").read_text())
    cases = {
        "fewer": ({"num_hidden_layers": 3}, "config.json does not know"),
        "more": ({"num_hidden_layers": 5}, "it lacks tensors"),
        "wider": ({"moe_intermediate_size": 256}, "has shape [16, 256, 256], config.json gives [16, 512, 256]"),
    }
    for name, (change, expected) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings | change))
        line = refusal("to-hf", converted["bf16"], tmp_path / "out", "--like", tmp_path / name)
        assert "is of another model" in line and expected in line
    assert not (tmp_path / "out").exists()


def test_a_configuration_that_it_was_not_trained_with_is_refused(
    converted: dict[str, Path], tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    """No shape tells them apart, and the result would be another model."""
    like = tmp_path / "like"
    like.mkdir()
    settings = read_config("tiny") | {"rope_theta": 50000, "num_experts_per_tok": 2}
    (like / "config.json").write_text(json.dumps(settings))
    line = refusal("to-hf", converted["bf16"], tmp_path / "out", "--like", like)
    assert "was saved with moe_router_topk 4, not 2, rotary_base 10000.0, not 50000.0 as in" in line


def test_without_megatron_the_command_says_what_to_install(tmp_path: Path) -> None:
    done = fresh(Path(sys.executable).with_name("dsv3"), "convert", "to-hf", tmp_path, tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: Megatron-Core is not installed: pip install 'dsv3-plugin[megatron]'"
