"""Which implementations earn a certificate by what a check found."""

from __future__ import annotations

from pathlib import Path

from dsv3_plugin import certificates
from dsv3_plugin.certificates import Certificate, Subject
from dsv3_plugin.errors import KernelError
from dsv3_plugin.kernels.certify.findings import ALL, MODEL_ON_CPU, Finding, Result
from dsv3_plugin.kernels.certify.targets import Target, Where


def subject_of(target: Target, where: Where) -> Subject:
    """What a certificate of it would be of. Raises `KernelError` where it can get none."""
    return certificates.subject_of(target.part, target.op, target.settings(where)[0])


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
    of_all = found.implementation in (MODEL_ON_CPU, ALL)
    return of_all or (found.provider, found.implementation) == (target.kernel.provider, target.part.name)


def written(file: Path, targets: list[Target], certified: list[Certificate]) -> str:
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
