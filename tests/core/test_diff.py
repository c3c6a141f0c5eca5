"""`dsv3 diff` of two dumps: each kind of difference, planted, is named by its own step, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mini_checkpoint import BIAS, EXPERT, Folders
from safetensors.torch import save_file
from typer.testing import CliRunner

from dsv3_plugin.checkpoint.fingerprint import Fingerprint, fingerprint_of_checkpoint
from dsv3_plugin.checkpoint.reader import CheckpointReader
from dsv3_plugin.commands.cli import app
from dsv3_plugin.diff import formulas
from dsv3_plugin.diff.report import Diff, compare
from dsv3_plugin.diff.samples import ABOUT, LOGITS, SAMPLES, WEIGHTS, Sample
from dsv3_plugin.diff.sides import read_side
from dsv3_plugin.errors import DiffError

VOCAB = 1024
PROMPT, ANSWER = 3, 16
LENGTH = PROMPT + ANSWER

Lines = list[dict[str, Any]]


def logits_of(sample: int, seed: int = 0) -> torch.Tensor:
    """fp32 [ANSWER, VOCAB]."""
    return 4 * torch.randn(ANSWER, VOCAB, generator=torch.Generator().manual_seed(100 * seed + sample))


def form_of(formula: str, temperature: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The formula of that name."""

    def compute(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        sample = Sample(id="x", token_ids=(), mask=(), logprobs=(), temperature=temperature, top_p=0.9)
        return dict(formulas.candidates(logits, token, sample))[formula]

    return compute


def lines(
    formula: str = formulas.DEFINITION, temperature: float = 0.7, samples: int = 8, seed: int = 0, **others: Any
) -> Lines:
    """Samples whose log-probabilities are a formula's of `logits_of`."""
    found = []
    for i in range(samples):
        token_ids = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(i))
        made = form_of(formula, temperature)(logits_of(i, seed), token_ids[PROMPT:])
        found.append(
            {
                "id": f"s{i}",
                "token_ids": token_ids.tolist(),
                "mask": [0] * PROMPT + [1] * ANSWER,
                "logprobs": [None] * PROMPT + made.tolist(),
                "temperature": temperature,
                "version": 7,
            }
            | others
        )
    return found


def dump(
    folder: Path, samples: Lines, *, weights: dict[int, Fingerprint] | None = None, logits: bool = False, **about: Any
) -> Path:
    folder.mkdir()
    (folder / SAMPLES).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / ABOUT).write_text(json.dumps({"name": folder.name} | about))
    if weights is not None:
        text = {version: fingerprint.model_dump() for version, fingerprint in weights.items()}
        (folder / WEIGHTS).write_text(json.dumps(text))
    if logits:
        save_file({f"s{i}": logits_of(i) for i in range(len(samples))}, folder / LOGITS)
    return folder


def diff(left: Path, right: Path) -> Diff:
    return compare(read_side(left), read_side(right))


def cause(found: Diff) -> tuple[str, str]:
    """The step that is blamed, and its answer."""
    assert found.cause is not None
    assert not found.equal and found.verdict.startswith(f"DIFFERENT: {found.cause.name}: ")
    return found.cause.name, found.cause.says[0]


def test_equal(tmp_path: Path, mini: Folders) -> None:
    weights = {7: fingerprint_of_checkpoint(CheckpointReader(mini["bf16"]))}
    one = dump(tmp_path / "a", lines(), weights=weights, logits=True)
    two = dump(tmp_path / "b", lines(), weights=weights, logits=True)
    found = diff(one, two)
    assert found.equal
    assert [step.outcome for step in found.steps] == ["equal", "equal", "equal", "unknown"]
    assert found.verdict == "EQUAL: 128 log-probabilities, bit for bit"
    assert found.summary["all"]["k3_kl"] == 0 and found.summary["all"]["token_mult_prob_error"] == 1
    assert found.summary["all"]["rollout_actor_probs_pearson_corr"] == 1


def moved(values: list[Any], fill: Any) -> list[Any]:
    """One token later."""
    return [fill, *values[:-1]]


