"""Comparisons: systems × data sets × seeds, one resumable cell each, and one JSON of all of them.

A cell is one system trained and evaluated on one data set with one seed. Its files are written whole, the measures of
every request first, so that a comparison that was interrupted continues with the next cell, and within a cell from the
last checkpoint of its training. Nothing is chosen on the test set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgi.config import ModelConfig, TrainConfig, from_file, to_dict
from dgi.data import Dataset, Interactions, train_counts, with_validation
from dgi.evaluation import metrics
from dgi.evaluation.evaluate import DEPTH, K, sample, sampled_rows, write_json
from dgi.evaluation.names import DEFAULT_SYSTEMS
from dgi.evaluation.per_query import MEASURES, bucket_means, interval, measure_queries
from dgi.evaluation.systems import SYSTEMS
from dgi.evaluation.tail import mean_curve, tail_curve
from dgi.extras import require
from dgi.model.dgi_model import DualEncoder
from dgi.progress import Progress
from dgi.retrieval.baselines import Plan, Retriever
from dgi.retrieval.baselines.plan import validation_sample
from dgi.retrieval.fused import GUIDE_WEIGHTS, hit_rate_and_ndcg
from dgi_kernels.files import atomic_write, check_output

Json = dict[str, Any]
VERSION = 1
PROBE_STEPS = 10  # of the dense system, to turn minutes into steps
# Of a training configuration: the seed is the cell's; the others are no part of the comparison, or a system's own.
NO_PART = ("seed", "epochs", "contrastive", "log_every", "checkpoint_every", "stages", "item_bias")
CURVE_KEYS = ("step", "loss", "ntp", "infonce", "grad_norm", f"validation_hit_rate@{K}")


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        plan: encoder, rates and budget of the trained systems; its folder is set by :func:`compare`.
        systems: names of :data:`dgi.evaluation.systems.SYSTEMS`.
        seeds: of weights, data order and noise; systems without any run once.
        minutes: budget in place of the plan's steps: as many steps for every trained system as the dense one takes in
            so many minutes on this machine. 0 for the plan's.
        exclude_history: leave the items of a request's history out of every ranking.
        max_queries: evaluate a fixed sample of so many test requests; None for all.
    """

    plan: Plan
    systems: tuple[str, ...] = DEFAULT_SYSTEMS
    seeds: tuple[int, ...] = (0, 1, 2)
    minutes: float = 0.0
    exclude_history: bool = False
    max_queries: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.systems if name not in SYSTEMS]
        if unknown:
            raise ValueError(f"systems must be among {', '.join(SYSTEMS)}; got {unknown[0]!r}")
        if not self.systems or not self.seeds:
            raise ValueError("systems and seeds must not be empty")
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"minutes must be finite and at least 0; got {self.minutes}")


def compare(data: Dataset, comparison: Comparison, output: Path, *, progress: bool = False) -> Json:
    """Run the cells of one data set that are not there yet; return the results of all data sets in ``output``.

    Args:
        data: with or without a validation set, see :func:`dgi.data.with_validation`.
        comparison: systems, seeds and budget.
        output: folder of the cells and of the runs of training, continued where it is there.
        progress: show progress bars.

    Returns:
        What ``results.json`` in ``output`` holds; see :func:`collect`.

    Raises:
        ValueError: ``output`` holds cells of the same name with other settings or data.
    """
    data = with_validation(data)
    cells, runs = output / "cells" / data.name, output / "runs" / data.name
    check_output(cells)
    plan = dataclasses.replace(comparison.plan, exclude_history=comparison.exclude_history)
    plan = _with_budget(plan, comparison.minutes, data, cells)
    test, relevant = _test_sample(data, comparison.max_queries)
    about = _about(data, test, plan, comparison)
    planned = [
        (name, seed)
        for seed in comparison.seeds
        for name in comparison.systems
        if SYSTEMS[name].seeded or seed == comparison.seeds[0]
    ]
    with Progress(len(planned), f"comparing on {data.name}", unit="cells", shown=progress) as bar:
        for name, seed in planned:
            bar.note(f"{name}, seed {seed}")
            path = cells / f"{name}-{seed}.json"
            if path.is_file():
                _check_same(path, about)
            else:
                run = dataclasses.replace(
                    plan, training=dataclasses.replace(plan.training, seed=seed), folder=runs, progress=False
                )
                _run_cell(SYSTEMS[name].make(run), name, seed, data, test, relevant, about, path)
            bar.update()
    results = collect(output)
    write_json(output / "results.json", results)
    return results


