"""The vLLM adapter, in real vLLM engines of their own environments (`make environments`)."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from engines import (
    REFERENCE,
    cut_short,
    free_port,
    own_model_served_when_switched_off,
    post,
    predict_logprobs,
    python_of,
    run,
    serving,
    shipped_testee,
    warm,
)
from typer.testing import CliRunner

from dsv3_plugin.checkpoint.fingerprint import fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.commands.cli import app
from dsv3_plugin.conformance import runner


@pytest.mark.parametrize(
    ("environment", "dtype", "cases"),
    [
        # All cases of bf16: in `test_sglang`, beside SGLang.
        ("vllm", "fp32", ("batch", "chunked_prefill", "prefix_cache", "mtp_2")),
        ("vllm", "fp8", ("batch", "chunked_prefill", "prefix_cache", "mtp_2")),
        # There a seed beside top-p draws other tokens in other company; the numbers are right.
        ("vllm-0.27.1", "bf16", ("batch", "prefix_cache_chunked", "sampled", "mtp_2", "mtp_prefix_cache")),
    ],
)
def test_vllm_prints_the_reference_s_bits(
    tiny_checkpoint, tmp_path: Path, environment: str, dtype: str, cases: tuple[str, ...]
) -> None:
    report = run([REFERENCE, shipped_testee(environment)], tiny_checkpoint(dtype), tmp_path, *cases)
    assert report.passed, (report.problems, [(v.problems, v.comparisons) for v in report.verdicts if not v.passed])
    served = report.results["vllm"].served
    assert served.model_class == "dsv3_plugin.vllm_backend.model.DeepseekV3ForCausalLM"
    assert served.draft_class == "dsv3_plugin.vllm_backend.model.DeepSeekMTPModel"
    assert served.profile == dtype
    assert served.kernels == report.results["reference"].served.kernels
    for verdict in report.verdicts:
        pair = next(c for c in verdict.comparisons if (c.left, c.right) == ("reference", "vllm"))
        assert pair.equal_rows > 500, verdict.case.name
        # vLLM drafts once more after a request's last token, which may be a draft beyond those asked for.
        last_drafts = verdict.case.num_speculative_tokens * len(verdict.case.requests)
        # Where tokens are drawn, nobody else computes an engine's rejected drafts.
        assert verdict.case.samples or verdict.rows_alone["vllm"] <= last_drafts, verdict.case.name
    outcomes = {case.name: case for case in report.results["vllm"].cases}
    assert 0 < outcomes["mtp_2"].num_accepted_tokens < outcomes["mtp_2"].num_draft_tokens


needs_amx = pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(),
    reason="on a CPU without AMX vLLM switches chunked prefill off for its own MLA, and the suite's cases need it",
)


@needs_amx
def test_vllm_s_own_model_is_caught_and_named(
    wide_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MLA's real sizes are the only ones that vLLM's own CPU kernels take.
    served = own_model_served_when_switched_off("vllm", wide_checkpoint, tmp_path, monkeypatch)
    assert served.startswith("vllm.model_executor.models.")


@needs_amx
def test_vllm_s_own_model_is_close(wide_checkpoint: Path, tmp_path: Path) -> None:
    """As the testee `vllm-own`, which is asked for and claims closeness; its modules are recorded as ours are."""
    program = shipped_testee("vllm").command
    own = runner.TesteeCommand("vllm-own", ("env", "DSV3_PLUGIN=off", *program, "--own-model"))
    report = run([REFERENCE, own], wide_checkpoint, tmp_path, "decode")
    assert report.passed, (report.problems, [v.problems for v in report.verdicts])
    (close,) = report.closeness
    print("\n".join(close.describe()))
    assert close.distance.rows > 20 and close.distance.kl_mean > 0
    assert report.results["vllm-own"].served.model_class.startswith("vllm.model_executor.models.")
    drift = {part.stream: part.relative for part in close.drift}
    assert list(drift) == [part.stream for part in close.spread_drift]
    assert max(drift["layers.0.self_attn"], drift["layers.1.mlp"], drift["norm"]) < 0.5


def vllm_serve(checkpoint: Path, log: Path, *arguments: str) -> AbstractContextManager[str]:
    """`vllm serve CHECKPOINT`."""
    port = free_port()
    command = [str(Path(python_of("vllm")).with_name("vllm")), "serve", str(checkpoint), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", "256", *arguments]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    # For /collective_rpc.
    settings |= {"VLLM_SERVER_DEV_MODE": "1"}
    return serving(command, port, log, settings)


def test_vllm_serve_answers_the_predicted_logprobs(tiny_checkpoint, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("bf16")
    prompt = list(range(300, 340))
    log = tmp_path / "serve.log"
    speculative = '{"method": "mtp", "num_speculative_tokens": 1}'
    with vllm_serve(checkpoint, log, "--speculative-config", speculative) as address:
        body = {"model": str(checkpoint), "prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3}
        # Under their ids: different tokens may have the same text, and would be one entry.
        body |= {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
        answer = post(address, "/v1/completions", body)
        (kept,) = post(address, "/collective_rpc", {"method": "dsv3_fingerprint"})["results"]  # type: ignore[misc]
        (serving,) = post(address, "/collective_rpc", {"method": "dsv3_provenance"})["results"]  # type: ignore[misc]
        compared = CliRunner().invoke(app, ["fingerprint", address, str(checkpoint)])
    assert compared.exit_code == 0 and compared.stdout.count(kept["digest"]) == 2, compared.output
    (choice,) = answer["choices"]  # type: ignore[misc]
    tokens = choice["token_ids"]
    assert len(tokens) == 12
    predicted = predict_logprobs(checkpoint, prompt + tokens)
    for i, (token, logprob) in enumerate(zip(tokens, choice["logprobs"]["token_logprobs"], strict=True)):
        row = predicted[len(prompt) - 1 + i]
        assert int(row.argmax()) == token
        assert logprob == row[token].item()
        best = sorted(choice["logprobs"]["top_logprobs"][i].values(), reverse=True)[:3]
        assert best == row.topk(3).values.tolist()
    # The draft's layer is counted, and served by the kernels that are told.
    reader = CheckpointReader(checkpoint)
    assert kept == fingerprint_of_checkpoint(reader).model_dump()
    for part, name in (("main", "DeepseekV3ForCausalLM"), ("mtp", "DeepSeekMTPModel")):
        assert serving[part]["class"] == f"dsv3_plugin.vllm_backend.model.{name}"
        assert (serving[part]["profile"], serving[part]["mode"]) == ("bf16", "strict")
        providers = {kernel["operation"]: kernel["provider"] for kernel in serving[part]["operations"]}
        assert set(providers.values()) == {"reference"}
        assert {"linear", "mla_attention", "route"} <= providers.keys()
    text = log.read_text()
    for served in ("DeepseekV3ForCausalLM", "DeepSeekMTPModel"):
        assert re.search(rf"dsv3-plugin \S+ serves {served}: profile bf16, strict mode, kernels: reference", text)


class TestBadInput:
    """Each ends the engine with a last line that says what to do; none falls back to vLLM's own model."""

    @staticmethod
    def start(checkpoint: Path, arguments: str = "", **variables: str) -> tuple[int, str]:
        program = f"from vllm import LLM; LLM({str(checkpoint)!r}, enforce_eager=True, max_model_len=64, {arguments})"
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        done = warm("vllm", "-c", program, **settings, **variables)
        return done.returncode, done.stdout + done.stderr

    def test_checkpoint_without_a_tensor(self, tiny_checkpoint, tmp_path: Path) -> None:
        status, output = self.start(cut_short(tiny_checkpoint("bf16"), tmp_path / "broken"))
        assert status != 0
        assert re.search(r"CheckpointError: .*model\.safetensors", output), output[-2000:]

    def test_unsupported_dtype(self, tiny_checkpoint) -> None:
        status, output = self.start(tiny_checkpoint("bf16"), "dtype='float16'")
        assert status != 0
        assert "ConfigError: dtype=torch.float16 has no numerics profile; use float32 or bfloat16" in output

    def test_a_quantization_that_is_not_the_checkpoint_s(self, tiny_checkpoint) -> None:
        status, output = self.start(tiny_checkpoint("bf16"), "quantization='fp8'")
        assert status != 0
        assert (
            "EngineError: dsv3-plugin does not serve these options of vLLM: model_config.quantization='fp8'" in output
        )

    def test_a_length_beyond_the_checkpoint_s_positions(self, tiny_checkpoint) -> None:
        shorter = "hf_overrides={'max_position_embeddings': 32}"
        status, output = self.start(tiny_checkpoint("bf16"), shorter, VLLM_ALLOW_LONG_MAX_MODEL_LEN="1")
        assert status != 0
        assert "EngineError: max_model_len=64 exceeds the positions that the checkpoint knows" in output

    def test_unknown_mode(self, tiny_checkpoint) -> None:
        status, output = self.start(tiny_checkpoint("bf16"), DSV3_PLUGIN_MODE="careful")
        assert status != 0
        assert "KernelError: DSV3_PLUGIN_MODE='careful'; use strict or fast" in output

    def test_two_forms_of_attention(self, tiny_checkpoint) -> None:
        connector = "kv_transfer_config={'kv_connector': 'ExampleConnector', 'kv_role': 'kv_both'}"
        status, output = self.start(tiny_checkpoint("bf16"), connector, DSV3_ATTENTION="two_form")
        assert status != 0
        assert (
            "EngineError: dsv3-plugin does not serve these options of vLLM in the two_form profile: kv_trans" in output
        )


