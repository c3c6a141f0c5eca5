"""The model's configuration, read from a Hugging Face `config.json`.

Field names are those of `configuration_deepseek.py`. The same architecture is published under several
`model_type`s (DeepSeek-V3/V3.1/R1, Moonlight, Kimi-K2); what they share is implemented, what they do not
(sparse attention, softmax scoring, other quantisers) is refused here, by field, before any weight is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dsv3_plugin.errors import ConfigError

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
FP8_BLOCK = 128


class YarnScaling(BaseModel):
    """YaRN context extension (arXiv 2309.00071, with DeepSeek's two mscale factors)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = Field(default=32, gt=0)
    beta_slow: float = Field(default=1, gt=0)
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: None = None
    """A factor that overrides the two mscales is not implemented."""
    truncate: Literal[True] = True


class Fp8Quantization(BaseModel):
    """Block-scaled FP8 as DeepSeek-V3 ships it: e4m3, weights 128x128, activations 1x128 at run time."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: tuple[Literal[128], Literal[128]] = (128, 128)
    scale_fmt: Literal["ue8m0"] | None = None
    """`ue8m0`: scales are powers of two. Absent: scales are arbitrary fp32 numbers."""


class DeepseekV3Config(BaseModel):
    """A validated DeepSeek-V3 configuration.

    Fields whose absence means something else to other readers of the file are required; released files have them.

    Raises `ConfigError` from the constructors `from_pretrained` and `from_dict`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model_type: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=1)
    num_attention_heads: int = Field(gt=0)
    n_shared_experts: int = Field(ge=1)
    n_routed_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    n_group: int = Field(gt=0)
    topk_group: int = Field(gt=0)
    routed_scaling_factor: float
    norm_topk_prob: bool
    first_k_dense_replace: int = Field(ge=0)
    moe_layer_freq: Literal[1] = 1
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    kv_lora_rank: int = Field(gt=0)
    q_lora_rank: int | None = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0, multiple_of=2)
    v_head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rope_interleave: Literal[True] = True
    rope_scaling: YarnScaling | None = None
    torch_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization_config: Fp8Quantization | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head before absorption."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached token: the compressed key/value and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared expert, which is one MLP of `n_shared_experts` widths."""
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def mtp_layer_idx(self) -> int:
        """Index of the MTP layer among `model.layers.*`; it follows the last decoder layer."""
        return self.num_hidden_layers

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` has experts; the MTP layer always has."""
        return layer_idx >= self.first_k_dense_replace

    @field_validator("model_type")
    @classmethod
    def _known_model_type(cls, value: str) -> str:
        if value not in MODEL_TYPES:
            raise ValueError(f"is {value!r}; this package implements {', '.join(MODEL_TYPES)}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _normalise_spellings(cls, data: Any) -> Any:
        """Accept the spellings of transformers 4 (`rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`)."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        if data.get("torch_dtype") is None and data.get("dtype") is not None:
            data["torch_dtype"] = data["dtype"]
        if data.get("torch_dtype") is None:
            data.pop("torch_dtype", None)
        elif not isinstance(data["torch_dtype"], str):
            data["torch_dtype"] = str(data["torch_dtype"])
        if isinstance(data.get("torch_dtype"), str):
            data["torch_dtype"] = data["torch_dtype"].removeprefix("torch.")
        rope = data.get("rope_parameters") or data.get("rope_scaling")
        if isinstance(rope, dict):
            if rope.get("rope_theta") is not None:
                data["rope_theta"] = rope["rope_theta"]
            kind = rope.get("rope_type") or rope.get("type") or "default"
            if kind not in ("default", "yarn"):
                raise ValueError(f"rope_scaling type is {kind!r}; only 'yarn' or none is implemented")
            data["rope_scaling"] = rope if kind == "yarn" else None
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(message)

        require(
            self.n_routed_experts % self.n_group == 0,
            f"n_routed_experts={self.n_routed_experts} is not a multiple of n_group={self.n_group}",
        )
        experts_per_group = self.n_routed_experts // self.n_group
        require(
            self.n_group == 1 or experts_per_group >= 2,
            f"n_group={self.n_group} leaves fewer than two experts a group, and groups are scored by their two best",
        )
        require(self.topk_group <= self.n_group, f"topk_group={self.topk_group} exceeds n_group={self.n_group}")
        require(
            self.num_experts_per_tok <= self.topk_group * experts_per_group,
            f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {self.topk_group * experts_per_group} experts"
            f" of topk_group={self.topk_group} groups",
        )
        require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace={self.first_k_dense_replace} exceeds num_hidden_layers={self.num_hidden_layers}",
        )
        if self.quantization_config is not None:
            require(
                self.torch_dtype == "bfloat16", f"an fp8 model computes in bfloat16, torch_dtype={self.torch_dtype}"
            )
            inputs = {
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "moe_intermediate_size": self.moe_intermediate_size,
                "num_attention_heads * v_head_dim": self.num_attention_heads * self.v_head_dim,
                "kv_lora_rank": self.kv_lora_rank,
                "q_lora_rank": self.q_lora_rank or FP8_BLOCK,
            }
            for name, size in inputs.items():
                require(size % FP8_BLOCK == 0, f"{name}={size} is not a multiple of {FP8_BLOCK}, as fp8 blocks need")
        return self

    @classmethod
    def from_dict(cls, data: dict[str, Any], *, where: str = "config") -> DeepseekV3Config:
        """Validate a parsed `config.json`. `where` names its origin in errors."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()
            )
            raise ConfigError(f"{where}: {problems}") from None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> DeepseekV3Config:
        """Read `config.json` from a checkpoint folder, or from the JSON file itself."""
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        return cls.from_dict(read_json_object(file), where=str(file))


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from `file`. Raises `ConfigError` that names the file."""
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(data).__name__}")
    return data
