"""What an operation is: one declaration, from which all else follows.

    @operation(version=2, summary="silu(gate) * up in fp32, one rounding")
    def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
        ...  # the reference, which defines every bit

    @silu_and_mul.gradient
    def _differentiable(ops: BoundKernels, gate_up: torch.Tensor) -> torch.Tensor:
        ...  # the bound kernel, ops[silu_and_mul], with a backward pass

    @silu_and_mul.cases
    def _cases(rng: random.Random, at: Sizes) -> Case:
        ...  # random arguments, on which kernels are compared with the reference

It lies in a module of `dsv3_plugin.ops`, where `operations` finds it: the registry, the reference provider, the model
of Hopper, `dsv3 kernels check` and the training know it from there. Its Triton kernel is the function of its name in
`dsv3_plugin.kernels.triton`, in the module of the same name; any kernel says `@implements(silu_and_mul)`. Its type is
that of its reference everywhere: `ops[silu_and_mul](x)` in a layer, and in each kernel.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast

from dsv3_plugin.ops.drawing import Case, Sizes
from dsv3_plugin.ops.products import CPU, Products
from dsv3_plugin.profile import Profile

P = ParamSpec("P")
R = TypeVar("R")
P2 = ParamSpec("P2")
R2 = TypeVar("R2")


class BoundKernels(Protocol):
    """A model's kernels: `registry.Ops`."""

    def __getitem__(self, op: Operation[P2, R2], /) -> Callable[P2, R2]:
        """The kernel of `op`."""


class Operation(Generic[P, R]):
    """An operation's declaration; called, it is its reference on a CPU. Made by `operation` and `matrix_operation`."""

    def __init__(
        self,
        function: Callable[..., R],
        on: Callable[[Products], Callable[P, R]] | None,
        *,
        version: int,
        summary: str,
        fp8: bool = False,
        sliced: bool = False,
        training: bool = False,
        two_form: bool = False,
        dims: tuple[str, ...] = (),
        page_sizes: Iterable[int] = (),
    ) -> None:
        functools.update_wrapper(self, function)
        self._on = on
        self._reference: Callable[P, R] = on(CPU) if on else function
        self._gradient: Callable[Concatenate[BoundKernels, P], R] | None = None
        self._cases: Callable[[random.Random, Sizes], Case] | None = None
        self.name = function.__name__
        self.version = version
        """Of its contract. Any change of a bit is a new version."""
        self.summary = summary
        self.fp8 = fp8
        """Whether only FP8 profiles use it."""
        self.sliced = sliced
        """Whether only profiles in several reduction slices use it."""
        self.training = training
        """Whether only backward passes call it: a server has no kernel of it, and needs no certificate."""
        self.two_form = two_form
        """Whether only profiles with two forms of attention use it."""
        self.dims = dims
        """Sizes of the model, by their configuration names, about which a kernel may be particular."""
        self.page_sizes = frozenset(page_sizes)
        """Keys of a page for which a kernel must have been compared; empty where it reads no pages."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The reference on a CPU."""
        return self._reference(*args, **kwargs)

    def __repr__(self) -> str:
        """With its version."""
        return f"<operation {self.name}, contract version {self.version}>"

    def __reduce__(self) -> str:
        """Copied and pickled by name, as a function is."""
        return self.name

    @property
    def module(self) -> str:
        """The name of its file, without folder and ending."""
        return self.__module__.rpartition(".")[2]

    @property
    def signature(self) -> inspect.Signature:
        """Of its kernels."""
        found = inspect.signature(self)
        arguments = list(found.parameters.values())
        return found.replace(parameters=arguments[1:] if self._on else arguments)

    @property
    def defined_by(self) -> tuple[str, ...]:
        """Where its definition begins, as `module:name`: constants from there on are the contract's."""
        reference = f"{self.__module__}:{self.name}"
        return (reference, f"{Products.__module__}:CPU") if self._on else (reference,)

    def is_used_by(self, profile: Profile, *, training: bool = False) -> bool:
        """Whether a model in this profile calls it; with `training`, whether its backward pass does alone."""
        return (
            self.training == training
            and (profile.is_fp8 or not self.fp8)
            and (profile.reduction_slices > 1 or not self.sliced)
            and (profile.attention == "two_form" or not self.two_form)
        )

    def on(self, products: Products) -> Callable[P, R]:
        """The reference with the products of another machine; itself if it has none."""
        return self._on(products) if self._on else self

    def gradient(
        self, function: Callable[Concatenate[BoundKernels, P], R]
    ) -> Callable[Concatenate[BoundKernels, P], R]:
        """Declare the operation in training: forward the bits of a model's kernel, and a backward pass."""
        self._gradient = function
        return function

    def differentiable(self, ops: BoundKernels) -> Callable[P, R]:
        """The kernel in `ops` with a backward pass; as it is, where training does not use the operation."""
        return cast(Callable[P, R], functools.partial(cast(Any, self._gradient), ops)) if self._gradient else ops[self]

    def cases(self, draw: Callable[[random.Random, Sizes], Case]) -> Callable[[random.Random, Sizes], Case]:
        """Declare what draws arguments, which kernels are compared on."""
        self._cases = draw
        return draw

    def draw(self, rng: random.Random, at: Sizes) -> Case:
        """Random arguments of sizes `at`."""
        assert self._cases is not None, f"{self.name} has no cases: declare them with @{self.name}.cases"
        return self._cases(rng, at)

    def case(self, *args: P.args, **kwargs: P.kwargs) -> Case:
        """The arguments of one call."""
        return Case(args, kwargs)


