"""Every argument of Megatron's command line and every field of its `TransformerConfig`, with what becomes of it.

Where Megatron has both they have one name, and one rule here. `require_supported` asks both tables: refused options are
named with their reason, and those that describe the model must be what the checkpoint's configuration says.

"Right" means: a feature that only moves work (pipeline, expert and data parallel ranks, recomputation, overlaps) gives
the bits of the plain run; one that splits a sum of gradients over ranks is right to the order of that sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from dsv3_plugin.config import DeepseekV3Config
from dsv3_plugin.errors import EngineError
from dsv3_plugin.options import Options, honoured, irrelevant, refused

_LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")


def _balances(value: Any) -> bool:
    return all(kind in _LOSSES for kind in (value if isinstance(value, list) else [value]))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


OF_MODEL = honoured(
    "the checkpoint's configuration says it, and another value is refused",
    *_names("""
    num_layers hidden_size ffn_hidden_size num_attention_heads q_lora_rank kv_lora_rank qk_head_dim
    qk_pos_emb_head_dim v_head_dim rope_type rotary_base rotary_scaling_factor original_max_position_embeddings
    beta_fast beta_slow mscale mscale_all_dim max_position_embeddings normalization layernorm_epsilon qk_layernorm
    multi_latent_attention position_embedding_type swiglu gated_linear_unit add_bias_linear
    untie_embeddings_and_output_weights padded_vocab_size mtp_num_layers num_experts num_moe_experts moe_layer_freq
    moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_router_topk moe_router_num_groups
    moe_router_group_topk moe_router_topk_scaling_factor moe_router_score_function moe_router_dtype
    moe_router_enable_expert_bias bf16 params_dtype
    """),
)

OPTIONS = Options(
    "Megatron",
    OF_MODEL,
    # The model.
    honoured("the tokenizer's, which the embedding must hold; checked beside the model's", "vocab_size"),
    refused("the arithmetic has bf16, fp32 and fp8 alone", "fp16", "enable_autocast", "fp16_lm_cross_entropy"),
    refused("the residual stream is in the model's dtype", "fp32_residual_connection"),
    refused("the model was trained without dropout", "hidden_dropout", "attention_dropout", unless=(0.0, 0)),
    refused(
        "DeepSeek-V3 has no such part",
        *_names("""
        add_qkv_bias apply_residual_connection_post_layernorm layernorm_zero_centered_gamma qk_l2_norm qk_clip
        attention_output_gate experimental_attention_variant use_mup apply_query_key_layer_scaling squared_relu
        quick_geglu openai_gelu activation_func_clamp_value window_size window_attn_skip_freq no_rope_freq
        linear_attention_freq moe_shared_expert_gate moe_latent_size moe_router_pre_softmax moe_apply_probs_on_input
        mrope_section group_query_attention heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
        heterogeneous_block_specs hetereogenous_dist_checkpoint decoder_num_layers vision_pretraining
        biencoder_shared_query_context_model mtp_use_repeated_layer moe_router_topk_limited_devices
        fused_residual_rmsnorm use_fused_weighted_squared_relu
        """),
    ),
    refused(
        "Megatron's own DeepSeek-V3 is a GPTModel; HybridModel's layers, attention and MLP apart, are other modules",
        "hybrid_layer_pattern",
        "hybrid_override_pattern",
        "mtp_hybrid_override_pattern",
        "is_hybrid_model",
    ),
    refused("the residual stream and the softmax are the model's", "glu_linear_offset", unless=(0.0, 0)),
    refused("attention has the plain softmax", "softmax_type", unless=("vanilla",)),
    refused("attention's scale follows from the checkpoint", "softmax_scale"),
    refused("activations are SiLU's", "activation_func", allows=lambda value: value is torch.nn.functional.silu),
    refused("rotary positions are those of the checkpoint", "rotary_percent", unless=(1.0, 1)),
    refused(
        "rotary positions are those of the checkpoint (rope_type, rotary_base, rotary_scaling_factor)",
        *_names("""
        rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling use_rotary_position_embeddings
        yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow
        """),
    ),
    refused("rotary positions are those of the checkpoint", "yarn_correction_range_round_to_int", unless=(True,)),
    refused("the embedding has no positions to leave out", "add_position_embedding", unless=(True,)),
    irrelevant(
        "belongs to a kind of positions, attention or layer that is refused",
        *_names("""
        rope_scaling_factor relative_attention_num_buckets relative_attention_max_distance qk_clip_alpha
        qk_clip_threshold dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq
        dsa_indexer_skip_topk_offset dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_kernel_backend
        dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon
        dsa_indexer_k_norm_fp32 linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads
        linear_num_value_heads mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult
        mup_base_head_dim mup_attn_scale_power mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads
        use_mamba_mem_eff_path mamba_training_ssm_states_dtype mamba_inference_conv_states_dtype
        mamba_inference_ssm_states_dtype experimental_attention_variant_loss_scale_func
        moe_shared_expert_glu_interleave_size moe_mlp_glu_interleave_size attention_softmax_in_fp32 onnx_safe
        bert_binary_head
        """),
    ),
    irrelevant("MLA has neither; Megatron's own does not read them", "num_query_groups", "kv_channels"),
    irrelevant("Megatron does not take it beside num_layers", "encoder_num_layers"),
    irrelevant("the vocabulary is the checkpoint's, unpadded", "make_vocab_size_divisible_by", "pad_vocab_size"),
    honoured(
        "the weights that a run without a checkpoint begins with",
        "init_method_std",
        "init_method",
        "embedding_init_method_std",
        "embedding_init_method",
        "init_method_xavier_uniform",
        "perform_initialization",
        "seed",
        "data_parallel_random_init",
        "use_cpu_initialization",
    ),
    irrelevant("every matrix begins as init_method says, as in the report", "output_layer_init_method"),
    refused("the core's parameters are made on their device", "init_model_with_meta_device"),
    # Losses.
    honoured(
        "Megatron's own losses and counters, over the core's router",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_bias_update_rate",
        "mtp_loss_scaling_factor",
        "mtp_detach_heads",
        "calculate_per_token_loss",
    ),
    refused(
        f"tokens are routed as the checkpoint says, and balanced by {', '.join(_LOSSES)}",
        "moe_router_load_balancing_type",
        allows=_balances,
    ),
    irrelevant("belongs to quantile balancing, which is refused", "moe_router_quantile_balancing_ema"),
    refused(
        "tokens are routed as the checkpoint says, and none is dropped or moved",
        *_names("""
        moe_router_force_load_balancing moe_router_force_biased moe_enable_routing_replay moe_input_jitter_eps
        moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_router_padding_for_quantization
        moe_router_padding_for_fp8 moe_expert_rank_capacity_factor moe_pad_experts_for_cuda_graph_inference
        moe_token_dropping moe_use_upcycling
        """),
    ),
    irrelevant("belongs to what is refused", "moe_token_drop_policy", "moe_upcycling_granularity"),
    refused("Megatron's fused loss rounds the gradient of the fp32 logits to bf16", "cross_entropy_loss_fusion"),
    irrelevant("of a fused loss, which is refused", "cross_entropy_fusion_impl"),
    # Which implementation.
    refused(
        "what is FP8 the checkpoint says; of formats e4m3 may be named, with --fp8-recipe blockwise",
        "fp8",
    ),
    irrelevant("says of --fp8-format how it scales; checked beside it", "fp8_recipe"),
    refused(
        "the layers are the core's; TransformerEngine's modules are not used",
        "fp4",
        "fp8_param",
        "fp8_param_gather",
        "fp4_param",
        "fp4_param_gather",
        "fp8_dot_product_attention",
        "fp8_multi_head_attention",
        "te_precision_config_file",
        "quant_recipe",
        "use_kitchen",
        "use_kitchen_attention",
        "kitchen_config_file",
        "kitchen_recipe_number",
        "reuse_grad_buf_for_mxfp8_param_ag",
        "activation_func_fp8_input_store",
    ),
    irrelevant(
        "belongs to TransformerEngine's modules, which are not used",
        *_names("""
        fp8_quantizer_factory fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad
        fp8_output_proj first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16
        kitchen_attention_backend fp4_recipe fp4_quantizer_factory tp_only_amax_red disable_parameter_transpose_cache
        keep_fp8_transpose_cache
        """),
    ),
    irrelevant(
        "chooses among kernels of Megatron's own layers; the core's are bound by their contracts",
        *_names("""
        attention_backend flash_attention_version use_flash_attn masked_softmax_fusion bias_gelu_fusion
        no_persist_layer_norm persist_layer_norm memory_efficient_layer_norm moe_grouped_gemm
        use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert moe_single_grouped_weight
        moe_single_grouped_bias use_te_activation_func use_transformer_engine_op_fuser mla_down_proj_fusion
        fused_single_qkv_rope disable_jit_fuser deterministic_mode clone_scatter_output_in_embedding
        bias_swiglu_fusion bias_activation_fusion apply_rope_fusion
        """),
    ),
    refused(
        "Megatron's fused kernel has another arithmetic",
        "bias_dropout_fusion",
        "gradient_accumulation_fusion",
        "moe_router_fusion",
        "moe_permute_fusion",
    ),
    refused("it replaces torch's operators; the contracts hold in every batch without", "batch_invariant_mode"),
    refused("the layers are for training", "transformer_impl", unless=("local", "transformer_engine")),
    honoured("for the products in backward passes", "disable_bf16_reduced_precision_matmul"),
    refused(
        "--hf-config's model is built by model_config or model_provider of this package",
        "spec",
        "yaml_cfg",
        "use_checkpoint_args",
        "use_mp_args_from_checkpoint_args",
    ),
    irrelevant("of an argument that is refused", "use_tokenizer_model_from_checkpoint_args"),
    refused(
        "no CUDA graph of a training step has been tried",
        "enable_cuda_graph",
        "external_cuda_graph",
        "optimizer_cuda_graph",
        "cuda_graph_scope",
        "cuda_graph_scope_deprecated",
        "rl_training_cuda_graphs",
    ),
    refused("no CUDA graph of a training step has been tried", "cuda_graph_impl", unless=("none",)),
    irrelevant(
        "belongs to CUDA graphs, which are refused",
        "cuda_graph_warmup_steps",
        "cuda_graph_modules",
        "cuda_graph_use_single_mempool",
        "cuda_graph_retain_backward_graph",
        "inference_cuda_graph_scope",
        "use_te_rng_tracker",
        "te_rng_tracker",
    ),
    # Parallel ranks.
    honoured(
        "sums in as many slices give one rank's bits; checked beside the number of slices",
        "tensor_model_parallel_size",
        "sequence_parallel",
        "expert_model_parallel_size",
    ),
    refused("routed experts are whole on a rank", "expert_tensor_parallel_size", unless=(1,)),
    honoured(
        "stages move layers and no bit",
        *_names("""
        pipeline_model_parallel_size virtual_pipeline_model_parallel_size pipeline_model_parallel_comm_backend
        pipeline_model_parallel_layout decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
        num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage num_layers_per_virtual_pipeline_stage
        num_virtual_stages_per_pipeline_rank account_for_embedding_in_pipeline_split
        account_for_loss_in_pipeline_split microbatch_group_size_per_vp_stage overlap_p2p_comm
        overlap_p2p_comm_warmup_flush batch_p2p_comm batch_p2p_sync deallocate_pipeline_outputs pipeline_dtype
        variable_seq_lengths mtp_standalone use_tp_pp_dp_mapping num_microbatches_with_partial_activation_checkpoints
        """),
    ),
    refused("a sequence is whole on its ranks", "context_parallel_size", unless=(1,)),
    refused(
        "a sequence is whole on its ranks",
        "hybrid_context_parallel",
        "hierarchical_context_parallel_sizes",
        "max_seqlen_per_dp_cp_rank",
    ),
    irrelevant("belongs to context parallelism, which is refused", "cp_comm_type"),
    honoured(
        "as many as tensor-parallel ranks; what is over is gtp_weight_remat_size",
        "tensor_parallel_num_weight_shards",
        "expert_tensor_parallel_num_weight_shards",
    ),
    refused(
        "weights are not cut over the data-parallel ranks (tensor_parallel_num_weight_shards)",
        "gtp_weight_remat_size",
        "expert_gtp_weight_remat_size",
        unless=(1,),
    ),
    refused("weights are not cut over the data-parallel ranks", "use_megatron_fsdp", "use_torch_fsdp2"),
    irrelevant(
        "belongs to fully sharded data parallelism, which is refused",
        *_names("""
        fsdp_manual_registration data_parallel_sharding_strategy outer_dp_sharding_strategy fsdp_double_buffer
        enable_full_sharding_in_hsdp torch_fsdp2_reshard_after_forward megatron_fsdp_main_params_dtype
        megatron_fsdp_main_grads_dtype megatron_fsdp_grad_comm_dtype megatron_fsdp_enable_fine_grained_param_gather
        megatron_fsdp_max_pool_double_buffer fsdp_db_use_persist_buf_on_alloc_fail suggested_communication_unit_size
        create_all_gather_group strict_fsdp_dtensor_load
        """),
    ),
    refused(
        "flex (DeepEP, HybridEP) and allgather add up a token's experts rank by rank, rounded in between;"
        " all-to-all brings the rows, which are added in the contract's order",
        "moe_token_dispatcher_type",
        unless=("alltoall",),
    ),
    refused("DeepEP adds up a token's experts rank by rank, rounded in between", "moe_enable_deepep"),
    irrelevant(
        "belongs to the flexible dispatcher, which is refused",
        *_names("""
        moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep moe_hybridep_pad_uneven_dispatch_inputs
        moe_flex_dispatcher_num_sms moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute
        moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing moe_ncclep_static_shape
        moe_ncclep_zero_copy high_priority_a2a_comm_stream
        """),
    ),
    honoured("one micro-batch computes while another's tokens travel", "overlap_moe_expert_parallel_comm"),
    refused(
        "a layer of the core is one piece, which Megatron cannot take apart",
        *_names("""
        moe_shared_expert_overlap delay_wgrad_compute
        overlap_dispatch_backward_with_experts_wgrad ep_overlap_early_attn_memory_release
        defer_embedding_wgrad_compute tp_comm_overlap use_ring_exchange_p2p
        """),
    ),
    irrelevant(
        "belongs to an overlap that is refused",
        *_names("""
        wgrad_deferral_limit tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_overlap_ag tp_comm_overlap_rs
        tp_comm_overlap_rs_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_atomic_ag tp_comm_atomic_rs
        tp_comm_overlap_disable_qkv tp_comm_overlap_disable_fc1 tp_comm_bootstrap_backend tp_comm_overlap_cfg
        symmetric_ar_type
        """),
    ),
    # Memory.
    honoured(
        "recomputed parts give the same gradients; their names are checked",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "recompute_activations",
        "moe_layer_recompute",
    ),
    refused(
        "activations are kept or recomputed, not moved or shared out",
        *_names("""
        distribute_saved_activations cpu_offloading fine_grained_activation_offloading moe_paged_stash
        delay_offload_until_cuda_graph
        """),
    ),
    refused("activations are kept or recomputed, not moved", "cpu_offloading_num_layers", unless=(0,)),
    irrelevant(
        "belongs to offloading, which is refused",
        *_names("""
        cpu_offloading_retain_pinned_cpu_buffers _cpu_offloading_context cpu_offloading_activations
        cpu_offloading_weights cpu_offloading_double_buffering offload_modules min_offloaded_tensor_size
        delta_offload_bytes_across_pp_ranks activation_offload_fraction fine_grained_offloading_max_inflight_offloads
        moe_paged_stash_page_size moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu
        """),
    ),
    refused("a whole sequence is one piece", "mlp_chunks_for_training", unless=(1,)),
    # The optimizer and its ranks.
    honoured(
        "Megatron's own optimizer, over the model's gradients",
        *_names("""
        use_distributed_optimizer overlap_grad_reduce overlap_param_gather align_grad_reduce align_param_gather
        ddp_num_buckets ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw ddp_reduce_scatter_with_fp32_accumulation
        ddp_param_name_patterns_for_fp32_local_accumulation ddp_average_in_collective gradient_reduce_div_fusion
        accumulate_allreduce_grads_in_fp32 grad_reduce_in_bf16 num_distributed_optimizer_instances nccl_ub
        disable_symmetric_registration weight_decay start_weight_decay end_weight_decay weight_decay_incr_style
        clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum lr min_lr decoupled_lr decoupled_min_lr lr_decay_style
        lr_wsd_decay_style lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples lr_warmup_fraction
        lr_warmup_iters lr_warmup_samples lr_warmup_init override_opt_param_scheduler
        use_checkpoint_opt_param_scheduler check_for_nan_in_loss_and_grad check_for_large_grads
        """),
    ),
    refused("gathering inside the optimizer's step has not been tried", "overlap_param_gather_with_optimizer_step"),
    refused("other optimizers than these know Megatron's own weights alone", "optimizer", unless=("adam", "sgd")),
    irrelevant(
        "belongs to an optimizer that is refused",
        *_names("""
        muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec muon_coefficient_type
        muon_num_ns_steps muon_tp_mode muon_extra_scale_factor muon_scalar_optimizer lion_beta1 lion_beta2
        use_layer_wise_param_layout
        """),
    ),
    refused(
        "the names of its norms are those of Megatron's own attention",
        "apply_wd_to_qk_layernorm",
        "no_weight_decay_cond_type",
    ),
    honoured("moments in bf16, by TransformerEngine's Adam or ours", "use_precision_aware_optimizer"),
    refused(
        "moments are fp32 or bf16",
        "exp_avg_dtype",
        "exp_avg_sq_dtype",
        unless=("fp32", torch.float32, "bf16", torch.bfloat16),
    ),
    refused(
        "main parameters and gradients are fp32, as in the report",
        "main_grads_dtype",
        "main_params_dtype",
        unless=("fp32", torch.float32),
    ),
    refused("has not been tried", "optimizer_cpu_offload"),
    irrelevant(
        "belongs to an offloaded optimizer, which is refused",
        "optimizer_offload_fraction",
        "use_torch_optimizer_for_cpu_offload",
        "overlap_cpu_optimizer_d2h_h2d",
        "pin_cpu_grads",
        "pin_cpu_params",
    ),
    refused("a run learns", "freeze_all_layers"),
    irrelevant(
        "scales the gradients of fp16, which is refused",
        "loss_scale",
        "initial_loss_scale",
        "min_loss_scale",
        "loss_scale_window",
        "hysteresis",
    ),
    # The course of a run.
    honoured(
        "Megatron's own loop",
        *_names("""
        micro_batch_size global_batch_size step_batch_size_schedule decrease_batch_size_if_needed train_iters
        train_samples exit_interval exit_duration_in_mins exit_signal_handler exit_signal
        exit_signal_handler_for_dataloader exit_signal_handler_for_training iterations_to_skip eval_iters
        eval_interval start_eval_at_iter eval_global_batch_size eval_micro_batch_size skip_train full_validation
        multiple_validation_sets validation_set_names rerun_mode check_for_spiky_loss empty_unused_memory_level
        """),
    ),
    refused("Megatron-Core 0.19 does not look at it: give --step-batch-size-schedule", "rampup_batch_size"),
    refused("Megatron no longer takes it", "batch_size", "warmup", "model_parallel_size", "checkpoint_activations"),
    refused("faults are not to be had by accident", "error_injection_rate", unless=(0, 0.0)),
    refused(
        "faults are not to be had by accident", "fault_injector_ranks", "fault_injector_num_ranks", "fake_process_group"
    ),
    irrelevant(
        "belongs to injected faults, which are refused",
        "error_injection_type",
        "fault_injector_fault_types",
        "fault_injector_fault_probabilities",
        "fault_injector_fault_delay",
        "fault_injector_delay_start_iteration",
        "fault_injector_mtti_seconds",
        "fault_injector_offset_seconds",
        "fault_injector_seed",
    ),
    refused("servers sample, by their own calls; see examples/on_policy.py", "perform_rl_step"),
    irrelevant(
        "belongs to Megatron's own reinforcement learning, which is refused",
        *_names("""
        rl_prompts_per_eval grpo_prompts_per_step grpo_group_size rl_generation_lag rl_submission_granularity
        rl_consumption_granularity grpo_iterations grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_kl_beta
        grpo_entropy_term_weight grpo_filter_groups_with_same_reward langrl_env_config rl_default_temperature
        rl_default_top_p rl_default_top_k rl_offload_optimizer_during_inference rl_kv_cache_management_mode
        rl_persist_cuda_graphs rl_partial_rollouts rl_inference_logprobs_is_correction
        rl_importance_sampling_truncation_coef rl_use_sequence_packing rl_sequence_packing_max_sequences_per_bin
        rl_sequence_packing_algo rl_inference_tensor_model_parallel_size rl_inference_pipeline_model_parallel_size
        rl_inference_expert_model_parallel_size rl_inference_expert_tensor_model_parallel_size
        rl_inference_model_unified_memory_level rl_offload_inference_model_weights_when_idle refit_method
        rl_verify_model_weights_swap rl_skip_bos_token rl_profile rl_profile_dir rl_inference_parsers
        """),
    ),
    refused("distillation has not been tried", "logits_save_dir", "logits_load_dir"),
    irrelevant(
        "belongs to distillation, which is refused",
        *_names("""
        logits_save_top_k logits_save_top_p logits_save_top_p_min_k logits_save_dtype logits_load_decode_threads
        logits_load_prefetch_factor logits_load_msc_prefetch_depth logits_load_kd_loss_alpha logits_load_ignore_errors
        """),
    ),
    # Data.
    honoured(
        "the script's data; examples/pretrain_megatron.py says which it reads",
        *_names("""
        data_path split train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path
        per_dataset_sequences_path phase_transition_iterations dataloader_fast_cache_load
        dataloader_defer_npy_index_mmap data_cache_path mmap_bin_files mock_data seq_length encoder_seq_length
        num_workers dataloader_type eod_mask_loss num_dataset_builder_threads object_storage_cache_path
        mid_level_dataset_surplus allow_ambiguous_pad_tokens sft sft_tokenizer_prompt_format fim_data fim_rate
        fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix fim_prefix_token fim_middle_token
        fim_suffix_token fim_pad_token fim_eod_token dataloader_inter_document_masking
        """),
    ),
    honoured(
        "documents that share a sequence do not see each other: both or neither, checked in each forward pass",
        "reset_position_ids",
        "reset_attention_mask",
    ),
    irrelevant("attention knows where documents begin from their positions", "create_attention_mask_in_dataloader"),
    irrelevant(
        "the tokenizer's",
        *_names("""
        vocab_file merge_file vocab_extra_ids tokenizer_type tokenizer_model metadata_path special_tokens
        tiktoken_pattern tiktoken_num_special_tokens tokenizer_sentencepiece_legacy
        tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast
        tokenizer_hf_no_include_special_tokens trust_remote_code null_tokenizer_eod_id null_tokenizer_pad_id
        chat_template
        """),
    ),
    irrelevant(
        "belongs to other kinds of models",
        *_names("""
        decoder_seq_length sample_rate mask_prob short_seq_prob ict_head_size biencoder_projection_dim ict_load
        bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path
        retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path indexer_batch_size
        indexer_log_interval num_classes img_h img_w num_channels patch_dim classes_fraction data_per_class_fraction
        data_sharding head_lr_mult vision_pretraining_type vision_backbone_type swin_backbone_type mask_type
        mask_factor iter_per_epoch dino_local_img_size dino_local_crops_number dino_head_hidden_size
        dino_bottleneck_size dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp dino_teacher_temp
        dino_warmup_teacher_temp_epochs
        """),
    ),
    # Checkpoints.
    honoured(
        "Megatron's distributed checkpoints",
        *_names("""
        save save_interval save_retain_interval load load_main_params_from_ckpt finetune pretrained_checkpoint
        ckpt_step exit_on_missing_checkpoint auto_detect_ckpt_format ckpt_fully_parallel_save ckpt_fully_parallel_load
        ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_save_process_group
        ckpt_fully_parallel_load_process_group ckpt_assume_constant_structure ckpt_load_validate_sharding_integrity
        dist_ckpt_strictness dist_ckpt_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient
        no_save_optim no_save_rng no_load_optim no_load_rng override_ckpt_iteration use_dist_ckpt_deprecated
        dist_ckpt_workers ckpt_fully_parallel_save_deprecated async_save non_persistent_save_interval
        non_persistent_global_ckpt_dir
        """),
    ),
    refused("weights are saved as Megatron's distributed checkpoint", "ckpt_format", unless=("torch_dist",)),
    refused(
        "weights are saved as Megatron's distributed checkpoint",
        "ckpt_convert_format",
        "dist_ckpt_format_deprecated",
        "dist_ckpt_save_pre_mcore_014",
    ),
    refused("only checkpoints in a shared folder have been tried", "non_persistent_ckpt_type", unless=("global",)),
    irrelevant(
        "belongs to a way to save that is refused, or says how files are written",
        *_names("""
        ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format async_strategy use_persistent_ckpt_worker
        async_ckpt_cpu_priority async_ckpt_io_priority async_ckpt_use_cpu_shm non_persistent_local_ckpt_dir
        non_persistent_local_ckpt_algo replication replication_jump replication_factor verify_integrity
        stream_ckpt_dequant enable_msc disable_msc_deprecated
        """),
    ),
    # Processes, logs, and what only looks on.
    honoured(
        "how processes meet and talk",
        *_names("""
        distributed_backend distributed_timeout_minutes local_rank nccl_communicator_config_path
        use_gloo_process_groups use_sharp sharp_enabled_group high_priority_stream_groups
        distributed_timeout_seconds_after_init
        """),
    ),
    refused("the model is built when process groups are known", "lazy_mpu_init"),
    refused("attention keeps no logits to look at", "log_max_attention_logit"),
    irrelevant(
        "looks on, and computes nothing",
        *_names("""
        help profile profile_step_start profile_step_end use_pytorch_profiler pytorch_profiler_collect_shapes
        pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra profile_ranks record_memory_history
        memory_snapshot_path record_shapes nvtx_ranges check_weight_hash_across_dp_replicas_interval
        gpu_sniff_test_interval train_sync_interval manual_gc manual_gc_interval manual_gc_eval
        result_rejected_tracker_filename dump_param_to_param_group_map deprecated_use_mcore_models
        save_params_interval save_activations_interval save_tokens_per_expert_interval save_wgrads_interval
        save_dgrads_interval moe_per_layer_logging flight_recorder_dump_path flight_recorder_trace_buffer_size
        flight_recorder_dump_on_timeout flight_recorder_include_stack_trace flight_recorder_include_only_active
        flight_recorder_extra_dump_on_exec config_logger_dir adlr_autoresume adlr_autoresume_interval log_interval
        log_params_norm log_throughput log_progress timing_log_level timing_log_option tensorboard_dir
        tensorboard_log_interval tensorboard_queue_size log_timers_to_tensorboard log_loss_scale_to_tensorboard
        log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_memory_interval log_device_memory_used
        log_num_zeros_in_grad barrier_with_L1_time log_world_size_to_tensorboard wandb_project wandb_exp_name
        wandb_save_dir wandb_entity logging_level log_energy moe_routing_trace_path
        moe_routing_trace_max_training_iters moe_routing_trace_capture_logits moe_routing_trace_capture_hidden_states
        moe_routing_trace_dump_weights log_straggler straggler_ctrlr_port straggler_minmax_count
        disable_straggler_on_startup run_workload_inspector_server enable_one_logger one_logger_project
        one_logger_run_name one_logger_async app_tag_run_name app_tag_run_version inprocess_restart
        inprocess_max_iterations inprocess_monitor_thread_interval inprocess_monitor_process_interval
        inprocess_progress_watchdog_interval inprocess_heartbeat_interval inprocess_soft_timeout
        inprocess_hard_timeout inprocess_heartbeat_timeout inprocess_barrier_timeout inprocess_completion_timeout
        inprocess_last_call_wait inprocess_termination_grace_time inprocess_granularity inprocess_active_world_size
        inprocess_empty_cuda_cache enable_ft_package calc_ft_timeouts ft_num_warmup_iters enable_experimental
        test_mode timers
        """),
    ),
    honoured(
        "Megatron's own hooks into its schedules",
        "finalize_model_grads_func",
        "grad_scale_func",
        "moe_grad_scale_func",
        "mtp_grad_scale_func",
        "no_sync_func",
        "grad_sync_func",
        "param_sync_func",
    ),
    irrelevant("of autocast, which is refused", "autocast_dtype"),
    # Megatron as a server: a model with a cache, which this one is not (`DeepseekV3GPTModel.forward` says so).
    irrelevant(
        "belongs to Megatron's own inference, which the model refuses",
        *_names("""
        inference_batch_times_seqlen_threshold max_tokens_to_oom output_bert_embeddings bert_embedder_type
        use_legacy_static_engine inference_max_requests inference_max_seq_length inference_dynamic_batching
        inference_dynamic_batching_buffer_size_gb inference_dynamic_batching_paused_buffer_size_gb
        inference_dynamic_batching_mamba_memory_ratio inference_dynamic_batching_block_size
        inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens
        inference_dynamic_batching_num_cuda_graphs inference_dynamic_batching_track_paused_request_events
        inference_dynamic_batching_track_generated_token_events decode_only_cuda_graphs
        inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens
        inference_dynamic_batching_unified_memory_level enable_chunked_prefill num_speculative_tokens
        inference_dynamic_batching_enable_prefix_caching inference_dynamic_batching_prefix_caching_eviction_policy
        inference_dynamic_batching_prefix_caching_coordinator_policy
        inference_dynamic_batching_prefix_caching_routing_alpha inference_dynamic_batching_prefix_caching_mamba_gb
        inference_dynamic_batching_cuda_graph_mixed_prefill_count
        inference_dynamic_batching_cuda_graph_sizing_distribution inference_dynamic_batching_sampling_backend
        offset_sampling_seed_by_dp_rank inference_dynamic_batching_async_sched_mode
        inference_dynamic_batching_logprobs_mode inference_logging_step_interval inference_text_gen_server_logging
        inference_wandb_logging inference_coordinator_port inference_use_synchronous_zmq_collectives
        inference_disable_ep_consensus inference_shards inference_rng_tracker flash_decode nccl_all_reduce_for_prefill
        inference_fuse_tp_communication inference_disable_triton_nvls_kernels inference_grouped_gemm_backend
        inference_moe_disable_fused_quant_kernels inference_moe_token_dispatcher_type mlp_chunks_for_prefill
        cache_mla_latents inference_sampling_seed use_inference_optimized_layers
        """),
    ),
    otherwise="Leave them out",
)


_Range = tuple[str, Callable[[float], bool]]
"""In words, and whether a number is in it. What is compared with NaN is not."""
_FINITE: _Range = "a finite number", lambda number: -math.inf < number < math.inf
_NOT_NEGATIVE: _Range = "zero or above, and finite", lambda number: 0 <= number < math.inf
_RANGES: Mapping[str, _Range] = {
    **dict.fromkeys(
        _names("""
        lr min_lr weight_decay clip_grad init_method_std moe_aux_loss_coeff moe_z_loss_coeff
        moe_router_bias_update_rate mtp_loss_scaling_factor
        """),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(_names("adam_beta1 adam_beta2 ema_decay"), ("from 0 to below 1", lambda number: 0 <= number < 1)),
    "adam_eps": ("above zero, and finite", lambda number: 0 < number < math.inf),
    "lr_warmup_fraction": ("from 0 to 1", lambda number: 0 <= number <= 1),
    "seed": (f"from 0 to {2**32 - 1}", lambda number: 0 <= number < 2**32),
}


def _require_numbers(values: Mapping[str, Any]) -> None:
    """Raise `EngineError` for numbers that Megatron trains with to the end, or fails with much later: NaN, infinity,
    rates below zero, averages that grow.
    """
    wrong = []
    for name, value in values.items():
        said, fits = _RANGES.get(name, _FINITE)
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
        if not all(map(fits, numbers)):
            wrong.append(f"{name}={value}, which must be {said}")
    if wrong:
        raise EngineError(f"these options of Megatron cannot be: {'; '.join(wrong)}")
    lr, min_lr = values.get("lr"), values.get("min_lr")
    if lr is not None and min_lr is not None and min_lr > lr:
        raise EngineError(f"min_lr={min_lr} is above lr={lr}: the learning rate falls to it")


def require_supported(values: Mapping[str, Any], expected: Mapping[str, Any], config: DeepseekV3Config) -> None:
    """Raise `EngineError`, one line, that names every option which is refused, or which is not the checkpoint's.

    Args:
        values: Megatron's arguments, or the fields of its `TransformerConfig`.
        expected: what the checkpoint's configuration says, by the same names (`dsv3_plugin.megatron_backend.config`).
        config: the checkpoint's configuration.
    """
    OPTIONS.require_supported(values)
    _require_numbers(values)
    wrong = [
        f"{name}={values[name]!r}, and the checkpoint's configuration says {expected[name]!r}"
        for name in OF_MODEL.names
        if name in values and name in expected and values[name] != expected[name]
    ]
    if (tokens := values.get("vocab_size")) is not None and tokens > config.vocab_size:
        wrong.append(f"vocab_size={tokens} of the tokenizer, and the checkpoint's embedding holds {config.vocab_size}")
    if wrong:
        raise EngineError(f"these options of Megatron are not the model's: {'; '.join(wrong)}. Leave them out")
    layers = values.get("recompute_num_layers")
    if values.get("recompute_method") == "uniform" and layers != 1 and expected.get("mtp_num_layers"):
        raise EngineError(
            f"recompute_num_layers={layers} with recompute_method=uniform: Megatron computes an MTP layer again by"
            " itself only; give 1"
        )
    moments = [name for name in ("exp_avg_dtype", "exp_avg_sq_dtype") if values.get(name) in ("bf16", torch.bfloat16)]
    precise, distributed = values.get("use_precision_aware_optimizer"), values.get("use_distributed_optimizer")
    if (moments and not precise) or (precise and not distributed):
        raise EngineError(
            f"{moments[0] if moments else 'use_precision_aware_optimizer'}={values[moments[0]] if moments else True}"
            " needs --use-precision-aware-optimizer and --use-distributed-optimizer"
        )
    positions, mask = values.get("reset_position_ids"), values.get("reset_attention_mask")
    if bool(positions) != bool(mask):
        raise EngineError(
            f"reset_position_ids={positions} with reset_attention_mask={mask}: a document's positions begin anew"
            " exactly where attention does; give both or neither"
        )