def _run_cell(
    system: Retriever,
    name: str,
    seed: int,
    data: Dataset,
    test: Interactions,
    relevant: Sequence[Mapping[int, int]] | None,
    about: Json,
    path: Path,
) -> None:
    started = time.perf_counter()
    system.fit(data)
    fitted = time.perf_counter()
    found = system.search(test, DEPTH, exclude_history=about["history_excluded"]).items.numpy()
    searched = time.perf_counter()
    held = validation_sample(data)
    checked = system.search(held, K, exclude_history=about["history_excluded"]).items
    counts = train_counts(data.train, len(data.catalog))
    excluded = about["history_excluded"]
    tail = tail_curve(system, test, counts, exclude_history=excluded) if relevant is None else None
    values = measure_queries(found, test.items, relevant)
    nearest = system.nearest(test, DEPTH, exclude_history=excluded)
    exact = None if nearest is None else measure_queries(nearest.numpy(), test.items, relevant)
    recall = values[MEASURES.index(f"recall@{K}")]
    cell = {
        "version": VERSION,
        "about": about,
        "system": name,
        "seed": seed,
        "measures": {key: float(row.mean(dtype=np.float64)) for key, row in zip(MEASURES, values, strict=True)},
        "validation": {f"ndcg@{K}": hit_rate_and_ndcg(checked, torch.from_numpy(held.items))[1]},
        "exact_cosine": {} if exact is None else {f"ndcg@{K}": float(exact[MEASURES.index(f"ndcg@{K}")].mean())},
        "buckets": bucket_means(recall, test.items, counts),
        "hubness": metrics.hubness(found, len(data.catalog), K),
        "geometry": geometry(system, counts),
        "settings": system.settings,
        "tail": tail,
        "parameters": system.parameters,
        # Training that was interrupted, or is shared with another system, counts in full.
        "seconds": {"fit": max(getattr(system, "seconds", 0.0), fitted - started), "search": searched - fitted},
        "curve": [{key: float(f"{row[key]:.6g}") for key in CURVE_KEYS if key in row} for row in system.curve],
    }
    with atomic_write(path.with_suffix(".npy")) as file:
        np.save(file, values, allow_pickle=False)
    write_json(path, cell)


def geometry(system: Retriever, counts: np.ndarray) -> Json | None:
    """Isotropy of the item vectors, and Spearman's correlation of their norms with the items' training counts."""
    vectors = system.item_vectors()
    if vectors is None:
        return None
    stats = require("scipy.stats")
    array = vectors.double().numpy()
    norms = np.linalg.norm(array, axis=1)
    varied = np.ptp(norms) > 1e-5 * norms.mean() and np.ptp(counts) > 0
    return {
        **metrics.isotropy(array),
        "norm_popularity": float(stats.spearmanr(norms, counts).statistic) if varied else None,
    }


def _test_sample(data: Dataset, limit: int | None) -> tuple[Interactions, tuple[Mapping[int, int], ...] | None]:
    if data.relevant is None:
        return sample(data.test, limit), None
    if limit is None or len(data.test) <= limit:
        return data.test, data.relevant
    rows = sampled_rows(len(data.test), limit)
    return data.test.take(rows), tuple(data.relevant[row] for row in rows)


def _with_budget(plan: Plan, minutes: float, data: Dataset, cells: Path) -> Plan:
    """The plan with its budget in steps; minutes are turned into steps once, and noted for when it continues."""
    steps = plan.steps(data)
    if minutes:
        noted = cells / "budget.json"
        if noted.is_file():
            known = json.loads(noted.read_text())
            if known["minutes"] != minutes:
                raise ValueError(f"{noted} is of {known['minutes']} minutes; choose another output for {minutes}")
        else:
            known = {"minutes": minutes, "steps": max(1, int(60 * minutes / _step_seconds(plan, data)))}
            write_json(noted, known)
        steps = known["steps"]
    return dataclasses.replace(plan, training=dataclasses.replace(plan.training, steps=steps))


