"""Names of the systems of a comparison; apart from the systems, so that a help text needs no torch."""

from __future__ import annotations

DESCRIPTIONS: dict[str, str] = {
    "random": "random vectors; must come last",
    "popularity": "most popular items",
    "bm25": "BM25 over item texts",
    "bm25_expanded": "BM25, items with their training queries",
    "given_vectors": "cosine of the vectors of the data",
    "dense_in_batch": "dense, in-batch softmax with log q",
    "dense": "dense, softmax over all items",
    "dense_bias": "dense, over all items, item bias",
    "sasrec": "SASRec-like: item ids, over all items",
    "two_stage": "two-stage, TIGER-like: K-means codes, fixed",
    "dsi_atomic": "DSI-like: one code per item",
    "dsi_hierarchical": "DSI-like: clusters of clusters",
    "straight_through": "UniSearch-like: straight-through",
    "dgi": "DGI, in stages",
    "dgi_soft": "DGI, in stages, with soft gradient to items and codes",
    "dgi_moving_codes": "DGI, from a trained encoder, codes move at every step",
    "dgi_one_stage": "DGI, one stage, nothing trained before",
    "dgi_straight_through": "dgi_soft with straight-through gradient",
    "dgi_detached": "dgi_soft without soft gradient",
    "dgi_separate_heads": "dgi_soft without weight sharing",
    "dgi_detached_separate": "dgi_soft without either",
    "dgi_inner_product": "dgi_soft without scaled cosine",
    "dgi_none": "dgi_soft without all three",
}
DEFAULT_SYSTEMS = (
    "popularity",
    "bm25",
    "bm25_expanded",
    "dense_in_batch",
    "dense",
    "dense_bias",
    "sasrec",
    "two_stage",
    "dsi_atomic",
    "dsi_hierarchical",
    "straight_through",
    "dgi",
)
