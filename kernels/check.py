"""Do the GPU kernels print the contract's bits? Random cases of every operation against the model of Hopper.

    dsv3 kernels check [--cases 40] [--op fp8_linear] [--provider cublas] [--seed 0] [--model-device cuda]
                       [--record golden.safetensors] [--certify certificates.json]

Expected values come from `sm90_model` on the card; every 16th case is computed on the CPU as well, which must print the
same bits. Memory that a kernel allocates is filled with NaN first, so that an output nobody wrote is seen. The kernels
are this package's, or those of the providers that are named. Exits with status 1 if a bit differs of a kernel of this
package, of another's with a certificate, or of the model on its two devices. Of another's kernel without certificate
(it serves in fast mode only) the share of differing outputs and the largest difference are told. Processes share the
cases; one in which a kernel broke is replaced, because it may have broken the card's state for its process.

`--record` writes small cases and what the GPU printed to a file, for tests on machines without one. `--certify` writes
`certificates` of this package's kernels.
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
from dataclasses import replace
from enum import StrEnum
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file

from dsv3_plugin.errors import InputError, KernelError
from dsv3_plugin.hooks import Kernel, Setting
from dsv3_plugin.kernels import certificates, deep_gemm, provider, sm90_model, third_party
from dsv3_plugin.kernels.cases import CASES, LARGE, SMALL, Case, Sizes
from dsv3_plugin.kernels.certificates import Certificate
from dsv3_plugin.kernels.hopper import V3_LATENT
from dsv3_plugin.profile import FP8_UE8M0
from dsv3_plugin.registry import CONTRACTS

# One case of so many is computed on the CPU too where the model runs on the card.
_ON_CPU_TOO = 16
# Cases of one operation that a process takes at a time.
_SHARE = 32
# Each process holds a context on the card.
_MOST_PROCESSES = 16


class Device(StrEnum):
    """Where expected values are computed."""

    cuda = "cuda"
    cpu = "cpu"


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
    full_card: bool = False
    """Whether the cases are requests of `check_full_card`."""

    @property
    def failed(self) -> bool:
        """Whether bits differ that may not."""
        return self.exact and self.wrong_cases > 0

    @property
    def is_of_model(self) -> bool:
        """Whether the model on the CPU was compared with the model on the card."""
        return self.provider == sm90_model.PROVIDER

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
        who = "model on the CPU" if self.is_of_model else self.provider + ", full" * self.full_card
        count = f"{self.cases:5} cases{refused} {self.outputs:14,} outputs"
        return f"{self.op:20} {who:18} {count} {self.seconds:6.1f} s  {verdict}"


class Broken(NamedTuple):
    """A kernel that was not checked to the end, or all of an operation's."""

    op: str
    provider: str
    why: str

    def __str__(self) -> str:
        """One line for a terminal."""
        return f"{self.op:20} {self.provider:12} broke: {self.why}"


Finding = Result | Broken


def _broken(kernel: Kernel, error: Exception) -> Broken:
    return Broken(kernel.op, kernel.provider, f"{type(error).__name__}: {error}")


def is_meant_exact(kernel: Kernel) -> bool:
    """Whether a bit that differs is a fault: in all of this package's kernels, and in others with a certificate."""
    return kernel.uncertified is None or kernel.provider not in OTHERS


def model_of(op: str) -> Kernel:
    """The model of an operation."""
    return next(kernel for kernel in sm90_model.kernels() if kernel.op == op)


def sizes_of(kernel: Kernel) -> Sizes:
    """What a kernel's cases are drawn from: V3's latent has attention kernels of its own, which get no other, and what
    is compiled for every shape or number of requests gets few.
    """
    if kernel.provider == deep_gemm.PROVIDER:
        return LARGE._replace(depths=(512, 7168), columns=(64, 192))
    if kernel.op != "mla_attention":
        return LARGE
    if kernel.provider == provider.PROVIDER:
        return LARGE._replace(latents=LARGE.latents[1:], requests=(1, 3))
    return LARGE._replace(latents=LARGE.latents[:1])


