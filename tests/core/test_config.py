"""Configurations: those of the published models, both spellings of transformers, and what is refused by name."""

from __future__ import annotations

import itertools
import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers import DeepseekV3Config as TransformersConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dsv3_plugin.config import DeepseekV3Config, YarnScaling
from dsv3_plugin.errors import ConfigError
from dsv3_plugin.ops.rope import rope_inv_freq, softmax_scale
from dsv3_plugin.profile import BF16, FP8_FLOAT32, FP8_UE8M0, FP32, profile_for

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}

DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
MOONLIGHT: dict[str, Any] = {
    name: value for name, value in DEEPSEEK_V3.items() if name not in ("rope_scaling", "quantization_config")
} | {
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
    "vocab_size": 163840,
}
KIMI_K2: dict[str, Any] = DEEPSEEK_V3 | {
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"factor": 32, "beta_fast": 1.0},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
MODELS = {"deepseek_v3": DEEPSEEK_V3, "moonlight": MOONLIGHT, "kimi_k2": KIMI_K2}


def transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """The same model as transformers 5 spells it."""
    config = dict(config)
    rope = dict(config.pop("rope_scaling", None) or {"type": "default"})
    rope["rope_type"] = rope.pop("type")
    config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    config["dtype"] = config.pop("torch_dtype")
    return config


def test_deepseek_v3() -> None:
    config = DeepseekV3Config.from_dict(DEEPSEEK_V3)
    assert (config.qk_head_dim, config.latent_dim, config.shared_intermediate_size) == (192, 576, 2048)
    assert config.mtp_layer_idx == 61
    assert [i for i in range(62) if not config.is_moe_layer(i)] == [0, 1, 2]
    assert config.rope_scaling == YarnScaling(
        factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
    )
    # The factor that is often forgotten: (0.1 ln 40 + 1) squared.
    assert softmax_scale(config) == pytest.approx(1.8738542 / math.sqrt(192), rel=1e-7)
    assert profile_for(config) is FP8_FLOAT32


def test_moonlight() -> None:
    config = DeepseekV3Config.from_dict(MOONLIGHT)
    assert config.q_lora_rank is None and config.rope_scaling is None and config.quantization_config is None
    assert (config.n_group, config.topk_group, config.num_nextn_predict_layers) == (1, 1, 0)
    assert (config.rope_theta, config.routed_scaling_factor, config.rms_norm_eps) == (50000.0, 2.446, 1e-5)
    assert config.shared_intermediate_size == 2816
    assert softmax_scale(config) == 192**-0.5
    assert profile_for(config) is BF16


def test_kimi_k2() -> None:
    config = DeepseekV3Config.from_dict(KIMI_K2)
    assert (config.model_type, config.n_routed_experts, config.num_attention_heads) == ("kimi_k2", 384, 64)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 32 and config.rope_scaling.beta_fast == 1
    assert (config.routed_scaling_factor, config.q_lora_rank, config.rope_theta) == (2.827, 1536, 50000.0)


@pytest.mark.parametrize("model", MODELS)
def test_both_spellings_are_one_configuration(model: str) -> None:
    assert DeepseekV3Config.from_dict(transformers_5(MODELS[model])) == DeepseekV3Config.from_dict(MODELS[model])


