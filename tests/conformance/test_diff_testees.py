"""`dsv3 diff` of two testees: the first operation that differs is named, and told from what it is given."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import run_cli
from mini_checkpoint import MINI, Folders
from paths import SUPPORT
from wrong_kernel import wrong_kernel

from dsv3_plugin import registry
from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.conformance import runner, taps
from dsv3_plugin.conformance.calls import Call, read_call
from dsv3_plugin.conformance.compare import RowFile
from dsv3_plugin.conformance.programs import Program, Progress
from dsv3_plugin.conformance.protocol import Case, Job, Request, call_file, read_job, write_message
from dsv3_plugin.conformance.taps import operation_of
from dsv3_plugin.conformance.testees import program
from dsv3_plugin.conformance.testees.reference import ReferenceTestee
from dsv3_plugin.diff import testees
from dsv3_plugin.diff.calls import blame, differences
from dsv3_plugin.diff.report import Diff, compare
from dsv3_plugin.diff.sides import Side, no_logits, read_side
from dsv3_plugin.errors import DiffError
from dsv3_plugin.ops.linear import linear
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.ops.silu_and_mul import silu_and_mul
from dsv3_plugin.profile import BF16, FP32

PROMPT = Request(prompt_token_ids=(3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5), max_tokens=1, prompt_logprobs=True)
CASE = Case(name="prompt", title="a prompt", rounds=((PROMPT,),), prompt_logits=True)
TWO_GENERATED = CASE.model_copy(update={"rounds": ((PROMPT.model_copy(update={"max_tokens": 2}),),)})

OPERATIONS = {
    "bf16": (
        "rms_norm",
        "add_rms_norm",
        "linear",
        "absorb",
        "mla_attention",
        "head_linear",
        "silu_and_mul",
        "moe_router",
        "permute",
        "grouped_linear",
        "combine",
    ),
    "fp8": (
        "rms_norm_fp8",
        "add_rms_norm_fp8",
        "fp8_linear",
        "head_linear_fp8",
        "silu_and_mul_fp8",
        "permute_fp8",
        "grouped_fp8_linear",
    ),
    "bf16 in slices": ("sliced_linear",),
    "fp8 in slices": ("sliced_fp8_linear",),
}
"""That a model calls; of fp8 those that bf16 has not, of slices those that one slice has not."""

NOT_NAMED = {
    "sort_by_expert": "it numbers rows: what it feeds is named",
    "rope": "inside of absorb",
    "router_linear": "inside of moe_router",
    "route": "inside of moe_router",
    "quantize_fp8": "inside of what makes the numbers",
    "quantize_fp8_weight": "in backward passes",
    "quantize_fp8_columns": "in backward passes",
    "fp8_wgrad": "in backward passes",
    "head_attention": "in the two_form profile, where `o_proj` is named, which it feeds",
    "combine_gradient": "in backward passes",
    "rms_norm_gradient": "in backward passes",
    "silu_and_mul_gradient": "in backward passes",
}
"""That no row of a testee shows; `test_saboteurs.py` and the tests of gradients catch what is wrong in them."""

SLICEABLE = {"num_attention_heads": 4, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "n_shared_experts": 2}
"""Of the smallest model what has two slices of whole blocks."""

Make = Callable[[Job], ReferenceTestee]


def with_wrong(name: str) -> Make:
    """The reference, but for one operation's kernel."""

    def make(job: Job) -> ReferenceTestee:
        with pytest.MonkeyPatch.context() as patch:
            offered = registry.offered_kernels()
            patch.setattr(registry, "offered_kernels", lambda: [*offered, wrong_kernel(name)])
            patch.setenv(registry.MODE_VARIABLE, "fast")
            return ReferenceTestee(job)

    return make


def with_another_weight(job: Job) -> ReferenceTestee:
    """The reference, but for the last bit of one weight."""
    testee = ReferenceTestee(job)
    weight = testee.model.get_parameter("model.layers.1.self_attn.q_b_proj.weight")
    weight.data.view(torch.int16)[0, 0] ^= 1
    return testee


@pytest.fixture
def diff(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Diff]:
    """Of the reference and another testee, both in this process."""
    made: dict[str, Make] = {"reference": ReferenceTestee}

    def run_programs(programs: Mapping[str, Program], progress: Progress) -> None:
        for name, (_, job_dir, result_dir, _) in programs.items():
            program.run_job(made[name], read_job(job_dir), result_dir)

    monkeypatch.setattr(testees, "run_programs", run_programs)

    def run(checkpoint: Path, other: Make, case: Case = CASE) -> Diff:
        made["other"] = other
        commands = [runner.TesteeCommand(name, ()) for name in made]
        return testees.diff_testees(commands, checkpoint, case, lambda name, what: None, keep=tmp_path / "kept")

    return run


