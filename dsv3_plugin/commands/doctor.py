"""`dsv3 doctor`: whether what runs on this machine is what the documentation promises, and what to do where it is not.

Each Python that has the package is asked in a process of its own, because engines cannot share one: this one and those
of the environments' folder. There `probe` looks at the engines' registries, the kernels and the libraries; here the
answers and this process's environment variables become findings. A finding is `fine`, a `note`, or a `problem`, which
says what to do; any problem makes the exit status 1.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Protocol, get_args

import torch
import typer
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv3_plugin.engines import Level, Variable, switched_off, untested_version_warning
from dsv3_plugin.errors import ConfigError, DSV3Error, EngineError
from dsv3_plugin.hooks import ENTRY_POINT_GROUP, Setting
from dsv3_plugin.megatron_backend import doctor as megatron
from dsv3_plugin.ops.operation import operations
from dsv3_plugin.profile import (
    ATTENTION_VARIABLE,
    BF16,
    FP8_FLOAT32,
    FP8_UE8M0,
    FP32,
    SLICES_VARIABLE,
    Profile,
    attention_from_environment,
    reduction_slices_from_environment,
)
from dsv3_plugin.providers import offered_kernels
from dsv3_plugin.registry import MODE_VARIABLE, Mode, bind, mode_from_environment, refusal
from dsv3_plugin.sglang_backend import doctor as sglang
from dsv3_plugin.variables import KILL_SWITCH, wrong_variables
from dsv3_plugin.version import __version__
from dsv3_plugin.vllm_backend import doctor as vllm

PROBE_TIMEOUT = 300
"""Seconds that an engine may take to import."""


class Engine(Protocol):
    """An adapter's `doctor` module, which imports its engine in `resolve` and what is called after it, no earlier."""

    NAME: str
    TESTED: tuple[str, str]
    VARIABLES: Mapping[str, Variable]
    PLUGINS: str
    """The engine's setting that chooses among plugins which claim one architecture."""

    def version(self) -> str:
        """Raises `EngineError` where the engine is not installed."""

    def resolve(self) -> dict[str, str]:
        """Load plugins as the engine does; each of our architectures to the class that the registry then has."""

    def other_plugins(self) -> dict[str, Callable[[], object]]:
        """The engine's plugins but ours that it would load, by name."""

    def register(self) -> None:
        """Put our classes into the registry, as our plugin does."""


VARIABLES: dict[str, Variable] = {
    MODE_VARIABLE: Variable("kernels that nobody compared may serve", ("strict",)),
    SLICES_VARIABLE: Variable("part of the arithmetic: trainer and servers need the same", ("1",), "note"),
    ATTENTION_VARIABLE: Variable("part of the arithmetic: trainer and servers need the same", ("absorbed",), "note"),
    "OMP_NUM_THREADS": Variable("models on a CPU take one thread whatever it says", ("1",), "note"),
    "NVIDIA_TF32_OVERRIDE": Variable("matrix products in fp32 lose 13 bits of their operands", ("0",)),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Variable("matrix products in fp32 lose 13 bits of their operands", ("0",)),
    "TRITON_INTERPRET": Variable("Triton kernels run in an interpreter, which rounds otherwise", ("0",)),
    "ONEDNN_DEFAULT_FPMATH_MODE": Variable("matrix products in fp32 may run in bf16", ("STRICT",)),
    **dict.fromkeys(
        ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR"),
        Variable("chooses other instructions, and so other sums than processes without it"),
    ),
}
"""Of every engine. Each adapter adds its own engine's."""
_ARITHMETIC: dict[str, Callable[[Mapping[str, str]], object]] = {
    SLICES_VARIABLE: reduction_slices_from_environment,
    ATTENTION_VARIABLE: attention_from_environment,
}
"""Those that name an arithmetic, with what refuses a name of none."""

ENGINES: tuple[Engine, ...] = (vllm, sglang, megatron)  # type: ignore[assignment]
LIBRARIES = ("torch", "triton", "cuda-bindings", "sgl-deep-gemm", "transformer-engine")
PROFILES: dict[str, Profile] = {"bf16": BF16, "fp32": FP32, "fp8": FP8_UE8M0, "fp8-float32": FP8_FLOAT32}


