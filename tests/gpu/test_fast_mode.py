"""What a model answers when other people's kernels serve it in fast mode: other logits where one rounds otherwise, the
same ones where a kernel keeps the contract.

The tiny model with V3's heads and latent, each provider's kernels before all others, beside this package's own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hopper_card import needs_hopper
from tiny_model import PROFILES, build, logits

V3_SIZES: dict[str, Any] = {"num_attention_heads": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
_FP8 = "fp8 ue8m0", "fp8 float32"
EXACT = {"deep-gemm": tuple(PROFILES), "cublas": _FP8, "transformer-engine": _FP8}
"""By provider the profiles whose logits it leaves as they are."""
LARGEST = 0.25
"""How far a logit may move, of the largest: other roundings do not make another model."""


@cache
def own(name: str) -> torch.Tensor:
    return logits(name, "cuda", overrides=V3_SIZES)


@needs_hopper
@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("provider", ["deep-gemm", "cublas", "transformer-engine", "flash-mla"])
def test_a_providers_logits_are_near_and_equal_where_it_keeps_the_contract(provider: str, name: str) -> None:
    profile, quantization = PROFILES[name]
    model, _ = build(profile, quantization | V3_SIZES, "cuda", provider)
    served = [choice.op for choice in model.ops.provenance if choice.provider == provider]
    if not served:
        pytest.skip(f"{provider} serves nothing of a model in {name} here")
    answer = logits(name, "cuda", overrides=V3_SIZES, first=provider)
    differ = float((answer != own(name)).double().mean())
    by = float((answer - own(name)).abs().max() / own(name).abs().max())
    likeliest = float((answer.argmax(-1) == own(name).argmax(-1)).double().mean())
    print(
        f"{', '.join(served)}: {differ:.1%} of {answer.numel()} logits differ, by {by:.1e} of the largest at the most;"
    )
    print(f"{likeliest:.1%} of the likeliest tokens are the same")
    assert answer.isfinite().all() and by < LARGEST
    # Where it rounds otherwise, that must be seen: else strict mode would refuse it for nothing.
    assert (differ == 0) == (name in EXACT.get(provider, ()))