@pytest.mark.parametrize("model", ["deepseek_v3", "moonlight"])
def test_what_transformers_writes_is_the_same_configuration(model: str, tmp_path: Path) -> None:
    published = {name: value for name, value in MODELS[model].items() if name != "quantization_config"}
    TransformersConfig(**deepcopy(published)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written
    assert DeepseekV3Config.from_pretrained(tmp_path) == DeepseekV3Config.from_dict(published)


def test_dtype_spellings_and_profiles() -> None:
    plain = {name: value for name, value in MOONLIGHT.items() if name != "torch_dtype"}
    for spelling in ({}, {"torch_dtype": None}, {"dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}):
        assert profile_for(DeepseekV3Config.from_dict(plain | spelling)) is BF16
    fp32 = DeepseekV3Config.from_dict(plain | {"dtype": torch.float32})
    assert profile_for(fp32) is FP32
    assert profile_for(fp32, torch.bfloat16) is BF16
    with pytest.raises(ConfigError, match=r"dtype=torch.float16 has no numerics profile"):
        profile_for(fp32, torch.float16)
    fp8 = DeepseekV3Config.from_dict(DEEPSEEK_V3 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}})
    assert profile_for(fp8) is FP8_UE8M0 and fp8.quantization_config is not None
    with pytest.raises(ConfigError, match=r"dtype=torch.float32 was asked for"):
        profile_for(fp8, torch.float32)


YARN = DEEPSEEK_V3["rope_scaling"]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "deepseek_v2"}, r"model_type: is 'deepseek_v2'; this package implements deepseek_v3, kimi_k2"),
    ({"model_type": "deepseek_v32"}, r"model_type: is 'deepseek_v32'"),
    ({"hidden_size": 0}, r"hidden_size: .*greater than 0"),
    ({"vocab_size": "many"}, r"vocab_size: "),
    ({"num_hidden_layers": -1}, r"num_hidden_layers: "),
    ({"num_nextn_predict_layers": -1}, r"num_nextn_predict_layers: .*greater than or equal to 0"),
    ({"n_shared_experts": 0}, r"n_shared_experts: "),
    ({"moe_layer_freq": 2}, r"moe_layer_freq: .*should be 1"),
    ({"scoring_func": "softmax"}, r"scoring_func: .*'sigmoid'"),
    ({"topk_method": "greedy"}, r"topk_method: .*'noaux_tc'"),
    ({"hidden_act": "gelu"}, r"hidden_act: .*'silu'"),
    ({"attention_bias": True}, r"attention_bias: "),
    ({"tie_word_embeddings": True}, r"tie_word_embeddings: "),
    ({"q_lora_rank": 0}, r"q_lora_rank: "),
    ({"qk_rope_head_dim": 63}, r"qk_rope_head_dim: .*multiple of 2"),
    ({"rms_norm_eps": 0}, r"rms_norm_eps: "),
    ({"rope_theta": -1}, r"rope_theta: "),
    ({"rope_theta": 10**400}, r"rope_theta: "),
    ({"rope_theta": 1e300}, r"rope_theta: is 1e\+300, which in fp32 is inf"),
    ({"rms_norm_eps": 1e-50}, r"rms_norm_eps: is 1e-50, which in fp32 is 0"),
    ({"routed_scaling_factor": 0.0}, r"routed_scaling_factor: .*greater than 0"),
    ({"routed_scaling_factor": -2.5}, r"routed_scaling_factor: .*greater than 0"),
    ({"routed_scaling_factor": 3.41e38}, r"routed_scaling_factor: is 3.41e\+38, which in fp32 is inf"),
    ({"max_position_embeddings": 2**24 + 1}, r"max_position_embeddings: .*less than or equal to 16777216"),
    ({"torch_dtype": "float16"}, r"torch_dtype: .*'bfloat16' or 'float32'"),
    ({"dtype": "float16", "torch_dtype": None}, r"torch_dtype: "),
    ({"rope_scaling": {"type": "linear", "factor": 2}}, r"rope_scaling type is 'linear'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, r"rope_parameters type is 'longrope'"),
    ({"rope_scaling": "yarn"}, r"rope_scaling: "),
    ({"rope_scaling": YARN | {"factor": 0.5}}, r"rope_scaling\.factor: "),
    ({"rope_scaling": YARN | {"original_max_position_embeddings": None}}, r"rope_scaling\.original_max_pos"),
    ({"rope_scaling": YARN | {"beta_fast": 1e308}}, r"rope_scaling\.beta_fast: is 1e\+308, which in fp32 is inf"),
    ({"rope_scaling": YARN | {"beta_slow": 1e-320}}, r"rope_scaling\.beta_slow: is .*, which in fp32 is 0"),
    (
        {"rope_scaling": YARN | {"mscale": -1.0, "mscale_all_dim": -1.0}},
        r"rope_scaling\.mscale: .*greater than or equal",
    ),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 10**400}},
        r"rope_scaling\.original_max_position_embeddings: ",
    ),
    ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}}, r"rope_scaling: beta_fast=1, beta_slow=32 and"),
    (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 1}},
        r"rope_scaling: .*original_max_position_embeddings=1 make YaRN blend from frequency 0 to -",
    ),
    ({"rope_theta": 1.0}, r"rope_theta=1.0 is too small for YaRN"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, r"rope_scaling\.original_max_position_embeddings: .*required"),
    ({"n_group": 7}, r"n_routed_experts=256 is not a multiple of n_group=7"),
    ({"n_group": 256}, r"n_group=256 leaves fewer than two experts a group"),
    ({"topk_group": 9}, r"topk_group=9 exceeds n_group=8"),
    ({"num_experts_per_tok": 129}, r"num_experts_per_tok=129 exceeds the 128 experts of topk_group=4 groups"),
    ({"first_k_dense_replace": 62}, r"first_k_dense_replace=62 exceeds num_hidden_layers=61"),
    ({"quantization_config": FP8 | {"quant_method": "awq"}}, r"quantization_config\.quant_method: .*'fp8'"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, r"quantization_config\.fmt: "),
    ({"quantization_config": FP8 | {"activation_scheme": "static"}}, r"quantization_config\.activation_scheme: "),
    ({"quantization_config": FP8 | {"weight_block_size": [1, 128]}}, r"quantization_config\.weight_block_size\.0: "),
    ({"quantization_config": FP8 | {"scale_fmt": "e8m0"}}, r"quantization_config\.scale_fmt: "),
    ({"torch_dtype": "float32"}, r"an fp8 model computes in bfloat16, torch_dtype=float32"),
    ({"hidden_size": 7200}, r"hidden_size=7200 is not a multiple of 128"),
    ({"intermediate_size": 100}, r"(?<!_)intermediate_size=100 is not"),
    ({"moe_intermediate_size": 1400}, r"moe_intermediate_size=1400 is not"),
    ({"num_attention_heads": 1, "v_head_dim": 100}, r"num_attention_heads \* v_head_dim=100 is not"),
    ({"kv_lora_rank": 500}, r"kv_lora_rank=500 is not"),
    ({"q_lora_rank": 1500}, r"q_lora_rank=1500 is not"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change)[:60] for change, _ in REFUSED])