class EngineProbe(BaseModel):
    """An engine in one environment."""

    model_config = ConfigDict(extra="forbid")

    name: str
    version: str
    warning: str | None
    """Why its version is not one that was tested."""
    error: str | None = None
    """Why it does not import, or does not load its plugins."""
    classes: dict[str, str] = {}
    """Architecture to the class that the registry resolves."""
    claims: dict[str, list[str]] = {}
    """Other plugins, each with the architectures that it registers too."""


class KernelsProbe(BaseModel):
    """What would serve a profile in one environment."""

    model_config = ConfigDict(extra="forbid")

    providers: list[str] = []
    uncertified: int = 0
    """Kernels that only strict mode refuses: without a certificate that is valid here."""
    error: str | None = None
    """Why a model of this profile cannot be built."""


class Probe(BaseModel):
    """One environment, as its own Python sees it."""

    model_config = ConfigDict(extra="forbid")

    package: str
    """Of dsv3-plugin, its version."""
    python: str
    device: str
    libraries: dict[str, str | None]
    engines: list[EngineProbe]
    kernels: dict[str, KernelsProbe]
    providers: list[str]
    """Entry points of kernel providers."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    subject: str
    text: str
    advice: str | None = None


# In each environment.


def probe() -> Probe:
    """Ask this process's Python."""
    return Probe(
        package=__version__,
        python=platform.python_version(),
        device=_device(),
        libraries={name: _version(name) for name in LIBRARIES},
        engines=[found for engine in ENGINES if (found := probe_engine(engine)) is not None],
        kernels={name: _probe_kernels(profile) for name, profile in PROFILES.items()},
        providers=sorted(f"{e.name} ({e.value})" for e in metadata.entry_points(group=ENTRY_POINT_GROUP)),
    )


def probe_engine(engine: Engine) -> EngineProbe | None:
    """Ask an engine of this environment; None where it is not installed."""
    try:
        version = engine.version()
    except EngineError:
        return None
    found = EngineProbe(
        name=engine.NAME, version=version, warning=untested_version_warning(engine.NAME, version, engine.TESTED)
    )
    # Whatever an engine or a plugin raises when it is imported is an answer.
    try:
        found.classes = engine.resolve()
        for name, register in engine.other_plugins().items():
            engine.register()
            ours = engine.resolve()
            register()
            taken = [architecture for architecture, cls in engine.resolve().items() if cls != ours[architecture]]
            if taken:
                found.claims[name] = taken
    except Exception as error:
        found.error = f"{type(error).__name__}: {_first_line(error)}"
    return found


def _probe_kernels(profile: Profile) -> KernelsProbe:
    cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else None
    setting = Setting("cuda" if cuda else "cpu", "sm90" if cuda else "cpu", profile, capability)
    try:
        mode, kernels = mode_from_environment(), offered_kernels()
        ops = bind(setting, mode, kernels)
        uncertified = [
            kernel
            for kernel in kernels
            if refusal(kernel, operations()[kernel.op], setting, "strict") is not None
            and refusal(kernel, operations()[kernel.op], setting, "fast") is None
        ]
    except DSV3Error as error:
        return KernelsProbe(error=str(error))
    providers = sorted({str(choice) for choice in ops.provenance})
    return KernelsProbe(providers=providers, uncertified=len(uncertified))


def _device() -> str:
    if not torch.cuda.is_available():
        return f"CPU, {os.cpu_count()} cores"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, capability {major}.{minor}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]


# Here.


def pythons(environments: Path) -> dict[str, str]:
    """Where environments are, with their Python: this one, and those of the folder that have dsv3-plugin."""
    here = Path(sys.prefix)
    found = {str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here): sys.executable}
    for folder in sorted(environments.iterdir()) if environments.is_dir() else ():
        python = folder / "bin" / "python"
        if python.exists() and folder.resolve() != Path(sys.prefix).resolve() and _has_package(python):
            found[str(folder)] = str(python)
    return found


def _has_package(python: Path) -> bool:
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('dsv3_plugin') is None)"
    return subprocess.run([python, "-P", "-c", code]).returncode == 0


