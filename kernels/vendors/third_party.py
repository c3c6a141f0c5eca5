"""What the providers of other people's kernels share: kernels made of what they offer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dsv3_plugin.hooks import Implementation, IsSupported, Kernel
from dsv3_plugin.kernels.hopper import CERTIFICATES
from dsv3_plugin.ops.operation import Operation


class Offer(NamedTuple):
    """One operation of a provider; the fields as in `Kernel`."""

    op: Operation[..., Any]
    run: Callable[..., Any]
    implementations: tuple[Implementation, ...] = ()
    uncertified: str | None = None
    served: Callable[[], dict[str, str]] = dict
    priority: int = 0


def kernels_of(provider: str, version: str | None, is_supported: IsSupported, *offers: Offer) -> list[Kernel]:
    """The offers as kernels of one provider; `version` is None where it is not installed."""
    return [
        Kernel(
            op=offer.op.name,
            contract_version=offer.op.version,
            provider=provider,
            version=version or "absent",
            run=offer.run,
            is_supported=is_supported,
            implementations=offer.implementations,
            certificates=CERTIFICATES,
            uncertified=offer.uncertified,
            served=offer.served,
            priority=offer.priority,
        )
        for offer in offers
    ]
