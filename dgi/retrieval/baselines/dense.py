"""Dense retrieval, trained as well as DGI is: two towers, over item texts or over a learned vector per item."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi.config import ModelConfig
from dgi.data import Catalog, Dataset, Interactions, train_counts
from dgi.data.batches import Batch
from dgi.model.dgi_model import DGIOutput, DualEncoder
from dgi.model.encoders import Encoder, SequenceEncoder, principal_axes, start_at_principal_axes
from dgi.model.encoding import Requests, encode_items, encode_requests
from dgi.retrieval.baselines.plan import Plan, train, validation_sample
from dgi.retrieval.baselines.protocol import ScoringRetriever
from dgi.retrieval.fused import K, hit_rate_and_ndcg

if TYPE_CHECKING:
    from typing_extensions import Self

# Powers of an item's training count that its score is divided by; below 0 popular items gain.
POPULARITY_WEIGHTS = (0.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 0.75, 1.0)
# Of vectors of items and codes at the start, as SASRec has them. A cosine learns in angles: by a rate of 1e-3 a step,
# vectors of length 1 turn by hardly anything.
STD = 0.02


class BiasedDualEncoder(DualEncoder):
    """A dual encoder with a learned bias for every item, for InfoNCE over all items.

    Attributes:
        item_bias: parameter (num_items,).
    """

    def __init__(self, config: ModelConfig, num_items: int, encoder: Encoder | None = None) -> None:
        super().__init__(config, encoder)
        self.item_bias = nn.Parameter(torch.zeros(num_items))

    def forward(
        self, batch: Batch, *, tau: float = 1.0, seed: int | Tensor | None = None, row_offset: int = 0
    ) -> DGIOutput:
        return self.encode_clicks(batch)[0]._replace(item_bias=self.item_bias)


class IdEncoder(SequenceEncoder):
    """The built-in transformer over the history, with a learned vector for every item in place of its text.

    Args:
        config: the model's configuration; query texts are read as its text tower reads them.
        num_items: size of the catalog.
        queries: whether requests have query texts.
        from_vectors: :meth:`start` at the principal axes of the catalog's vectors, not at random.
    """

    def __init__(
        self, config: ModelConfig, num_items: int, *, queries: bool = False, from_vectors: bool = False
    ) -> None:
        super().__init__(dataclasses.replace(config, encoder="text"))
        self.num_items, self.queries, self.from_vectors = num_items, queries, from_vectors
        self.tower = _IdTower(config.dim, num_items, self.tower if queries else None)

    @torch.no_grad()
    def start(self, catalog: Catalog) -> None:
        if not self.from_vectors:
            return
        if catalog.vectors is None:
            raise ValueError("the catalog has no vectors for its items to start at; give them beside the items")
        vectors = torch.from_numpy(np.ascontiguousarray(catalog.vectors, dtype=np.float32))
        start = vectors @ principal_axes(vectors, self.config.dim)
        cast(_IdTower, self.tower).items.weight[:, : start.shape[1]] = start * (STD / start.std())

    def prepare_items(self, catalog: Catalog) -> Tensor:
        if len(catalog) != self.num_items:
            raise ValueError(f"catalog must have the {self.num_items} items of the model; got {len(catalog)}")
        return torch.arange(len(catalog))

    def prepare_queries(self, texts: Sequence[str], vectors: np.ndarray | None = None) -> Tensor | None:
        return super().prepare_queries(texts) if self.queries else None


class _IdTower(nn.Module):
    """Catalog rows (N,) to vectors of items, words (n, T) to vectors of queries."""

    def __init__(self, dim: int, num_items: int, words: nn.Module | None) -> None:
        super().__init__()
        self.items = nn.Embedding(num_items, dim)
        nn.init.normal_(self.items.weight, std=STD)
        self.words = words

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim == 1:
            return self.items(features)
        assert self.words is not None
        return self.words(features)


ItemVectors = Literal["text", "random", "given"]


def own_encoder(config: ModelConfig, data: Dataset, items: ItemVectors) -> IdEncoder | None:
    """A new encoder with learned vectors of the items of a data set; None where the configuration's own reads them.

    Args:
        config: the model's configuration.
        data: its items, and whether its requests have query texts.
        items: what vectors of items are made of: ``text``, what the configuration's encoder reads; ``random``, a
            learned vector each, as SASRec has it; ``given``, such a one that starts at the vectors of the data.
    """
    if items == "text":
        return None
    if items == "given" and not config.principal_axes:
        raise ValueError("items can start at the vectors of the data with principal_axes=True only; it is False")
    return IdEncoder(config, len(data.catalog), queries=any(data.train.queries), from_vectors=items == "given")


class Dense(ScoringRetriever):
    """Exact nearest items by the vectors of a trained :class:`dgi.DualEncoder`.

    The score is ``ẑ_q · ẑ_n / τ_CL + b_n − α log(1 + clicks_n)``, with the weight of popularity α chosen on the
    validation set.

    Args:
        plan: encoder and budget.
        contrastive: candidates of the softmax in training, see :class:`dgi.TrainConfig`; ``in_batch`` and ``sampled``
            are corrected for how often items are drawn (``log_q`` of the plan).
        item_bias: learn b_n; needs ``all_items``.
        items: what vectors of items are made of, see :func:`own_encoder`.
        steps: of training, if not the plan's.
        name: of the run's folder.
    """

    def __init__(
        self,
        plan: Plan,
        contrastive: str = "all_items",
        *,
        item_bias: bool = False,
        items: ItemVectors = "text",
        steps: int | None = None,
        name: str = "dense",
    ) -> None:
        super().__init__()
        if item_bias and contrastive != "all_items":
            raise ValueError(f'item_bias needs contrastive="all_items"; got {contrastive!r}')
        self.plan, self.contrastive, self.item_bias, self.items = plan, contrastive, item_bias, items
        self.steps, self.name = steps, name
        self.popularity_weight = 0.0
        self.seconds = 0.0

    def fit(self, data: Dataset) -> Self:
        torch.manual_seed(self.plan.training.seed)
        self.model = self._build(data)
        start_at_principal_axes(self.model, data.catalog)
        self.log_counts = torch.from_numpy(np.log1p(train_counts(data.train, len(data.catalog)))).float()
        self.item_features = self.model.encoder.prepare_items(data.catalog)
        validation = validation_sample(data)

        def validate() -> Mapping[str, float]:
            self._vectors = self._encode_items()
            return {f"validation_hit_rate@{K}": self._measure(validation)[0]}

        steps = self.plan.steps(data) if self.steps is None else self.steps
        config, folder = self.plan.part(self.name, steps, contrastive=self.contrastive)
        trained = train(self.model, config, data, folder, self.plan, validate)
        self.curve, self.seconds = trained.curve, trained.seconds
        self._vectors = self._encode_items()
        self._choose(validation)
        return self

    def _build(self, data: Dataset) -> DualEncoder:
        config = self.plan.model
        encoder = own_encoder(config, data, self.items)
        return BiasedDualEncoder(config, len(data.catalog), encoder) if self.item_bias else DualEncoder(config, encoder)

    def _encode_items(self) -> Tensor:
        return encode_items(self.model, self.item_features).float().cpu()

    def _measure(self, queries: Interactions) -> tuple[float, float]:
        """Hit rate and NDCG at K of recorded interactions."""
        items = self.search(queries, K, exclude_history=self.plan.exclude_history).items
        return hit_rate_and_ndcg(items, torch.from_numpy(queries.items))

    def _choose(self, validation: Interactions) -> None:
        best = -1.0
        for weight in POPULARITY_WEIGHTS:
            chosen, self.popularity_weight = self.popularity_weight, weight
            ndcg = self._measure(validation)[1]
            if ndcg > best:
                best = ndcg
            else:
                self.popularity_weight = chosen
        self.settings = {"popularity_weight": self.popularity_weight}

    def scores(self, queries: Interactions) -> Tensor:
        encoded = encode_requests(self.model, Requests.of(self.model, queries), self.item_features).float().cpu()
        if self.plan.model.similarity == "inner_product":
            scores = encoded @ self._vectors.T
        else:
            scores = F.normalize(encoded, dim=1) @ F.normalize(self._vectors, dim=1).T
            scores /= self.plan.training.contrastive_temperature
        if isinstance(self.model, BiasedDualEncoder):
            scores += self.model.item_bias.detach().float().cpu()
        return scores.sub_(self.popularity_weight * self.log_counts) if self.popularity_weight else scores

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    def item_vectors(self) -> Tensor:
        return self._vectors


def count_parameters(model: nn.Module) -> int:
    """Trained numbers; a parameter that is shared counts once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
