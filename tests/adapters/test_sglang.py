"""The SGLang adapter, in real SGLang engines of their own environment (`make environments`)."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import (
    REFERENCE,
    cut_short,
    free_port,
    get,
    own_model_served_when_switched_off,
    post,
    predict_logits,
    python_of,
    refusal,
    run,
    serving,
    shipped_testee,
    warm,
    warm_command,
)
from paths import SUPPORT
from typer.testing import CliRunner

from dsv3_plugin.checkpoint.fingerprint import fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.commands.cli import app
from dsv3_plugin.conformance import runner
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
    ],
)
def test_sglang_prints_the_bits_of_the_others(
    tiny_checkpoint, tmp_path: Path, dtype: str, engines: tuple[str, ...], cases: tuple[str, ...]
) -> None:
    report = run([REFERENCE, *map(shipped_testee, engines)], tiny_checkpoint(dtype), tmp_path, *cases)
    assert report.passed, (report.problems, [(v.problems, v.comparisons) for v in report.verdicts if not v.passed])
    # Every schedule of the reference is the specification, too.
    assert len(report.verdicts) == (len(cases) or 18)
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
        # Where tokens are drawn, nobody else computes an engine's rejected drafts.
        assert verdict.case.samples or verdict.rows_alone["sglang"] <= last_drafts, verdict.case.name
    outcomes = {case.name: case for case in report.results["sglang"].cases}
    assert 0 < outcomes["mtp_2"].num_accepted_tokens < outcomes["mtp_2"].num_draft_tokens
    log = (tmp_path / "kept" / "sglang" / "log.txt").read_text()
    assert re.search(r"^MIXED of [2-8] requests$", log, re.M), "no chunk was computed together with a decode"
    for name in ("DeepseekV3ForCausalLM", "DeepseekV3ForCausalLMNextN"):
        assert re.search(rf"dsv3-plugin \S+ serves {name}: profile {dtype}, strict mode, kernels: reference", log)


@pytest.mark.parametrize(
    ("environment", "page_size"), [("sglang", 4), ("sglang", 1), ("sglang-0.5.17", 4), ("sglang-0.5.23", 4)]
)
def test_a_pass_in_a_cuda_graph(tiny_checkpoint, environment: str, page_size: int) -> None:
    """It answers what an eager pass does; rows with which SGLang pads it write into no request's slots."""
    done = warm(environment, SUPPORT / "sglang_graph.py", tiny_checkpoint("bf16"), page_size)
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
    # SGLang reads both where it is imported.
    testee = runner.TesteeCommand("sglang", (python_of("sglang"), "-m", "dsv3_plugin.conformance.testees.sglang"))
    report = run([REFERENCE, testee], tiny_checkpoint("bf16"), tmp_path, "batch")
    assert report.passed, (report.problems, report.verdicts)
    assert report.results["sglang"].served.model_class == f"{MODELS}.deepseek_v3.DeepseekV3ForCausalLM"