def test_equal_testees_and_all_their_operations(diff, mini: Folders, tmp_path: Path) -> None:
    found = diff(mini["bf16"], ReferenceTestee)
    assert found.equal and found.verdict.startswith("EQUAL: 11 log-probabilities and ")
    assert not (tmp_path / "kept" / "again").exists()
    rows = RowFile(tmp_path / "kept" / "first" / "other" / "prompt.safetensors")
    assert {operation_of(stream) for stream in rows.streams} == {*OPERATIONS["bf16"], None}
    # One row a token, in the order in which the model runs, whatever order the experts' rows had.
    assert all(rows.positions(stream).tolist() == list(range(11)) for stream in rows.streams)
    order = [rows.streams.index(f"layers.1.mlp{name}") for name in (".gate/moe_router.0", "/permute", "/combine", "")]
    assert order == sorted(order)
    chosen = rows.values("layers.1.mlp.gate/moe_router.0")
    assert chosen.dtype == torch.int64 and rows.values("layers.1.mlp/permute").shape[1] == 128 * chosen.shape[1]


def test_every_operation_is_named_or_known_not_to_be() -> None:
    named = {name for names in OPERATIONS.values() for name in names}
    assert named.isdisjoint(NOT_NAMED) and named | NOT_NAMED.keys() == operations().keys()


@pytest.mark.parametrize(
    ("dtype", "name"), [(dtype, name) for dtype in OPERATIONS for name in sorted(OPERATIONS[dtype])]
)
def test_a_wrong_kernel_is_named(
    diff, mini: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, name: str
) -> None:
    weights, in_slices, _ = dtype.partition(" in slices")
    checkpoint = mini[weights]
    if in_slices:
        monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
        checkpoint = make_checkpoint(MINI | SLICEABLE, tmp_path / "sliceable", 1, dtype=CheckpointDtype(weights)).path
    found = diff(checkpoint, with_wrong(name))
    assert found.cause is not None and found.cause.name == "layers"
    headline, blamed, *_ = found.cause.says
    assert headline.startswith(f"operation {name} in ") and headline.endswith(", 1 ulp apart")
    assert blamed.startswith(f"{name} is given the same arguments, every bit: its implementations part, reference ")
    assert "saboteur 1.0" in blamed
    assert found.cause.found["first"]["operation"] == name
    # The saved calls, made again: the contract's side is known.
    left, right = (read_call(call_file(tmp_path / "kept" / "again" / side)) for side in ("reference", "other"))
    made = left.again(wrong_kernel(name).run)
    assert not list(differences(right, made))
    (text,) = differences(left, made)
    assert text.startswith("output 0 differs in 1 of ") and text.endswith(", 1 ulp apart")


SHOWS_AT = {"head_attention": 0, "head_linear": 0, "rope": 1, "mla_attention": 11}
"""Attention's operations in the `two_form` profile, each with the first position that it shows at: a token that sees
itself alone has the same attention however it is rotated, and position 11 is the first generated token's.
"""


