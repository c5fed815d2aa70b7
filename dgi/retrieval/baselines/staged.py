"""DGI trained in stages, as a system of comparisons: the recipe of `dgi train` with the steps of every system."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dgi.data import Dataset
from dgi.model.dgi_model import DGIModel
from dgi.model.encoders import start_at_principal_axes
from dgi.retrieval.baselines.dense import ItemVectors
from dgi.retrieval.baselines.generative import Generative
from dgi.retrieval.baselines.plan import Plan
from dgi.training import recipes

if TYPE_CHECKING:
    from typing_extensions import Self


class StagedDGI(Generative):
    """DGI in stages: the steps of the encoder alone are part of its budget, and no other system shares them.

    Args:
        plan: encoder, codebooks, budget and beams; ``encoder_share`` is not read.
        name, items, model: see :class:`Generative`.
        training: fields of :class:`dgi.TrainConfig` to replace those of :func:`dgi.training.recipes.staged`.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        name: str = "dgi",
        items: ItemVectors = "text",
        training: dict[str, Any] | None = None,
        **model: Any,
    ) -> None:
        super().__init__(plan, from_encoder=False, name=name, items=items, **model)
        self.training = recipes.staged(decoder_rate=2 * plan.training.backbone_lr) | (training or {})

    def fit(self, data: Dataset) -> Self:
        torch.manual_seed(self.plan.training.seed)
        self.model = DGIModel(self.plan.model, self._own_encoder(data))
        start_at_principal_axes(self.model, data.catalog)
        config, folder = self.plan.part(self.name, self.plan.steps(data), **self.training)
        self._train(data, config, folder)
        return self
