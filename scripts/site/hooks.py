"""MkDocs' hooks: README.md is the first page, and what the pages link to outside of docs/ stays reachable.

Without a ``repo_url`` in mkdocs.yml there is no address for such files: their links become plain text.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INDEX = "index.md"
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]\n]+)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
PICTURE = re.compile(r"!\[(?P<text>[^\]\n]*)\]\((?P<target>[^)\s]+)\)")
MARKER = re.compile(r"^<!-- .*\[\[\[(?:cog|end).*-->$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page."""
    files.append(File.generated(config, INDEX, content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page without cog's markers, with links as they are needed in the site."""
    folder = ROOT if page.file.src_uri == INDEX else DOCS

    def link(found: re.Match) -> str:
        path = (folder / found["target"]).resolve()
        if not path.exists():  # an address, or an error that MkDocs reports
            return found[0]
        if path.is_relative_to(DOCS):
            return f"[{found['text']}]({path.relative_to(DOCS)}{found['anchor'] or ''})"
        return source_link(found["text"], path, config.repo_url)

    def picture(found: re.Match) -> str:
        path = (folder / found["target"]).resolve()
        return f"![{found['text']}]({path.relative_to(DOCS)})" if path.is_relative_to(DOCS) else found[0]

    return PICTURE.sub(picture, LINK.sub(link, MARKER.sub("", markdown)))


def source_link(text: str, path: Path, repository: str | None) -> str:
    """Return a link to a file of the repository; only its text where no address is known."""
    if repository is None:
        return text
    return f"[{text}]({repository.rstrip('/')}/blob/main/{path.relative_to(ROOT)})"
