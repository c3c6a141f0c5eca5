"""Do kernels print the contract's bits? Random cases of every operation against the definition of its arithmetic.

    dsv3 kernels check [--cases 40] [--op fp8_linear] [--provider cublas] [--device hopper] [--seed 0]
                       [--model-device cuda] [--record golden.safetensors] [--certify certificates.json]

Checked are the kernels of every provider that is installed, each of their implementations by itself, as far as they
serve here; without `--provider` those that are meant to be exact. On a Hopper card expected values come from
`sm90_model` on the card, and every 16th case is computed on the CPU as well, which must print the same bits; on a CPU
they come from the reference. Memory that a kernel allocates is filled with NaN first, so that an output nobody wrote is
seen. Each case is computed twice: a kernel may neither change its arguments nor return memory that it returned before.
Exits with status 1 if a bit differs of a kernel that is meant to be exact, or of the model on its two devices. Of
one that is not (it serves in fast mode only) the share of differing outputs and the largest difference are told.
Processes share the cases; one in which a kernel broke is replaced, because it may have broken the card's state for its
process.

`--record` writes small cases and what the GPU printed to a file, for tests on machines without one. `--certify` writes
certificates (`dsv3_plugin.certificates`).
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import queue
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from enum import StrEnum
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file

from dsv3_plugin import certificates
from dsv3_plugin.certificates import FEWEST_CASES, Certificate, Subject
from dsv3_plugin.errors import InputError, KernelError
from dsv3_plugin.hooks import Arithmetic, Implementation, Kernel, Setting
from dsv3_plugin.kernels import provider
from dsv3_plugin.kernels.certify.cases import CASES, LARGE, ON_CPU, SMALL, Case, Sizes, in_fp32
from dsv3_plugin.kernels.hopper import V3_LATENT
from dsv3_plugin.profile import FP8_UE8M0, FP32
from dsv3_plugin.registry import CONTRACTS, definitions, is_a_definition, is_supported, offered_kernels, reference_of

# One case of so many is computed on the CPU too where the model runs on the card.
_ON_CPU_TOO = 16
# Cases of one operation that a process takes at a time.
_SHARE = 32
# Each process holds a context on the card.
_MOST_PROCESSES = 16
_CASES, _CASES_OF_CERTIFICATE = 40, 1000
# What is compiled for every shape or number of requests gets few.
_FEW: dict[str, dict[str, Any]] = {
    "triton.mla_attention": {"requests": (1, 3)},
    "deep_gemm.fp8_gemm_nt": {"depths": (512, 7168), "columns": (64, 192)},
    "deep_gemm.bf16_gemm_nt": {"depths": (512, 7168), "columns": (64, 192)},
    "deep_gemm.m_grouped_fp8_gemm_nt_contiguous": {"depths": (512, 7168), "columns": (64, 192)},
}


class Where(NamedTuple):
    """Which arithmetic is checked, and on which devices."""

    kernels: str = "cuda"
    model: str = "cuda"
    cpu_every: int = _ON_CPU_TOO
    """One case of so many has the model run on the CPU too; none if 0."""
    arithmetic: Arithmetic = "sm90"

    def settings(self, **dims: int) -> list[Setting]:
        """In bf16, with fp8 weights, and on a CPU in fp32 too."""
        capability = (9, 0) if self.kernels == "cuda" else None
        profiles = (FP8_UE8M0, FP32) if self.arithmetic == "cpu" else (FP8_UE8M0,)
        return [Setting(self.kernels, self.arithmetic, profile, capability, dims) for profile in profiles]


class Target(NamedTuple):
    """An implementation to check, and the kernel that hands to it."""

    kernel: Kernel
    part: Implementation

    @property
    def is_meant_exact(self) -> bool:
        """Whether a bit that differs is a fault."""
        return self.kernel.uncertified is None

    @property
    def must_take_all(self) -> bool:
        """Whether it is the whole of one of this package's kernels, which refuse no case."""
        return self.kernel.provider in (provider.PROVIDER, provider.CUDA_PROVIDER) and len(self.kernel.parts) == 1

    def settings(self, where: Where) -> list[Setting]:
        """Those that its kernel serves; attention's with each latent of the cases."""
        latents = [V3_LATENT]
        if self.kernel.op == "mla_attention":
            latents = [dict(zip(V3_LATENT, latent, strict=True)) for latent in LARGE.latents]
        settings = [setting for latent in latents for setting in where.settings(**latent)]
        return [setting for setting in settings if is_supported(self.kernel, setting)]

    def sizes(self, where: Where) -> Sizes:
        """What its cases are drawn from."""
        sizes = (ON_CPU if where.kernels == "cpu" else LARGE)._replace(**_FEW.get(self.part.name, {}))
        if self.kernel.op == "mla_attention":
            served = [tuple(setting.dims[name] for name in V3_LATENT) for setting in self.settings(where)]
            return sizes._replace(latents=tuple(latent for latent in LARGE.latents if latent in served))
        return sizes

    def dtypes(self, where: Where) -> tuple[torch.dtype, ...]:
        """The profiles' dtypes that it serves; its cases are drawn in each by turns."""
        return tuple(dict.fromkeys(setting.profile.dtype for setting in self.settings(where)))


