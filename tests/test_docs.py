"""The code of README.md, CONTRIBUTING.md and docs/ runs, and their links lead somewhere.

The Python of a page runs in order, in one namespace and an empty folder, and so do the commands of the tutorial that
begin with ``dgi``.  A comment ``<!-- setup`` … ``-->`` holds lines that are run and not shown; a block below
``<!-- not run: why -->`` is not run.
"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch

import dgi_kernels
from dgi_kernels.backend import KERNELS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$|^<!-- (setup)\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = "import dgi.cli; assert dgi.cli.main({!r}) == 0"


def script(page: Path) -> str:
    """All that a page tells to run, each block on the lines that it has in the page, so that a traceback names them."""
    text, lines = page.read_text(), []
    for match in BLOCK.finditer(text):
        kind, shown, setup, hidden = match.groups()
        if NOT_RUN.search(text[: match.start()]):
            continue
        code = hidden if setup else shown
        if kind == "sh":
            commands = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith("dgi ")]
            code = "\n".join(map(COMMAND.format, commands)) if page.stem == "tutorial" else ""
        if code:
            lines += [""] * (text[: match.start()].count("\n") + 1 - len(lines)) + code.splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if script(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(script(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "module",
    [
        name
        for _, name, _ in pkgutil.walk_packages(dgi_kernels.__path__, "dgi_kernels.")
        if "triton" not in name and not name.endswith("_C")
    ],
)
def test_the_examples_of_docstrings_run(module: str) -> None:
    result = doctest.testmod(
        importlib.import_module(module),
        extraglobs={"dgi_kernels": dgi_kernels, "torch": torch},
        optionflags=doctest.NORMALIZE_WHITESPACE,
    )
    assert result.failed == 0


def test_every_public_op_has_an_example() -> None:
    without = [
        name
        for name in dgi_kernels.__all__
        if inspect.isfunction(getattr(dgi_kernels, name))
        and ">>>" not in str(inspect.getdoc(getattr(dgi_kernels, name)))
    ]
    assert without == []


def test_the_readme_begins_with_what_a_reader_needs() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any("docs/integration.md" in line for line in lines[:10])
    assert lines.index("```python") < 30
    code = lines[lines.index("```python") : lines.index("```", lines.index("```python") + 1)]
    assert len(code) < 12 and all(
        op in "\n".join(code) for op in ("cosine_cross_entropy", "residual_quantize", "beam_search")
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_holds_no_trace_of_a_merge(page: Path) -> None:
    assert re.findall("^(?:<{7}|>{7}|={7}$).*", page.read_text(), re.MULTILINE) == []


def test_the_limits_name_every_op_without_a_kernel_for_cuda() -> None:
    text = " ".join((ROOT / "docs/limits.md").read_text().split())
    named = re.findall(r"`(\w+)`", text.partition("No kernel for CUDA yet: ")[2].partition(".")[0])
    assert named == [op for op, kernels in KERNELS.items() if not any("cuda" in where for where in kernels.values())]


def test_links_between_files_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", FENCED.sub("", page.read_text())):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def entry(name: str) -> str:
    item = pkgutil.resolve_name(name)
    module = item if inspect.ismodule(item) else inspect.getmodule(item)
    source = Path(str(module.__file__)).relative_to(ROOT)  # type: ignore[union-attr]
    return f"- [`{name}`](../../{source}): {inspect.getdoc(item).splitlines()[0].rstrip('.:')}"  # type: ignore[union-attr]


def test_entries_of_the_api_pages_link_to_their_source() -> None:
    """The site has signature and docstring in place of an entry; a code host shows the link and the first sentence."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        text = page.read_text()
        entries = re.findall(r"^- \[`([\w.]+)`\]\((\S+)\): \S", text, re.MULTILINE)
        written = re.findall(r"^::: (\S+)", text, re.MULTILINE)
        assert not written, f"{page.name}: in place of ::: {written[0]} write\n{entry(written[0])}"
        assert entries and len(entries) == text.count("\n- ")
        for name, target in entries:
            item = pkgutil.resolve_name(name)
            module = item if inspect.ismodule(item) else inspect.getmodule(item)
            assert module is not None and (page.parent / target).resolve() == Path(str(module.__file__)), name
