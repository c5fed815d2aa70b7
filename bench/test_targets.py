"""The target case of every op under pytest-benchmark: ours, its floor, and what PyTorch has.

    pytest bench                            all, in a few minutes; -k quantize: one family; -k ours: ours alone
    pytest bench --benchmark-save=before    keep the figures under .benchmarks/
    pytest bench --benchmark-compare=0001 --benchmark-compare-fail=median:15%       fail where something is slower now
    pytest bench --benchmark-disable        each system once, on shapes of tests/kernels/shapes.py: that all of it runs

Unlike in the scripts the systems do not take turns: where the floor has changed too, the machine has.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# Threads that spin while they wait stall when another process has one of the cores.  OpenMP reads this as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pytest_benchmark.fixture import BenchmarkFixture  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests" / "kernels")]

import bench_assign  # noqa: E402
import bench_beam  # noqa: E402
import bench_cosine  # noqa: E402
import bench_gumbel  # noqa: E402
import bench_kmeans  # noqa: E402
import bench_quantize  # noqa: E402
import bench_train  # noqa: E402
import bench_trie  # noqa: E402
import bench_vocabulary  # noqa: E402
import shapes  # noqa: E402
from measure import Step  # noqa: E402

from dgi_kernels import gumbel_softmax  # noqa: E402

SMALL_CASE = bench_beam.Case(items=3000, codes=64, batch=2, beams=5, dim=16)
Make = Callable[[bool, Path], dict[str, Step]]  # (small, a folder for files) -> systems by name


def cosine(logits: str) -> Make:
    return lambda small, folder: bench_cosine.steps(
        *(shapes.COSINE[-1] if small else (4096, 256, 4096)), logits == "peaked"
    )


def quantize(assignments: str) -> Make:
    def make(small: bool, folder: Path) -> dict[str, Step]:
        rows, dim, sizes = shapes.QUANTIZE[-1] if small else (bench_quantize.ROWS, 256, bench_quantize.SIZES)
        return bench_quantize.steps(dim, 0.5, assignments == "peaked", rows, sizes)

    return make


def assign(small: bool, folder: Path) -> dict[str, Step]:
    rows, dim, sizes = shapes.QUANTIZE[-1] if small else (bench_quantize.ROWS, 256, bench_quantize.SIZES)
    return bench_quantize.assignments(dim, rows, sizes)


def kmeans(small: bool, folder: Path) -> dict[str, Step]:
    return dict(bench_kmeans.systems(*((300, 8, 5) if small else (100_000, 64, 1024)))[1])


def balanced_codes(small: bool, folder: Path) -> dict[str, Step]:
    return bench_assign.balances(*((100, 8, 5) if small else bench_assign.BALANCED))


def unique_codes(small: bool, folder: Path) -> dict[str, Step]:
    return bench_assign.unique(*((100, 8, (6, 6, 6)) if small else (500_000, 64, (256, 256, 256))))


def gumbel_noise(small: bool, folder: Path) -> dict[str, Step]:
    shape = shapes.GUMBEL[-1] if small else bench_gumbel.NOISE_SHAPES[0]
    return {"exponential_": lambda: bench_gumbel.exponential(*shape), "ours": lambda: bench_gumbel.in_cpp(*shape)}


def softmax(small: bool, folder: Path) -> dict[str, Step]:
    logits = torch.randn(*(shapes.GUMBEL[-1] if small else bench_gumbel.NOISE_SHAPES[0]), requires_grad=True)
    upstream = torch.randn(logits.shape)

    def step(sample: Callable[..., torch.Tensor]) -> Step:
        return lambda: torch.autograd.grad(sample(logits, tau=0.5), logits, upstream)

    return {"eager": step(F.gumbel_softmax), "ours": step(gumbel_softmax)}


def trie(what: str) -> Make:
    """One kind of the figures of a trie; those of plain PyTorch and numpy are in the script's table."""

    def make(small: bool, folder: Path) -> dict[str, Step]:
        figures = bench_trie.figures(SMALL_CASE if small else bench_beam.Case(), folder, references=False)
        return {system: run for kind, system, run, _ in figures if kind.startswith(what)}

    return make