class Device(StrEnum):
    """Where expected values are computed."""

    cuda = "cuda"
    cpu = "cpu"


class DeviceName(StrEnum):
    """Where operations run: `hopper` and its model on a CPU print the same bits, `cpu` others."""

    cpu = "cpu"
    hopper = "hopper"
    hopper_model = "hopper-model"


def this_machine() -> DeviceName:
    """`hopper` where there is such a card."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return DeviceName.hopper if hopper else DeviceName.cpu


def bits_differ(expected: Any, actual: Any) -> int:
    """How many numbers of two results differ in a bit; tensors, or tuples of them, of equal shapes and dtypes."""
    if isinstance(expected, tuple):
        return sum(bits_differ(e, a) for e, a in zip(expected, actual, strict=True))
    assert expected.shape == actual.shape and expected.dtype == actual.dtype, (expected.shape, actual.shape)
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    difference = expected.contiguous().view(as_integer) != actual.to(expected.device).contiguous().view(as_integer)
    return int(difference.sum())


def largest_difference(expected: Any, actual: Any) -> float:
    """How far a number is from the expected one, by the largest expected one of its tensor; infinitely if it is NaN."""
    if isinstance(expected, tuple):
        return max(largest_difference(e, a) for e, a in zip(expected, actual, strict=True))
    wanted = expected.double()
    difference = (wanted - actual.to(wanted.device).double()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return float(difference.max() / wanted.abs().max().clamp_min(torch.finfo().tiny))


def copied(value: Any, device: str) -> Any:
    """A copy of a tensor with its strides on `device`; anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_contiguous() or value.element_size() == 1:
        return value.to(device, copy=True)
    # A view keeps its gaps: the storage moves, not the elements.
    whole = value.as_strided((value.untyped_storage().size() // value.element_size(),), (1,), 0)
    return whole.to(device, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())


class Result(NamedTuple):
    """What checking one kernel showed."""

    op: str
    provider: str
    implementation: str = ""
    cases: int = 0
    outputs: int = 0
    wrong_cases: int = 0
    wrong_outputs: int = 0
    first_wrong: str = ""
    seconds: float = 0.0
    """Of its calls and the comparison, in all processes together."""
    exact: bool = True
    """Whether the kernel is meant to print the contract's bits."""
    refused_cases: int = 0
    """Cases whose shapes the kernel does not take."""
    largest_difference: float = 0.0
    """Of an output from the expected one, by the largest expected one of its case."""
    dtypes: frozenset[str] = frozenset()
    """Profiles' dtypes of its cases."""
    page_sizes: frozenset[int] = frozenset()
    """Keys of a page in its cases."""
    full_card: bool = False
    """Whether the cases are requests of `check_full_card`."""

    @property
    def failed(self) -> bool:
        """Whether bits differ that may not."""
        return self.exact and self.wrong_cases > 0

    @property
    def is_of_model(self) -> bool:
        """Whether the model on the CPU was compared with the model on the card."""
        return self.implementation == _MODEL_ON_CPU

    def and_then(self, other: Result) -> Result:
        """Of both results' cases."""
        return self._replace(
            cases=self.cases + other.cases,
            outputs=self.outputs + other.outputs,
            wrong_cases=self.wrong_cases + other.wrong_cases,
            wrong_outputs=self.wrong_outputs + other.wrong_outputs,
            first_wrong=self.first_wrong or other.first_wrong,
            seconds=self.seconds + other.seconds,
            refused_cases=self.refused_cases + other.refused_cases,
            largest_difference=max(self.largest_difference, other.largest_difference),
            dtypes=self.dtypes | other.dtypes,
            page_sizes=self.page_sizes | other.page_sizes,
        )

    def __str__(self) -> str:
        """One line for a terminal."""
        if not self.wrong_cases:
            verdict = "equal" if self.cases else "-"
        elif self.exact:
            verdict = f"{self.wrong_cases} cases differ; {self.first_wrong}"
        else:
            verdict = (
                f"no certificate: {self.wrong_cases} cases and {self.wrong_outputs / self.outputs:.4%} of the outputs"
                f" differ, by {self.largest_difference:.1e} of a case's largest at the most; {self.first_wrong}"
            )
        refused = f", {self.refused_cases} refused" if self.refused_cases else ""
        who = _who(self.op, self.provider, self.implementation) + ", full" * self.full_card
        count = f"{self.cases:5} cases{refused} {self.outputs:14,} outputs"
        return f"{self.op:20} {who:22} {count} {self.seconds:6.1f} s  {verdict}"


class Broken(NamedTuple):
    """A kernel that was not checked to the end, or all of an operation's."""

    op: str
    provider: str
    implementation: str
    why: str

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{self.op:20} {_who(self.op, self.provider, self.implementation):22} broke: {self.why}"


Finding = Result | Broken


_MODEL_ON_CPU = "model on the CPU"
_ALL = "all"


def _who(op: str, provider_name: str, implementation: str) -> str:
    if implementation in (_MODEL_ON_CPU, _ALL):
        return implementation
    return provider_name if implementation in (op, "") else f"{provider_name} {implementation}"


def _broken(target: Target, error: Exception) -> Broken:
    return Broken(target.kernel.op, target.kernel.provider, target.part.name, f"{type(error).__name__}: {error}")


def is_changed(before: Any, after: Any) -> bool:
    """Whether a call wrote into this argument."""
    return isinstance(before, torch.Tensor) and bits_differ(before, after) > 0


def share_memory(one: Any, other: Any) -> bool:
    """Whether two results that are both held begin at the same place."""
    if isinstance(one, tuple):
        return any(map(share_memory, one, other))
    return one.numel() > 0 and one.data_ptr() == other.data_ptr()


def check_case(target: Target, number: int, case: Case, expected: Any, device: str) -> Result:
    """Run an implementation on `device`, twice but for the model; a wrong case is described by shapes and its number.

    A case is wrong where a bit of either result differs, where an argument is not as it was before, and where both
    results lie in the same memory: what the first call returned would be lost in the next.
    """
    began = time.perf_counter()
    result = Result(target.kernel.op, target.kernel.provider, target.part.name, exact=target.is_meant_exact)
    calls = 1 if result.is_of_model else 2
    args = [[copied(x, device) for x in case.args] for _ in range(calls)]
    try:
        actual = [target.part.run(*own, **case.kwargs) for own in args]
    except InputError:
        if target.must_take_all:
            raise
        return result._replace(refused_cases=1)
    wrong, worst = max(((bits_differ(expected, one), one) for one in actual), key=lambda found: found[0])
    faults = [f"{wrong} outputs"] if wrong else []
    faults += [f"it changes argument {i}" for i, x in enumerate(case.args) if any(is_changed(x, a[i]) for a in args)]
    if share_memory(actual[0], actual[-1]) and calls > 1:
        faults.append("a call returns the memory of the result before")
    result = result._replace(
        cases=1,
        outputs=sum(x.numel() for x in (expected if isinstance(expected, tuple) else (expected,))),
        seconds=time.perf_counter() - began,
        page_sizes=frozenset({case.args[1].shape[1]} if target.kernel.op == "mla_attention" else ()),
    )
    if not faults:
        return result
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in case.args]
    return result._replace(
        wrong_cases=1,
        wrong_outputs=wrong,
        first_wrong=f"case {number}: {', '.join(faults)}, {shapes} {case.kwargs}",
        largest_difference=largest_difference(expected, worst),
    )


def check_alike(targets: list[Target], numbers: Iterable[int], seed: int, where: Where) -> list[Finding]:
    """Check implementations of one operation on the random cases `numbers`, drawn from the sizes of each."""
    findings: list[Finding] = []

    def drawn_from(target: Target) -> tuple[Sizes, tuple[str, ...]]:
        return target.sizes(where), tuple(map(str, target.dtypes(where)))

    for (at, _), group in groupby(sorted(targets, key=drawn_from), drawn_from):
        alike = list(group)
        findings += _check_group(alike, at, alike[0].dtypes(where), numbers, seed, where)
    return findings


def _check_group(
    targets: list[Target],
    at: Sizes,
    dtypes: tuple[torch.dtype, ...],
    numbers: Iterable[int],
    seed: int,
    where: Where,
) -> list[Finding]:
    model = definitions(where.arithmetic)[targets[0].kernel.op]
    model_on_cpu = Target(model, Implementation(_MODEL_ON_CPU, model.run, ""))
    found: dict[int, Finding] = {}

    def add(index: int, target: Target, on: str) -> None:
        """An implementation that broke is not asked again."""
        before = found.get(index)
        if isinstance(before, Broken):
            return
        try:
            result = check_case(target, number, case, expected, on)
        except Exception as error:  # the others are checked, and the answer says that one was not
            found[index] = _broken(target, error)
        else:
            if result.cases:
                result = result._replace(dtypes=frozenset({certificates.dtype_name(dtype)}))
            found[index] = before.and_then(result) if before else result

    for number in numbers:
        dtype = dtypes[number % len(dtypes)]
        try:
            with torch.device(where.model):
                case = CASES[model.op](random.Random(f"{model.op}/{seed}/{number}"), at)
            case = in_fp32(case) if dtype == torch.float32 else case
            expected = model.run(*case.args, **case.kwargs)
        except Exception as error:  # a kernel may have broken the card's state
            return [*found.values(), _broken(model_on_cpu, error)]
        for index, target in enumerate(targets):
            add(index, target, where.kernels)
        if where.cpu_every and number % where.cpu_every == 0:
            add(len(targets), model_on_cpu, "cpu")
    return list(found.values())


def check_full_card(target: Target, seed: int, device: str = "cuda") -> Result:
    """Attention of a batch that fills the card, where a tile's splits are walked in order, against each request alone,
    whose splits are apart. The model is too slow for such sizes; it has seen single requests.
    """
    began = time.perf_counter()
    generator = torch.Generator(device).manual_seed(seed)
    requests, heads, longest = 150, 128, 4200
    lengths = torch.randint(1, longest, (requests,), generator=generator, device=device, dtype=torch.int32)
    pages = -(-longest // 64)
    table = torch.randperm(requests * pages, generator=generator, device=device).to(torch.int32).view(requests, pages)
    cache = torch.randn(requests * pages, 64, 576, generator=generator, device=device, dtype=torch.bfloat16)
    q = torch.randn(requests, heads, 576, generator=generator, device=device, dtype=torch.bfloat16)
    starts = torch.arange(requests + 1, device=device, dtype=torch.int32)
    sizes = {"kv_lora_rank": 512, "scale": 576**-0.5}
    together = target.part.run(q, cache, table, lengths, starts, **sizes)
    alone = [
        target.part.run(q[i : i + 1], cache, table[i : i + 1], lengths[i : i + 1], starts[:2], **sizes)
        for i in range(requests)
    ]
    wrong = [bits_differ(out, together[i : i + 1]) for i, out in enumerate(alone)]
    first_wrong = next((f"request {i} of {int(lengths[i])} keys: {n} outputs" for i, n in enumerate(wrong) if n), "")
    seconds = time.perf_counter() - began
    wrong_cases = sum(n > 0 for n in wrong)
    return Result(
        op=target.kernel.op,
        provider=target.kernel.provider,
        implementation=target.part.name,
        cases=requests,
        outputs=together.numel(),
        wrong_cases=wrong_cases,
        wrong_outputs=sum(wrong),
        first_wrong=first_wrong,
        seconds=seconds,
        exact=target.is_meant_exact,
        largest_difference=largest_difference(torch.cat(alone), together),
        full_card=True,
    )


def record(path: Path, *, per_op: int = 2, device: str = "cuda") -> None:
    """Write `per_op` small cases of each operation with the results of this package's own kernels."""
    tensors: dict[str, torch.Tensor] = {}
    versions = {contract.op: contract.version for contract in CONTRACTS}
    plain: dict[str, str] = {"card": torch.cuda.get_device_name(), "contracts": json.dumps(versions)}
    for kernel in map(provider.own_kernel, CONTRACTS):
        for number in range(per_op):
            name = f"{kernel.op}/{number}"
            case = CASES[kernel.op](random.Random(f"golden/{name}"), SMALL)
            # Views carry gaps of the tensors that they were cut from.
            args = [x.contiguous() if isinstance(x, torch.Tensor) else x for x in case.args]
            results = kernel.run(*(copied(x, device) for x in args), **case.kwargs)
            for i, x in enumerate(args):
                if isinstance(x, torch.Tensor):
                    tensors[f"{name}/arg{i}"] = x
            for i, x in enumerate(results if isinstance(results, tuple) else (results,)):
                tensors[f"{name}/out{i}"] = x.cpu().contiguous()
            kwargs = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in case.kwargs.items()}
            plain[name] = json.dumps([[None if isinstance(x, torch.Tensor) else x for x in args], kwargs])
    save_file(tensors, path, metadata=plain)


def recorded(path: Path) -> dict[str, tuple[Case, tuple[torch.Tensor, ...]]]:
    """The cases of a file that `record` wrote, by name, each with what the GPU printed."""
    cases: dict[str, tuple[Case, tuple[torch.Tensor, ...]]] = {}
    with safe_open(path, "pt") as file:
        for name, text in file.metadata().items():
            if "/" not in name:
                continue
            plain, kwargs = json.loads(text)
            args = [file.get_tensor(f"{name}/arg{i}") if x is None else x for i, x in enumerate(plain)]
            if "out_dtype" in kwargs:
                kwargs["out_dtype"] = getattr(torch, str(kwargs["out_dtype"]).removeprefix("torch."), None)
            outs = sorted(key for key in file.keys() if key.startswith(f"{name}/out"))  # noqa: SIM118
            cases[name] = Case(tuple(args), kwargs), tuple(file.get_tensor(key) for key in outs)
    return cases


def main(
    cases: Annotated[
        int | None,
        typer.Option(min=1, help=f"Random cases of each; {_CASES} if not given, {_CASES_OF_CERTIFICATE} to certify."),
    ] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only this operation. Repeat it.")] = None,
    provider_names: Annotated[
        list[str] | None,
        typer.Option("--provider", help="Only this provider's kernels, exact or not. Repeat it."),
    ] = None,
    device: Annotated[
        DeviceName | None, typer.Option(help="Whose kernels: for Hopper or a CPU; this machine's if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed makes other cases.")] = 0,
    model_device: Annotated[
        Device, typer.Option(help="Where Hopper's bits are computed; on cuda every 16th case is on the CPU as well.")
    ] = Device.cuda,
    record_to: Annotated[
        Path | None, typer.Option("--record", help="Write small cases and this card's results to a file instead.")
    ] = None,
    certify: Annotated[
        Path | None,
        typer.Option(
            help="Write certificates of what was equal to a file, in place of those of the same code on this machine;"
            f" strict mode reads {certificates.FILE_VARIABLE}, by default {certificates.user_file()}."
        ),
    ] = None,
) -> None:
    """Compare the kernels of all providers, or of some, with their contracts, bit for bit, in random cases."""
    unknown = sorted(set(op or ()) - set(CASES))
    if unknown:
        raise KernelError(f"there is no operation {', '.join(unknown)}; the operations are {', '.join(CASES)}")
    device = device or this_machine()
    if device is DeviceName.hopper and this_machine() is not DeviceName.hopper:
        raise KernelError("the kernels to check run on a Hopper GPU, and this machine has none")
    if record_to is not None:
        if device is not DeviceName.hopper:
            raise KernelError("what is recorded is what a Hopper GPU prints, and this machine has none")
        record(record_to)
        return
    if cases is None:
        cases = _CASES_OF_CERTIFICATE if certify else _CASES
    if certify is not None:
        if cases < FEWEST_CASES:
            raise KernelError(f"a certificate is given for {FEWEST_CASES} cases or more, not for {cases}")
        # What can be refused is refused now, not after the run.
        certificates.read(certify)
        certificates.require_writable(certify)
    where = where_of(device, model_device)
    targets = _that_run(chosen(op, provider_names, where), where)
    if not targets:
        raise KernelError(_nothing_to_check(device))
    if certify is not None:
        require_subjects(targets, where)
    ops = list(dict.fromkeys(target.kernel.op for target in targets))
    began = time.perf_counter()
    work = partial(check_share, provider_names=provider_names, seed=seed, where=where)
    findings: list[Finding] = []
    for of_op in by_operation(in_processes(work, shares(ops, cases)), -(-cases // _SHARE)):
        print("\n".join(map(str, of_op)), flush=True)
        findings += of_op
        if certify is not None:  # now, so that a run that ends early leaves what it has
            certificates.write(certify, earned(targets, of_op, seed, where))
    text, passed = verdict(findings)
    print(f"{text}; {time.perf_counter() - began:.0f} s")
    if certify is not None:
        print(_certified(certify, targets, earned(targets, findings, seed, where)))
    if not passed:
        raise typer.Exit(1)


def where_of(device: DeviceName, model_device: Device = Device.cuda) -> Where:
    """On which devices a check for `device` runs."""
    if device is DeviceName.hopper:
        return Where() if model_device is Device.cuda else Where(model="cpu", cpu_every=0)
    return Where("cpu", "cpu", 0, "cpu" if device is DeviceName.cpu else "sm90")


def _that_run(targets: list[Target], where: Where) -> list[Target]:
    """Those whose kernels serve here; of others it is told why not."""
    not_checked: dict[tuple[str, str], list[str]] = {}
    for target in targets:
        if not target.settings(where):
            reason = str(is_supported(target.kernel, where.settings(**V3_LATENT)[0]).reason)
            not_checked.setdefault((target.kernel.provider, reason), []).append(target.kernel.op)
    for (provider_name, reason), ops in not_checked.items():
        print(f"{provider_name}: not checked ({reason}): {', '.join(dict.fromkeys(ops))}", flush=True)
    return [target for target in targets if target.settings(where)]


def _nothing_to_check(device: DeviceName) -> str:
    if device is DeviceName.hopper:
        return "there is no kernel to check: none of those asked for serves on this machine"
    return (
        f"there is no kernel to check: none of those asked for serves the {device.value}, whose bits the reference"
        " defines; kernels for a Hopper GPU run on one, and this machine has none"
    )


def subject_of(target: Target, where: Where) -> Subject:
    """What a certificate of it would be of. Raises `KernelError` where it can get none."""
    (contract,) = (contract for contract in CONTRACTS if contract.op == target.kernel.op)
    return certificates.subject_of(target.part, contract, reference_of(contract.op), target.settings(where)[0])


def require_subjects(targets: list[Target], where: Where) -> None:
    """Raises `KernelError` that names a kernel which is meant to be exact and can get no certificate."""
    for target in targets:
        try:
            if target.is_meant_exact:
                subject_of(target, where)
        except KernelError as error:
            raise KernelError(
                f"{target.kernel.provider}'s {target.kernel.op} can get no certificate: {error}; leave it out with"
                " --provider or --op"
            ) from error


def earned(targets: list[Target], findings: list[Finding], seed: int, where: Where) -> list[Certificate]:
    """Certificates of the implementations that were equal in enough cases, with an equal model on a CPU."""
    certified = []
    for target in targets:
        if not target.is_meant_exact:
            continue
        own = [found for found in findings if _concerns(found, target)]
        equal = [found for found in own if isinstance(found, Result) and not found.wrong_cases]
        random_cases = [found for found in equal if not (found.full_card or found.is_of_model)]
        if not random_cases or len(equal) < len(own):
            continue
        result = random_cases[0]
        on_cpu = [found.cases for found in equal if found.is_of_model]
        certificate = Certificate(
            subject=subject_of(target, where),
            seed=seed,
            cases=result.cases,
            refused_cases=result.refused_cases,
            cases_on_cpu=min([*on_cpu, result.cases]),
            dtypes=tuple(sorted(result.dtypes)),
            page_sizes=tuple(sorted(result.page_sizes)),
        )
        if not any(certificate.shortcomings(dtype) for dtype in target.dtypes(where)):
            certified.append(certificate)
    return certified


def _concerns(found: Finding, target: Target) -> bool:
    """Whether it is the target's own finding, or one that all implementations of its operation depend on."""
    if found.op != target.kernel.op:
        return False
    of_all = found.implementation in (_MODEL_ON_CPU, _ALL)
    return of_all or (found.provider, found.implementation) == (target.kernel.provider, target.part.name)


def _certified(file: Path, targets: list[Target], certified: list[Certificate]) -> str:
    """What was written and what was not."""
    have = {(found.subject.operation, found.subject.implementation) for found in certified}
    lack = [f"{target.kernel.op} ({target.part.name})" for target in targets if _named(target) not in have]
    text = f"wrote {len(certified)} certificate{'s' * (len(certified) != 1)} to {file}"
    text += f"; none for {', '.join(lack)}" if lack else ""
    read = certificates.user_file()
    if file.resolve() != read.resolve():
        text += f"; strict mode reads {read}, or the file that {certificates.FILE_VARIABLE} names"
    return text


def _named(target: Target) -> tuple[str, str]:
    return target.kernel.op, target.part.name


def chosen(ops: list[str] | None, provider_names: list[str] | None, where: Where) -> list[Target]:
    """The implementations of these operations, all where None, by these providers, those meant to be exact where None.

    Raises `KernelError` that names a provider that there is not.
    """
    kernels = [kernel for kernel in offered_kernels() if kernel.op in CASES and not is_a_definition(kernel)]
    providers = sorted({kernel.provider for kernel in kernels})
    if unknown := sorted(set(provider_names or ()) - set(providers)):
        raise KernelError(f"there is no provider {', '.join(unknown)}; the providers are {', '.join(providers)}")
    targets: dict[tuple[str, str, str], Target] = {}
    for kernel in kernels:
        is_meant = kernel.provider in provider_names if provider_names else kernel.uncertified is None
        if is_meant and (not ops or kernel.op in ops):
            for part in kernel.parts:
                # Kernels that hand to the same implementation share its certificate.
                targets.setdefault((kernel.op, part.name, part.entry), Target(kernel, part))
    return list(targets.values())


class Share(NamedTuple):
    """Some of the random cases of an operation."""

    op: str
    numbers: range


def shares(ops: list[str], cases: int) -> list[Share]:
    """All operations' cases; first some of each."""
    starts = range(0, cases, _SHARE)
    return [Share(op, range(start, min(cases, start + _SHARE))) for start in starts for op in ops]


def in_processes(
    work: Callable[[Share], list[Finding]], shares: Iterable[Share]
) -> Iterator[tuple[Share, list[Finding]]]:
    """What `work` finds for each share, in a few processes, as they end. An operation's first share goes ahead: it
    compiles what the others find compiled. A process that dies is a finding, and where a kernel broke the next share
    gets a new process.
    """
    # Last in, first out: a process that is there is taken before another is started.
    idle: queue.LifoQueue[ProcessPoolExecutor | None] = queue.LifoQueue()
    count = min(_MOST_PROCESSES, os.cpu_count() or 1)
    for _ in range(count):
        idle.put(None)

    def run(share: Share) -> tuple[Share, list[Finding]]:
        process = idle.get() or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            found = process.submit(work, share).result()
        except BrokenProcessPool:
            found = [Broken(share.op, _ALL, _ALL, "the process died")]
        if any(isinstance(finding, Broken) for finding in found):
            process.shutdown()
            idle.put(None)
        else:
            idle.put(process)
        return share, found

    waiting: dict[str, list[Share]] = {}
    for share in shares:
        waiting.setdefault(share.op, []).append(share)
    with ThreadPoolExecutor(count) as threads:
        running = {threads.submit(run, of_op.pop(0)) for of_op in waiting.values()}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                share, found = future.result()
                running |= {threads.submit(run, next_one) for next_one in waiting.pop(share.op, ())}
                yield share, found
    for _ in range(count):
        if process := idle.get():
            process.shutdown()


def by_operation(found: Iterable[tuple[Share, list[Finding]]], shares: int) -> Iterator[list[Finding]]:
    """The findings of each operation as soon as all its shares are there, one a kernel."""
    waiting: dict[str, dict[int, list[Finding]]] = {}
    for share, findings in found:
        parts = waiting.setdefault(share.op, {})
        parts[share.numbers.start] = findings
        if len(parts) == shares:
            yield together([finding for start in sorted(parts) for finding in parts[start]])


def together(findings: list[Finding]) -> list[Finding]:
    """One result a kernel, and what broke, once."""
    results: dict[tuple[str, str, bool], Result] = {}
    broken: list[Finding] = []
    for finding in findings:
        if isinstance(finding, Broken):
            broken.append(finding)
            continue
        key = finding.provider, finding.implementation, finding.full_card
        results[key] = results[key].and_then(finding) if key in results else finding
    return [*results.values(), *dict.fromkeys(broken)]


def check_share(share: Share, *, provider_names: list[str] | None, seed: int, where: Where) -> list[Finding]:
    """Check the implementations of one operation that serve here."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.set_num_threads(1)
    targets = [target for target in chosen([share.op], provider_names, where) if target.settings(where)]
    findings = check_alike(targets, share.numbers, seed, where)
    if (share.op, where.kernels, share.numbers.start) == ("mla_attention", "cuda", 0):
        for target in (target for target in targets if LARGE.latents[0] in target.sizes(where).latents):
            try:
                findings.append(check_full_card(target, seed))
            except Exception as error:
                findings.append(_broken(target, error))
    return findings


def verdict(findings: list[Finding]) -> tuple[str, bool]:
    """The last words, and whether all kernels that are meant to be exact are equal and none broke."""
    exact = [finding for finding in findings if isinstance(finding, Result) and finding.exact]
    broken = sum(isinstance(finding, Broken) for finding in findings)
    failed = any(result.failed for result in exact)
    kernels = [result for result in exact if not result.is_of_model]
    cases, outputs = sum(result.cases for result in kernels), sum(result.outputs for result in kernels)
    text = f"{cases} cases, {outputs:,} outputs: {'bits differ' if failed else 'equal in every bit'}"
    if not (cases or failed):
        text = "no kernel that is meant to be equal was compared"
    if on_cpu := sum(result.cases for result in exact if result.is_of_model):
        text += f"; {on_cpu} of the expectations were computed on the CPU too"
    return text + (f"; {broken} kernels broke" if broken else ""), not (failed or broken)


if __name__ == "__main__":
    typer.run(main)
