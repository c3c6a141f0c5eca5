"""The model classes that vLLM builds in place of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import cached_file
from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.sequence import IntermediateTensors

from dsv3_plugin.checkpoint.loader import WeightLoader
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import ConfigError, EngineError
from dsv3_plugin.layers.attend import Compute, Select, select_all
from dsv3_plugin.layers.model import DeepseekV3, bind_ops
from dsv3_plugin.layers.mtp import DeepseekV3MTP
from dsv3_plugin.layout import Layout
from dsv3_plugin.peers import announcement, connected
from dsv3_plugin.profile import profile_for
from dsv3_plugin.registry import Ops
from dsv3_plugin.vllm_backend import compat, engine, graphs, layerwise, options, requests, worker
from dsv3_plugin.vllm_backend.attention import LatentCache
from dsv3_plugin.vllm_backend.eplb import MovableExperts, with_replicas
from dsv3_plugin.vllm_backend.layout import layout_of_this_rank, most_tokens
from dsv3_plugin.vllm_backend.prompts import Prompts

HIDDEN_STATES = "hidden_states"
"""What one pipeline stage sends to the next."""

logger = init_logger("vllm.dsv3_plugin")


def read_config(model_config: Any) -> DeepseekV3Config:
    """The checkpoint's `config.json`, read by the core, with the user's `hf_overrides`.

    Raises `ConfigError` for what this package does not implement, and for an override that it cannot follow.
    """
    overrides = model_config.hf_overrides
    if callable(overrides):
        raise ConfigError("hf_overrides is a function, which dsv3-plugin does not follow; give the fields themselves")
    path = Path(model_config.hf_config_path or model_config.model)
    if not path.exists():
        access = {"revision": model_config.revision, "token": model_config.hf_token}
        path = Path(cached_file(str(path), "config.json", **access))
    return DeepseekV3Config.from_pretrained(path, overrides=overrides)


class LatentCaches(nn.Module):
    """The caches of some layers, as the `Attend` that the core calls."""

    def __init__(
        self,
        ops: Ops,
        config: DeepseekV3Config,
        vllm_config: VllmConfig,
        layers: Iterable[int],
        weight_loader: WeightLoader,
    ) -> None:
        super().__init__()
        names = {i: f"model.layers.{i}.self_attn.attn" for i in layers}
        self.caches = nn.ModuleDict(
            {str(i): LatentCache(ops, config, vllm_config, name, weight_loader) for i, name in names.items()}
        )

    def forward(
        self, layer_idx: int, q: torch.Tensor, cached: torch.Tensor, select: Select = select_all
    ) -> torch.Tensor:
        """See `dsv3_plugin.layers.attend.Attend`."""
        return self.caches[str(layer_idx)](q, cached, select)

    def has_prompts(self) -> bool:
        """See `dsv3_plugin.layers.attend.OverPages`; the batch is that of all layers."""
        cache = next(iter(self.caches.values()))
        assert isinstance(cache, LatentCache)
        return cache.has_prompts()

    def over_pages(self, layer_idx: int, cached: torch.Tensor, compute: Compute) -> torch.Tensor:
        """See `dsv3_plugin.layers.attend.OverPages`."""
        cache = self.caches[str(layer_idx)]
        assert isinstance(cache, LatentCache)
        return cache.over_pages(cached, compute)

    def know_prompts(self, prompts: Prompts) -> None:
        """Before the first request comes, in the `two_form` profile."""
        for cache in self.caches.values():
            cache.prompts = prompts  # type: ignore[assignment]


def _own_files(vllm_config: VllmConfig) -> CheckpointReader | None:
    """The checkpoint, if a rank reads its own part of it by itself: vLLM's loader would read all of it on each."""
    return CheckpointReader(vllm_config.model_config.model) if options.reads_own_part(vllm_config) else None


def _filled_by_vllm(vllm_config: VllmConfig) -> bool:
    """Whether the user asked for weights that vLLM makes up, which may answer until a trainer sends others."""
    return vllm_config.load_config.load_format == "dummy"


def _prepare(vllm_config: VllmConfig, served: str) -> tuple[Ops, DeepseekV3Config, Layout]:
    """Check what vLLM asks for, bind the kernels, and say in the log what will run. The draft is of the target's
    checkpoint, and in its dtype.
    """
    options.require_supported(vllm_config)
    requests.install()
    engine.install()
    model_config = vllm_config.model_config
    if (warning := compat.batch_invariance_warning()) is not None:
        logger.warning(warning)
    if Path(model_config.model).is_dir() and vllm_config.load_config.load_format != "dummy":
        CheckpointReader(model_config.model).validate()
    config = read_config(model_config)
    if model_config.max_model_len > config.max_position_embeddings:
        raise EngineError(
            f"max_model_len={model_config.max_model_len} exceeds the positions that the checkpoint knows,"
            f" max_position_embeddings={config.max_position_embeddings}; set --max-model-len"
        )
    profile = profile_for(config, model_config.dtype)
    if profile.attention == "two_form":
        options.require_two_forms(vllm_config)
    layout = with_replicas(layout_of_this_rank(config), config, vllm_config.parallel_config)
    device = torch.device(vllm_config.device_config.device)
    layout = _with_peers(layout, device, vllm_config.compilation_config)
    ops = bind_ops(config, profile, device, layout=layout)
    worker.install(vllm_config.parallel_config.worker_cls)
    logger.info(ops.announcement(served))
    return ops, config, layout


