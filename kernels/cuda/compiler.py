"""CUDA C++ kernels: compiled for sm_90a when first needed, by the compiler that every CUDA build of torch brings.

NVRTC makes machine code, which is kept in a cache folder under a name that is made of all that went in; the driver
loads and launches it. Neither a GPU nor a CUDA toolkit is needed to compile.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import versions_of
from dsv3_plugin.kernels.installed import version_of

_FOLDER = Path(__file__).parent
_ARCHITECTURE = "sm_90a"
CACHE_VARIABLE = "DSV3_PLUGIN_CACHE"


class Program(NamedTuple):
    """A source file of this folder, its compile-time parameters, and the widths N of its `wgmma` instructions."""

    file: str
    parameters: tuple[tuple[str, int | float], ...]
    widths: tuple[int, ...]


def wgmma(width: int) -> str:
    """The `wgmma` instruction of 64 x `width` fp8 products, 32 deep, as a function of an array of sums.

    Inline assembly takes registers one by one, so a function's text is written for each width.
    """
    count = width // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void wgmma(float (&d)[{count}], u64 a, u64 b, int add) {{\n"
        f'    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{width}k32.f32.e4m3.e4m3 {{{registers}}}, %{count},'
        f' %{count + 1}, p, 1, 1;\\n}}\\n"\n'
        f'        : {operands} : "l"(a), "l"(b), "r"(add));\n'
        f"}}\n"
    )


@functools.cache
def missing() -> str | None:
    """What CUDA C++ kernels lack on this machine, and what to install; None if nothing. Imports the bindings."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "the package cuda-bindings is not installed: pip install cuda-bindings"
    try:
        _nvrtc_version()
    except Exception as error:  # the bindings raise what the loader of the system raises
        return f"NVRTC, the compiler of CUDA C++, does not load ({error}): pip install nvidia-cuda-nvrtc"
    return None


def available() -> bool:
    """Whether nothing is `missing`."""
    return missing() is None


def versions() -> dict[str, str]:
    """Of what makes machine code of CUDA C++."""
    found = versions_of("cuda-bindings")()
    if available():
        names = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13", "nvidia-cuda-nvrtc-cu12")
        found["nvrtc"] = version_of(*names) or ".".join(map(str, _nvrtc_version()))
    return found


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc  # type: ignore[import-not-found]
    except ImportError as error:
        raise KernelError(f"CUDA C++ kernels need the package cuda-bindings: {error}") from error
    return nvrtc


def _nvrtc_version() -> tuple[int, int]:
    _, major, minor = _nvrtc().nvrtcVersion()
    return major, minor


def _checked(result: tuple[Any, ...], what: str) -> Any:
    if int(result[0]) != 0:
        raise KernelError(f"CUDA refused {what}: {result[0].name}")
    return result[1] if len(result) > 1 else None


class Built(NamedTuple):
    """What the compiler makes of a program: machine code, the assembly before it, and what the assembler said."""

    cubin: bytes
    ptx: str
    log: str


def compile_program(program: Program) -> bytes:
    """Machine code for sm_90a, from the cache folder if it is there. Raises `KernelError` with the compiler's words."""
    file = cache_folder() / f"{Path(program.file).stem}-{_key(program)}.cubin"
    if file.is_file():
        return file.read_bytes()
    cubin = build(program).cubin
    # Written under another name first: processes may compile at once, and one may be stopped.
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_bytes(cubin)
    part.replace(file)
    return cubin


def cache_folder() -> Path:
    """`DSV3_PLUGIN_CACHE`, else `dsv3-plugin` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3-plugin"


def _sources(program: Program) -> dict[str, str]:
    return {
        program.file: (_FOLDER / program.file).read_text(),
        **{header.name: header.read_text() for header in sorted(_FOLDER.glob("*.cuh"))},
        "wgmma.cuh": "#pragma once\n" + "".join(wgmma(width) for width in program.widths),
    }


def _options(program: Program) -> list[str]:
    return [
        f"-arch={_ARCHITECTURE}",
        "-std=c++17",
        "--ptxas-options=-v",
        *(f"-D{name}={value}" for name, value in program.parameters),
    ]


def _key(program: Program) -> str:
    everything = _sources(program), _options(program), _nvrtc().nvrtcVersion()[1:]
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:32]


def build(program: Program) -> Built:
    """Compile. Raises `KernelError` with the compiler's words."""
    nvrtc = _nvrtc()
    sources, options = _sources(program), _options(program)
    texts, names = zip(*((text.encode(), name.encode()) for name, text in sources.items()), strict=True)
    handle = _checked(
        nvrtc.nvrtcCreateProgram(texts[0], names[0], len(names) - 1, list(texts[1:]), list(names[1:])), "the source"
    )
    try:
        (error,) = nvrtc.nvrtcCompileProgram(handle, len(options), [option.encode() for option in options])
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(handle), "the log"))
        nvrtc.nvrtcGetProgramLog(handle, log)
        said = log.decode().rstrip("\0")
        if int(error) != 0:
            raise KernelError(f"NVRTC cannot compile {program.file} ({' '.join(options)}):\n{said}")
        cubin = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(handle), "the machine code"))
        ptx = bytearray(_checked(nvrtc.nvrtcGetPTXSize(handle), "the assembly"))
        _checked(nvrtc.nvrtcGetCUBIN(handle, cubin), "the machine code")
        _checked(nvrtc.nvrtcGetPTX(handle, ptx), "the assembly")
    finally:
        nvrtc.nvrtcDestroyProgram(handle)
    return Built(bytes(cubin), ptx.decode().rstrip("\0"), said)


