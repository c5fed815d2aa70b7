"""The demo: popularity, a dense dual encoder and DGI on one data set, with the same encoder and budget."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgi.config import ModelConfig, TrainConfig, to_dict
from dgi.data import Catalog, Dataset, Interactions, train_counts, with_validation
from dgi.data.catalog import one_line
from dgi.evaluation import evaluate
from dgi.evaluation.evaluate import K
from dgi.evaluation.per_query import MEASURES, interval, measure_queries
from dgi.pictures import attempt
from dgi.retrieval.baselines import Dense, Plan, Retriever, StagedDGI, rank_by_popularity
from dgi.retrieval.search import Searcher
from dgi.training.checkpoint import Model as Model
from dgi.training.checkpoint import save_model

DEMO_MODEL = ModelConfig(dim=64, codebook_sizes=(64, 32, 16), text_layers=0, dropout=0.1)
DEMO_TRAINING = TrainConfig(epochs=6, batch_size=256, backbone_lr=1e-3, quantizer_lr=1e-3, contrastive="all_items")
NUM_BEAMS = 50
TEST_SAMPLE = 4000  # test interactions evaluated, unless all are asked for
EXAMPLES = 5
SHOWN_HISTORY = 3  # items of the history printed with an example
TITLE_WIDTH = 60

say = functools.partial(print, flush=True)  # at once, also into a pipe: training takes minutes


def run_demo(
    data: Dataset, output: Path, *, device: torch.device | str = "cpu", full: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Train both models, index, evaluate and show searches; leave everything in ``output``, and print as it goes.

    Training of a demo that was interrupted continues from its last checkpoint.

    Args:
        data: catalog, training and test interactions; where it has no validation set, a tenth of the training set is.
        output: folder for the results.
        device: where to train and search.
        full: evaluate all test interactions, not a fixed sample of ``TEST_SAMPLE``.
        progress: show progress bars.

    Returns:
        What ``metrics.json`` holds.
    """
    started = time.perf_counter()
    data = with_validation(data)
    assert data.validation is not None
    say(
        f"{data.name}: {len(data.catalog):,} items, {len(data.train):,} training, {len(data.validation):,} validation "
        f"and {len(data.test):,} test interactions"
    )
    plan = Plan(
        DEMO_MODEL,
        DEMO_TRAINING,
        folder=output,
        device=device,
        progress=progress,
        exclude_history=True,
        curve_points=3,
        num_beams=NUM_BEAMS,
    )
    say("\nTraining the dense dual encoder (softmax over all items, a bias for each)")
    dense = Dense(plan, item_bias=True).fit(data)
    say("Training DGI in stages: an encoder, codes of its vectors, then everything; indexing and searching")
    ours = StagedDGI(plan).fit(data)
    searcher = ours.searcher
    searcher.index.save(output / "index.safetensors")
    save_model(ours.model, output / "model.safetensors")
    results = _evaluate(data, {"dense": dense, "DGI": ours}, searcher, full)
    drawn = evaluate.write_results(output, results) and _draw_curve(output)
    say(f"\n{_caption(results)}\n{evaluate.results_table(results['systems'])}\n\n{verdict(results)}\n")
    _show_searches(data, searcher)
    pictures = "buckets.png, training_curve.png, " if drawn else ""
    say(
        f"{output} holds metrics.json, {pictures}index.safetensors and model.safetensors (the dense model: "
        f"{output / f'dense-{DEMO_TRAINING.seed}'})\nfinished in {(time.perf_counter() - started) / 60:.1f} minutes"
    )
    return results


def _draw_curve(output: Path) -> bool:
    from dgi.training.curve import training_curve

    metrics, picture = output / f"dgi-{DEMO_TRAINING.seed}" / "metrics.jsonl", output / "training_curve.png"
    return attempt(lambda: training_curve(metrics, picture), picture)


