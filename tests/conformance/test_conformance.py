"""The suite itself: it passes what is equal, and catches and names what is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from engines import REFERENCE, run, warm
from paths import ROOT, SUPPORT
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from dsv3_plugin.conformance import closeness, compare, runner
from dsv3_plugin.conformance import report as reports
from dsv3_plugin.conformance.cases import make_cases
from dsv3_plugin.conformance.protocol import Case, Request, RequestResult, prefix_digest, specification_file
from dsv3_plugin.conformance.rows import RowKey, RowRecorder, TokenTracker
from dsv3_plugin.conformance.sampling import processed_logprobs
from dsv3_plugin.errors import ConformanceError

TinyCheckpoint = type[Path]


def sabotaged(sabotage: str, name: str = "sabotaged") -> runner.TesteeCommand:
    program = str(SUPPORT / "sabotaged_testee.py")
    return runner.TesteeCommand(name, (sys.executable, program, sabotage))


SCHEDULES = "batch", "chunked_prefill", "prefix_cache_chunked", "mtp_2", "sampler_mtp_2", "mtp_prefix_cache"
"""Of which the other cases are parts. All 18 of bf16 run in `test_sglang`, beside two engines."""


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp8"])
def test_every_schedule_of_the_reference_is_the_specification(tiny_checkpoint, tmp_path: Path, dtype: str) -> None:
    report = run([REFERENCE], tiny_checkpoint(dtype), tmp_path, *SCHEDULES)
    assert report.passed, [v for v in report.verdicts if not v.passed]
    assert len(report.verdicts) == len(SCHEDULES)
    # What every server is judged by; prompts are scored, and all that is generated.
    assert sum(logprobs.equal for verdict in report.verdicts for logprobs in verdict.logprobs) > 10_000
    for verdict in report.verdicts:
        (comparison,) = verdict.comparisons
        assert (comparison.left, comparison.right) == ("specification", "reference")
        assert comparison.equal_rows > 1000
    served = report.results["reference"].served
    assert served.model_class == "dsv3_plugin.layers.model.DeepseekV3"
    assert set(served.kernels.values()) == {f"reference {report.results['reference'].versions['dsv3-plugin']}"}
    cases = {case.name: case for case in report.results["reference"].cases}
    assert 0 < cases["mtp_2"].num_accepted_tokens < cases["mtp_2"].num_draft_tokens


MODULES = {
    "layers.2.self_attn.o_proj": "layers.2.self_attn",
    "layers.1.mlp": "layers.1.mlp",
    "layers.0.mlp.gate_up_proj": "layers.0.mlp",
    "layers.0.input_layernorm": "layers.0.self_attn",
    "layers.3.self_attn.q_a_layernorm": "layers.3.self_attn",
    "embed_tokens": "embed_tokens",
    "norm": "norm",
}
"""Of a module whose output is changed, the module of the report in which that shows first."""


def test_one_ulp_in_one_module_is_caught_and_the_layer_named(tiny_checkpoint, tmp_path: Path) -> None:
    testees = [sabotaged(f"ulp:{module}", name=module) for module in MODULES]
    report = run([REFERENCE, *testees], tiny_checkpoint("fp32"), tmp_path, "batch")
    assert not report.passed
    (verdict,) = report.verdicts
    for module, named in MODULES.items():
        pair = verdict.between("reference", module)
        assert pair is not None
        assert pair.different_rows > 0
        assert pair.first_difference is not None
        assert pair.first_difference.stream == named
        # The bump may vanish in the first pass's rounding and show in a later one; what the layer multiplies, grows.
        assert pair.first_difference.ulps <= 16


def test_another_tile_or_a_wrong_page_is_caught(tiny_checkpoint, tmp_path: Path) -> None:
    """In fp32 a row by itself is another sum on any CPU, in bf16 on some."""
    testees = [sabotaged("tile:1", name="tile"), sabotaged("page", name="page")]
    report = run([REFERENCE, *testees], tiny_checkpoint("fp32"), tmp_path, "decode")
    assert not report.passed
    for name, named in ("tile", "layers.0."), ("page", "layers.0.self_attn"):
        pair = report.verdicts[0].between("reference", name)
        assert pair is not None and pair.first_difference is not None
        assert pair.first_difference.stream.startswith(named)


def test_wrong_tokens_and_missing_rows_fail(tiny_checkpoint, tmp_path: Path) -> None:
    testees = [sabotaged("tokens", name="tokens"), sabotaged("silent", name="silent")]
    report = run([REFERENCE, *testees], tiny_checkpoint("bf16"), tmp_path, "decode")
    assert not report.passed
    problems = report.verdicts[0].problems
    assert "reference and tokens chose different tokens in request 0 at position 16" in problems
    assert "silent: request 1 has no logits at position 70" in problems


def test_what_is_wrong_with_sampled_requests_is_named(tiny_checkpoint, tmp_path: Path) -> None:
    """A token that was not fed, a lost seed, another form of log-probabilities; all rows are right."""
    testees = [sabotaged(what, name=what.partition(":")[0]) for what in ("tokens:2", "seed", "log_of_softmax")]
    report = run(testees, tiny_checkpoint("bf16"), tmp_path, "sampled")
    assert not report.passed
    (verdict,) = report.verdicts
    assert all(comparison.equal for comparison in verdict.comparisons)
    assert "tokens: request 0 has no logits at position 12" in verdict.problems
    lost = r"seed: requests \d and \d are the same and drew other tokens at position \d+"
    others = [text for text in verdict.problems if not text.startswith("tokens: ")]
    assert others and all(re.fullmatch(lost, text) for text in others), others
    different = {logprobs.testee: logprobs for logprobs in verdict.logprobs if logprobs.different}
    assert list(different) == ["log_of_softmax"]
    assert different["log_of_softmax"].different > 100
    assert " (generated, temperature 0.7), " in different["log_of_softmax"].first_difference


def test_a_case_that_did_not_test_what_it_says_fails(tiny_checkpoint, tmp_path: Path, monkeypatch) -> None:
    def never_cached(token_ids, *, with_mtp):
        cases = make_cases(token_ids, with_mtp=with_mtp)
        return tuple(case.model_copy(update={"min_cached_tokens": 10_000}) for case in cases)

    monkeypatch.setattr(runner, "make_cases", never_cached)
    report = run([REFERENCE], tiny_checkpoint("bf16"), tmp_path, "prefix_cache")
    assert report.verdicts[0].problems == ("reference: 96 tokens came from the prefix cache, 10000 should have",)


def test_a_testee_that_claims_closeness(tiny_checkpoint, tmp_path: Path) -> None:
    """Transformers' DeepSeek-V3 is close, a reference whose logits are stretched is not; nothing runs beside them."""
    program = str(ROOT / "examples" / "testee_transformers.py")
    transformers = runner.TesteeCommand("hf", (sys.executable, program))
    report = run([transformers, sabotaged("far:1.3")], tiny_checkpoint("bf16"), tmp_path, "decode", "sampler")
    assert not report.passed

    close, far = report.closeness
    found, spread = close.distance, close.spread
    print(found, spread, sep="\n")
    assert close.beyond() == []
    assert found.rows == spread.rows == 274
    # Rounded to bf16 elsewhere, by as much as bf16 is away from fp32: not equal, and not far.
    assert 0.3 * spread.kl_mean < found.kl_mean < 3 * spread.kl_mean
    assert found.kl_max == found.furthest.kl > 10 * found.kl_mean
    assert 0.9 < found.top1_agreement < 1
    assert found.max_difference > 0.1
    assert close.first_difference.stream == "layers.0.self_attn"
    assert (close.first_difference.request, close.first_difference.position) == (0, 0)
    served = report.results["hf"].served
    assert served.model_class == "transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3ForCausalLM"
    assert not [text for verdict in report.verdicts for text in verdict.problems]
    assert all(c.equal > 700 and not c.different for v in report.verdicts for c in v.logprobs)

    assert far.first_difference.stream == "logits"
    assert report.problems == far.beyond()
    assert report.problems[0].startswith("sabotaged is not close: mean KL divergence")

    console = Console(record=True, width=200)
    reports.print_report(report, console)
    printed, page = console.export_text(), reports.to_html(report)
    for text in (
        "hf from the reference: 274 rows: KL mean",
        "first different bits in layers.0.self_attn, request 0",
        "sabotaged is not close: mean KL divergence",
        "FAILED (bf16): what claims closeness is far.",
    ):
        assert text in printed and text in page
    junit = ElementTree.fromstring(reports.to_junit(report))
    assert [test.get("name") for test in junit.iter("testcase") if test.find("failure") is not None] == [
        f"sabotaged is close, {far.distance.rows} rows",
        "every testee served what it should",
    ]
    _nothing_without_a_distance_is_close(tmp_path / "kept", tmp_path / "rows.safetensors")