PLUGIN_PROGRAM = """
import os
import torch
from vllm import ModelRegistry
from dsv3_plugin.vllm_backend import compat, plugin

def show(step):
    for name in plugin.ARCHITECTURES:
        model = ModelRegistry.models[name]
        print(f"{step}: {name} is {model.module_name}:{model.class_name}")

os.environ["DSV3_PLUGIN"] = "off"
plugin.register()
show("off")
del os.environ["DSV3_PLUGIN"]
plugin.register()
plugin.register()
show("on")
ModelRegistry.register_model("DeepseekV3ForCausalLM", "their_plugin.model:TheirModel")
plugin.register()
show("second")
their_model = type("TheirClass", (torch.nn.Module,), {"__module__": "their_plugin.model"})
their_model.forward = lambda self, input_ids, positions: None
their_model.embed_input_ids = their_model.forward
ModelRegistry.register_model("DeepseekV3ForCausalLM", their_model)
plugin.register()
show("third")
compat.TESTED = ("0.1.0", "0.2.0")
print("untested")
plugin.register()
for value in "0", "1":
    os.environ["VLLM_BATCH_INVARIANT"] = value
    print(f"VLLM_BATCH_INVARIANT={value}: {compat.batch_invariance_warning()}")
"""


@pytest.mark.parametrize("environment", ["vllm", "vllm-0.27.1"])
def test_the_entry_point(environment: str) -> None:
    """In order: the kill switch, registering twice, another plugin in the way, an untested version, a variable that
    changes log-probabilities.
    """
    variables = {"VLLM_PLUGINS": ""}
    command = [python_of(environment), "-u", "-c", PLUGIN_PROGRAM]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | variables
    )
    output = done.stdout
    assert done.returncode == 0, output
    assert re.search(r"^off: DeepseekV3ForCausalLM is vllm\.model_executor\.models\.", output, re.M)
    for step in ("on", "second", "third"):
        for name in ("DeepseekV3ForCausalLM", "DeepSeekMTPModel"):
            assert f"{step}: {name} is dsv3_plugin.vllm_backend.model:{name}\n" in output
    named = "dsv3-plugin replaces their_plugin.model:TheirModel for DeepseekV3ForCausalLM"
    assert named in output
    assert named not in output[: output.index("on: ")]
    assert "dsv3-plugin replaces their_plugin.model:TheirClass for DeepseekV3ForCausalLM" in output
    for name in "TheirModel", "TheirClass":
        said = f"does not serve DeepseekV3ForCausalLM: another plugin registered their_plugin.model:{name} after it"
        assert output.count(said) == 1
    warning = r"dsv3-plugin is tested with vLLM 0\.1\.0 to 0\.2\.0, this is 0\.\d+\.\d"
    assert re.search(warning, output[output.index("untested") :])
    assert not re.search("is tested with", output[: output.index("untested")])
    assert "VLLM_BATCH_INVARIANT=0: None\n" in output
    assert "VLLM_BATCH_INVARIANT=1: VLLM_BATCH_INVARIANT is set, which dsv3-plugin's model does not need" in output


