"""Evaluating rankings, indexes and judged queries; what ``dgi eval`` and ``dgi demo`` report and draw."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi import pictures
from dgi.data import Interactions, Judgments
from dgi.data import train_counts as train_counts  # where it was before
from dgi.evaluation import metrics
from dgi.model.encoding import Requests, encode_requests
from dgi.retrieval.index import DGIIndex
from dgi.retrieval.search import Searcher, rank_by_cosine
from dgi_kernels.files import atomic_write

Json = dict[str, Any]
DEPTH = max(metrics.CUTOFFS)  # items ranked for each test query
K = 10  # cutoff of tables, pictures and hubness
RECALL_DEPTH = 100


def sample(interactions: Interactions, limit: int | None, seed: int = 0) -> Interactions:
    """At most ``limit`` interactions, drawn with a fixed seed, in their old order; all where ``limit`` is None."""
    if limit is None or len(interactions) <= limit:
        return interactions
    return interactions.take(sampled_rows(len(interactions), limit, seed))


def sampled_rows(count: int, limit: int, seed: int = 0) -> np.ndarray:
    """``limit`` of ``count`` rows, drawn with a fixed seed, ascending."""
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def evaluate_systems(rankings: Mapping[str, Tensor], test: Interactions, counts: np.ndarray) -> dict[str, Json]:
    """Hit rate and NDCG, overall and by popularity bucket, and hubness, of each system.

    Args:
        rankings: by the system's name, (n, DEPTH) catalog rows for the n test interactions.
        test: with the items that should be found.
        counts: see :func:`train_counts`.
    """
    return {
        name: {
            **metrics.evaluate_rankings(items.numpy(), test.items, counts),
            "hubness": metrics.hubness(items.numpy(), len(counts), K),
        }
        for name, items in rankings.items()
    }


def evaluate_index(index: DGIIndex) -> Json:
    """Geometry of the item vectors and use of the codes: isotropy, usage and entropy per level, collisions."""
    codes = index.codes.cpu().numpy()
    return {
        "items": len(index),
        "isotropy": metrics.isotropy(index.vectors.cpu().numpy()),
        "codes": metrics.code_usage(codes, index.trie.codebook_sizes),
        "collisions": metrics.collisions(codes),
    }


def rank_by_model_cosine(searcher: Searcher, test: Interactions, k: int, exclude: Tensor | None = None) -> Tensor:
    """Exact nearest items by the model's own vectors, without codes and beams; (n, k) catalog rows."""
    queries = encode_requests(searcher.model, Requests.of(searcher.model, test), searcher.item_features)
    return rank_by_cosine(queries.float(), searcher.index.vectors, k, exclude=exclude)


def history_rows(test: Interactions) -> Tensor:
    """(n, H) int64 catalog rows of the histories, -1 for none: what to leave out of the rankings."""
    return torch.from_numpy(test.histories)


def targets_in_history(test: Interactions) -> int:
    """How many test interactions choose an item of their own history, which ``exclude_history`` makes unfindable."""
    return int((test.histories == test.items[:, None]).any(axis=1).sum())


def evaluate_judgments(
    searcher: Searcher,
    judgments: Judgments,
    *,
    num_beams: int | Sequence[int] = 50,
    progress: bool = False,
    **scoring: Any,
) -> dict[str, Json]:
    """Graded nDCG and recall of judged queries, for DGI, its vectors alone, and plain cosine of given vectors.

    ``ndcg@10`` takes items without a judgment for irrelevant; ``ndcg_judged@10`` ranks the judged items of each query
    only; ``judged@10`` is the share of the first 10 that is judged.  ``recall@k`` is the mean share of a query's items
    rated above 0 among the first k, ``recall_top@k`` of those with the highest rating that the judgments give.

    Args:
        searcher: model, index and catalog; plain cosine is added where the catalog and the judgments have vectors.
        judgments: the queries and their rated items.
        num_beams: see :meth:`dgi.Searcher.search`; at least ``RECALL_DEPTH`` are used, of several for the last level.
        progress, **scoring: see there, too.
    """
    width = max(K, *map(len, judgments.ratings))
    if isinstance(num_beams, Sequence):
        beams: int | list[int] = [*num_beams[:-1], max(num_beams[-1], RECALL_DEPTH)]
    else:
        beams = max(num_beams, RECALL_DEPTH)
    request: dict[str, Any] = {
        "queries": judgments.queries,
        "query_vectors": judgments.query_vectors,
        "num_beams": beams,
        "progress": progress,
        **scoring,
    }
    filters = [searcher.index.trie.filter(items=list(ratings)) for ratings in judgments.ratings]
    everything = searcher.search(**request, k=RECALL_DEPTH).items
    judged_only = searcher.search(**request, k=width, filters=filters).items
    results = {"DGI": _judged_measures(everything, judged_only, judgments)}
    no_history = np.full((len(judgments), 1), -1, dtype=np.int64)
    requests = Requests.prepare(searcher.model, judgments.queries, no_history, judgments.query_vectors)
    encoded = encode_requests(searcher.model, requests, searcher.item_features).float()
    results["exact cosine"] = _cosine_measures(encoded, searcher.index.vectors, judgments)
    vectors = searcher.catalog.vectors
    if vectors is not None and judgments.query_vectors is not None:
        results["plain cosine"] = _cosine_measures(
            torch.from_numpy(judgments.query_vectors), torch.from_numpy(vectors), judgments
        )
    return results