@pytest.mark.parametrize("name", SHOWS_AT)
def test_in_two_forms_attention_is_told_by_its_projection(
    diff, mini: Folders, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DSV3_ATTENTION", "two_form")
    found = diff(mini["bf16"], with_wrong(name), TWO_GENERATED)
    assert found.cause is not None
    told = "layers.0.self_attn.o_proj: not linear itself: what it is given differs: x at ("
    assert found.cause.says[0].startswith(told)
    assert found.cause.found["first"]["position"] == SHOWS_AT[name]


@pytest.mark.parametrize("name", ["rms_norm", "linear", "moe_router", "combine"])
def test_in_two_forms_others_are_named(diff, mini: Folders, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DSV3_ATTENTION", "two_form")
    found = diff(mini["bf16"], with_wrong(name), TWO_GENERATED)
    assert found.cause is not None
    assert found.cause.says[0].startswith(f"operation {name} in ")
    assert found.cause.says[1].startswith(f"{name} is given the same arguments, every bit")


def test_in_two_forms_rows_are_of_tokens_however_prompts_are_cut(
    mini: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin records attention's own operations, too, which are of a chunk's keys and not of its tokens."""
    monkeypatch.setenv("DSV3_ATTENTION", "two_form")

    def compared(case: Case, name: str) -> Diff:
        return compare(*(computed(case, chunk, tmp_path / f"{name} {chunk}") for chunk in (None, 4)))

    def computed(case: Case, chunk: int | None, folder: Path) -> Side:
        cut = case.model_copy(update={"max_num_batched_tokens": chunk})
        job = Job(checkpoint=str(mini["bf16"]), block_size=16, cases=(cut,), operations=True)
        folder.mkdir()
        write_message(job, folder)
        program.run_job(ReferenceTestee, job, folder / "reference")
        return read_side(folder / "reference")

    found = compared(TWO_GENERATED, "own")
    assert found.equal, found.verdict
    streams = RowFile(tmp_path / "own None" / "reference" / "prompt.safetensors").streams
    recorded = {*OPERATIONS["bf16"], None} - {"absorb", "mla_attention", "head_linear"}
    assert {operation_of(stream) for stream in streams} == recorded
    monkeypatch.setattr(taps, "_OF_ATTENTION", "of none")
    told = "DIFFERENT: layers: operation head_linear in layers.0.self_attn is the first to differ "
    assert compared(CASE, "twin").verdict.startswith(told)


def test_dumps_that_tell_no_cause_are_explained_by_testees(diff, mini: Folders, tmp_path: Path, monkeypatch) -> None:
    """As a host writes them: tokens and log-probabilities alone."""
    diff(mini["bf16"], with_wrong("silu_and_mul"))
    kept = (read_side(tmp_path / "kept" / "first" / name) for name in ("reference", "other"))
    trainer, server = (replace(side, rows={}, logits=no_logits) for side in kept)
    dumps = compare(trainer, server)
    assert dumps.cause is None and dumps.verdict.startswith("DIFFERENT: ")
    commands = [runner.TesteeCommand(name, ()) for name in ("reference", "other")]

    def explained() -> Diff:
        return testees.explain(dumps, (trainer, server), commands, mini["bf16"], lambda name, what: None)

    found = explained()
    assert found.verdict.startswith("DIFFERENT: layers: operation silu_and_mul in layers.0.mlp is the first to differ ")

    # The twin: what ran is not what testees run.
    def run_programs(programs: Mapping[str, Program], progress: Progress) -> None:
        for _, job_dir, result_dir, _ in programs.values():
            program.run_job(ReferenceTestee, read_job(job_dir), result_dir)

    monkeypatch.setattr(testees, "run_programs", run_programs)
    agreed = "reference and other, run again on sample prompt/0, agree in every bit: look at what ran: "
    assert agreed in explained().verdict
    # Nor what the sample was, where a generated token is another row than a prompt's.
    monkeypatch.setenv("DSV3_ATTENTION", "two_form")
    with pytest.raises(DiffError, match="a sample does not say where its prompt ends, which DSV3_ATTENTION=two_form"):
        explained()


def test_what_numbers_the_rows_is_blamed_on_what_it_feeds(diff, mini: Folders) -> None:
    found = diff(mini["bf16"], with_wrong("sort_by_expert"))
    assert found.cause is not None
    assert found.cause.says[0].startswith("layers.1.mlp: not permute itself: what it is given differs: x at (")


def test_a_weight_is_told_from_its_operation(diff, mini: Folders) -> None:
    found = diff(mini["bf16"], with_another_weight)
    assert found.cause is not None
    assert found.cause.says[0].startswith(
        "layers.1.self_attn.q_b_proj: not linear itself: what it is given differs: weight at (0, 0): "
    )


def test_flips_are_counted_apart(diff, mini: Folders) -> None:
    found = diff(mini["bf16"], with_wrong("moe_router"))
    assert found.cause is not None
    assert found.cause.says[-1] == "routing flips in case prompt: 1 of 11 choices of experts (1 in layers.1.mlp.gate)"


def test_a_call_is_told_by_what_concerns_its_token() -> None:
    """Another row of the batch may be another; its own may not."""
    x = torch.randn(4, 8)
    other_row, same_row = x.clone(), x.clone()
    other_row[0, 0], same_row[2, 5] = 7.0, 7.0

    def call(x: torch.Tensor) -> Call:
        setting = registry.Setting("cpu", "cpu", FP32)
        return Call.of(silu_and_mul, (x,), {}, silu_and_mul(x), rows=(2,), setting=setting, kernel="k")

    is_itself, _ = blame(call(x), call(other_row), ("a", "b"))
    assert is_itself
    is_itself, text = blame(call(x), call(same_row), ("a", "b"))
    assert not is_itself
    assert text.startswith("not silu_and_mul itself: what it is given differs: gate_up at (0, 5): ")


def test_a_call_of_a_card_is_made_again_by_its_model(tmp_path: Path, monkeypatch, capsys) -> None:
    """Without a card: a CPU's definition is another one, which the twin shows."""
    x = 4 * torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    setting = registry.Setting("cuda", "sm90", BF16, (9, 0))
    made = registry.definitions("sm90")[linear.name].run(x, weight, out_dtype=torch.float32)
    for name, out in ("card", made), ("cpu", linear(x, weight, out_dtype=torch.float32)):
        call = Call.of(
            linear, (x, weight), {"out_dtype": torch.float32}, out, rows=(0,), setting=setting, kernel="deep_gemm 2"
        )
        call.save(tmp_path / name)
    assert run_cli(monkeypatch, "replay", tmp_path / "card") == 0
    printed = capsys.readouterr().out
    assert "card: linear, computed by deep_gemm 2" in printed
    assert "the contract's definition on sm90: gives what was recorded, every bit" in printed
    if not torch.cuda.is_available():
        assert "no other kernel is tried" in printed
    assert run_cli(monkeypatch, "replay", tmp_path / "cpu") == 1


BOTH = ("diff", "--testee", "reference", "--testee", "core", "--checkpoint", "TINY")


class TestCommandLine:
    """What a user types."""

    def test_a_difference_and_its_replay(self, tiny_checkpoint, tmp_path: Path, monkeypatch, capsys) -> None:
        """Each testee is a process of its own."""
        monkeypatch.setenv("PYTHONPATH", f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}")
        kept = tmp_path / "kept"
        other = f"other={sys.executable} {SUPPORT / 'sabotaged_testee.py'} provider:silu_and_mul"
        both = ("--testee", "reference", "--testee", other, "--checkpoint", tiny_checkpoint("bf16"))
        assert run_cli(monkeypatch, "diff", *both, "--prompt", "Was it the same?", "--keep", kept) == 1
        printed = capsys.readouterr().out
        verdict = printed.splitlines()[-1]
        assert verdict.startswith("DIFFERENT: layers: operation silu_and_mul in layers.0.mlp is the first to differ")
        calls = [kept / "again" / name / "call.safetensors" for name in ("reference", "other")]
        assert f"alone: dsv3 replay {calls[0]} {calls[1]}" in printed

        definition = "the contract's definition on cpu: "
        assert run_cli(monkeypatch, "replay", calls[0]) == 0
        assert f"{definition}gives what was recorded, every bit" in capsys.readouterr().out
        assert run_cli(monkeypatch, "replay", *calls) == 1
        assert f"{definition}output 0 differs in 1 of " in capsys.readouterr().out

        # The folders of the run are sides themselves.
        sides = [kept / "first" / name for name in ("reference", "other")]
        assert run_cli(monkeypatch, "diff", *sides, "--json") == 1
        found = json.loads(capsys.readouterr().out)
        assert found["cause"] == "layers"
        assert found["steps"][-1]["found"]["first"]["implementations"]["other"].startswith("saboteur 1.0")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("diff",), "error: two sides are compared: A and B, or --testee A --testee B --checkpoint DIR"),
            (("diff", "--testee", "reference"), "error: --testee A --testee B needs --checkpoint"),
            (("diff", "a", "b"), "error: a: neither a dump, which has samples.jsonl, nor a testee's results"),
            (("replay", "a"), "error: a: no saved call of an operation"),
            ((*BOTH, "--prompt", ""), "error: --prompt: 0 tokens; the testees take 1 to 504 of this model"),
            ((*BOTH, "--prompt", 600 * "a b"), "error: --prompt: 1800 tokens; the testees take 1 to 504 of this model"),
            ((*BOTH, "--case", "sleep"), "error: --case sleep: unknown; this checkpoint has prefill"),
            (
                (*BOTH, "--testee", "x=y"),
                "error: two testees with different names are compared, not reference, core, x;",
            ),
            ((*BOTH[:3], *BOTH[-2:]), "error: two testees with different names are compared, not reference;"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments, message: str, tiny_checkpoint, monkeypatch, capsys) -> None:
        checkpoint = str(tiny_checkpoint("bf16"))
        assert run_cli(monkeypatch, *(checkpoint if word == "TINY" else word for word in arguments)) == 2
        said = capsys.readouterr().err
        assert said.startswith(message) and len(said.strip().splitlines()) == 1
