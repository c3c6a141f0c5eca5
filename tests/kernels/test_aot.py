"""The GPU kernels, compiled without a GPU: which instructions they are made of."""

from __future__ import annotations

import re

import pytest

for compiler in ("triton", "cuda.bindings"):
    pytest.importorskip(compiler, reason=f"{compiler} is not installed: `make test` runs this in .envs/kernels")

from aot import CUDA_SOURCES, SOURCES, Compiled, compile_cuda, compile_kernel  # noqa: E402

# No step of these is a fused multiply-add; the exponential's and the quotients' are.
ROUNDS_PRODUCT_AND_SUM = {"rms_norm", "add_rms_norm", "rope", "combine", "quantize ue8m0"}
# The attention kernel for any latent holds two outputs of 64 rows; V3's latent has a kernel of its own, which parks a
# few addresses outside the loop over keys.
SPILLS_ALLOWED = {"mla": 1 << 16, "mla hopper": 16}


@pytest.mark.parametrize("name", SOURCES)
def test_instructions(name, tmp_path):
    ptx, spilled = compile_kernel(SOURCES[name], tmp_path)
    print(name, spilled, "bytes spilled")
    assert spilled <= SPILLS_ALLOWED.get(name, 0)
    check_order(ptx)
    if "fp8" in name and "quantize" not in name:
        check_fp8(ptx)
    if name == "mla":
        assert "wgmma.mma_async.sync.aligned" in ptx
    if SOURCES[name].options.get("enable_fp_fusion") is False:
        assert "ex2.approx" not in ptx
        assert ("fma.rn" in ptx) != (name in ROUNDS_PRODUCT_AND_SUM), "an instruction that the source does not have"


def check_order(ptx: str) -> None:
    assert not re.search(r"\b(atom|red)\.", ptx), "an atomic operation has no order"


def check_fp8(ptx: str) -> None:
    assert "wgmma.mma_async.sync.aligned" in ptx
    assert "mma.sync" not in ptx.replace("wgmma.mma_async.sync", ""), "mma.sync has other fp8 sums"
    assert "fma.rn.f32" in ptx, "the contract folds raw sums in one rounding"


@pytest.mark.parametrize("name", CUDA_SOURCES)
def test_cuda_instructions(name):
    compiled: Compiled = compile_cuda(CUDA_SOURCES[name])
    print(name, compiled.spilled_bytes, "bytes spilled")
    assert compiled.spilled_bytes <= SPILLS_ALLOWED.get(name, 0)
    check_order(compiled.ptx)
    check_fp8(compiled.ptx)
    assert "ex2.approx" not in compiled.ptx and "div.full" not in compiled.ptx


def test_few_fp8_rows_on_the_first_side_would_be_seen(tmp_path):
    """The gate's twin: the tile that the kernels avoid compiles to the instruction that it looks for."""
    source = SOURCES["fp8 many rows"]
    source = source._replace(constants=source.constants | {"ROWS": 16}, options={"num_warps": 4, "num_stages": 4})
    ptx, _ = compile_kernel(source, tmp_path)
    assert "mma.sync.aligned.m16n8k16" in ptx
