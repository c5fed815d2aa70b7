"""Generative systems behind the protocol of the baselines: DGI with its ablations, and fixed semantic IDs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.config import TrainConfig
from dgi.data import Dataset, Interactions, train_counts
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.encoders import start_at_principal_axes
from dgi.model.encoding import Requests, encode_items, encode_requests
from dgi.retrieval.baselines.codes import CodeKind, FixedCodesModel, fixed_codes_model, given_codes_model
from dgi.retrieval.baselines.dense import IdEncoder, ItemVectors, count_parameters, own_encoder
from dgi.retrieval.baselines.plan import Plan, Training, train, validation_sample
from dgi.retrieval.baselines.protocol import Found, Retriever
from dgi.retrieval.fused import K, RankingWeights, choose_weights, hit_rate_and_ndcg
from dgi.retrieval.index import DGIIndex
from dgi.retrieval.search import Searcher, rank_by_cosine
from dgi.training.seeds import CLUSTERING, derived_seed, generator
from dgi_kernels import Trie

if TYPE_CHECKING:
    from typing_extensions import Self

CURVE_SAMPLE = 500  # validation requests searched while training: a beam search takes longer than an exact one


class Generative(Retriever):
    """Beam search over semantic IDs.

    The items that the beams hold are ranked as the paper has it, by the beam's score and then by cosine; or by the sum
    of :mod:`dgi.retrieval.fused`, if one is better on the validation set.

    Args:
        plan: encoder, codebooks, budget and beams.
        codes: None for DGI, whose codes are trained; else how fixed codes are made, see :func:`fixed_codes_model`;
            ``given``: of the vectors of the data, and the decoder alone is trained, see :func:`given_codes_model`.
        from_encoder: start from an encoder trained alone for ``plan.encoder_share`` of the steps, with a softmax over
            all items. Where the plan has a folder, all systems of a seed share it. False: one stage, from the start.
        name: of the run's folder.
        items: what vectors of items are made of, see :func:`dgi.retrieval.baselines.dense.own_encoder`.
        model: fields of the plan's :class:`dgi.ModelConfig` to replace: the paper's ablations.
    """

    def __init__(
        self,
        plan: Plan,
        codes: CodeKind | None = None,
        *,
        from_encoder: bool = True,
        name: str = "dgi",
        items: ItemVectors = "text",
        **model: Any,
    ) -> None:
        super().__init__()
        if codes is not None and from_encoder == (codes == "given"):
            raise ValueError(
                'codes must be made of a trained encoder\'s vectors (from_encoder=True), or be "given", without one; '
                f"got {codes!r}, from_encoder={from_encoder}"
            )
        self.plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, **model))
        self.codes, self.from_encoder, self.name = codes, from_encoder, name
        self.items = items
        self.seconds = 0.0
        self.weights = RankingWeights()

    def fit(self, data: Dataset) -> Self:
        steps = self.plan.steps(data)
        first = max(1, round(self.plan.encoder_share * steps)) if self.from_encoder else 0
        encoder, stage = self._train_encoder(data, first) if first else (None, Training())
        torch.manual_seed(self.plan.training.seed)
        self.model = self._build(data, encoder)
        # All items as candidates, as the dense baseline has them; TIGER learns semantic IDs alone.
        objective: dict[str, Any] = {"contrastive": "all_items"}
        if self.codes == "given":
            objective = {"contrastive": "in_batch", "loss_weights": {"infonce": 0.0}}
        config, folder = self.plan.part(self.name, steps - first, **objective)
        self._train(data, config, folder)
        self.curve = [*stage.curve, *({**row, "step": row["step"] + first} for row in self.curve)]
        self.seconds += stage.seconds
        return self

    def _train(self, data: Dataset, config: TrainConfig, folder: Path | None) -> None:
        """Train ``self.model``, index the catalog, and choose how searches rank."""
        curve_sample = validation_sample(data, CURVE_SAMPLE)

        def validate() -> Mapping[str, float]:
            if isinstance(self.model.item_codes, Tensor) and bool((self.model.item_codes < 0).any()):
                return {}  # no codes yet: the encoder is being trained
            self.searcher = self._index(data)
            items = self.search(curve_sample, K, exclude_history=self.plan.exclude_history).items
            return {f"validation_hit_rate@{K}": hit_rate_and_ndcg(items, torch.from_numpy(curve_sample.items))[0]}

        trained = train(self.model, config, data, folder, self.plan, validate)
        self.curve, self.seconds = trained.curve, trained.seconds
        self.searcher = self._index(data)
        self._choose(validation_sample(data), torch.from_numpy(train_counts(data.train, len(data.catalog))))

    def _choose(self, validation: Interactions, counts: Tensor) -> None:
        """The weights of the sum that ranks, on the validation set; see :mod:`dgi.retrieval.fused`."""
        own = self.model.item_bias
        options = self._search_options
        if self.codes == "given":  # TIGER's items have codes and no vectors of their own: a cosine would say nothing
            options |= {"cosine": (0.0,), "guide": (0.0,)}
        if self.codes == "atomic":  # by a code for each item the guide would be exact dense retrieval
            options["guide"] = (0.0,)
        self.weights, _ = choose_weights(self.searcher, validation, counts=counts, **options)
        self.searcher.index = self.weights.applied(self.searcher.index, own, counts)
        self.settings = {
            "cosine_weight": self.weights.cosine,
            "popularity_weight": self.weights.popularity,
            "guide_weight": self.weights.guide,
        }
        if own is not None:
            self.settings["bias_weight"] = self.weights.bias

    def _train_encoder(self, data: Dataset, steps: int) -> tuple[DualEncoder, Training]:
        similarity = self.plan.model.similarity
        # Codebooks and ablations are no concern of an encoder: their fields are those of every system that shares it.
        shared = dataclasses.replace(self.plan.model, codebook_sizes=(1,), gradient="soft", heads="shared")
        folder_name = f"encoder-{similarity}" + ("" if self.items == "text" else f"-{self.items}")
        config, folder = self.plan.part(folder_name, steps, contrastive="all_items")
        torch.manual_seed(self.plan.training.seed)
        model = DualEncoder(shared, self._own_encoder(data))
        start_at_principal_axes(model, data.catalog)
        return model, train(model, config, data, folder, self.plan)

    def _own_encoder(self, data: Dataset) -> IdEncoder | None:
        """The encoder in place of the configuration's, if any."""
        return own_encoder(self.plan.model, data, self.items)

    def _build(self, data: Dataset, trained: DualEncoder | None) -> DGIModel:
        if self.codes == "given":
            if data.catalog.vectors is None:
                raise ValueError(f"{data.name} has no item vectors, which this system makes semantic IDs of")
            vectors = torch.from_numpy(data.catalog.vectors)
            return given_codes_model(self.plan.model, vectors, derived_seed(self.plan.training.seed, CLUSTERING))
        if trained is None:
            model = DGIModel(self.plan.model, self._own_encoder(data))
            start_at_principal_axes(model, data.catalog)
            return model
        encoder = copy.deepcopy(trained.encoder)
        if self.codes is None:
            return DGIModel(self.plan.model, encoder)
        z = encode_items(trained, trained.encoder.prepare_items(data.catalog))
        source = generator(self.plan.training.seed, CLUSTERING)
        return fixed_codes_model(self.codes, self.plan.model, z, source, encoder)

    def _index(self, data: Dataset) -> Searcher:
        model = self.model
        if not isinstance(model, FixedCodesModel):
            return Searcher(model, DGIIndex.build(model, data.catalog), data.catalog)
        z = encode_items(model, model.encoder.prepare_items(data.catalog))
        sizes = tuple(len(codebook) for codebook in model.quantizer.codebooks)
        trie = Trie.from_codes(model.item_codes, codebook_sizes=sizes)
        return Searcher(model, DGIIndex(trie, F.normalize(z.float(), dim=1), data.catalog.ids), data.catalog)

    @property
    def num_beams(self) -> int | tuple[int, ...]:
        """The plan's, or the most of them where semantic IDs are not of the plan's length."""
        wanted = self.plan.num_beams
        if isinstance(wanted, int) or len(wanted) == self.searcher.index.trie.depth:
            return wanted
        return max(wanted)

    @property
    def _search_options(self) -> dict[str, Any]:
        return {
            "num_beams": self.num_beams,
            "exclude_history": self.plan.exclude_history,
            "progress": self.plan.progress,
        }

    def search(self, queries: Interactions, k: int, *, exclude_history: bool = False) -> Found:
        options = self._search_options | {"exclude_history": exclude_history}
        found = self.searcher.search_interactions(queries, k=k, **options)
        return Found(found.items, found.scores)

    def nearest(self, queries: Interactions, k: int, *, exclude_history: bool = False) -> Tensor | None:
        """(n, k) catalog rows by exact cosine of the model's own vectors, with no beams; -1 where there are fewer.

        None where vectors are no part of the system, or are compared by another similarity.
        """
        if self.codes == "given" or self.plan.model.similarity != "cosine":
            return None
        encoded = encode_requests(self.model, Requests.of(self.model, queries), self.searcher.item_features)
        excluded = torch.from_numpy(queries.histories) if exclude_history else None
        return rank_by_cosine(encoded.float().cpu(), self.item_vectors(), k, exclude=excluded)

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    def item_vectors(self) -> Tensor:
        return encode_items(self.model, self.searcher.item_features).float().cpu()
