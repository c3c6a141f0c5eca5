"""The traps: mistakes that public implementations of DeepSeek-V3 made or make, and the cases on which each shows.

A trap is in the list because somebody fell into it in public. Its twin in `tests/conformance/test_traps.py` is a
reference that falls into it, and must be caught by the cases named here. A report shows those of the cases that it ran.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.traps import is_planted
from dsv3_plugin.config import read_json_object

Feature = Literal["fp8", "mtp", "traps", "yarn"]
FEATURES: dict[Feature, str] = {
    "fp8": "fp8",
    "mtp": "an MTP layer",
    "traps": "the preset traps",
    "yarn": "YaRN",
}
"""What not every checkpoint has, in words."""


def features_of(reader: CheckpointReader) -> frozenset[Feature]:
    """Those that a checkpoint has."""
    config = reader.config
    found: dict[Feature, bool] = {
        "fp8": config.quantization_config is not None,
        "mtp": config.num_nextn_predict_layers == 1,
        "traps": is_planted(read_json_object(reader.path / "config.json")),
        "yarn": config.rope_scaling is not None,
    }
    return frozenset(feature for feature, there in found.items() if there)


@dataclass(frozen=True)
class Trap:
    """One mistake."""

    name: str
    mistake: str
    why: str
    """Why tests miss it, or what it costs."""
    seen: str
    """Which upstreams fell for it, or differ by it."""
    issues: tuple[str, ...] = ()
    """`owner/name#number` on GitHub."""
    cases: tuple[str, ...] = ()
    """On which it shows; `*` stands for anything."""
    needs: tuple[Feature, ...] = ()
    """What a checkpoint must have for it to show."""
    elsewhere: str = ""
    """Of a mistake that no forward pass shows, where it is tested."""

    def shown_by(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of some cases on which it shows."""
        return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in self.cases))


_ANY_TEXT = ("prefill", "decode", "batch")