def _with_peers(layout: Layout, device: torch.device, compilation_config: CompilationConfig) -> Layout:
    """`layout` over peer memory where its ranks can have it; else they run without CUDA graphs, which do not ask the
    host how many rows go from rank to rank.
    """
    layout, reason = connected(layout, device, compilation_config.max_cudagraph_capture_size or 0)
    if layout.experts.size > 1:
        logger.info(announcement(reason))
    if compilation_config.cudagraph_mode != CUDAGraphMode.NONE and not layout.needs_no_host():
        compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        logger.warning("dsv3-plugin runs without CUDA graphs where several ranks share the experts")
    return layout


def _load_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """Take what vLLM's loader reads at start, or a trainer sends later; returns the names that the loader waits for."""
    if model.unread is not None:
        # Before its first tensor the loader looks at the files, and fetches them ahead where they are far.
        next(iter(weights), None)
        checkpoint, model.unread = model.unread, None
        model.weight_loader.read(checkpoint)
    else:
        if isinstance(model, MovableExperts):
            model.follow_experts()
        if layerwise.take_back(model):
            model.weight_loader.begin()
        model.weight_loader.load(weights)
    return {name for name, _ in model.named_parameters()}


class DeepseekV3ForCausalLM(nn.Module, MovableExperts):
    """DeepSeek-V3 under vLLM's name for it, or a rank's part of it."""

    supports_pp = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.ops, self.config, self.layout = _prepare(vllm_config, "DeepseekV3ForCausalLM")
        deepseek = DeepseekV3(self.ops, self.config, self.layout)
        # By the checkpoint's names, under which a draft finds what it shares.
        self.model = deepseek.model
        if self.model.is_last:
            self.lm_head = deepseek.lm_head
        holds_weights = _filled_by_vllm(vllm_config)
        self.weight_loader = WeightLoader(self, self.config, "main", layout=self.layout, holds_weights=holds_weights)
        layers = self.layout.layers_of(self.config)
        self.attend = LatentCaches(self.ops, self.config, vllm_config, layers, self.weight_loader)
        self.run = graphs.in_pieces(self._run, vllm_config, self.attend.has_prompts)
        self.unread = _own_files(vllm_config)

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Called by vLLM where a stage has one before it, for what that sends: [batch_size, hidden]."""
        shape = batch_size, self.config.hidden_size
        return IntermediateTensors({HIDDEN_STATES: torch.zeros(shape, dtype=dtype, device=device)})

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [T] to [T, hidden]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Flattened tokens [T], or what the stage before sent, to normalised hidden states [T, hidden], or to what the
        next stage gets.
        """
        return self.run(
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=inputs_embeds,
        )

    def _run(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None,
    ) -> torch.Tensor | IntermediateTensors:
        if not self.layout.is_first():
            assert intermediate_tensors is not None
            hidden_states = intermediate_tensors[HIDDEN_STATES]
        elif inputs_embeds is not None:
            hidden_states = inputs_embeds
        else:
            hidden_states = self.model.embed_tokens(input_ids)
        self.layout.begin_pass(most_tokens())
        hidden_states = self.model(hidden_states, positions, self.attend)
        return hidden_states if self.model.is_last else IntermediateTensors({HIDDEN_STATES: hidden_states})

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [n, hidden] to logits fp32 [n, vocab_size]."""
        return self.lm_head(hidden_states.contiguous())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take all or some of a checkpoint's tensors, in any order. Raises `CheckpointError` as `WeightLoader` does."""
        return _load_weights(self, weights)


class DeepSeekMTPModel(nn.Module):
    """The MTP layer as vLLM's draft model. vLLM gives it the target's embedding and head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.ops, self.config, self.layout = _prepare(vllm_config, "DeepSeekMTPModel")
        self.model = DeepseekV3MTP(self.ops, self.config, self.layout)
        self.lm_head = self.model.lm_head
        holds_weights = _filled_by_vllm(vllm_config)
        self.weight_loader = WeightLoader(
            self.model, self.config, "mtp", layout=self.layout, holds_weights=holds_weights
        )
        layers = [self.config.mtp_layer_idx]
        self.attend = LatentCaches(self.ops, self.config, vllm_config, layers, self.weight_loader)
        self.run = graphs.in_pieces(self._run, vllm_config, self.attend.has_prompts)
        self.unread = _own_files(vllm_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [T] to [T, hidden]."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Next tokens' ids [T] and these tokens' hidden states [T, hidden], to what vLLM feeds to `compute_logits`
        and to the next draft step.

        vLLM's own draft returns the state before and after the last norm; here both are the normalised state.
        """
        normalised = self.run(input_ids=input_ids, positions=positions, hidden_states=hidden_states)
        return normalised, normalised

    def _run(self, input_ids: torch.Tensor, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        self.layout.begin_pass(most_tokens())
        return self.model(input_ids, positions, hidden_states, self.attend)

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor:
        """Normalised hidden_states [n, hidden] to logits fp32 [n, vocab_size]."""
        self._follow_target()
        return self.lm_head(hidden_states.contiguous())

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take all or some of a checkpoint's tensors, in any order. Raises `CheckpointError` as `WeightLoader` does.

        In the first load embedding and head are waited for, later they are the target's.
        """
        self._follow_target()
        return _load_weights(self, weights)

    def _follow_target(self) -> None:
        """After loading vLLM replaces embedding and head by the target's; following the head frees the copy."""
        if self.lm_head is not self.model.lm_head:
            self.model.lm_head = self.lm_head
            self.weight_loader.share(name for name, spec in self.weight_loader.specs.items() if "main" in spec.targets)
