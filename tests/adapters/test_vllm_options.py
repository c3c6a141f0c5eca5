"""The vLLM adapter's table of options, against the options that every installed vLLM has."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from engines import python_of, warm

from dsv3_plugin.options import Options
from dsv3_plugin.vllm_backend.options import FLAGS, OPTIONS

PROGRAM = """
import json, sys
from types import SimpleNamespace
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from dsv3_plugin.layout import Group, Layout
from dsv3_plugin.vllm_backend import model, options

job = json.load(open(sys.argv[1]))
told = {"options": list(options.names(VllmConfig)), "flags": list(options.flags(VllmConfig, AsyncEngineArgs))}
told["started"] = []
for arguments in job:
    arguments = {"max_model_len": 128, "enforce_eager": True} | arguments
    if arguments.get("hf_overrides") == "function":
        arguments["hf_overrides"] = lambda config: config
    try:
        config = EngineArgs(**arguments).create_engine_config()
        options.require_supported(config)
        told["started"].append(model.read_config(config.model_config).model_dump())
    except Exception as error:
        told["started"].append(f"{type(error).__name__}: {error}")
caches = SimpleNamespace(kv_offloading_size=1.0)
everything = SimpleNamespace(cache_config=caches, kv_transfer_config="a connector", use_v2_model_runner=True)
nothing = SimpleNamespace(use_v2_model_runner=False)
told["in two forms"] = {
    "unknown": [name for name in options.IN_TWO_FORMS.rules if name not in told["options"]],
    "has a choice of runners": hasattr(VllmConfig, "use_v2_model_runner"),
}
for name, config in ("everything", everything), ("nothing", nothing):
    try:
        told["in two forms"][name] = options.require_two_forms(config)
    except Exception as error:
        told["in two forms"][name] = str(error)
told["variables"] = {}
for mode in "raw_logprobs", "processed_logprobs":
    # What no CPU has: a GPU and the second model runner.
    config = SimpleNamespace(
        model_config=SimpleNamespace(logprobs_mode=mode),
        device_config=SimpleNamespace(device_type="cuda"),
        use_v2_model_runner=True,
        kv_transfer_config=SimpleNamespace(),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
    )
    try:
        options.ENVIRONMENT.require_supported(options.environment(config))
        told["variables"][mode] = "none"
    except Exception as error:
        told["variables"][mode] = str(error)
told["graphs of ranks"] = {}
for name, peers in ("over peers", object()), ("spread", None):
    layout = Layout(experts=Group(0, 2, peers=peers))
    model.connected = lambda _, device, tokens: (layout, None if peers else f"no room for {tokens} tokens")
    graphs = SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL, max_cudagraph_capture_size=24)
    assert model._with_peers(Layout(experts=Group(0, 2)), torch.device("cuda"), graphs) is layout
    told["graphs of ranks"][name] = graphs.cudagraph_mode.name
