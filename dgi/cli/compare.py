"""``dgi compare``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgi.cli.common import DATA_FORMAT, MOVIELENS, add_run_options, device, positive, widths
from dgi.cli.train import add_settings, configs, read_settings
from dgi.evaluation.names import DEFAULT_SYSTEMS, DESCRIPTIONS

if TYPE_CHECKING:
    from dgi.data import Dataset

HELP = "train baselines and DGI with the same budget and compare them: systems × data sets × seeds"
# Of a model that two cores train in minutes; --set has the last word.
SETTINGS = {"dim": 64, "codebook_sizes": [64, 32, 16], "text_layers": 0, "batch_size": 256}
_SYSTEMS = "\n".join(
    f"  {' ' if name in DEFAULT_SYSTEMS else '-'} {name:<22} {text}" for name, text in DESCRIPTIONS.items()
)
EPILOG = f"""\
examples:
  dgi compare --data {MOVIELENS} --output comparison --budget 1200
  dgi compare --data my-data --data more-data --systems popularity,dense,dgi --seeds 1 --budget 10m --output out
  dgi compare --data my-sequences --split leave_one_out --keep-history --text title --output out

Every trained system gets the same encoder and the same number of steps. Generative systems spend half of them on an
encoder that they share. What is chosen, such as the weight of popularity, is chosen on the validation set: the one in
the files, the last but one item of each user (leave-one-out), or the last tenth of the training interactions.
The output folder receives results.json, results.md, a picture for each data set, cells/ and runs/. Run again, an
interrupted comparison continues where it was, and further systems, seeds and data sets join it. --join takes over what
was run elsewhere. With --set causal=true and sequences, a batch is of whole sequences, every item a request.

systems; those marked with - only if they are named:
{_SYSTEMS}

{DATA_FORMAT}
  Also: sequences.* (item_ids, oldest first, and timestamps; one user per row); queries.* (query_id, query) and qrels.*
  (query_id, item_id, relevance), or ratings.* (query, item_id, rating), with a column split; clicks.*, as
  interactions.*, whose items.* may be absent: an item's text is then its training queries.

settings, for --config and --set: those of "dgi train --help". Other defaults here: {SETTINGS}.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", required=True, action="append", help="the data; may be repeated")
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="folder of the comparison")
    parser.add_argument("--systems", metavar="A,B,…", type=_names, default=DEFAULT_SYSTEMS, help="see below")
    parser.add_argument("--seeds", metavar="N", type=positive, default=3, help="seeds 0 … N-1 (default: %(default)s)")
    parser.add_argument(
        "--budget",
        metavar="N|Nm",
        type=_budget,
        default=(0, 0.0),
        help="steps of every trained system, or minutes (10m) of the dense one: the others get as many steps "
        "(default: the epochs of the settings)",
    )
    parser.add_argument(
        "--encoder-share",
        metavar="X",
        type=float,
        default=0.5,
        help="part of the steps of a generative system that trains its encoder (default: %(default)s)",
    )
    parser.add_argument(
        "--beams",
        metavar="M",
        type=widths,
        default=200,
        help="semantic IDs that survive each level of a search, in generative systems: one number, or one per level as "
        "in 64,500,2000 (default: %(default)s)",
    )
    parser.add_argument("--split", choices=("time", "leave_one_out", "given"), help="(default: by the files)")
    parser.add_argument("--text", metavar="COLUMNS", default="text", help="columns of an item's text, as title,text")
    parser.add_argument("--vectors", metavar="NAME", default="", help="read items.NAME.npy, queries.NAME.npy")
    parser.add_argument("--history", metavar="N", type=positive, default=10, help="items of a history (default: 10)")
    parser.add_argument(
        "--keep-history",
        action="store_true",
        help="let items of a request's history be results too (default: left out of every ranking)",
    )
    parser.add_argument("--max-queries", metavar="N", type=positive, help="evaluate a fixed sample of test requests")
    parser.add_argument(
        "--pseudo-queries", metavar="N", type=positive, help="train with N runs of words of each item's text as queries"
    )
    parser.add_argument(
        "--join",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="take over the cells of another comparison of the same data and budget; may be repeated",
    )
    add_settings(parser)
    add_run_options(parser)


def run(args: argparse.Namespace) -> None:
    from dgi.evaluation.compare import Comparison, compare, join
    from dgi.evaluation.comparison_report import markdown, pictures
    from dgi.retrieval.baselines import Plan
    from dgi_kernels.files import atomic_write

    steps, minutes = args.budget
    settings: dict[str, Any] = {**SETTINGS, "max_history": args.history, **read_settings(args)}
    for other in args.join:
        join(args.output, other)
    results: dict[str, Any] = {}
    for name in args.data:
        data = _load(args, name)
        vectors = data.catalog.vectors
        model, training = configs(settings, 0 if vectors is None else vectors.shape[1])
        if steps:
            training = dataclasses.replace(training, steps=steps)
        beams = args.beams if isinstance(args.beams, int) else tuple(args.beams)
        plan = Plan(model, training, encoder_share=args.encoder_share, num_beams=beams, device=device(args.device))
        comparison = Comparison(
            plan, args.systems, tuple(range(args.seeds)), minutes, not args.keep_history, args.max_queries
        )
        results = compare(data, comparison, args.output, progress=args.progress)
    text = markdown(results)
    with atomic_write(args.output / "results.md") as file:
        file.write(text.encode())
    drawn = pictures(results, args.output)
    print(text)
    print(f"{args.output} holds results.json, results.md{''.join(f', {path.name}' for path in drawn)}")


def _load(args: argparse.Namespace, name: str) -> Dataset:
    from dgi.data import load_dataset, load_movielens, with_pseudo_queries, with_validation

    if name == MOVIELENS:
        return load_movielens()
    data = load_dataset(
        name, split=args.split, max_history=args.history, text=args.text.split(","), vectors=args.vectors
    )
    # Validation first: pseudo-queries are training data only.
    return with_pseudo_queries(with_validation(data), args.pseudo_queries) if args.pseudo_queries else data


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in DESCRIPTIONS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"must be names among {', '.join(DESCRIPTIONS)}; got {text!r}")
    return names


def _budget(text: str) -> tuple[int, float]:
    """(steps, minutes), one of them 0."""
    try:
        steps, minutes = (0, float(text[:-1])) if text.endswith("m") else (int(text), 0.0)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be steps, such as 1200, or minutes, such as 10m; got {text!r}"
        ) from None
    if not 0 < steps + minutes < 2**31:
        raise argparse.ArgumentTypeError(f"must be positive; got {text!r}")
    return steps, minutes
