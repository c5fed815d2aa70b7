"""Arguments that commands share, and the loading of what they name."""

from __future__ import annotations

import argparse
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dgi.data import Catalog, Dataset
    from dgi.model.dgi_model import DGIModel
    from dgi.retrieval.search import Searcher

MOVIELENS = "movielens-100k"
MODEL_FILE = "model.safetensors"

DATA_FORMAT = f"""\
data: a folder with items.* (columns id, text) and interactions.* (item_id, timestamp, and query and/or history: ids
  of the items chosen before, oldest first); the last fifth by time is the test set. Or, already split,
  interactions.train.* and interactions.test.*. * is tsv, jsonl (both also .gz) or parquet. Optional vectors, one per
  row: items.npy and queries.npy (or queries.train.npy and queries.test.npy).
  "{MOVIELENS}" names the data of "dgi demo", which pip fetches."""


def positive(text: str) -> int:
    """An argument that is a whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be from 1 to {2**31 - 1}; got {value}")
    return value


def finite(text: str) -> float:
    """An argument that is a finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number; got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite; got {text}")
    return value


def widths(text: str) -> int | list[int]:
    """An argument that is a whole number from 1, or several with commas between them."""
    return [positive(part) for part in text.split(",")] if "," in text else positive(text)


def next_command(*words: object) -> str:
    """A command to copy into a shell, whatever its arguments contain."""
    return "next: " + shlex.join(map(str, words))


def add_data(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--data", metavar="DIR", required=required, help="the data, see below")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", required=True, type=Path, help='output folder of "dgi train"')


def add_index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", metavar="FILE", required=True, type=Path, help='output file of "dgi index"')


def add_num_beams(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-beams",
        metavar="M",
        type=widths,
        default=50,
        help="semantic IDs that survive each level of the search: one number, or one per level as in 10,50,80 "
        "(default: %(default)s)",
    )


def add_scoring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--popularity",
        metavar="ALPHA",
        type=finite,
        default=0.0,
        help="add ALPHA times the log of an item's share of all training clicks to its score: above 0 for what is "
        "popular, below 0 for what is not (default: %(default)s)",
    )
    parser.add_argument(
        "--order",
        choices=("lexicographic", "sum"),
        help="rank by score, then cosine, or by the sum of both, with the weights of dgi index --tune (default: the "
        "sum, where it was the better one in tuning)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one, else the CPU)")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress bars")


def device(name: str | None) -> torch.device:
    """The device of that name, by default this process's GPU or the CPU."""
    import torch

    from dgi.training.distributed import local_device

    if name is None:
        return local_device()
    try:
        found = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # which, depends on how torch was built
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    if found.type == "meta":
        raise ValueError("--device meta cannot be used: it holds no numbers")
    return found


def load_data(name: str) -> Dataset:
    """The dataset of a folder, or MovieLens-100K."""
    from dgi.data import load_dataset, load_movielens

    return load_movielens() if name == MOVIELENS else load_dataset(name)


def load_catalog(name: str) -> Catalog:
    """The catalog of a folder, whose interactions are not read, or of MovieLens-100K."""
    from dgi.data import load_items

    return load_data(name).catalog if name == MOVIELENS else load_items(name)


def load_trained(folder: Path, on: torch.device) -> DGIModel:
    """The model that ``dgi train`` left in a folder."""
    from dgi.training.checkpoint import load_model

    path = folder / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f'{path}: there is no such file; "dgi train --output {shlex.quote(str(folder))}" makes it'
        )
    return load_model(path).to(on)


def load_searcher(args: argparse.Namespace, catalog: Catalog) -> Searcher:
    """Model and index of ``--model`` and ``--index``, on ``--device``."""
    from dgi.retrieval.index import DGIIndex
    from dgi.retrieval.search import Searcher

    if not args.index.is_file():
        raise FileNotFoundError(
            f'{args.index}: there is no such file; "dgi index --output {shlex.quote(str(args.index))}" makes it'
        )
    return Searcher(load_trained(args.model, device(args.device)), DGIIndex.load(args.index), catalog)


def scoring(args: argparse.Namespace, searcher: Searcher) -> dict[str, Any]:
    """What ``--popularity`` and ``--order`` say, as :meth:`dgi.DGIIndex.search` takes it.

    Node scores are by the clicks of the training set, one more for each item, so that none has none.
    """
    if args.popularity == 0:
        return {"order": args.order}
    import torch

    from dgi.data import train_counts

    index = searcher.index
    clicks = torch.from_numpy(1 + train_counts(load_data(args.data).train, len(index))).double()
    return {"order": args.order, "node_scores": index.trie.node_scores(clicks), "strength": args.popularity}
