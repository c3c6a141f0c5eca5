"""Megatron in the `two_form` profile: rows of prompts are those that a forward pass is told of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import TinyCheckpoint
from engines import REFERENCE, in_fork
from megatron_programs import needs_megatron, warm
from megatron_programs import testee as of_megatron
from paths import ROOT, SUPPORT

from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.profile import ATTENTION_VARIABLE

pytestmark = needs_megatron

MEGATRON = "dsv3_plugin.conformance.testees.megatron"


@pytest.fixture
def in_two_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTENTION_VARIABLE, "two_form")


def test_the_training_forward_has_the_references_bits(tiny_checkpoint: TinyCheckpoint, in_two_forms: None) -> None:
    """Packed and padded, drafts too."""
    testees = [in_fork(REFERENCE), of_megatron(MEGATRON)]
    report = runner.run(testees, tiny_checkpoint("fp8"), lambda *_: None, only=("mtp_1",))
    assert report.passed and report.profile == "fp8 two_form", report.to_json()
    pair = report.verdicts[0].between("reference", "megatron")
    assert pair is not None and pair.equal_rows > 500
    kernels = {name: result.served.kernels for name, result in report.results.items()}
    assert "head_attention" in kernels["megatron"] and kernels["megatron"].items() >= kernels["reference"].items()


def test_ranks_have_the_bits_of_one(
    tiny_checkpoint: TinyCheckpoint, in_two_forms: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin forgets where prompts end: caught in the first layer, at the first generated token."""
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    monkeypatch.setenv("SABOTAGE", "prompts")
    ranks = of_megatron(MEGATRON).on(ParallelLayout.parse("tp=2,pp=2"))
    forgetful = replace(of_megatron(str(SUPPORT / "sabotaged_megatron.py")), name="forgetful")
    testees = [in_fork(REFERENCE), ranks, forgetful]
    report = runner.run(testees, tiny_checkpoint("bf16"), lambda *_: None, only=("mtp_1",))
    assert report.profile == "bf16 two_form in 2 reduction slices"
    (verdict,) = report.verdicts
    own, caught = (verdict.between("reference", testee.name) for testee in (ranks, forgetful))
    assert own is not None and own.equal and own.equal_rows > 500, report.to_json()
    assert caught is not None and caught.first_difference is not None
    first = caught.first_difference
    prompt = verdict.case.requests[first.request].prompt_token_ids
    assert (first.stream, first.position) == ("layers.0.self_attn", len(prompt))


PROGRAM = """
import sys
from dataclasses import replace
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import distributed as dist
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.errors import InputError
from dsv3_plugin.megatron_backend.config import transformer_config
from dsv3_plugin.megatron_backend.model import build_model
from dsv3_plugin.megatron_backend.weights import load_checkpoint
sys.path.insert(0, sys.argv[2])
from trainer import pack

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(0)
reader = CheckpointReader(sys.argv[1])
seen = []

def keep(module, inputs, output):
    seen.append(output[0].detach().clone())  # Megatron's loss writes into it

def build(attention, **settings):
    profile = replace(reader.profile(), attention=attention)
    model = build_model(reader.config, transformer_config(reader.config, profile, **settings), profile=profile)
    load_checkpoint(model, sys.argv[1])
    model.output_layer.register_forward_hook(keep)
    return model

models = {
    "kept": build("two_form"),
    "full": build("two_form", recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    "selective": build("two_form", recompute_granularity="selective", recompute_modules=["layernorm", "mla_up_proj"]),
}
kept = models["kept"]

LENGTHS, PROMPTS = (24, 13, 20), (9, 13, 1)
generator = torch.Generator().manual_seed(3)
sequences = [torch.randint(3, 1000, (length,), generator=generator) for length in LENGTHS]
packed = pack([(tokens[:n].tolist(), tokens[n:].tolist(), 1.0) for tokens, n in zip(sequences, PROMPTS)]).inputs
untold = packed | {"prompt_lens": None}

def padded(sequences, prompt_lens):
    longest = max(map(len, sequences))
    ids = torch.stack([torch.nn.functional.pad(tokens, (0, longest - len(tokens))) for tokens in sequences])
    positions = torch.arange(longest).expand_as(ids)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": None, "prompt_lens": prompt_lens}

def rows(model, inputs, places=((0, 0), (0, 24), (0, 37)), lengths=LENGTHS):
    # Of sequences that begin at places [b, s]: logits, and its drafts', for which Megatron runs the head first. The
    # last token has no successor to draft from.
    seen.clear()
    model(**inputs)
    drafts, main = (x.transpose(0, 1) for x in seen)
    return [torch.cat((main[b, s : s + n], drafts[b, s : s + n - 1])) for (b, s), n in zip(places, lengths)]

alone = []
for tokens, prompt_len in zip(sequences, PROMPTS):
    alone += rows(kept, padded([tokens], [prompt_len]), [(0, 0)], [len(tokens)])

def equal(found, expected=alone):
    return sum(int((one == other).all(-1).sum()) for one, other in zip(found, expected, strict=True))

for name, model in models.items():
    for mode in True, False:
        with torch.set_grad_enabled(mode):
            print(name, mode, equal(rows(model.train(mode), packed)))
print("documents", equal(rows(kept, packed | {"packed_seq_params": None})))
print("padded", equal(rows(kept, padded(sequences, PROMPTS), [(0, 0), (1, 0), (2, 0)])))
print("untold", equal(rows(kept, untold)), equal(rows(kept, untold), rows(kept, packed | {"prompt_lens": LENGTHS})))
absorbed = build("absorbed")
print("absorbed", equal(rows(absorbed, untold), rows(absorbed, packed)))

def gradients(model, *prompts):
    # Of two passes of which the second begins before the first one's layers are computed again, as in a pipeline.
    model.train().zero_grad()
    labels = packed["input_ids"].roll(-1, 1)
    for loss in [model(**packed | {"prompt_lens": each}, labels=labels).mean() for each in prompts]:
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]

expected = gradients(kept, PROMPTS, (1, 2, 3))
for name in "full", "selective":
    print("gradients", name, all(map(torch.equal, gradients(models[name], PROMPTS, (1, 2, 3)), expected)))
print("gradients untold", all(map(torch.equal, gradients(kept, PROMPTS, None), expected)))

packing = packed["packed_seq_params"]
filled = packing.cu_seqlens_q - torch.tensor([0, 0, 0, 2], dtype=torch.int32)
with_padding = replace(packing, cu_seqlens_q=filled, cu_seqlens_q_padded=packing.cu_seqlens_q)
for call, inputs in (
    (kept, packed | {"prompt_lens": PROMPTS[1:]}),
    (kept.build_schedule_plan, packed | {"prompt_lens": (9, 13, -1)}),
    (kept, packed | {"packed_seq_params": with_padding, "prompt_lens": (9, 13, 19)}),
    (kept, {"input_ids": None, "position_ids": None, "attention_mask": None, "prompt_lens": (1,)}),
):
    try:
        call(**inputs)
        print("accepted")
    except InputError as error:
        print("refused", error)
"""


