"""The GPU kernels, compiled without a GPU: which instructions they are made of."""

from __future__ import annotations

import re
import shutil

import pytest

for compiler in ("triton", "cuda.bindings"):
    pytest.importorskip(compiler, reason=f"{compiler} is not installed: `make test` runs this in .envs/kernels")

from aot import CUDA_SOURCES, SOURCES, Compiled, compile_cuda, compile_kernel  # noqa: E402

from dsv3_plugin.kernels.cuda import compiler, fp8_gemm, peers  # noqa: E402

# No step of these is a fused multiply-add; the exponential's and the quotients' are.
ROUNDS_PRODUCT_AND_SUM = {
    "rms_norm",
    "add_rms_norm",
    "rope",
    "absorb",
    "absorb, many tokens",
    "combine",
    "combine, gradient",
    "rms_norm, gradient",
    "rms_norm, gradient of a chunk",
    "rms_norm, gradient of the weight",
    "quantize ue8m0",
    "quantize weight",
    "quantize weight, transposed",
    "quantize columns",
    "quantize columns again",
    "quantize columns again float32",
}
ROUNDS_PRODUCT_AND_SUM |= {"model of bf16 products", "model of e4m3 products"}
# The attention kernel for any latent holds two outputs of 64 rows; V3's latent has a kernel of its own, which parks a
# few addresses outside the loop over keys, as that of the heads does.
SPILLS_ALLOWED = {"mla": 1 << 16, "mla hopper": 24, "head attention": 28}


@pytest.mark.parametrize("name", SOURCES)
def test_instructions(name, tmp_path):
    ptx, spilled, _ = compile_kernel(SOURCES[name], tmp_path)
    print(name, spilled, "bytes spilled")
    assert spilled <= SPILLS_ALLOWED.get(name, 0)
    check_order(ptx)
    if "fp8" in name and "quantize" not in name:
        check_fp8(ptx)
    if name in ("mla", "head attention"):
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
    # Attention computes what it could round otherwise again.
    assert ("ex2.approx" in compiled.ptx) == (name in ("mla hopper", "head hopper"))
    # The assembler lets products run one after the other where it is not sure of their registers.
    assert "are serialized" not in compiled.said
    assert "div.full" not in compiled.ptx


def stages_are_given_back_after_their_reads(ptx: str) -> bool:
    """Arriving at a barrier does not wait for loads of a stage's scales, which the next copy could overtake: a fence
    does, or a look at the numbers (`have_arrived`). The emulation cannot show it.
    """
    before_each_arrival = re.split(r"mbarrier\.arrive\.shared::\w+\.b64", ptx)[:-1]
    assert before_each_arrival
    waits = rf"fence\.acq_rel\.cta|setp\.\w+\.\w+\s.*, {0x7FC00001};"
    return all(re.search(waits, text) for text in before_each_arrival)


@pytest.mark.parametrize("config", [c for c in fp8_gemm.DENSE_SAMPLE if c.k_groups == 1], ids=str)
def test_stages_are_given_back_after_their_reads(config):
    assert stages_are_given_back_after_their_reads(compile_cuda(config.filled().program()).ptx)


def test_a_stage_given_back_too_early_would_be_seen(tmp_path, monkeypatch):
    for file in (*compiler._FOLDER.glob("*.cu"), *compiler._FOLDER.glob("*.cuh")):
        shutil.copy(file, tmp_path)
    sources = {file: file.read_text() for file in tmp_path.glob("fp8_*.cu*")}
    for wait, count, without in (("finish_reads();\n", 5, ";\n"), ("read && have_arrived(", 1, "first_of(")):
        assert sum(text.count(wait) for text in sources.values()) == count, wait
        sources = {file: text.replace(wait, without) for file, text in sources.items()}
    anything = "__device__ bool first_of(float, float) { return true; }\nstruct Tile {"
    for file, text in sources.items():
        file.write_text(text.replace("struct Tile {", anything))
    monkeypatch.setattr(compiler, "_FOLDER", tmp_path)
    for buffers in (1, 4):
        config = next(c for c in fp8_gemm.DENSE_SAMPLE if c.tokens_first and c.buffers == buffers and c.k_groups == 1)
        assert not stages_are_given_back_after_their_reads(compile_cuda(config.filled().program()).ptx), buffers


def test_few_fp8_rows_on_the_first_side_would_be_seen(tmp_path):
    """The gate's twin: the tile that the kernels avoid compiles to the instruction that it looks for."""
    source = SOURCES["fp8 many rows"]
    source = source._replace(constants=source.constants | {"ROWS": 16}, options={"num_warps": 4, "num_stages": 4})
    ptx = compile_kernel(source, tmp_path).ptx
    assert "mma.sync.aligned.m16n8k16" in ptx


@pytest.mark.parametrize("ranks", [2, 8])
def test_peers_instructions(ranks):
    """Flags, and words without, are stored and read at the system's scope, words are of 16 bytes, no sum waits its turn
    at an atomic.
    """
    ptx = compiler.build(peers.program(ranks)).ptx
    check_order(ptx)
    assert "st.release.sys.global.u32" in ptx and "ld.acquire.sys.global.u32" in ptx
    assert "st.global.v4" in ptx and ".shared .align" not in ptx.replace(".extern .shared .align", "")
    # Three kernels add, in each a thread RANKS - 1 times the four numbers of its words of a chunk.
    words = 2 * peers._CHUNK // peers._THREADS + peers._AT_ONCE_WORDS // ranks
    assert len(re.findall(r"add\.rn\.f32", ptx)) == 4 * words * (ranks - 1) and "fma" not in ptx
    assert "multimem" not in ptx
    (at_once,) = re.findall(r"\.entry fold_at_once\(.*?^}", ptx, re.MULTILINE | re.DOTALL)
    for word in "st.relaxed.sys.global.v4.f32", "ld.relaxed.sys.global.v4.f32":
        assert word in at_once
    assert not re.search(r"release|acquire|fence|membar", at_once)