def test_a_refusal_names_the_field(change: dict[str, Any], message: str) -> None:
    DeepseekV3Config.from_dict(DEEPSEEK_V3)
    with pytest.raises(ConfigError, match=rf"^here: (config: )?({message})") as error:
        DeepseekV3Config.from_dict(DEEPSEEK_V3 | change, where="here")
    assert "\n" not in str(error.value)


REQUIRED = [name for name, field in DeepseekV3Config.model_fields.items() if field.is_required()]


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    config = {name: value for name, value in DEEPSEEK_V3.items() if name != field}
    with pytest.raises(ConfigError, match=f"{field}: Field required"):
        DeepseekV3Config.from_dict(config)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        DeepseekV3Config.from_dict(DEEPSEEK_V3 | {"hidden_act": "gelu", "kv_lora_rank": 0})
    assert "hidden_act: " in str(error.value) and "kv_lora_rank: " in str(error.value)


DEFAULTS = ("n_group", "topk_group", "routed_scaling_factor", "q_lora_rank")


@pytest.mark.parametrize("field", DEFAULTS)
def test_a_field_left_out_means_what_transformers_makes_of_it(field: str) -> None:
    """`configuration_deepseek.py` and transformers agree on these defaults; to require the field would do as well."""
    config = {name: value for name, value in MOONLIGHT.items() if name != field} | {"num_hidden_layers": 2}
    theirs = getattr(TransformersConfig(**deepcopy(config)), field)
    try:
        ours = getattr(DeepseekV3Config.from_dict(config), field)
    except ConfigError as error:
        assert field in str(error)
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rope_interleave": False}, "rope_interleave"),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, "attention_factor"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate"),
    ],
)
def test_a_known_field_that_changes_the_numbers_is_not_ignored(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        DeepseekV3Config.from_dict(DEEPSEEK_V3 | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ('{"vocab_size": 1' + "0" * 5000 + "}", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        (b"\xff", "cannot be read"),
    ],
)
def test_an_unreadable_file_is_named(text: str | bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    for path in (tmp_path, file):
        with pytest.raises(ConfigError, match=message) as error:
            DeepseekV3Config.from_pretrained(path)
        assert str(error.value).startswith(str(file))


# One reading: what two readers of config.json would read differently


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
AMBIGUOUS: list[tuple[dict[str, Any], str]] = [
    ({"rope_parameters": PLAIN}, r"rope_scaling \{.*\} and rope_parameters none disagree"),
    ({"rope_parameters": YARN | {"factor": 8}}, r"rope_scaling .*'factor': 40.* and rope_parameters .*'factor': 8"),
    (
        {"rope_parameters": YARN | {"rope_theta": 5e4}},
        r"rope_theta 10000 and rope_parameters.rope_theta 50000.0 disagree",
    ),
    ({"rope_scaling": YARN | {"rope_theta": 5e4}}, r"rope_theta 10000 and rope_scaling.rope_theta 50000.0 disagree"),
    ({"rotary_emb_base": 5e4}, r"rotary_emb_base: 50000.0 contradicts rope_theta 10000"),
    ({"rope_scaling": YARN | {"rope_type": "default"}}, r"rope_scaling.rope_type default and rope_scaling.type yarn"),
    ({"rope_scaling": {**YARN, "type": None}}, r"rope_scaling gives beta_fast, .*, but its type is 'default'"),
    ({"rope_scaling": YARN | {"mrope_section": [8, 8]}}, r"rope_scaling.mrope_section: "),
    ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, r"rope_scaling.partial_rotary_factor: is 0.5"),
    (
        {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0}},
        r"rope_scaling: mscale 0.707 with mscale_all_dim 0 is read in two",
    ),
    (
        {"original_max_position_embeddings": 8192},
        r"original_max_position_embeddings 8192 and rope_scaling.*4096 disagree",
    ),
    ({"dtype": "float32"}, r"torch_dtype bfloat16 and dtype float32 disagree"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, r"compression_config: .* is not implemented"),
    ({"num_key_value_heads": 8}, r"num_key_value_heads: 8 contradicts num_attention_heads 128"),
    ({"num_local_experts": 64}, r"num_local_experts: 64 contradicts n_routed_experts 256"),
    ({"num_mtp_layers": 2}, r"num_mtp_layers: 2 contradicts num_nextn_predict_layers 1"),
    ({"qk_head_dim": 128}, r"qk_head_dim: 128 contradicts qk_head_dim 192"),
    ({"head_dim": 256}, r"head_dim: 256 contradicts qk_rope_head_dim 64 or qk_head_dim 192 or v_head_dim 128"),
    ({"attention_dropout": 0.1}, r"attention_dropout: 0.1 is not implemented; only 0 is"),
    ({"sliding_window": 4096}, r"sliding_window: 4096 is not implemented"),
    ({"mlp_bias": True}, r"mlp_bias: true is not implemented; only false is"),
    ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: 0.5 is not implemented; only 1 is"),
    ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping: 30.0 is not implemented"),
    ({"index_topk": 2048}, r"index_topk: 2048 is not implemented"),
    ({"text_config": {"hidden_size": 1}}, r"text_config: .* is not implemented"),
    ({"use_mla": False}, r"use_mla: false is not implemented"),
    ({"ep_size": 8}, r"ep_size: 8 is not implemented"),
    ({"hidden_size": "7168"}, r"hidden_size: "),
    ({"norm_topk_prob": 1}, r"norm_topk_prob: "),
    ({"tie_word_embeddings": 0}, r"tie_word_embeddings: is 0; expected bool"),
    ({"attention_bias": 0}, r"attention_bias: is 0; expected bool"),
    ({"rope_interleave": 1}, r"rope_interleave: is 1; expected bool"),
    ({"moe_layer_freq": True}, r"moe_layer_freq: is True; expected int"),
    ({"moe_layer_freq": 1.0}, r"moe_layer_freq: is 1.0; expected int"),
    ({"rope_parameters": []}, r"rope_parameters: expected an object or null, found \[\]"),
    ({"rope_scaling": False}, r"rope_scaling: expected an object or null, found False"),
    ({"rope_scaling": YARN | {"truncate": 1}}, r"rope_scaling.truncate: is 1; expected bool"),
    ({"ep_size": True}, r"ep_size: true is not implemented; only 1 is"),
    ({"mlp_bias": 0}, r"mlp_bias: 0 is not implemented; only false is"),
    ({"quantization_config": FP8 | {"weight_block_size": [128.0, 128]}}, r"quantization_config.weight_block_size.0: "),
    ({"routed_scaling_factor": math.nan}, r"routed_scaling_factor: "),
    ({"quantization_config": FP8 | {"kv_cache_scheme": {"type": "float"}}}, r"quantization_config.kv_cache_scheme: "),
    ({"quantization_config": FP8 | {"dequantize": True}}, r"quantization_config.dequantize: "),
    ({"quantization_config": FP8 | {"exclude": ["lm_head"]}}, r"quantization_config.exclude: "),
]


