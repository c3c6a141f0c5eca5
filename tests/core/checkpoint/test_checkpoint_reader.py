"""Read checkpoints: tensors, files and numbers that are wrong are named; so is what readers would take differently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import same_bits
from command import run_cli
from mini_checkpoint import (
    BIAS,
    EXPERT,
    MINI,
    Folders,
    Tensors,
    edited,
    ops_for,
    refusal,
)
from safetensors.torch import load_file

from dsv3_plugin.checkpoint.loader import load_model, load_mtp
from dsv3_plugin.checkpoint.make import make_checkpoint
from dsv3_plugin.checkpoint.reader import INDEX_FILE, SINGLE_FILE, CheckpointReader, value_problem
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import CheckpointError, ConfigError

# The reader


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), f"missing tensors (1): {EXPERT}"),
        (
            lambda t: [t.pop(n) for n in list(t) if ".layers.0." in n],
            "missing tensors (12): model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight,"
            " model.layers.0.mlp.gate_proj.weight and 9 more",
        ),
        (
            lambda t: [t.pop(n) for n in list(t) if ".layers.2." in n],
            "without an MTP layer, config.json needs num_nextn_predict_layers 0",
        ),
        (
            lambda t: t.update({EXPERT + "x": t.pop(EXPERT)}),
            f"missing tensors (1): {EXPERT}; unknown tensors (1): {EXPERT}x",
        ),
        (
            lambda t: t.update({"model.layers.7.extra": torch.zeros(1)}),
            "tensors that this configuration does not know (1): model.layers.7.extra",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT][:-1].contiguous()}),
            f"{SINGLE_FILE}: tensor {EXPERT} has shape [127, 128], the configuration gives [128, 128]",
        ),
        (
            lambda t: t.update({"model.layers.2.embed_tokens.weight": torch.zeros(3, 128)}),
            "tensor model.layers.2.embed_tokens.weight has shape [3, 128], the configuration gives [320, 128]",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].half()}),
            f"{SINGLE_FILE}: tensor {EXPERT} is F16, expected bfloat16 or float32",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}),
            "config.json has no quantization_config; restore it",
        ),
        (
            lambda t: t[BIAS].__setitem__(3, torch.nan),
            f"{SINGLE_FILE}: tensor {BIAS} is nan at expert 3; it must be finite",
        ),
        (
            lambda t: t[BIAS].__setitem__(0, -torch.inf),
            f"{SINGLE_FILE}: tensor {BIAS} is -inf at expert 0; it must be finite",
        ),
    ],
)
def test_wrong_tensors_are_named(tmp_path: Path, mini: Folders, change: Callable[[Tensors], Any], message: str) -> None:
    assert message in refusal(edited(mini["bf16"], tmp_path / "bad", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(EXPERT + "_scale_inv"),
            f"tensor {EXPERT} is float8_e4m3fn, but its scales {EXPERT}_scale_inv are missing",
        ),
        (
            lambda t: t.update({EXPERT: t[EXPERT].bfloat16()}),
            f"tensor {EXPERT} is bfloat16, but quantization_config says fp8 (float8_e4m3fn); remove",
        ),
        (
            lambda t: t.update({EXPERT + "_scale_inv": torch.ones(1, 1, dtype=torch.bfloat16)}),
            f"tensor {EXPERT}_scale_inv is bfloat16, expected float32",
        ),
        (
            lambda t: t.update({EXPERT + "_scale_inv": torch.ones(2, 1)}),
            f"tensor {EXPERT}_scale_inv has shape [2, 1], the configuration gives [1, 1]",
        ),
    ],
)
def test_wrong_fp8_tensors_are_named(
    tmp_path: Path, mini: Folders, change: Callable[[Tensors], Any], message: str
) -> None:
    assert message in refusal(edited(mini["fp8"], tmp_path / "bad", change))


def test_what_may_be_absent_or_extra(tmp_path: Path, mini: Folders) -> None:
    """MTP's copies may be absent, `inv_freq` may be there, weights may be fp32 and a bias bf16."""

    def change(tensors: Tensors) -> None:
        del tensors["model.layers.2.embed_tokens.weight"], tensors["model.layers.2.shared_head.head.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors[EXPERT] = tensors[EXPERT].float()
        tensors[BIAS] = tensors[BIAS].bfloat16()

    reader = CheckpointReader(edited(mini["bf16"], tmp_path / "odd", change))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in reader.validate()
    original = load_mtp(CheckpointReader(mini["bf16"]), ops_for(reader))
    odd = load_mtp(reader, ops_for(reader))
    assert same_bits(odd.embed_tokens.weight, original.embed_tokens.weight)
    assert same_bits(odd.lm_head.weight, original.lm_head.weight)


def test_wrong_files_are_named(tmp_path: Path, mini: Folders) -> None:
    with pytest.raises(CheckpointError, match="absent: no such folder"):
        CheckpointReader(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty/config\.json: no such file"):
        CheckpointReader(tmp_path / "empty")
    folder = tmp_path / "c"
    folder.mkdir()
    shutil.copy(mini["bf16"] / "config.json", folder)
    assert refusal(folder) == f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    whole = (mini["bf16"] / SINGLE_FILE).read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 1000):
        (folder / SINGLE_FILE).write_bytes(damaged)
        assert refusal(folder).startswith(f"{folder / SINGLE_FILE}: truncated or not a safetensors file: ")


def test_wrong_indices_are_named(tmp_path: Path) -> None:
    reader = make_checkpoint(MINI, tmp_path / "a", 1, max_shard_bytes=500_000)
    file = reader.path / INDEX_FILE
    good = json.loads(file.read_text())

    def refused(index: Any) -> str:
        file.write_text(index if isinstance(index, str) else json.dumps(index))
        return refusal(reader.path)

    assert refused("{").startswith(f"{file}: not valid JSON: ")
    assert refused([]) == f"{file}: expected a JSON object, found list"
    assert refused({"weight_map": {"a": 1}}) == f"{file}: weight_map must map tensor names to file names"
    assert refused({}) == f"{file}: weight_map must map tensor names to file names"
    assert refused({"weight_map": {}}) == f"{file}: weight_map is empty"
    moved = good["weight_map"] | {"lm_head.weight": "gone.safetensors"}
    assert refused({"weight_map": moved}) == f"{file}: names gone.safetensors, which does not exist, for lm_head.weight"
    home, other = good["weight_map"]["lm_head.weight"], good["weight_map"]["model.embed_tokens.weight"]
    assert home != other
    assert refused({"weight_map": good["weight_map"] | {"lm_head.weight": other}}) == (
        f"{reader.path / other}: lacks lm_head.weight, which {INDEX_FILE} places there"
    )
    del good["weight_map"]["lm_head.weight"]
    assert refused(good) == f"{reader.path / home}: holds lm_head.weight, which {INDEX_FILE} does not place there"


# One reading: files that another reader would take, and numbers that no model computes with


def test_files_that_readers_would_take_differently_are_refused(tmp_path: Path, mini: Folders) -> None:
    folder = shutil.copytree(mini["bf16"], tmp_path / "single")
    CheckpointReader(folder).validate()
    for name in ("extra.safetensors", "consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copy(folder / SINGLE_FILE, folder / name)
        assert f"holds {name} beside {SINGLE_FILE}, which no index names" in refusal(folder)
        (folder / name).unlink()
    for name in ("hf_quant_config.json", "quant_model_description.json", "adapter_config.json"):
        (folder / name).write_text("{}")
        assert refusal(folder).startswith(f"{folder / name}: ")
        (folder / name).unlink()
    # What nobody reads where there are safetensors.
    for name in ("training_args.bin", "optimizer.pt", ".hidden.safetensors"):
        (folder / name).write_bytes(b"")
    (folder / "more").mkdir()
    shutil.copy(folder / SINGLE_FILE, folder / "more")
    CheckpointReader(folder).validate()


def test_a_stale_file_beside_an_index_is_refused(tmp_path: Path, mini: Folders) -> None:
    folder = make_checkpoint(MINI, tmp_path / "a", 1, max_shard_bytes=500_000).path
    shutil.copy(mini["bf16"] / SINGLE_FILE, folder)
    assert f"holds {SINGLE_FILE} beside model-00001-of-" in refusal(folder)
    assert f"which {INDEX_FILE} names; readers differ" in refusal(folder)
    # An index may name the single file: then it is read by it, and nothing else may be there.
    for shard in folder.glob("model-*"):
        shard.unlink()
    weight_map = dict.fromkeys(load_file(folder / SINGLE_FILE), SINGLE_FILE)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    CheckpointReader(folder).validate()
    del weight_map["lm_head.weight"]
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    assert f"holds lm_head.weight, which {INDEX_FILE} does not place there" in refusal(folder)


def test_an_index_names_files_that_servers_read(tmp_path: Path) -> None:
    folder = make_checkpoint(MINI, tmp_path / "a", 1, max_shard_bytes=500_000).path
    index = (folder / INDEX_FILE).read_text()
    first = "model-00001-of-"
    shard = next(folder.glob(f"{first}*"))
    for name in ("shards/one.safetensors", ".one.safetensors", "one.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        shard.rename(folder / name)
        (folder / INDEX_FILE).write_text(index.replace(shard.name, name))
        assert refusal(folder).startswith(f"{folder / INDEX_FILE}: names {name}; servers read only *.safetensors")
        (folder / name).rename(shard)
    shard.rename(folder / "consolidated-1.safetensors")
    (folder / INDEX_FILE).write_text(index.replace(shard.name, "consolidated-1.safetensors"))
    assert "vLLM takes consolidated*.safetensors for Mistral's format, rename the file" in refusal(folder)
    (folder / INDEX_FILE).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert refusal(folder) == f"{folder / INDEX_FILE}: a stands twice in one object; keep one"


def test_fp32_weights_need_a_dtype(tmp_path: Path, mini: Folders) -> None:
    """vLLM would serve them in fp32, the reference in bf16."""
    folder = edited(mini["bf16"], tmp_path / "c", lambda t: t.update({EXPERT: t[EXPERT].float()}))
    config = json.loads((folder / "config.json").read_text())
    del config["torch_dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert f"has no torch_dtype, and {EXPERT} is float32" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    CheckpointReader(folder).validate()
    shutil.copy(mini["bf16"] / SINGLE_FILE, folder)
    (folder / "config.json").write_text(json.dumps(config))
    CheckpointReader(folder).validate()


QUANTIZED = EXPERT + "_scale_inv"


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (0.0, "a scale must be positive and finite"),
        (-1.0, "a scale must be positive and finite"),
        (float("nan"), "a scale must be positive and finite"),
        (float("inf"), "a scale must be positive and finite"),
        (2.0**127, "a scale must be positive and finite, and so must 448 times it"),
        (0.75, "scale_fmt ue8m0 in config.json says that scales are powers of two"),
    ],
)
def test_scales_are_looked_at_before_weights_are_read(tmp_path: Path, mini: Folders, value: float, rule: str) -> None:
    folder = edited(mini["fp8"], tmp_path / "bad", lambda t: t[QUANTIZED].__setitem__((0, 0), value))
    assert f"{SINGLE_FILE}: tensor {QUANTIZED} is {value} at [0, 0]; {rule}" in refusal(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["scale_fmt"]
    (folder / "config.json").write_text(json.dumps(config))
    if value == 0.75:
        assert CheckpointReader(folder).validate() and CheckpointReader(folder).profile().scale_format == "float32"
    else:
        assert rule in refusal(folder)


@pytest.mark.parametrize(
    ("words", "hit"),
    [
        (["model.layers.1.mlp.experts.2.up_proj"], "model.layers.1.mlp.experts.2.up_proj"),
        (["self_attn"], "model.layers.0.self_attn"),
        (["re:.*gate"], ""),
        (["gate"], "gate_proj"),
    ],
)
@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
def test_modules_that_are_not_to_be_quantized(
    tmp_path: Path, mini: Folders, field: str, words: list[str], hit: str
) -> None:
    folder = shutil.copytree(mini["fp8"], tmp_path / "c")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][field] = ["lm_head", "model.layers.1.mlp.gate", "model.layers.2.eh_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    CheckpointReader(folder).validate()
    config["quantization_config"][field] += words
    (folder / "config.json").write_text(json.dumps(config))
    found = refusal(folder)
    assert f"quantization_config.{field} names {words[0]!r}, but " in found and hit in found


@pytest.mark.parametrize(
    ("dtype", "name", "place", "value", "message"),
    [
        ("bf16", EXPERT, (3, 5), float("nan"), "is nan at [3, 5]; it must be finite"),
        ("bf16", "model.norm.weight", (7,), float("-inf"), "is -inf at [7]; it must be finite"),
        ("fp8", EXPERT, (1, 2), 0x7F, "is nan at [1, 2]; it must be finite"),
        ("fp8", EXPERT, (9, 0), 0xFF, "is nan at [9, 0]; it must be finite"),
    ],
)
def test_values_are_looked_at_where_asked(
    tmp_path: Path, mini: Folders, dtype: str, name: str, place: tuple[int, ...], value: float, message: str
) -> None:
    def change(tensors: Tensors) -> None:
        tensor = tensors[name]
        (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor)[place] = value

    reader = CheckpointReader(edited(mini[dtype], tmp_path / "bad", change))
    reader.validate()
    with pytest.raises(CheckpointError) as error:
        reader.check_values()
    assert str(error.value) == f"{reader.path / SINGLE_FILE}: tensor {name} {message}"


def test_values_of_a_good_checkpoint(mini: Folders, tiny: Folders) -> None:
    for folder in (*mini.values(), tiny["fp8"]):
        reader = CheckpointReader(folder)
        seen: list[tuple[int, int]] = []
        total = reader.check_values(lambda done, total: seen.append((done, total)))  # noqa: B023
        assert total == sum(tensor.numel() for _, tensor in reader.tensors()) and seen[-1] == (total, total)


def test_the_largest_scale_passes(mini: Folders) -> None:
    """448 times it is a number of fp32."""
    config = CheckpointReader(mini["fp8"]).config
    assert value_problem(QUANTIZED, torch.tensor([[2.0**119, 2.0**-126]]), config) is None
    assert "is 1.7014118346046923e+38 at [0, 0]" in str(value_problem(QUANTIZED, torch.tensor([[2.0**127]]), config))


@pytest.mark.parametrize(
    ("copy", "original"),
    [("shared_head.head.weight", "lm_head.weight"), ("embed_tokens.weight", "model.embed_tokens.weight")],
)
def test_copies_that_nobody_uses_are_compared(
    copy: str,
    original: str,
    tmp_path: Path,
    mini: Folders,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"model.layers.{MINI['num_hidden_layers']}.{copy}"
    folder = edited(mini["bf16"], tmp_path / "c", lambda tensors: tensors[name].__setitem__((0, 0), 7.0))
    for checkpoint, notes in ((mini["bf16"], []), (folder, [name])):
        assert CheckpointReader(checkpoint).copies_that_differ() == notes
        assert run_cli(monkeypatch, "checkpoint", "check", "--values", checkpoint) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert said == [
            f"note: {name} differs from {original}, which the MTP layer uses instead of it" for name in notes
        ]


def test_every_bad_number_is_counted_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3_plugin.checkpoint.reader._CHUNK", 7)
    tensor = torch.zeros(5, 10, dtype=torch.bfloat16)
    tensor[2, 3] = tensor[4, 9] = torch.inf
    config = DeepseekV3Config.from_dict(MINI)
    assert value_problem("w", tensor, config) == "tensor w is inf at [2, 3] (2 such numbers); it must be finite"
    tensor[2, 3] = tensor[4, 9] = 3e38
    assert value_problem("w", tensor, config) is None


def test_several_mtp_layers(tmp_path: Path, mini: Folders) -> None:
    """The main model is the same, and is loaded; drafts have one layer, and are refused before any weight is read."""
    several = make_checkpoint(MINI | {"num_nextn_predict_layers": 3}, tmp_path / "a", 1)
    headers, one = several.validate(), CheckpointReader(mini["bf16"])
    assert len([name for name in headers if name.startswith(("model.layers.2.", "model.layers.4."))]) == 2 * len(
        [name for name in one.headers() if name.startswith("model.layers.2.")]
    )
    assert several.check_values() > one.check_values()
    model, same = load_model(several, ops_for(several)), load_model(one, ops_for(one))
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    with pytest.raises(ConfigError, match="num_nextn_predict_layers is 3: several MTP layers are not implemented"):
        load_mtp(several, ops_for(several))
