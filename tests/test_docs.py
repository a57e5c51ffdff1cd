"""README and docs: what they link to is there, and every picture that is kept is shown."""

import ast
import re

import pytest
from documented import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(page):
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def links(page):
    """What a page links to on this disk, pictures included: (file, anchor or "")."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            found.append(((page.parent / path).resolve() if path else page, anchor))
    return found


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} links to {path.relative_to(ROOT)}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {path.name}#{anchor}"


def test_every_picture_that_is_kept_is_shown_on_a_page():
    shown = {path for page in PAGES for path, _ in links(page)}
    kept = [path for path in (ROOT / "docs/pictures").rglob("*") if path.is_file()]
    assert [path.relative_to(ROOT) for path in kept if path.resolve() not in shown] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_in_python_can_be_read_and_import_what_is_there(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "mas":
                module = __import__(node.module, fromlist=["*"])
                assert all(hasattr(module, alias.name) for alias in node.names)