def check_case(kernel: Kernel, number: int, case: Case, expected: Any, device: str) -> Result:
    """Run a kernel on `device`; a case whose bits differ is described by shapes and its number."""
    began = time.perf_counter()
    result = Result(kernel.op, kernel.provider, exact=is_meant_exact(kernel))
    try:
        actual = kernel.run(*(copied(x, device) for x in case.args), **case.kwargs)
    except InputError:
        if kernel.provider not in OTHERS:
            raise
        return result._replace(refused_cases=1)
    wrong = bits_differ(expected, actual)
    result = result._replace(
        cases=1,
        outputs=sum(x.numel() for x in (expected if isinstance(expected, tuple) else (expected,))),
        seconds=time.perf_counter() - began,
    )
    if not wrong:
        return result
    shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in case.args]
    return result._replace(
        wrong_cases=1,
        wrong_outputs=wrong,
        first_wrong=f"case {number}: {wrong} outputs, {shapes} {case.kwargs}",
        largest_difference=largest_difference(expected, actual),
    )


class Where(NamedTuple):
    """On which devices a check runs."""

    kernels: str = "cuda"
    model: str = "cuda"
    cpu_every: int = _ON_CPU_TOO
    """One case of so many has the model run on the CPU too; none if 0."""


def check_alike(kernels: list[Kernel], numbers: Iterable[int], seed: int, where: Where) -> list[Finding]:
    """Check kernels of one operation on the random cases `numbers`, each drawn from `sizes_of` the kernel."""
    findings: list[Finding] = []
    for at, group in groupby(sorted(kernels, key=sizes_of), sizes_of):
        findings += _check_group(list(group), at, numbers, seed, where)
    return findings


def _check_group(kernels: list[Kernel], at: Sizes, numbers: Iterable[int], seed: int, where: Where) -> list[Finding]:
    model = model_of(kernels[0].op)
    found: dict[int, Finding] = {}

    def add(index: int, kernel: Kernel, on: str) -> None:
        """A kernel that broke is not asked again."""
        before = found.get(index)
        if isinstance(before, Broken):
            return
        try:
            result = check_case(kernel, number, case, expected, on)
        except Exception as error:  # the others are checked, and the answer says that one was not
            found[index] = _broken(kernel, error)
        else:
            found[index] = before.and_then(result) if before else result

    for number in numbers:
        try:
            with torch.device(where.model):
                case = CASES[model.op](random.Random(f"{model.op}/{seed}/{number}"), at)
            expected = model.run(*case.args, **case.kwargs)
        except Exception as error:  # a kernel may have broken the card's state
            return [*found.values(), _broken(model, error)]
        for index, kernel in enumerate(kernels):
            add(index, kernel, where.kernels)
        if where.cpu_every and number % where.cpu_every == 0:
            add(len(kernels), model, "cpu")
    return list(found.values())


def check_full_card(kernel: Kernel, seed: int, device: str = "cuda") -> Result:
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
    together = kernel.run(q, cache, table, lengths, starts, **sizes)
    alone = [
        kernel.run(q[i : i + 1], cache, table[i : i + 1], lengths[i : i + 1], starts[:2], **sizes)
        for i in range(requests)
    ]
    wrong = [bits_differ(out, together[i : i + 1]) for i, out in enumerate(alone)]
    first_wrong = next((f"request {i} of {int(lengths[i])} keys: {n} outputs" for i, n in enumerate(wrong) if n), "")
    seconds = time.perf_counter() - began
    wrong_cases = sum(n > 0 for n in wrong)
    return Result(
        op=kernel.op,
        provider=kernel.provider,
        cases=requests,
        outputs=together.numel(),
        wrong_cases=wrong_cases,
        wrong_outputs=sum(wrong),
        first_wrong=first_wrong,
        seconds=seconds,
        exact=is_meant_exact(kernel),
        largest_difference=largest_difference(torch.cat(alone), together),
        full_card=True,
    )


def record(path: Path, *, per_op: int = 2, device: str = "cuda") -> None:
    """Write `per_op` small cases of each operation with the results of this package's own kernels."""
    tensors: dict[str, torch.Tensor] = {}
    versions = {contract.op: contract.version for contract in CONTRACTS}
    plain: dict[str, str] = {"card": torch.cuda.get_device_name(), "contracts": json.dumps(versions)}
    for kernel in gpu_kernels():
        if kernel.provider != provider.PROVIDER:
            continue
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