def ask(python: str) -> Probe | str:
    """The probe of another environment, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "probe.json"
        try:
            done = subprocess.run(
                [python, "-P", "-m", "dsv3_plugin.commands.doctor", str(answer)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PROBE_TIMEOUT,
            )
        except subprocess.TimeoutExpired:
            return f"did not answer within {PROBE_TIMEOUT} seconds"
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            return f"cannot be asked: {last[:300]}"
        return Probe.model_validate_json(answer.read_text())


def diagnose(probes: Mapping[str, Probe | str], variables: Mapping[str, str]) -> list[Finding]:
    """What the probes by environment and a process's environment variables mean."""
    findings: list[Finding] = []
    for place, found in probes.items():
        if isinstance(found, str):
            findings.append(
                Finding("problem", place, found, f"look at `{place}/bin/python -m dsv3_plugin.commands.doctor`")
            )
            continue
        if found.package != __version__:
            findings.append(
                Finding(
                    "problem",
                    place,
                    f"has dsv3-plugin {found.package}, this is {__version__}",
                    "install one version everywhere: contracts of two may differ",
                )
            )
        for engine in found.engines:
            findings += _of_engine(place, engine)
        findings += _of_libraries(place, found)
    findings += _of_kernels({place: found for place, found in probes.items() if isinstance(found, Probe)})
    findings += _of_variables(variables)
    return findings


def _of_engine(place: str, engine: EngineProbe) -> Iterable[Finding]:
    subject = f"{engine.name} {engine.version}, {place}"
    choose = next(known.PLUGINS for known in ENGINES if engine.name == known.NAME)
    if engine.warning is not None:
        yield Finding(
            "problem",
            subject,
            engine.warning.split(":")[0],
            f"run `dsv3 conformance run --testee reference --testee {engine.name.lower()}` before you rely on its bits",
        )
    if engine.error is not None:
        yield Finding("problem", subject, engine.error, f"mend this installation of {engine.name}, or remove it")
        return
    own = {architecture: cls for architecture, cls in engine.classes.items() if cls.startswith("dsv3_plugin.")}
    for architecture in engine.classes.keys() - own.keys():
        yield Finding(
            "problem",
            subject,
            f"serves {architecture} by {engine.classes[architecture]}, not by dsv3-plugin",
            f"unset {KILL_SWITCH}" if switched_off() else f"set {choose}=dsv3_plugin, or remove the other plugin",
        )
    for plugin, architectures in engine.claims.items():
        yield Finding(
            "problem",
            subject,
            f"the plugin {plugin} registers {', '.join(architectures)} too: the one that comes last serves",
            f"name the one that you want in {choose}",
        )
    if own:
        yield Finding("fine", subject, f"serves {', '.join(own)} by dsv3-plugin")
    elif not engine.classes:
        yield Finding("fine", subject, "has no registry: dsv3-plugin builds the model inside its loop")


def _of_libraries(place: str, found: Probe) -> Iterable[Finding]:
    """Libraries that harm an engine's own models; dsv3-plugin's are not concerned."""
    deep_gemm = found.libraries.get("sgl-deep-gemm")
    if deep_gemm is not None and any(engine.name == vllm.NAME for engine in found.engines):
        # Its transform_sf_into_required_layout returns float32 scales in memory that it does not own.
        yield Finding(
            "note",
            f"sgl-deep-gemm {deep_gemm}, {place}",
            "vLLM's own fp8 models take it for vLLM's DeepGEMM, and with float32 scales multiply by freed memory",
            "for models that dsv3-plugin does not serve set VLLM_USE_DEEP_GEMM=0",
        )


def _of_kernels(probes: Mapping[str, Probe]) -> Iterable[Finding]:
    """One finding for all profiles and environments that say the same."""
    where: dict[tuple[Level, str], dict[str, list[str]]] = {}
    for place, found in probes.items():
        for profile, kernels in found.kernels.items():
            if kernels.error is None:
                without = f"; {kernels.uncertified} more have no certificate here" if kernels.uncertified else ""
                said: tuple[Level, str] = "fine", ", ".join(kernels.providers) + without
            else:
                # No kernel of a GPU computes in fp32.
                said = "note" if profile == "fp32" and not found.device.startswith("CPU") else "problem", kernels.error
            where.setdefault(said, {}).setdefault(place, []).append(profile)
    for (level, text), profiles in where.items():
        in_all = [", ".join(of_place) for of_place in profiles.values()]
        places = "" if len(profiles) == len(probes) else f", {', '.join(profiles)}"
        subject = f"kernels of {in_all[0]}{places}" if len(set(in_all)) == 1 else f"kernels{places}"
        yield Finding(level, subject, text, "see `dsv3 kernels list`" if level == "problem" else None)