@pytest.mark.parametrize(("change", "message"), AMBIGUOUS, ids=[str(change)[:60] for change, _ in AMBIGUOUS])
def test_what_readers_would_read_differently_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^here: (config: )?({message})") as error:
        DeepseekV3Config.from_dict(DEEPSEEK_V3 | change, where="here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "same",
    [
        {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 10000.0}},
        {"rope_parameters": None, "dtype": "bfloat16"},
        {"rope_scaling": YARN | {"rope_theta": 1e4}, "rope_parameters": {}},
        {"head_dim": 64, "qk_head_dim": 192, "num_local_experts": 256, "num_key_value_heads": None},
        {"sliding_window": None, "attention_dropout": 0, "partial_rotary_factor": 1.0, "use_sliding_window": False},
        {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "a_label_of_ours": 7},
    ],
    ids=str,
)
def test_what_says_the_same_twice_is_accepted(same: dict[str, Any]) -> None:
    assert DeepseekV3Config.from_dict(DEEPSEEK_V3 | same) == DeepseekV3Config.from_dict(DEEPSEEK_V3)


@pytest.mark.parametrize("beta_fast", [1, 8, 32])
@pytest.mark.parametrize("beta_slow", [1, 8, 32])
@pytest.mark.parametrize("original", [2, 64, 4096, 10**9])
def test_yarn_s_frequencies_are_transformers_or_refused(beta_fast: int, beta_slow: int, original: int) -> None:
    yarn = YARN | {"beta_fast": beta_fast, "beta_slow": beta_slow, "original_max_position_embeddings": original}
    config = DEEPSEEK_V3 | {"rope_scaling": yarn}
    theirs, _ = ROPE_INIT_FUNCTIONS["yarn"](TransformersConfig(**deepcopy(config)), "cpu")
    try:
        ours = rope_inv_freq(DeepseekV3Config.from_dict(config))
    except ConfigError:
        assert beta_fast < beta_slow or original != 4096
    else:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


