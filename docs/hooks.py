"""What the site needs beyond Markdown: formulas as MathML, excerpts of the source, the trie's own page, wide tables.

All of it is done when the site is built, so that a page needs no script and no request to show a formula.
"""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {".cpp": "cpp", ".h": "cpp", ".cu": "cuda", ".py": "python", ".md": "text"}

BLOCK_FORMULA = re.compile(r"^```math\n(.*?)\n```$", re.MULTILINE | re.DOTALL)  # as GitHub writes them
EQUATION = re.compile(r"\s*\\qquad\s*")  # what stands between the equations of one formula
INLINE_FORMULA = re.compile(r"\$`(.+?)`\$")
EXCERPT = re.compile(r'^<!-- code: (\S+?)(?: from "(.*?)" to "(.*?)")? -->$', re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(<code>)(?:~[\w.]*\.)?")  # Sphinx's, which Markdown lacks
# An entry of docs/api, which links to the source where the site has signature and docstring.
ENTRY = re.compile(r"^- \[`([\w.]+)`\]\(\S+\.py\): .*?(?: <!-- options: (\{.*\}) -->)?$", re.MULTILINE)
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)  # those of code have a class
CELL_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
COLUMN_TITLE = re.compile(r"(?<=<th>)[^<]+|(?<=\">)[^<]+(?=</th>)|(?<=<strong>)[^<]+(?=</strong></th>)")


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    if page.file.src_uri.startswith("api/"):
        markdown = ENTRY.sub(lambda match: _documentation(*match.groups()), markdown)
    markdown = INCLUDE.sub(lambda match: _include(match[1]), markdown)
    markdown = EXCERPT.sub(lambda match: _excerpt(*match.groups()), markdown)
    markdown = BLOCK_FORMULA.sub(lambda match: _formula(match[1]), markdown)
    # In a span, since Markdown takes a line that begins with <math> for a separate paragraph.
    return INLINE_FORMULA.sub(lambda match: f"<span>{convert(match[1])}</span>", markdown)


def on_page_content(html: str, **_: object) -> str:
    html = html.replace('<details class="mkdocstrings-source">', '<details class="mkdocstrings-source" open>')
    html = TABLE.sub(lambda match: _scrolling(match[0]), html)
    return ROLE.sub(r"\1", html)


def _documentation(name: str, options: str | None) -> str:
    return f"::: {name}" + (f"\n    options: {options}" if options else "") + "\n"


def _formula(tex: str) -> str:
    """Each equation by itself, so that a narrow page sets them below each other."""
    equations = [convert(equation, display="block") for equation in EQUATION.split(tex)]
    return f'<div class="formula">{"".join(equations)}</div>'


def _scrolling(table: str) -> str:
    """A table in a box that scrolls, by keys too; column titles and code may break between the words of a name."""

    def breakable(title: re.Match[str]) -> str:
        return re.sub(r"_(?=\w)|\.(?=[a-z])|(?<=[a-z])(?=[A-Z])", r"\g<0><wbr>", title[0]).replace("÷ ", "÷&nbsp;")

    table = CELL_CODE.sub(lambda code: re.sub(r"_(?=\w)", "_<wbr>", code[0]), table)
    return f'<div class="wide" tabindex="0">{COLUMN_TITLE.sub(breakable, table)}</div>'


def _include(path: str) -> str:
    """A Markdown file of the project, below this page's title."""
    return (ROOT / path).read_text().split("\n", 1)[1]


def _excerpt(path: str, start: str | None, end: str | None) -> str:
    """The opening comment of a file, or its lines from the first with ``start`` to the next with ``end``."""
    lines = (ROOT / path).read_text().splitlines()
    if start is None:
        comment = [re.sub("^// ?", "", line) for line in takewhile(lambda line: line.startswith("//"), lines)]
        if not comment:
            raise PluginError(f"{path} does not open with a comment")
        text = re.sub(r"^(?! )(.+)\n(?=\S)", r"\1 ", "\n".join(comment), flags=re.MULTILINE)  # formulas are indented
        return f'``` {{.text .comment title="{path}"}}\n{text}\n```'
    first = next((i for i, line in enumerate(lines) if start in line), len(lines))
    last = next((i for i, line in enumerate(lines) if i > first and line.startswith(end)), None)
    if last is None:
        raise PluginError(f"{path} has no lines from {start!r} to {end!r}")
    return "\n".join([f'``` {LANGUAGES[Path(path).suffix]} title="{path}"', *lines[first : last + 1], "```"])
