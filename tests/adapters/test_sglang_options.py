"""SGLang's options: each is in the table, in every tested version, and what the table refuses does not start."""

from __future__ import annotations

import json
from typing import Any

import pytest
from engines import warm

PROGRAM = """
import json, os, sys
from unittest.mock import patch
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.runtime_context import get_exec, publish
from sglang.srt.server_args import ServerArgs
from dsv3_plugin.errors import EngineError
from dsv3_plugin.options import Options
from dsv3_plugin.sglang_backend import attention, compat, options

answers = {}
def attempt(name, action):
    try:
        action()
        answers[name] = None
    except EngineError as error:
        answers[name] = str(error)

common = {"model_path": sys.argv[1], "device": "cpu", "attention_backend": "dsv3", "dtype": "bfloat16"}

def start(device="cpu", **settings):
    publish(ServerArgs(**common | settings), role="scheduler")
    if device == "cuda" and not settings["disable_cuda_graph"]:  # as on a GPU
        get_exec().graph.cuda_graph_config.prefill.backend = "breakable"
    table = options.options("bfloat16", fp8=False)
    table.require_supported(compat.server_options())
    options.require_possible_together(compat.server_options(), 4)
    compat.settle_graphs(torch.device(device))
    return table

table = start(disable_cuda_graph=True)
names = [name for name in compat.server_options() if not name.startswith("_")]
answers["unknown"] = table.unknown(names)
answers["options"] = len(names)
short = Options("SGLang", *{id(r): r for n, r in table.rules.items() if "enable_eplb" not in r.names}.values())
answers["unknown without a rule"] = short.unknown(["enable_eplb", "tp_size"])
refused = [name for name, rule in table.rules.items() if rule.verdict == "refused" and name in names]
answers["refused"] = len(refused)
for name in refused:
    attempt("any", lambda: table.require_supported({name: "something else"}))
    assert f"{name}='something else': " in (answers.pop("any") or ""), name

speculative = {"speculative_algorithm": "EAGLE", "speculative_num_steps": 2, "speculative_num_draft_tokens": 3}
chain = speculative | {"speculative_eagle_topk": 1}
for name, device, settings in json.loads(sys.argv[2]):
    settings = {"disable_cuda_graph": True} | (chain if settings.pop("drafts", False) else {}) | settings
    attempt(name, lambda: start(device, **settings))
attempt("tree of drafts", lambda: start(disable_cuda_graph=True, **speculative, speculative_eagle_topk=2))

from dsv3_plugin.layout import Group, Layout

alone, spread = Layout(), Layout(experts=Group(0, 2))
over_peers = Layout(experts=Group(0, 2, peers=object()))
stages = Layout(experts=Group(0, 2, peers=object()), layers=range(1))
answers["graphs of ranks"] = {}
for name, layout, reason, settings in (
    ("alone", alone, None, {}),
    ("over peers", over_peers, None, chain),
    ("counted", over_peers, None, {"enable_eplb": True, "ep_size": 2, "tp_size": 2}),
    ("stages", stages, None, {}),
    ("spread", spread, "they are on several hosts", {}),
):
    publish(ServerArgs(**common | settings), role="scheduler")
    decode = get_exec().graph.cuda_graph_config.decode
    decode.backend, decode.bs = "full", [1, 2, 6]
    tokens = compat.tokens_in_graphs(torch.device("cuda"))
    compat.settle_graphs(torch.device("cuda"), layout, reason)
    answers["graphs of ranks"][name] = [decode.backend, tokens, compat.tokens_in_graphs(torch.device("cuda"))]
with patch.dict(os.environ, SGLANG_RETURN_ORIGINAL_LOGPROB="1"):
    attempt("environment", options.require_environment)
attempt("no environment", options.require_environment)
with patch.object(attention, "is_batch_invariant_mode_enabled", lambda: True):
    attempt("operators", lambda: attention.LatentBackend(None))
print(json.dumps(answers))
"""

