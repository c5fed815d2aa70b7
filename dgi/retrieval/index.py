"""The index of a catalog: its semantic IDs as a trie, its vectors and its ids; and the search over it.

Offline, all items are hard-quantized; their semantic IDs form the trie, and their vectors are kept.  Online, beam
search constrained to the trie finds semantic IDs, and the items below them are ranked lexicographically: beam score
first, then ``ẑ_q · ẑ_item`` (paper, inference).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.data import Catalog
from dgi.data.batches import Batch
from dgi.model.decoders import CachedDecoder, caches
from dgi.model.dgi_model import DGIModel
from dgi.model.encoders import QueryEncoding
from dgi.model.encoding import device_of, encode_items, evaluating
from dgi.retrieval.guide import MAX_WEIGHT, Guide, fit_guides
from dgi.retrieval.shares import EncodedItems, codes_of
from dgi.training.checkpoint import CheckpointError, read_tensors, write_tensors
from dgi_kernels import (
    BeamResult,
    NodeScores,
    Ranking,
    Trie,
    TrieFilter,
    beam_search,
    checks,
    rank_candidates,
)
from dgi_kernels.beam import beam_widths
from dgi_kernels.types import Order

KIND = "DGIIndex"
# What a search keeps of each beam; requests are searched in parts that keep it below this. A decoder with a cache keeps
# keys and values of every level, any other reads the request's memory once per beam.
MEMORY_FLOATS = 2**26
UNIT_TOLERANCE = 1e-3
MAX_ITEM_SCORE = 300.0  # far beyond what can still change places in a sum of log-probabilities


class IndexFormatError(ValueError):
    """An index file is truncated, altered, of another kind, or does not describe an index; the message says which."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The k best items of each of B requests, best first.

    Attributes:
        items: (B, k) int64 catalog rows, -1 where there are fewer.
        scores: (B, k) float32 log-probability of the item's semantic ID, with its node scores if any; with
            ``order="sum"`` the sum that ranks the item. -inf where there is none.
        cosines: (B, k) float32 cosine of query and item, -1 where there is none.
        ids: for each request the ids of its items, without padding.
    """

    items: Tensor
    scores: Tensor
    cosines: Tensor
    ids: list[list[str]]


@dataclass(frozen=True, eq=False)
class DGIIndex:
    """What a search needs besides the model.  Make one with :meth:`build` or :meth:`load`.

    Attributes:
        trie: semantic IDs of all items; the trie's item ids are catalog rows.
        vectors: (N, d) float32, z of every item divided by its norm.
        ids: one distinct id per item, in row order.
        cosine_weight: what the cosine counts in a ranking by a sum, as learnt on validation data; None where nobody
            has, 0 where the lexicographic ranking was better.
        item_scores: (N,) float32 what an item adds to its sum, learnt with it; None for nothing.
        guide_weight: what the cosine counts when beams are kept, learnt with it; 0 where beams are the decoder's alone.

    Raises:
        ValueError: the parts do not fit each other.
    """

    trie: Trie
    vectors: Tensor
    ids: tuple[str, ...]
    cosine_weight: float | None = None
    item_scores: Tensor | None = None
    guide_weight: float = 0.0

    def __post_init__(self) -> None:
        size = len(self.ids)
        if len(set(self.ids)) != size or not all(self.ids):
            raise ValueError("ids must be distinct and not empty")
        if not torch.equal(self.trie.item_ids.sort().values, torch.arange(size, device=self.trie.device)):
            raise ValueError(f"trie must hold each of the {size} rows once; it has {self.trie.num_items} items")
        if self.vectors.ndim != 2 or len(self.vectors) != size or self.vectors.dtype != torch.float32:
            raise ValueError(
                f"vectors must be float32 of shape ({size}, d); got {self.vectors.dtype} of shape "
                f"{tuple(self.vectors.shape)}"
            )
        norms = torch.linalg.vector_norm(self.vectors, dim=1)
        if not bool((((norms - 1).abs() < UNIT_TOLERANCE) | (norms == 0)).all()):
            raise ValueError("vectors must have norm 1, or 0 for an item without a direction")
        scores = self.item_scores
        if scores is not None and (scores.shape != (size,) or scores.dtype != torch.float32):
            raise ValueError(
                f"item_scores must be float32 of shape ({size},); got {scores.dtype} {tuple(scores.shape)}"
            )
        if scores is not None and not bool((scores.abs() <= MAX_ITEM_SCORE).all()):
            raise ValueError(f"item_scores must be finite and at most {MAX_ITEM_SCORE:g} in size")
        checks.number("guide_weight", self.guide_weight, low=-MAX_WEIGHT, high=MAX_WEIGHT)

    @classmethod
    def build(
        cls,
        model: DGIModel,
        catalog: Catalog,
        *,
        unique: bool | None = None,
        batch_size: int = 1024,
        progress: bool = False,
    ) -> DGIIndex:
        """Encode and hard-quantize a catalog in batches, on the model's device, in this process alone.

        ``dgi index`` under ``torchrun`` has all processes encode: :func:`dgi.retrieval.shares.encode_catalog`, then
        :meth:`of_encoded` on rank 0.

        Args:
            model: the trained model.
            catalog: the items.
            unique: give every item a semantic ID that no other has: of items that share one the nearest keeps it, the
                others move (:func:`dgi_kernels.unique_codes`). None: wherever there are as many IDs as items. False:
                items may share theirs.
            batch_size: items encoded at once.
            progress: show a progress bar.

        Returns:
            The index, on the model's device.

        Raises:
            ValueError: the catalog is empty, the model gives an item a vector that is not finite, or ``unique`` is True
                and there are fewer semantic IDs than items.
        """
        features = _checked(model).encoder.prepare_items(catalog)
        z = encode_items(model, features, batch_size=batch_size, progress=progress)
        return cls.of_encoded(model, catalog, EncodedItems(z, codes_of(model, z, batch_size)), unique=unique)

    @classmethod
    def of_encoded(
        cls, model: DGIModel, catalog: Catalog, encoded: EncodedItems, *, unique: bool | None = None
    ) -> DGIIndex:
        """The index of items that are encoded already.

        Args:
            model, catalog: what they were encoded with, and whose items they are.
            encoded: vectors and codes of all items.
            unique: as in :meth:`build`.

        Raises:
            ValueError: an item has a vector that is not finite, or ``unique`` is True and there are fewer semantic IDs
                than items.
        """
        z, codes = encoded
        finite = torch.isfinite(z).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"the model gives {int((~finite).sum())} items a vector that is not finite, first "
                f"{catalog.ids[row]!r}; it cannot be indexed"
            )
        sizes = _codebook_sizes(model)
        wanted = math.prod(sizes) >= len(z) if unique is None else unique
        codes = model.semantic_ids(z, codes, catalog.ids, unique=wanted)
        trie = Trie.from_codes(codes, codebook_sizes=sizes)
        return cls(trie, F.normalize(z.float(), dim=1), catalog.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def codes(self) -> Tensor:
        """(N, m) int64 semantic IDs in row order."""
        codes, rows = self.trie.codes()
        return codes[rows.argsort()]

    def to(self, device: torch.device | str) -> DGIIndex:
        """The index on ``device``."""
        scores = None if self.item_scores is None else self.item_scores.to(device)
        moved = dataclasses.replace(
            self, trie=self.trie.to(device), vectors=self.vectors.to(device), item_scores=scores
        )
        return moved._with_guides(self.__dict__.get("guides"))

    def replaced(self, **changes: Any) -> DGIIndex:
        """The index with other weights."""
        return dataclasses.replace(self, **changes)._with_guides(self.__dict__.get("guides"))

    def _with_guides(self, guides: tuple[Tensor, ...] | None) -> DGIIndex:
        """With guides that were fitted before."""
        if guides is not None:
            self.__dict__["guides"] = tuple(guide.to(self.vectors.device) for guide in guides)
        return self

    def items_of_id(self) -> Tensor:
        """(N,) int64, on the CPU: how many items have the semantic ID of each item, itself among them."""
        _, group, sizes = torch.unique(self.codes.cpu(), dim=0, return_inverse=True, return_counts=True)
        return sizes[group]

    @functools.cached_property
    def guides(self) -> tuple[Tensor, ...]:
        """Vectors of the codes of each level, (K_j, d), that guide beams: :mod:`dgi.retrieval.guide`."""
        found = fit_guides(self.vectors.cpu(), self.codes.cpu(), self.trie.codebook_sizes)
        return tuple(guide.to(self.vectors.device) for guide in found)

    @functools.cached_property
    def _most_items(self) -> int:
        """Of one semantic ID."""
        return int(self.items_of_id().max()) if len(self) else 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: whole or not at all, versioned, with a checksum."""
        arrays, trie_meta = self.trie.state()
        texts = [item_id.encode() for item_id in self.ids]
        tensors = {f"trie.{name}": array for name, array in arrays.items()}
        tensors |= {
            "vectors": self.vectors,
            "id_bytes": torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8),
            "id_offsets": torch.tensor([0, *map(len, texts)]).cumsum(0),
        }
        description: dict[str, Any] = {"kind": KIND, "trie": trie_meta}
        if self.item_scores is not None:
            tensors["item_scores"] = self.item_scores
        if self.cosine_weight is not None:
            description["cosine_weight"] = self.cosine_weight
        if self.guide_weight:
            description["guide_weight"] = self.guide_weight
            tensors |= {f"guides.{level}": guide for level, guide in enumerate(self.guides)}
        write_tensors(path, tensors, description)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DGIIndex:
        """Read what :meth:`save` wrote, onto the CPU, after checking its checksum and its structure.

        Raises:
            IndexFormatError: the file is truncated, altered, of another kind or version, or describes no index.
            OSError: the file cannot be read.
        """
        try:
            tensors, description = read_tensors(path, KIND)
        except CheckpointError as error:
            raise IndexFormatError(str(error)) from error
        try:
            parts = {name: tensors.pop(name) for name in ("vectors", "id_bytes", "id_offsets")}
            scores = tensors.pop("item_scores", None)
            stored = {name: tensors.pop(name) for name in list(tensors) if name.startswith("guides.")}
            trie = Trie.from_state(
                {name.removeprefix("trie."): array for name, array in tensors.items()}, description["trie"]
            )
            ids = _decode_ids(parts["id_bytes"], parts["id_offsets"])
            weight = description.get("cosine_weight")  # files of before have none, nor a guide's
            cosine = None if weight is None else float(weight)
            index = cls(trie, parts["vectors"], ids, cosine, scores, float(description.get("guide_weight", 0.0)))
            if not stored:
                return index
            guides = tuple(stored[f"guides.{level}"] for level in range(trie.depth))
            wanted = [(size, index.vectors.shape[1]) for size in trie.codebook_sizes]
            if [tuple(guide.shape) for guide in guides] != wanted:
                raise ValueError(f"guides must have the shapes {wanted}")
            return index._with_guides(guides)
        except KeyError as error:
            raise IndexFormatError(f"{path} describes no index: it has no {error}") from error
        except (TypeError, ValueError) as error:
            raise IndexFormatError(f"{path} describes no index: {error}") from error

    @torch.no_grad()
    def search(
        self,
        model: DGIModel,
        batch: Batch,
        k: int = 10,
        *,
        num_beams: int | Sequence[int] = 50,
        exclude: Tensor | None = None,
        filters: Sequence[TrieFilter | None] | TrieFilter | None = None,
        node_scores: NodeScores | None = None,
        strength: float | Tensor = 1.0,
        order: Order | None = None,
        cosine_weight: float | None = None,
        share: bool = True,
        guide_weight: float | None = None,
    ) -> SearchResult:
        """Search for a batch of requests; :class:`dgi.Searcher` makes batches from texts and ids.

        Args:
            model: the model that the index was built with, on the index's device.
            batch: B requests; their items are rows of the catalog, their targets are not read.
            k: items per request.
            num_beams: semantic IDs that survive each level, one number or one per level; every item below a surviving
                one is a candidate.
            exclude: (B, E) int64 catalog rows to leave out of each ranking, -1 for none.  They are dropped after the
                search, which therefore looks for k + E items; let ``num_beams`` leave room for them.
            filters: restrict the search to a subset of the items, for all requests or for each.
            node_scores, strength: prefer or avoid items by weights such as their clicks, by
                ``index.trie.node_scores(weights)`` with a weight per catalog row; see :func:`dgi_kernels.beam_step`.
            order, cosine_weight, share: how the items found are ranked, see :func:`dgi_kernels.rank_candidates`. By
                default ``"sum"`` where the index has learnt a weight, else ``"lexicographic"``; the weight is the
                index's own, or 1. A sum has the index's ``item_scores`` too; which beams survive does not depend on
                them.
            guide_weight: what the cosine of query and items, as far as their codes tell, counts when beams are kept,
                see :mod:`dgi.retrieval.guide`; by default the index's own. Scores in the result are without it. Logits
                of all beams of a level are then formed, (B, M, K).

        Raises:
            ValueError: the index and the model, or the batch, do not fit, or ``guide_weight`` is not within ±1e4.
        """
        self._check_fit(model, batch, exclude)
        guide_weight = self.guide_weight if guide_weight is None else guide_weight
        guide_weight = checks.number("guide_weight", guide_weight, low=-MAX_WEIGHT, high=MAX_WEIGHT)
        order = order or ("sum" if self.cosine_weight else "lexicographic")
        weight = self.cosine_weight if cosine_weight is None else cosine_weight
        ranked_by = {"order": order, "cosine_weight": 1.0 if weight is None else weight, "share": share}
        with evaluating(model):
            query = model.encode_queries(batch)
            widest = max(beam_widths(num_beams, self.trie.depth))
            logits = 3 * max(self.trie.codebook_sizes) if guide_weight else 0
            at_once = max(1, MEMORY_FLOATS // (widest * (self._floats_per_beam(model, query) + logits)))
            parts = []
            for start in range(0, max(1, len(batch)), at_once):
                rows = slice(start, start + at_once)
                part = QueryEncoding(*(value[rows] for value in query))
                own = list(filters[rows]) if isinstance(filters, Sequence) else filters
                per_request = isinstance(strength, Tensor) and strength.ndim == 1
                step = model.beam_step_function(part)
                guide = Guide(part.vector, self.guides, guide_weight) if guide_weight else None
                beams = beam_search(
                    self.trie,
                    step if guide is None else guide.guided(step),
                    batch_size=len(part.vector),
                    num_beams=num_beams,
                    normalize="full" if guide is None else "none",
                    filters=own,
                    node_scores=node_scores,
                    strength=cast(Tensor, strength)[rows] if per_request else strength,
                )
                if guide is not None:
                    beams = guide.without(beams)
                left_out = None if exclude is None else exclude[rows]
                parts.append(self._rank(part, beams, k, left_out, own, ranked_by))
        items, scores, cosines = map(torch.cat, zip(*parts, strict=True))
        return SearchResult(items, scores, cosines, item_ids(self.ids, items))

    @staticmethod
    def _floats_per_beam(model: DGIModel, query: QueryEncoding) -> int:
        if caches(model.decoder):
            return max(1, model.depth * cast(CachedDecoder, model.decoder).floats_per_position)
        return max(1, query.memory.shape[1] * query.memory.shape[2])

    def _rank(
        self,
        query: QueryEncoding,
        beams: BeamResult,
        k: int,
        exclude: Tensor | None,
        filters: list[TrieFilter | None] | TrieFilter | None,
        ranked_by: dict[str, Any],
    ) -> Ranking:
        wanted = k if exclude is None else k + exclude.shape[1]
        own = self.item_scores if ranked_by["order"] == "sum" else None
        found = wanted if own is None else max(wanted, beams.nodes.shape[1] * self._most_items)
        ranking = rank_candidates(
            query.vector.float(), self.vectors, self.trie, beams, found, filters=filters, **ranked_by
        )
        if own is not None:
            sums = ranking.scores + own[ranking.items.clamp(min=0)]  # -inf stays where there is no item
            sums, places = sums.sort(dim=1, descending=True, stable=True)
            places = places[:, :wanted]
            ranking = Ranking(ranking.items.gather(1, places), sums[:, :wanted], ranking.cosines.gather(1, places))
        if exclude is None:
            return ranking
        places, exist = first_allowed(ranking.items, exclude, k)
        return Ranking(
            ranking.items.gather(1, places).masked_fill(~exist, -1),
            ranking.scores.gather(1, places).masked_fill(~exist, -torch.inf),
            ranking.cosines.gather(1, places).masked_fill(~exist, -1),
        )

    def _check_fit(self, model: DGIModel, batch: Batch, exclude: Tensor | None) -> None:
        self.check_model(model)
        if batch.item_rows.device != self.vectors.device:
            raise ValueError(f"batch must be on {self.vectors.device}, as the index; it is on {batch.item_rows.device}")
        if len(batch.item_rows) and int(batch.item_rows.max()) >= len(self):
            raise ValueError(
                f"batch.item_rows must be rows of the {len(self)} items indexed; got {int(batch.item_rows.max())}"
            )
        if exclude is not None and (exclude.ndim != 2 or len(exclude) != len(batch)):
            raise ValueError(f"exclude must have shape (B, E) with B = {len(batch)}; got {tuple(exclude.shape)}")

    def check_model(self, model: DGIModel) -> None:
        """Raise ValueError where this index cannot be one of ``model``: other codebooks, width or device."""
        _checked(model)
        sizes, width = _codebook_sizes(model), model.config.dim
        if sizes != self.trie.codebook_sizes or width != self.vectors.shape[1]:
            raise ValueError(
                f"the index has codebooks of {self.trie.codebook_sizes} and width "
                f"{self.vectors.shape[1]}, the model {sizes} and {width}; index the catalog with this "
                f"model"
            )
        device = device_of(model)
        if device != self.vectors.device:
            raise ValueError(f"the index is on {self.vectors.device}, the model on {device}; move one with to()")


def first_allowed(items: Tensor, exclude: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where in each list the first k items are that ``exclude`` does not name.

    Args:
        items: (B, w) int64, w >= k, -1 where there is none.
        exclude: (B, E) int64, -1 for none.

    Returns:
        places (B, k) int64 into the lists, and (B, k) bool whether there is such an item.
    """
    dropped = (items.unsqueeze(-1) == exclude.unsqueeze(1)).any(-1) | (items < 0)
    places = dropped.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
    return places, ~dropped.gather(1, places)


def item_ids(ids: Sequence[str], items: Tensor) -> list[list[str]]:
    """The ids of catalog rows (B, k), without the padding of -1."""
    return [[ids[row] for row in rows if row >= 0] for rows in items.tolist()]


def _checked(model: DGIModel) -> DGIModel:
    if not isinstance(model, DGIModel):
        raise TypeError(f"model must be a DGIModel; got {type(model).__name__}")
    return model


def _codebook_sizes(model: DGIModel) -> tuple[int, ...]:
    return tuple(len(codebook) for codebook in model.quantizer.codebooks)


def _decode_ids(content: Tensor, offsets: Tensor) -> tuple[str, ...]:
    """Cut UTF-8 bytes at ``offsets`` (N + 1,)."""
    bounds = np.asarray(offsets)
    if offsets.dtype != torch.int64 or content.dtype != torch.uint8 or offsets.ndim != 1 or content.ndim != 1:
        raise ValueError("ids must be stored as uint8 bytes and int64 offsets")
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(content) or (np.diff(bounds) < 0).any():
        raise ValueError(f"the offsets of the ids do not cut {len(content)} bytes")
    data = content.numpy().tobytes()
    return tuple(data[start:end].decode() for start, end in zip(bounds[:-1], bounds[1:], strict=True))
