"""Certificates hold for exactly what a card has run: code, contract, libraries, card. Here a CPU passes for an H200."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv3_plugin
from dsv3_plugin import certificates, sources
from dsv3_plugin.certificates import Certificate
from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import Setting
from dsv3_plugin.kernels import own, provider, selection
from dsv3_plugin.kernels.certify import check, earn, targets
from dsv3_plugin.kernels.certify.findings import MODEL_ON_CPU, Broken, Result
from dsv3_plugin.kernels.certify.targets import DeviceName, Target, Where
from dsv3_plugin.kernels.cuda import compiler
from dsv3_plugin.kernels.hopper import CERTIFICATES, V3_LATENT, on_hopper_with
from dsv3_plugin.kernels.sm90 import sm90_model
from dsv3_plugin.kernels.vendors import deep_gemm
from dsv3_plugin.ops.fp8_linear import fp8_linear
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.profile import BF16, FP8_UE8M0
from dsv3_plugin.registry import Ops, bind, with_training

HOPPER = Setting("cuda", "sm90", FP8_UE8M0, (9, 0), V3_LATENT)
IN_SLICES = replace(HOPPER, profile=replace(FP8_UE8M0, reduction_slices=2))
OTHER_LATENT = Setting("cuda", "sm90", BF16, (9, 0), {"kv_lora_rank": 128, "qk_rope_head_dim": 32})
VERSIONS = {
    "dsv3-plugin": "0.1.0",
    "triton": "3.6.0",
    "cuda-bindings": "13.3.1",
    "nvidia-cuda-nvrtc": "13.0.88",
    "sgl-deep-gemm": "0.1.5.post1",
    "transformer-engine": "2.13.0",
    "transformer-engine-torch": "2.13.0",
    "nvidia-cublas": "13.1.0.3",
}


@pytest.fixture
def h200(monkeypatch, tmp_path):
    """This machine as one with an H200 and everything installed; what its kernels are asked never runs them. The dict
    is of installed versions.
    """
    versions = dict(VERSIONS)

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    monkeypatch.setattr(certificates, "card_of", lambda device_type: ("NVIDIA H200", "9.0"))
    monkeypatch.setattr(compiler, "missing", lambda: None)
    monkeypatch.setattr(deep_gemm, "missing", lambda: None)
    monkeypatch.setattr(deep_gemm, "_compiler", lambda: "nvcc 13.0.88")
    monkeypatch.setattr(provider, "is_supported", on_hopper_with(lambda: None))
    monkeypatch.setenv(certificates.FILE_VARIABLE, str(tmp_path / "none.json"))
    return versions


def all_certificates() -> list[Certificate]:
    """For all implementations that this package knows, as they are here and now."""
    kernels = [kernel for kernel in provider.dsv3_kernels() if kernel.implementations]
    return [
        Certificate(
            subject=certificates.subject_of(part, operations()[kernel.op], HOPPER),
            seed=0,
            cases=1000,
            refused_cases=0,
            cases_on_cpu=63,
            dtypes=("bfloat16",),
            page_sizes=(1, 16, 32, 64) if kernel.op == "mla_attention" else (),
        )
        for kernel in kernels
        for part in kernel.parts
    ]


@pytest.fixture
def certified(h200, monkeypatch, tmp_path):
    """All implementations of today have certificates, in place of the shipped ones; the file."""
    file = tmp_path / "shipped.json"
    certificates.write(file, all_certificates())
    for module in (provider, sys.modules["dsv3_plugin.kernels.vendors.third_party"]):
        monkeypatch.setattr(module, "CERTIFICATES", file)
    return file


def strict(setting: Setting = HOPPER) -> Ops:
    return bind(setting, "strict", provider.dsv3_kernels())


def serving(ops: Ops) -> dict[str, str]:
    return {choice.op: str(choice) for choice in ops.provenance}


def why_not(setting: Setting = HOPPER) -> str:
    """Strict mode's refusal."""
    with pytest.raises(KernelError) as error:
        strict(setting)
    return str(error.value)


