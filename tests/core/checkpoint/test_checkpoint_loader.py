"""Loaded checkpoints: where each number lands in a model, at once and in buckets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bits import same_bits
from mini_checkpoint import (
    BIAS,
    EXPERT,
    MINI,
    Folders,
    Tensors,
    ops_for,
)

from dsv3_plugin.checkpoint.loader import WeightLoader, load_model, load_mtp, load_weights
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.names import Part, checkpoint_tensors
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.layers.mla import MLA
from dsv3_plugin.layers.model import DeepseekV3
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.profile import BF16, FP32

# The loader


def stacked(tensors: Tensors, layer: str, suffix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up and down of all experts, put together from the file's names alone."""

    def of(projection: str) -> list[torch.Tensor]:
        return [tensors[f"{layer}.mlp.experts.{e}.{projection}.{suffix}"] for e in range(16)]

    gate_up = [torch.cat(pair) for pair in zip(of("gate_proj"), of("up_proj"), strict=True)]
    return torch.stack(gate_up), torch.stack(of("down_proj"))


@pytest.mark.parametrize("dtype", list(CheckpointDtype))
def test_every_number_lands_in_its_place(tiny: Folders, dtype: str) -> None:
    reader = CheckpointReader(tiny[dtype])
    stored, ops = dict(reader.tensors()), ops_for(reader)
    main, mtp = load_model(reader, ops), load_mtp(reader, ops)
    seen = 0
    for prefix, ours, model in (("", "", main), ("model.layers.4.", "layer.", mtp)):
        for name, parameter in model.named_parameters():
            theirs = prefix + name.removeprefix(ours)
            layer, _, suffix = theirs.partition(".mlp.")
            kind = suffix.rpartition(".")[2]
            if theirs in stored:
                expected = stored[theirs]
            elif name == "embed_tokens.weight":
                expected = stored["model.embed_tokens.weight"]
            elif name == "lm_head.weight":
                expected = stored["lm_head.weight"]
            elif suffix.startswith("experts."):
                expected = stacked(stored, layer, kind)["down_proj" in suffix]
            else:
                expected = torch.cat([stored[theirs.replace("gate_up", part)] for part in ("gate", "up")])
            assert same_bits(parameter, expected), name
            assert not parameter.requires_grad, f"{name}: a server would record what it does with it"
            seen += parameter.numel()
    # All of the file, with MTP's copies of embedding and head once as copies and once as what they copy.
    assert seen == sum(tensor.numel() for tensor in stored.values())


def test_a_bf16_checkpoint_in_fp32_and_back(tiny: Folders) -> None:
    in_bf16, in_fp32 = CheckpointReader(tiny["bf16"]), CheckpointReader(tiny["fp32"])
    wide = load_model(in_bf16, ops_for(in_bf16, FP32)).state_dict()
    exact = load_model(in_fp32, ops_for(in_fp32, FP32)).state_dict()
    narrow = load_model(in_fp32, ops_for(in_fp32, BF16)).state_dict()
    for name, tensor in load_model(in_bf16, ops_for(in_bf16)).state_dict().items():
        assert same_bits(wide[name], exact[name]) and same_bits(narrow[name], tensor)


def test_an_update_in_buckets_equals_a_first_load(tmp_path: Path, mini: Folders) -> None:
    old, new = CheckpointReader(mini["bf16"]), make_checkpoint(MINI, tmp_path / "new", 2)
    ops = ops_for(old)
    updated, fresh = load_model(old, ops), load_model(new, ops)

    @torch.inference_mode()
    def absorbed(model: DeepseekV3) -> torch.Tensor:
        """Derived as engines do; the loader writes to it from outside."""
        attention = model.get_submodule("model.layers.0.self_attn")
        assert isinstance(attention, MLA)
        return attention.absorbed_weights()[0]

    stale, kept = absorbed(updated).clone(), absorbed(updated)
    items = sorted(new.tensors())
    loader = WeightLoader(updated, old.config, "main", holds_weights=True)
    used: set[str] = set()
    for start in range(0, len(items), 5):
        used |= loader.load(items[start : start + 5])
        assert (loader.problem is None) == (used == loader.wanted)
    loader.finish()
    assert used == {name for name, spec in checkpoint_tensors(old.config).items() if "main" in spec.targets}
    state = fresh.state_dict()
    assert all(same_bits(tensor, state[name]) for name, tensor in updated.state_dict().items())
    assert not torch.equal(absorbed(updated), stale)
    assert torch.equal(absorbed(updated), absorbed(fresh))
    # A CUDA graph goes on reading what was derived where it was.
    assert absorbed(updated).data_ptr() == kept.data_ptr()


def test_a_bucket_changes_nothing_else(mini: Folders) -> None:
    reader = CheckpointReader(mini["bf16"])
    model = load_model(reader, ops_for(reader))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert WeightLoader(model, reader.config, "main").load([(EXPERT, torch.ones(128, 128))]) == {EXPERT}
    fused = "model.layers.1.mlp.experts.gate_up_proj.weight"
    before[fused][2, 128:] = 1
    assert all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_the_loader_refuses(mini: Folders) -> None:
    bf16, fp8 = CheckpointReader(mini["bf16"]), CheckpointReader(mini["fp8"])
    model = DeepseekV3(ops_for(bf16), bf16.config)
    quantized = DeepseekV3(ops_for(fp8), fp8.config)

    def refused(
        model: torch.nn.Module, reader: CheckpointReader, *items: tuple[str, torch.Tensor], part: Part = "main"
    ) -> str:
        with pytest.raises(CheckpointError) as error:
            load_weights(model, reader.config, items, part)
        return str(error.value)

    weight = torch.ones(128, 128)
    assert refused(model, bf16, ("model.typo", weight)).startswith("tensor model.typo is unknown to this configuration")
    assert refused(model, bf16, (EXPERT, weight[1:])) == (
        f"tensor {EXPERT} has shape [127, 128], the configuration gives [128, 128]"
    )
    assert refused(model, bf16, (EXPERT, weight.half())) == f"tensor {EXPERT} is float16, expected bfloat16 or float32"
    assert refused(model, bf16, (EXPERT, weight.to(torch.float8_e4m3fn))) == (
        f"tensor {EXPERT} is float8_e4m3fn, but the configuration has no quantization_config for it"
    )
    assert refused(quantized, fp8, (EXPERT, weight)) == (
        f"tensor {EXPERT} is float32, but quantization_config says fp8 (float8_e4m3fn)"
    )
    assert "nothing is converted to or from fp8" in refused(quantized, bf16, (EXPERT, weight))
    assert "which the model was built without" in refused(model, fp8, (EXPERT + "_scale_inv", torch.ones(1, 1)))
    bias = torch.tensor([0, torch.nan, 0, 0])
    assert refused(model, bf16, (BIAS, bias)) == f"tensor {BIAS} is nan at expert 1; it must be finite"
    everything_but = [item for item in bf16.tensors() if item[0] != EXPERT]
    assert refused(model, bf16, *everything_but) == (f"missing tensors of the main model (1): {EXPERT}")
    mtp = DeepseekV3MTP(ops_for(bf16), bf16.config)
    message = refused(mtp, bf16, *(i for i in bf16.tensors() if "eh_proj" not in i[0]), part="mtp")
    assert message == "missing tensors of the mtp model (1): model.layers.2.eh_proj.weight"