def _step_seconds(plan: Plan, data: Dataset) -> float:
    """Seconds of a step of the dense system, the first half of a few steps left out."""
    torch.manual_seed(0)
    config = dataclasses.replace(plan.training, contrastive="all_items", steps=2 * PROBE_STEPS, log_every=PROBE_STEPS)
    times: list[float] = []

    def clock() -> dict[str, float]:
        times.append(time.perf_counter())
        return {"probe": 0.0}

    plan.trainer(
        DualEncoder(plan.model),
        config,
        data,
        None,
        device=plan.device,
        progress=False,
        validate=clock,
        validate_every=PROBE_STEPS,
    ).fit()
    return (times[-1] - times[0]) / PROBE_STEPS


def _about(data: Dataset, test: Interactions, plan: Plan, comparison: Comparison) -> Json:
    """What all cells of a data set agree in."""
    assert data.validation is not None
    digest = hashlib.sha256()
    for part in (data.train, data.validation, test):
        for column in (part.histories, part.items):
            digest.update(np.ascontiguousarray(column).data)
        digest.update("\n".join(part.queries).encode(errors="surrogatepass"))
    digest.update("\n".join(data.catalog.texts).encode(errors="surrogatepass"))
    rows = plan.rows(data)
    training = to_dict(plan.training)
    for name in NO_PART:
        del training[name]
    return json.loads(
        json.dumps(
            {
                "data": data.name,
                "items": len(data.catalog),
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
                "queries": len(test),
                "split": data.split,
                "history_excluded": comparison.exclude_history,
                "judged": data.relevant is not None,
                "steps": plan.training.steps,
                "batches_of": "sequences" if plan.on_sequences(data) else "interactions",
                "epochs": plan.training.steps * min(plan.training.batch_size, rows) / rows,
                "minutes": comparison.minutes,
                "encoder_share": plan.encoder_share,
                "num_beams": plan.num_beams,
                "guides": GUIDE_WEIGHTS,
                "model": to_dict(plan.model),
                "training": training,
                "sha256": digest.hexdigest(),
            }
        )
    )


def _check_same(path: Path, about: Json) -> None:
    stored = _as_now(json.loads(path.read_text(encoding="utf-8"))["about"])
    for name, value in about.items():
        if stored.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} = {stored.get(name)!r}, now it is {value!r}; choose another output, or "
                f"remove the file to make it again"
            )


def _as_now(about: Json) -> Json:
    """What a cell of any version agreed in, settings that it did not know yet being as they were then."""
    training = to_dict(from_file(TrainConfig, about["training"]))
    for name in NO_PART:
        del training[name]
    model = to_dict(from_file(ModelConfig, about["model"]))
    before = {"batches_of": "interactions", "guides": [0.0]}
    return json.loads(json.dumps({**before, **about, "model": model, "training": training}))


def join(output: Path, other: Path) -> list[Path]:
    """Copy the cells of another comparison that ``output`` does not have.

    Args:
        output: folder of a comparison, there or not.
        other: folder of one of the same data and budget, with other systems or seeds.

    Returns:
        The cells copied.

    Raises:
        FileNotFoundError: ``other`` has no cells.
        ValueError: a cell was made with other settings or data than those of ``output``.
    """
    sources = sorted((other / "cells").glob("*/*-*.json"))
    if not sources:
        raise FileNotFoundError(f"{other} holds no cells of a comparison")
    about: dict[str, Json] = {}
    for path in [*sorted((output / "cells").glob("*/*-*.json")), *sources]:
        cell = json.loads(path.read_text(encoding="utf-8"))
        _check_same(path, about.setdefault(path.parent.name, _as_now(cell["about"])))
    joined = []
    for source in sources:
        path = output / "cells" / source.parent.name / source.name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            for suffix in (".npy", ".json"):  # the measures first, as a cell is written
                with atomic_write(path.with_suffix(suffix)) as file:
                    file.write(source.with_suffix(suffix).read_bytes())
            joined.append(path)
    return joined


