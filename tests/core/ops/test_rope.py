"""Rotation of interleaved pairs in plain fp32, and the table of angles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import FLOATS, normal, same_bits

from dsv3_plugin.config import DeepseekV3Config, YarnScaling
from dsv3_plugin.ops.rope import rope, rope_table


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rope_in_plain_fp32(dtype: torch.dtype) -> None:
    x, angles = normal(6, 3, 8, dtype=dtype), normal(6, 4, seed=1)
    cos, sin = angles.cos(), angles.sin()
    out = rope(x, cos, sin)
    for (t, h, i), result in np.ndenumerate(out.float().numpy()):
        a, b = x[t, h, i - i % 2].float().numpy(), x[t, h, i - i % 2 + 1].float().numpy()
        c, s = cos[t, i // 2].numpy(), sin[t, i // 2].numpy()
        expected = torch.tensor(a * c - b * s if i % 2 == 0 else a * s + b * c).to(dtype)
        assert expected.item() == result
    assert not torch.equal(out, rope(x.unflatten(-1, (2, 4)).transpose(-1, -2).flatten(-2), cos, sin))
    assert same_bits(rope(x, torch.ones_like(cos), torch.zeros_like(sin)), x)


MINIMAL = {
    "model_type": "deepseek_v3",
    "vocab_size": 16,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "max_position_embeddings": 500,
    "q_lora_rank": None,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


@pytest.mark.parametrize(
    "yarn", [None, YarnScaling(factor=40, original_max_position_embeddings=4096)], ids=["", "yarn"]
)
def test_no_length_changes_the_rotary_table(yarn: YarnScaling | None) -> None:
    config = DeepseekV3Config.from_dict(MINIMAL).model_copy(update={"rope_scaling": yarn})
    cos, sin = rope_table(config)
    longer = rope_table(config.model_copy(update={"max_position_embeddings": 5000}))
    assert cos.shape == (500, 8) and longer[0].shape == (5000, 8)
    assert same_bits(longer[0][:500], cos) and same_bits(longer[1][:500], sin)