INPUTS: dict[str, tuple[Callable[[Lines], object], str]] = {
    "token": (lambda s: s[1]["token_ids"].__setitem__(4, 1), "token ids: 1 sample, first sample s1: token "),
    "tokens shifted": (
        lambda s: s[2].update(token_ids=moved(s[2]["token_ids"], 5)),
        "token ids: 1 sample, first sample s2: the second side's tokens are the first's, one token later",
    ),
    "token missing": (
        lambda s: [s[3][name].pop() for name in ("token_ids", "mask", "logprobs")],
        "token ids: 1 sample, first sample s3: 19 and 18 tokens, equal as far as both go",
    ),
    "positions": (
        lambda s: s[0].update(positions=list(range(1, LENGTH + 1))),
        "positions: 1 sample, first sample s0: the second side's positions are the first's, one token earlier",
    ),
    "mask shifted": (
        lambda s: [x.update(mask=moved(x["mask"], 0)) for x in s],
        "mask: 8 samples, first sample s0: the second side's masks are the first's, one token later",
    ),
    "shift by one": (
        lambda s: [x.update(logprobs=moved(x["logprobs"], None), mask=x["mask"]) for x in s],
        "shift by one: 8 samples, first sample s0: the second side's log-probabilities are the first's, one token",
    ),
    "temperature": (
        lambda s: [x.update(temperature=1.0) for x in s],
        "temperature: 8 samples, first sample s0: 0.7 and 1.0",
    ),
    "top_p": (lambda s: s[0].update(top_p=0.9), "top_p: 1 sample, first sample s0: 1.0 and 0.9"),
    "no log-probability": (
        lambda s: [s[4]["logprobs"].__setitem__(i, None) for i in (5, 9)],
        "no log-probability: 1 sample, first sample s4: none for 2 tokens with mask 1, first at index 5, on the second",
    ),
    "not a number": (
        lambda s: s[4]["logprobs"].__setitem__(5, float("nan")),
        "not a number: 1 sample, first sample s4: NaN for 1 token with mask 1, first at index 5, on the second side",
    ),
    "sample missing": (lambda s: s.pop(), "samples: 1 sample only one side has, first s7"),
}


@pytest.mark.parametrize("what", INPUTS)
def test_inputs_that_differ(what: str, tmp_path: Path) -> None:
    change, says = INPUTS[what]
    changed = lines()
    change(changed)
    found = diff(dump(tmp_path / "a", lines()), dump(tmp_path / "b", changed))
    step, text = cause(found)
    assert step == "inputs" and text.startswith(says)


@pytest.mark.parametrize(("value", "share"), [(float("nan"), "1 of 128"), (None, "no number differs")])
def test_what_is_no_number_on_both_sides_is_told(value: float | None, share: str, tmp_path: Path) -> None:
    changed = lines()
    changed[4]["logprobs"][5] = value
    found = diff(dump(tmp_path / "a", changed), dump(tmp_path / "b", changed))
    step, text = cause(found)
    assert step == "inputs" and text.endswith("for 1 token with mask 1, first at index 5, on both sides")
    assert share in found.verdict


def test_a_sample_keeps_what_is_no_finite_number() -> None:
    values = (float("nan"), float("-inf"))
    sample = Sample(id="x", token_ids=(1, 2), mask=(1, 1), logprobs=values)
    assert str(Sample.model_validate_json(sample.model_dump_json()).logprobs) == str(values)


def test_noise_is_no_shift(tmp_path: Path) -> None:
    """Twin of `shift by one`: numbers that are merely other ones."""
    found = diff(dump(tmp_path / "a", lines()), dump(tmp_path / "b", lines(seed=1)))
    assert found.steps[0].outcome == "equal" and not found.equal
    assert found.verdict == (
        "DIFFERENT: 128 of 128 log-probabilities differ; not looked at for want of data: weights, formula, layers"
    )


class TestWeights:
    """Planted in a server's weights, of which a trainer has told this version and the one before."""

    @pytest.fixture
    def new(self, mini: Folders) -> dict[str, str]:
        return fingerprint_of_checkpoint(CheckpointReader(mini["bf16"])).tensors

    @staticmethod
    def compare(tmp_path: Path, new: dict[str, str], held: dict[str, str]) -> tuple[str, str, tuple[str, ...]]:
        # Every tensor but the embedding is another one in each version.
        old = {name: value if "embed" in name else value[::-1] for name, value in new.items()}
        trainer = {6: Fingerprint(tensors=old), 7: Fingerprint(tensors=new)}
        one = dump(tmp_path / "trainer", lines(), weights=trainer)
        two = dump(tmp_path / "server", lines(seed=1), weights={7: Fingerprint(tensors=held)})
        found = diff(one, two)
        assert found.steps[0].outcome == "equal"
        return *cause(found), found.steps[1].says

    @pytest.mark.parametrize(
        ("stale", "kind"),
        [
            (lambda name: name == BIAS, "1 router biases"),
            (lambda name: name == EXPERT, "1 of routed experts"),
            (lambda name: name == "model.layers.2.eh_proj.weight", "1 of the MTP layer"),
        ],
        ids=["bias", "expert", "mtp"],
    )
    def test_a_tensor_of_the_version_before(self, new, tmp_path: Path, stale, kind: str) -> None:
        held = {name: value[::-1] if stale(name) else value for name, value in new.items()}
        step, text, says = self.compare(tmp_path, new, held)
        assert (step, text) == ("weights", f"server: 1 of {len(new)} tensors are those of version 6, not 7")
        assert says[1].endswith(f": {kind}")

    def test_nothing_was_updated(self, new, tmp_path: Path) -> None:
        held = {name: value if "embed" in name else value[::-1] for name, value in new.items()}
        _, text, says = self.compare(tmp_path, new, held)
        assert text == f"server: {len(new) - 1} of {len(new)} tensors are those of version 6, not 7"
        assert f"{len(new) - 1} of {len(new)} tensors of version 7 differ, first model.layers.0." in says[1]

    def test_a_tensor_that_is_lacking_or_another(self, new, tmp_path: Path) -> None:
        held = {name: value for name, value in new.items() if not name.startswith("model.layers.2.")}
        held["model.norm.weight"] = "0" * 16
        _, text, says = self.compare(tmp_path, new, held)
        lacking = len(new) - len(held)
        assert text == f"server lacks {lacking} of {len(new)} tensors of version 7"
        assert says[1].startswith(f"{lacking + 1} of {len(new)} tensors of version 7 differ, first model.layers.2.")


