"""A whole tiny model in the Hopper arithmetic: prefill of two requests over shuffled pages, then three tokens more.

    python tests/support/tiny_model.py FILE     # on a Hopper card: record its logits

Weights are small integers times powers of two, so that every version of torch draws the same.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels import provider
from dsv3_plugin.layers.attend import Select, attend_to_pages, select_all
from dsv3_plugin.layers.model import DeepseekV3, weights_changed
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.ops.quantize import quantize_weight
from dsv3_plugin.profile import BF16, FP8_FLOAT32, FP8_UE8M0, Profile
from dsv3_plugin.registry import bind

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PROFILES: dict[str, tuple[Profile, dict[str, Any]]] = {
    "bf16": (BF16, {}),
    "fp8 ue8m0": (FP8_UE8M0, {"quantization_config": _FP8 | {"scale_fmt": "ue8m0"}}),
    "fp8 float32": (FP8_FLOAT32, {"quantization_config": _FP8}),
}
PROMPTS = (67, 5)
PAGE = 64
PAGES = 16


def numbers(generator: torch.Generator, shape: torch.Size, size: float) -> torch.Tensor:
    """Multiples of size / 64 below 2 * size, in fp32."""
    return torch.randint(-127, 128, shape, generator=generator).float() * (size / 64)


def build(
    profile: Profile, overrides: dict[str, Any], device: str, first: str | None = None
) -> tuple[DeepseekV3, DeepseekV3Config]:
    """The model with its weights on `device`; with the kernels of the provider `first` before others, in fast mode."""
    config = DeepseekV3Config.from_dict(CONFIG | overrides)
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    dims = {"kv_lora_rank": config.kv_lora_rank, "qk_rope_head_dim": config.qk_rope_head_dim}
    kernels = [replace(k, priority=100) if k.provider == first else k for k in provider.dsv3_kernels()]
    ops = bind(Setting(device, "sm90", profile, capability, dims), "fast" if first else "strict", kernels)
    generator = torch.Generator().manual_seed(7)
    model = DeepseekV3(ops, config)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith("_scale_inv"):
            continue
        if "norm" in name:
            parameter.data.copy_(1 + numbers(generator, parameter.shape, 0.125))
        elif parameter.dtype == torch.float8_e4m3fn:
            assert profile.scale_format is not None
            wide = numbers(generator, parameter.shape, 2.0**-4)
            parts = [quantize_weight(w, profile.scale_format) for w in wide.view(-1, *wide.shape[-2:])]
            parameter.data.copy_(torch.stack([values for values, _ in parts]).view(parameter.shape))
            scale = parameters[f"{name}_scale_inv"]
            scale.data.copy_(torch.stack([s for _, s in parts]).view(scale.shape))
        else:
            parameter.data.copy_(numbers(generator, parameter.shape, 1.0 if "embed" in name else 2.0**-4))
    model = model.to(device)
    weights_changed(model)
    return model, config


def logits(
    name: str, device: str, *, overrides: dict[str, Any] | None = None, first: str | None = None
) -> torch.Tensor:
    """fp32 [tokens, vocab_size] of all steps, one after the other, on the CPU."""
    profile, quantization = PROFILES[name]
    model, config = build(profile, quantization | (overrides or {}), device, first)
    generator = torch.Generator().manual_seed(8)
    pages = torch.randperm(PAGES, generator=generator).to(torch.int32)
    table = pages[: 4 * len(PROMPTS)].view(len(PROMPTS), -1).to(device)
    tokens = [torch.randint(0, config.vocab_size, (n + 3,), generator=generator) for n in PROMPTS]
    shape = PAGES, PAGE, config.cached_dim
    caches = [
        torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device) for _ in range(config.num_hidden_layers)
    ]

    def step(spans: list[tuple[int, int]]) -> torch.Tensor:
        ids = torch.cat([t[a:b] for t, (a, b) in zip(tokens, spans, strict=True)]).to(device)
        positions = torch.cat([torch.arange(a, b) for a, b in spans]).to(device)
        counts = torch.tensor([b - a for a, b in spans])
        requests = torch.arange(len(spans)).repeat_interleave(counts).to(device)
        slots = table[requests, positions // PAGE].long() * PAGE + positions % PAGE
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).to(torch.int32).to(device)
        lengths = torch.tensor([b for _, b in spans], dtype=torch.int32, device=device)

        batch = PagedBatch(table, lengths, starts, num_tokens=int(counts.sum()), num_blocks=PAGES, block_size=PAGE)

        def attend(layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all) -> torch.Tensor:
            caches[layer_idx].view(-1, config.cached_dim)[slots] = cached
            return attend_to_pages(model.ops, config, q, caches[layer_idx], batch, select)

        return model.lm_head(model(ids, positions, attend)).cpu()

    steps = [step([(0, n) for n in PROMPTS])] + [step([(n + i, n + i + 1) for n in PROMPTS]) for i in range(3)]
    # Few rows of the prompt are enough for a file: its last ones saw the others.
    return torch.cat([steps[0][::16], *steps[1:]])


def contracts() -> str:
    """The version of every contract that a logit comes from, as a recording names them."""
    return json.dumps({op.name: op.version for op in operations().values() if not (op.training or op.two_form)})


if __name__ == "__main__":
    card = {"card": torch.cuda.get_device_name(), "torch": str(torch.__version__), "contracts": contracts()}
    save_file({name: logits(name, "cuda") for name in PROFILES}, Path(sys.argv[1]), metadata=card)
