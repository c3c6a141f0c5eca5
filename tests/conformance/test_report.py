"""The report's page: how close, layer by layer; what is claimed and was not tested; and small however much differs."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from dsv3_plugin.conformance import report as reports
from dsv3_plugin.conformance.claims import shipped
from dsv3_plugin.conformance.closeness import Closeness, Distance, Drift, Row, merge_drifts
from dsv3_plugin.conformance.compare import Comparison, Difference
from dsv3_plugin.conformance.plot import drift_plot
from dsv3_plugin.conformance.protocol import Case, CaseResult, Request, RequestResult, Result, Served
from dsv3_plugin.conformance.verdicts import SPECIFICATION, CaseVerdict, Report

REQUEST = Request(prompt_token_ids=(1, 2), max_tokens=1)
DIFFERENCE = Difference("layers.0.self_attn", 0, 1, 2, 0.5, 0.25, 128, "0x3f00", "0x3e80")
STREAMS = ["embed_tokens", "layers.0.self_attn", "layers.0.mlp", "layers.0", "norm", "logits"]


def case(name: str) -> Case:
    return Case(name=name, title=f"the case {name}", rounds=((REQUEST,),))


def result(testee: str, cases: list[Case], **more: object) -> Result:
    answer = RequestResult(token_ids=(1, 2, 3), num_cached_tokens=0)
    done = [
        CaseResult(name=c.name, requests=(answer,), num_draft_tokens=0, num_accepted_tokens=0, seconds=1) for c in cases
    ]
    served = Served(model_class="dsv3_plugin.Model", draft_class=None, profile="bf16", kernels={})
    versions = {"dsv3-plugin": "0.1", "vllm": "0.32.0"}
    return Result(testee=testee, versions=versions, served=served, cases=tuple(done), **more)


def report_of(cases: list[Case], names: list[str], equal: bool) -> Report:
    """Every pair of testees in every case, equal or not."""
    sides = [SPECIFICATION, *names]
    pairs = [(a, b) for i, a in enumerate(sides) for b in sides[i + 1 :]]
    report = Report("DIR", "bf16", {name: result(name, cases) for name in names})
    for each in cases:
        rows = (5, 0, None) if equal else (0, 5, DIFFERENCE)
        compared = tuple(Comparison(each.name, a, b, *rows) for a, b in pairs)
        nothing: dict[str, dict[int, str]] = {name: {} for name in names}
        report.verdicts.append(CaseVerdict(each, compared, (), (), (), dict.fromkeys(names, 0), nothing))
    return report


def closeness(testee: str = "hf", *, times: float = 1.0) -> Closeness:
    def distance(size: float) -> Distance:
        return Distance(100, 0.1 * size, 1, 0.5 * size, Row("prefill", 0, 7, 0.01 * size))

    own = tuple(Drift(stream, 1e-6 * 4**i, 1.0) for i, stream in enumerate(STREAMS))
    found = tuple(replace(part, squares=part.squares * times**2) for part in own)
    return Closeness(testee, distance(times), distance(1), DIFFERENCE, found, own)


def printed(report: Report) -> str:
    console = Console(record=True, width=300)
    reports.print_report(report, console)
    return console.export_text()


@pytest.mark.parametrize("equal", [True, False])
def test_a_page_of_ten_thousand_rows_is_small(equal: bool) -> None:
    cases = [case(f"case_{i}") for i in range(667)]
    page = reports.to_html(report_of(cases, ["reference", "vllm", "sglang", "megatron", "core"], equal))
    assert page.count('<td class="number">') >= 10_000
    assert len(page.encode()) < 2_000_000
    assert page.count("first difference in") == (0 if equal else reports.MOST_DIFFERENCES)
    assert ("more are in the report that" in page) is not equal
    # It needs no other file.
    assert not re.search(r"(src|href)=|url\(|@import", page)


def test_what_a_run_did_not_test_it_does_not_claim() -> None:
    report = report_of([case("prefill")], ["reference", "vllm"], equal=True)
    assert "Claimed of" not in printed(report) and "What is claimed" not in reports.to_html(report)
    report.claims = tuple(shipped())
    card = {card.testee: card for card in reports.claimed(report)}["vllm"]
    status = {(line.profile, line.layout): line.status for line in card.lines}
    assert status.pop(("bf16", "one")) == "verified"
    assert set(status.values()) == {"not tested"} and ("fp8", "tp=4") in status
    text = "Claimed of vllm 0.32.0 and not tested in this run: fp32, fp8, bf16 tp=2"
    assert text in printed(report)
    page = reports.to_html(report)
    assert page.count("not tested</td>") == len(status) + len(["fp32", "fp8"]) and "verified, 5 rows" in page
    report.verdicts = report_of([case("prefill")], ["reference", "vllm"], equal=False).verdicts
    assert "failed" in {line.status for line in reports.claimed(report)[-1].lines}


def test_known_mistakes_of_the_cases_that_ran() -> None:
    report = report_of([case("token_drowned")], ["reference"], equal=True)
    assert "would have shown" not in printed(report), "they need the preset"
    report.features = frozenset({"traps"})
    assert "2 known mistakes would have shown: zero_group_mask, no_epsilon." in printed(report)
    page = reports.to_html(report)
    assert "without the 1e-20 under it" in page and "routing is recorded" not in page
    assert "Known mistakes" not in reports.to_html(report_of([case("other")], ["reference"], equal=True))
    # Closeness alone would not show them.
    report.verdicts[0] = replace(report.verdicts[0], comparisons=(), closeness=(closeness(),))
    assert report.guarded == []


def test_bounds_are_printed_and_judge() -> None:
    near, far = closeness(times=1.9), closeness(times=2.1)
    assert [bound.name for bound in near.bounds if not bound.holds] == []
    assert [bound.name for bound in far.bounds if not bound.holds] == ["largest difference of two logits"]
    assert [bound.allowed for bound in near.bounds] == pytest.approx([4e-3, 4e-2, 0.02, 1.0])
    assert "allowed: mean KL divergence 4.00e-03, largest KL divergence 4.00e-02" in "\n".join(near.describe())
    nothing = replace(near, distance=Distance(0, 0.0, 0, 0.0, None))
    assert len(nothing.beyond()) == 3, "what is no number is not within a bound"
    report = report_of([case("prefill")], ["reference"], equal=True)
    report.verdicts[0] = replace(report.verdicts[0], closeness=(far,))
    page = reports.to_html(report)
    assert page.count("✗") == 1 and "2.10e+00" not in page and "1.05e+00" in page


def test_plot() -> None:
    """As many points as modules on either line, the testee's above by what it is further away."""
    svg = ElementTree.fromstring(drift_plot(closeness("<hf>", times=10)))
    lines = {line.get("class"): line.get("points", "").split() for line in svg.iter("polyline")}
    assert {name: len(points) for name, points in lines.items()} == {"spread": len(STREAMS), "testee": len(STREAMS)}
    height = {name: [float(point.split(",")[1]) for point in points] for name, points in lines.items()}
    decades = [(a - b) for a, b in zip(height["spread"], height["testee"], strict=True)]
    assert max(decades) - min(decades) < 0.2 and decades[0] > 20
    assert height["testee"] == sorted(height["testee"], reverse=True)
    assert "<hf>, layers.0.mlp: 4.00e-02" in [title.text for title in svg.iter("title")]
    # Rows that are equal have no logarithm, and logits alone are no drift.
    assert drift_plot(replace(closeness(), drift=closeness().drift[-1:])) == ""
    assert drift_plot(closeness(times=0)).count("<circle") == len(STREAMS)
    assert math.isnan(Drift("norm", 0.0, 0.0).relative)
    assert merge_drifts([closeness().drift, closeness().drift])[0] == Drift("embed_tokens", 2e-6, 2.0)
