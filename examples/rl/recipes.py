"""What DeepSeek's papers trained with, as defaults for the commands of this folder (`--recipe`).

The numbers are for 671 G parameters and long answers: a toy takes its own learning rate and fewer prompts beside them.

* DeepSeek-V3's report (arXiv:2412.19437): SFT, section 5.1; rewards by rules and by a model, 5.2.1; GRPO, 5.2.2.
* DeepSeek-R1 (arXiv:2501.12948v2), training details: R1-Zero; cold start; the first and the second stage of
  reinforcement learning.
"""

from __future__ import annotations

from typing import Any

_R1: dict[str, Any] = {
    "lr": 3e-6,
    "lr_warmup_steps": 0,
    "kl_coefficient": 0.001,
    "temperature": [1.0],
    "samples": 16,
    # 8,192 answers are sampled at a time and learned from in 16 batches of 512, each once.
    "prompts": 512,
    "mini_batches": 16,
    "inner_updates": 1,
    "reference_interval": 400,  # optimizer steps
}
GRPO: dict[str, dict[str, Any]] = {
    "r1-zero": _R1,
    "r1-first": _R1 | {"clip_ratio": 10.0},
    "r1-second": _R1 | {"clip_ratio": 10.0, "temperature": [0.7], "reward": ["rule", "model"]},
}
"""Of grpo.py. R1-Zero begins from the base model: `--sft-steps 0`."""

SFT: dict[str, dict[str, Any]] = {
    "v3": {"epochs": 2, "lr": 5e-6, "min_lr": 1e-6},
    "r1": {"epochs": 2, "lr": 5e-5, "min_lr": 5e-6, "batch_size": 128},
}
"""Of sft.py: a cosine from `lr` to `min_lr`."""
