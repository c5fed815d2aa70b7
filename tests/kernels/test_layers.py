"""The order of the rooms, read from the code itself: imports run one way, and a header's name means one thing."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dgi_kernels"
# What a module imports stands in an earlier layer than itself, or in its own folder.
LAYERS = (
    # they know nothing of ours
    {"_extension", "collectives", "cuda_graphs", "files", "native_common", "progress", "tiles", "types"},
    {"enums"},
    {"triton_common"},
    {"backend"},
    {"checks"},
    {"noise", "transformer"},
    {"cosine", "decoder", "dropout", "encoder", "gumbel", "normalizer", "trie"},
    {"beam", "quantize"},
    {"clustering", "ranking"},
    {""},  # dgi_kernels itself
    {"info"},
)
# module -> what it imports only when asked, or for its types: these lines would be circles at the top of a file.
EXCEPTIONS = {
    ("trie.filters", "trie"),  # a type
    ("trie.node_scores", "trie"),  # a type
}
IMPLEMENTATIONS = ("reference", "native", "triton")


def modules() -> dict[str, Path]:
    """Every module of the package by its name in it; "" is the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative imports are not used here"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [target.removeprefix("dgi_kernels.") in MODULES for target in inside]
            targets = [target for target, is_module in zip(inside, modules, strict=True) if is_module]
            targets += [] if all(modules) else [str(node.module)]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "dgi_kernels":
                yield target.removeprefix("dgi_kernels").removeprefix(".")


def family(name: str) -> str:
    return name.split(".")[0]


def layer(name: str) -> int:
    found = [i for i, families in enumerate(LAYERS) if family(name) in families]
    assert found, f"dgi_kernels.{name} has no place in LAYERS"
    return found[0]


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "dgi_kernels")
def test_imports_run_one_way(name: str) -> None:
    for target in imports(name):
        assert family(target) == family(name) or layer(target) < layer(name), f"{name} imports {target}"


@pytest.mark.parametrize("name", [n for n in MODULES if "." in n])
def test_no_implementation_knows_another(name: str) -> None:
    """``triton_kernels`` is a part of ``triton``."""
    own = implementation(name)
    for target in imports(name):
        if own and family(target) == family(name):
            assert implementation(target) in ("", own), f"{name} imports {target}"
            assert target != family(name), f"{name} imports {target}, which imports it"


def implementation(name: str) -> str:
    last = name.rpartition(".")[2].split("_")[0]
    return last if "." in name and last in IMPLEMENTATIONS else ""


def test_no_circle() -> None:
    graph = {name: {target for target in imports(name) if (name, target) not in EXCEPTIONS} for name in MODULES}
    while graph:
        free = [name for name, targets in graph.items() if not targets & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_every_exception_is_needed() -> None:
    assert all(target in imports(name) for name, target in EXCEPTIONS)


def test_a_header_has_a_name_of_its_own() -> None:
    names = Counter(path.name for path in (ROOT / "csrc").rglob("*.h"))
    assert [name for name, count in names.items() if count > 1] == []


def test_what_moved_is_still_found_in_its_old_place() -> None:
    from dgi_kernels import gumbel, quantize

    assert gumbel.residual_quantize is quantize.residual_quantize and gumbel.assign_codes is quantize.assign_codes
    assert gumbel.ResidualQuantization is quantize.ResidualQuantization
    with pytest.raises(AttributeError, match=r"dgi_kernels\.gumbel.*'no_such_name'"):
        gumbel.no_such_name  # noqa: B018
