"""``dgi eval``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgi.cli.common import (
    DATA_FORMAT,
    add_data,
    add_index,
    add_model,
    add_num_beams,
    add_run_options,
    add_scoring,
    load_data,
    load_searcher,
    positive,
    scoring,
)

if TYPE_CHECKING:
    from dgi.data import Dataset
    from dgi.retrieval.search import Searcher

HELP = "measure a search on the test interactions, and on graded judgments"
EPILOG = f"""\
example:
  dgi eval --model run --index run/index.safetensors --data my-data --output run/evaluation

Measures DGI, beside exact cosine over the model's own vectors and beside popularity: hit rate and NDCG at 1, 5, 10
and 20, overall and by the popularity of the target in training, and hubness. Of the index: isotropy, code usage and
entropy per level, collisions. With --judgments (columns query, item_id, rating 0, 1, 2, …): graded nDCG and recall,
beside plain cosine where items and judged queries have vectors. --popularity and --order are those of dgi search.
The output folder receives metrics.json and buckets.png.

{DATA_FORMAT}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_index(parser)
    add_data(parser)
    parser.add_argument("--judgments", metavar="FILE", type=Path, help="graded judgments, tsv, jsonl or parquet")
    parser.add_argument(
        "--judgment-vectors",
        metavar="FILE",
        type=Path,
        help="a .npy file with one vector per distinct judged query, in sorted order of the queries",
    )
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--max-queries",
        metavar="N",
        type=positive,
        help="evaluate a fixed sample of N test interactions (default: all)",
    )
    parser.add_argument(
        "--keep-history",
        action="store_true",
        help="let items of a request's history be results too (default: left out of every ranking)",
    )
    add_num_beams(parser)
    add_scoring(parser)
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    from dgi.data import load_judgments
    from dgi.evaluation.evaluate import evaluate_judgments, write_results
    from dgi_kernels.files import check_output

    check_output(args.output, [args.output / "metrics.json", args.output / "buckets.png"])
    data = load_data(args.data)
    judgments = (
        None
        if args.judgments is None
        else load_judgments(args.judgments, data.catalog, query_vectors=args.judgment_vectors)
    )
    searcher = load_searcher(args, data.catalog)
    options = {"num_beams": args.num_beams, "progress": args.progress, **scoring(args, searcher)}
    results = _evaluate_test_set(args, data, searcher, options)
    if judgments is not None:
        results["judgments"] = evaluate_judgments(searcher, judgments, **options)
    drawn = write_results(args.output, results)
    _show(results)
    print(f"\n{args.output} holds metrics.json{' and buckets.png' if drawn else ''}")


def _evaluate_test_set(
    args: argparse.Namespace, data: Dataset, searcher: Searcher, options: dict[str, Any]
) -> dict[str, Any]:
    from dgi.evaluation import evaluate
    from dgi.retrieval.baselines import rank_by_popularity

    test = evaluate.sample(data.test, args.max_queries)
    counts = evaluate.train_counts(data.train, len(data.catalog))
    exclude = None if args.keep_history else evaluate.history_rows(test)
    unfindable = 0 if args.keep_history else evaluate.targets_in_history(test)
    if unfindable:
        print(
            f"{unfindable:,} of {len(test):,} test interactions choose an item of their own history, which is left "
            f"out of every ranking; --keep-history lets them be found",
            file=sys.stderr,
        )
    found = searcher.search_interactions(test, k=evaluate.DEPTH, exclude_history=not args.keep_history, **options)
    rankings = {
        "popularity": rank_by_popularity(counts, len(test), evaluate.DEPTH, exclude=exclude),
        "exact cosine": evaluate.rank_by_model_cosine(searcher, test, evaluate.DEPTH, exclude),
        "DGI": found.items,
    }
    return {
        "data": data.name,
        "queries": len(test),
        "test_interactions": len(data.test),
        "history_excluded": not args.keep_history,
        "targets_in_history": unfindable,
        "num_beams": args.num_beams,
        "popularity": args.popularity,
        "order": args.order,
        "systems": evaluate.evaluate_systems(rankings, test, counts),
        "index": evaluate.evaluate_index(searcher.index),
    }


def _show(results: dict[str, Any]) -> None:
    from dgi.evaluation.evaluate import judgments_table, results_table

    print(f"{results['queries']:,} of {results['test_interactions']:,} test interactions of {results['data']}")
    print(results_table(results["systems"]))
    index = results["index"]
    print(
        f"\nitems {index['items']:,}, semantic IDs {index['collisions']['unique_sids']:,}, items that share theirs "
        f"{index['collisions']['colliding_items']:.1%}, isotropy {index['isotropy']['iso_score']:.3f}"
    )
    for level, codes in enumerate(index["codes"], start=1):
        print(
            f"level {level}: {codes['used']:.1%} of {codes['size']:,} codes used, entropy {codes['entropy']:.2f} "
            f"nats, perplexity {codes['perplexity']:.1f}"
        )
    if "judgments" in results:
        print("\n" + judgments_table(results["judgments"]))