# What other people's kernels are asked for before they are checked: a Hopper card and the latent of V3.
_HERE = Setting("cuda", "sm90", FP8_UE8M0, (9, 0), V3_LATENT)
# They need not take every shape.
OTHERS = {module.PROVIDER for module in provider.OTHERS}


def gpu_kernels() -> list[Kernel]:
    """What this package offers for a GPU."""
    return [kernel for kernel in provider.dsv3_kernels() if kernel.provider != sm90_model.PROVIDER]


def with_each_maker(kernels: list[Kernel]) -> list[Kernel]:
    """The fp8 products choose among makers by shape; here each maker is a kernel of its own, at every shape."""
    from dsv3_plugin.kernels import fp8_linear, selection
    from dsv3_plugin.kernels.selection import Choice

    def made_by(maker: str, kernel: Kernel) -> Callable[..., torch.Tensor]:
        grouped = kernel.op == "grouped_fp8_linear"

        def run(*args: torch.Tensor) -> torch.Tensor:
            weight = args[3 if grouped else 2]
            if maker not in fp8_linear.makers(weight.shape[-2], grouped):
                return kernel.run(*args)
            draw = random.Random(str([tuple(x.shape) for x in args]))
            shape = draw.choice(selection.cuts_to_check(grouped))
            cut = shape._replace(groups=len(weight) if grouped else 1).filled()
            choice = Choice(maker, cut if maker == "stream" else None)
            serve = fp8_linear.grouped_fp8_linear if grouped else fp8_linear.fp8_linear
            return serve(*args, choice=choice)  # type: ignore[operator]

        return run

    expanded = []
    for kernel in kernels:
        if kernel.op == "fp8_linear" and kernel.provider == deep_gemm.PROVIDER:
            expanded.append(replace(kernel, run=deep_gemm.product))
        elif kernel.op not in ("fp8_linear", "grouped_fp8_linear") or kernel.provider != provider.PROVIDER:
            expanded.append(kernel)
        else:
            expanded += [replace(kernel, provider=m, run=made_by(m, kernel)) for m in fp8_linear.OWN_MAKERS]
    return expanded