def _evaluate(data: Dataset, systems: dict[str, Retriever], searcher: Searcher, full: bool) -> dict[str, Any]:
    test = evaluate.sample(data.test, None if full else TEST_SAMPLE)
    counts = train_counts(data.train, len(data.catalog))
    rankings = {
        "popularity": rank_by_popularity(counts, len(test), evaluate.DEPTH, exclude=evaluate.history_rows(test))
    } | {name: system.search(test, evaluate.DEPTH, exclude_history=True).items for name, system in systems.items()}
    return {
        "data": data.name,
        "queries": len(test),
        "test_interactions": len(data.test),
        "num_beams": NUM_BEAMS,
        "model": to_dict(DEMO_MODEL),
        "training": to_dict(DEMO_TRAINING),
        "chosen": {name: system.settings for name, system in systems.items()},
        "systems": evaluate.evaluate_systems(rankings, test, counts),
        "difference": _difference(rankings["DGI"], rankings["dense"], test),
        "index": evaluate.evaluate_index(searcher.index),
    }


def _caption(results: dict[str, Any]) -> str:
    queries, total = results["queries"], results["test_interactions"]
    which = f"all {total:,}" if queries == total else f"a fixed random sample of {queries:,} of the {total:,}"
    return (
        f"Which item comes next? On {which} test interactions; items of the history are left out.\n"
        f"Rows: by popularity of the item looked for, buckets of equally many training interactions.\n"
        f"dense: two towers and a bias per item, exact search; encoder, data and epochs as DGI. How both rank\n"
        f"(weights of popularity, cosine and bias) was chosen on the validation set."
    )


def _difference(ours: Tensor, dense: Tensor, test: Interactions) -> dict[str, float]:
    """How much more often DGI finds the item among its first K than the dense model, with its paired interval."""
    hits = [measure_queries(items.numpy(), test.items)[MEASURES.index(f"recall@{K}")] for items in (ours, dense)]
    return interval(hits[0] - hits[1])


def verdict(results: dict[str, Any]) -> str:
    """What the figures say of DGI against the dense model, in one sentence."""
    ours, dense = (results["systems"][name]["overall"][f"hit_rate@{K}"] for name in ("DGI", "dense"))
    low, high = results["difference"]["low"], results["difference"]["high"]
    told = "is ahead of" if low > 0 else "is behind" if high < 0 else "cannot be told apart from"
    return (
        f"On these data, with these few epochs, DGI {told} dense retrieval: HitRate@{K} {ours:.3f} against "
        f"{dense:.3f}\n(difference {ours - dense:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}). "
        f'"dgi compare" has more baselines, seeds and data.'
    )


def _show_searches(data: Dataset, searcher: Searcher) -> None:
    test = evaluate.sample(data.test, EXAMPLES)
    say(f"{len(test)} searches, drawn at random from the test interactions")
    found = searcher.search_interactions(test, k=5, num_beams=NUM_BEAMS, exclude_history=True)
    for row, items in enumerate(found.items.tolist()):
        say(f"\n  {_request(test, row, data.catalog)}")
        for rank, item in enumerate((item for item in items if item >= 0), start=1):
            mark = "  <- chosen next" if item == test.items[row] else ""
            say(f"    {rank}. {_title(data.catalog, item)}{mark}")
        if test.items[row] not in items:
            say(f"    (chosen next: {_title(data.catalog, test.items[row])})")
    say()


def _request(test: Interactions, row: int, catalog: Catalog) -> str:
    history: np.ndarray = test.histories[row][test.histories[row] >= 0]
    shown = " | ".join(_title(catalog, item) for item in history[-SHOWN_HISTORY:])
    parts = [f'query "{test.queries[row]}"'] if test.queries[row] else []
    parts += [f"last of {len(history)} before: {shown}"] if len(history) else []
    return ", ".join(parts)


def _title(catalog: Catalog, item: int) -> str:
    text = one_line(catalog.texts[item])
    return text if len(text) <= TITLE_WIDTH else text[: TITLE_WIDTH - 1] + "…"