print("TOLD " + json.dumps(told))
"""


def ask(environment: str, starts: list[dict[str, Any]], work_dir: Path, **variables: str) -> dict[str, Any]:
    file = work_dir / "starts.json"
    file.write_text(json.dumps(starts))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = "-c", PROGRAM, str(file)
    if variables:  # some are read where vLLM is imported
        all_variables = os.environ | settings | variables
        done = subprocess.run([python_of(environment), *command], capture_output=True, text=True, env=all_variables)
    else:
        done = warm(environment, *command, **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))[5:])


def without(table: Options, name: str) -> Options:
    fewer = Options(table.engine)
    fewer.rules = {kept: rule for kept, rule in table.rules.items() if kept != name}
    return fewer


MTP = {"method": "mtp", "num_speculative_tokens": 1}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quantization": "fp8"}, "model_config.quantization='fp8': it is not the checkpoint's own"),
    ({"speculative_config": MTP | {"quantization": "fp8"}}, "speculative_config.quantization='fp8'"),
    ({"speculative_config": MTP | {"kv_cache_dtype": "fp8"}}, "speculative_config.kv_cache_dtype='fp8': the draft is"),
    ({"kv_cache_dtype": "fp8"}, "cache_config.cache_dtype='fp8': kv_cache_dtype: the latent cache has the model's"),
    ({"cpu_offload_gb": 1}, "cpu_offload_gb=1.0"),
    ({"offload_group_size": 2}, "offload_group_size=2"),
    (
        {"pipeline_parallel_size": 2, "speculative_config": MTP},
        "model runner V1 has no drafter on the first of pipeline_parallel_size=2 stages",
    ),
    ({"pipeline_parallel_size": 5}, "pipeline_parallel_size=5: each stage has a decoder layer at least, and the model"),
    (
        {"speculative_config": MTP | {"num_speculative_tokens": 129}},
        "num_speculative_tokens=129: vLLM's rejection sampler takes 128 at most",
    ),
    (
        {"enable_ep_weight_filter": True, "safetensors_load_strategy": "eager"},
        "parallel_config.enable_ep_weight_filter=True: an update of weights is checked for all tensors",
    ),
    ({"expert_placement_strategy": "round_robin"}, "expert_placement_strategy='round_robin': a rank holds neighbour"),
    ({"enable_lora": True}, "enable_lora: the model takes no adapters"),
    ({"load_format": "sharded_state"}, "load_config.load_format='sharded_state': it is not the files"),
    ({"runner": "pooling"}, "model_config.runner='pooling': the model generates text only"),
    ({"enable_prompt_embeds": True}, "model_config.enable_prompt_embeds=True"),
    ({"moe_backend": "triton"}, "kernel_config.moe_backend='triton': the model runs kernels of its own"),
    ({"weight_transfer_config": {"backend": "sparse_nccl"}}, "backend='sparse_nccl'): it writes past the adapter"),
    ({"additional_config": {"x": 1}}, "additional_config={'x': 1}"),
    (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 1, "prompt_lookup_max": 2}},
        "speculative_config.method='ngram': the checkpoint's MTP layer drafts",
    ),
    ({"hf_overrides": "function"}, "ConfigError: hf_overrides is a function"),
    ({"hf_overrides": {"num_experts_per_tok": 2, "vocab_size": 512}}, "an override of vocab_size does not change the"),
]


@pytest.mark.parametrize(("environment", "refused"), [("vllm", REFUSED), ("vllm-0.27.1", REFUSED[:5])])
def test_every_option_has_a_rule(
    tiny_checkpoint, tmp_path: Path, environment: str, refused: list[tuple[dict[str, Any], str]]
) -> None:
    """And those that ask for what is not served are refused, with their names; the checkpoint's own pass."""
    bf16, fp8 = str(tiny_checkpoint("bf16")), str(tiny_checkpoint("fp8"))
    served: list[dict[str, Any]] = [
        {"model": bf16},
        {"model": bf16, "speculative_config": MTP, "kv_cache_dtype": "bfloat16", "weight_transfer_config": {}},
        {"model": fp8, "speculative_config": MTP},
        {"model": bf16, "hf_overrides": {"rope_theta": 50000}},
        {"model": bf16, "tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"model": bf16, "data_parallel_size": 2, "enable_expert_parallel": True, "enable_ep_weight_filter": True},
        {"model": bf16, "kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
    ]
    told = ask(environment, [*served, *({"model": bf16} | start for start, _ in refused)], tmp_path)
    assert told["graphs of ranks"] == {"over peers": "FULL", "spread": "NONE"}

    assert OPTIONS.unknown(told["options"]) == []
    assert FLAGS.unknown(told["flags"]) == []
    # The twin: a rule that is missing.
    for table, names in ((OPTIONS, told["options"]), (FLAGS, told["flags"])):
        assert len(names) > 30
        for name in names:
            assert without(table, name).unknown(names) == [name]

    answers = told["started"]
    for start, answer in zip(served, answers, strict=False):
        assert isinstance(answer, dict), (start, answer)
    assert [answer["rope_theta"] for answer in answers[: len(served)]] == [10000, 10000, 10000, 50000, *[10000] * 3]
    for (start, problem), answer in zip(refused, answers[len(served) :], strict=True):
        assert problem in answer, (start, answer)

    in_two_forms = told["in two forms"]
    assert in_two_forms["unknown"] == ["use_v2_model_runner"] and in_two_forms["has a choice of runners"]
    assert in_two_forms["nothing"] is None
    for problem in (
        "kv_transfer_config='a connector': in the two_form profile nobody tells other servers",
        "cache_config.kv_offloading_size=1.0: in the two_form",
        "use_v2_model_runner=True: in the two_form profile model runner V1 is asked",
        "Do so, or unset DSV3_ATTENTION",
    ):
        assert problem in in_two_forms["everything"]


def test_variables_that_change_numbers(tmp_path: Path) -> None:
    variables = {"VLLM_FLOAT32_MATMUL_PRECISION": "medium", "VLLM_BATCH_INVARIANT": "1", "VLLM_MLA_DISABLE": "1"}
    told = ask("vllm", [], tmp_path, **variables)["variables"]
    everywhere = "VLLM_FLOAT32_MATMUL_PRECISION='medium': it lets torch round the inputs of float32 products"
    of_logprobs = "VLLM_BATCH_INVARIANT=True: on a GPU", "VLLM_USE_V2_MODEL_RUNNER=True: model runner V2 has"
    assert everywhere in told["raw_logprobs"]
    assert everywhere in told["processed_logprobs"]
    assert "VLLM_MLA_DISABLE=True: a KV connector then takes a page for heads" in told["raw_logprobs"]
    for problem in of_logprobs:
        assert problem in told["processed_logprobs"]
        assert problem not in told["raw_logprobs"]
    assert ask("vllm", [], tmp_path, VLLM_USE_V2_MODEL_RUNNER="0")["variables"]["raw_logprobs"] == "none"
