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

import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from dsv3_plugin import certificates
from dsv3_plugin.certificates import FEWEST_CASES
from dsv3_plugin.errors import KernelError
from dsv3_plugin.kernels.certify.compare import check_alike
from dsv3_plugin.kernels.certify.earn import earned, require_subjects, written
from dsv3_plugin.kernels.certify.findings import Broken, Finding, Result, broke
from dsv3_plugin.kernels.certify.full_card import check_full_card
from dsv3_plugin.kernels.certify.golden import record
from dsv3_plugin.kernels.certify.processes import SHARE, Share, by_operation, in_processes, shares
from dsv3_plugin.kernels.certify.targets import Device, DeviceName, Where, chosen, that_run, this_machine, where_of
from dsv3_plugin.ops.drawing import LARGE
from dsv3_plugin.ops.mla_attention import mla_attention
from dsv3_plugin.ops.operation import operations

_CASES, _CASES_OF_CERTIFICATE = 40, 1000


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
    unknown = sorted(set(op or ()) - set(operations()))
    if unknown:
        raise KernelError(f"there is no operation {', '.join(unknown)}; the operations are {', '.join(operations())}")
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
    targets = that_run(chosen(op, provider_names, where), where)
    if not targets:
        raise KernelError(_nothing_to_check(device))
    if certify is not None:
        require_subjects(targets, where)
    ops = list(dict.fromkeys(target.kernel.op for target in targets))
    began = time.perf_counter()
    work = partial(check_share, provider_names=provider_names, seed=seed, where=where)
    findings: list[Finding] = []
    for of_op in by_operation(in_processes(work, shares(ops, cases)), -(-cases // SHARE)):
        print("\n".join(map(str, of_op)), flush=True)
        findings += of_op
        if certify is not None:  # now, so that a run that ends early leaves what it has
            certificates.write(certify, earned(targets, of_op, seed, where))
    text, passed = verdict(findings)
    print(f"{text}; {time.perf_counter() - began:.0f} s")
    if certify is not None:
        print(written(certify, targets, earned(targets, findings, seed, where)))
    if not passed:
        raise typer.Exit(1)


def _nothing_to_check(device: DeviceName) -> str:
    if device is DeviceName.hopper:
        return "there is no kernel to check: none of those asked for serves on this machine"
    return (
        f"there is no kernel to check: none of those asked for serves the {device.value}, whose bits the reference"
        " defines; kernels for a Hopper GPU run on one, and this machine has none"
    )


def check_share(share: Share, *, provider_names: list[str] | None, seed: int, where: Where) -> list[Finding]:
    """Check the implementations of one operation that serve here."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.set_num_threads(1)
    targets = [target for target in chosen([share.op], provider_names, where) if target.settings(where)]
    findings = check_alike(targets, share.numbers, seed, where)
    if (share.op, where.kernels, share.numbers.start) == (mla_attention.name, "cuda", 0):
        for target in (target for target in targets if LARGE.latents[0] in target.sizes(where).latents):
            try:
                findings.append(check_full_card(target, seed))
            except Exception as error:
                findings.append(broke(target, error))
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
