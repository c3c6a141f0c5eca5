"""The pluggy interface: how kernel providers are found.

A provider is a pluggy plugin under the entry-point group `dsv3_plugin` (or registered by hand) with one hook,
`dsv3_kernels`. The hook runs once, when a model is built; the callables that win are bound to the model, so no hook
call sits in the hot path.

    # pyproject.toml of a provider
    [project.entry-points."dsv3_plugin"]
    my_kernels = "my_package.provider"

    # my_package/provider.py
    @dsv3_plugin.hooks.hookimpl
    def dsv3_kernels() -> list[Kernel]: ...

Strict mode takes a kernel once each of its implementations has a certificate for the machine (`certificates`), which
`dsv3 kernels check --provider NAME --certify FILE` writes; a provider may ship such a file (`Kernel.certificates`).
A certificate is of source code: what else decides over bits, a data file that a module reads, an environment variable,
the state of an object, is not seen and belongs into `Implementation.settings`.
`examples/kernel_provider` is a whole provider.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pluggy
import torch

from dsv3_plugin.errors import KernelError
from dsv3_plugin.profile import Profile

ENTRY_POINT_GROUP = "dsv3_plugin"

Arithmetic = Literal["cpu", "sm90"]

hookspec = pluggy.HookspecMarker(ENTRY_POINT_GROUP)
hookimpl = pluggy.HookimplMarker(ENTRY_POINT_GROUP)


@dataclass(frozen=True)
class Setting:
    """Where an operation will run: what a kernel may look at when it says whether it can serve."""

    device_type: str
    """`cpu` or `cuda`."""
    arithmetic: Arithmetic
    """Whose sums: `cpu`, this machine's tiled products, or `sm90`, those of Hopper's tensor cores, which a CPU can
    model.
    """
    profile: Profile
    capability: tuple[int, int] | None = None
    """CUDA compute capability, (9, 0) for Hopper; None on a CPU."""
    dims: dict[str, int] = field(default_factory=dict)
    """Sizes of the model by their configuration names, e.g. `kv_lora_rank`. Not all may be there: `dsv3 kernels check`
    and `list` ask with a latent's two sizes.
    """


@dataclass(frozen=True)
class Support:
    """Whether a kernel supports a setting. True as a condition if it does; else `reason` says why not."""

    reason: str | None = None

    def __bool__(self) -> bool:
        """Whether it is supported."""
        return self.reason is None


SUPPORTED = Support()

IsSupported = Callable[[Setting], Support]
"""What a provider says of a kernel: whether it supports a setting. Two of them join by `and`."""


def unsupported(reason: str) -> Support:
    """A kernel does not support a setting: `reason` is one line for the user, with what to install if that helps."""
    return Support(reason)


def always(setting: Setting) -> Support:
    """A kernel that supports every setting."""
    return SUPPORTED


def versions_of(*distributions: str) -> Callable[[], dict[str, str]]:
    """What asks for the installed versions of torch and `distributions`, `absent` where one is not there."""

    def versions() -> dict[str, str]:
        found = {"torch": str(torch.__version__)}
        for name in distributions:
            if name == "torch":  # its metadata may not tell the build
                continue
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "absent"
        return found

    return versions


@dataclass(frozen=True)
class Implementation:
    """One piece of code that computes an operation: what a certificate is of.

    Its digest is of `entry`, `module:function`, and of all that this function is made of (`sources`), but for the
    functions `without`, which belong to other implementations or decide between them. `settings` is all else that bits
    depend on: what is compiled in, read or held. `versions` are those of compilers and libraries that make its bits, of
    torch and of all packages that its code imports if they are not given.
    """

    name: str
    run: Callable[..., Any]
    """It and no other, with the operation's arguments. Raises `InputError` for a shape that it does not take."""
    entry: str
    """Empty where no function of a module is all there is to it: then it gets no certificate."""
    without: tuple[str, ...] = ()
    settings: Callable[[], str] = str
    versions: Callable[[], dict[str, str]] | None = None
    shapes: str = "every shape"
    """Which shapes its kernel gives it, in words."""


@dataclass(frozen=True)
class Kernel:
    """What a provider offers for one operation.

    `run` takes the arguments of the operation's declaration in `dsv3_plugin.ops`; with `@implements(operation)` on it
    mypy compares the two. `is_supported` says whether the kernel supports a setting, and if not, why: also that
    something is not installed, and what to install, so that a model is refused when it is built and not in its first
    request. Among kernels that may serve, the highest `priority` wins.
    """

    op: str
    contract_version: int
    provider: str
    version: str
    run: Callable[..., Any]
    is_supported: IsSupported = always
    implementations: tuple[Implementation, ...] = ()
    """All that `run` may hand to on this machine. If none is named, `run` is the one."""
    certificates: Path | None = None
    """The file of certificates that the provider ships."""
    uncertified: str | None = None
    """Why strict mode never takes it: what was measured."""
    served: Callable[[], dict[str, str]] = dict
    """Of a kernel that chooses by shape: the shapes so far, each with the implementation that it was given."""
    priority: int = 0

    @property
    def parts(self) -> tuple[Implementation, ...]:
        """`implementations`, or `run` as the only one.

        Of `run` a certificate can be only where it is a top-level function of a module, or a partial of one with plain
        values: a closure, a method or an object has a state that its source does not tell.
        """
        if self.implementations:
            return self.implementations
        run: Any = self.run
        settings, is_plain = "", True
        if type(run) is partial:
            values = [*run.args, *run.keywords.values()]
            is_plain = all(value is None or isinstance(value, _PLAIN) for value in values)
            run, settings = run.func, repr((run.args, run.keywords))
        named = run if hasattr(run, "__qualname__") else type(run)
        name, module = named.__qualname__, str(named.__module__)
        is_found_again = getattr(sys.modules.get(module), name, None) is run
        entry = f"{module}:{name}" if is_plain and is_found_again else ""
        return (Implementation(name, self.run, entry, settings=lambda: settings),)


_PLAIN = (bool, int, float, str, bytes, torch.dtype)
"""Types of which `repr` tells all."""


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Whatever a provider's code raises, also to end the process, becomes a `KernelError` of one line that begins with
    `what`.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise KernelError(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}") from error


@hookspec
def dsv3_kernels() -> list[Kernel]:
    """The kernels that this provider offers."""
    raise NotImplementedError