def search(small: bool, folder: Path) -> dict[str, Step]:
    case = SMALL_CASE if small else bench_beam.Case()
    sids, model = case.sids(), bench_beam.Model(case)
    copies = [torch.empty_like(level) for level in model.logits]
    found = {
        name: make(sids, model, case)
        for name, make in bench_beam.systems(case).items()
        if name in ("native", "filtered", "updated", "reference")
    }
    return {"floor": lambda: [copy.copy_(level) for copy, level in zip(copies, model.logits, strict=True)], **found}


def last_step(small: bool, folder: Path) -> dict[str, Step]:
    return bench_beam.head_steps(SMALL_CASE if small else bench_beam.Case(), "full")


def ranking(small: bool, folder: Path) -> dict[str, Step]:
    return bench_beam.ranking_steps(SMALL_CASE if small else bench_beam.Case(), 5 if small else 100, 64)


def generation(small: bool, folder: Path) -> dict[str, Step]:
    import bench_integrations  # skips where transformers is not installed

    case = bench_integrations.CASES["t5"]
    return bench_integrations.systems(replace(case, items=300, levels=2, batch=1, beams=3, length=8) if small else case)


def normalizer(small: bool, folder: Path) -> dict[str, Step]:
    shape = (3, 1000) if small else (256, bench_vocabulary.VOCABULARY)
    return bench_vocabulary.normalizer_systems(*shape, torch.float32)


def training(small: bool, folder: Path) -> dict[str, Step]:
    shape = {"items": 500, "rows": 100, "dim": 16, "batch": 32, "sizes": (16, 8)} if small else {}
    return bench_train.update_steps(functools.partial(bench_train.large, **shape))


DENSE = ("floor", "eager", "compile", "linear_cross_entropy", "ours")
TARGETS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "cosine_cross_entropy-flat": (cosine("flat"), DENSE),
    "cosine_cross_entropy-peaked": (cosine("peaked"), DENSE),
    "residual_quantize-flat": (quantize("flat"), ("floor", "eager", "compile", "ours")),
    "residual_quantize-peaked": (quantize("peaked"), ("floor", "eager", "compile", "ours")),
    "assign_codes": (assign, ("floor", "eager", "ours")),
    "kmeans": (kmeans, ("floor", "ours")),
    "balanced_codes": (balanced_codes, ("floor", "float64 loop", "ours")),
    "unique_codes": (unique_codes, ("torch.unique", "ours")),
    "gumbel_noise": (gumbel_noise, ("exponential_", "ours")),
    "gumbel_softmax": (softmax, ("eager", "ours")),
    "trie_build": (trie("build"), ("native",)),
    "trie_filter": (trie("filter"), ("of a mask", "of the ids of a tenth", "a & b")),
    "trie_update": (trie("update"), (f"{bench_trie.CHANGED} come, {bench_trie.CHANGED} go", "compact")),
    "trie_file": (trie("file"), ("save", "load", "load, mapped")),
    "beam_search": (search, ("floor", "native", "filtered", "updated", "reference")),
    "cosine_beam_step": (last_step, ("floor", "head, then step", "fused")),
    "log_normalizer": (normalizer, ("floor", "torch.logsumexp", "native")),
    "rank_candidates": (ranking, ("native", "reference")),
    "constrained_generate": (
        generation,
        ("floor", "constrained_generate", "generate, TrieLogitsProcessor", "generate, dict trie"),
    ),
    "training_step": (training, ("auto", "reference")),
}


@functools.lru_cache(maxsize=1)  # the systems of one target come one after the other
def systems_of(target: str, small: bool, folder: Path) -> dict[str, Step]:
    torch.manual_seed(0)
    return TARGETS[target][0](small, folder)


@pytest.mark.parametrize(
    ("target", "system"),
    [
        pytest.param(target, system, id=f"{target}-{system}")
        for target, (_, systems) in TARGETS.items()
        for system in systems
    ],
)
def test_target(
    benchmark: BenchmarkFixture,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    target: str,
    system: str,
) -> None:
    small = request.config.getoption("benchmark_disable")
    systems = systems_of(target, small, tmp_path_factory.getbasetemp())
    if system not in systems:
        pytest.skip(f"{system} is not available here")
    benchmark.group = f"{target}, {torch.get_num_threads()} threads"
    if not small:
        systems[system]()  # compiles, and warms up
    benchmark(systems[system])