def _of_variables(variables: Mapping[str, str]) -> Iterable[Finding]:
    known: dict[str, Variable] = dict(VARIABLES)
    for engine in ENGINES:
        known |= engine.VARIABLES
    found = False
    for name, read in _ARITHMETIC.items():
        try:
            read(variables)
        except ConfigError as error:
            found = True
            del known[name]  # an arithmetic that there is not has no effect to tell
            yield Finding("problem", "environment variables", str(error), "no model is built with another value")
    for text in wrong_variables(variables):
        found = True
        yield Finding("problem", "environment variables", text, "no model is built with it")
    if switched_off(variables):
        known[KILL_SWITCH] = Variable("engines serve their own DeepSeek-V3")
    for name, variable in known.items():
        value = variables.get(name)
        if value is None or value.lower() in [harmless.lower() for harmless in variable.harmless]:
            continue
        found = True
        if name == MODE_VARIABLE and value not in get_args(Mode):
            continue  # no mode: the kernels' finding says so
        advice = f"unset {name}, or set it alike wherever bits are compared" if variable.level == "problem" else None
        yield Finding(variable.level, f"{name}={value}", variable.effect, advice)
    if not found:
        yield Finding("fine", "environment variables", "none is set that changes numbers")


def main(
    environments: Annotated[
        Path | None, typer.Option(help="Folder with an environment for each engine; .envs if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
) -> None:
    """Whether engines, kernels and environment variables are as they should be; exit status 1 if anything is not."""
    if environments is not None and not environments.is_dir():
        raise EngineError(f"there is no folder {environments}: --environments names one with an environment an engine")
    places = pythons(environments or Path(".envs"))
    console = Console(stderr=True)
    with console.status(f"asking {len(places)} environments"), ThreadPoolExecutor(2) as pool:
        probes = dict(zip(places, pool.map(ask, places.values()), strict=True))
    findings = diagnose(probes, os.environ)
    passed = not any(finding.level == "problem" for finding in findings)
    if as_json:
        answers = {place: found if isinstance(found, str) else found.model_dump() for place, found in probes.items()}
        report = {"passed": passed, "findings": [asdict(f) for f in findings], "environments": answers}
        print(json.dumps(report, indent=1))
    else:
        _print(probes, findings, Console())
    raise typer.Exit(0 if passed else 1)


_MARKS: dict[Level, str] = {"fine": "[green]✓[/]", "note": "[yellow]·[/]", "problem": "[red]✗[/]"}


def _print(probes: Mapping[str, Probe | str], findings: list[Finding], console: Console) -> None:
    devices = {found.device for found in probes.values() if isinstance(found, Probe)}
    console.print(f"dsv3-plugin {__version__}, {'; '.join(sorted(devices))}", highlight=False)
    table = Table(box=None, show_header=False, padding=(0, 2))
    for place, found in probes.items():
        if isinstance(found, Probe):
            libraries = (f"{name} {version}" for name, version in found.libraries.items() if version is not None)
            table.add_row(place, ", ".join((f"Python {found.python}", *libraries)))
    console.print(table, style="dim")
    for finding in findings:
        console.print(
            f"{_MARKS[finding.level]} [bold]{escape(finding.subject)}[/]: {escape(finding.text)}", highlight=False
        )
        if finding.advice is not None:
            console.print(f"    {escape(finding.advice)}", style="cyan", highlight=False)
    problems = sum(finding.level == "problem" for finding in findings)
    words = "Nothing is wrong." if not problems else f"{problems} problem{'s' if problems > 1 else ''}."
    console.print(words, style="red bold" if problems else "green bold")


if __name__ == "__main__":
    # An engine prints what it likes on standard output.
    Path(sys.argv[1]).write_text(probe().model_dump_json())
