"""The site builds without a warning, and shows formulas, tables and pictures whole, on a phone and in the dark too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra 'docs'")

ROOT = Path(__file__).resolve().parent.parent
CSS = (ROOT / "docs" / "assets" / "site.css").read_text()
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
Element = tuple[str, dict[str, str | None]]


class Page(HTMLParser):
    """The elements within the article of a page, each with those that it stands in."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[Element] = []
        self.elements: list[tuple[Element, list[Element]]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs))
        if any(name == "article" for name, _ in self.open):
            self.elements.append((element, list(self.open)))
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self.open):
            while self.open.pop()[0] != tag:
                pass

    def all(self, tag: str) -> list[tuple[dict[str, str | None], list[Element]]]:
        return [(attrs, within) for (name, attrs), within in self.elements if name == tag]


def has_class(element: Element, name: str) -> bool:
    return name in (element[1].get("class") or "").split()


def rules(selector: str) -> str:
    """What site.css says of a selector, by itself or in a list."""
    css = re.sub(r"/\*.*?\*/", "", CSS, flags=re.DOTALL)
    return "".join(
        body
        for selectors, body in re.findall(r"([^{}]+)\{([^{}]*)\}", css)
        if selector in [one.strip() for one in selectors.split(",")]
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """By the name of the Markdown file."""
    names = [source.relative_to(ROOT / "docs") for source in sorted((ROOT / "docs").rglob("*.md"))]
    return {
        str(name): Page(site / ("" if name.name == "index.md" else name.with_suffix("")) / "index.html")
        for name in names
    }


def test_the_reference_and_the_formulas_are_there(site: Path) -> None:
    assert 'id="dgi_kernels.cosine_cross_entropy"' in (site / "api" / "ops" / "index.html").read_text()
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "```math" not in text and "$`" not in text and not re.search(r"<<<<<<<|&lt;&lt;&lt;&lt;", text)


def test_each_equation_stands_by_itself_and_none_scrolls(pages: dict[str, Page]) -> None:
    for name, page in pages.items():
        blocks = re.findall(r"^```math\n(.*?)^```$", (ROOT / "docs" / name).read_text(), re.MULTILINE | re.DOTALL)
        equations = [within for attrs, within in page.all("math") if attrs["display"] == "block"]
        assert len(equations) == sum(block.count(r"\qquad") + 1 for block in blocks), name
        assert all(has_class(within[-1], "formula") for within in equations)
        for _, within in page.all("math"):  # but within a table that scrolls as a whole
            scrolling = any(element[0] == "pre" or has_class(element, "wide") for element in within)
            assert not scrolling or any(element[0] == "table" for element in within)
    assert "flex-wrap: wrap" in rules(".md-typeset .formula") and "overflow" not in rules(".md-typeset .formula")


def test_each_table_stands_in_a_box_that_scrolls(pages: dict[str, Page]) -> None:
    tables = [(attrs, within) for page in pages.values() for attrs, within in page.all("table") if "class" not in attrs]
    assert len(tables) > 10
    for _, within in tables:
        assert has_class(within[-1], "wide") and within[-1][1]["tabindex"] == "0"
    assert "overflow-x: auto" in rules(".md-typeset .wide")


def test_long_titles_of_columns_may_break(site: Path) -> None:
    titles = re.findall(r"<th[^>]*>(.*?)</th>", (site / "performance" / "index.html").read_text())
    words = [re.sub("<(?!wbr)[^>]+>", "", word) for title in titles for word in re.split(r"[ -]|&nbsp;", title)]
    assert "cross_<wbr>entropy" in "".join(words)
    assert max(len(part) for word in words for part in word.split("<wbr>")) <= 13


def test_each_picture_has_both_themes_and_a_text_that_says_what_it_shows(pages: dict[str, Page]) -> None:
    pictures = [(name, attrs) for name, page in pages.items() for attrs, _ in page.all("img")]
    assert pictures
    themes: dict[tuple[str, str], list[str]] = {}
    for name, attrs in pictures:
        path, _, theme = str(attrs["src"]).partition("#only-")
        assert path.endswith(f"-{theme}.svg") and (ROOT / "docs" / "assets" / Path(path).name).is_file()
        assert len((attrs["alt"] or "").split()) > 10
        themes.setdefault((name, str(attrs["alt"])), []).append(theme)
    assert all(sorted(of_picture) == ["dark", "light"] for of_picture in themes.values())
    for picture in re.findall(r"<picture>.*?</picture>", (ROOT / "README.md").read_text(), re.DOTALL):
        dark, light = re.search(r'dark\)" srcset="(.*?)"', picture), re.search(r'<img alt="(.*?)" src="(.*?)"', picture)
        assert dark and light and dark[1] == light[2].replace("-light", "-dark") and len(light[1].split()) > 10


def test_no_text_is_tiny_and_nothing_comes_from_elsewhere(site: Path) -> None:
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)rem", CSS)]
    assert sizes and min(sizes) >= 0.6  # 12 pixels
    for page in site.rglob("*.html"):
        assert not re.findall(r"<(?:script|img|source|iframe)[^>]+src(?:set)?=\"?https?:", page.read_text())
        assert not re.findall(r"<link[^>]+stylesheet[^>]+href=\"?https?:", page.read_text())
