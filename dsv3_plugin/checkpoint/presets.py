"""The configurations that ship with the package, and reading one that does not.

`tiny` is for tests and CI. `small` has DeepSeek-V3's real attention sizes, so that kernels which are written for those
sizes run, and a tenth of its vocabulary, whose products would take most of the time on a CPU. `sliceable` is `tiny`
with sums that four ranks can share, in fp8 too. `traps` is `tiny` with weights on which known mistakes show
(`traps.py`), and with DeepSeek-V3's 163,840 positions. `long` is two layers of `small` with both, for long cases where
kernels serve that `traps` is too small for. `four-layers` is DeepSeek-V3 in all but depth, in fp8 with fp32 scales as
it was released: for benchmarks, 54 GB. `deep` has 48 such layers of 16 experts, 52 GB: for benchmarks of drafts, whose
layer is a fifth of the other model.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from dsv3_plugin.config import read_json_object
from dsv3_plugin.errors import ConfigError

PRESETS = ("tiny", "small", "sliceable", "traps", "long", "four-layers", "deep")


def read_config(preset_or_path: str) -> dict[str, Any]:
    """The `config.json` of a preset, a file, or a folder that holds one. Raises `ConfigError` for anything else."""
    if preset_or_path in PRESETS:
        with as_file(files(__package__) / "presets" / f"{preset_or_path}.json") as file:
            return read_json_object(file)
    path = Path(preset_or_path)
    if not path.exists():
        raise ConfigError(f"{preset_or_path}: neither a preset ({', '.join(PRESETS)}) nor a file")
    return read_json_object(path / "config.json" if path.is_dir() else path)