def test_the_shipped_certificates_are_of_todays_kernels(h200):
    """On the card that wrote them strict mode serves. A change to a kernel, or to what it imports, lands with its
    certificate, or takes it out of the file: then strict mode refuses that kernel, and this waits for a card.
    """

    def by_name(found: Iterable[Certificate]) -> dict[tuple[str, str], Certificate]:
        return {(c.subject.operation, c.subject.implementation): c for c in found}

    shipped, wanted = by_name(certificates.read(CERTIFICATES)), by_name(all_certificates())
    both = wanted.keys() & shipped.keys()
    stale = {name: told for name in both if (told := wanted[name].subject.differences(shipped[name].subject))}
    renew = f"run `dsv3 kernels check --certify kernels/{CERTIFICATES.name}` on a Hopper card"
    assert not stale, f"{renew}, or take these certificates out of the file: {stale}"
    missing = wanted.keys() - shipped.keys()
    needed = {op.name for op in operations().values() if not (op.training or op.two_form)}
    if not any(op in needed and not part.startswith("transformer_engine.") for op, part in missing):
        for setting in (HOPPER, IN_SLICES, OTHER_LATENT):
            assert all(part.certificate for choice in strict(setting).provenance for part in choice.parts)
    if missing:
        pytest.skip(f"{renew}: there is no certificate for {sorted(missing)}")
    assert shipped.keys() == wanted.keys()
    # Of a thousand shapes, of which some kernels refuse most.
    assert all(found.cases >= 150 and found.cases + found.refused_cases >= 1000 for found in shipped.values())
    assert all(found.cases_on_cpu >= 63 for found in shipped.values())


def test_provenance_names_what_runs_and_for_which_shapes(certified):
    ops = strict()
    names = serving(ops)
    assert names["mla_attention"] == "cuda 0.1.0 (cuda.mla_hopper)"
    assert names["linear"] == "deep-gemm 0.1.5.post1 (deep_gemm.bf16_gemm_nt or triton.linear)"
    backends = "cuda.fp8_gemm or triton.fp8_gluon or triton.fp8_linear"
    assert names["grouped_fp8_linear"] == f"triton 0.1.0 ({backends})"
    assert names["fp8_linear"] == f"triton 0.1.0 ({backends})"
    assert names["rope"] == "triton 0.1.0"
    assert "cuda 0.1.0: mla_attention by cuda.mla_hopper" in ops.announcement("DeepseekV3ForCausalLM")
    assert serving(strict(OTHER_LATENT))["mla_attention"] == "triton 0.1.0"
    record = json.loads(json.dumps(ops.record()))
    of_linear = next(each for each in record["operations"] if each["operation"] == "linear")
    assert [part["shapes"] for part in of_linear["implementations"]] == ["N and K in whole eights", "other shapes"]
    assert all(part["certificate"]["subject"]["card"] == "NVIDIA H200" for part in of_linear["implementations"])


def test_provenance_names_the_backend_of_each_product_that_was_met(certified, monkeypatch):
    selection.choose.cache_clear()
    monkeypatch.setattr(selection, "_chosen", {})
    for rows in (9, 7, 8):
        selection.choose(0, 24, 128, rows, ("triton",))
    selection.choose(4, 128, 128, 7, ("gluon",))
    served = {each["operation"]: each["served_so_far"] for each in strict().record()["operations"]}
    assert served["fp8_linear"] == {"7 to 9 rows x 24 x 128": "triton.fp8_linear"}
    assert served["grouped_fp8_linear"] == {"4 experts x 7 to 7 rows x 128 x 128": "triton.fp8_gluon"}
    assert served["rope"] == {}


OTHER_VERSIONS = {
    "triton": (["rope", "head_linear", "moe_router"], "triton is 3.7.0, with 3.6.0 it was compared"),
    "cuda-bindings": (["mla_attention"], "cuda-bindings is 13.4.0, with 13.3.1 it was compared"),
    "nvidia-cuda-nvrtc": (["mla_attention"], "nvrtc is 13.1.0, with 13.0.88 it was compared"),
}


@pytest.mark.parametrize("name", OTHER_VERSIONS)
def test_another_version_of_a_compiler_is_refused_with_the_command_that_certifies(certified, h200, name):
    strict()  # the twin: it is the version that counts
    ops, why = OTHER_VERSIONS[name]
    h200[name] = why.split()[2].rstrip(",")
    message = why_not()
    assert why in message and all(op in message for op in ops)
    assert f" --certify {certificates.user_file()}" in message and "dsv3 kernels check --provider " in message


