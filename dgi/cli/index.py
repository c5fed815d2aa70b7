"""``dgi index``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dgi.cli.common import (
    DATA_FORMAT,
    add_data,
    add_model,
    add_run_options,
    device,
    load_catalog,
    load_data,
    load_trained,
    next_command,
    positive,
)

if TYPE_CHECKING:
    from dgi.model.dgi_model import DGIModel
    from dgi.retrieval.index import DGIIndex

HELP = "give every item of a catalog its semantic ID and store them as an index"
TUNED_BEAMS = 50  # the default of the searches
EPILOG = f"""\
examples:
  dgi index --model run --data my-data --output run/index.safetensors
  dgi index --model run --data my-data --output run/index.safetensors --tune
  torchrun --nproc-per-node 4 -m dgi index --model run --data my-data --output run/index.safetensors

  Under torchrun every process encodes a share of the items, on its own GPU where there are any, and the first one
  writes the file: byte for byte that of one process with as many threads.
{DATA_FORMAT}
  Of the folder only the items are read, with --tune the interactions too.
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
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose on validation data what the cosine, a learnt bias and popularity count when results are ranked by "
        "a sum, and what the cosine counts when beams are kept (by searches with 50 of them), and store it with the "
        "index, which searches then go by",
    )
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    import torch.distributed as dist

    from dgi.evaluation.metrics import collisions
    from dgi.retrieval.index import DGIIndex
    from dgi.retrieval.shares import encode_catalog
    from dgi.training.distributed import process_group, world_size
    from dgi_kernels.files import check_output

    check_output(args.output.parent, [args.output])
    model = load_trained(args.model, device(args.device))
    catalog = load_catalog(args.data)
    with process_group():
        encoded = encode_catalog(model, catalog, batch_size=args.batch_size, progress=args.progress)
        if world_size() > 1:
            dist.barrier()  # no process leaves while another still talks to it
    if encoded is None:  # another process has them all and goes on alone
        return
    index = DGIIndex.of_encoded(model, catalog, encoded, unique=args.unique)
    if args.tune:
        index = _tuned(index, model, args)
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


def _tuned(index: DGIIndex, model: DGIModel, args: argparse.Namespace) -> DGIIndex:
    import torch

    from dgi.data import train_counts, with_validation
    from dgi.retrieval.fused import K, choose_weights
    from dgi.retrieval.search import Searcher

    data = with_validation(load_data(args.data))
    assert data.validation is not None
    counts = torch.from_numpy(train_counts(data.train, len(index)))
    searcher = Searcher(model, index, data.catalog)
    best, found = choose_weights(
        searcher, data.validation, counts=counts, num_beams=TUNED_BEAMS, exclude_history=True, progress=args.progress
    )
    print(
        f"weights of the ranking by a sum, ndcg@{K} of {len(data.validation):,} validation interactions; for each "
        f"weight of the cosine the best others:"
    )
    for weight in dict.fromkeys(tried.cosine for tried in found):
        tried = max((tried for tried in found if tried.cosine == weight), key=found.__getitem__)
        print(
            f"  cosine {weight:>4g}, bias {tried.bias:g}, popularity {tried.popularity:>5g}, guide "
            f"{tried.guide:>3g}: {found[tried]:.4f}"
            f"{'  (chosen)' if tried == best else ''}"
        )
    return best.applied(index, model.item_bias, counts)
