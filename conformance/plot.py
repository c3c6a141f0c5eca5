"""The drift of a testee as a picture: how far each module's output is from the specification's, layer after layer.

SVG that stands in the report's page and takes its colours from it, in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from dsv3_plugin.conformance.closeness import Closeness, Drift

_WIDTH, _HEIGHT = 720, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 14, 30
_MARKS = 8
"""Names under the axis, at most."""


@dataclass(frozen=True)
class _Line:
    name: str
    style: str
    drift: Sequence[Drift]


def drift_plot(closeness: Closeness) -> Markup:
    """An `<svg>`: the relative root-mean-square difference of each module, of the testee and of the reference in
    another precision, on a logarithmic axis. Empty where no module of the testee was recorded but its logits.
    """
    streams = [part.stream for part in closeness.drift]
    if len(streams) < 2:
        return Markup()
    lines = (
        _Line("the reference in another precision", "spread", closeness.spread_drift),
        _Line(closeness.testee, "testee", closeness.drift),
    )
    values = [part.relative for line in lines for part in line.drift if part.relative > 0]
    if not values:
        return Markup()
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(stream: str) -> float:
        return _LEFT + width * streams.index(stream) / (len(streams) - 1)

    def y(value: float) -> float:
        return _TOP + height * (high - math.log10(value)) / (high - low)

    parts = []
    for power in range(low, high + 1):
        level = y(10.0**power)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{level + 4:.1f}" text-anchor="end">10<tspan dy="-5">{power}</tspan></text>'
        )
    named = streams[:: -(-len(streams) // _MARKS)]
    for stream in named:
        at = f'x="{x(stream):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle"'
        parts.append(f"<text {at}>{escape(_short(stream))}</text>")
    for line in lines:
        seen = [(x(part.stream), y(part.relative), part) for part in line.drift if part.relative > 0]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down, _ in seen)
        parts.append(f'<polyline class="{line.style}" points="{path}"/>')
        for across, down, part in seen:
            title = f"<title>{escape(line.name)}, {escape(part.stream)}: {part.relative:.2e}</title>"
            parts.append(f'<circle class="{line.style}" cx="{across:.1f}" cy="{down:.1f}" r="3">{title}</circle>')
    label = f"Relative difference of each module of {escape(closeness.testee)} from the reference"
    opening = f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
    return Markup("".join((opening, *parts, "</svg>")))


def _short(stream: str) -> str:
    """A module's name under the axis."""
    return stream.replace("layers.", "").replace("self_attn", "attn").replace("embed_tokens", "embed")
