"""The model's configuration, read from a Hugging Face `config.json`.

Field names are those of `configuration_deepseek.py`. The same architecture is published under several
`model_type`s (DeepSeek-V3/V3.1/R1, Moonlight, Kimi-K2); what they share is implemented, what they do not
(sparse attention, softmax scoring, other quantizers) is refused here, by field, before any weight is read.

Engines, trainer and transformers read the same file, each in its own way. What two of them would read differently (two
spellings of a field that disagree, a key that stands twice, a field that only some of them heed) is refused, too.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from dsv3_plugin.errors import ConfigError

MODEL_TYPES = ("deepseek_v3", "kimi_k2")
ARCHITECTURE = "DeepseekV3ForCausalLM"
FP8_BLOCK = 128

_STRICT = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())
"""Nothing is converted: transformers refuses a size in quotes, remote code would compute with it."""

_ROPE_SPELLINGS = ("rope_scaling", "rope_parameters")
"""Of transformers 4 and 5."""

_FP32_MAX = 3.4e38
_LARGEST_POSITION = 1 << 24
"""Rotary angles are of positions in fp32, which holds every whole number up to here, and not the next one."""

_DTYPE_SPELLINGS = ("torch_dtype", "dtype")

_FIXED: Mapping[str, tuple[object, ...]] = {
    "attention_chunk_size": (),
    "attention_dropout": (0,),
    "attn_logit_softcapping": (0,),
    "compression_config": (),
    "ep_size": (1,),
    "final_logit_softcapping": (0,),
    "index_topk": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "logit_scale": (1,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "qkv_bias": (False,),
    "rotary_emb_fraction": (1,),
    "rotary_pct": (1,),
    "sliding_window": (),
    "text_config": (),
    "use_bidirectional_attention": (False,),
    "use_mla": (True,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
"""Fields that some reader heeds and no model here has, and the values beside null that ask for nothing."""

_SAME_AS: Mapping[str, tuple[str, ...]] = {
    "head_dim": ("qk_rope_head_dim", "qk_head_dim", "v_head_dim"),
    "num_experts": ("n_routed_experts",),
    "num_key_value_heads": ("num_attention_heads",),
    "num_local_experts": ("n_routed_experts",),
    "num_mtp_layers": ("num_nextn_predict_layers",),
    "qk_head_dim": ("qk_head_dim",),
    "rotary_emb_base": ("rope_theta",),
}
"""Fields that repeat others, in other readers' words."""

_OF_THE_TENSORS = frozenset(
    {
        "first_k_dense_replace",
        "hidden_size",
        "intermediate_size",
        "kv_lora_rank",
        "model_type",
        "moe_intermediate_size",
        "moe_layer_freq",
        "n_routed_experts",
        "n_shared_experts",
        "num_attention_heads",
        "num_hidden_layers",
        "num_nextn_predict_layers",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "quantization_config",
        "tie_word_embeddings",
        "v_head_dim",
        "vocab_size",
    }
)
"""Fields that say which tensors the files hold; no override changes them."""

_OF_ENGINES = frozenset(
    {
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "use_cache",
    }
)
"""Fields that an override may change for the engine; the model does not know them."""


def _of_type(kind: type) -> BeforeValidator:
    """To a `Literal` 0, False and 0.0 are one; to transformers they are not."""

    def check(value: object) -> object:
        if type(value) is not kind:
            raise ValueError(f"is {value!r}; expected {kind.__name__}")
        return value

    return BeforeValidator(check)


def _in_fp32(value: float) -> float:
    """A factor of the arithmetic, which computes in fp32."""
    stored = struct.unpack("f", struct.pack("f", value))[0] if abs(value) < _FP32_MAX else math.inf
    if not math.isfinite(stored) or (value != 0 and stored == 0):
        raise ValueError(f"is {value:g}, which in fp32 is {stored:g}")
    return value


_Real = Annotated[float, AfterValidator(_in_fp32)]
_False = Annotated[Literal[False], _of_type(bool)]
_True = Annotated[Literal[True], _of_type(bool)]
_One = Annotated[Literal[1], _of_type(int)]
_Block = Annotated[Literal[128], _of_type(int)]


