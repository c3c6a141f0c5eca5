"""Certificates hold for the sources that a card has run, and for no others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_plugin.hooks import Setting, always
from dsv3_plugin.kernels import certificates, check, provider, selection, sm90_model
from dsv3_plugin.kernels.certificates import Certificate
from dsv3_plugin.profile import FP8_UE8M0
from dsv3_plugin.registry import CONTRACTS, refusal

HOPPER = Setting("cuda", "sm90", FP8_UE8M0, (9, 0))


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.op)
def test_own_kernels_serve_in_strict_mode(contract):
    own = next(k for k in provider.dsv3_kernels() if (k.op, k.provider) == (contract.op, provider.PROVIDER))
    if own.uncertified:
        pytest.skip(f"{contract.op}: {own.uncertified}")
    assert own.certificate and "random cases on one NVIDIA H200" in own.certificate
    assert refusal(replace(own, refuses=always), contract, HOPPER, "strict") is None


def test_the_table_names_operations_that_there_are():
    assert set(certificates.read(certificates.TABLE)) <= {contract.op for contract in CONTRACTS}


def copy_of_sources(folder: Path) -> None:
    shutil.copytree(certificates.TABLE.parent, folder, ignore=shutil.ignore_patterns("__pycache__"))


def changed(folder: Path, file: str, old: str, new: str) -> str:
    """The digest of attention's sources after a change."""
    copy_of_sources(folder)
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))
    return certificates.digest("mla", folder)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mla.py", "import torch\n", "import torch\n\nX = 1\n"),
        ("mla_hopper.cu", "{", "{ ;"),
        ("mla_units.cuh", "{", "{ ;"),
        ("hopper.cuh", "{", "{ ;"),
        ("triton_math.py", "import triton\n", "import triton\n\nX = 1\n"),
        ("cuda.py", '= "sm_90a"', '= "sm_90b"'),
    ],
)
def test_a_change_of_anything_that_a_kernel_is_made_of_ends_its_certificate(tmp_path, file, old, new):
    assert changed(tmp_path / "kernels", file, old, new) != certificates.digest("mla")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("mla.py", '"""', '"""Another docstring. '),
        ("mla.py", "import torch\n", "import torch\n\n# Another comment.\n"),
        ("mla_units.cuh", "{\n", "{\n// Another comment.\n"),
        ("rope.py", "import torch\n", "import torch\n\nX = 1\n"),
    ],
)
def test_words_and_other_kernels_leave_it(tmp_path, file, old, new):
    assert changed(tmp_path / "kernels", file, old, new) == certificates.digest("mla")


@pytest.mark.parametrize(
    ("change", "ends"),
    [({"stream": {"tile_rows": 64, "tokens": 16}}, True), ({"microseconds": {"stream": 0.5}}, False)],
    ids=["another way to cut", "another time"],
)
def test_a_table_with_other_cuts_ends_the_certificate_of_products_and_one_with_other_times_does_not(
    tmp_path, change, ends
):
    folder = tmp_path / "kernels"
    copy_of_sources(folder)
    table = selection.table()
    cut = next(i for i, row in enumerate(table.rows) if row.stream)
    rows = (*table.rows[:cut], table.rows[cut].model_copy(update=change), *table.rows[cut:])
    table.model_copy(update={"rows": rows}).write(folder / "selection.json")
    assert (certificates.digest("fp8_linear", folder) != certificates.digest("fp8_linear")) == ends
    assert certificates.digest("mla", folder) == certificates.digest("mla")


def test_strict_mode_refuses_what_has_changed_since(monkeypatch):
    contract = next(contract for contract in CONTRACTS if contract.op == "rope")
    entry = Certificate(
        contract_version=1, sources="0" * 16, cases=9, cases_on_cpu=3, card="a card", torch="2", triton="3"
    )

    def why(table: dict[str, Certificate]) -> str | None:
        monkeypatch.setattr(certificates, "_shipped", lambda: table)
        kernel = provider.own_kernel(contract, "triton", always)
        return refusal(kernel, contract, HOPPER, "strict")

    assert "its sources have changed" in str(why({"rope": entry}))
    assert "no card has compared it" in str(why({}))
    assert "version 7 of its contract" in str(why({"rope": entry.model_copy(update={"contract_version": 7})}))
    assert why({"rope": entry.model_copy(update={"sources": certificates.digest("rope")})}) is None


def result(op: str, maker: str, *, wrong: int = 0, full_card: bool = False, cases: int = 20) -> check.Result:
    return check.Result(op, maker, cases, 100, wrong, wrong, full_card=full_card)


MODEL = sm90_model.PROVIDER


def test_operations_earn_a_certificate_when_all_their_makers_are_equal(monkeypatch, tmp_path):
    monkeypatch.setattr(check.torch.cuda, "get_device_name", lambda: "a card")
    findings = [
        result("fp8_linear", "stream"),
        result("fp8_linear", "gluon", cases=10),
        result("fp8_linear", "cublas", wrong=1),  # another's, which claims nothing
        result("fp8_linear", MODEL, cases=2),
        result("mla_attention", "cuda"),
        result("mla_attention", "cuda", full_card=True, cases=2),
        result("rope", "triton", wrong=1),
        result("combine", "triton"),
        result("combine", MODEL, cases=2, wrong=1),  # a CPU contradicts the expected bits
        result("linear", "triton"),
        check.Broken("linear", "triton", "no such symbol"),
    ]
    earned = check.earned(findings)
    found = {op: (entry.cases, entry.cases_on_cpu) for op, entry in earned.items()}
    assert found == {"fp8_linear": (10, 2), "mla_attention": (20, 20)}
    assert earned["mla_attention"].sources == certificates.digest("mla")

    path = tmp_path / "certificates.json"
    certificates.write(path, earned)
    certificates.write(path, {"rope": earned["fp8_linear"]})
    assert certificates.read(path) == earned | {"rope": earned["fp8_linear"]}


def test_a_run_that_ends_early_leaves_the_certificates_of_what_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(check.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(check.torch.cuda, "get_device_name", lambda: "a card")
    of_rope = provider.own_kernel(next(c for c in CONTRACTS if c.op == "rope"), "triton", always)
    monkeypatch.setattr(check, "chosen", lambda ops, names: [of_rope, replace(of_rope, op="combine")])

    def stopped(work, shares):
        for share in shares:
            if share.op == "combine":
                raise KeyboardInterrupt
            yield share, [result(share.op, "triton")]

    monkeypatch.setattr(check, "in_processes", stopped)
    path = tmp_path / "certificates.json"
    with pytest.raises(KeyboardInterrupt):
        check.main(cases=20, certify=path)
    assert set(certificates.read(path)) == {"rope"}
