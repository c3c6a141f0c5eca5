"""Every option of vLLM, and what becomes of it here: see `dsv3_plugin.options`.

An option is a field of vLLM's configuration as vLLM holds it when a model is built, so that it does not matter whether
a flag, a YAML file, a variable or a default of vLLM's set it: `model_config.quantization`. A section that has a rule of
its own, `lora_config`, needs none for its fields. What is derived by vLLM from other options is honoured.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_plugin.errors import EngineError
from dsv3_plugin.options import Options, honoured, irrelevant, refused, require_layers
from dsv3_plugin.profile import ATTENTION_VARIABLE

_OWN_KERNELS = "the model runs kernels of its own, see DSV3_PLUGIN_MODE"


_FORMATS = "auto", "hf", "safetensors", "fastsafetensors", "runai_streamer", "instanttensor", "pt", "npcache", "dummy"
_READ_IN_PARTS = "auto", "hf", "safetensors"
_FOREIGN_TRANSFERS = "sparse_nccl", "sharded_rdt", "nccl_m2n", "modelexpress"


def _in(section: str, *fields: str) -> tuple[str, ...]:
    return tuple(f"{section}.{field}" for field in fields)


def _nothing(value: Any) -> bool:
    """Empty, or all of its fields say nothing: a section that vLLM always builds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_nothing(getattr(value, field.name)) for field in dataclasses.fields(value))
    return not value