TRAPS: tuple[Trap, ...] = (
    Trap(
        "yarn_temperature",
        "the softmax scale without the square of YaRN's temperature",
        "The first position is exact, and the rest is off by more the longer the text: 1.87 times in DeepSeek-V3.",
        "exporters: onnxruntime/mobius, optimum-intel",
        ("onnxruntime/mobius#548", "huggingface/optimum-intel#1877"),
        (*_ANY_TEXT, "long_*"),
        ("yarn",),
    ),
    Trap(
        "rotary_halves",
        "rotary pairs (i, i + d/2) where DeepSeek's weights have neighbours",
        "The text stays fluent for a while. Most other models have halves, and share kernels with this one.",
        "vLLM, Liger-Kernel",
        ("vllm-project/vllm#26995", "linkedin/Liger-Kernel#1379"),
        (*_ANY_TEXT, "long_*"),
    ),
    Trap(
        "zero_group_mask",
        "groups left out are masked by 0, not by minus infinity",
        "A biased score may be negative, and 0 is then the best. DeepSeek's own code masks by minus infinity.",
        "Hugging Face transformers",
        ("huggingface/transformers#45440",),
        (*_ANY_TEXT, "token_*"),
        ("traps",),
    ),
    Trap(
        "bf16_router",
        "the router's product, scores or weights in bf16",
        "Other experts win near ties; nothing crashes. Trainers compute it in fp32, DeepSeek's inference code in bf16.",
        "vLLM, SGLang, and 23 of the 32 model families that NeMo Automodel audited differ or leave it to the recipe",
        ("vllm-project/vllm#14027", "sgl-project/sglang#33608", "NVIDIA-NeMo/Automodel#3650"),
        (*_ANY_TEXT, "same_token"),
    ),
    Trap(
        "no_epsilon",
        "weights divided by their sum without the 1e-20 under it",
        "It shows only where all chosen scores are almost 0: there it decides how much experts say, and 0 / 0 is NaN.",
        "vLLM, whose logits are then NaN, and DeepSeek's own code; transformers, Megatron-Core and TorchTitan add it",
        (),
        ("token_drowned",),
        ("traps",),
    ),
    Trap(
        "scale_after_combine",
        "`routed_scaling_factor` on the sum of all experts, the shared one too, or rounded before",
        "With a factor of 2.5 the shared expert counts 2.5 times; placed otherwise it rounds otherwise.",
        "vLLM applies it in or after the combination, transformers to the weights",
        (),
        _ANY_TEXT,
    ),
    Trap(
        "bias_not_loaded",
        "`e_score_correction_bias` left at zero or rounded to bf16",
        "It is a buffer, which optimizers, converters and weight updates pass over.",
        "Megatron-Core (bf16), Megatron-Bridge (not mapped), miles (not sent to the server)",
        ("NVIDIA/Megatron-LM#1482", "NVIDIA-NeMo/Megatron-Bridge#4657", "radixark/miles#2706"),
        _ANY_TEXT,
    ),
    Trap(
        "bf16_token_counts",
        "the tokens of an expert counted in bf16 when its bias is updated",
        "Above 256 the counts round, and the sign of an update flips: 40,840 tokens became 41,216 or 40,704.",
        "Megatron-Core",
        ("NVIDIA/Megatron-LM#7081",),
        elsewhere="a server never counts; `tests/adapters/test_megatron_gradients.py`",
    ),
    Trap(
        "mtp_position_zero",
        "the MTP layer sees a zero in the place of the first embedding",
        "Training sees the embedding. Fewer drafts are accepted, and the trainer's MTP loss is of another model.",
        "vLLM zeroes it; SGLang, TorchTitan and DeepSeek's report do not",
        (),
        ("mtp_*", "sampler_mtp_*"),
        ("mtp",),
    ),
    Trap(
        "quantizer_floor",
        "a floor under a block's largest number (1e-4, 1e-10) before its scale is taken",
        "Each library has its own, so that the same recipe gives other bits where activations are small.",
        "DeepGEMM and DeepSeek's own code (1e-4), vLLM and slime (1e-10); TransformerEngine has none",
        (),
        ("token_faint", "token_denormal"),
        ("traps", "fp8"),
    ),
    Trap(
        "zero_block",
        "a block of zeros divided by its own largest number",
        "0 / 0 is NaN, and one such token makes every later one NaN.",
        "slime has a test for it",
        (),
        ("token_zero",),
        ("traps", "fp8"),
    ),
    Trap(
        "scale_dropped",
        "fp8 weights read without their `weight_scale_inv`",
        "Shapes and dtypes are right, and one projection is off by a power of two.",
        "converters",
        (),
        _ANY_TEXT,
        ("fp8",),
    ),
    Trap(
        "phases_apart",
        "other arithmetic in decode, in a chunk or on a cache hit than in prefill",
        "The log-probability of a token depends on how its request was scheduled.",
        "vLLM and SGLang choose a form and a kernel of attention by the batch",
        ("vllm-project/vllm#57016",),
        ("decode", "batch", "chunked_prefill", "prefix_cache*", "long_*", "crowd"),
    ),
    Trap(
        "verify_apart",
        "other bits where k + 1 tokens are verified than where one is decoded",
        "Speculation is then not exact: a draft changes what is said.",
        "vLLM's batch-invariant mode",
        ("vllm-project/vllm#54506",),
        ("mtp_*", "sampler_mtp_*"),
        ("mtp",),
    ),
    Trap(
        "mtp_layer_number",
        "the MTP layer's number collides with a main layer's where routing is recorded and replayed",
        "The replay feeds one layer's choice of experts to another.",
        "NeMo RL",
        ("NVIDIA-NeMo/RL#3903", "NVIDIA-NeMo/RL#4057"),
        elsewhere="nothing is replayed here: the trainer chooses what the server chose",
    ),
    Trap(
        "logprobs_of_another_kind",
        "log-probabilities before the temperature where others are after it, or by another log-softmax",
        "An importance ratio begins away from 1, and looks like a mismatch of engines.",
        "vLLM answers raw ones by default, SGLang and Megatron processed ones",
        (),
        ("sampled", "sampler*"),
    ),
    Trap(
        "tie_order",
        "ties between experts broken by whatever a top-k kernel does first",
        "`topk(sorted=False)` promises no order, and two kernels keep two.",
        "transformers and TorchTitan leave it open",
        (),
        (*_ANY_TEXT, "token_flooded"),
        ("traps",),
    ),
    Trap(
        "denormals_flushed",
        "numbers below 2 ** -126 taken for zeros",
        "A compiler's fast mathematics does it for a whole process, to every library in it.",
        "whatever is built with `-ffast-math` or calls `set_flush_denormal`",
        (),
        ("token_denormal",),
        ("traps",),
    ),
)


def guarded(cases: Collection[str], features: Collection[Feature]) -> list[tuple[Trap, tuple[str, ...]]]:
    """The traps that show on some cases of a checkpoint with these features, each with the cases."""
    return [(trap, shown) for trap in TRAPS if set(trap.needs) <= set(features) and (shown := trap.shown_by(cases))]
