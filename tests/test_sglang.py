"""The SGLang adapter, in real SGLang engines of their own environment (`make environments`)."""

from __future__ import annotations

import os
import re
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import (
    REFERENCE,
    cut_short,
    free_port,
    own_model_served_when_switched_off,
    post,
    predict_logits,
    python_of,
    run,
    serving,
    shipped_testee,
)

from dsv3_plugin.conformance.sampling import processed_logprobs
from dsv3_plugin.sglang_backend import plugin

MODELS = "dsv3_plugin.sglang_backend.models"
# Of the plugins installed for SGLang, only the one that lets it run on a CPU.
WITHOUT_PLUGIN = {"SGLANG_PLUGINS": "sglang_cpu"}


@pytest.mark.parametrize(
    ("dtype", "engines", "cases"),
    [
        ("bf16", ("vllm", "sglang"), ()),
        ("fp32", ("sglang",), ("batch", "chunked_prefill", "prefix_cache_chunked", "mtp_2")),
        ("fp8", ("sglang",), ("batch", "chunked_prefill", "prefix_cache_chunked", "mtp_2")),
    ],
)
def test_sglang_prints_the_bits_of_the_others(
    tiny_checkpoint, tmp_path: Path, dtype: str, engines: tuple[str, ...], cases: tuple[str, ...]
) -> None:
    report = run([REFERENCE, *map(shipped_testee, engines)], tiny_checkpoint(dtype), tmp_path, *cases)
    assert report.passed, (report.problems, [(v.problems, v.comparisons) for v in report.verdicts if not v.passed])
    served = report.results["sglang"].served
    assert served.model_class == f"{MODELS}.deepseek_v3.DeepseekV3ForCausalLM"
    assert served.draft_class == f"{MODELS}.deepseek_nextn.DeepseekV3ForCausalLMNextN"
    assert served.profile == dtype
    assert served.kernels == report.results["reference"].served.kernels
    for verdict in report.verdicts:
        for comparison in verdict.comparisons:
            assert comparison.equal_rows > 500, comparison
        # SGLang verifies a step to its end, also beyond the last token that a request asked for.
        last_drafts = verdict.case.num_speculative_tokens * len(verdict.case.requests)
        assert verdict.rows_alone["sglang"] <= last_drafts, verdict.case.name
    outcomes = {case.name: case for case in report.results["sglang"].cases}
    assert 0 < outcomes["mtp_2"].num_accepted_tokens < outcomes["mtp_2"].num_draft_tokens
    log = (tmp_path / "kept" / "sglang" / "log.txt").read_text()
    assert re.search(r"^MIXED of [2-8] requests$", log, re.M), "no chunk was computed together with a decode"
    for name in ("DeepseekV3ForCausalLM", "DeepseekV3ForCausalLMNextN"):
        assert re.search(rf"dsv3-plugin \S+ serves {name}: profile {dtype}, strict mode, kernels: reference", log)


@pytest.mark.parametrize("version", ["0.5.17", "0.5.23"])
def test_the_ends_of_the_version_range(tiny_checkpoint, tmp_path: Path, version: str) -> None:
    testee = shipped_testee(f"sglang-{version}")
    cases = ("batch", "chunked_prefill", "prefix_cache_chunked", "sampled", "mtp_2")
    report = run([REFERENCE, testee], tiny_checkpoint("bf16"), tmp_path, *cases)
    assert report.passed, (report.problems, [(v.problems, v.comparisons) for v in report.verdicts if not v.passed])
    result = report.results["sglang"]
    assert result.versions["sglang"] == version
    assert result.served.model_class == f"{MODELS}.deepseek_v3.DeepseekV3ForCausalLM"
    assert result.served.draft_class == f"{MODELS}.deepseek_nextn.DeepseekV3ForCausalLMNextN"
    assert "is tested with" not in (tmp_path / "kept" / "sglang" / "log.txt").read_text()


