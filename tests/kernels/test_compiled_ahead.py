"""No compile while serving: what is run before requests meets every kernel, in every form, that requests may need.

Nothing runs here. The kernels' hosts choose tiles and launch into a list; a model of V3's own sizes has no numbers.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: `make test` runs this in .envs/kernels")

from triton.runtime.jit import JITFunction  # noqa: E402

from dsv3_plugin.config import DeepseekV3Config  # noqa: E402
from dsv3_plugin.hooks import Setting  # noqa: E402
from dsv3_plugin.kernels import provider  # noqa: E402
from dsv3_plugin.kernels.cuda import compiler  # noqa: E402
from dsv3_plugin.layers import warm_up as module  # noqa: E402
from dsv3_plugin.layers.embedding import Head  # noqa: E402
from dsv3_plugin.layers.model import DeepseekV3Model  # noqa: E402
from dsv3_plugin.layers.mtp import DeepseekV3MTP  # noqa: E402
from dsv3_plugin.layers.warm_up import warm_up  # noqa: E402
from dsv3_plugin.layout import WHOLE  # noqa: E402
from dsv3_plugin.profile import BF16, FP8_FLOAT32, Profile  # noqa: E402
from dsv3_plugin.registry import Ops, bind  # noqa: E402

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MOST_TOKENS, MOST_LOGITS = 4096, 512


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What the launches so far need compiled: a kernel, the types of its arguments, what is known of their numbers,
    and its compile-time parameters.
    """
    forms: set[Any] = set()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bound = dict(zip(kernel.arg_names, args, strict=False)) | options
        constants = {p.name for p in kernel.params if p.is_constexpr}
        form = [
            (name, x if name in constants or name not in kernel.arg_names else kind(x)) for name, x in bound.items()
        ]
        forms.add((kernel.__name__, tuple(sorted(form))))

    def kind(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return str(x.dtype)
        if isinstance(x, int) and not isinstance(x, bool):
            return "one" if x == 1 else "sixteens" if x % 16 == 0 else "wide" if x >= 2**31 else "int"
        return type(x).__name__ if not hasattr(x, "block_shape") else (tuple(x.block_shape), str(x.base.dtype))

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(compiler, "launch", lambda program, name, how, arguments: forms.add((program, name)))
    monkeypatch.setattr(compiler, "tensor_map", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    return forms


def bound(profile: Profile) -> Ops:
    dims = {name: value for name, value in V3.items() if type(value) is int}
    kernels = [kernel for kernel in provider.dsv3_kernels() if kernel.provider in ("triton", "cuda")]
    return bind(Setting("cuda", "sm90", profile, (9, 0), dims), "fast", kernels)


@pytest.mark.parametrize(
    ("part", "profile", "quantization"),
    [("main", BF16, {}), ("main", FP8_FLOAT32, FP8), ("mtp", FP8_FLOAT32, FP8)],
    ids=["main bf16", "main fp8", "mtp fp8"],
)
def test_requests_meet_nothing_new(
    compiled: set[Any], part: str, profile: Profile, quantization: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops, config = bound(profile), DeepseekV3Config.from_dict(V3 | quantization)
    with torch.device("meta"):
        model = DeepseekV3Model(ops, config) if part == "main" else DeepseekV3MTP(ops, config)
        head = Head(ops, config.vocab_size, config.hidden_size)
    met = of_counts(compiled, module.token_counts(MOST_TOKENS), monkeypatch, model, head)
    assert len(met) > 20
    requests = [*range(1, 700), *range(700, MOST_TOKENS, 37)]
    assert not of_counts(compiled, requests, monkeypatch, model, head) - met
    # Twin: powers of two alone would leave some for requests.
    powers = [2**n for n in range(13)]
    assert of_counts(compiled, powers, monkeypatch, model, head) < met


def of_counts(compiled: set[Any], counts: list[int], monkeypatch: pytest.MonkeyPatch, *model: Any) -> set[Any]:
    compiled.clear()
    monkeypatch.setattr(module, "token_counts", lambda most: counts)
    warm_up(*model, WHOLE, block_size=64, most_tokens=MOST_TOKENS, most_logits=MOST_LOGITS)
    return set(compiled)
