"""Verification cards: what was shown beside what is claimed, and no claim that was not tested."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from engines import REFERENCE, in_fork, warm
from paths import ROOT, SUPPORT

from dsv3_plugin.conformance import cli, runner
from dsv3_plugin.conformance.card import cards, read_report, unclaimed
from dsv3_plugin.conformance.claims import Claims, shipped
from dsv3_plugin.conformance.runner import ENGINES
from dsv3_plugin.conformance.verdicts import Report
from dsv3_plugin.errors import ConformanceError
from dsv3_plugin.profile import BF16, attention_from_environment, reduction_slices_from_environment
from dsv3_plugin.version import __version__

CLAIMS = """
testee = "{}"
package = "torch"

[[claim]]
versions = ">=2"
devices = ["cpu", "cuda"]
profiles = {}
layouts = {}

[[not_claimed]]
what = "speed"
reason = "nobody measured it"
"""


def claims(testee: str, profiles: str = '["bf16"]', layouts: str = '["one"]') -> str:
    return CLAIMS.format(testee, profiles, layouts)


@pytest.fixture(scope="module")
def report(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the reference, and of one that is wrong, as `--json` writes it."""
    bad = (sys.executable, str(SUPPORT / "sabotaged_testee.py"), "ulp:norm")
    testees = [in_fork(REFERENCE), in_fork(runner.TesteeCommand("bad", bad))]
    found = runner.run(testees, tiny_checkpoint("bf16"), lambda *_: None, only=("decode",))
    file = tmp_path_factory.mktemp("report") / "report.json"
    file.write_text(json.dumps(found.to_json()))
    return file


