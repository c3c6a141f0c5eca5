"""What becomes of each of SGLang's options (`ServerArgs`), of all tested versions, under this package's models.

`tests/test_sglang_options.py` compares the table with the options that each installed SGLang has.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from dsv3_plugin.checkpoint.names import dtype_name
from dsv3_plugin.engines import is_ours
from dsv3_plugin.errors import EngineError
from dsv3_plugin.options import Options, honoured, irrelevant, refused, require_layers
from dsv3_plugin.profile import ATTENTION_VARIABLE
from dsv3_plugin.sglang_backend import attention

logger = logging.getLogger("sglang.dsv3_plugin")

ENVIRONMENT = {
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "log-probabilities are those at a request's temperature",
    "SGLANG_SIMULATE_ACC_LEN": "drafts are verified, not pretended",
    "SGLANG_SIMULATE_UNIFORM_EXPERTS": "the router chooses the experts",
}
"""Variables of SGLang that change what is answered, and why they are refused."""


IN_TWO_FORMS = Options(
    "SGLang in the two_form profile",
    refused(
        "in the two_form profile slots of generated tokens have other numbers than a prompt of these tokens, which"
        " would find them: pass --disable-radix-cache",
        "disable_radix_cache",
        allows=lambda value: value is True,
    ),
    refused("in the two_form profile not tested", "disaggregation_mode", unless=("null",)),
    otherwise=f"Do so, or unset {ATTENTION_VARIABLE}",
)
"""What the `two_form` profile does not serve beside the table of `options`."""


def require_environment() -> None:
    """Raise `EngineError` for a set variable of `ENVIRONMENT`."""
    for name, reason in ENVIRONMENT.items():
        if os.environ.get(name, "").lower() not in ("", "0", "-1", "false"):
            raise EngineError(f"dsv3-plugin does not serve with {name}={os.environ[name]}: {reason}; unset it")


def require_possible_together(values: Mapping[str, Any], layers: int) -> None:
    """Raise `EngineError` for options that are served one by one, and not together, or not with so many layers.

    Args:
        values: SGLang's options as it was started.
        layers: the model's, without the MTP layer.
    """
    require_layers("pp_size", values["pp_size"], layers)
    stages = f"pp_size={values['pp_size']}" if values["pp_size"] > 1 else None
    experts = f"ep_size={values['ep_size']}" if values["ep_size"] != values["tp_size"] else None
    replicas = max(values["dp_size"], values.get("attn_dp_size") or 1)
    shared = values["enable_dp_attention"] and values["tp_size"] > replicas
    for name, nothing, other, reason in (
        (
            "speculative_algorithm",
            None,
            stages,
            "a draft reads the target's embedding, which is on another stage than its head. Leave one of them out",
        ),
        (
            "speculative_algorithm",
            None,
            f"tp_size={values['tp_size']} and dp_size={replicas}" if shared else None,
            "where ranks share a replica's heads, SGLang pads drafts by rows that belong to no request. Leave one of"
            " them out, or set --dp to --tp",
        ),
        ("disaggregation_mode", "null", stages, "not tested with stages. Leave one of them out"),
        ("enable_eplb", False, stages, "SGLang counts the rows of all stages at once. Leave one of them out"),
        (
            "enable_eplb",
            False,
            experts,
            f"SGLang moves experts between as many ranks, and the model's lie on all ranks of the TP group: set"
            f" --ep-size {values['tp_size']}",
        ),
    ):
        if other is not None and values[name] != nothing:
            raise EngineError(f"dsv3-plugin does not serve {name}={values[name]!r} with {other}: {reason}")


def options(dtype: str, *, fp8: bool) -> Options:
    """The table for a model in `dtype` (`bfloat16`, `float32`) whose checkpoint is in fp8 or not."""
    quantized = (None, "unquant", "fp8") if fp8 else (None, "unquant")
    return Options(
        "SGLang",
        *_SCHEDULING,
        *_MODEL,
        refused(
            f"the checkpoint's weights are served as they are, {'in fp8' if fp8 else 'not quantized'}",
            "quantization",
            "speculative_draft_model_quantization",
            unless=quantized,
        ),
        refused(
            "the latent cache has the model's dtype",
            "kv_cache_dtype",
            "speculative_draft_kv_cache_dtype",
            unless=("auto", dtype, *(("bf16",) if dtype == "bfloat16" else ())),
        ),
        *_SPECULATION,
        *_PARALLELISM,
        *_MEMORY,
        *_ANSWERS,
        *_ELSEWHERE,
    )


def set_internal_state(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """Around `Scheduler.set_internal_state`: what does not start is not set later either."""
    model = scheduler.tp_worker.model_runner.model
    if is_ours(model):
        profile = model.ops.setting.profile
        try:
            options(dtype_name(profile.dtype), fp8=profile.is_fp8).require_supported(request.server_args)
        except EngineError as error:
            from sglang.srt.managers.io_struct import SetInternalStateReqOutput

            logger.error("%s", error)
            return SetInternalStateReqOutput(updated=False)
    return original(scheduler, request)


HOOKS: dict[str, Callable[..., Any]] = {
    "sglang.srt.managers.scheduler.Scheduler.set_internal_state": set_internal_state
}

_SCHEDULING = (
    honoured(
        "SGLang's scheduler decides what is computed when; no bit depends on it",
        *("mem_fraction_static", "max_running_requests", "max_queued_requests", "max_total_tokens", "context_length"),
        *("chunked_prefill_size", "max_prefill_tokens", "prefill_max_requests", "enable_mixed_chunk", "page_size"),
        *("prefill_decode_interval", "prefill_decode_interval_min_bs", "num_continuous_decode_steps"),
        *("schedule_policy", "schedule_conservativeness", "scheduler_recv_interval", "disable_overlap_schedule"),
        *("enable_priority_scheduling", "disable_priority_preemption", "default_priority_value", "retraction_policy"),
        *("abort_on_priority_when_disabled", "schedule_low_priority_values_first"),
        *("priority_scheduling_preemption_threshold", "disable_radix_cache", "radix_eviction_policy"),
        *("radix_eviction_policy_config", "enable_prefill_delayer", "prefill_delayer_max_delay_passes"),
        *("prefill_delayer_token_usage_low_watermark", "prefill_delayer_forward_passes_buckets"),
        *("prefill_delayer_wait_seconds_buckets", "prefill_delayer_queue_min_ratio", "prefill_delayer_max_delay_ms"),
        *("min_free_slots_delay", "random_seed", "dp_size", "load_balance_method"),
    ),
    honoured(
        "our attention backend, or any whose pools the model can use",
        *("attention_backend", "decode_attention_backend", "prefill_attention_backend"),
    ),
    honoured(
        "decode and verification run in CUDA graphs, prefill without, and the log says so",
        *("cuda_graph_config", "cuda_graph_backend_decode", "cuda_graph_backend_prefill", "cuda_graph_max_bs_decode"),
        *("cuda_graph_max_bs_prefill", "cuda_graph_bs_decode", "cuda_graph_bs_prefill", "disable_prefill_cuda_graph"),
        *("disable_decode_cuda_graph", "disable_cuda_graph", "disable_cuda_graph_padding", "enable_cudagraph_gc"),
        *("cuda_graph_prefill_max_context", "cuda_graph_max_seq_len_prefill", "cuda_graph_tc_compiler"),
        *("enable_profile_cuda_graph", "debug_cuda_graph"),
    ),
    refused("the model is not compiled", "enable_torch_compile"),
    irrelevant("concerns a compilation that is refused", "enable_torch_compile_debug_mode", "torch_compile_max_bs"),
    refused(
        "the order of its operations is the model's own",
        *("enable_two_batch_overlap", "enable_single_batch_overlap", "enable_pdmux"),
        *("enable_nvidia_megakernel", "enable_amd_monokernel"),
    ),
    irrelevant(
        "concerns something that is refused",
        *("tbo_token_distribution_threshold", "pdmux_config_path", "sm_group_num", "enable_dynamic_chunking"),
    ),
)

_MODEL = (
    honoured(
        "by SGLang, or read with the checkpoint",
        *("model_path", "dtype", "device", "json_model_override_args", "model_loader_extra_config", "revision"),
        *("download_dir", "model_checksum", "delete_ckpt_after_loading", "trust_remote_code", "base_gpu_id"),
        *("gpu_id_step", "weight_loader_disable_mmap", "weight_loader_prefetch_checkpoints"),
        *("weight_loader_prefetch_num_threads", "weight_loader_drop_cache_after_load", "weight_version"),
    ),
    refused(
        "weights come from safetensors files, or by an update after `dummy`",
        *("load_format", "speculative_draft_load_format"),
        unless=("auto", "safetensors", "dummy"),
    ),
    refused("only our own class is served; DSV3_PLUGIN=off serves others", "model_impl", unless=("auto", "sglang")),
    refused("config.json is read by this package", "model_config_parser", unless=("auto",)),
    refused("the model generates", "is_embedding"),
    refused(
        "weights are loaded under their own names, by this package",
        *("custom_weight_loader", "modelexpress_config", "decrypted_config_file", "decrypted_draft_config_file"),
        *("checkpoint_engine_wait_weights_before_ready", "remote_instance_weight_loader_seed_instance_ip"),
        *("remote_instance_weight_loader_start_seed_via_transfer_engine",),
        unless=([],),
    ),
    refused("weights are loaded before the server starts", "startup_weight_load_mode", unless=("serial",)),
    refused("weights belong to one process, which a trainer may update", "weight_cache_mode", unless=("off",)),
    irrelevant(
        "concerns something that is refused",
        *("weight_cache_socket", "weight_cache_timeout", "remote_instance_weight_loader_backend"),
        *("remote_instance_weight_loader_seed_instance_service_port", "engine_info_bootstrap_port"),
        *("remote_instance_weight_loader_send_weights_group_ports",),
    ),
    refused(
        "fp8 is served as the checkpoint has it, and nothing is quantized here",
        *("quantization_param_path", "modelopt_quant", "modelopt_checkpoint_restore_path", "rl_quant_profile"),
        *("modelopt_checkpoint_save_path", "modelopt_export_path", "quantize_and_serve", "torchao_config"),
        *("enable_w4a4_mxfp4_megamoe", "speculative_enable_w4a4_mxfp4_megamoe"),
        unless=("",),
    ),
    refused("torch's own products keep the precision of the contract", "enable_tf32_matmul"),
    irrelevant("logits are fp32 in any case", "enable_fp32_lm_head"),
    refused("what runs inside the model would be neither seen nor certified", "forward_hooks"),
    refused("a dump must not feed the model", "debug_tensor_dump_input_file"),
    irrelevant(
        "only looks",
        *("debug_tensor_dump_output_folder", "debug_tensor_dump_layers", "msprobe_dump_config"),
        *("enable_layerwise_nvtx_marker",),
    ),
    refused("LoRA adapters are not served", "enable_lora", "lora_paths", "uno_lora_path", unless=([], {})),
    irrelevant(
        "concerns LoRA adapters, which are refused",
        *("enable_lora_overlap_loading", "max_lora_rank", "lora_target_modules", "max_loaded_loras"),
        *("max_loras_per_batch", "lora_eviction_policy", "lora_backend", "max_lora_chunk_size"),
        *("experts_shared_outer_loras", "lora_use_virtual_experts", "lora_strict_loading"),
        *("lora_drain_wait_threshold",),
    ),
)

_SPECULATION = (
    refused("MTP is the only draft", "speculative_algorithm", unless=("EAGLE", "NEXTN")),
    refused("MTP drafts a chain of tokens", "speculative_eagle_topk", unless=(1,)),
    honoured(
        "by SGLang's draft worker",
        *("speculative_num_steps", "speculative_num_draft_tokens", "speculative_draft_model_path"),
        *("speculative_draft_model_revision", "speculative_attention_mode"),
    ),
    refused(
        "a token is drawn from the target's distribution, whatever was drafted",
        *("speculative_accept_threshold_single", "speculative_accept_threshold_acc"),
        *("speculative_use_rejection_sampling", "speculative_use_block_verification"),
        unless=(1, 1.0),
    ),
    refused("the draft has the target's head", "speculative_token_map"),
    refused("the draft's attention sees all tokens", "speculative_draft_window_size", "speculative_draft_sink_size"),
    refused("the draft's attention is the target's", "speculative_draft_attention_backend", unless=(attention.NAME,)),
    refused(
        "not tested with this draft",
        *("enable_multi_layer_eagle", "speculative_adaptive", "decoupled_spec_role"),
        unless=("null",),
    ),
    irrelevant(
        "concerns another draft than MTP, or something that is refused",
        *("speculative_dflash_block_size", "speculative_dspark_block_size", "speculative_dspark_sps_table_path"),
        *("speculative_dspark_confidence_sts_path", "speculative_dspark_align_verify_tokens_to_graph_tier"),
        *("speculative_adaptive_config", "decoupled_spec_bind_endpoint", "decoupled_spec_connect_endpoints"),
        *("decoupled_spec_rank", "spec_trace_dir", "speculative_ngram_min_bfs_breadth"),
        *("speculative_ngram_max_bfs_breadth", "speculative_ngram_match_type", "speculative_ngram_max_trie_depth"),
        *("speculative_ngram_capacity", "speculative_ngram_external_corpus_path", "speculative_dsa_topk_backend"),
        *("speculative_ngram_external_sam_budget", "speculative_ngram_external_corpus_max_tokens"),
        *("speculative_domino_candidate_pool_size", "speculative_moe_runner_backend"),
        *("speculative_skip_dp_mlp_sync", "speculative_boundary_reduction"),
    ),
)

_PARALLELISM = (
    honoured(
        "ranks hold parts of the model, and no bit depends on how many there are (`layout`)",
        *("tp_size", "pp_size", "ep_size", "attn_dp_size", "enable_dp_attention", "enable_dp_lm_head", "nnodes"),
        *("pp_max_micro_batch_size", "pp_async_batch_depth", "dist_timeout"),
        *("dist_init_addr", "nccl_port", "gated_launch_port", "node_rank"),
    ),
    refused(
        "a sequence's tokens are on one attention TP group",
        *("attn_cp_size", "dcp_size", "enable_prefill_cp", "enable_prefill_context_parallel"),
        *("enable_dsa_prefill_context_parallel", "enable_kv_cache_sharding", "enable_cp_decode_attn_tp"),
        unless=(1,),
    ),
    refused(
        "routed experts are spread over all ranks of the TP group, each whole on one",
        *("moe_dp_size", "dwdp_size"),
        unless=(1,),
    ),
    refused(
        "attention's TP ranks share dense and shared experts, and each has all rows between layers",
        *("moe_dense_tp_size", "shared_experts_tp_size", "enable_shared_experts_attn_tp", "enable_dense_mlp_attn_tp"),
        *("enable_attn_tp_input_scattered", "enable_layernorm_sp"),
    ),
    refused("all ranks take an update of the weights together", "enable_dp_attention_local_control_broadcast"),
    refused("what travels between ranks keeps its bits", "enable_quant_communications"),
    honoured(
        "experts lie where SGLang has them, and a move changes no bit (`eplb`)",
        *("ep_num_redundant_experts", "init_expert_location", "enable_eplb", "eplb_algorithm"),
        *("eplb_rebalance_num_iterations", "eplb_rebalance_layers_per_chunk"),
        *("eplb_min_rebalancing_utilization_threshold", "expert_distribution_recorder_buffer_size"),
    ),
    refused("an expert's rows go to its replicas in turns", "ep_dispatch_algorithm", unless=("static", "dynamic")),
    refused(
        "rows are counted by expert, and not told token by token",
        "expert_distribution_recorder_mode",
        unless=("stat",),
    ),
    refused(
        "the number of ranks is fixed, each has its experts, and how even their loads are is not reported",
        *("elastic_ep_backend", "enable_elastic_expert_backup", "enable_waterfill", "ep_join_mode", "max_ep_size"),
        *("elastic_ep_initial_size", "elastic_ep_rejoin", "enable_paged_experts"),
        *("expert_balancedness_report_mode", "enable_expert_distribution_metrics"),
        unless=("none", "off"),
    ),
    refused(
        "these backends add up rows in orders of their own; the model's exchange adds nothing",
        *("moe_a2a_backend", "speculative_moe_a2a_backend"),
        unless=("none",),
    ),
    irrelevant(
        "chooses among SGLang's reductions and gathers of the model's rows, which this model does not use",
        *("disable_attn_tp_gather", "enable_tp_lm_head_all_to_all", "enable_nccl_nvls", "enable_symm_mem"),
        *("disable_custom_all_reduce", "enable_mscclpp", "enable_torch_symm_mem", "boundary_reduction"),
        *("enable_flashinfer_allreduce_fusion", "enforce_disable_flashinfer_allreduce_fusion"),
        *("flashinfer_allreduce_fusion_backend", "enable_aiter_allreduce_fusion", "enable_fused_moe_sum_all_reduce"),
        *("disable_aiter_allreduce_fusion_in_prefill", "disable_aiter_allreduce_fusion_in_decode"),
        *("deepep_v2_mode", "deepep_mode", "fuseep_mode", "deepep_dispatcher_output_dtype", "deepep_config"),
        *("flashinfer_a2a_dispatch_type", "pre_warm_nccl", "enable_p2p_check"),
    ),
    irrelevant(
        "concerns something that is refused",
        *("dcp_comm_backend", "dcp_replicate_q_proj", "cp_strategy", "prefill_cp_mode", "dsa_prefill_cp_mode"),
        *("enable_dsa_cache_layer_split", "enable_cp_tp_group_sharing", "elastic_ep_scale_timeout"),
        *("mooncake_ib_device", "ep_join_rank_offset", "enable_megamoe_for_layernorm_sp"),
        *("paged_experts_num_resident",),
    ),
)

_MEMORY = (
    honoured(
        "what prefill computed is copied into the pool of decode, bit for bit",
        *("disaggregation_mode", "disaggregation_transfer_backend", "disaggregation_bootstrap_port"),
        *("disaggregation_ib_device", "disaggregation_decode_enable_radix_cache", "num_reserved_decode_tokens"),
        *("disaggregation_decode_retraction_backup", "disaggregation_decode_extra_slots"),
        *("optimistic_prefill_attempts", "disaggregation_decode_polling_interval"),
        *("disaggregation_enable_kv_checksum", "disaggregation_decode_host_receive_threshold"),
        *("disaggregation_decode_allocation_policy",),
    ),
    honoured(
        "weights that were released must come again before anything answers",
        *("enable_memory_saver", "enable_weights_cpu_backup", "enable_draft_weights_cpu_backup"),
    ),
    refused(
        "all weights stay on the device",
        *("cpu_offload_gb", "offload_group_size", "kt_weight_path"),
        unless=(0, -1),
    ),
    refused(
        "the latent cache is a pool of one device that an update of the weights empties",
        *("enable_hierarchical_cache", "hicache_storage_backend", "enable_lmcache", "enable_flexkv"),
        *("enable_unified_cache_external_linker", "radix_cache_backend", "enable_page_major_kv_layout"),
        *("enable_unified_memory", "enable_hisparse", "prefill_only_disable_kv_cache", "enable_streaming_session"),
        *("enable_session_radix_cache", "disaggregation_decode_enable_offload_kvcache"),
        *("enable_pd_role_switch", "kv_canary", "kv_canary_real_data"),
        unless=("null", "none"),
    ),
    irrelevant(
        "concerns something that is refused",
        *("offload_num_in_group", "offload_prefetch_step", "offload_mode", "hicache_host_memory_mode"),
        *("hicache_ratio", "hicache_size", "hicache_write_policy", "hicache_io_backend", "hicache_mem_layout"),
        *("hicache_storage_prefetch_policy", "hicache_storage_backend_extra_config", "hisparse_config"),
        *("hicache_storage_prefetch_retry_poll_interval", "hicache_storage_prefetch_retry_max_attempts"),
        *("hicache_host_memory_fraction", "enable_linker_mla_dedup", "unified_cache_external_linker_backend"),
        *("unified_cache_external_linker_config", "lmcache_config_file", "flexkv_config_file", "kt_method"),
        *("kt_cpuinfer", "kt_threadpool_count", "kt_num_gpu_experts", "kt_max_deferred_experts_per_token"),
        *("kv_canary_sweep_interval", "ple_offload_embedding", "ple_offload_backend", "ple_offload_dir"),
    ),
)

_ANSWERS = (
    honoured(
        "log-probabilities are log-softmax with it and without; seeds hold with it", "enable_deterministic_inference"
    ),
    refused("it rounds logits to bfloat16 before their log-softmax", "rl_on_policy_target"),
    honoured("draws the tokens of requests without a seed", "sampling_backend"),
    honoured(
        "defaults that SGLang fills into requests",
        *("sampling_defaults", "preferred_sampling_params"),
    ),
    honoured("the model's normalized hidden states", "enable_return_hidden_states", "return_hidden_states_mode"),
    refused(
        "nothing of the model's inside is answered",
        *("enable_return_routed_experts", "enable_return_indexer_topk", "enable_return_aux_hidden_states"),
        *("aux_hidden_state_capture", "return_aux_hidden_state_layer_ids"),
        unless=([],),
    ),
    refused(
        "what is drawn, and what is said of it, are the logits' own",
        *("enable_custom_logit_processor", "enable_watermark", "watermark_default_enabled", "watermark_enforce_all"),
        *("enable_mis", "dllm_algorithm", "mlx_enable_sampling"),
    ),
    irrelevant(
        "concerns something that is refused",
        *("watermark_config", "watermark_key", "watermark_key_b", "watermark_context_window"),
        *("watermark_mixing_probability", "watermark_max_probability", "dllm_algorithm_config", "dllm_fdfo"),
        *("sampling_mask_max_tokens",),
    ),
    honoured(
        "SGLang's grammars mask logits before the model's log-softmax",
        *("grammar_backend", "constrained_json_whitespace_pattern", "constrained_json_disable_any_whitespace"),
        *("constrained_json_max_whitespace_cnt", "disable_outlines_disk_cache"),
    ),
)

_ELSEWHERE = (
    irrelevant(
        "chooses among kernels of SGLang's own models",
        *("mm_attention_backend", "fp8_gemm_runner_backend", "fp4_gemm_runner_backend", "bf16_gemm_backend"),
        *("dsa_prefill_backend", "dsv4_prefill_backend", "dsa_decode_backend", "dsa_paged_mqa_logits_backend"),
        *("dsa_topk_backend", "disable_flashinfer_autotune", "flashinfer_autotune_skip_ops", "mamba_backend"),
        *("triton_attention_reduce_in_fp32", "triton_attention_num_kv_splits", "triton_attention_split_tile_size"),
        *("flashinfer_mla_disable_ragged", "enable_fused_qk_norm_rope", "enable_precise_embedding_interpolation"),
        *("enable_deepseek_v4_fp4_indexer", "enable_scattered_sconv", "moe_runner_backend", "enable_lean_attention"),
        *("flashinfer_mxfp4_moe_precision", "disable_flashinfer_cutlass_moe_fp4_allgather", "dsv4_attn_backend"),
        *("disable_shared_experts_fusion", "enforce_shared_experts_fusion", "disable_chunked_prefix_cache"),
        *("prefill_kv_cache_dequant_dtype", "dsa_triton_union", "enable_dsa_fused_indexer", "qsa_indexer_dtype"),
    ),
    irrelevant(
        "concerns layers that this model has not",
        *("swa_full_tokens_ratio", "disable_hybrid_swa_memory", "swa_prefix_tails", "c128_page_size"),
        *("enable_encoder_swa_bounded_replay", "enable_decoder_swa_bounded_replay", "max_mamba_cache_size"),
        *("mamba_ssm_dtype", "mamba_max_states_per_path", "enable_mamba_cache_stochastic_rounding"),
        *("mamba_cache_philox_rounds", "mamba_full_memory_ratio", "mamba_radix_cache_strategy"),
        *("uses_mamba_radix_cache", "mamba_track_interval", "enable_int8_mamba_checkpoint", "int8_mamba_ckpt_size"),
        *("linear_attn_backend", "linear_attn_decode_backend", "linear_attn_prefill_backend"),
        *("linear_attn_verify_backend", "enable_linear_replayssm", "linear_replayssm_cache_len"),
        *("enable_linear_replayssm_spec",),
    ),
    irrelevant(
        "concerns images, sound or an encoder",
        *("enable_multimodal", "enable_broadcast_mm_inputs_process", "enable_prefix_mm_cache", "mm_process_config"),
        *("mm_enable_dp_encoder", "mm_processor_worker_num", "mm_io_worker_num", "allowed_media_domains"),
        *("media_url_max_file_size_mb", "mm_preprocess_cache_size_mb", "trust_mm_content_hashes"),
        *("limit_mm_data_per_request", "enable_mm_global_cache", "image_processor_backend"),
        *("mm_global_cache_backend", "disable_fast_image_processor", "mm_feature_transport", "encoder_only"),
        *("keep_mm_feature_on_device", "language_only", "language_model_only", "encoder_transfer_backend"),
        *("encoder_urls", "encoder_bootstrap_port", "encoder_register_urls", "asr_max_buffer_seconds"),
        *("enable_adaptive_dispatch_to_encoder", "asr_max_concurrent_sessions"),
    ),
    irrelevant(
        "text, tokens and HTTP, around the model",
        *("tokenizer_path", "tokenizer_mode", "tokenizer_backend", "tokenizer_worker_num", "detokenizer_worker_num"),
        *("skip_tokenizer_init", "served_model_name", "chat_template", "hf_chat_template_name"),
        *("completion_template", "file_storage_path", "enable_cache_report", "return_input_ids", "return_output_ids"),
        *("reasoning_parser", "default_chat_template_kwargs", "strip_thinking_cache", "enable_strict_thinking"),
        *("tool_call_parser", "tool_server", "allow_auto_truncate", "stream_interval", "batch_notify_size"),
        *("stream_response_default_include_usage", "incremental_streaming_output", "trust_request_chat_template"),
        *("enable_dynamic_batch_tokenizer", "dynamic_batch_tokenizer_batch_size", "enable_response_store"),
        *("dynamic_batch_tokenizer_batch_timeout", "enable_tokenizer_batch_encode"),
        *("disable_tokenizer_batch_decode", "host", "port", "fastapi_root_path", "smg_grpc_mode", "grpc_mode"),
        *("grpc_port", "grpc_worker_threads", "grpc_response_timeout_secs", "sidecar", "sidecar_args"),
        *("skip_server_warmup", "warmups", "enable_http2", "http2_max_concurrent_streams"),
        *("http2_initial_connection_window_size", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs"),
        *("ssl_keyfile_password", "enable_ssl_refresh", "api_key", "admin_api_key"),
        *("enable_http_worker_reuseport",),
    ),
    irrelevant(
        "processes, logs and metrics",
        *("watchdog_timeout", "soft_watchdog_timeout", "sleep_on_idle", "use_ray", "custom_sigquit_handler"),
        *("numa_node", "gc_threshold", "log_level", "log_level_http", "log_requests", "log_requests_level"),
        *("log_requests_format", "log_requests_target", "uvicorn_access_log_exclude_prefixes"),
        *("crash_dump_folder", "show_time_cost", "enable_metrics", "smg_http_sidecar_port", "enable_mfu_metrics"),
        *("enable_metrics_for_all_schedulers", "load_snapshot_publish_interval", "extra_metric_labels"),
        *("tokenizer_metrics_custom_labels_header", "tokenizer_metrics_allowed_custom_labels"),
        *("bucket_time_to_first_token", "bucket_inter_token_latency", "bucket_e2e_request_latency"),
        *("prompt_tokens_buckets", "generation_tokens_buckets", "gc_warning_threshold_secs"),
        *("decode_log_interval", "enable_request_time_stats_logging", "kv_events_config"),
        *("load_publish_endpoint", "enable_forward_pass_metrics", "forward_pass_metrics_worker_id"),
        *("forward_pass_metrics_ipc_name", "enable_trace", "trace_modules", "otlp_traces_endpoint"),
        *("otlp_service_name", "export_metrics_to_file", "export_metrics_to_file_dir", "stat_loggers"),
    ),
)
