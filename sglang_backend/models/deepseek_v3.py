"""DeepSeek-V3 under SGLang's name for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from torch import nn

from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.checkpoint.names import dtype_name
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.engines import switched_off
from dsv3_plugin.layers.embedding import Head
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.profile import profile_for
from dsv3_plugin.registry import Ops
from dsv3_plugin.sglang_backend import compat, options, plugin
from dsv3_plugin.sglang_backend.attention import LatentAttend
from dsv3_plugin.sglang_backend.sampling import PromptLogprobs
from dsv3_plugin.sglang_backend.updates import Bucket, Updates

logger = logging.getLogger("sglang.dsv3_plugin")


class CoreHead:
    """Our head in the form of SGLang's quantization methods, which is how its logits processor lets a model bring its
    own: the fp32 sums are the logits.
    """

    def process_weights_after_loading(self, layer: Head) -> None:
        """Nothing; called by SGLang's loader."""

    def apply(self, layer: Head, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [T, hidden] to logits fp32 [T, vocab_size]."""
        return layer(x.contiguous())


def plain_logits_processor(hf_config: Any) -> LogitsProcessor:
    """SGLang's, for logits as the head gives them: a cap that config.json may name is of other models."""
    processor = LogitsProcessor(hf_config)
    processor.final_logit_softcapping = None
    return processor


def prepare(hf_config: Any, served: str, path: str, load_format: str) -> tuple[Ops, DeepseekV3Config]:
    """Check what SGLang asks for, bind the kernels, and say in the log what will run.

    SGLang builds a model under the default dtype and device that it shall have.
    """
    plugin.require_hooks()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    overrides = compat.config_overrides()
    if Path(path).is_dir():
        # SGLang changes some sizes in its own copy on a CPU.
        config = DeepseekV3Config.from_pretrained(path, overrides)
        if load_format != "dummy":
            CheckpointReader(path).validate()
    else:
        config = DeepseekV3Config.from_dict(hf_config.to_dict(), where=path)
    options.require_environment()
    table = options.options(dtype_name(dtype), fp8=config.quantization_config is not None)
    table.require_supported(compat.server_options())
    compat.settle_graphs(device)
    profile = profile_for(config, dtype)
    ops = bind_ops(config, profile, device)
    logger.info(ops.announcement(served))
    return ops, config


class DeepseekV3ForCausalLM(nn.Module):
    """The main model."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        path, load_format = compat.checkpoint()
        self.ops, self.config = prepare(config, "DeepseekV3ForCausalLM", path, load_format)
        deepseek = DeepseekV3(self.ops, self.config)
        # By the checkpoint's names.
        self.model = deepseek.model
        self.lm_head = deepseek.lm_head
        self.lm_head.quant_method = CoreHead()  # type: ignore[assignment]
        self.logits_processor = plain_logits_processor(config)
        self.prompt_logprobs = PromptLogprobs(self.logits_processor)
        self.weight_loader = WeightLoader(self, self.config, "main", holds_weights=load_format == "dummy")
        self.received: Bucket | None = None
        self.updates: Updates | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
    ) -> Any:
        """Flattened tokens [T] to SGLang's logits output; hidden states in it are the normalised ones."""
        self.weight_loader.require_whole()
        if input_embeds is None:
            input_embeds = self.model.embed_tokens(input_ids)
        attend = LatentAttend(self.ops, self.config, 0, positions, forward_batch)
        hidden = self.model(input_embeds, positions, attend)
        if forward_batch.sampling_info is not None:
            self.prompt_logprobs.temperatures = forward_batch.sampling_info.temperatures
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def get_embed_and_head(self) -> tuple[nn.Parameter, nn.Parameter]:
        """What a draft model shares."""
        return self.model.embed_tokens.weight, self.lm_head.weight

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load a checkpoint, all of it; the parts of an update are left for `updates` to take."""
        if self.received is not None:
            self.received += weights
            return
        self.weight_loader.load(weights)
        self.weight_loader.finish()

    def get_weights_by_name(self, name: str, truncate_size: int = 100, tp_size: int = 1) -> list[Any]:
        """The first rows of a tensor by its name in the checkpoint; SGLang asks the target for a draft's too."""
        assert self.updates is not None
        return self.updates.tensor(name)[:truncate_size].float().tolist()


EntryClass: Any = [] if switched_off() else DeepseekV3ForCausalLM
