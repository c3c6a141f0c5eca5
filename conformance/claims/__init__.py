"""What a backend claims, and what it does not: a file of its own, which a verification card is written against.

testee = "vllm"              # how the suite knows it
package = "vllm"             # whose version the claims are of

[[claim]]                    # of every row, bit for bit
versions = ">=0.26,<=0.32"
devices = ["cpu"]
profiles = ["bf16", "fp8"]
layouts = ["one", "tp=2"]

[[not_claimed]]
what = "drafts in pipeline stages"
reason = "the engine has none there"
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion
from pydantic import BaseModel, ConfigDict, Field, field_validator

from dsv3_plugin.conformance.layouts import ParallelLayout
from dsv3_plugin.conformance.protocol import Claim as Kind
from dsv3_plugin.conformance.protocol import Device
from dsv3_plugin.conformance.toml_file import read_toml
from dsv3_plugin.errors import ConformanceError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Claim(_Part):
    """Of some versions, in all combinations of what it names."""

    versions: str
    devices: tuple[Device, ...] = Field(min_length=1)
    profiles: tuple[Annotated[str, Field(pattern=r"^(bf16|fp32|fp8)( two_form)?$")], ...] = Field(min_length=1)
    """`bf16`, `fp32`, `fp8`; `fp8 two_form`. In how many slices it is computed, the layout says."""
    layouts: tuple[str, ...] = ("one",)
    promise: Kind = "equality"

    @field_validator("versions")
    @classmethod
    def _is_a_specifier(cls, value: str) -> str:
        try:
            SpecifierSet(value)
        except InvalidSpecifier as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("layouts")
    @classmethod
    def _are_layouts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return tuple(str(ParallelLayout.parse(text)) for text in value)
        except ConformanceError as error:
            raise ValueError(str(error)) from None

    def is_of(self, version: str) -> bool:
        """Whether it speaks of a version of the package."""
        try:
            return SpecifierSet(self.versions).contains(version, prereleases=True)
        except InvalidVersion:
            return False


class NotClaimed(_Part):
    """Something that a reader might expect."""

    what: str = Field(min_length=1)
    reason: str = Field(min_length=1)


class Setting(_Part):
    """What one run tries."""

    profile: str
    layout: str


class Claims(_Part):
    """A whole file."""

    testee: str
    package: str
    claim: tuple[Claim, ...] = Field(min_length=1)
    not_claimed: tuple[NotClaimed, ...] = ()

    @classmethod
    def read(cls, file: Path) -> Claims:
        """Raises `ConformanceError` where the file is none."""
        return read_toml(cls, file, "--claims")

    def of(self, version: str, device: str) -> Iterator[tuple[Setting, Kind]]:
        """Everything that is claimed of a version on a kind of device, each once."""
        seen: set[Setting] = set()
        for claim in self.claim:
            if device in claim.devices and claim.is_of(version):
                for profile in claim.profiles:
                    for layout in claim.layouts:
                        setting = Setting(profile=profile, layout=layout)
                        if setting not in seen:
                            seen.add(setting)
                            yield setting, claim.promise


def shipped() -> list[Claims]:
    """Those of this package's testees, and of its examples."""
    folder = resources.files(__package__)
    files = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return [Claims.model_validate(tomllib.loads(folder.joinpath(name).read_text())) for name in files]