SETTINGS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "tensor parallel": ("cpu", {"tp_size": 2}, None),
    "pipeline": ("cpu", {"pp_size": 2}, None),
    "data parallel": ("cpu", {"tp_size": 2, "dp_size": 2, "ep_size": 2, "enable_dp_attention": True}, None),
    "stages without layers": ("cpu", {"pp_size": 5}, "pp_size=5: each stage has a decoder layer at least, and the mod"),
    "drafts in stages": (
        "cpu",
        {"drafts": True, "pp_size": 2},
        "speculative_algorithm='EAGLE' with pp_size=2: a draft reads the target's embedding, which is on another",
    ),
    "drafts of replicas on two ranks each": (
        "cpu",
        {"drafts": True, "tp_size": 4, "dp_size": 2, "ep_size": 4, "enable_dp_attention": True},
        "speculative_algorithm='EAGLE' with tp_size=4 and dp_size=2: where ranks share a replica's heads, SGLang pads",
    ),
    "context parallel": ("cpu", {"tp_size": 2, "attn_cp_size": 2}, "attn_cp_size=2: a sequence's tokens are on one"),
    "dense MLPs": ("cpu", {"tp_size": 2, "moe_dense_tp_size": 1}, "moe_dense_tp_size=1: attention's TP ranks share"),
    "two batches": ("cpu", {"enable_two_batch_overlap": True}, "enable_two_batch_overlap=True: the order of its"),
    "fp8 cache": ("cpu", {"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype='fp8_e4m3': the latent cache has"),
    "fp8 weights": ("cpu", {"quantization": "fp8"}, "quantization='fp8': the checkpoint's weights are served as they"),
    "offload": ("cpu", {"cpu_offload_gb": 1}, "cpu_offload_gb=1: all weights stay on the device"),
    "moved experts": ("cpu", {"tp_size": 2, "ep_size": 2, "enable_eplb": True}, None),
    "moved experts on some ranks": (
        "cpu",
        {"tp_size": 4, "ep_size": 2, "enable_eplb": True},
        "enable_eplb=True with ep_size=2: SGLang moves experts between as many ranks, and the model's lie on all ranks"
        " of the TP group: set --ep-size 4",
    ),
    "moved experts in stages": (
        "cpu",
        {"tp_size": 2, "ep_size": 2, "pp_size": 2, "enable_eplb": True},
        "enable_eplb=True with pp_size=2: SGLang counts the rows of all stages at once",
    ),
    "drawn replicas": ("cpu", {"ep_dispatch_algorithm": "fake"}, "ep_dispatch_algorithm='fake': an expert's rows go"),
    "routed experts": ("cpu", {"enable_return_routed_experts": True}, "enable_return_routed_experts=True: nothing of"),
    "lora": (
        "cpu",
        {"enable_lora": True, "lora_target_modules": ["all"], "max_lora_rank": 8},
        "enable_lora=True: LoRA",
    ),
    "drafts": ("cpu", {"drafts": True}, None),
    "draft's cache": (
        "cpu",
        {"drafts": True, "speculative_draft_kv_cache_dtype": "fp8_e4m3"},
        "speculative_draft_kv_cache_dtype='fp8_e4m3': the latent cache has the model's dtype",
    ),
    "thresholds": (
        "cpu",
        {"drafts": True, "speculative_accept_threshold_single": 0.5},
        "speculative_accept_threshold_single=0.5: a token is drawn from the target's distribution",
    ),
    "deterministic": ("cpu", {"enable_deterministic_inference": True}, None),
    "graphs of others": (
        "cuda",
        {"attention_backend": "triton", "disable_cuda_graph": False},
        "runs in CUDA graphs with its own attention backend only: pass --attention-backend dsv3",
    ),
    "no graphs": ("cuda", {"attention_backend": "triton"}, None),
    "graphs": ("cuda", {"disable_cuda_graph": False}, None),
    "graphs on a CPU": ("cpu", {"disable_cuda_graph": False}, None),
}


@pytest.mark.parametrize("environment", ["sglang", "sglang-0.5.17", "sglang-0.5.23"])
def test_every_option_has_a_verdict(tiny_checkpoint, environment: str) -> None:
    # What the versions at the ends accept on a CPU differs; what they have is asked of all.
    settings = {name: row for name, row in SETTINGS.items() if environment == "sglang"}
    rows = [(name, device, values) for name, (device, values, _) in settings.items()]
    done = warm(environment, "-c", PROGRAM, tiny_checkpoint("bf16"), json.dumps(rows))
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers["unknown"] == []
    assert answers["options"] > 400 and answers["refused"] > 90
    # The twin: an entry of the table removed.
    assert answers["unknown without a rule"] == ["enable_eplb"]
    graphs = answers["graphs of ranks"]
    assert (graphs["alone"], graphs["over peers"]) == (["full", 6, 6], ["full", 18, 18])  # with two drafts a request
    assert graphs["counted"] == graphs["stages"] == graphs["spread"] == ["disabled", 6, 0]
    for name, (_, _, message) in settings.items():
        if message is None:
            assert answers[name] is None, (name, answers[name])
        else:
            assert message in (answers[name] or ""), (name, answers[name])
    assert "speculative_eagle_topk=2: MTP drafts a chain of tokens" in answers["tree of drafts"]
    assert "SGLANG_RETURN_ORIGINAL_LOGPROB=1: log-probabilities are those at a request's temp" in answers["environment"]
    assert answers["no environment"] is None
    assert "SGLang has replaced operators of torch" in answers["operators"]
