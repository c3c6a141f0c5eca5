"""What a model answers when other people's kernels serve it: logits of the tiny model, with V3's heads and latent, in
fast mode with each provider's kernels before all others, beside those of this package's own.

    python tests/gpu/fast_mode.py cublas flash-mla ...     # on a Hopper card
"""

from __future__ import annotations

import sys
from typing import Any

from tiny_model import PROFILES, build, logits

V3_SIZES: dict[str, Any] = {"num_attention_heads": 64, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


def main(providers: list[str]) -> None:
    for name, (profile, quantization) in PROFILES.items():
        own = logits(name, "cuda", overrides=V3_SIZES)
        for first in providers:
            model, _ = build(profile, quantization | V3_SIZES, "cuda", first)
            served = [choice.op for choice in model.ops.provenance if choice.provider == first]
            if not served:
                print(f"{name:12} {first:20} serves nothing here", flush=True)
                continue
            answer = logits(name, "cuda", overrides=V3_SIZES, first=first)
            differ, by = (answer != own).double().mean(), (answer - own).abs().max() / own.abs().max()
            likeliest = (answer.argmax(-1) == own.argmax(-1)).double().mean()
            print(
                f"{name:12} {first:20} {', '.join(served)}: {differ:.1%} of {own.numel()} logits differ,"
                f" by {by:.1e} of the largest at the most; {likeliest:.1%} of the likeliest tokens are the same",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