class YarnScaling(BaseModel):
    """YaRN context extension (arXiv 2309.00071, with DeepSeek's two mscale factors)."""

    model_config = _STRICT | ConfigDict(extra="forbid")

    factor: _Real = Field(ge=1)
    original_max_position_embeddings: int = Field(gt=0, le=1 << 53)
    beta_fast: _Real = Field(default=32, gt=0)
    beta_slow: _Real = Field(default=1, gt=0)
    mscale: _Real = Field(default=1.0, ge=0)
    mscale_all_dim: _Real = Field(default=0.0, ge=0)
    attention_factor: None = None
    """A factor that overrides the two mscales is not implemented."""
    truncate: _True = True

    def correction_range(self, dim: int, base: float) -> tuple[int, int]:
        """The frequencies, by their places among `dim / 2`, between which YaRN blends: (low, high).

        Places below `low` keep their frequency and those above `high` are stretched by the whole factor, for a rotary
        part of `dim` elements and the `rope_theta` `base`.
        """

        def place(rotations: float) -> float:
            turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return dim * math.log(turns) / (2 * math.log(base))

        return max(math.floor(place(self.beta_fast)), 0), min(math.ceil(place(self.beta_slow)), dim - 1)


class Fp8Quantization(BaseModel):
    """Block-scaled FP8 as DeepSeek-V3 ships it: e4m3, weights 128x128, activations 1x128 at run time."""

    model_config = _STRICT | ConfigDict(extra="forbid")

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: tuple[_Block, _Block] = Field(default=(128, 128), strict=False)
    scale_fmt: Literal["ue8m0"] | None = None
    """`ue8m0`: scales are powers of two. Absent: scales are arbitrary fp32 numbers."""
    modules_to_not_convert: tuple[str, ...] | None = Field(default=None, strict=False)
    ignored_layers: tuple[str, ...] | None = Field(default=None, strict=False)
    """Modules left in bf16, in two readers' words. Which are quantized is fixed here (`checkpoint.names`); naming
    others is refused where the files are checked."""
    dequantize: _False = False
    kv_cache_scheme: None = None


class DeepseekV3Config(BaseModel):
    """A validated DeepSeek-V3 configuration.

    Fields whose absence means something else to other readers of the file are required; released files have them.

    Raises `ConfigError` from the constructors `from_pretrained` and `from_dict`.
    """

    model_config = _STRICT

    model_type: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_nextn_predict_layers: int = Field(default=0, ge=0)
    num_attention_heads: int = Field(gt=0)
    n_shared_experts: int = Field(ge=1)
    n_routed_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    n_group: int = Field(gt=0)
    topk_group: int = Field(gt=0)
    routed_scaling_factor: _Real = Field(gt=0)
    norm_topk_prob: bool
    first_k_dense_replace: int = Field(ge=0)
    moe_layer_freq: _One = 1
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    hidden_act: Literal["silu"] = "silu"
    attention_bias: _False = False
    tie_word_embeddings: _False = False
    kv_lora_rank: int = Field(gt=0)
    q_lora_rank: int | None = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0, multiple_of=2)
    v_head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0, le=_LARGEST_POSITION)
    rms_norm_eps: _Real = Field(gt=0)
    rope_theta: _Real = Field(gt=0)
    rope_interleave: _True = True
    rope_scaling: YarnScaling | None = None
    torch_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization_config: Fp8Quantization | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head before absorption."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """What attention reads of a cached token: the compressed key/value and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def cached_dim(self) -> int:
        """Width of a cached token in every layer, by which engines size their pages: `latent_dim`, and behind it what
        a relative's layers keep to select keys by.
        """
        return self.latent_dim

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared expert, which is one MLP of `n_shared_experts` widths."""
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def mtp_layer_idx(self) -> int:
        """Index of the MTP layer among `model.layers.*`; it follows the last decoder layer.

        Raises `ConfigError` where there are several: who asks for the index cannot do without the others.
        """
        self.require_one_mtp_layer()
        return self.num_hidden_layers

    def require_one_mtp_layer(self) -> None:
        """Raise `ConfigError` if the checkpoint has several MTP layers, which only the main model is indifferent to."""
        if self.num_nextn_predict_layers > 1:
            raise ConfigError(
                f"num_nextn_predict_layers is {self.num_nextn_predict_layers}: several MTP layers are not implemented;"
                " the main model is served, without drafts, and cannot be trained or converted"
            )

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
    def _one_spelling(cls, data: Any) -> Any:
        """Accept the spellings of transformers 4 (`rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`)."""
        return _with_rope(_with_dtype(data)) if isinstance(data, dict) else data

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
        if (yarn := self.rope_scaling) is not None:
            require(self.rope_theta > 1, f"rope_theta={self.rope_theta} is too small for YaRN")
            low, high = yarn.correction_range(self.qk_rope_head_dim, self.rope_theta)
            require(
                low <= high,
                f"rope_scaling: beta_fast={yarn.beta_fast:g}, beta_slow={yarn.beta_slow:g} and"
                f" original_max_position_embeddings={yarn.original_max_position_embeddings} make YaRN blend from"
                f" frequency {low} to {high}, backwards, which readers of this file compute in different ways",
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
            config = cls.model_validate(data)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg'].removeprefix('Value error, ')}"
                for item in error.errors()
            ]
            raise ConfigError(f"{where}: {'; '.join(problems)}") from None
        if problems := _read_differently(data, config):
            raise ConfigError(f"{where}: {'; '.join(problems)}")
        return config

    @classmethod
    def from_pretrained(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> DeepseekV3Config:
        """Read `config.json` from a checkpoint folder, or from the JSON file itself.

        Args:
            path: the folder or file.
            overrides: what a user gives an engine to replace fields of the file (`hf_overrides` of vLLM,
                `--json-model-override-args` of SGLang), in either spelling. A value replaces the whole field;
                `rope_theta` stays as it is where only the scaling is replaced.

        Raises `ConfigError` that names the field for an override of what the tensors are (a size, a number of layers,
        the quantization), or of no field of this model.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "config.json"
        data, where = read_json_object(file), str(file)
        if overrides:
            if problems := _refused_overrides(data, overrides):
                raise ConfigError(f"{file}: {'; '.join(problems)}")
            data, where = _overridden(data, overrides), f"{file} with {', '.join(sorted(overrides))} overridden"
        config = cls.from_dict(data, where=where)
        if data.get("architectures") not in (None, [ARCHITECTURE]):
            raise ConfigError(
                f"{where}: architectures: {data['architectures']} is another model; only {ARCHITECTURE} is implemented"
            )
        return config