def test_another_torch_is_refused(certified, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.12.0+cu130")
    every_operation = replace(IN_SLICES, profile=replace(IN_SLICES.profile, attention="two_form"))
    message = why_not(every_operation)
    assert "torch is 2.12.0+cu130, with 2.11.0+cu130 it was compared" in message
    assert all(op.training or op.name in message for op in operations().values())


def test_a_model_without_slices_needs_no_certificate_of_them(certified):
    left = [found for found in certificates.read(certified) if not found.subject.operation.startswith("sliced_")]
    strict(IN_SLICES)
    certified.unlink()
    certificates.write(certified, left)
    strict()
    assert re.search(r": sliced_linear, sliced_fp8_linear \(.*triton 0\.1\.0: has no certificate", why_not(IN_SLICES))


def test_a_server_needs_no_certificate_of_the_backward_pass_and_a_trainer_does(certified):
    served = [c for c in certificates.read(certified) if not operations()[c.subject.operation].training]
    kernels = provider.dsv3_kernels()
    with_training(strict(), kernels)
    certified.unlink()
    certificates.write(certified, served)
    with pytest.raises(KernelError, match=r": combine_gradient, .*_gradient \(.*nowhere\); fp8_wgrad \("):
        with_training(strict(), kernels)


def test_another_deep_gemm_leaves_its_products_to_ours(certified, h200):
    h200["sgl-deep-gemm"] = "0.2.0"
    ops = strict()
    assert serving(ops)["linear"] == "triton 0.1.0"
    (choice,) = [choice for choice in ops.provenance if choice.op == "linear"]
    assert any("sgl-deep-gemm is 0.2.0, with 0.1.5.post1 it was compared" in refused for refused in choice.refused)


def test_a_kernel_serves_only_if_all_that_it_may_hand_to_is_certified(certified):
    """DeepGEMM's own product has its certificate; where it hands over to this package's kernel, that one has none."""
    left = [found for found in certificates.read(certified) if found.subject.implementation != "triton.linear"]
    certified.unlink()
    certificates.write(certified, left)
    message = why_not()
    assert (
        "deep-gemm 0.1.5.post1: has no certificate, which strict mode needs: triton.linear: it was compared" in message
    )


def test_another_card_is_refused_until_its_user_certifies(certified, monkeypatch, tmp_path):
    monkeypatch.setattr(certificates, "card_of", lambda device_type: ("NVIDIA H100 80GB HBM3", "9.0"))
    assert "this is NVIDIA H100 80GB HBM3 (9.0), on NVIDIA H200 (9.0) it was compared" in why_not()
    mine = tmp_path / "mine.json"
    certificates.write(mine, all_certificates())  # what `check --certify` writes after equal cases
    monkeypatch.setenv(certificates.FILE_VARIABLE, str(mine))
    assert serving(strict())["mla_attention"] == "cuda 0.1.0 (cuda.mla_hopper)"
    # Both machines' certificates fit into one file.
    certificates.write(certified, certificates.read(mine))
    monkeypatch.delenv(certificates.FILE_VARIABLE)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "nothing here"))
    assert serving(strict())["rope"] == "triton 0.1.0"


@pytest.mark.parametrize("missing", [1, 32, 64])
def test_attention_needs_the_pages_that_are_served(certified, missing):
    def without_pages(found: Certificate) -> Certificate:
        pages = tuple(size for size in found.page_sizes if size != missing)
        return found.model_copy(update={"page_sizes": pages})

    certificates.write(certified, [without_pages(found) for found in certificates.read(certified)])
    assert f"it was not compared with pages of {missing} keys" in why_not()


# What cannot run is refused when a model is built.


def test_without_cuda_bindings_the_model_is_refused(certified, monkeypatch):
    strict()
    monkeypatch.undo()
    compiler.missing.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda", None)
    try:
        found = provider.v3_attention().is_supported(HOPPER)
        assert found.reason == "the package cuda-bindings is not installed: pip install cuda-bindings"
        assert [part.name for part in own.parts(fp8_linear)] == ["triton.fp8_gluon", "triton.fp8_linear"]
        with pytest.raises(KernelError, match=r"cuda 0\.1\.0: the package cuda-bindings is not installed"):
            bind(HOPPER, "fast", [kernel for kernel in provider.dsv3_kernels() if kernel.provider == "cuda"])
    finally:
        compiler.missing.cache_clear()