def _nothing_without_a_distance_is_close(kept: Path, file: Path) -> None:
    specification = compare.RowFile(specification_file(kept / "replay" / "hf" / "specification", "decode"))
    tensors = load_file(kept / "hf" / "decode.safetensors")
    logits = tensors["logits"]
    for harmed, problem in (
        (logits, None),
        (logits[:, :-1], "its logits have the shape [87, 1023], the vocabulary has 1024 tokens"),
        (logits.log(), "request 0 has logits at position 0 that are no numbers (NaN or infinite)"),
    ):
        save_file(tensors | {"logits": harmed.contiguous()}, file)
        assert closeness.malformed(specification, compare.RowFile(file)) == problem


def test_a_foreign_model_that_is_equal_passes(tiny_checkpoint, tmp_path: Path) -> None:
    report = run([sabotaged("foreign")], tiny_checkpoint("bf16"), tmp_path, "decode")
    assert report.passed
    assert report.results["sabotaged"].served.model_class == "acme.models.Model"
    (comparison,) = report.verdicts[0].comparisons
    assert comparison.left == "specification" and comparison.equal_rows > 1000
    # The same under the name of a testee of the suite, which must serve our class, is refused.
    as_vllm = report.results["sabotaged"].model_copy(update={"testee": "vllm"})
    assert runner.served_otherwise({"mine": as_vllm}, "bf16") == [
        "mine served acme.models.Model, which is not dsv3-plugin's model"
    ]