SPELLED = ("rope_theta", "rope_scaling", "rope_parameters", "torch_dtype", "dtype")
VALUES: dict[str, list[Any]] = {
    "rope_theta": [None, 10000, 5e4],
    "rope_scaling": [None, {}, YARN, YARN | {"rope_theta": 5e4}, {"type": "default"}],
    "rope_parameters": [None, YARN | {"rope_theta": 5e4}, PLAIN, YARN | {"rope_type": "yarn"}],
    "torch_dtype": [None, "bfloat16"],
    "dtype": [None, "float32", "bfloat16"],
}


def test_whatever_is_accepted_is_what_transformers_reads(tmp_path: Path) -> None:
    """Over all combinations of spellings; the servers' own configuration is transformers'."""
    accepted = 0
    for values in itertools.product(*VALUES.values()):
        spelled = {name: value for name, value in zip(VALUES, values, strict=True) if value is not None}
        plain = {k: v for k, v in DEEPSEEK_V3.items() if k not in (*SPELLED, "quantization_config")}
        (tmp_path / "config.json").write_text(json.dumps(plain | spelled))
        try:
            ours = DeepseekV3Config.from_pretrained(tmp_path)
        except ConfigError:
            continue
        accepted += 1
        theirs = AutoConfig.from_pretrained(tmp_path)
        rope = theirs.rope_parameters
        assert ours.rope_theta == rope["rope_theta"], spelled
        assert (ours.rope_scaling is not None) == (rope["rope_type"] == "yarn"), spelled
        assert ours.rope_scaling is None or ours.rope_scaling.factor == rope["factor"], spelled
        assert theirs.dtype is None or ours.torch_dtype == str(theirs.dtype).removeprefix("torch."), spelled
    print(f"{accepted} combinations accepted")
    assert accepted > 40


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """Engines choose the model's class by it, so that ours would not be served."""
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | {"architectures": ["DeepseekV2ForCausalLM"]}))
    with pytest.raises(ConfigError, match=r"architectures: \['DeepseekV2ForCausalLM'\] is another model"):
        DeepseekV3Config.from_pretrained(tmp_path)


