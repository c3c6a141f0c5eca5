"""Certificates: of which code, on which machine, every bit was the contract's.

A certificate is of a *subject*: an implementation's sources, the contract's version and constants, the versions of
compilers and libraries, and the card. `dsv3 kernels check --certify FILE` writes one where all random cases of an
implementation were equal. Strict mode makes the subject anew on the machine that a model is built on and takes an
implementation only if a certificate has exactly that subject. Certificates are read from the file that a provider ships
and from the user's own (`user_file`), so that another card or another Triton needs a check and no new release.
"""

from __future__ import annotations

import functools
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dsv3_plugin import sources
from dsv3_plugin.errors import KernelError
from dsv3_plugin.hooks import Arithmetic, Implementation, Setting, errors_of, versions_of
from dsv3_plugin.ops.operation import Operation, operations

FILE_VARIABLE = "DSV3_PLUGIN_CERTIFICATES"
FEWEST_CASES = 100
"""A certificate is given for so many equal cases, not for fewer."""


class Subject(BaseModel):
    """What a certificate is of. Where anything here differs, it is of something else."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    operation: str
    contract_version: int
    arithmetic: Arithmetic
    implementation: str
    entry: str
    """Where its sources begin, as `module:function`."""
    digest: str
    """Of its sources, what it is compiled with, and its contract's constants."""
    versions: dict[str, str]
    """Of the libraries and compilers that make its bits."""
    card: str
    """The GPU's name, or the processor's."""
    capability: str
    """A GPU's compute capability, or the instructions that torch uses on the processor."""

    @property
    def code(self) -> tuple[str, ...]:
        """Which implementation of which operation it is, whatever the machine and the state of the code."""
        return self.operation, self.arithmetic, self.implementation, self.entry

    @property
    def machine(self) -> tuple[object, ...]:
        """Where it runs."""
        return self.card, self.capability, *sorted(self.versions.items())

    def differences(self, compared: Subject) -> list[str]:
        """What is not as it was when `compared` got a certificate, each in words."""
        told = []
        if self.contract_version != compared.contract_version:
            told.append(f"version {compared.contract_version} of its contract was compared")
        if self.digest != compared.digest:
            told.append("its sources or its contract's constants have changed since")
        for name in sorted(self.versions.keys() | compared.versions.keys()):
            here, there = (subject.versions.get(name, "absent") for subject in (self, compared))
            if here != there:
                told.append(f"{name} is {here}, with {there} it was compared")
        if (self.card, self.capability) != (compared.card, compared.capability):
            told.append(f"this is {_card(self)}, on {_card(compared)} it was compared")
        return told


def _card(subject: Subject) -> str:
    return f"{subject.card} ({subject.capability})"


class Certificate(BaseModel):
    """That all of a subject's random cases were equal to its contract in every bit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    subject: Subject
    seed: int
    """The cases are those of this seed, from number 0 on."""
    cases: int
    """Those that were compared."""
    refused_cases: int
    """Those whose shapes the implementation does not take."""
    cases_on_cpu: int
    """Of the operation: those whose expected bits were computed on a CPU too, not on the card alone."""
    dtypes: tuple[str, ...]
    """Profiles' dtypes in which cases were compared."""
    page_sizes: tuple[int, ...]
    """Keys of a page in the cases; none where an operation reads no pages."""

    def shortcomings(self, dtype: torch.dtype) -> list[str]:
        """Why it is not enough for a profile in `dtype`, each in words."""
        told = []
        if self.cases < FEWEST_CASES:
            told.append(f"{self.cases} cases were compared, {FEWEST_CASES} are needed")
        if dtype_name(dtype) not in self.dtypes:
            told.append(f"it was not compared in {dtype_name(dtype)}")
        if missing := sorted(operations()[self.subject.operation].page_sizes - set(self.page_sizes)):
            told.append(f"it was not compared with pages of {', '.join(map(str, missing))} keys")
        return told

    def __str__(self) -> str:
        """As `dsv3 kernels list` shows it."""
        versions = ", ".join(f"{name} {version}" for name, version in self.subject.versions.items())
        pages = f", pages of {', '.join(map(str, self.page_sizes))} keys" if self.page_sizes else ""
        return (
            f"equal to the contract in every bit in {self.cases:,} random cases (seed {self.seed}{pages}) on"
            f" {self.subject.card}, {versions}"
        )


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def subject_of(part: Implementation, op: Operation[..., Any], setting: Setting) -> Subject:
    """An implementation of `op` as it is here and now.

    Raises `KernelError` where its source is not to be found, or is not all that there is to it.
    """
    if not part.entry:
        raise KernelError(
            f"{part.name} is more than a top-level function of a module, as a closure, a method or an object is: name"
            " the kernel's `implementations` with `settings`"
        )
    card, capability = card_of(setting.device_type)
    versions = part.versions or versions_of(*sources.libraries((part.entry,), without=part.without))
    with errors_of(f"settings and versions of {part.name} cannot be asked"):
        settings, found = part.settings(), versions()
    code = sources.digest((part.entry,), without=part.without, constants_of=op.defined_by, settings=settings)
    return Subject(
        operation=op.name,
        contract_version=op.version,
        arithmetic=setting.arithmetic,
        implementation=part.name,
        entry=part.entry,
        digest=code,
        versions=found,
        card=card,
        capability=capability,
    )


