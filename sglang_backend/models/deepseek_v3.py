"""DeepSeek-V3 under SGLang's name for it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.model_executor.forward_batch_info import PPProxyTensors
from torch import nn

from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.checkpoint.names import dtype_name
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.engines import switched_off
from dsv3_plugin.layers.embedding import Head
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layout import Layout
from dsv3_plugin.peers import announcement, connected
from dsv3_plugin.profile import profile_for
from dsv3_plugin.registry import Ops
from dsv3_plugin.sglang_backend import compat, options, plugin
from dsv3_plugin.sglang_backend.attention import LatentAttend, compute
from dsv3_plugin.sglang_backend.eplb import MovableExperts, placed
from dsv3_plugin.sglang_backend.layout import layout_of, most_tokens
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
    """SGLang's, for logits as the head gives them: whole on every rank, and without the cap that config.json may name,
    which is of other models.
    """
    processor = LogitsProcessor(hf_config, skip_all_gather=True)
    processor.final_logit_softcapping = None
    return processor


def prepare(hf_config: Any, served: str, path: str, load_format: str) -> tuple[Ops, DeepseekV3Config, Layout]:
    """Check what SGLang asks for, bind the kernels of this rank's part, and say in the log what will run.

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
    values = compat.server_options()
    table.require_supported(values)
    options.require_possible_together(values, config.num_hidden_layers)
    layout, reason = connected(placed(layout_of(config), config), device, compat.tokens_in_graphs(device))
    if layout.experts.size > 1:
        logger.info(announcement(reason))
    compat.settle_graphs(device, layout, reason)
    profile = profile_for(config, dtype)
    if profile.attention == "two_form":
        options.IN_TWO_FORMS.require_supported(values)
    ops = bind_ops(config, profile, device, layout=layout)
    logger.info(ops.announcement(served))
    return ops, config, layout


def load_checkpoint(loader: WeightLoader, weights: Iterable[tuple[str, torch.Tensor]], path: str) -> None:
    """A first load. SGLang gives every rank all tensors; of a folder only this rank's are read."""
    if Path(path).is_dir():
        loader.read(CheckpointReader(path))
    else:
        loader.load(weights)
        loader.finish()


class DeepseekV3ForCausalLM(nn.Module, MovableExperts):
    """The main model, or the part of it that this rank holds."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        path, load_format = compat.checkpoint()
        self.ops, self.config, self.layout = prepare(config, "DeepseekV3ForCausalLM", path, load_format)
        layers = self.layout.layers_of(self.config)
        self.start_layer, self.end_layer = layers.start, layers.stop  # SGLang sizes its pool by them
        deepseek = DeepseekV3(self.ops, self.config, self.layout)
        # By the checkpoint's names.
        self.model = deepseek.model
        if self.model.is_last:
            self.lm_head = deepseek.lm_head
            self.lm_head.quant_method = CoreHead()  # type: ignore[assignment]
        self.logits_processor = plain_logits_processor(config)
        self.prompt_logprobs = PromptLogprobs(self.logits_processor)
        self.weight_loader = WeightLoader(
            self, self.config, "main", layout=self.layout, holds_weights=load_format == "dummy"
        )
        self.prompt_lens: dict[str, int] = {}
        """Of the latest pass over prompts (`attention.note_prompts`)."""
        self.received: Bucket | None = None
        self.updates: Updates | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> Any:
        """Flattened tokens [T], or what the stage before returned of them, to SGLang's logits output; hidden states in
        it are the normalised ones. Stages before the last return `hidden_states` [T, hidden] for the next.
        """
        self.weight_loader.require_whole()
        if pp_proxy_tensors is not None:
            hidden = pp_proxy_tensors["hidden_states"]
        else:
            hidden = self.model.embed_tokens(input_ids) if input_embeds is None else input_embeds
        attend = LatentAttend(self.ops, self.config, self.start_layer, positions, forward_batch, self.prompt_lens)
        self.layout.begin_pass(most_tokens(forward_batch))
        with self.following_experts():
            hidden = compute(self.model, attend, hidden, positions)
        if not self.model.is_last:
            return PPProxyTensors({"hidden_states": hidden})
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
        else:
            load_checkpoint(self.weight_loader, weights, compat.checkpoint()[0])

    def get_weights_by_name(self, name: str, truncate_size: int = 100, tp_size: int = 1) -> list[Any]:
        """The first rows of a tensor by its name in the checkpoint; SGLang asks the target for a draft's too."""
        assert self.updates is not None
        return self.updates.rows(name, truncate_size)


EntryClass: Any = [] if switched_off() else DeepseekV3ForCausalLM
