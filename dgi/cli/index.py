"""``dgi index``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dgi.cli.common import (
    DATA_FORMAT,
    add_data,
    add_model,
    add_run_options,
    device,
    load_catalog,
    load_trained,
    next_command,
    positive,
)

HELP = "give every item of a catalog its semantic ID and store them as an index"
EPILOG = f"""\
example:
  dgi index --model run --data my-data --output run/index.safetensors

{DATA_FORMAT}
  Of the folder only the items are read.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_data(parser)
    parser.add_argument("--output", metavar="FILE", required=True, type=Path, help="the index file to write")
    parser.add_argument(
        "--batch-size", metavar="N", type=positive, default=1024, help="items encoded at once (default: %(default)s)"
    )
    parser.add_argument(
        "--unique",
        action=argparse.BooleanOptionalAction,
        help="give every item a semantic ID that no other has (default: wherever there are as many IDs as items)",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    from dgi.evaluation.metrics import collisions
    from dgi.retrieval.index import DGIIndex
    from dgi_kernels.files import check_output

    check_output(args.output.parent, [args.output])
    model = load_trained(args.model, device(args.device))
    index = DGIIndex.build(
        model, load_catalog(args.data), unique=args.unique, batch_size=args.batch_size, progress=args.progress
    )
    index.save(args.output)
    shared = collisions(index.codes.cpu().numpy())
    print(
        f"indexed {len(index):,} items under {shared['unique_sids']:,} semantic IDs; "
        f"{shared['colliding_items']:.1%} of the items share theirs"
    )
    print(f"{args.output} is the index")
    print(
        next_command(
            "dgi", "search", "--index", args.output, "--model", args.model, "--data", args.data, "--query", "TEXT"
        )
    )
