"""Catalogs, interactions and judgments: read, checked and split."""

from dgi.data.catalog import Catalog, load_catalog
from dgi.data.dataset import Dataset, load_dataset, load_items, with_pseudo_queries, with_validation
from dgi.data.interactions import MAX_HISTORY, Interactions, load_interactions, pad_histories, train_counts
from dgi.data.judgments import Judgments, load_judgments
from dgi.data.movielens import MOVIELENS_TERMS, load_movielens
from dgi.data.readers import DataError
from dgi.data.sequences import (
    SequenceRows,
    Sequences,
    leave_one_out,
    load_sequences,
    next_items,
    training_part,
    training_rows,
)
from dgi.data.split import time_split

__all__ = [
    "MAX_HISTORY",
    "MOVIELENS_TERMS",
    "Catalog",
    "DataError",
    "Dataset",
    "Interactions",
    "Judgments",
    "SequenceRows",
    "Sequences",
    "leave_one_out",
    "load_catalog",
    "load_dataset",
    "load_interactions",
    "load_items",
    "load_judgments",
    "load_movielens",
    "load_sequences",
    "next_items",
    "pad_histories",
    "time_split",
    "train_counts",
    "training_part",
    "training_rows",
    "with_pseudo_queries",
    "with_validation",
]