def _cosine_measures(queries: Tensor, vectors: Tensor, judgments: Judgments) -> Json:
    width = max(K, *map(len, judgments.ratings))
    judged_only = []
    for query, ratings in zip(queries, judgments.ratings, strict=True):
        rows = torch.tensor(list(ratings), device=vectors.device)
        ranked = rows.cpu()[rank_by_cosine(query[None], vectors[rows], len(rows))[0]]
        judged_only.append(F.pad(ranked, (0, width - len(ranked)), value=-1))
    return _judged_measures(rank_by_cosine(queries, vectors, RECALL_DEPTH), torch.stack(judged_only), judgments)


def _judged_measures(everything: Tensor, judged_only: Tensor, judgments: Judgments) -> Json:
    found = metrics.evaluate_judgments(everything.numpy(), judgments, cutoffs=(K,))
    judged = metrics.evaluate_judgments(judged_only.numpy(), judgments, cutoffs=(K,))
    highest = max(max(ratings.values()) for ratings in judgments.ratings)
    recalls = {
        f"{name}@{k}": recall(everything.numpy(), judgments, k, rating)
        for name, rating in (("recall", 1), ("recall_top", highest))
        for k in (K, RECALL_DEPTH)
    }
    return {**found, f"ndcg_judged@{K}": judged[f"ndcg@{K}"], **recalls}


def recall(ranked_items: np.ndarray, judgments: Judgments, k: int, rating: int = 1) -> float:
    """Mean share of a query's items rated at least ``rating`` among its first k, over queries that have such items."""
    shares = []
    for row, ratings in zip(ranked_items[:, :k].tolist(), judgments.ratings, strict=True):
        relevant = {item for item, given in ratings.items() if given >= rating}
        if relevant:
            shares.append(len(relevant.intersection(row)) / len(relevant))
    if not shares:
        raise ValueError(f"judgments must have at least one rating of {rating} or more; got none")
    return float(np.mean(shares))


def results_table(systems: Mapping[str, Json], k: int = K) -> str:
    """Hit rate and NDCG at k as one text table: a row per popularity bucket, a column per measure and system."""
    groups = {name: [{"name": "all", **result["overall"]}, *result["buckets"]] for name, result in systems.items()}
    first = next(iter(groups.values()))
    measures = ((f"HitRate@{k}", f"hit_rate@{k}"), (f"NDCG@{k}", f"ndcg@{k}"))
    columns = [[group[key] for group in of_system] for _, key in measures for of_system in groups.values()]
    widths = [max(len(name), 6) for name in systems] * len(measures)
    block = sum(widths[: len(systems)]) + 2 * (len(systems) - 1)
    header = _cells("popularity", "queries", list(systems) * len(measures), widths)
    lines = [" " * 21 + "".join(f"   {title:^{block}}" for title, _ in measures).rstrip(), header, "-" * len(header)]
    for row, group in enumerate(first):
        values = ["–" if column[row] is None else f"{column[row]:.4f}" for column in columns]
        lines.append(_cells(group["name"], f"{group['queries']:,}", values, widths))
    return "\n".join(lines)


def _cells(label: str, queries: str, values: Sequence[str], widths: Sequence[int]) -> str:
    half = len(values) // 2
    blocks = (
        "  ".join(f"{value:>{width}}" for value, width in zip(values[part], widths[part], strict=True))
        for part in (slice(0, half), slice(half, None))
    )
    return f"{label:<12}{queries:>9}   " + "   ".join(blocks)


def judgments_table(systems: Mapping[str, Json]) -> str:
    """Graded measures of judged queries as one text table, a row per system."""
    measures = [name for name in next(iter(systems.values())) if name != "queries"]
    width = max(map(len, systems))
    queries = next(iter(systems.values()))["queries"]
    lines = [f"{queries} judged queries", " " * width + "".join(f"  {name}" for name in measures)]
    for system, values in systems.items():
        lines.append(f"{system:<{width}}" + "".join(f"  {values[name]:>{len(name)}.4f}" for name in measures))
    return "\n".join(lines)


def write_json(path: str | os.PathLike[str], value: Json) -> None:
    """Write JSON, whole or not at all."""
    with atomic_write(path) as file:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        file.write(text.encode(errors="backslashreplace") + b"\n")  # lone surrogates, as JSON spells them


def write_results(output: Path, results: Json) -> bool:
    """Write ``metrics.json`` and ``buckets.png`` of ``results``, with its ``systems`` and ``index``, into a folder.

    Returns:
        Whether there is a picture: what keeps it from being drawn is a warning, the figures being safe already.
    """

    def draw() -> None:
        from dgi.evaluation.plots import bucket_picture

        bucket_picture(results["systems"], picture, codes=results["index"]["codes"])

    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "metrics.json", results)
    picture = output / "buckets.png"
    return pictures.attempt(draw, picture)
