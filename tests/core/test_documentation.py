"""What `make docs` refuses: it builds this repository's documentation, so a mistake that it lets pass is ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort
from paths import ROOT


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository as git knows it, with what is not committed."""
    files = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    )
    for name in files.splitlines():
        if (ROOT / name).exists() and not name.endswith(".safetensors"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run("git init --quiet && git add --all", cwd=tmp_path, shell=True, check=True)
    return tmp_path


def build_strictly(folder: Path) -> None:
    config = load_config(str(folder / "mkdocs.yml"), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)


def test_files_become_pages_and_tables_are_drawn(copy: Path) -> None:
    build_strictly(copy)
    site = copy / ".work/site"
    assert "One file, its kernel, its tests" in (site / "CONTRIBUTING.html").read_text()
    assert 'href="source/vllm_backend/options.py.html"' in (site / "vllm.html").read_text()
    assert 'id="mla_attention"' in (site / "contracts.html").read_text()
    for page in site.glob("*.html"):
        assert "drawn by docs/hooks" not in page.read_text(), page.name


MISTAKES = {
    "a page that is not there": ("docs/rl.md", "[x](nothing.md)", "docs/rl.md: a link to nothing.md"),
    "a file that is not there": ("docs/rl.md", "[x](../kernels/none.py)", "docs/rl.md: a link to ../kernels/none.py"),
    "in the README": ("README.md", "[x](docs/nothing.md)", "README.md: a link to docs/nothing.md"),
    "a table that there is not": ("docs/rl.md", "<!-- drawn by docs/hooks/tables.py: none -->", "rl.md: no table none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused(mistake: str, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    name, text, says = MISTAKES[mistake]
    _write(copy / name, text)
    with pytest.raises(Abort):
        build_strictly(copy)
    assert says in caplog.text


def test_headings_and_pages_that_nothing_leads_to_are_refused(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(copy / "docs/rl.md", "[x](vllm.md#nowhere)")
    _write(copy / "docs/orphan.md", "# Orphan")
    with pytest.raises(Abort, match="2 warnings"):
        build_strictly(copy)
    assert "does not contain an anchor '#nowhere'" in caplog.text and "orphan.md" in caplog.text


def _write(page: Path, text: str) -> None:
    with page.open("a") as file:
        file.write(f"\n{text}\n")