@pytest.mark.parametrize("environment", ["sglang", "sglang-0.5.17", "sglang-0.5.23"])
def test_a_pass_in_a_cuda_graph(tiny_checkpoint, environment: str) -> None:
    """It answers what an eager pass does; rows with which SGLang pads it write into no request's slots."""
    program = Path(__file__).with_name("sglang_graph.py")
    command = [python_of(environment), str(program), str(tiny_checkpoint("bf16"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for mode, width in (("DECODE", 1), ("TARGET_VERIFY", 3)):
        for answer in (
            f"{mode} equals an eager pass: {[(True, True)] * 3}",
            f"{mode} reads where it was recorded: True",
            f"{mode} pads with requests as long as their queries: {[width] * 2}",
            # The twins.
            f"{mode}, table read while the graph runs: False",
            f"{mode}, table of the replay before: False",
            f"{mode}, slots of the replay before in padded rows: False",
        ):
            assert answer in done.stdout.splitlines(), done.stdout
    assert "two draft steps equal eager ones: True" in done.stdout
    assert "two draft steps without a table: False" in done.stdout


def test_sglang_s_model_package_variable(tiny_checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`SGLANG_EXTERNAL_MODEL_PACKAGE` serves our classes without the entry point, on an attention backend of SGLang's
    own.
    """
    for name, value in (WITHOUT_PLUGIN | {"SGLANG_EXTERNAL_MODEL_PACKAGE": MODELS}).items():
        monkeypatch.setenv(name, value)
    report = run([REFERENCE, shipped_testee("sglang")], tiny_checkpoint("bf16"), tmp_path, "batch")
    assert report.passed, (report.problems, report.verdicts)
    assert report.results["sglang"].served.model_class == f"{MODELS}.deepseek_v3.DeepseekV3ForCausalLM"


def test_sglang_s_own_model_is_caught_and_named(
    wide_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLA's real sizes are the only ones that SGLang's own kernels take.
    served = own_model_served_when_switched_off("sglang", wide_checkpoint, tmp_path, monkeypatch)
    assert served == "sglang.srt.models.deepseek_v2.DeepseekV3ForCausalLM"


def sglang_serve(checkpoint: Path, log: Path, *arguments: str) -> AbstractContextManager[str]:
    """`python -m sglang.launch_server --model-path CHECKPOINT`."""
    port = free_port()
    command = [python_of("sglang"), "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "bfloat16", "--attention-backend", "dsv3", "--disable-cuda-graph"]
    command += ["--context-length", "256", "--max-total-tokens", "2048", "--max-running-requests", "8"]
    # Otherwise SGLang rounds a prompt's logprobs (logits - logsumexp) and a sampled token's (log of softmax) in its own
    # ways, and does not look at a request's seed.
    command += ["--enable-deterministic-inference", *arguments]
    return serving(command, port, log, {})


def test_sglang_serve_answers_the_predicted_logprobs(tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bf16")
    prompt = list(range(300, 340))
    log = tmp_path / "serve.log"
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    sampled = {"temperature": 0.75, "sampling_seed": 7, "max_new_tokens": 24, "ignore_eos": True}
    logprobs = {"return_logprob": True, "top_logprobs_num": 3}
    with sglang_serve(checkpoint, log) as address:
        body = {"input_ids": prompt, "sampling_params": greedy, "logprob_start_len": 0}
        generated = post(address, "/generate", body | logprobs)
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 3}
        completed = post(address, "/v1/completions", body | {"ignore_eos": True})
        drawn = post(address, "/generate", {"input_ids": prompt, "sampling_params": sampled} | logprobs)
        again = post(address, "/generate", {"input_ids": prompt, "sampling_params": sampled})

    tokens = generated["output_ids"]
    predicted = torch.log_softmax(predict_logits(checkpoint, prompt + tokens), dim=-1)
    answers = generated["meta_info"]
    # Pairs (logprob, token); the first token of a prompt has none.
    of_prompt = [tuple(item[:2]) for item in answers["input_token_logprobs"][1:]]
    assert of_prompt == [(predicted[i, token].item(), token) for i, token in enumerate(prompt[1:])]
    rows = predicted[len(prompt) - 1 : -1]
    assert rows.argmax(-1).tolist() == tokens
    of_output = [tuple(item[:2]) for item in answers["output_token_logprobs"]]
    assert of_output == [(row[token].item(), token) for row, token in zip(rows, tokens, strict=True)]
    best = [[item[0] for item in items] for items in answers["output_top_logprobs"]]
    assert best == rows.topk(3).values.tolist()
    (choice,) = completed["choices"]
    assert choice["logprobs"]["token_logprobs"] == [logprob for logprob, _ in of_output]

    # At a temperature: those of the distribution that it drew from.
    assert drawn["output_ids"] == again["output_ids"]
    tokens = drawn["output_ids"]
    logits = predict_logits(checkpoint, prompt + tokens)[len(prompt) - 1 : -1]
    rows = processed_logprobs(logits, sampled["temperature"])
    of_output = [tuple(item[:2]) for item in drawn["meta_info"]["output_token_logprobs"]]
    assert of_output == [(row[token].item(), token) for row, token in zip(rows, tokens, strict=True)]
    assert rows.argmax(-1).tolist() != tokens
    assert re.search(r"dsv3-plugin \S+ serves DeepseekV3ForCausalLM: profile bf16, strict mode", log.read_text())


def test_sglang_serve_drafts(tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bf16")
    prompt = list(range(300, 340))
    log = tmp_path / "serve.log"
    draft = ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "2", "--speculative-eagle-topk", "1"]
    with sglang_serve(checkpoint, log, *draft, "--speculative-num-draft-tokens", "3") as address:
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
        answer = post(address, "/generate", {"input_ids": prompt, "sampling_params": params, "return_logprob": True})
    tokens, meta = answer["output_ids"], answer["meta_info"]
    rows = torch.log_softmax(predict_logits(checkpoint, prompt + tokens)[len(prompt) - 1 : -1], dim=-1)
    of_output = [tuple(item[:2]) for item in meta["output_token_logprobs"]]
    assert of_output == [(row.max().item(), int(row.argmax())) for row in rows]
    assert meta["spec_verify_ct"] < len(tokens) == 12
    for name in ("DeepseekV3ForCausalLM", "DeepseekV3ForCausalLMNextN"):
        assert re.search(rf"dsv3-plugin \S+ serves {name}: profile bf16, strict mode", log.read_text())


PLUGIN_PROGRAM = """
import logging, os, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins.hook_registry import HookRegistry
from dsv3_plugin.sglang_backend import compat, plugin

def show(step):
    for name in plugin.ARCHITECTURES:
        model, _ = ModelRegistry.resolve_model_cls([name])
        print(f"{step}: {name} is {model.__module__}:{model.__qualname__}", flush=True)

class TheirModel:
    __module__ = "their_plugin.model"

os.environ["DSV3_PLUGIN"] = "off"
plugin.register()
show("off")
del os.environ["DSV3_PLUGIN"]
plugin.register()
plugin.register()
HookRegistry.apply_hooks()
show("on")
ModelRegistry.models["DeepseekV3ForCausalLM"] = TheirModel
show("later")
plugin.register()
show("earlier")
compat.TESTED = ("0.1.0", "0.2.0")
print("untested")
plugin.register()
print("broken")
plugin.MODELS = "a_package_that_is_not_there"
try:
    plugin.register()
except ImportError as error:
    print("raised", error)
model, _ = ModelRegistry.resolve_model_cls(["DeepseekV3ForCausalLM"])
try:
    model(config=None)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_the_entry_point() -> None:
    """In order: the kill switch, registering twice, another plugin after ours and before it, an untested version, our
    own models failing to import.
    """
    command = [python_of("sglang"), "-u", "-c", PLUGIN_PROGRAM]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = done.stdout
    assert done.returncode == 0, output
    assert "off: DeepseekV3ForCausalLM is sglang.srt.models.deepseek_v2:DeepseekV3ForCausalLM\n" in output
    for step in ("on", "earlier"):
        assert f"{step}: DeepseekV3ForCausalLM is {MODELS}.deepseek_v3:DeepseekV3ForCausalLM\n" in output
        assert f"{step}: DeepseekV3ForCausalLMNextN is {MODELS}.deepseek_nextn:DeepseekV3ForCausalLMNextN\n" in output
    later, earlier = output.index("later: "), output.index("earlier: ")
    assert "dsv3-plugin does not serve DeepseekV3ForCausalLM: another plugin registered" in output[:later]
    assert "their_plugin.model:TheirModel" in output[:later]
    replaced = "dsv3-plugin replaces their_plugin.model:TheirModel for DeepseekV3ForCausalLM"
    assert replaced in output[later:earlier]
    assert replaced not in output[:later] + output[earlier:]
    untested = output.index("untested\n")
    assert "dsv3-plugin is tested with SGLang 0.1.0 to 0.2.0, this is 0.5.20" in output[untested:]
    assert "is tested with" not in output[:untested]
    failed = (
        "EngineError: dsv3-plugin could not be registered: ModuleNotFoundError: No module named"
        " 'a_package_that_is_not_there'; set DSV3_PLUGIN=off for SGLang's own model"
    )
    assert failed in output


@pytest.mark.parametrize(("module", "left"), [(f"{MODELS}.deepseek_v3", True), ("sglang.srt.models.qwen3", False)])
def test_torchs_operators_are_left_to_our_models_alone(module: str, left: bool) -> None:
    """On a CPU SGLang has no others and raises where it looks for them, so the engines above show that it does not."""
    runner = SimpleNamespace(model=type("Model", (), {"__module__": module})())
    replaced: list[SimpleNamespace] = []
    plugin._leave_operators(replaced.append, runner)
    assert replaced == ([] if left else [runner])


class TestBadInput:
    """Each ends the engine with an error that says what to do; none falls back to SGLang's own model."""

    @staticmethod
    def start(checkpoint: Path, *arguments: str, **environment: str) -> tuple[int, str]:
        command = [python_of("sglang"), "-m", "sglang.launch_server", "--model-path", str(checkpoint)]
        command += ["--device", "cpu", "--port", str(free_port()), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
        return done.returncode, done.stdout + done.stderr

    def test_checkpoint_without_a_tensor(self, tiny_checkpoint, tmp_path: Path) -> None:
        status, output = self.start(cut_short(tiny_checkpoint("bf16"), tmp_path / "broken"))
        assert status != 0
        assert re.search(r"CheckpointError: .*model\.safetensors", output), output[-2000:]

    def test_unsupported_dtype(self, tiny_checkpoint) -> None:
        status, output = self.start(tiny_checkpoint("bf16"), "--dtype", "float16")
        assert status != 0
        assert "ConfigError: dtype=torch.float16 has no numerics profile; use float32 or bfloat16" in output

    def test_engine_settings_that_cannot_be_exact(self, tiny_checkpoint) -> None:
        command = [python_of("sglang"), "-u", "-c", SETTINGS_PROGRAM, str(tiny_checkpoint("bf16"))]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        answers = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.startswith("EngineError: ")]
        assert answers == [
            "dsv3-plugin serves on one rank, but tp_size=2; set it to 1, or DSV3_PLUGIN=off for SGLang's own model",
            "dsv3-plugin serves on one rank, but pp_size=2; set it to 1, or DSV3_PLUGIN=off for SGLang's own model",
            "kv_cache_dtype=fp8_e4m3 was asked for, but the latent cache has the model's dtype",
            "speculative_eagle_topk=2; MTP drafts a chain of tokens, so set it to 1",
            "dsv3-plugin does not serve LoRA adapters",
            "dsv3-plugin runs in CUDA graphs with its own attention backend only: pass --attention-backend dsv3,"
            " or --disable-cuda-graph",
            "SGLang has replaced operators of torch, and its log-softmax rounds otherwise than a trainer's:"
            " leave --enable-deterministic-inference out, or use a version of SGLang that dsv3-plugin is tested with",
        ]
        assert done.stdout.count("no objection to") == 3
        assert done.stdout.count("prefill runs without CUDA graphs") == 1


SETTINGS_PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
import torch
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.runtime_context import get_exec, publish
from sglang.srt.server_args import ServerArgs
from dsv3_plugin.errors import EngineError
from dsv3_plugin.sglang_backend import compat

speculative = {"speculative_algorithm": "EAGLE", "speculative_num_steps": 2, "speculative_eagle_topk": 2}
for device, graphs, settings in (
    ("cpu", False, {"tp_size": 2}),
    ("cpu", False, {"pp_size": 2}),
    ("cpu", False, {"kv_cache_dtype": "fp8_e4m3"}),
    ("cpu", False, speculative | {"speculative_num_draft_tokens": 4}),
    ("cpu", False, {"enable_lora": True, "lora_target_modules": ["all"], "max_lora_rank": 8}),
    ("cuda", True, {"attention_backend": "triton"}),
    ("cuda", False, {"attention_backend": "triton"}),
    ("cuda", True, {}),
    ("cpu", True, {}),
):
    common = {"model_path": sys.argv[1], "device": "cpu", "attention_backend": "dsv3", "dtype": "bfloat16"}
    publish(ServerArgs(**common | {"disable_cuda_graph": not graphs} | settings), role="scheduler")
    if graphs and device == "cuda":  # as on a GPU
        get_exec().graph.cuda_graph_config.prefill.backend = "breakable"
    try:
        compat.require_supported(torch.device(device), torch.bfloat16)
        print("no objection to", device, settings)
    except EngineError as error:
        print(f"EngineError: {error}")

from unittest.mock import patch
from dsv3_plugin.sglang_backend import attention
with patch.object(attention, "is_batch_invariant_mode_enabled", lambda: True):
    try:
        attention.LatentBackend(None)
    except EngineError as error:
        print(f"EngineError: {error}")
"""
