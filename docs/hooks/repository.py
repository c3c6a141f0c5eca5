"""The repository's own files as pages of the site, so that one text serves both readers and every link is checked.

README, CONTRIBUTING and CHANGELOG are pages. Any other file of the repository that a page links to becomes a page of
its own, out of the navigation: markdown as it is, other text as code. A link to a folder becomes the folder's name.
Links in the sources are those that GitHub follows, relative to the file that they stand in.
"""

from __future__ import annotations

import os
import posixpath
import re
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
_LINK = re.compile(r"""(?P<before>\]\(|\b(?:src|srcset|href)=")(?P<target>[^)\s"#:]+)(?P<anchor>#[^)\s"]*)?(?P<after>\)|")""")
_FENCE = re.compile(r"^(```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's pages, and the files that any page links to."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=_rewritten(ROOT / name, uri)))
    waiting = [(ROOT / name).read_text() for name in PAGES]
    places = [ROOT for _ in PAGES]
    for page in files.documentation_pages():
        if page.abs_src_path:
            waiting.append(Path(page.abs_src_path).read_text())
            places.append(Path(page.abs_src_path).parent)
    while waiting:
        text, place = waiting.pop(), places.pop()
        for path in _linked(text, place):
            uri = _uri(path)
            if path.is_dir() or _is_in_docs(path) or files.get_file_from_path(uri):
                continue
            if path.suffix in _IMAGES:
                files.append(File.generated(config, uri, abs_src_path=str(path)))
                continue
            page = File.generated(config, uri, content=_source_page(path, uri), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
            if path.suffix == ".md":
                waiting.append(path.read_text())
                places.append(path.parent)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that lead out of docs/ lead to the pages that `on_files` made."""
    source = page.file.abs_src_path
    if page.file.generated_by or not source:
        return markdown
    return _rewrite(markdown, Path(source).parent, page.file.src_uri)


def _linked(text: str, place: Path) -> list[Path]:
    """The files of the repository that a text links to. Raises `PluginError` for one that is not there."""
    found = []
    for match in _LINK.finditer(_FENCE.sub("", text)):
        path = (place / match["target"]).resolve()
        if not path.is_relative_to(ROOT) or not path.exists():
            raise PluginError(f"{place.relative_to(ROOT)}: a link to {match['target']}, which is not there")
        found.append(path)
    return found


def _uri(path: Path) -> str:
    """Where a file of the repository is in the site."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if _is_in_docs(path):
        return path.relative_to(ROOT / "docs").as_posix()
    return f"source/{name}" if path.suffix in (".md", *_IMAGES) else f"source/{name}.md"


def _is_in_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs") and "hooks" not in path.parts


def _rewritten(path: Path, uri: str) -> str:
    return _rewrite(path.read_text(), path.parent, uri)


def _rewrite(text: str, place: Path, uri: str) -> str:
    """`text` of a file in the folder `place`, with its links as they are from the page `uri`."""

    def link(match: re.Match[str]) -> str:
        path = (place / match["target"]).resolve()
        if path.is_dir():
            path = next((each for name in ("README.md", "__init__.py") if (each := path / name).exists()), path)
        target = posixpath.relpath(_uri(path), posixpath.dirname(uri) or ".")
        return f"{match['before']}{target}{match['anchor'] or ''}{match['after']}"

    parts = _FENCE.split(text)
    return "".join(part if i % 2 else _LINK.sub(link, part) for i, part in enumerate(parts))


def _source_page(path: Path, uri: str) -> str:
    """A file of the repository as a page that no search finds."""
    name = path.relative_to(ROOT).as_posix()
    head = f"---\ntitle: {os.path.basename(name)}\nsearch:\n  exclude: true\n---\n"
    if path.suffix == ".md":
        return head + _rewritten(path, uri)
    return f"{head}# {name}\n\n````{_LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"