def test_a_compiler_that_does_not_load_is_named(monkeypatch):
    def no_library() -> tuple[int, int]:
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(compiler, "_nvrtc_version", no_library)
    compiler.missing.cache_clear()
    try:
        assert "NVRTC, the compiler of CUDA C++, does not load (Failed to dlopen" in str(compiler.missing())
        assert "pip install nvidia-cuda-nvrtc" in str(compiler.missing())
    finally:
        compiler.missing.cache_clear()


def test_triton_and_its_compiler_are_asked_for(monkeypatch):
    monkeypatch.setattr(own.importlib.util, "find_spec", lambda name: None)
    assert own.missing() == "Triton is not installed: pip install triton"
    monkeypatch.setattr(own.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(own.shutil, "which", lambda name: None)
    assert "Triton finds no C compiler" in str(own.missing())
    monkeypatch.setenv("CC", "clang-20")
    assert own.missing() is None


# What a digest is of.


def subjects() -> dict[tuple[str, str], str]:
    """The digests of all implementations."""
    return {(c.subject.operation, c.subject.implementation): c.subject.digest for c in all_certificates()}


# The inner one first, which an installed package has inside of the other.
PACKAGES = {"dsv3_plugin.kernels": Path(provider.__file__).parent, "dsv3_plugin": Path(dsv3_plugin.__file__).parent}


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """This package's code once more, to be changed."""
    folder = tmp_path_factory.mktemp("code")
    for name, package in PACKAGES.items():
        shutil.copytree(package, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.svg", "presets"))
    return folder


@pytest.fixture
def edited(h200, monkeypatch, copies):
    """A function that changes a file of the copy, which stands for this package's code."""
    file_of, as_it_was = sources.file_of, {}

    def of_copy(module: str) -> Path | None:
        file = file_of(module)
        for name, package in PACKAGES.items():
            if file is not None and file.is_relative_to(package):
                return copies / name / file.relative_to(package)
        return file

    def edit(file: str, old: str, new: str) -> None:
        package = "dsv3_plugin.kernels" if file.startswith("kernels/") else "dsv3_plugin"
        path = copies / package / file.removeprefix("kernels/")
        text = path.read_text()
        assert old in text
        as_it_was.setdefault(path, text)
        path.write_text(text.replace(old, new, 1))

    monkeypatch.setattr(sources, "file_of", of_copy)
    yield edit
    for path, text in as_it_was.items():
        path.write_text(text)


MATH = {"triton.router", "triton.silu_and_mul"}
# Attention has no quotient by a guess.
ATTENTION = {"triton.mla_attention", "triton.head_attention", "cuda.mla_hopper", "cuda.head_hopper"}
PRODUCTS = {
    "triton.linear",
    "triton.sliced_linear",
    "triton.absorb",
    "triton.router",
    *ATTENTION,
    "deep_gemm.bf16_gemm_nt",
}
PRODUCTS |= {"cuda.fp8_gemm", "triton.fp8_gluon", "triton.fp8_linear", "triton.fp8_wgrad", "deep_gemm.fp8_gemm_nt"}
PRODUCTS |= {"deep_gemm.m_grouped_fp8_gemm_nt_contiguous", "transformer_engine.general_gemm"}
EDITS = {
    # A kernel's own constants and code.
    "kernels/cuda/mla_hopper.py": ("NEAR = 2", "NEAR = 1", {"cuda.mla_hopper", "cuda.head_hopper"}),
    "kernels/cuda/head_hopper.py": ("_ROWS = 128", "_ROWS = 64", {"cuda.head_hopper"}),
    "kernels/triton/mla_attention.py": ("_ROWS = 64", "_ROWS = 128", {"triton.mla_attention"}),
    "kernels/mla_inputs.py": ("scale)\n", "scale + 1)\n", {"triton.mla_attention", "cuda.mla_hopper"}),
    "kernels/triton/rope.py": ("_HEADS = 16", "_HEADS = 8", {"triton.rope"}),
    "kernels/cuda/compiler.py": (
        '= "sm_90a"',
        '= "sm_90b"',
        {"cuda.mla_hopper", "cuda.head_hopper", "cuda.fp8_gemm"},
    ),
    "kernels/triton/fp8_gluon.py": ("_HALF = gl.constexpr(64)", "_HALF = gl.constexpr(32)", {"triton.fp8_gluon"}),
    "kernels/triton/elementary.py": (
        "rcp.approx.ftz.f32",
        "rcp.approx.f32",
        MATH | {"triton.quantize", "triton.linear", "triton.rms_norm", "triton.fp8_wgrad", "triton.fp8_weight"},
    ),
    "kernels/vendors/deep_gemm.py": ("columns % 8", "columns % 16", {"deep_gemm.bf16_gemm_nt"}),
    # Contracts' constants.
    "ops/mla_attention.py": ("SPLIT_KEYS = 1024", "SPLIT_KEYS = 512", {"triton.mla_attention", "cuda.mla_hopper"}),
    "ops/router.py": ("K_CHUNK = ", "K_CHUNK = 2 * ", {"triton.router"}),
    "ops/tile.py": ("ROWS = 64", "ROWS = 32", PRODUCTS),
    "ops/elementary.py": (
        "0.001326472731307149",
        "0.001326472731307150",
        MATH | ATTENTION,
    ),
}


# Each file of CUDA C++ belongs to the kernel whose name it begins with, hopper.cuh to all; attention by heads has
# exponentials and units of the other; peer memory's are of no operation.
CUDA = {"mla": {"cuda.mla_hopper"}, "head": {"cuda.head_hopper"}, "fp8": {"cuda.fp8_gemm"}}
CUDA |= {"mla_exp2": CUDA["mla"] | CUDA["head"], "mla_units": CUDA["mla"] | CUDA["head"]}
CUDA |= {"hopper": CUDA["mla"] | CUDA["head"] | CUDA["fp8"], "peer": set(), "peers": set()}
EDITS |= {
    f"kernels/cuda/{file.name}": ("{", "{ ;", CUDA.get(file.stem) or CUDA[file.stem.partition("_")[0]])
    for file in sorted(Path(compiler.__file__).parent.glob("*.cu*"))
}


@pytest.mark.parametrize("file", EDITS)
def test_a_change_of_anything_that_a_kernel_is_made_of_ends_its_certificate(edited, file):
    old, new, affected = EDITS[file]
    before = subjects()
    edited(file, old, new)
    after = subjects()
    assert {implementation for (_, implementation), digest in after.items() if digest != before[_, implementation]} == (
        affected
    )


def test_strict_mode_refuses_what_has_changed_since(certified, edited):
    strict()
    edited("ops/mla_attention.py", "MAXIMUM_STEP = 8", "MAXIMUM_STEP = 4")
    message = why_not()
    assert "cuda 0.1.0: has no certificate, which strict mode needs: its sources or its contract's constants" in message
    assert "rope" not in message.split("To certify")[0], "whose certificate holds"


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernels/triton/mla_attention.py", '"""', '"""Another docstring. '),
        ("kernels/triton/mla_attention.py", "import torch\n", "import torch\n\n# Another comment.\n"),
        ("kernels/cuda/mla_units.cuh", "{\n", "{\n// Another comment.\n"),
        ("kernels/certify/processes.py", "SHARE = 32", "SHARE = 16"),
        ("kernels/cuda/compiler.py", "pip install cuda-bindings", "pip install cuda-python"),
        ("ops/checks.py", "expected two", "wanted two"),
        # Of a declaration all but what the reference computes.
        ("ops/rope.py", 'summary="interleaved', 'summary="Interleaved'),
        ("ops/rope.py", "cos, -sin", "cos, sin"),
        ("ops/rope.py", "generator(rng)) * 7", "generator(rng)) * 8"),
        ("ops/mla_attention.py", "page_sizes=(1, 32, 64)", "page_sizes=(1, 64)"),
        ("ops/drawing.py", "MOST_PRODUCTS = 1 << 25", "MOST_PRODUCTS = 1 << 24"),
        ("ops/operation.py", "functools.update_wrapper", "_ = functools.update_wrapper"),
        ("kernels/triton/rope.py", "@implements(contracts.rope)\n", ""),
        ("ops/paged_batch.py", "expected a positive number", "not above zero"),
        ("config.py", "class DeepseekV3Config", "X = 1\n\n\nclass DeepseekV3Config"),
    ],
)
def test_words_checks_and_other_code_leave_them(edited, file, old, new):
    before = subjects()
    edited(file, old, new)
    assert subjects() == before


@pytest.mark.parametrize(
    ("change", "affected"),
    [
        ({"tile_config": {"tile_rows": 64, "tokens": 16}}, {("fp8_linear", "cuda.fp8_gemm")}),
        ({"microseconds": {"cuda": 0.5}}, set()),
    ],
    ids=["another tile configuration", "another time"],
)
def test_another_tile_configuration_in_the_table_ends_the_certificate_of_its_products(
    h200, monkeypatch, change, affected
):
    before, table = subjects(), selection.table()
    at = next(i for i, row in enumerate(table.rows) if row.tile_config and not row.groups)
    rows = (*table.rows[:at], table.rows[at].model_copy(update=change), *table.rows[at:])
    monkeypatch.setattr(selection, "table", lambda: table.model_copy(update={"rows": rows}))
    selection.configs_to_check.cache_clear()
    try:
        assert {name for name, digest in subjects().items() if digest != before[name]} == affected
    finally:
        selection.configs_to_check.cache_clear()


# Earning them.


def result(op: str, provider_name: str, name: str, **more) -> Result:
    plain = {"cases": 1000, "outputs": 100, "dtypes": frozenset({"bfloat16"})}
    return Result(op, provider_name, name, **plain | more)


def test_an_implementation_earns_one_when_all_its_cases_are_equal(certified):
    where = Where()
    targets = [Target(kernel, part) for kernel in provider.dsv3_kernels() for part in kernel.parts]
    pages = frozenset({1, 32, 64})
    findings = [
        result("fp8_linear", "triton", "cuda.fp8_gemm"),
        result("fp8_linear", "triton", "triton.fp8_gluon", cases=300, refused_cases=700),
        result("fp8_linear", "triton", "triton.fp8_linear", cases=99),  # too few
        result("fp8_linear", "cublas", "fp8_linear"),  # another's, which claims nothing
        result("fp8_linear", sm90_model.PROVIDER, MODEL_ON_CPU, cases=63),
        result("mla_attention", "cuda", "cuda.mla_hopper", page_sizes=pages),
        result("mla_attention", "cuda", "cuda.mla_hopper", full_card=True, cases=150),
        result(
            "mla_attention", "triton", "triton.mla_attention", page_sizes=frozenset({32, 64})
        ),  # never a page of one key
        result("rope", "triton", "triton.rope", wrong_cases=1),
        result("combine", "triton", "triton.combine"),
        result(
            "combine", sm90_model.PROVIDER, MODEL_ON_CPU, cases=63, wrong_cases=1
        ),  # a CPU contradicts what was expected
        result("permute", "triton", "triton.permute"),
        Broken("permute", "all", "all", "the process died"),
        result("linear", "triton", "triton.linear"),
        Broken("linear", "deep-gemm", "deep_gemm.bf16_gemm_nt", "no such symbol"),
    ]
    earned = earn.earned(targets, findings, 7, where)
    counts = {c.subject.implementation: (c.seed, c.cases, c.refused_cases, c.cases_on_cpu) for c in earned}
    assert counts == {
        "cuda.fp8_gemm": (7, 1000, 0, 63),
        "triton.fp8_gluon": (7, 300, 700, 63),
        "cuda.mla_hopper": (7, 1000, 0, 1000),
        "triton.linear": (7, 1000, 0, 1000),
    }
    (attention,) = [c for c in earned if c.subject.operation == "mla_attention"]
    assert attention.page_sizes == (1, 32, 64)
    assert attention.subject == next(
        c.subject for c in certificates.read(certified) if c.subject.implementation == "cuda.mla_hopper"
    )


def test_a_file_keeps_the_certificates_of_other_code_and_machines(certified, tmp_path):
    file = tmp_path / "certificates.json"
    rope, linear = (next(c for c in all_certificates() if c.subject.operation == op) for op in ("rope", "linear"))
    elsewhere = rope.model_copy(update={"subject": rope.subject.model_copy(update={"card": "another card"})})
    certificates.write(file, [rope, linear])
    certificates.write(file, [elsewhere, rope.model_copy(update={"cases": 2000})])
    assert sorted((c.subject.operation, c.subject.card, c.cases) for c in certificates.read(file)) == [
        ("linear", "NVIDIA H200", 1000),
        ("rope", "NVIDIA H200", 2000),
        ("rope", "another card", 1000),
    ]


def test_a_run_that_ends_early_leaves_the_certificates_of_what_ended(certified, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "this_machine", lambda: DeviceName.hopper)
    monkeypatch.setattr(targets, "offered_kernels", provider.dsv3_kernels)

    def stopped(work, shares):
        for share in shares:
            if share.op == "combine":
                raise KeyboardInterrupt
            yield share, [result(share.op, "triton", share.op, cases=32)]

    monkeypatch.setattr(check, "in_processes", stopped)
    path = tmp_path / "early.json"
    with pytest.raises(KeyboardInterrupt):
        check.main(cases=128, op=["rope", "combine"], certify=path)
    with pytest.raises(KernelError, match="a certificate is given for 100 cases or more, not for 20"):
        check.main(cases=20, certify=path)


def test_a_file_that_cannot_be_written_is_refused_before_the_cases(certified, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "this_machine", lambda: DeviceName.hopper)
    monkeypatch.setattr(targets, "offered_kernels", provider.dsv3_kernels)
    monkeypatch.setattr(check, "in_processes", lambda work, shares: pytest.fail("cases were run"))
    (tmp_path / "a file").touch()
    for path in (tmp_path / "a file" / "c.json", Path("/proc/no folder/c.json")):
        with pytest.raises(KernelError, match=f"^{path} cannot be written: "):
            check.main(cases=128, op=["rope"], certify=path)


def test_a_full_disk_leaves_the_file_as_it_was(certified, monkeypatch):
    before, path = certified.read_bytes(), Path
    write = path.write_bytes

    def half(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(path, "write_bytes", half)
    with pytest.raises(KernelError, match=f"^{certified} cannot be written: No space left on device$"):
        certificates.write(certified, all_certificates())
    assert certified.read_bytes() == before and not list(certified.parent.glob("*.part"))


def test_a_kernel_that_can_get_no_certificate_is_refused_before_the_cases(certified, monkeypatch, tmp_path):
    monkeypatch.setattr(check, "this_machine", lambda: DeviceName.hopper)
    (kernel,) = [kernel for kernel in provider.dsv3_kernels() if (kernel.op, kernel.provider) == ("rope", "triton")]
    stateful = replace(kernel, provider="lab", implementations=(), run=lambda *args: kernel.run(*args))
    monkeypatch.setattr(targets, "offered_kernels", lambda: [stateful])
    monkeypatch.setattr(check, "in_processes", lambda work, shares: pytest.fail("cases were run"))
    with pytest.raises(KernelError, match=r"^lab's rope can get no certificate: .*<lambda> is more than a top-level"):
        check.main(cases=128, certify=tmp_path / "c.json")


def test_few_lines_of_another_package_are_followed(tmp_path, monkeypatch):
    """A provider's own modules, relative imports, classes, module statements and files count; other packages do not."""
    package = tmp_path / "lab_of_digests"
    package.mkdir()
    files = {
        "__init__.py": "from .kernel import run\n",
        "kernel.py": (
            "import math\nfrom . import tables as t\nfrom .sums import Sum\nmath.tau\n\n\n"
            "def run(x):\n    return Sum(t.FACTOR).of(x, 'add.cu')\n\n\ndef unused():\n    return 1\n"
        ),
        "tables.py": "FACTOR, OTHER = 2, 3\nUNUSED = 4\n",
        "sums.py": "class Sum:\n    def of(self, x, file):\n        return x\n",
        "add.cu": '#include "more.cuh"\n',
        "more.cuh": "int x;\n",
    }
    for name, text in files.items():
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = sources.collect(["lab_of_digests:run"])
    module = "lab_of_digests"
    assert set(found) >= {
        f"{module}.kernel:run",
        f"{module}.kernel:#0",
        f"{module}.kernel/add.cu",
        f"{module}.kernel/more.cuh",
        f"{module}.tables:FACTOR",
        f"{module}.sums:Sum",
    }
    assert not any(name.endswith((":unused", ":UNUSED")) or name.startswith("math") for name in found)
    # What is not followed is named, so that its version stands beside the digest.
    assert sources.libraries([f"{module}:run"]) == []
    kernel = package / "kernel.py"
    kernel.write_text("import pluggy as p, yaml\n" + kernel.read_text().replace("'add.cu'", "p.HookspecMarker"))
    assert sources.libraries([f"{module}:run"]) == ["pluggy"]
