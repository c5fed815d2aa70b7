"""Searching with texts, item ids or whole test sets: requests are made into batches for the model and the index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.data import Catalog, Interactions, pad_histories
from dgi.model.dgi_model import DGIModel
from dgi.model.encoding import Requests, device_of, encode_items
from dgi.model.encoding import encode_requests as encode_requests
from dgi.progress import Progress
from dgi.retrieval.index import DGIIndex, SearchResult, item_ids
from dgi_kernels import TrieFilter

SAMPLED_ITEMS = 32  # encoded again, to tell whether an index is of this model and catalog
SAME_VECTOR = 0.99  # least mean cosine of the sample; half precision stays well above


class Searcher:
    """A model, the index of a catalog, and the features of its items, which histories are made of.

    Args:
        model: the trained model.
        index: what :meth:`dgi.DGIIndex.build` made of ``model`` and ``catalog``; moved to the model's device.
        catalog: the items.
        batch_size: requests searched at once.

    Raises:
        ValueError: index, model and catalog do not belong together.
    """

    def __init__(self, model: DGIModel, index: DGIIndex, catalog: Catalog, *, batch_size: int = 64) -> None:
        self.model = model
        self.index = index.to(device_of(model))
        self.index.check_model(model)
        self.catalog = catalog
        self.batch_size = batch_size
        if index.ids != catalog.ids:
            raise ValueError(
                f"the index holds {len(index)} items, the catalog {len(catalog)}, and their ids or order "
                f"differ; index this catalog"
            )
        self.item_features = model.encoder.prepare_items(catalog)
        self._check_vectors()

    def _check_vectors(self) -> None:
        rows = torch.linspace(0, len(self.index) - 1, min(SAMPLED_ITEMS, len(self.index))).long()
        z = encode_items(self.model, self.item_features[rows]).float()
        cosine = float(F.cosine_similarity(z, self.index.vectors[rows.to(z.device)], dim=1).mean())
        if cosine < SAME_VECTOR:
            raise ValueError(
                f"the index was built with another model or other texts: its vectors have a mean cosine "
                f"of {cosine:.2f} with what this model makes of the catalog; index the catalog again"
            )

    def search(
        self,
        queries: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | None = None,
        *,
        query_vectors: np.ndarray | None = None,
        k: int = 10,
        num_beams: int | Sequence[int] = 50,
        exclude_history: bool = False,
        filters: Sequence[TrieFilter | None] | TrieFilter | None = None,
        progress: bool = False,
        **scoring: Any,
    ) -> SearchResult:
        """Search for n requests, each a query, a history, or both.

        Args:
            queries: n texts, "" where there is none.
            histories: for each request the ids of items chosen before, oldest first; the model reads the last ones.
            query_vectors: (n, vector_dim), for a model that reads vectors.
            k: items per request.
            num_beams: semantic IDs that survive each level of the search, one number or one per level.
            exclude_history: leave the items of a request's history out of its results.
            filters: see :meth:`dgi.DGIIndex.search`.
            progress: show a progress bar.
            **scoring: ``node_scores``, ``strength`` (one for all requests), ``order``, ``cosine_weight``, ``share``
                and ``guide_weight`` of :meth:`dgi.DGIIndex.search`.

        Returns:
            The results in the order of the requests, on the CPU.

        Raises:
            ValueError: nothing to search for, lengths that differ, or an id that the catalog does not have.
        """
        given = {"queries": queries, "histories": histories, "query_vectors": query_vectors}
        lengths = {name: len(value) for name, value in given.items() if value is not None}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"queries, histories and query_vectors must be of one length, at least 1; got {lengths}")
        n = next(iter(lengths.values()))
        rows = self._rows(histories or [[]] * n)
        requests = Requests.prepare(self.model, queries or [""] * n, rows, query_vectors)
        exclude = torch.from_numpy(rows) if exclude_history else None
        return self._search(requests, exclude, k, num_beams, filters, progress, scoring)

    def search_interactions(
        self,
        interactions: Interactions,
        *,
        k: int = 10,
        num_beams: int | Sequence[int] = 50,
        exclude_history: bool = False,
        progress: bool = False,
        **scoring: Any,
    ) -> SearchResult:
        """Search with the queries and histories of recorded interactions; see :meth:`search`."""
        exclude = torch.from_numpy(interactions.histories) if exclude_history else None
        return self._search(Requests.of(self.model, interactions), exclude, k, num_beams, None, progress, scoring)

    def _search(
        self,
        requests: Requests,
        exclude: Tensor | None,
        k: int,
        num_beams: int | Sequence[int],
        filters: Sequence[TrieFilter | None] | TrieFilter | None,
        progress: bool,
        scoring: dict[str, Any],
    ) -> SearchResult:
        device = device_of(self.model)
        parts = []
        with Progress(len(requests), "searching", unit="requests", shown=progress) as bar:
            for rows, batch in requests.batches(self.item_features, self.batch_size):
                own = filters[rows] if isinstance(filters, Sequence) else filters
                left_out = None if exclude is None else exclude[rows].to(device)
                result = self.index.search(
                    self.model, batch.to(device), k, num_beams=num_beams, exclude=left_out, filters=own, **scoring
                )
                parts.append((result.items.cpu(), result.scores.cpu(), result.cosines.cpu()))
                bar.update(len(batch))
        items, scores, cosines = map(torch.cat, zip(*parts, strict=True))
        return SearchResult(items, scores, cosines, item_ids(self.index.ids, items))

    def _rows(self, histories: Sequence[Sequence[str]]) -> np.ndarray:
        unknown = [item_id for history in histories for item_id in history if item_id not in self.catalog]
        if unknown:
            raise ValueError(f"histories must hold ids of the catalog's items; it has no item {unknown[0]!r}")
        rows = [[self.catalog.row(item_id) for item_id in history] for history in histories]
        return pad_histories(rows, max(1, max(map(len, rows))))


@torch.no_grad()
def rank_by_cosine(
    queries: Tensor, vectors: Tensor, k: int, *, exclude: Tensor | None = None, batch_size: int = 256
) -> Tensor:
    """Exact nearest items by cosine, by comparing each query with every item: dense retrieval without an index.

    Args:
        queries: (n, d).
        vectors: (N, d).
        exclude: (n, E) int64 rows to leave out of each ranking, -1 for none.

    Returns:
        (n, k) int64 rows, best first, -1 where there are fewer than k.
    """
    unit = F.normalize(vectors, dim=1)
    parts = []
    for rows in torch.arange(len(queries)).split(batch_size):
        cosines = F.normalize(queries[rows], dim=1) @ unit.T
        if exclude is not None:
            named = exclude[rows].to(vectors.device)
            cosines[(named >= 0).nonzero()[:, 0], named[named >= 0]] = -torch.inf
        best = cosines.topk(min(k, len(vectors)), dim=1)
        parts.append(best.indices.masked_fill(best.values == -torch.inf, -1).cpu())
    ranked = torch.cat(parts)
    return F.pad(ranked, (0, k - ranked.shape[1]), value=-1)
