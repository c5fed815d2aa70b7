"""``dgi demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dgi.cli.common import DATA_FORMAT, MOVIELENS, add_data, add_run_options, device, load_data

HELP = "train, index, search and evaluate on MovieLens-100K, in minutes on two CPU cores"
EPILOG = f"""\
examples:
  dgi demo
  dgi demo --data my-data --output my-demo

From the last 10 films watched, find the next one. Trains a dense dual encoder and DGI with the same encoder, epochs
and softmax over all items, chooses on a validation set how each ranks, compares them with popularity on what was
watched later, and shows five searches. The output folder receives metrics.json, index.safetensors, model.safetensors,
training_curve.png and buckets.png.
Run again, an interrupted demo continues where it was.

{DATA_FORMAT}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser, required=False)
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("demo-output"),
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument("--full", action="store_true", help="evaluate all test interactions, not a fixed sample")
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    from dgi.data import MOVIELENS_TERMS
    from dgi.demo import run_demo

    name = args.data or MOVIELENS
    if name == MOVIELENS:
        print(f"{MOVIELENS_TERMS}\n")
    run_demo(load_data(name), args.output, device=device(args.device), full=args.full, progress=args.progress)
