"""A model that is as small as it can be, its checkpoints, and copies of them that are wrong."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3_plugin.checkpoint.reader import SINGLE_FILE, CheckpointReader
from dsv3_plugin.errors import CheckpointError
from dsv3_plugin.layers.model import bind_ops
from dsv3_plugin.profile import Profile
from dsv3_plugin.registry import Ops

CPU = torch.device("cpu")
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"

MINI = {
    "model_type": "deepseek_v3",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 64,
    "max_position_embeddings": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
# As Moonlight and Kimi-K2 differ from V3: no query compression, no groups, two shared experts, no MTP.
MOONLIGHT = MINI | {
    "model_type": "kimi_k2",
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "num_nextn_predict_layers": 0,
    "vocab_size": 299,
}

Folders = dict[str, Path]
Tensors = dict[str, torch.Tensor]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def ops_for(reader: CheckpointReader, profile: Profile | None = None) -> Ops:
    return bind_ops(reader.config, profile or reader.profile(), CPU)


def edited(source: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy of a single-file checkpoint with its tensors changed."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = load_file(source / SINGLE_FILE)
    change(tensors)
    save_file(tensors, target / SINGLE_FILE)
    return target


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        CheckpointReader(folder).validate()
    assert "\n" not in str(error.value)
    return str(error.value)
