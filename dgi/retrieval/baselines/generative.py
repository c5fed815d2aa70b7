"""Generative systems behind the protocol of the baselines: DGI with its ablations, and fixed semantic IDs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.data import Dataset, Interactions
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.encoding import encode_items
from dgi.retrieval.baselines.codes import CodeKind, FixedCodesModel, fixed_codes_model
from dgi.retrieval.baselines.dense import K, count_parameters, hit_rate_and_ndcg
from dgi.retrieval.baselines.plan import Plan, Training, train, validation_sample
from dgi.retrieval.baselines.protocol import Found, Retriever
from dgi.retrieval.index import DGIIndex, SearchResult
from dgi.retrieval.search import Searcher
from dgi.training.seeds import CLUSTERING, generator
from dgi_kernels import Trie

if TYPE_CHECKING:
    from typing_extensions import Self

COSINE_WEIGHTS = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)
CANDIDATES = 100  # items of a search that are ranked by the weighted sum
CURVE_SAMPLE = 500  # validation requests searched while training: a beam search takes longer than an exact one


class Generative(Retriever):
    """Beam search over semantic IDs.

    The items that the beams hold are ranked as the paper has it, by the beam's score and then by cosine; or by the sum
    ``score + λ · cosine − log(items that share the semantic ID)``, if a weight λ above 0 is better on the validation
    set.

    Args:
        plan: encoder, codebooks and budget.
        codes: None for DGI, whose codes are trained; else how fixed codes are made, see :func:`fixed_codes_model`.
        from_encoder: start from an encoder trained alone for ``plan.encoder_share`` of the steps, with a softmax over
            all items. Where the plan has a folder, all systems of a seed share it. False: one stage, from the start.
        num_beams: semantic IDs that survive each level.
        name: of the run's folder.
        model: fields of the plan's :class:`dgi.ModelConfig` to replace: the paper's ablations.
    """

    def __init__(
        self,
        plan: Plan,
        codes: CodeKind | None = None,
        *,
        from_encoder: bool = True,
        num_beams: int = 50,
        name: str = "dgi",
        **model: Any,
    ) -> None:
        super().__init__()
        if codes is not None and not from_encoder:
            raise ValueError("fixed codes are made of a trained encoder's vectors; from_encoder must be True")
        self.plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, **model))
        self.codes, self.from_encoder, self.num_beams, self.name = codes, from_encoder, num_beams, name
        self.seconds = 0.0
        self.cosine_weight = 0.0

    def fit(self, data: Dataset) -> Self:
        steps = self.plan.steps(data)
        first = max(1, round(self.plan.encoder_share * steps)) if self.from_encoder else 0
        encoder, stage = self._train_encoder(data, first) if first else (None, Training())
        torch.manual_seed(self.plan.training.seed)
        self.model = self._build(data, encoder)
        validation = validation_sample(data, CURVE_SAMPLE)

        def validate() -> Mapping[str, float]:
            self.searcher = self._index(data)
            items = self.search(validation, K, exclude_history=self.plan.exclude_history).items
            return {f"validation_hit_rate@{K}": hit_rate_and_ndcg(items, torch.from_numpy(validation.items))[0]}

        # All items as candidates, as the dense baseline has them.
        config, folder = self.plan.part(self.name, steps - first, contrastive="all_items")
        trained = train(self.model, config, data, folder, self.plan, validate)
        self.curve = [*stage.curve, *({**row, "step": row["step"] + first} for row in trained.curve)]
        self.seconds = stage.seconds + trained.seconds
        self.searcher = self._index(data)
        self._choose(validation)
        return self

    def _choose(self, validation: Interactions) -> None:
        candidates = self._candidates(validation, CANDIDATES, self.plan.exclude_history)
        targets = torch.from_numpy(validation.items)
        ndcgs = {
            weight: hit_rate_and_ndcg(self._ranked(candidates, K, weight).items, targets)[1]
            for weight in COSINE_WEIGHTS
        }
        self.cosine_weight = max(ndcgs, key=ndcgs.__getitem__)  # the first of equals
        self.settings = {"cosine_weight": self.cosine_weight}

    def _train_encoder(self, data: Dataset, steps: int) -> tuple[DualEncoder, Training]:
        similarity = self.plan.model.similarity
        # Codebooks and ablations are no concern of an encoder: their fields are those of every system that shares it.
        shared = dataclasses.replace(self.plan.model, codebook_sizes=(1,), gradient="soft", heads="shared")
        config, folder = self.plan.part(f"encoder-{similarity}", steps, contrastive="all_items")
        torch.manual_seed(self.plan.training.seed)
        model = DualEncoder(shared)
        return model, train(model, config, data, folder, self.plan)

    def _build(self, data: Dataset, trained: DualEncoder | None) -> DGIModel:
        if trained is None:
            return DGIModel(self.plan.model)
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

    def search(self, queries: Interactions, k: int, *, exclude_history: bool = False) -> Found:
        candidates = self._candidates(queries, max(k, CANDIDATES if self.cosine_weight else 0), exclude_history)
        return self._ranked(candidates, k, self.cosine_weight)

    def _candidates(self, queries: Interactions, k: int, exclude_history: bool) -> SearchResult:
        return self.searcher.search_interactions(
            queries, k=k, num_beams=self.num_beams, exclude_history=exclude_history, progress=self.plan.progress
        )

    def _ranked(self, candidates: SearchResult, k: int, weight: float) -> Found:
        if not weight:
            return Found(candidates.items[:, :k], candidates.scores[:, :k])
        _, group, sizes = torch.unique(self.searcher.index.codes.cpu(), dim=0, return_inverse=True, return_counts=True)
        share = sizes[group].float().log()[candidates.items.clamp(min=0)]
        scores = candidates.scores + weight * candidates.cosines - share  # padding stays at -inf
        best = scores.topk(k, dim=1)
        return Found(candidates.items.gather(1, best.indices), best.values)

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    def item_vectors(self) -> Tensor:
        return encode_items(self.model, self.searcher.item_features).float().cpu()