METADATA_PROGRAM = """
import json
from dataclasses import replace
from types import SimpleNamespace

import torch
from dsv3_plugin.profile import BF16
from dsv3_plugin.vllm_backend.attention import LatentMetadataBuilder
from dsv3_plugin.vllm_backend.prompts import know_prompts
from vllm.v1.attention.backend import AttentionCGSupport

assert LatentMetadataBuilder._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
asked = []


class Loader:
    def require_whole(self):
        asked.append("whole")


scheduler = SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=32)
ops = SimpleNamespace(setting=SimpleNamespace(profile=BF16))
layer = SimpleNamespace(weight_loader=Loader(), kv_cache=torch.zeros(5, 16, 8), prompts=None, ops=ops)
layers = SimpleNamespace(static_forward_context={"layer": layer})
config = SimpleNamespace(
    scheduler_config=scheduler,
    compilation_config=layers,
    model_config=None,
    speculative_config=None,
    parallel_config=None,
)
builder = LatentMetadataBuilder(SimpleNamespace(block_size=16), ["layer"], config, torch.device("cpu"))


def step(slots, seq_lens):
    return SimpleNamespace(
        num_actual_tokens=len(slots),
        num_reqs=len(seq_lens),
        query_start_loc=torch.arange(len(seq_lens) + 1),
        query_start_loc_cpu=torch.arange(len(seq_lens) + 1),
        seq_lens=torch.tensor(seq_lens),
        block_table_tensor=torch.zeros(len(seq_lens), 2, dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
    )


def tensors(made):
    return {"slots": made.slots, "seq_lens": made.batch.seq_lens}


first = tensors(builder.build_for_cudagraph_capture(step([37, 16], [6, 1])))
asked_by_capture = list(asked)
LatentMetadataBuilder.answers = False
builder.build(0, step([37, 16], [6, 1]))
LatentMetadataBuilder.answers = True
asked_by_dummy = list(asked)
kept = {name: (x.data_ptr(), x) for name, x in first.items()}
second = tensors(builder.build(0, step([15, 64, -1], [16, 5, 1])))
asked_by_step = list(asked)
shown = {
    "values": {name: x.tolist() for name, x in second.items()},
    "same address": [second[name].data_ptr() == address for name, (address, _) in kept.items()],
    "as a graph reads it": {name: x.tolist() for name, (_, x) in kept.items()},
}
# Two requests, one at its prompt's last token, and one of padding; the numbers behind the batch are old ones.
ops.setting.profile = replace(BF16, attention="two_form")
numbers = SimpleNamespace(
    num_reqs=2, num_prompt_tokens=torch.tensor([16, 3, 9]), num_computed_tokens_cpu=torch.tensor([15, 4, 0])
)
runner = SimpleNamespace(input_batch=numbers)
runner._determine_batch_execution_and_padding = lambda *args, force_eager: force_eager
before = builder.build(0, step([15, 64], [16, 5])).batch
layer.prompts = know_prompts(runner)
in_two_forms = {
    "before requests may come": before.prompt_counts,
    "a step": builder.build(0, step([15, 64, -1], [16, 5, 1])).batch.prompt_counts,
    "captured": builder.build_for_cudagraph_capture(step([15, 64], [16, 5])).batch.prompt_counts,
    "drafting": [builder.build_for_drafting(step([15, 64], [16, 5]), i).batch.prompt_counts for i in range(2)],
    "eager": runner._determine_batch_execution_and_padding(1),
}
numbers.num_computed_tokens_cpu[0] = 16
in_two_forms["eager behind prompts"] = runner._determine_batch_execution_and_padding(1)
LatentMetadataBuilder.answers = False
numbers.num_computed_tokens_cpu[0] = 0
in_two_forms["nobody's"] = builder.build(0, step([15, 64], [16, 5])).batch.prompt_counts
asked = [asked_by_capture, asked_by_dummy, asked_by_step]
print(json.dumps(shown | {"asked": asked, "in two forms": in_two_forms}))
"""