def test_sglang_s_own_model_is_caught_and_named(
    wide_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLA's real sizes are the only ones that SGLang's own kernels take.
    served = own_model_served_when_switched_off("sglang", wide_checkpoint, tmp_path, monkeypatch)
    assert served == "sglang.srt.models.deepseek_v2.DeepseekV3ForCausalLM"


def sglang_serve(
    checkpoint: Path, log: Path, *arguments: str, python: Sequence[str] = ()
) -> AbstractContextManager[str]:
    """`python -m sglang.launch_server --model-path CHECKPOINT`, without deterministic inference."""
    port = free_port()
    command = [*(python or [python_of("sglang")]), "-m", "sglang.launch_server"]
    command += ["--model-path", str(checkpoint), "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "bfloat16", "--attention-backend", "dsv3", "--disable-cuda-graph"]
    command += ["--context-length", "256", "--max-total-tokens", "2048", "--max-running-requests", "8"]
    command += ["--sleep-on-idle"]
    return serving([*command, *arguments], port, log, {})


MALFORMED: list[tuple[dict[str, object], str]] = [
    ({"input_ids": [5000, 3]}, "5000 in input_ids: the vocabulary has 1024 tokens"),
    ({"input_ids": [3, -1]}, "-1 in input_ids: the vocabulary has 1024 tokens"),
    ({"return_logprob": True, "top_logprobs_num": 1025}, "top_logprobs_num=1025: the vocabulary has 1024 tokens"),
    ({"sampling_params": {"logit_bias": {"5": "nan"}}}, "logit_bias 'nan' of token 5 is not a finite number in fp32"),
    ({"sampling_params": {"logit_bias": {"5": 1e39}}}, "logit_bias 1e+39 of token 5 is not a finite number in fp32"),
    ({"sampling_params": {"logit_bias": {"5": 1e38}, "temperature": 0.1}}, "logit_bias 1e+38 of token 5 is not a"),
    ({"sampling_params": {"logit_bias": {"1024": 1.0}}}, "logit_bias"),
    ({"sampling_params": {"logit_bias": [5]}}, "logit_bias=[5] is not a dictionary"),
    ({"sampling_params": {"top_k": 2**40}}, "top_k=1099511627776 is not an integer of 32 bits"),
    ({"sampling_params": {"sampling_seed": 2**63}}, "sampling_seed=9223372036854775808 is not an integer of 64"),
]
"""Requests of which each would end the server, and what is answered; SGLang itself declines some."""


def declines_the_malformed(address: str, prompt: list[int]) -> None:
    for body, message in MALFORMED:
        assert message in refusal(address, "/generate", {"input_ids": prompt} | body), body


def beside_a_plain_request(address: str, prompt: list[int], params: dict[str, object]) -> dict[str, Any]:
    """The answer to a request for `token_ids_logprob` while one that asks for none is computed."""
    body = {"input_ids": prompt, "return_logprob": True}
    with ThreadPoolExecutor() as threads:
        long = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
        plain = threads.submit(post, address, "/generate", body | {"sampling_params": long})
        answer = post(address, "/generate", body | {"sampling_params": params, "token_ids_logprob": [3, 4]})
        assert not plain.done() and len(plain.result()["output_ids"]) == 150
    return answer


def test_sglang_serve_answers_the_predicted_logprobs(tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bf16")
    prompt = list(range(300, 340))
    log = tmp_path / "serve.log"
    greedy = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    sampled = {"temperature": 0.75, "sampling_seed": 7, "max_new_tokens": 24, "ignore_eos": True}
    logprobs = {"return_logprob": True, "top_logprobs_num": 3}
    broken, other = cut_short(checkpoint, tmp_path / "broken"), tmp_path / "other"
    make_checkpoint(read_config("tiny"), other, 2, dtype=CheckpointDtype("bf16"))
    with sglang_serve(checkpoint, log, "--enable-deterministic-inference") as address:
        body = {"input_ids": prompt, "sampling_params": greedy, "logprob_start_len": 0}
        generated = post(address, "/generate", body | logprobs)
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 3}
        completed = post(address, "/v1/completions", body | {"ignore_eos": True})
        body = {"input_ids": prompt, "sampling_params": sampled, "logprob_start_len": 0}
        drawn = post(address, "/generate", body | logprobs)
        again = post(address, "/generate", {"input_ids": prompt, "sampling_params": sampled})
        declined = refusal(address, "/generate", {"input_ids": prompt, "sampling_params": {"repetition_penalty": 1.5}})
        declines_the_malformed(address, prompt)
        beside = beside_a_plain_request(address, prompt, greedy)
        refused = refusal(address, "/update_weights_from_disk", {"model_path": str(broken)})
        post(address, "/update_weights_from_disk", {"model_path": str(checkpoint)})
        state = get(address, "/server_info")["internal_states"][0]["dsv3"]
        asked = CliRunner().invoke(app, ["fingerprint", address])
        # Paused in place, SGLang would go on with what the request computed with the weights before.
        long = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": long, "return_logprob": True}
        with ThreadPoolExecutor() as threads:
            running = threads.submit(post, address, "/generate", body)
            time.sleep(2)
            post(address, "/pause_generation", {"mode": "in_place"})
            post(address, "/update_weights_from_disk", {"model_path": str(other)})
            post(address, "/continue_generation", {})
            updated = running.result()

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

    assert beside["output_ids"] == tokens
    chosen = [[tuple(item[:2]) for item in items] for items in beside["meta_info"]["output_token_ids_logprobs"]]
    assert chosen == [[(row[token].item(), token) for token in (3, 4)] for row in rows]

    # At a temperature: those of the distribution that it drew from.
    assert drawn["output_ids"] == again["output_ids"]
    tokens = drawn["output_ids"]
    predicted = processed_logprobs(predict_logits(checkpoint, prompt + tokens), sampled["temperature"])
    of_prompt = [tuple(item[:2]) for item in drawn["meta_info"]["input_token_logprobs"][1:]]
    assert of_prompt == [(predicted[i, token].item(), token) for i, token in enumerate(prompt[1:])]
    rows = predicted[len(prompt) - 1 : -1]
    of_output = [tuple(item[:2]) for item in drawn["meta_info"]["output_token_logprobs"]]
    assert of_output == [(row[token].item(), token) for row, token in zip(rows, tokens, strict=True)]
    assert rows.argmax(-1).tolist() != tokens

    assert "dsv3-plugin does not serve this request: SGLang's repetition_penalty leaves the prompt out" in declined
    assert "truncated or not a safetensors file" in refused
    assert state["problem"] is None
    assert asked.exit_code == 0 and asked.stdout.startswith(state["fingerprint"]["digest"]), asked.output
    held = fingerprint_of_checkpoint(CheckpointReader(checkpoint)).tensors
    assert state["fingerprint"]["tensors"].items() < held.items()
    assert state["main"]["class"] == f"{MODELS}.deepseek_v3.DeepseekV3ForCausalLM"
    providers = {operation["operation"]: operation["provider"] for operation in state["main"]["operations"]}
    assert providers["mla_attention"] == "reference"

    tokens = updated["output_ids"]
    of_output = [item[0] for item in updated["meta_info"]["output_token_logprobs"]]
    before, after = (
        torch.log_softmax(predict_logits(path, prompt + tokens), dim=-1)[range(39, 189), tokens].tolist()
        for path in (checkpoint, other)
    )
    switch = next(i for i in range(150) if of_output[i] != before[i])
    assert 0 < switch < 149
    assert of_output[switch:] == after[switch:]
    assert re.search(r"dsv3-plugin \S+ serves DeepseekV3ForCausalLM: profile bf16, strict mode", log.read_text())


def test_sglang_serve_drafts(tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bf16")
    prompt = list(range(300, 340))
    log = tmp_path / "serve.log"
    draft = ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", "2", "--speculative-eagle-topk", "1"]
    draft += ["--speculative-num-draft-tokens", "3"]
    # As RL frameworks do: started without weights, which come later.
    with sglang_serve(checkpoint, log, *draft, "--load-format", "dummy", python=warm_command("sglang")) as address:
        for _ in range(2):  # SGLang fills in `dummy` each time
            post(address, "/update_weights_from_disk", {"model_path": str(checkpoint)})
        params = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
        answer = post(address, "/generate", {"input_ids": prompt, "sampling_params": params, "return_logprob": True})
        params |= {"temperature": 0.75, "min_p": 0.05}
        drawn = post(address, "/generate", {"input_ids": prompt, "sampling_params": params, "return_logprob": True})
        seeded = refusal(address, "/generate", {"input_ids": prompt, "sampling_params": {"sampling_seed": 1}})
        declines_the_malformed(address, prompt)
        # What does not start cannot be set later either; the twins can.
        threshold = "speculative_accept_threshold_single"
        updates = {threshold: 0.1}, {threshold: 1.0}, {"pp_max_micro_batch_size": 4}
        updated = [post(address, "/set_internal_state", {"server_args": values}) for values in updates]
        beside = beside_a_plain_request(address, prompt, {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True})
    assert updated == [[False], [True], [True]]
    tokens, meta = answer["output_ids"], answer["meta_info"]
    rows = torch.log_softmax(predict_logits(checkpoint, prompt + tokens)[len(prompt) - 1 : -1], dim=-1)
    of_output = [tuple(item[:2]) for item in meta["output_token_logprobs"]]
    assert of_output == [(row.max().item(), int(row.argmax())) for row in rows]
    assert meta["spec_verify_ct"] < len(tokens) == 12
    assert beside["output_ids"] == tokens
    chosen = [[tuple(item[:2]) for item in items] for items in beside["meta_info"]["output_token_ids_logprobs"]]
    assert chosen == [[(row[token].item(), token) for token in (3, 4)] for row in rows]
    tokens = drawn["output_ids"]
    rows = processed_logprobs(predict_logits(checkpoint, prompt + tokens)[len(prompt) - 1 : -1], 0.75)
    of_output = [tuple(item[:2]) for item in drawn["meta_info"]["output_token_logprobs"]]
    assert of_output == [(row[token].item(), token) for row, token in zip(rows, tokens, strict=True)]
    assert "SGLang honours sampling_seed with --enable-deterministic-inference only" in seeded
    assert f"{threshold}=0.1: a token is drawn from the target's distribution" in log.read_text()
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
    def start(checkpoint: Path, *arguments: str) -> tuple[int, str]:
        command = ["-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]
        done = warm("sglang", *command, "--port", free_port(), *arguments)
        return done.returncode, done.stdout + done.stderr

    def test_checkpoint_without_a_tensor(self, tiny_checkpoint, tmp_path: Path) -> None:
        status, output = self.start(cut_short(tiny_checkpoint("bf16"), tmp_path / "broken"))
        assert status != 0
        assert re.search(r"CheckpointError: .*model\.safetensors", output), output[-2000:]

    def test_unsupported_dtype(self, tiny_checkpoint) -> None:
        status, output = self.start(tiny_checkpoint("bf16"), "--dtype", "float16")
        assert status != 0
        assert "ConfigError: dtype=torch.float16 has no numerics profile; use float32 or bfloat16" in output

    def test_two_forms_of_attention(self, tiny_checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DSV3_ATTENTION", "two_form")
        status, output = self.start(tiny_checkpoint("bf16"))
        assert status != 0
        refusal = "EngineError: dsv3-plugin does not serve these options of SGLang in the two_form profile"
        assert f"{refusal}: disable_radix_cache=False: in the two_form profile slots of generated" in output