class TestCommandLine:
    """What a user sees."""

    @staticmethod
    def dsv3(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("dsv3")
        return warm("core", program, "conformance", "run", *arguments)

    def test_equal(self, tiny_checkpoint, tmp_path: Path) -> None:
        file = tmp_path / "report.json"
        checkpoint = tiny_checkpoint("bf16")
        done = self.dsv3("--testee", "reference", "--checkpoint", checkpoint, "--case", "decode", "--json", file)
        assert done.returncode == 0, done.stderr
        assert "All 1,242 rows and 792 log-probabilities equal, bit for bit (bf16)." in done.stdout
        report = json.loads(file.read_text())
        assert report["passed"] is True
        assert report["profile"] == "bf16"
        assert report["testees"]["reference"]["served"]["kernels"]["mla_attention"].startswith("reference")

    def test_different(self, tiny_checkpoint) -> None:
        program = f"other={sys.executable} {SUPPORT / 'sabotaged_testee.py'} ulp:layers.1.mlp"
        arguments = ("--testee", "reference", "--testee", program, "--case", "decode")
        done = self.dsv3(*arguments, "--checkpoint", tiny_checkpoint("bf16"))
        assert done.returncode == 1
        assert "first difference in layers.1.mlp, request 0, position 0, column 0" in " ".join(done.stdout.split())
        assert "1 ulp apart" in " ".join(done.stdout.split())

    @pytest.mark.parametrize("equal", [True, False])
    def test_page_and_junit(self, tiny_checkpoint, tmp_path: Path, equal: bool) -> None:
        program = f"other={sys.executable} {SUPPORT / 'sabotaged_testee.py'} ulp:layers.1.mlp"
        testees = ["--testee", "reference"] + ([] if equal else ["--testee", program])
        html, junit = tmp_path / "report.html", tmp_path / "report.xml"
        arguments = [*testees, "--checkpoint", tiny_checkpoint("bf16"), "--case", "decode", "--html", html]
        self.dsv3(*arguments, "--junit", junit)
        page, suite = html.read_text(), ElementTree.parse(junit).getroot()
        names = [test.get("name") for test in suite.iter("testcase")]
        failures = [failure.get("message") for failure in suite.iter("failure")]
        passed, failed = r"All [\d,]+ rows and [\d,]+ log-probabilities equal", r"FAILED: [\d,]+ of [\d,]+ rows differ"
        assert re.search(f"<title>{passed if equal else failed}", page)
        assert int(suite.get("tests")) == len(names) == (4 if equal else 7)
        assert int(suite.get("failures")) == len(failures) == (0 if equal else 3)
        assert any(name.startswith("specification = reference") for name in names)
        for message in failures:
            assert message.startswith("first difference in layers.1.mlp, request 0, position 0, column 0") or re.match(
                r"[\d,]+ of 792 log-probabilities differ, the first in request 0, position ", message
            )
            assert message in page

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--testee", "tgi"), r"error: --testee tgi: unknown; the suite has reference, core, vllm"),
            (
                ("--testee", "vllm", "--environments", "nowhere"),
                r"error: --testee vllm: vllm and dsv3-plugin are not both",
            ),
            (("--testee", "x=/no/such/program"), r"error: testee x cannot be started: /no/such/program: No such file"),
            (("--testee", "x=false"), r"error: testee x failed with status 1"),
            (("--testee", "x=true"), r"error: .*/x/result.json: missing; the testee did not finish"),
            (("--testee", "x=sh -c 'kill -9 $$'"), r"error: testee x was killed by SIGKILL"),
            (("--testee", "x='open"), r"error: --testee x='open: the command is no line of a shell: No closing quot"),
            (("--testee", "a/b=true"), r"error: --testee a/b=true: 'a/b' cannot be a testee's name"),
            (("--testee", "..=true"), r"error: --testee ..=true: '..' cannot be a testee's name"),
            (("--testee", "=true"), r"error: --testee =true: '' cannot be a testee's name"),
            (("--testee", "reference", "--timeout", "0"), r"error: --timeout 0: give seconds, above zero and at most"),
            (("--testee", "reference", "--timeout", "nan"), r"error: --timeout nan: give seconds"),
            (("--testee", "reference", "--timeout", "inf"), r"error: --timeout inf: give seconds"),
            (("--testee", "reference", "--json", "/no/r.json"), r"error: /no/r.json: there is no folder /no$"),
            (("--testee", "reference", "--json", "r", "--html", "./r"), r"error: r: two reports cannot be one file"),
            (("--testee", "reference", "--keep", "/dev/null/run"), r"error: /dev/null/run: Not a directory"),
            (("--testee", "reference", "--testee", "reference"), r"error: testees need different names"),
            (
                ("--testee", "reference", "--case", "sleep"),
                r"error: --case sleep: unknown; this checkpoint has prefill",
            ),
        ],
    )
    def test_bad_input_is_one_line(self, tiny_checkpoint, arguments, message: str) -> None:
        done = self.dsv3(*arguments, "--checkpoint", tiny_checkpoint("bf16"))
        assert done.returncode == 2
        assert re.search(message, done.stderr), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1

    def test_a_crash_names_its_last_words_and_its_log(self, tiny_checkpoint) -> None:
        program = f"x={sys.executable} {SUPPORT / 'sabotaged_testee.py'} crash"
        done = self.dsv3("--testee", program, "--checkpoint", tiny_checkpoint("bf16"))
        assert done.returncode == 2
        assert re.search(
            r"error: testee x failed with status 1: RuntimeError: sabotaged on purpose \(its log: ", done.stderr
        )

    def test_nothing_is_overwritten(self, tiny_checkpoint, tmp_path: Path) -> None:
        file = tmp_path / "report.json"
        file.write_text("mine")
        done = self.dsv3("--testee", "reference", "--checkpoint", tiny_checkpoint("bf16"), "--json", file)
        assert done.returncode == 2
        assert "exists already and is not overwritten" in done.stderr
        assert file.read_text() == "mine"
        done = self.dsv3(
            "--testee", "reference", "--checkpoint", tiny_checkpoint("bf16"), "--json", "/proc/report.json"
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: /proc/report.json: cannot be written: ")

    def test_broken_checkpoint(self, tmp_path: Path) -> None:
        done = self.dsv3("--testee", "reference", "--checkpoint", tmp_path / "nothing", "--keep", tmp_path / "kept")
        assert done.returncode == 2
        assert not list(tmp_path.iterdir())
        assert "nothing" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


class TestCompare:
    """Bits, not values."""

    @staticmethod
    def rows(file: Path, values: torch.Tensor, prefixes: list[int]) -> compare.RowFile:
        recorder = RowRecorder()
        recorder.add("logits", [RowKey(0, i, p) for i, p in enumerate(prefixes)], values)
        recorder.save(file)
        return compare.RowFile(file)

    def compare(self, tmp_path: Path, left: torch.Tensor, right: torch.Tensor) -> compare.Comparison:
        a = self.rows(tmp_path / "a.safetensors", left, list(range(len(left))))
        b = self.rows(tmp_path / "b.safetensors", right, list(range(len(right))))
        return compare.compare_case("case", ("a", a), ("b", b))

    def test_nan_equals_itself_and_zero_has_a_sign(self, tmp_path: Path) -> None:
        nan = torch.tensor([[1.0, torch.nan]])
        assert self.compare(tmp_path, nan, nan.clone()).equal
        result = self.compare(tmp_path, torch.tensor([[0.0]]), torch.tensor([[-0.0]]))
        assert not result.equal
        assert result.first_difference is not None
        assert result.first_difference.ulps == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("value", [1.0, -1.0, 0.0, -3.5])
    def test_one_ulp(self, tmp_path: Path, dtype: torch.dtype, value: float) -> None:
        x = torch.tensor([[5.0, value]], dtype=dtype)
        y = torch.nextafter(x, torch.tensor([[5.0, torch.inf]], dtype=dtype))
        result = self.compare(tmp_path, x, y)
        assert (result.equal_rows, result.different_rows) == (0, 1)
        assert result.first_difference is not None
        assert (result.first_difference.column, result.first_difference.ulps) == (1, 1)

    def test_rows_are_matched_by_prefix_not_by_place(self, tmp_path: Path) -> None:
        values = torch.randn(3, 4)
        a = self.rows(tmp_path / "a.safetensors", values, [10, 11, 12])
        b = self.rows(tmp_path / "b.safetensors", values[[2, 0]], [12, 10])
        assert compare.compare_case("case", ("a", a), ("b", b)).equal_rows == 2
        c = self.rows(tmp_path / "c.safetensors", values[[2, 0]], [10, 12])
        assert compare.compare_case("case", ("a", a), ("c", c)).different_rows == 2

    def test_nothing_in_common_is_not_equal(self, tmp_path: Path) -> None:
        a = self.rows(tmp_path / "a.safetensors", torch.zeros(1, 2), [1])
        b = self.rows(tmp_path / "b.safetensors", torch.zeros(1, 2), [2])
        assert not compare.compare_case("case", ("a", a), ("b", b)).equal
        assert compare.rows_alone("b", {"a": a, "b": b}) == 1
        assert compare.rows_alone("b", {"a": a, "b": b, "c": b}) == 0

    def test_tokens(self) -> None:
        def result(*tokens: int) -> RequestResult:
            return RequestResult(token_ids=tokens, num_cached_tokens=0)

        assert compare.tokens_differ(result(1, 2, 3), result(1, 2, 3)) is None
        assert compare.tokens_differ(result(1, 2, 3), result(1, 9, 3)) == 1
        assert compare.tokens_differ(result(1, 2, 3), result(1, 2)) == 2


class TestTokenTracker:
    """Rows know which tokens they saw."""

    def test_a_rejected_draft_is_replaced(self) -> None:
        tracker = TokenTracker()
        tracker.start(0, [5, 6, 7])
        assert [key.prefix for key in tracker.observe(0, [0, 1, 2], [5, 6, 7])] == [
            prefix_digest(tokens) for tokens in ([5], [5, 6], [5, 6, 7])
        ]
        draft = tracker.observe(0, [3, 4], [8, 9])
        real = tracker.observe(0, [4], [1])
        assert draft[1].position == real[0].position == 4
        assert draft[1].prefix == prefix_digest([5, 6, 7, 8, 9])
        assert real[0].prefix == prefix_digest([5, 6, 7, 8, 1])

    def test_a_hole_is_refused(self) -> None:
        tracker = TokenTracker()
        tracker.start(0, [5])
        with pytest.raises(AssertionError):
            tracker.observe(0, [3], [1])


def test_a_promised_row_must_be_there(tmp_path: Path) -> None:
    case = Case(name="c", title="c", rounds=((Request(prompt_token_ids=(1, 2), max_tokens=2),),))
    result = (RequestResult(token_ids=(1, 2, 3, 4), num_cached_tokens=0),)
    for prefixes, problem in (
        ([(1, 2), (1, 2, 3)], None),
        ([(1, 2)], "request 0 has no logits at position 2"),
        ([(1,), (1, 2, 3)], "request 0 has no logits at position 1"),
        ([(1, 2), (1, 9, 3)], "request 0 has no logits at position 2"),
    ):
        recorder = RowRecorder()
        keys = [RowKey(0, len(tokens) - 1, prefix_digest(tokens)) for tokens in prefixes]
        recorder.add("logits", keys, torch.zeros(len(keys), 2))
        recorder.save(tmp_path / "rows.safetensors")
        assert compare.missing_rows(case, result, compare.RowFile(tmp_path / "rows.safetensors")) == problem
    short = (RequestResult(token_ids=(1, 2, 3), num_cached_tokens=0),)
    assert compare.missing_rows(case, short, compare.RowFile(tmp_path / "rows.safetensors")) == (
        "request 0 has 1 tokens, 2 were asked for"
    )


def test_requests_of_equal_tokens_have_the_rows_of_one_pass(tmp_path: Path) -> None:
    once = RowRecorder()
    once.add("logits", [RowKey(0, p, prefix_digest(range(p + 1))) for p in range(3)], torch.randn(3, 2))
    recorder = RowRecorder()
    for request in (4, 1):
        recorder.extend(once, request)
    recorder.save(tmp_path / "rows.safetensors")
    rows = compare.RowFile(tmp_path / "rows.safetensors")
    digests = [prefix_digest(range(p + 1)) for p in range(3)]
    assert rows.keys("logits") == [(request, digest) for request in (4, 1) for digest in digests]
    assert rows.positions("logits").tolist() == [0, 1, 2] * 2
    assert torch.equal(*rows.values("logits").chunk(2))


def test_an_unknown_testee_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConformanceError, match="no command after"):
        runner.TesteeCommand.parse("mine=", tmp_path)


class Divisors(TorchFunctionMode):
    """What tensors are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if "div" in func.__name__:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


def test_logits_are_divided_by_the_temperature_on_every_device():
    """A GPU multiplies by the reciprocal of a Python number, or of a CPU's tensor, and the engines divide."""
    logits = torch.randn(5, device="meta")
    with Divisors() as divisors:
        processed_logprobs(logits, 0.7)
        _ = logits / 0.7
    ours, twin = divisors.seen
    assert isinstance(ours, torch.Tensor) and ours.device == logits.device
    assert not isinstance(twin, torch.Tensor)