def main(
    cases: Annotated[int, typer.Option(min=1, help="Random cases of each kernel.")] = 40,
    op: Annotated[list[str] | None, typer.Option(help="Only this operation. Repeat it.")] = None,
    provider_names: Annotated[
        list[str] | None,
        typer.Option("--provider", help="Kernels of this provider, not this package's. Repeat it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed makes other cases.")] = 0,
    model_device: Annotated[
        Device, typer.Option(help="Where expected bits are computed; on cuda every 16th case is on the CPU as well.")
    ] = Device.cuda,
    record_to: Annotated[
        Path | None, typer.Option("--record", help="Write small cases and this card's results to a file instead.")
    ] = None,
    certify: Annotated[
        Path | None, typer.Option(help="Write certificates of what was equal to a file; others in it stay.")
    ] = None,
) -> None:
    """Compare this package's kernels, or a provider's, with the model of Hopper, bit for bit, in random cases."""
    unknown = sorted(set(op or ()) - set(CASES))
    if unknown:
        raise KernelError(f"there is no operation {', '.join(unknown)}; the operations are {', '.join(CASES)}")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise KernelError("the kernels to check run on a Hopper GPU, and this machine has none")
    if certify is not None and provider_names:
        raise KernelError("--certify is of whole operations, by all their makers: leave --provider out")
    if record_to is not None:
        record(record_to)
        return
    ops = []
    for kernel in chosen(op, provider_names):
        if reason := kernel.refuses(_HERE):
            print(f"{kernel.op:20} {kernel.provider:12} not checked: {reason}", flush=True)
        elif kernel.op not in ops:
            ops.append(kernel.op)
    if not ops:
        raise KernelError("there is no kernel to check: none of those asked for serves on this machine")
    began = time.perf_counter()
    where = Where() if model_device is Device.cuda else Where(model="cpu", cpu_every=0)
    work = partial(check_share, provider_names=provider_names, seed=seed, where=where)
    findings: list[Finding] = []
    for of_op in by_operation(in_processes(work, shares(ops, cases)), -(-cases // _SHARE)):
        print("\n".join(map(str, of_op)), flush=True)
        findings += of_op
        if certify is not None:  # now, so that a run that ends early leaves what it has
            certificates.write(certify, earned(of_op))
    text, passed = verdict(findings)
    print(f"{text}; {time.perf_counter() - began:.0f} s")
    if certify is not None:
        print(f"wrote {certify}; the certificates in use are in {certificates.TABLE}")
    if not passed:
        raise typer.Exit(1)


def earned(findings: list[Finding]) -> dict[str, Certificate]:
    """Certificates of the operations whose own kernels are all equal to the model, and the model to itself on a CPU."""
    earned_ = {}
    for contract in CONTRACTS:
        of_op = [finding for finding in findings if finding.op == contract.op and finding.provider not in OTHERS]
        equal = [finding for finding in of_op if isinstance(finding, Result) and not finding.wrong_cases]
        own = [result.cases for result in equal if not result.full_card and not result.is_of_model]
        if own and len(equal) == len(of_op):
            on_cpu = [result.cases for result in equal if result.is_of_model]
            earned_[contract.op] = Certificate(
                contract_version=contract.version,
                sources=certificates.digest(provider.OWN_MODULES[contract.op]),
                cases=min(own),
                cases_on_cpu=min([*on_cpu, *own]),
                card=torch.cuda.get_device_name(),
                torch=str(torch.__version__),
                triton=third_party.version_of("triton") or "absent",
            )
    return earned_


def chosen(ops: list[str] | None, provider_names: list[str] | None) -> list[Kernel]:
    """The kernels of these operations, all where None, and these providers, this package where None."""

    def is_meant(kernel: Kernel) -> bool:
        by = kernel.provider in provider_names if provider_names else kernel.provider not in OTHERS
        return by and (not ops or kernel.op in ops)

    return [kernel for kernel in with_each_maker(gpu_kernels()) if is_meant(kernel)]


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
    idle: queue.SimpleQueue[ProcessPoolExecutor | None] = queue.SimpleQueue()
    count = min(_MOST_PROCESSES, os.cpu_count() or 1)
    for _ in range(count):
        idle.put(None)

    def run(share: Share) -> tuple[Share, list[Finding]]:
        process = idle.get() or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            found = process.submit(work, share).result()
        except BrokenProcessPool:
            found = [Broken(share.op, "all", "the process died")]
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
    results: dict[tuple[str, bool], Result] = {}
    broken: list[Finding] = []
    for finding in findings:
        if isinstance(finding, Broken):
            broken.append(finding)
            continue
        key = finding.provider, finding.full_card
        results[key] = results[key].and_then(finding) if key in results else finding
    return [*results.values(), *dict.fromkeys(broken)]


def check_share(share: Share, *, provider_names: list[str] | None, seed: int, where: Where) -> list[Finding]:
    """Check the kernels of one operation that serve a Hopper card, on this machine's."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.set_num_threads(1)
    kernels = [kernel for kernel in chosen([share.op], provider_names) if not kernel.refuses(_HERE)]
    findings = check_alike(kernels, share.numbers, seed, where)
    if share.op == "mla_attention" and share.numbers.start == 0:
        for kernel in (kernel for kernel in kernels if LARGE.latents[0] in sizes_of(kernel).latents):
            try:
                findings.append(check_full_card(kernel, seed))
            except Exception as error:
                findings.append(_broken(kernel, error))
    return findings


def verdict(findings: list[Finding]) -> tuple[str, bool]:
    """The last words, and whether all kernels with a certificate are equal and none broke."""
    exact = [finding for finding in findings if isinstance(finding, Result) and finding.exact]
    broken = sum(isinstance(finding, Broken) for finding in findings)
    failed = any(result.failed for result in exact)
    kernels = [result for result in exact if not result.is_of_model]
    cases, outputs = sum(result.cases for result in kernels), sum(result.outputs for result in kernels)
    text = f"{cases} cases, {outputs:,} outputs: {'bits differ' if failed else 'equal in every bit'}"
    if not (kernels or failed):
        text = "no kernel that is meant to be equal was checked"
    if on_cpu := sum(result.cases for result in exact if result.is_of_model):
        text += f"; {on_cpu} of the expectations were computed on the CPU too"
    return text + (f"; {broken} kernels broke" if broken else ""), not (failed or broken)


if __name__ == "__main__":
    typer.run(main)