def shared_bytes_each(blocks: int) -> int:
    """Of shared memory, what each of so many CTAs of one multiprocessor may take."""
    return 228 * 1024 // blocks - 1024


SHARED_BYTES = shared_bytes_each(1)
"""Of shared memory, what one CTA may take."""


class Launch(NamedTuple):
    """CTAs, threads of each, bytes of shared memory of each.

    `pdl`: programmatic dependent launch. CTAs may come to the card before the kernel before them has ended, for which
    they wait themselves (griddepcontrol.wait).
    """

    grid: int
    block: int
    shared_bytes: int
    pdl: bool = False


def _driver() -> Any:
    from cuda.bindings import driver  # type: ignore[import-not-found]

    return driver


@functools.cache
def function(program: Program, name: str, device: int) -> Any:
    """The driver's handle of kernel `name` on a device, allowed as much shared memory as `SHARED_BYTES`."""
    driver = _driver()
    code = compile_program(program)
    with torch.cuda.device(device):
        module = _checked(driver.cuModuleLoadData(code), f"the machine code of {program.file}")
        handle = _checked(driver.cuModuleGetFunction(module, name.encode()), name)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(handle, attribute, SHARED_BYTES), f"{SHARED_BYTES} bytes of shared memory")
    return handle


def launch(program: Program, name: str, how: Launch, arguments: Sequence[Any]) -> None:
    """Run kernel `name` on torch's current stream.

    Arguments are tensors, None for a null pointer, 32-bit integers, and tensor maps or other structures with `getPtr`.
    Raises `KernelError` with the driver's word.
    """
    driver = _driver()
    handle = function(program, name, torch.cuda.current_device())
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = how.grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = how.block, 1, 1
    config.sharedMemBytes = how.shared_bytes
    config.hStream = torch.cuda.current_stream().cuda_stream
    if how.pdl:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    values: list[Any] = []
    types: list[Any] = []
    for argument in arguments:
        if argument is None or isinstance(argument, torch.Tensor):
            values.append(0 if argument is None else argument.data_ptr())
            types.append(ctypes.c_void_p)
        elif isinstance(argument, int):
            values.append(argument)
            types.append(ctypes.c_int)
        else:
            values.append(argument)
            types.append(None)
    _checked(driver.cuLaunchKernelEx(config, handle, (tuple(values), tuple(types)), 0), f"to launch {name}")


@functools.lru_cache(maxsize=4096)
def tensor_map(
    kind: str, address: int, size: tuple[int, ...], stride_bytes: tuple[int, ...], box: tuple[int, ...]
) -> Any:
    """How TMA copies boxes of a tensor: sizes from the inner dimension, strides of all but that.

    `e4m3` and `bf16` boxes have 128 bytes inside and lie swizzled in shared memory, as the tensor core reads them;
    `fp32` boxes begin at a multiple of four numbers. A box may reach beyond the tensor: it is filled with zeros there.
    """
    driver = _driver()
    types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    data_type, swizzle = {
        "e4m3": (types.CU_TENSOR_MAP_DATA_TYPE_UINT8, swizzles.CU_TENSOR_MAP_SWIZZLE_128B),
        "bf16": (types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, swizzles.CU_TENSOR_MAP_SWIZZLE_128B),
        "fp32": (types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32, swizzles.CU_TENSOR_MAP_SWIZZLE_NONE),
    }[kind]
    return _checked(
        driver.cuTensorMapEncodeTiled(
            data_type,
            len(size),
            address,
            [driver.cuuint64_t(n) for n in size],
            [driver.cuuint64_t(n) for n in stride_bytes],
            [driver.cuuint32_t(n) for n in box],
            [driver.cuuint32_t(1)] * len(size),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"a tensor of {size} with boxes of {box}",
    )