def collect(output: Path) -> Json:
    """The results of all cells in ``output``.

    Returns:
        JSON-ready ``{"version", "machine", "data": {name: {…what the data set's cells agree in…, "best_baseline",
        "systems": {name: {"seeds", "measures": {"recall@10": {"mean", "low", "high", "seeds"}}, "validation": NDCG,
        "exact_cosine": NDCG of a generative system by its own vectors without beams, "over_two_stage": NDCG of DGI
        against two-stage retrieval with the same encoder, "difference": NDCG against the
        baseline that is best on validation requests, with its paired interval, "buckets", "hubness", "geometry",
        "settings", "tail", "parameters", "seconds", "curve"}}}}}``; of ``tail`` see
        :func:`dgi.evaluation.tail.tail_curve`. Intervals are over requests, each request's measure being the mean over
        the seeds; ``seeds`` are the means of every seed. ``curve`` is the first seed's.
    """
    folders = sorted(path for path in (output / "cells").iterdir() if path.is_dir())
    data = {folder.name: _collect_data(folder) for folder in folders if any(folder.glob("*-*.json"))}
    machine = {"cpu": _cpu(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"version": VERSION, "machine": machine, "data": data}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _collect_data(folder: Path) -> Json:
    cells: dict[str, list[Json]] = {}
    values: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*-*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        cells.setdefault(cell["system"], []).append(cell)
    for name, of_system in cells.items():
        stacks = [np.load(folder / f"{name}-{cell['seed']}.npy", allow_pickle=False) for cell in of_system]
        values[name] = np.stack(stacks).mean(axis=0, dtype=np.float64)
    place = MEASURES.index(f"ndcg@{K}")
    baselines = [name for name in cells if not SYSTEMS[name].generative]
    validated = {name: _validated(cells[name]) for name in baselines or cells}
    if all(map(math.isnan, validated.values())):  # cells of earlier versions, which chose by the test
        validated = {name: float(values[name][place].mean()) for name in validated}
    best = max(validated, key=lambda name: (not math.isnan(validated[name]), validated[name]))
    systems = {
        name: _collect_system(
            cells[name], values[name], None if name == best else values[name][place] - values[best][place]
        )
        for name in SYSTEMS
        if name in cells
    }
    for name, found in systems.items():
        other = "two_stage_ids" if name.endswith("_ids") else "two_stage"
        if name.startswith("dgi") and other in values:
            found["over_two_stage"] = {f"ndcg@{K}": interval(values[name][place] - values[other][place])}
    about = next(iter(cells.values()))[0]["about"]
    return {**about, "best_baseline": best, "systems": systems}


def _validated(cells: Sequence[Json]) -> float:
    """NDCG on the validation set, mean over the seeds: what the best baseline is chosen by. NaN of old cells."""
    return float(np.mean([cell.get("validation", {}).get(f"ndcg@{K}", math.nan) for cell in cells]))


def _collect_system(cells: list[Json], values: np.ndarray, difference: np.ndarray | None) -> Json:
    seeds = [cell["seed"] for cell in cells]
    measures = {
        key: {**interval(row), "seeds": [cell["measures"][key] for cell in cells]}
        if key.endswith(f"@{K}")
        else {"mean": float(row.mean())}
        for key, row in zip(MEASURES, values, strict=True)
    }
    return {
        "seeds": seeds,
        "measures": measures,
        "validation": {f"ndcg@{K}": None if math.isnan(_validated(cells)) else _validated(cells)},
        "exact_cosine": _means([cell.get("exact_cosine", {}) for cell in cells]),
        "difference": None if difference is None else {f"ndcg@{K}": interval(difference)},
        "buckets": _means([cell["buckets"] for cell in cells]),
        "hubness": _means([cell["hubness"] for cell in cells]),
        "geometry": None if cells[0]["geometry"] is None else _means([cell["geometry"] for cell in cells]),
        "settings": [cell["settings"] for cell in cells],
        "tail": mean_curve([cell["tail"] for cell in cells]) if all(cell.get("tail") for cell in cells) else None,
        "parameters": cells[0]["parameters"],
        "seconds": _means([cell["seconds"] for cell in cells]),
        "curve": cells[0]["curve"],
    }


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean of each value over the rows that have it."""
    means: dict[str, float | None] = {}
    for key in rows[0]:
        known = [value for row in rows if (value := row.get(key)) is not None]
        means[key] = float(np.mean(known)) if known else None
    return means
