"""One implementation on random cases, bit for bit against the definition of its arithmetic."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from dsv3_plugin import certificates
from dsv3_plugin.errors import InputError
from dsv3_plugin.hooks import Implementation
from dsv3_plugin.kernels.certify.findings import MODEL_ON_CPU, Broken, Finding, Result, broke
from dsv3_plugin.kernels.certify.targets import Target, Where
from dsv3_plugin.ops.drawing import Case, Sizes, in_fp32
from dsv3_plugin.ops.paged_batch import PagedBatch
from dsv3_plugin.registry import definitions


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
    """A copy of a tensor with its strides, or of a batch's tensors, on `device`; anything else as it is."""
    if isinstance(value, PagedBatch):
        table, lengths, starts = (copied(x, device) for x in value.tensors)
        return replace(value, block_table=table, seq_lens=lengths, query_start_loc=starts)
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_contiguous() or value.element_size() == 1:
        return value.to(device, copy=True)
    # A view keeps its gaps: the storage moves, not the elements.
    whole = value.as_strided((value.untyped_storage().size() // value.element_size(),), (1,), 0)
    return whole.to(device, copy=True).as_strided(value.shape, value.stride(), value.storage_offset())


def is_changed(before: Any, after: Any) -> bool:
    """Whether a call wrote into this argument."""
    if isinstance(before, PagedBatch):
        return bits_differ(before.tensors, after.tensors) > 0
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
        page_sizes=frozenset({case.args[1].shape[1]} if target.op.page_sizes else ()),
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
    model_on_cpu = Target(model, Implementation(MODEL_ON_CPU, model.run, ""))
    found: dict[int, Finding] = {}

    def add(index: int, target: Target, on: str) -> None:
        """An implementation that broke is not asked again."""
        before = found.get(index)
        if isinstance(before, Broken):
            return
        try:
            result = check_case(target, number, case, expected, on)
        except Exception as error:  # the others are checked, and the answer says that one was not
            found[index] = broke(target, error)
        else:
            if result.cases:
                result = result._replace(dtypes=frozenset({certificates.dtype_name(dtype)}))
            found[index] = before.and_then(result) if before else result

    for number in numbers:
        dtype = dtypes[number % len(dtypes)]
        try:
            with torch.device(where.model):
                case = targets[0].op.draw(random.Random(f"{model.op}/{seed}/{number}"), at)
            case = in_fp32(case) if dtype == torch.float32 else case
            expected = model.run(*case.args, **case.kwargs)
        except Exception as error:  # a kernel may have broken the card's state
            return [*found.values(), broke(model_on_cpu, error)]
        for index, target in enumerate(targets):
            add(index, target, where.kernels)
        if where.cpu_every and number % where.cpu_every == 0:
            add(len(targets), model_on_cpu, "cpu")
    return list(found.values())