def test_a_sequence_has_the_bits_that_it_has_alone(tiny_checkpoint: TinyCheckpoint) -> None:
    """In all batches and modes, as examples/rl packs it too. The twin is told of no prompts, and takes all tokens for
    theirs; in the default profile that changes no bit.
    """
    lines = warm("-c", PROGRAM, tiny_checkpoint("bf16"), ROOT / "examples" / "rl").stdout.splitlines()
    total = 2 * (24 + 13 + 20) - 3
    told = "are not the lengths of 3 sequences' prompts: give each sequence a whole number of 0 or more, in their order"
    assert lines == [
        *(f"{name} {mode} {total}" for name in ("kept", "full", "selective") for mode in (True, False)),
        f"documents {total}",
        f"padded {total}",
        f"untold {2 * (9 + 13 + 1) - 1} {total}",
        f"absorbed {total}",
        "gradients full True",
        "gradients selective True",
        "gradients untold False",
        f"refused prompt_lens [13, 1] {told}",
        f"refused prompt_lens [9, 13, -1] {told}",
        "refused prompt_lens [9, 13, 19] are longer than the sequences, of [24, 13, 18] tokens",
        "refused prompt_lens were given, so that every pipeline stage must be given input_ids or position_ids",
    ]


MBRIDGE = """
import os, sys, types
import torch
mbridge, core = types.ModuleType("mbridge"), types.ModuleType("mbridge.core")
core.Bridge, core.register_model = object, lambda names: lambda cls: cls
sys.modules |= {"mbridge": mbridge, "mbridge.core": core}
from dsv3_plugin.errors import EngineError
from dsv3_plugin.hosts.mbridge import DeepseekV3Bridge
bridge = DeepseekV3Bridge()
sizes = dict.fromkeys(("tp_size", "pp_size", "cp_size", "ep_size", "etp_size"), 1)
bridge.mpu, bridge.extra_args, bridge.dtype = types.SimpleNamespace(**sizes, vpp_size=None), {}, torch.bfloat16
bridge.hf_config, bridge._get_actual_hf_path = types.SimpleNamespace(name_or_path=sys.argv[1]), lambda path: path
for form in "absorbed", "two_form":
    os.environ["DSV3_ATTENTION"] = form
    try:
        bridge._build_config()
        print("accepted")
    except EngineError as error:
        print("refused", error)
"""


def test_hosts_that_do_not_tell_are_refused(tiny_checkpoint: TinyCheckpoint) -> None:
    lines = warm("-c", MBRIDGE, tiny_checkpoint("bf16")).stdout.splitlines()
    told = "DSV3_ATTENTION=two_form is not yet served by hosts of mbridge, such as verl: unset it"
    assert lines == ["accepted", f"refused {told}"]