def card_of(device_type: str) -> tuple[str, str]:
    """Name and capability of the current GPU, or of the processor."""
    if device_type != "cuda":
        return _processor(), torch.backends.cpu.get_cpu_capability()
    if not torch.cuda.is_available():
        return "a machine without a GPU", "none"
    return torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def find(subject: Subject, dtype: torch.dtype, shipped: Path | None) -> Certificate | str:
    """A certificate of exactly this subject, from the provider's file or the user's, or why there is none."""
    files = [file for file in (user_file(), shipped) if file is not None]
    of_code = [found for file in files for found in read(file) if found.subject.code == subject.code]
    if not of_code:
        return "it was compared with the contract nowhere"
    objections = [(subject.differences(found.subject) + found.shortcomings(dtype), found) for found in of_code]
    fewest, certificate = min(objections, key=lambda objection: len(objection[0]))
    return "; ".join(fewest) or certificate


def user_file() -> Path:
    """`DSV3_PLUGIN_CERTIFICATES`, else `dsv3-plugin/certificates.json` in the user's data folder."""
    chosen = os.environ.get(FILE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "dsv3-plugin/certificates.json"


_File = TypeAdapter(tuple[Certificate, ...])


def read(file: Path) -> tuple[Certificate, ...]:
    """The certificates in a file; none where there is no file. Raises `KernelError` if it is no such file."""
    try:
        modified = file.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise KernelError(f"{file} cannot be read: {error.strerror}") from error
    return _read(file, modified)


@functools.lru_cache(maxsize=16)
def _read(file: Path, modified: int) -> tuple[Certificate, ...]:
    try:
        return _File.validate_json(file.read_bytes())
    except OSError as error:
        raise KernelError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise KernelError(
            f"{file} holds no certificates of this version ({error.errors()[0]['msg']}): move it away and write"
            f" another with {command(['NAME'], file)}"
        ) from error


def write(file: Path, certificates: Iterable[Certificate]) -> None:
    """Put `certificates` into a file in place of those of the same code on the same machine; others in it stay.

    Raises `KernelError` if the file holds something else or cannot be written; then it stays as it was.
    """
    new = {(found.subject.code, found.subject.machine): found for found in certificates}
    old = {(found.subject.code, found.subject.machine): found for found in read(file)}
    merged = sorted((old | new).items(), key=lambda item: repr(item[0]))
    part = file.with_name(f"{file.name}.part")
    with _writing(file):
        try:
            part.write_bytes(_File.dump_json(tuple(found for _, found in merged), indent=1) + b"\n")
            part.replace(file)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def require_writable(file: Path) -> None:
    """Raises `KernelError` if the file's folder cannot be made, or takes not a byte more."""
    with _writing(file), tempfile.TemporaryFile(dir=file.parent) as trial:
        trial.write(b"[]")


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise KernelError(f"{file} cannot be written: {error.strerror or error}") from error


def command(providers: Iterable[str], file: Path | None = None) -> str:
    """What a user types to certify the kernels of `providers` on this machine."""
    named = " ".join(f"--provider {name}" for name in providers)
    return f"dsv3 kernels check {named} --certify {file or user_file()}"