OPTIONS = Options(
    "vLLM",
    # Which checkpoint, and how it is read.
    honoured("the adapter reads the same files", *_in("model_config", "model", "model_weights", "hf_config_path")),
    honoured(
        "`model.read_config` takes it over or refuses it",
        *_in("model_config", "hf_config", "hf_text_config", "hf_overrides", "dtype"),
    ),
    honoured(
        "vLLM's own: names, versions and access",
        *_in("model_config", "revision", "code_revision", "hf_token", "served_model_name", "trust_remote_code"),
        *_in("model_config", "model_impl", "model_class_overrides", "is_submodel_config"),
        *_in("model_config", "word_embeddings_untied_by_checkpoint"),
    ),
    refused("the adapter reads config.json", "model_config.config_format", unless=("auto", "hf")),
    refused(
        "it is not the checkpoint's own, and weights are not quantized here; convert the checkpoint",
        *_in("model_config", "quantization", "quantization_config"),
        *_in("speculative_config", "quantization"),
        unless=({},),
    ),
    irrelevant("says only whether vLLM warns", "model_config.allow_deprecated_quantization"),
    honoured("holds what model_config.quantization asked for", "quant_config"),
    refused("it is not the files of a checkpoint", "load_config.load_format", unless=_FORMATS),
    refused("weights are loaded to where they serve", "load_config.device"),
    honoured(
        "how vLLM's loader fetches files; where none says how, a rank reads its own part of a folder, and no more",
        *_in("load_config", "download_dir", "safetensors_load_strategy", "safetensors_prefetch_num_threads"),
        *_in("load_config", "safetensors_prefetch_block_size", "model_loader_extra_config"),
        *_in("load_config", "ignore_patterns", "use_tqdm_on_load", "pt_load_map_location"),
    ),
    refused(
        "it writes past the adapter, into parameters of other names",
        "weight_transfer_config",
        allows=lambda value: getattr(value, "backend", None) not in _FOREIGN_TRANSFERS,
    ),
    # What is asked of the model.
    refused("the model generates text only", "model_config.runner", unless=("auto", "generate")),
    refused("the model generates text only", "model_config.convert", unless=("auto", "none")),
    refused(
        "the model generates text only",
        *_in("model_config", "pooler_config", "multimodal_config", "io_processor_plugin"),
        *_in("scheduler_config", "is_multimodal_model"),
        *("ec_transfer_config", "ec_manager_config", "diffusion_config"),
        allows=_nothing,
    ),
    refused("the model takes token ids", "model_config.enable_prompt_embeds"),
    refused("the model has one attention, over all keys", *_in("cache_config", "sliding_window", "is_attention_free")),
    irrelevant(
        "of sliding windows and cascades", *_in("model_config", "disable_sliding_window", "disable_cascade_attn")
    ),
    irrelevant("of multi-modal inputs", *_in("model_config", "allowed_local_media_path", "allowed_media_domains")),
    honoured(
        "vLLM's own, before and after the model",
        *_in("model_config", "tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init"),
        *_in("model_config", "generation_config", "override_generation_config", "renderer_num_workers"),
        *_in("model_config", "max_model_len", "spec_target_max_model_len", "seed", "max_logprobs"),
        *_in("model_config", "use_fp64_gumbel", "enable_trace_replay", "return_sampling_mask", "logits_processors"),
        *("structured_outputs_config", "reasoning_config"),
    ),
    honoured("`sampling` makes processed_logprobs exact, other modes are vLLM's", "model_config.logprobs_mode"),
    refused("it draws by another rule than the logits", "watermark_config"),
    refused(
        "the model's router does not record what it chooses",
        *_in("model_config", "enable_return_routed_experts"),
        *_in("aux_output_config", "enable_return_routed_experts"),
    ),
    irrelevant("of aux_output_config.enable_return_routed_experts", "aux_output_config.max_bytes"),
    # Drafts.
    refused("the checkpoint's MTP layer drafts", "speculative_config.method", unless=("mtp", "deepseek_mtp")),
    refused("the MTP layer of the served checkpoint drafts", "speculative_config.model"),
    refused(
        "it accepts drafts that the model would not",
        "speculative_config.rejection_sample_method",
        unless=("standard", "strict", "probabilistic", "block"),
    ),
    refused(
        "the draft is as the target",
        *_in("speculative_config", "kv_cache_dtype", "moe_backend", "attention_backend", "draft_load_config"),
        unless=("auto",),
    ),
    refused(
        "the draft is on the target's ranks, and shares its head",
        *_in("speculative_config", "tensor_parallel_size", "draft_tensor_parallel_size"),
    ),
    honoured(
        "vLLM's drafting and verification",
        *_in("speculative_config", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "enforce_eager"),
        *_in("speculative_config", "max_model_len", "revision", "code_revision", "disable_padded_drafter_batch"),
        *_in("speculative_config", "target_model_config", "target_parallel_config", "draft_model_config"),
        *_in("speculative_config", "draft_parallel_config", "draft_sample_method", "disable_eagle_block_drop"),
    ),
    refused(
        "another method's than mtp's",
        *_in("speculative_config", "use_heterogeneous_vocab", "parallel_drafting", "enable_adaptive_verification"),
        *_in("speculative_config", "use_local_argmax_reduction", "index_share_for_mtp_iteration"),
    ),
    irrelevant(
        "of other methods or rules of drafting, which are refused",
        *_in("speculative_config", "prompt_lookup_max", "prompt_lookup_min", "suffix_decoding_max_tree_depth"),
        *_in("speculative_config", "suffix_decoding_max_cached_requests", "suffix_decoding_max_spec_factor"),
        *_in("speculative_config", "suffix_decoding_min_token_prob", "dspark_draft_topk"),
        *_in("speculative_config", "synthetic_acceptance_rates", "synthetic_acceptance_length"),
    ),
    # The cache.
    refused("kv_cache_dtype: the latent cache has the model's dtype", "cache_config.cache_dtype", unless=("auto",)),
    refused(
        "of fp8 caches, and the latent cache has the model's dtype",
        *_in("cache_config", "calculate_kv_scales", "kv_cache_dtype_skip_layers"),
        allows=_nothing,
    ),
    honoured(
        "`attention.LatentCache` calls the connector, layer by layer; a page is a copy wherever it is taken",
        *("kv_transfer_config", "cache_config.kv_offloading_size", "cache_config.kv_offloading_backend"),
    ),
    refused("every layer of the model has a cache of its own", "cache_config.kv_sharing_fast_prefill"),
    honoured(
        "vLLM's pages, whose size the kernels take as it is",
        *_in("cache_config", "block_size", "user_specified_block_size", "kv_cache_layout", "hash_block_size"),
        *_in("cache_config", "prefix_match_unit", "gpu_memory_utilization", "num_gpu_blocks_override"),
        *_in("cache_config", "enable_prefix_caching", "prefix_caching_hash_algo", "prefix_cache_retention_interval"),
        *_in("cache_config", "num_gpu_blocks", "num_cpu_blocks", "effective_attention_block_size"),
        *_in("cache_config", "kv_cache_size_tokens", "kv_cache_max_concurrency", "cache_hit_alignment_tokens"),
        *_in("cache_config", "kv_cache_memory_bytes", "_block_size_resolved"),
        "kv_events_config",
    ),
    irrelevant(
        "of state-space and sliding-window models",
        *_in("cache_config", "mamba_page_size_padded", "skip_page_size_padded", "mamba_block_size"),
        *_in("cache_config", "user_specified_mamba_block_size", "mamba_cache_dtype", "mamba_ssm_cache_dtype"),
        *_in("cache_config", "mamba_cache_mode", "enable_mamba_shared_prefix_checkpoint", "replayssm_buffer_len"),
        *_in("cache_config", "use_replayssm", "use_kda_recoverssm", "swa_bounded_replay"),
        "mamba_config",
    ),
    # Placement.
    honoured(
        "`layout` makes this rank's part of the model of them",
        *_in("parallel_config", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
        *_in("parallel_config", "data_parallel_size_local", "world_size", "nnodes"),
    ),
    honoured("routed experts are spread over all ranks with and without it", "parallel_config.enable_expert_parallel"),
    refused(
        "an update of weights is checked for all tensors; from a folder a rank reads its own part without it, see"
        " load_config.load_format",
        "parallel_config.enable_ep_weight_filter",
    ),
    refused("a rank holds neighbouring experts", "parallel_config.expert_placement_strategy", unless=("linear",)),
    refused(
        "a rank attends to whole sequences",
        *_in("parallel_config", "prefill_context_parallel_size", "decode_context_parallel_size"),
        unless=(1,),
    ),
    irrelevant(
        "of context parallelism, which is refused",
        *_in("parallel_config", "dcp_kv_cache_interleave_size", "dcp_comm_backend", "dcp_q_replicate"),
        *_in("parallel_config", "cp_kv_cache_interleave_size", "_allow_auto_resolve_cp_interleave_size"),
    ),
    honoured("`eplb` lets vLLM move experts", *_in("parallel_config", "enable_eplb", "eplb_config")),
    refused("the number of ranks is fixed", "parallel_config.enable_elastic_ep"),
    irrelevant("of elastic expert parallelism, which is refused", "parallel_config.elastic_ep_max_dp_size"),
    irrelevant("of models with n-gram embeddings", "engram_config"),
    irrelevant("of vLLM's own MoE layers; the model sends rows by itself", "parallel_config.all2all_backend"),
    refused(
        "the model runs a step as one batch, whole on each tensor-parallel rank",
        *_in("parallel_config", "enable_dbo", "enable_hc_sp", "enable_batch_sharded_sampling"),
    ),
    refused("the model runs a step as one batch", "parallel_config.ubatch_size", unless=(0, 1)),
    irrelevant(
        "of micro-batches, which are refused",
        *_in("parallel_config", "dbo_decode_token_threshold", "dbo_prefill_token_threshold"),
    ),
    refused(
        "weights stay on the device, where kernels and graphs read them",
        *_in("offload_config", "uva", "prefetch"),
        allows=lambda value: (
            not any(getattr(value, name, 0) for name in ("cpu_offload_gb", "cpu_offload_params", "offload_group_size"))
        ),
    ),
    irrelevant("of offload_config.uva and offload_config.prefetch", "offload_config.offload_backend"),
    refused(
        "vLLM would wake with some weights of another update",
        "model_config.sleep_preserve_parameter_names",
        unless=((), []),
    ),
    honoured(
        "the worker's calls are looked after by `worker`",
        *_in("model_config", "enable_sleep_mode", "sleep_mode_backend", "sleep_mode_offload_cudagraph"),
        *_in("model_config", "enable_nccl_comm_suspend", "enable_cumem_allocator"),
    ),
    irrelevant("of sums that vLLM makes; the model makes its own", "parallel_config.disable_custom_all_reduce"),
    honoured(
        "vLLM's processes, and how they find each other",
        *_in("parallel_config", "data_parallel_rank", "data_parallel_rank_local", "data_parallel_master_ip"),
        *_in("parallel_config", "data_parallel_rpc_port", "dp_sync_interval", "data_parallel_master_port"),
        *_in("parallel_config", "data_parallel_backend", "data_parallel_external_lb", "data_parallel_hybrid_lb"),
        *_in("parallel_config", "enable_shm_tensor_arena", "is_moe_model", "data_parallel_index"),
        *_in("parallel_config", "disable_nccl_for_dp_synchronization", "_data_parallel_master_port_list"),
        *_in("parallel_config", "_coord_store_port"),
        *_in("parallel_config", "max_parallel_loading_workers", "ray_workers_use_nsight", "ray_runtime_env"),
        *_in("parallel_config", "placement_group", "distributed_executor_backend", "worker_cls", "sd_worker_cls"),
        *_in("parallel_config", "worker_extension_cls", "master_addr", "master_port", "node_rank", "numa_bind"),
        *_in("parallel_config", "numa_bind_nodes", "numa_bind_cpus", "assigned_physical_gpu_ids", "rank"),
        *_in("parallel_config", "distributed_timeout_seconds", "cpu_distributed_timeout_seconds"),
        *_in("parallel_config", "_api_process_count", "_api_process_rank", "enable_fault_tolerance"),
        *_in("parallel_config", "fault_tolerance_config"),
        *("device_config", "instance_id", "shutdown_timeout", "logging_config"),
    ),
    refused("enable_lora: the model takes no adapters", "lora_config"),
    # Scheduling, by which no bit moves.
    honoured(
        "vLLM's schedule, by which no bit moves",
        *_in("scheduler_config", "runner_type", "max_num_batched_tokens", "max_num_scheduled_tokens", "max_num_seqs"),
        *_in("scheduler_config", "max_num_active_seqs", "long_prefill_token_threshold", "max_num_queued_reqs"),
        *_in("scheduler_config", "long_prefill_token_threshold_adaptive", "max_num_queued_tokens", "policy"),
        *_in("scheduler_config", "enable_chunked_prefill", "scheduler_cls", "disable_hybrid_kv_cache_manager"),
        *_in("scheduler_config", "scheduler_reserve_full_isl", "watermark", "prefill_schedule_interval"),
        *_in("scheduler_config", "async_scheduling", "stream_interval", "max_num_partial_prefills"),
        *_in("scheduler_config", "max_long_partial_prefills"),
    ),
    irrelevant(
        "of multi-modal inputs",
        *_in("scheduler_config", "max_num_encoder_input_tokens", "encoder_cache_size", "disable_chunked_mm_input"),
    ),
    # Kernels and compilation.
    refused(
        _OWN_KERNELS,
        *_in("kernel_config", "moe_backend", "linear_backend", "linear_backend_per_quant"),
        allows=lambda value: value == "auto" or not value,
    ),
    irrelevant(
        "of vLLM's own kernels, which the model does not call",
        *_in("kernel_config", "ir_op_priority", "enable_flashinfer_autotune", "enable_rocm_segmented_attn_autotune"),
        *_in("kernel_config", "enable_cutedsl_warmup", "enable_jit_warmup", "sparse_indexer_topk_backend"),
        *_in("kernel_config", "enable_bf16x3_router_gemm"),
        *_in("attention_config", "minimax_m3_msa_decode_backend", "flash_attn_max_num_splits_for_cuda_graph"),
        *_in("attention_config", "tokenspeed_mla_min_split_kv", "tq_max_kv_splits_for_cuda_graph"),
        *_in("attention_config", "use_trtllm_attention", "disable_flashinfer_q_quantization", "indexer_kv_dtype"),
        *_in("attention_config", "use_prefill_query_quantization", "indexer_sparse_logits", "sparse_mla_force_mqa"),
        *_in("attention_config", "sparse_mla_prefill_workspace_factor", "flex_attn_block_m", "flex_attn_block_n"),
        *_in("attention_config", "flex_attn_q_block_size", "flex_attn_kv_block_size", "use_fp4_indexer_cache"),
        *_in("attention_config", "use_prefill_decode_attention"),
    ),
    refused(
        _OWN_KERNELS,
        *_in("attention_config", "backend", "backend_per_kind", "flash_attn_version", "mla_prefill_backend"),
        *_in("attention_config", "hisparse_config", "use_non_causal"),
        "model_config.override_attention_dtype",
        allows=_nothing,
    ),
    honoured(
        "decode steps run in CUDA graphs; the model has nothing that vLLM compiles",
        "compilation_config",
        "model_config.enforce_eager",
        "optimization_level",
        "performance_mode",
    ),
    honoured("vLLM's own: what it counts and tells", "observability_config", "profiler_config"),
    refused("the adapter knows no option of a platform", "additional_config", unless=({},)),
)


ENVIRONMENT = Options(
    "vLLM's environment",
    refused("it lets torch round the inputs of float32 products", "VLLM_FLOAT32_MATMUL_PRECISION", unless=("highest",)),
    refused(
        "on a GPU log-probabilities are then those of a log-softmax that rounds otherwise than torch's",
        "VLLM_BATCH_INVARIANT",
    ),
    refused(
        "model runner V2 has a log-softmax of its own, and takes it after top-k, top-p and min-p; set it to 0, or use"
        " another logprobs_mode than processed_logprobs",
        "VLLM_USE_V2_MODEL_RUNNER",
    ),
    refused("a KV connector then takes a page for heads that tensor-parallel ranks share", "VLLM_MLA_DISABLE"),
)
"""Variables that change numbers of the model or of its log-probabilities, or what becomes of its pages."""

IN_TWO_FORMS = Options(
    "vLLM in the two_form profile",
    refused(
        "in the two_form profile nobody tells other servers which tokens of a page were generated: leave it out",
        *("kv_transfer_config", "cache_config.kv_offloading_size"),
    ),
    refused(
        "in the two_form profile model runner V1 is asked where prompts end: set VLLM_USE_V2_MODEL_RUNNER=0",
        "use_v2_model_runner",
    ),
    otherwise=f"Do so, or unset {ATTENTION_VARIABLE}",
)
"""What the `two_form` profile does not serve beside that."""

FLAGS = Options(
    "vLLM's command line",
    honoured("becomes offload_config, and is judged there", "cpu_offload_gb", "cpu_offload_params", "offload_params"),
    honoured("likewise", "offload_group_size", "offload_num_in_group", "offload_prefetch_step"),
    honoured("becomes lora_config, and is judged there", "enable_lora", "lora_target_modules"),
    honoured("becomes speculative_config, and is judged there", "spec_method", "spec_model", "spec_tokens"),
    honoured("becomes scheduler_config.policy", "scheduling_policy"),
    honoured("vLLM's own: what it logs", "aggregate_engine_logging", "disable_log_stats", "enable_log_requests"),
    honoured("vLLM's own: its servers and checks", "log_config_file", "tokens_only", "fail_on_environ_validation"),
    honoured(
        "vLLM's processes, and how they find each other",
        *("data_parallel_address", "data_parallel_multi_port_external_lb", "data_parallel_start_rank", "device_ids"),
    ),
    irrelevant(
        "of multi-modal inputs",
        *("enable_mm_embeds", "interleave_mm_strings", "language_model_only", "limit_mm_per_prompt", "media_io_kwargs"),
        *("mm_device_do_normalize", "mm_encoder_attn_backend", "mm_encoder_attn_dtype", "mm_encoder_fp8_scale_path"),
        *("mm_encoder_fp8_scale_save_margin", "mm_encoder_fp8_scale_save_path", "mm_encoder_only"),
        *("mm_encoder_tp_mode", "mm_hasher_algorithm", "mm_ipc_gpu_memory_gb", "mm_processor_cache_gb"),
        *("mm_processor_cache_type", "mm_processor_device", "mm_processor_kwargs", "mm_shm_cache_max_object_size_mb"),
        *("mm_tensor_ipc", "skip_mm_profiling", "video_pruning_method", "video_pruning_rate"),
    ),
    irrelevant(
        "of state-space models",
        *("enable_mamba_cache_stochastic_rounding", "gdn_prefill_backend", "kda_decode_backend", "kda_prefill_backend"),
        *("mamba_backend", "mamba_cache_philox_rounds", "mamba_ssu_algorithm"),
    ),
)
"""Flags (fields of `EngineArgs`) that no field or section of the configuration has the name of."""


_MOST_DRAFTS = 128
"""`MAX_SPEC_LEN` of `vllm/v1/sample/rejection_sampler.py`."""


def sections(vllm_config: type) -> dict[str, tuple[str, ...]]:
    """Each section of vLLM's class `VllmConfig`, and its fields' names."""
    hints = typing.get_type_hints(vllm_config)
    found: dict[str, tuple[str, ...]] = {}
    for field in dataclasses.fields(vllm_config):
        kinds = (hints[field.name], *typing.get_args(hints[field.name]))
        kind = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        found[field.name] = tuple(part.name for part in dataclasses.fields(kind)) if kind is not None else ()
    return found


def names(vllm_config: type) -> Iterator[str]:
    """All options of a vLLM, from its class `VllmConfig`, as `OPTIONS` names them."""
    for section, fields in sections(vllm_config).items():
        yield from (section,) if section in OPTIONS.rules or not fields else _in(section, *fields)


def flags(vllm_config: type, engine_args: type) -> Iterator[str]:
    """Those of vLLM's flags that have another name than a section or field of its configuration."""
    found = sections(vllm_config)
    known = {*found, *(field for fields in found.values() for field in fields)}
    yield from (field.name for field in dataclasses.fields(engine_args) if field.name not in known)


def require_supported(vllm_config: Any) -> None:
    """Raise `EngineError` that names every option and variable that asks for what is not served."""
    OPTIONS.require_supported(_values(vllm_config))
    ENVIRONMENT.require_supported(environment(vllm_config))
    stages = vllm_config.parallel_config.pipeline_parallel_size
    require_layers("pipeline_parallel_size", stages, vllm_config.model_config.hf_config.num_hidden_layers)
    if (drafts := vllm_config.num_speculative_tokens) > _MOST_DRAFTS:
        raise EngineError(f"num_speculative_tokens={drafts}: vLLM's rejection sampler takes {_MOST_DRAFTS} at most")
    if stages > 1 and vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
        raise EngineError(
            f"vLLM's model runner V1 has no drafter on the first of pipeline_parallel_size={stages} stages: leave"
            " speculative_config out, or use model runner V2"
        )


def require_two_forms(vllm_config: Any) -> None:
    """Raise `EngineError` that names every option that is not served in the `two_form` profile."""
    IN_TWO_FORMS.require_supported({name: _value(vllm_config, name) for name in IN_TWO_FORMS.rules})


def _value(vllm_config: Any, name: str) -> Any:
    """An option as it is set; None where this vLLM has none."""
    section, _, field = name.partition(".")
    value = getattr(vllm_config, section, None)
    return getattr(value, field, None) if field else value


def _values(vllm_config: Any) -> dict[str, Any]:
    """The options as they are set. Where vLLM itself fills in what the checkpoint or the target says, None."""
    values = {name: _value(vllm_config, name) for name in OPTIONS.rules}
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    given = {
        "speculative_config.draft_tensor_parallel_size": parallel.tensor_parallel_size,
        "parallel_config.enable_ep_weight_filter": reads_own_part(vllm_config),
        "cache_config.cache_dtype": str(model.dtype).removeprefix("torch."),
        "speculative_config.kv_cache_dtype": str(model.dtype).removeprefix("torch."),
        "speculative_config.model": model.model,
    }
    own = getattr(model.hf_config, "quantization_config", None)
    if own is not None:
        quantization = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
        given |= dict.fromkeys(("model_config.quantization", "speculative_config.quantization"), quantization)
    return {name: None if name in given and given[name] == value else value for name, value in values.items()}


def reads_own_part(vllm_config: Any) -> bool:
    """Whether a rank reads its part of a checkpoint folder by itself: where nothing says how vLLM is to read it."""
    load = vllm_config.load_config
    asked = load.model_loader_extra_config or load.safetensors_load_strategy not in (None, "lazy")
    return load.load_format in _READ_IN_PARTS and not asked and Path(vllm_config.model_config.model).is_dir()


def environment(vllm_config: Any) -> dict[str, Any]:
    """The variables of `ENVIRONMENT`, False where one changes nothing under this configuration."""
    from vllm import envs

    exact = vllm_config.model_config.logprobs_mode == "processed_logprobs"
    on_gpu = vllm_config.device_config.device_type != "cpu"
    shared = vllm_config.kv_transfer_config is not None and vllm_config.parallel_config.tensor_parallel_size > 1
    return {
        "VLLM_FLOAT32_MATMUL_PRECISION": envs.VLLM_FLOAT32_MATMUL_PRECISION,
        "VLLM_BATCH_INVARIANT": bool(envs.VLLM_BATCH_INVARIANT) and exact and on_gpu,
        "VLLM_USE_V2_MODEL_RUNNER": bool(vllm_config.use_v2_model_runner) and exact,
        "VLLM_MLA_DISABLE": bool(envs.VLLM_MLA_DISABLE) and shared,
    }