FORMULAS = [
    "Megatron's cross-entropy of logits / temperature",
    "x - logsumexp(x) of x = logits / temperature",
    "log(softmax(logits / temperature))",
    "log_softmax(logits rounded to bf16 / temperature)",
    "log_softmax(logits, the temperature forgotten)",
    "log_softmax(logits * (1 / temperature))",
    "log_softmax(logits / temperature) of what top_p leaves",
    "log_softmax(logits / temperature) rounded to bf16",
]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("whose", ["both", "server"])
def test_a_formula_is_named(formula: str, whose: str, tmp_path: Path) -> None:
    one = dump(tmp_path / "trainer", lines(formula, top_p=0.9), logits=whose == "both")
    two = dump(tmp_path / "server", lines(top_p=0.9), logits=True)
    found = diff(one, two)
    step, text = cause(found)
    logits = "its own logits" if whose == "both" else "the logits of server"
    answered, _, rest = text.removeprefix("trainer answers ").partition(f", of {logits}: ")
    # On some CPUs two formulas are one number for all of these tokens.
    assert step == "formula" and formula in answered.split(" or ") and rest == "128 tokens, every bit", text
    assert found.steps[2].says[1].startswith(f"server answers {formulas.DEFINITION}, of its own logits")


def test_a_forgotten_temperature_is_named_beside_samples_of_temperature_1(tmp_path: Path) -> None:
    """At temperature 1 it makes no difference."""
    forgotten = "log_softmax(logits, the temperature forgotten)"
    plain = lines(temperature=1.0, samples=2)
    others = [line | {"id": f"t{i}"} for i, line in enumerate(lines(forgotten, 0.7, 2))]
    one = dump(tmp_path / "trainer", [*plain, *others], logits=False)
    right = [line | {"id": f"t{i}"} for i, line in enumerate(lines(temperature=0.7, samples=2))]
    other = dump(tmp_path / "server", [*plain, *right], logits=False)
    for folder in one, other:
        rows = {line["id"]: logits_of(int(line["id"][1:])) for line in (*plain, *others)}
        save_file(rows, folder / LOGITS)
    step, text = cause(diff(one, other))
    assert (step, text) == ("formula", f"trainer answers {forgotten}, of its own logits: 64 tokens, every bit")


def test_other_logits_are_no_formula(tmp_path: Path) -> None:
    """Twin: no formula makes these numbers of those logits, and none is named."""
    found = diff(dump(tmp_path / "a", lines(seed=1)), dump(tmp_path / "b", lines(), logits=True))
    assert found.cause is None and found.steps[2].outcome == "unknown"
    assert found.steps[2].says[0].startswith("a: no known formula gives its numbers from the logits of b; the nearest")