def _with_dtype(data: dict[str, Any]) -> dict[str, Any]:
    """The configuration with one `torch_dtype`, as a string, or none. Raises `ValueError` where two disagree."""
    found = {name: data[name] for name in _DTYPE_SPELLINGS if data.get(name) is not None}
    data = {name: value for name, value in data.items() if name not in _DTYPE_SPELLINGS}
    words = {name: str(value).removeprefix("torch.") for name, value in found.items()}
    if len(set(words.values())) > 1:
        raise ValueError(_disagree(words))
    if words:
        data["torch_dtype"] = next(iter(words.values()))
    return data


def _with_rope(data: dict[str, Any]) -> dict[str, Any]:
    """The configuration with one `rope_theta` and one `rope_scaling`, None where the embedding is plain.

    Raises `ValueError` for another kind of scaling, and where two spellings, or two keys of one, disagree.
    """
    data = dict(data)
    thetas = {"rope_theta": data.get("rope_theta")}
    scalings: dict[str, dict[str, Any] | None] = {}
    for name in _ROPE_SPELLINGS:
        rope = data.pop(name, None)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{name}: expected an object or null, found {rope!r}")
        thetas[f"{name}.rope_theta"] = rope.get("rope_theta")
        scalings[name] = _scaling(name, rope, data)
    given = {name: theta for name, theta in thetas.items() if theta is not None}
    if any(theta != next(iter(given.values())) for theta in given.values()):
        raise ValueError(_disagree(given))
    if len(scalings) == 2 and _complete(scalings["rope_scaling"]) != _complete(scalings["rope_parameters"]):
        raise ValueError(_disagree({name: value or "none" for name, value in scalings.items()}))
    if len(scalings) == 2 and len(given) == 1 and "rope_theta" not in given:
        raise ValueError(f"{next(iter(given))} is not seen by a reader that takes the other spelling; keep one")
    if given:
        data["rope_theta"] = next(iter(given.values()))
    return data | {"rope_scaling": next(iter(scalings.values()), None)}