def card_of(tmp_path: Path, report: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "claims.toml"
    file.write_text(text)
    (card,) = cards(Claims.read(file), [read_report(report)])
    read: dict[str, Any] = yaml.safe_load(card.to_yaml())
    assert read["complete"] is card.complete
    return read


def test_a_claim_that_was_shown(report: Path, tmp_path: Path) -> None:
    card = card_of(tmp_path, report, claims("reference"))
    (line,) = card["claims"]
    shown = read_report(report)
    assert (line["status"], line["rows"], line["log_probabilities"]) == ("verified", 1242, 792)
    assert (line["cases"], line["date"], line["command"]) == (["decode"], shown["date"], shown["command"])
    assert card["complete"] and card["device"] == "cpu" and card["torch"].startswith("2.")
    assert card["not_claimed"] == [{"what": "speed", "reason": "nobody measured it"}]


def test_one_that_failed_and_ones_that_were_not_tested(report: Path, tmp_path: Path) -> None:
    """Twins of the first."""
    (line,) = card_of(tmp_path, report, claims("sabotaged"))["claims"]
    assert line["status"] == "failed"
    assert line["found"].startswith("decode: specification: first difference in norm, request 0, position 0")
    card = card_of(tmp_path, report, claims("reference", '["bf16", "fp8"]', '["one", "tp=2"]'))
    status = {(line["profile"], line["layout"]): line["status"] for line in card["claims"]}
    assert not card["complete"]
    assert status.pop(("bf16", "one")) == "verified" and set(status.values()) == {"not tested"} and len(status) == 3


def test_an_arithmetic_is_evidence_of_itself(report: Path, tmp_path: Path) -> None:
    file = tmp_path / "claims.toml"
    file.write_text(claims("reference", '["bf16", "bf16 two_form"]'))
    for shown, verified in (
        ("bf16 in 2 reduction slices", ["bf16"]),
        ("bf16 two_form", ["bf16 two_form"]),
        ("bf16 two_form in 2 reduction slices", ["bf16 two_form"]),
        ("fp8", []),
    ):
        (card,) = cards(Claims.read(file), [read_report(report) | {"profile": shown}])
        assert [line.profile for line in card.lines if line.status == "verified"] == verified, shown


def test_what_nobody_claims_is_told(report: Path, tmp_path: Path) -> None:
    """By device, profile, layout and promise; another testee's results are another's to claim."""
    file, shown = tmp_path / "claims.toml", read_report(report)
    file.write_text(claims("reference"))
    claimed, result = Claims.read(file), shown["testees"]["reference"]
    version = result["versions"]["torch"]

    def told(of_result: dict[str, str], **changes: str) -> list[str]:
        testees = shown["testees"] | {"reference": result | of_result}
        return list(unclaimed(claimed, shown | changes | {"testees": testees}))

    def no_claim_is_of(what: str) -> list[str]:
        return [f"no claim is of reference {version} on {what}: it is on no card until a claim file names it"]

    assert told({}) == told({}, device="cuda") == told({}, profile="bf16 in 2 reduction slices") == []
    two_form = told({}, profile="bf16 two_form in 2 reduction slices")
    assert two_form == no_claim_is_of("cpu in bf16 two_form, layout one, with equality")
    assert told({}, device="cuda", profile="fp8") == no_claim_is_of("cuda in fp8, layout one, with equality")
    assert told({"layout": "tp=2"}) == no_claim_is_of("cpu in bf16, layout tp=2, with equality")
    assert told({"claim": "closeness"}) == no_claim_is_of("cpu in bf16, layout one, with closeness")


def test_a_reports_command_runs_its_arithmetic_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a variable that is not set."""
    monkeypatch.setattr(sys, "argv", ["dsv3", "conformance", "run"])
    monkeypatch.delenv("DSV3_REDUCTION_SLICES", raising=False)
    for form in "absorbed", "two_form":
        monkeypatch.setenv("DSV3_ATTENTION", form)
        assert Report("tiny", "bf16", {}).command == f"DSV3_ATTENTION={form} dsv3 conformance run"
    monkeypatch.setenv("DSV3_REDUCTION_SLICES", "2")
    monkeypatch.delenv("DSV3_ATTENTION")
    assert Report("tiny", "bf16", {}).command == "DSV3_REDUCTION_SLICES=2 dsv3 conformance run"


def asked_by(command: str) -> tuple[str, list[str]]:
    """Attention and layouts of a card's command. Raises `ConformanceError` where the command would."""
    words = shlex.split(command)
    variables = dict(word.split("=") for word in words[: words.index("dsv3")])
    suite = typer.Typer()
    suite.command()(cli.run)
    options = typer.main.get_command(suite).make_context("run", words[words.index("run") + 1 :]).params
    profile = replace(BF16, reduction_slices=reduction_slices_from_environment(variables))
    testees = cli.testee_commands(options["testee"], options["layout"] or [], options["environments"])
    for testee in testees:
        testee.layout.require_slices(profile)
    return attention_from_environment(variables), [str(testee.layout) for testee in testees]


def test_the_commands_of_our_cards_run_what_they_stand_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its variables a command would be refused where tensor-parallel ranks share sums."""
    monkeypatch.setattr(runner.TesteeCommand, "_of_engine", lambda *_: ())  # whether an engine is installed here or not
    files = (ROOT / "docs" / "cards").iterdir()
    lines = [line for file in files for line in yaml.safe_load(file.read_text())["claims"] if "command" in line]
    for line in lines:
        attention, layouts = asked_by(line["command"])
        assert ("two_form" in line["profile"]) is (attention == "two_form") and line["layout"] in layouts, line
    in_slices = [line["command"] for line in lines if "tp=" in line["layout"]]
    assert in_slices
    for command in in_slices:
        with pytest.raises(ConformanceError, match="set DSV3_REDUCTION_SLICES"):
            asked_by(command[command.index("dsv3") :])


def test_reports_of_another_day_complete_a_card(report: Path, tmp_path: Path) -> None:
    file, earlier = tmp_path / "claims.toml", tmp_path / "card.yaml"
    file.write_text(claims("reference", '["bf16", "fp8"]'))
    today = read_report(report)
    (of_fp8,) = cards(Claims.read(file), [today | {"profile": "fp8", "date": "yesterday"}])
    (of_bf16,) = cards(Claims.read(file), [today])
    assert not of_fp8.complete and not of_bf16.complete
    earlier.write_text(of_fp8.to_yaml())
    whole = of_bf16.completing(earlier)
    assert whole.complete and [line.date == "yesterday" for line in whole.lines] == [False, True]
    assert whole.lines[1] == of_fp8.lines[1]
    many = of_fp8.lines[1]
    few, failed = replace(many, rows=many.rows - 1), replace(many, rows=0, status="failed")
    for there, reported, better in (many, few, many), (few, many, many), (many, failed, failed), (failed, many, failed):
        earlier.write_text(replace(of_fp8, lines=(there,)).to_yaml())
        assert replace(of_fp8, lines=(reported,)).completing(earlier).lines == (better,)
    earlier.write_text(of_fp8.to_yaml().replace(f"dsv3-plugin: {__version__}", "dsv3-plugin: 0.0.9"))
    with pytest.raises(ConformanceError, match=r"card.yaml: was made with .*0\.0\.9.*: begin another"):
        of_bf16.completing(earlier)
    good = of_fp8.to_yaml()
    for text in (
        *("", "claims: []", "- 1", "{", "\xff", good.replace("rows:", "row:"), good.replace("card: 1", "card: 2")),
        *(good.replace("rows: ", "rows: many"), good.replace("status: verified", "status: splendid")),
    ):
        earlier.write_text(text, "latin-1")
        with pytest.raises(ConformanceError, match=r"card.yaml: is no card"):
            of_bf16.completing(earlier)


EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda r: r.pop("problems"), "problems: Field required"),
    (lambda r: r.update(profile=None), "profile: Input should be a valid string"),
    (lambda r: r.update(device="tpu"), "device: Input should be 'cpu' or 'cuda'"),
    (lambda r: r.update(testees=[]), "testees: Input should be a valid dict"),
    (lambda r: r["testees"]["reference"].pop("claim"), "testees.reference.claim: Field required"),
    (lambda r: r.update(failures=[{"testee": "reference", "case": "decode", "found": []}]), "failures.0.found: "),
    (lambda r: r["cases"][0]["comparisons"][0].update(equal_rows=-1), "cases.0.comparisons.0.equal_rows: "),
    (lambda r: r["cases"][0]["logprobs"][0].update(equal="1"), "cases.0.logprobs.0.equal: "),
]


@pytest.mark.parametrize(("edit", "says"), EDITS, ids=[says for _, says in EDITS])
def test_a_report_that_someone_edited(
    report: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    edited, file = json.loads(report.read_text()), tmp_path / "edited.json"
    edit(edited)
    file.write_text(json.dumps(edited))
    with pytest.raises(ConformanceError, match=rf"edited.json: not a report of dsv3 conformance run --json: {says}"):
        read_report(file)


def test_a_version_of_which_nothing_is_claimed(report: Path, tmp_path: Path) -> None:
    """It is no complete card; and one that is a path is none."""
    file = tmp_path / "claims.toml"
    file.write_text(claims("reference").replace(">=2", ">=99"))
    shown = read_report(report)
    (card,) = cards(Claims.read(file), [shown])
    assert card.lines == () and not card.complete
    shown["testees"]["reference"]["versions"]["torch"] = "../2.0"
    with pytest.raises(ConformanceError, match=r"a report of reference names '\.\./2\.0' as torch's version"):
        cards(Claims.read(file), [shown])


def test_command(report: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "claims.toml", tmp_path / "cards"
    file.write_text(claims("reference"))

    def card(*arguments: object) -> subprocess.CompletedProcess[str]:
        return warm("core", Path(sys.executable).with_name("dsv3"), "conformance", "card", *arguments)

    done = card(report, "--output", output, "--claims", file)
    (written,) = output.iterdir()
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{written}: 1 verified\n", "")
    done = card(report, "--output", output, "--claims", file)
    assert done.returncode == 2 and "exists already and is not overwritten; --update completes it" in done.stderr
    done = card(report, "--output", output, "--claims", file, "--update")
    assert (done.returncode, done.stdout) == (0, f"{written}: 1 verified\n")
    file.write_text(claims("reference", '["bf16", "fp32"]'))
    done = card(report, "--output", tmp_path / "more", "--claims", file)
    assert done.returncode == 1 and "1 verified, 1 not tested" in done.stdout
    # The reference's claims ship with the package; nobody's do of a testee of another name.
    done = card(report, "--output", tmp_path / "shipped")
    assert done.returncode == 1 and "1 verified, 2 not tested" in done.stdout
    # A report of what is not claimed changes no card, and is named.
    two_form = tmp_path / "two_form.json"
    two_form.write_text(report.read_text().replace('"profile": "bf16"', '"profile": "bf16 two_form"'))
    file.write_text(claims("reference"))
    done = card(report, two_form, "--output", tmp_path / "both", "--claims", file)
    assert done.returncode == 0 and "1 verified" in done.stdout
    assert done.stderr.startswith(f"note: {two_form}: no claim is of reference ") and done.stderr.count("\n") == 1
    assert (tmp_path / "both" / written.name).read_text() == written.read_text()
    others = tmp_path / "others.json"
    others.write_text(report.read_text().replace('"testee": "reference"', '"testee": "mine"'))
    done = card(others, "--output", tmp_path / "none")
    assert done.returncode == 2 and "no claims are of mine, sabotaged: give a file with --claims" in done.stderr
    done = card(file, "--output", tmp_path / "none")
    assert done.returncode == 2 and "not a report of dsv3 conformance run --json" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (claims("a").replace(">=2", "new"), "claim.0.versions: Value error, Invalid specifier: 'new'"),
        (claims("a", layouts='["tp"]'), "claim.0.layouts: Value error, --layout tp: 'tp' is not one of"),
        (claims("a").replace('"cuda"', '"tpu"'), "claim.0.devices.1: Input should be 'cpu' or 'cuda'"),
        (claims("a").replace("nobody measured it", ""), "not_claimed.0.reason: String should have at least 1"),
        (claims("a", '["two_form"]'), "claim.0.profiles.0: String should match pattern"),
        ('testee = "a"', "package: Field required"),
    ],
)
def test_a_claim_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "claims.toml"
    file.write_text(text)
    with pytest.raises(ConformanceError) as error:
        Claims.read(file)
    assert f"{file}: {message}" in str(error.value)


def test_every_engine_ships_its_claims() -> None:
    found = {each.testee: each for each in shipped()}
    assert set(found) == {*ENGINES, "transformers"}
    for name, each in found.items():
        assert each.not_claimed and not list(each.of("99", "cpu"))
        if ENGINES.get(name) is not None:
            newest = max(version for claim in each.claim for version in claim.versions.split("=")[1:] if version)
            assert list(each.of(newest, "cpu"))
    assert [kind for _, kind in found["transformers"].of("5.23.0", "cpu")] == ["closeness", "closeness"]
    assert list(found["core"].of(__version__, "cpu")) and list(found["reference"].of(__version__, "cuda"))