@pytest.mark.parametrize("environment", ["vllm", "vllm-0.27.1"])
def test_a_step_s_metadata_stays_where_a_cuda_graph_reads_it(environment: str) -> None:
    """The second step is seen through the first one's tensors, the captured ones. A slot of -1 is page 0, which no
    request has. Each step asks whether the weights are whole; a capture does not, nor a pass that answers nobody.
    """
    done = warm(environment, "-c", METADATA_PROGRAM)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["values"] == {"slots": [15, 64, 0], "seq_lens": [16, 5, 1]}
    assert told["asked"] == [[], [], ["whole"]]
    assert told["same address"] == [True] * 2
    assert told["as a graph reads it"] == {"slots": [15, 64], "seq_lens": [16, 5]}
    # In the `two_form` profile it says which rows are of prompts; those keep a step out of CUDA graphs.
    assert told["in two forms"] == {
        "before requests may come": [0, 0],
        "a step": [1, 0, 0],
        "captured": [0, 0],
        "drafting": [[1, 0], [0, 0]],
        "eager": True,
        "eager behind prompts": False,
        "nobody's": [0, 0],
    }


STREAMED_PROGRAM = """
import os
from types import SimpleNamespace

from dsv3_plugin.vllm_backend import engine
from vllm.v1.engine.core import EngineCore

engine.install()
for form in "absorbed", "two_form":
    os.environ["DSV3_ATTENTION"] = form
    for resumable in False, True:
        try:
            EngineCore.preprocess_add_request(None, SimpleNamespace(resumable=resumable))
        except Exception as error:
            print(f"{form}, {resumable}: {type(error).__name__}: {error}")
"""


def test_a_streamed_input_is_refused_in_two_forms() -> None:
    """Its prompt grows over what was generated. The twins get as far as vLLM's own call, which has no engine here."""
    lines = warm("vllm", "-c", STREAMED_PROGRAM).stdout.splitlines()
    refused = [line for line in lines if "EngineError" in line]
    told = "streamed inputs are not served in the two_form profile: send a whole prompt"
    assert refused == [f"two_form, True: EngineError: {told}"] and len(lines) >= 4, lines


def test_log_softmax_is_a_distribution(tiny_checkpoint) -> None:
    predicted = predict_logprobs(tiny_checkpoint("bf16"), list(range(300, 310)))
    assert predicted.exp().sum(-1).tolist() == pytest.approx([1.0] * 10, abs=1e-5)
    assert all(math.isfinite(value) for value in predicted.flatten().tolist())