def operation(
    *,
    version: int,
    summary: str,
    fp8: bool = False,
    sliced: bool = False,
    training: bool = False,
    two_form: bool = False,
    dims: tuple[str, ...] = (),
    page_sizes: Iterable[int] = (),
) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Declare the decorated function as an operation's reference."""

    def declare(function: Callable[P, R]) -> Operation[P, R]:
        return Operation(
            function,
            None,
            version=version,
            summary=summary,
            fp8=fp8,
            sliced=sliced,
            training=training,
            two_form=two_form,
            dims=dims,
            page_sizes=page_sizes,
        )

    return declare


def matrix_operation(
    *,
    version: int,
    summary: str,
    fp8: bool = False,
    sliced: bool = False,
    training: bool = False,
    two_form: bool = False,
    dims: tuple[str, ...] = (),
    page_sizes: Iterable[int] = (),
) -> Callable[[Callable[Concatenate[Products, P], R]], Operation[P, R]]:
    """The same of a function that contains matrix products: it takes the machine's as its first argument, which
    kernels do not have.
    """

    def declare(function: Callable[Concatenate[Products, P], R]) -> Operation[P, R]:
        def on(products: Products) -> Callable[P, R]:
            return cast(Callable[P, R], functools.partial(cast(Any, function), products))

        return Operation(
            function,
            on,
            version=version,
            summary=summary,
            fp8=fp8,
            sliced=sliced,
            training=training,
            two_form=two_form,
            dims=dims,
            page_sizes=page_sizes,
        )

    return declare


def implements(op: Operation[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare that the decorated function is a kernel of `op`, with its signature. It stays as it is."""
    return lambda kernel: kernel


@functools.cache
def operations() -> Mapping[str, Operation[..., Any]]:
    """All that are declared, by name; in the order of files, then of declarations."""
    return MappingProxyType({op.name: op for op in _declared()})


def _declared() -> Iterator[Operation[..., Any]]:
    package = importlib.import_module(__package__)
    for name in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        module = importlib.import_module(f"{__package__}.{name}")
        for value in vars(module).values():
            if isinstance(value, Operation) and value.__module__ == module.__name__:
                yield value
