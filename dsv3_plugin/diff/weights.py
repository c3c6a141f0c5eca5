"""The second step: do both sides hold the same weights, tensor by tensor, under Hugging Face's names?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from dsv3_plugin.checkpoint.fingerprint import Fingerprint
from dsv3_plugin.checkpoint.names import BIAS_SUFFIX
from dsv3_plugin.diff.sides import Side
from dsv3_plugin.diff.steps import Step, counted

ABSENT = "absent"
UNKNOWN = "unknown"


def compare_weights(left: Side, right: Side) -> Step:
    """Compare each version that both sides tell the weights of. Where they differ, say which older version's tensor a
    side holds, if any side told that version's.
    """
    common = sorted(left.weights.keys() & right.weights.keys())
    if not common:
        lacking = [side.name for side in (left, right) if not side.weights]
        why = f"{' and '.join(lacking)} told none" if lacking else "the sides told no version in common"
        return Step("weights", "unknown", (f"no fingerprints to compare: {why}",))
    for version in common:
        one, two = left.weights[version], right.weights[version]
        if names := in_order(one.difference(two)):
            return _different(left, right, version, names)
    tensors = len(left.weights[common[-1]].tensors)
    versions = ", ".join(map(str, common))
    return Step("weights", "equal", (f"{counted(tensors, 'tensor')} of version {versions} are the same",))


def _different(left: Side, right: Side, version: int, names: list[str]) -> Step:
    total = len(left.weights[version].tensors | right.weights[version].tensors)
    held: dict[str, Counter[str]] = {}
    for side, other in ((left, right), (right, left)):
        held[side.name] = Counter(_origin(name, side.weights[version], other.weights, version) for name in names)
    says = []
    for name, origins in held.items():
        for origin, count in origins.items():
            if origin == ABSENT:
                says.append(f"{name} lacks {count} of {total:,} tensors of version {version}")
            elif origin != UNKNOWN:
                says.append(f"{name}: {count} of {total:,} tensors are those of version {origin}, not {version}")
    kinds = ", ".join(_kinds(names, left.weights[version].tensors | right.weights[version].tensors))
    says.append(f"{len(names):,} of {total:,} tensors of version {version} differ, first {names[0]}: {kinds}")
    found = {"version": version, "different": names, "of": total, "held": {k: dict(v) for k, v in held.items()}}
    return Step("weights", "different", tuple(says), found)


def _origin(name: str, held: Fingerprint, versions: Mapping[int, Fingerprint], version: int) -> str:
    """Whose tensor `name` is, among the `versions` that the other side told of."""
    if name not in held.tensors:
        return ABSENT
    for older in sorted(versions, reverse=True):
        if older != version and versions[older].tensors.get(name) == held.tensors[name]:
            return str(older)
    return UNKNOWN


def _kinds(names: list[str], tensors: Mapping[str, str]) -> list[str]:
    """How many of which kind: what tends to be forgotten together."""
    mtp = {prefix for name in tensors if (prefix := name.partition(".eh_proj.")[0]) != name}

    def kind(name: str) -> str:
        if any(name.startswith(f"{prefix}.") for prefix in mtp):
            return "of the MTP layer"
        if name.endswith(BIAS_SUFFIX):
            return "router biases"
        return "of routed experts" if ".mlp.experts." in name else "other weights"

    return [f"{count} {what}" for what, count in Counter(map(kind, names)).items()]


def in_order(names: list[str]) -> list[str]:
    """As the model runs: the embedding, layers by number, the norm, the head."""
    first = {"model.embed_tokens": 0, "model.layers": 1, "model.norm": 2}

    def order(name: str) -> tuple[int, list[int | str]]:
        numbers: list[int | str] = [int(part) if part.isdigit() else part for part in name.split(".")]
        match = re.match(r"model\.\w+", name)
        return first.get(match[0] if match else "", 3), numbers

    return sorted(names, key=order)