def _scaling(name: str, rope: dict[str, Any], data: dict[str, Any]) -> dict[str, Any] | None:
    """YaRN's parameters in one of the spellings, None for a plain embedding."""
    kinds = {f"{name}.{key}": rope[key] for key in ("rope_type", "type") if rope.get(key) is not None}
    if len(set(map(str, kinds.values()))) > 1:
        raise ValueError(_disagree(kinds))
    kind = next(iter(kinds.values()), "default")
    if kind not in ("default", "yarn"):
        raise ValueError(f"{name} type is {kind!r}; only 'yarn' or none is implemented")
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"{name}.partial_rotary_factor: is {rope['partial_rotary_factor']!r}; only 1 is implemented")
    others = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in others}
    if kind == "default":
        if asks := [key for key, value in scaling.items() if value is not None]:
            raise ValueError(
                f"{name} gives {', '.join(asks)}, but its type is {kind!r}: say type 'yarn', or remove them"
            )
        return None
    # transformers lets a field of this name beside the scaling win over the one in it.
    outside = data.get("original_max_position_embeddings")
    inside = scaling.get("original_max_position_embeddings")
    if outside is not None and inside is not None and outside != inside:
        key = "original_max_position_embeddings"
        raise ValueError(_disagree({key: outside, f"{name}.{key}": inside}))
    # transformers takes the two factors only together, DeepSeek's code, vLLM and SGLang each with a default.
    mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if (bool(mscale) != bool(mscale_all_dim) and mscale != 1) or mscale == 0:
        raise ValueError(
            f"{name}: mscale {mscale} with mscale_all_dim {mscale_all_dim} is read in two ways; give both, and not zero"
        )
    return scaling


def _complete(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """YaRN's parameters with the defaults of those that are left out, to compare two spellings."""
    if scaling is None:
        return None
    defaults = {name: field.default for name, field in YarnScaling.model_fields.items() if not field.is_required()}
    return defaults | scaling


def _disagree(values: Mapping[str, object]) -> str:
    said = " and ".join(f"{name} {value}" for name, value in values.items())
    return f"{said} disagree, and readers of this file differ in which they take; keep one"


def _read_differently(data: dict[str, Any], config: DeepseekV3Config) -> list[str]:
    """What a valid configuration says beside our fields that would make it another model to another reader."""
    problems = []
    for name, allowed in _FIXED.items():
        value = data.get(name)
        if value is not None and not any(_equal(value, right) for right in allowed):
            only = f"; only {' or '.join(map(json.dumps, allowed))} is" if allowed else ""
            problems.append(f"{name}: {json.dumps(value, default=str)[:60]} is not implemented{only}")
    for name, fields in _SAME_AS.items():
        values = {field: getattr(config, field) for field in fields}
        value = data.get(name)
        if value is not None and not any(_equal(value, right) for right in values.values()):
            said = " or ".join(f"{field} {right}" for field, right in values.items())
            problems.append(f"{name}: {value} contradicts {said}")
    return problems


def _equal(value: object, expected: object) -> bool:
    """Equal, and a truth value only where one is expected."""
    return value == expected and isinstance(value, bool) == isinstance(expected, bool)


def _refused_overrides(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Overrides that change what the tensors are, or that nothing here would heed."""
    problems = []
    known = {*DeepseekV3Config.model_fields, *_ROPE_SPELLINGS, *_DTYPE_SPELLINGS, *_FIXED, *_SAME_AS, *_OF_ENGINES}
    for name, value in overrides.items():
        if name in data and data[name] == value:
            continue
        if name in _OF_THE_TENSORS:
            problems.append(f"an override of {name} does not change the tensors in the files; it is refused")
        elif name not in known:
            problems.append(f"an override of {name}, which is no field of this model, is refused")
        elif name in _ROPE_SPELLINGS and isinstance(value, dict) and not {"rope_type", "type"} & value.keys():
            problems.append(f"an override of {name} without rope_type would make the embedding plain; say the type")
    theta_is_kept = "rope_theta" in overrides or data.get("rope_theta") is not None
    replaced = [name for name in _ROPE_SPELLINGS if name in overrides]
    if replaced and not theta_is_kept and not any((overrides[name] or {}).get("rope_theta") for name in replaced):
        problems.append(f"an override of {replaced[0]} must hold rope_theta, as what it replaces does")
    return problems


def _overridden(data: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The file's fields with some replaced; an override in one spelling replaces the file's in the other."""
    data = dict(data)
    for spellings in (_ROPE_SPELLINGS, _DTYPE_SPELLINGS):
        if any(name in overrides for name in spellings):
            for name in spellings:
                data.pop(name, None)
    thetas = [overrides, *(overrides[name] or {} for name in _ROPE_SPELLINGS if name in overrides)]
    if any(place.get("rope_theta") is not None for place in thetas):
        data.pop("rope_theta", None)
        for name in _ROPE_SPELLINGS:
            if data.get(name):
                data[name] = {key: value for key, value in data[name].items() if key != "rope_theta"}
    return data | dict(overrides)


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object from `file`. Raises `ConfigError` that names the file, also for a key that stands twice."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{file}: {twice} stands twice in one object; keep one")
        return dict(pairs)

    try:
        data = json.loads(file.read_text("utf-8"), object_pairs_hook=without_duplicates)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a bare ValueError
        raise ConfigError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(data).__name__}")
    return data
