"""Each known mistake, made by a reference on purpose, shows on the cases that are named for it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from trapped import FALLS, fallen, routed

from dsv3_plugin.checkpoint.make import CheckpointDtype, make_checkpoint
from dsv3_plugin.checkpoint.presets import read_config
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.checkpoint.traps import Token
from dsv3_plugin.conformance import runner
from dsv3_plugin.conformance.cases import BLOCK_SIZE
from dsv3_plugin.conformance.compare import Comparison, RowFile, compare_case
from dsv3_plugin.conformance.protocol import Case, Job
from dsv3_plugin.conformance.testees.program import Outcome
from dsv3_plugin.conformance.testees.reference import Engine, ReferenceTestee
from dsv3_plugin.conformance.traps import FEATURES, TRAPS, features_of, guarded
from dsv3_plugin.ops.router import route

SHOWN = {trap.name: trap for trap in TRAPS if trap.cases}
FIRST_IN = {
    "yarn_temperature": "self_attn",
    "rotary_halves": "self_attn",
    "zero_group_mask": "layers.1.mlp",
    "bf16_router": "layers.1.mlp",
    "no_epsilon": "layers.1.mlp",
    "scale_after_combine": "layers.1.mlp",
    "bias_not_loaded": "layers.1.mlp",
    "mtp_position_zero": "mtp.0",
    "scale_dropped": "layers.1.mlp",
    "phases_apart": "layers.0.self_attn",
    "verify_apart": "layers.0.self_attn",
    "tie_order": ".mlp",
}
"""The module that the report names."""
TRIED = {
    "yarn_temperature": ("decode",),
    "rotary_halves": ("decode",),
    "zero_group_mask": ("decode", "token_faint"),
    "bf16_router": ("same_token",),
    "scale_after_combine": ("decode",),
    "bias_not_loaded": ("decode",),
    "mtp_position_zero": ("mtp_1", "mtp_planted"),
    "scale_dropped": ("decode",),
    "phases_apart": ("decode", "prefix_cache"),
    "verify_apart": ("mtp_1",),
    "logprobs_of_another_kind": ("sampled",),
    "tie_order": ("decode", "token_flooded"),
}
"""Of the cases named for a trap those that are tried here; of the others all."""


class Runs:
    """A reference on the planted checkpoint, whole or fallen."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.job = cache(self._job)
        self.right = cache(lambda case, dtype: self.run(case, dtype))

    def _job(self, dtype: str) -> Job:
        reader = make_checkpoint(read_config("traps"), self.root / dtype, 1, dtype=CheckpointDtype(dtype))
        cases = runner.cases_of(CheckpointReader(reader.path))
        return Job(checkpoint=str(reader.path), block_size=BLOCK_SIZE, cases=cases)

    def case(self, name: str, dtype: str) -> Case:
        return runner.select(self.job(dtype).cases, [name])[0]

    def run(self, case: str, dtype: str, trap: str | None = None) -> tuple[Outcome, RowFile]:
        """Of the schedule alone."""
        testee = ReferenceTestee(self.job(dtype))
        with torch.inference_mode():
            if trap is None:
                outcome = Engine(testee, self.case(case, dtype)).run()
            else:
                with fallen(trap, testee):
                    outcome = Engine(testee, self.case(case, dtype)).run()
        file = self.root / f"{case}-{dtype}-{trap}.safetensors"
        outcome.recorder.save(file)
        return outcome, RowFile(file)

    def comparison(self, trap: str, case: str, dtype: str) -> Comparison:
        right, wrong = self.right(case, dtype), self.run(case, dtype, trap)
        return compare_case(case, ("reference", right[1]), (trap, wrong[1]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("traps"))


def tried() -> list[tuple[str, str]]:
    names = [f"token_{token.name.lower()}" for token in Token]
    return [(name, case) for name, trap in SHOWN.items() for case in TRIED.get(name) or trap.shown_by(names)]


@pytest.mark.parametrize(("trap", "case"), tried())
def test_who_falls_into_it_is_caught(trap: str, case: str, runs: Runs) -> None:
    assert SHOWN[trap].shown_by([case]) == (case,)
    dtype = "fp8" if "fp8" in SHOWN[trap].needs else "bf16"
    comparison = runs.comparison(trap, case, dtype)
    print(f"{trap}: {comparison.describe()}")
    if trap == "logprobs_of_another_kind":
        assert comparison.different_rows == 0
        pairs = zip(runs.right(case, dtype)[0].requests, runs.run(case, dtype, trap)[0].requests, strict=True)
        assert all(a.logprobs != b.logprobs for a, b in pairs)
        return
    assert comparison.different_rows > 0 and comparison.first_difference is not None
    assert FIRST_IN.get(trap, "") in comparison.first_difference.stream


def test_who_does_not_is_equal(runs: Runs) -> None:
    """The twin of the twins: what they are compared by changes nothing alone."""
    assert compare_case("decode", ("a", runs.right("decode", "bf16")[1]), ("b", runs.run("decode", "bf16")[1])).equal
    routing = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5}
    logits = torch.randn(99, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-2, -1, 16)
    found, expected = routed(logits, bias, **routing), route(logits, bias, norm_topk_prob=True, **routing)
    assert all(map(torch.equal, found, expected))


def test_every_trap_is_shown_or_says_where(runs: Runs) -> None:
    assert set(FALLS) == set(SHOWN)
    cases = [case.name for case in runs.job("bf16").cases]
    for trap in TRAPS:
        assert bool(trap.cases) != bool(trap.elsewhere)
        assert all(replace(trap, cases=(pattern,)).shown_by(cases) for pattern in trap.cases)
    assert {trap.name for trap, _ in guarded(cases, FEATURES)} == set(SHOWN)
    assert [trap.name for trap, _ in guarded(["sampled"], ())] == ["logprobs_of_another_kind"]
    assert not [trap for trap, _ in guarded(cases, FEATURES.keys() - {"traps"}) if "traps" in trap.needs]
    found = {dtype: features_of(CheckpointReader(Path(runs.job(dtype).checkpoint))) for dtype in ("bf16", "fp8")}
    assert found == {"bf16": {"mtp", "traps", "yarn"}, "fp8": set(FEATURES)}


def test_planted_tokens_do_what_they_say(runs: Runs) -> None:
    """The routers of the first MoE layer, given each planted token alone."""
    testee = ReferenceTestee(runs.job("bf16"))
    config = testee.config
    router = testee.model.model.layers["1"].mlp.gate
    seen: list[torch.Tensor] = []
    router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embeddings = testee.model.model.embed_tokens.weight
    for token in Token:
        testee.whole_sequence((token.id(config.vocab_size), 5), 2)
    scores = {token: (x.float() @ router.weight.float().T).sigmoid()[0] for token, x in zip(Token, seen, strict=True)}
    assert (scores[Token.FLOODED] == 1).all() and (scores[Token.DROWNED] < 1e-19).all()
    assert (scores[Token.ZERO] == 0.5).all() and (seen[0] == 0).all()
    smallest = torch.finfo(torch.float32).tiny
    denormal = embeddings[Token.DENORMAL.id(config.vocab_size)].float().abs()
    assert denormal.max() < smallest and denormal.max() > 0
    assert (router.weight[1] == router.weight[0]).all() and (router.e_score_correction_bias < -1).all()
    assert int((router.weight[9] != router.weight[8]).sum()) == 1
    assert embeddings[5].float().abs().max() > 1 and embeddings[5, 0] == 0