def test_figures_and_staleness(tmp_path: Path) -> None:
    """Half of the samples were sampled by older weights: only they differ."""
    old = [sample | {"version": 6} for sample in lines(seed=1)[:4]]
    found = diff(dump(tmp_path / "a", lines()), dump(tmp_path / "b", [*old, *lines()[4:]]))
    assert found.verdict == (
        "DIFFERENT: versions: only samples of older weights differ (64 of 128 log-probabilities differ)"
    )
    assert found.steps[0].says[1:] == ("versions: 4 samples of weights +1 updates older",)
    summary = found.summary
    assert summary["by_staleness"]["0"]["equal"] == summary["by_version"]["7"]["equal"] == 64
    assert summary["by_staleness"]["1"]["equal"] == 0 and summary["by_version"]["6"]["tokens"] == 64
    a = torch.tensor([x["logprobs"][PROMPT:] for x in lines()]).double().flatten()
    b = torch.tensor([x["logprobs"][PROMPT:] for x in [*old, *lines()[4:]]]).double().flatten()
    of_probs, apart = (a.exp() - b.exp()).abs(), (a - b).abs()
    expected = {
        "rollout_probs_diff_max": of_probs.max(),
        "rollout_probs_diff_mean": of_probs.mean(),
        "rollout_probs_diff_std": of_probs.std(),
        "rollout_actor_probs_pearson_corr": torch.corrcoef(torch.stack((a.exp(), b.exp())))[0, 1],
        "train_rollout_logprob_abs_diff": apart.mean(),
        "token_mult_prob_error": apart.exp().mean(),
        "k3_kl": ((a - b).exp() - (a - b) - 1).mean(),
        "logprob_abs_diff_max": apart.max(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(summary["all"][name], float(value), rtol=1e-6, atol=1e-12, check_dtype=False)


def test_what_sides_say_of_themselves(tmp_path: Path) -> None:
    one = dump(tmp_path / "a", lines(), versions={"torch": "2.11"}, settings={"tp": 1, "seed": 3})
    two = dump(tmp_path / "b", lines(), versions={"torch": "2.12"}, settings={"tp": 2, "seed": 3})
    found = diff(one, two)
    assert found.about == {"versions.torch": ("2.11", "2.12"), "settings.tp": ("1", "2")}
    assert found.equal


class TestCommandLine:
    """What a user sees."""

    @staticmethod
    def run(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["diff", *map(str, arguments)])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout

    def test_exit_statuses_and_text(self, tmp_path: Path) -> None:
        one = dump(tmp_path / "a", lines())
        two = dump(tmp_path / "b", lines("Megatron's cross-entropy of logits / temperature"), logits=True)
        status, text = self.run(one, one / SAMPLES)
        assert status == 0 and text.splitlines()[-1] == "EQUAL: 128 log-probabilities, bit for bit"
        status, text = self.run(one, two)
        assert status == 1
        assert text.splitlines()[-1].startswith("DIFFERENT: formula: b answers Megatron's cross-entropy of logits")
        assert "rollout_probs_diff_max" in text

    def test_json(self, tmp_path: Path) -> None:
        one, two = dump(tmp_path / "a", lines()), dump(tmp_path / "b", lines(temperature=1.0))
        status, text = self.run(one, two, "--json")
        found = json.loads(text)
        assert status == 1 and found["cause"] == "inputs" and not found["equal"]
        assert [step["name"] for step in found["steps"]] == ["inputs", "weights", "formula", "layers"]
        assert found["summary"]["all"]["tokens"] == 128

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda s: s[1].update(mask=[1]), r"samples.jsonl:2: Value error, mask has 1 entries for 19 tokens"),
            (lambda s: s[1].update(mask=[2] * LENGTH), r"mask has other numbers than 0 and 1"),
            (lambda s: s[0].pop("token_ids"), r"samples.jsonl:1: token_ids: Field required"),
            (lambda s: s[0].update(tokens=[1]), r"samples.jsonl:1: tokens: Extra inputs are not permitted"),
            (lambda s: s[0].update(temperature=0), r"samples.jsonl:1: temperature: Input should be greater than 0"),
            (lambda s: s[1].update(id="s0"), r"samples.jsonl:2: a second sample with the id 's0'"),
            (lambda s: s.clear(), r"samples.jsonl: no samples in it"),
            (
                lambda s: [x.update(id=x["id"] + "!") for x in s],
                r"no sample in common; their ids begin with: s0, s0!",
            ),
            (lambda s: [x.update(mask=[0] * LENGTH) for x in s], None),
        ],
    )
    def test_what_cannot_be_compared(self, change, says: str | None, tmp_path: Path) -> None:
        changed = lines()
        change(changed)
        one, two = dump(tmp_path / "a", lines()), dump(tmp_path / "b", changed)
        if says is None:  # a mask that counts nothing is a difference
            assert cause(diff(one, two))[0] == "inputs"
            two = one
            (one / SAMPLES).write_text("".join(json.dumps(sample) + "\n" for sample in changed))
            says = "have no log-probability and no row of the same token"
        with pytest.raises(DiffError, match=says) as error:
            self.run(one, two)
        assert "\n" not in str(error.value)

    def test_another_encoding(self, tmp_path: Path) -> None:
        for name in SAMPLES, WEIGHTS, ABOUT:
            folder = dump(tmp_path / name, lines())
            (folder / name).write_bytes(b"\xff\xfe")
            with pytest.raises(DiffError, match=rf"{name}.*: Invalid JSON"):
                read_side(folder)

    def test_a_folder_of_something_else(self, tmp_path: Path) -> None:
        with pytest.raises(DiffError, match=r"neither a dump, which has samples.jsonl, nor a testee's results"):
            self.run(tmp_path, tmp_path)
