"""Systems that DGI is compared with, each built by one call and searched alike.

``Dense(plan).fit(data).search(data.test, 10)``; every one has ``fit`` and ``search`` of :class:`Retriever`.
"""

from dgi.retrieval.baselines.codes import CodeEncoder, FixedCodesModel, fixed_codes_model, hierarchical_codes
from dgi.retrieval.baselines.counting import Cooccurrence, Popularity, RandomVectors, rank_by_popularity
from dgi.retrieval.baselines.dense import BiasedDualEncoder, Dense, IdEncoder
from dgi.retrieval.baselines.generative import Generative
from dgi.retrieval.baselines.lexical import BM25, GivenVectors
from dgi.retrieval.baselines.plan import Plan
from dgi.retrieval.baselines.protocol import Found, Retriever, ScoringRetriever
from dgi.retrieval.baselines.staged import StagedDGI

__all__ = [
    "BM25",
    "BiasedDualEncoder",
    "CodeEncoder",
    "Cooccurrence",
    "Dense",
    "FixedCodesModel",
    "Found",
    "Generative",
    "GivenVectors",
    "IdEncoder",
    "Plan",
    "Popularity",
    "RandomVectors",
    "Retriever",
    "ScoringRetriever",
    "StagedDGI",
    "fixed_codes_model",
    "hierarchical_codes",
    "rank_by_popularity",
]
