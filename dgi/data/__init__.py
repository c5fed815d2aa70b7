"""Catalogs, interactions and judgments: read, checked, and split by time."""

from dgi.data.catalog import Catalog, load_catalog
from dgi.data.dataset import Dataset, load_dataset, load_items
from dgi.data.interactions import MAX_HISTORY, Interactions, load_interactions, pad_histories
from dgi.data.judgments import Judgments, load_judgments
from dgi.data.movielens import MOVIELENS_TERMS, load_movielens
from dgi.data.readers import DataError
from dgi.data.split import time_split

__all__ = [
    "MAX_HISTORY",
    "MOVIELENS_TERMS",
    "Catalog",
    "DataError",
    "Dataset",
    "Interactions",
    "Judgments",
    "load_catalog",
    "load_dataset",
    "load_interactions",
    "load_items",
    "load_judgments",
    "load_movielens",
    "pad_histories",
    "time_split",
]