# Overrides


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


NEW_YARN = YARN | {"factor": 8}
HONOURED: list[dict[str, Any]] = [
    {"rope_theta": 5e4},
    {"rope_scaling": NEW_YARN, "rope_theta": 5e4},
    {"rope_parameters": {**NEW_YARN, "rope_theta": 5e4}},
    {"rope_scaling": {"type": "default", "rope_theta": 5e4}},
    {"rope_scaling": None, "rope_theta": 10000},
    {"rms_norm_eps": 1e-5, "routed_scaling_factor": 1.0, "norm_topk_prob": False},
    {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "max_position_embeddings": 8192},
    {"dtype": "bfloat16"},
    {"torch_dtype": "bfloat16", "num_hidden_layers": 61, "bos_token_id": 5},
]


@pytest.mark.parametrize("overrides", HONOURED, ids=str)
@pytest.mark.parametrize("file", [DEEPSEEK_V3, transformers_5(DEEPSEEK_V3)], ids=["transformers 4", "transformers 5"])
def test_an_override_is_as_if_it_stood_in_the_file(
    overrides: dict[str, Any], file: dict[str, Any], tmp_path: Path
) -> None:
    expected = {k: v for k, v in DEEPSEEK_V3.items() if not (k == "rope_scaling" and "rope_parameters" in overrides)}
    inner = next((overrides[n] for n in ("rope_scaling", "rope_parameters") if overrides.get(n)), {})
    expected |= overrides | ({"rope_theta": inner["rope_theta"]} if "rope_theta" in inner else {})
    found = DeepseekV3Config.from_pretrained(written(tmp_path, file), overrides)
    assert found == DeepseekV3Config.from_dict(expected)
    if not {"dtype", "torch_dtype"} & overrides.keys():
        assert found != DeepseekV3Config.from_pretrained(tmp_path), "it changed nothing"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 1024}, "override of hidden_size does not change the tensors"),
        ({"num_hidden_layers": 4}, "override of num_hidden_layers does not"),
        ({"quantization_config": None}, "override of quantization_config does not"),
        ({"num_nextn_predict_layers": 0}, "override of num_nextn_predict_layers does not"),
        ({"rope_tehta": 5e4}, "override of rope_tehta, which is no field of this model"),
        ({"rope_parameters": {"rope_theta": 5e4}}, "override of rope_parameters without rope_type"),
        ({"rope_scaling": {"factor": 8.0}}, "override of rope_scaling without rope_type"),
        ({"sliding_window": 4096}, "sliding_window: 4096 is not implemented"),
        ({"architectures": ["DeepseekV2ForCausalLM"]}, "architectures"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling type is 'linear'"),
        ({"rope_theta": 5e4, "rope_scaling": YARN | {"rope_theta": 1e4}}, "disagree"),
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, "disagree"),
    ],
    ids=str,
)
def test_an_override_that_is_not_honoured_is_refused(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        DeepseekV3Config.from_pretrained(written(tmp_path, DEEPSEEK_V3), overrides)


def test_an_override_must_not_lose_rope_theta(tmp_path: Path) -> None:
    """transformers would take its default in place of the one that goes with the replaced object."""
    folder = written(tmp_path, transformers_5(KIMI_K2))
    with pytest.raises(ConfigError, match="override of rope_scaling must hold rope_theta"):
        DeepseekV3Config.from_pretrained(folder, {"rope_scaling": NEW_YARN})
    with pytest.raises(ConfigError, match="override of rope_scaling must hold rope_theta"):
        DeepseekV3Config.from_pretrained(folder, {"rope_scaling": None})
    kept = DeepseekV3Config.from_pretrained(folder, {"rope_scaling": NEW_YARN, "rope_theta": 5e4})
    assert kept.rope_theta == 5e4 and kept.rope_scaling is not None and kept.rope_scaling.factor == 8


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '{"b": {"rope_theta": 1, "rope_theta": 2}}'])
def test_a_key_that_stands_twice_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json: (a|rope_theta) stands twice"):
        DeepseekV3Config.from_pretrained(tmp_path)
