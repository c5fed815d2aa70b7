"""``dgi search``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dgi.cli.common import (
    DATA_FORMAT,
    add_data,
    add_index,
    add_model,
    add_num_beams,
    add_run_options,
    add_scoring,
    load_catalog,
    load_searcher,
    positive,
    scoring,
)

HELP = "search an index with a query, a history of items, or both"
EPILOG = f"""\
examples:
  dgi search --index run/index.safetensors --model run --data my-data --query "space opera" --k 5
  dgi search --index demo-output/index.safetensors --model demo-output --data movielens-100k --history 50 172 181

Prints rank, log-probability of the item's semantic ID, cosine, id and text of every result.

{DATA_FORMAT}
  Of the folder only the items are read, with --popularity the training interactions too.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_index(parser)
    add_model(parser)
    add_data(parser)
    parser.add_argument("--query", metavar="TEXT", default="", help="what is looked for")
    parser.add_argument(
        "--query-vector",
        metavar="FILE",
        type=Path,
        help="a .npy file with the query's vector (1, d), for a model that reads vectors",
    )
    parser.add_argument(
        "--history", metavar="ID", nargs="+", default=[], help="ids of items chosen before, oldest first"
    )
    parser.add_argument("--keep-history", action="store_true", help="let items of the history be results too")
    parser.add_argument("--k", metavar="K", type=positive, default=10, help="number of results (default: %(default)s)")
    add_num_beams(parser)
    add_scoring(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines of text")
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    from dgi.data.readers import read_vectors

    if not args.query.strip() and not args.history and args.query_vector is None:
        raise ValueError("nothing to search for: give --query, --history or both")
    catalog = load_catalog(args.data)
    searcher = load_searcher(args, catalog)
    vectors = None if args.query_vector is None else read_vectors(args.query_vector, 1, "query")
    found = searcher.search(
        [args.query],
        [args.history],
        query_vectors=vectors,
        k=args.k,
        num_beams=args.num_beams,
        exclude_history=not args.keep_history,
        **scoring(args, searcher),
    )
    rows = [row for row in found.items[0].tolist() if row >= 0]
    values = zip(rows, found.scores[0].tolist(), found.cosines[0].tolist(), strict=False)
    _show(
        args,
        [
            {"rank": rank, "score": score, "cosine": cosine, "id": catalog.ids[row], "text": catalog.texts[row]}
            for rank, (row, score, cosine) in enumerate(values, start=1)
        ],
    )


def _show(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    from dgi.data.catalog import one_line

    if args.json:
        answer = {"query": args.query, "history": args.history, "results": results}
        text = json.dumps(answer, ensure_ascii=False)
        print(text if _can_print(text) else json.dumps(answer))
        return
    if not results:
        print("no results")
    for result in results:
        print(
            "{rank:>3}  {score:>8.3f}  {cosine:>6.3f}  {id}  {text}".format(
                **{**result, "id": one_line(result["id"]), "text": one_line(result["text"])}
            )
        )


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
