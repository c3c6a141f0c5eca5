"""A copy of the package as an installation lays it out; here half of it lies in folders of other names."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

from paths import ROOT


def install(target: Path) -> Path:
    """Copy the package's modules to where an installation into `target` puts them."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    for package in ["dsv3_plugin", *sorted(folders)]:
        shutil.copytree(
            ROOT / folders.get(package, package),
            target / package.replace(".", "/"),
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
    return target
