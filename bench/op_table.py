"""Where each op of ``dgi_kernels.backend.KERNELS`` is: the table of CONTRIBUTING.md, made by bench/report.py."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "cosine_logits": "cosine",
    "cosine_cross_entropy": "cosine",
    "gumbel_softmax": "gumbel",
    "kmeans": "clustering",
    "balanced_codes": "clustering",
    "unique_codes": "clustering",
    "gumbel_noise": "gumbel",
    "residual_quantize": "quantize",
    "assign_codes": "quantize",
    "trie_build": "trie",
    "trie_find": "trie",
    "trie_filter": "trie",
    "beam_step": "beam",
    "cosine_beam_step": "beam",
    "beam_codes": "beam",
    "log_normalizer": "normalizer",
    "rank_candidates": "ranking",
    "decoder_step": "decoder",
    "encoder_layers": "encoder",
    "dropout": "dropout",
    "attention": "dropout",
}
# Files that are not called as their family is.
REFERENCES = {"gumbel_noise": "dgi_kernels/noise.py"}
CUDA_FILES = {"gumbel_noise": "noise", "cosine_beam_step": "cosine_beam"}
TESTS = {"gumbel_noise": "noise", "log_normalizer": "log_normalizer"}
BENCHES = {
    "clustering": "kmeans",
    "decoder": "search",
    "dropout": "train",
    "encoder": "search",
    "ranking": "beam",
    "normalizer": "vocabulary",
}
PAGES = {
    "trie": "search",
    "beam": "search",
    "ranking": "search",
    "decoder": "search",
    "encoder": "search",
    "normalizer": "search",
}


def op_table(kernels: dict) -> str:
    """A row for each op: its reference, kernels, tests, benchmark and page, as links."""
    lines = [
        "| op | reference | C++ | Triton | CUDA C++ | tests | benchmark | page |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for op, backends in kernels.items():
        family = FAMILIES[op]
        native, tests = backends.get("native", {}), TESTS.get(op, family)
        cells = [
            f"`{op}`",
            link(REFERENCES.get(op, f"dgi_kernels/{family}/reference.py")),
            link(f"csrc/cpu/{family}") if "cpu" in native else "",
            links(triton_files(family)) if "triton" in backends else "",
            link(f"csrc/cuda/{CUDA_FILES.get(op, family)}.cu") if "cuda" in native else "",
            f"[test_{tests}*.py](tests/kernels/test_{tests}.py)",
            link(f"bench/bench_{BENCHES.get(family, family)}.py"),
            link(f"docs/kernels/{PAGES.get(family, family)}.md"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def triton_files(family: str) -> list[Path]:
    """The files that have kernels."""
    return [
        path for path in sorted(ROOT.glob(f"dgi_kernels/{family}/triton_*.py")) if "@triton.jit" in path.read_text()
    ]


def links(paths: Iterable[Path]) -> str:
    return " ".join(link(str(path.relative_to(ROOT))) for path in paths)


def link(path: str) -> str:
    """The last part of a path as a link to it."""
    return f"[{Path(path).name}]({path})"
