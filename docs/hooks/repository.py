"""The repository's own files as pages of the site, so that one text serves both readers and every link is checked.

README, CONTRIBUTING and CHANGELOG are pages. Any other file of the repository that a page links to becomes a page of
its own, out of the navigation: markdown as it is, other text as code, a folder as a list of what its files are.
Links in the sources are those that GitHub follows, relative to the file that they stand in.
"""

from __future__ import annotations

import ast
import posixpath
import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Files of the repository, and where they are in the site."""
_LANGUAGES = {".py": "python", ".cu": "cuda", ".cuh": "cuda", ".toml": "toml", ".json": "json", ".yml": "yaml"}
_IMAGES = (".png", ".svg")
_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?P<after>\))")
_CODE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages, and the files that any page links to."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=_rewritten(ROOT / name, uri)))
    pages = [page.abs_src_path for page in files.documentation_pages()]
    waiting = [*(ROOT / name for name in PAGES), *(Path(path) for path in pages if path)]
    while waiting:
        for path in _linked(waiting.pop()):
            uri = _uri(path)
            if _is_in_docs(path) or files.get_file_from_path(uri):
                continue
            if path.suffix in _IMAGES:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
                continue
            content = _folder_page(path) if path.is_dir() else _source_page(path, uri)
            files.append(File.generated(config, uri, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
            if path.suffix == ".md":
                waiting.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that lead out of docs/ lead to the pages that `on_files` made."""
    source = page.file.abs_src_path
    if page.file.generated_by or not source:
        return markdown
    return _rewrite(markdown, Path(source).parent, page.file.src_uri)


def _linked(page: Path) -> list[Path]:
    """The repository's files that a page links to. Raises `PluginError` for one that is not there."""
    found = []
    for match in _LINK.finditer(_CODE.sub("", page.read_text())):
        path = (page.parent / match["target"]).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            raise PluginError(f"{page.relative_to(ROOT)}: a link to {match['target']}, which is not there")
        found.append(path)
    return found


def _uri(path: Path) -> str:
    """Where a file of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if _is_in_docs(path):
        return path.relative_to(ROOT / "docs").as_posix()
    if path.is_dir():
        return f"source/{name}/index.md"
    return f"source/{name}" if path.suffix in (".md", *_IMAGES) else f"source/{name}.md"


def _is_in_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs") and "hooks" not in path.parts


def _rewritten(path: Path, uri: str) -> str:
    return _rewrite(path.read_text(), path.parent, uri)


def _rewrite(text: str, place: Path, uri: str) -> str:
    """`text` of a file in the folder `place`, with its links as they are from the page `uri`."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.relpath(_uri((place / match["target"]).resolve()), posixpath.dirname(uri) or ".")
        return f"{match['before']}{target}{match['anchor'] or ''}{match['after']}"

    parts = _CODE.split(text)
    return "".join(part if i % 2 else _LINK.sub(link, part) for i, part in enumerate(parts))


def _source_page(path: Path, uri: str) -> str:
    """A file as a page."""
    if path.suffix == ".md":
        return _head(path) + _rewritten(path, uri)
    language = _LANGUAGES.get(path.suffix, "text")
    return f"{_head(path)}# {path.relative_to(ROOT)}\n\n````{language}\n{path.read_text()}\n````\n"


def _folder_page(folder: Path) -> str:
    """What lies in a folder: each file with the first line that it says of itself."""
    names = subprocess.check_output(["git", "ls-files", "."], cwd=folder, text=True).splitlines()
    lines = [f"# {folder.relative_to(ROOT)}", "", "| file | |", "|---|---|"]
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        idea = ""
        if name.endswith(".py"):
            docstring = ast.get_docstring(ast.parse((folder / name).read_text())) or ""
            idea = " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {idea} |")
    return _head(folder) + "\n".join(lines) + "\n"


def _head(path: Path) -> str:
    return f"---\ntitle: {path.name}\nsearch:\n  exclude: true\n---\n"
