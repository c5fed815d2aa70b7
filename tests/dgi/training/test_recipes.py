"""What `dgi train` chooses where it is given nothing, and what it says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgi.config import ModelConfig, TrainConfig, from_dict
from dgi.data import Catalog
from dgi.model.dgi_model import DGIModel
from dgi.retrieval.index import DGIIndex
from dgi.training.recipes import FEW_ITEMS, recommended, staged
from dgi.training.trainer import Trainer
from tests.dgi.tiny_runs import MODEL, tiny_data

TEXT = ModelConfig()
T5 = ModelConfig(encoder="t5", pretrained="some-model")


def choose(
    given: dict[str, Any], model: ModelConfig = TEXT, items: int = 500, clicks: int = 6400
) -> tuple[TrainConfig, str]:
    return recommended(model, from_dict(TrainConfig, given), given.keys(), items, clicks)


def test_few_items_are_all_ranked() -> None:
    chosen, line = choose({"epochs": 6})
    assert [stage.name for stage in chosen.stages] == ["encoder", "quantizer", "joint"]
    assert sum(stage.epochs for stage in chosen.stages if stage.name != "quantizer") == pytest.approx(6)
    assert chosen.contrastive == "all_items" and chosen.item_bias and chosen.stages[2].distillation == 0.5
    assert chosen.warmup_steps == 30, "a tenth of the 6 x 50 steps"
    assert "softmax over all 500 items, since they are few" in line and "\n" not in line


@pytest.mark.parametrize(
    ("model", "items", "why"), [(TEXT, FEW_ITEMS + 1, "too many for all"), (T5, 10, "T5 is too slow to encode all")]
)
def test_all_items_are_left_out_where_they_cost_too_much(model: ModelConfig, items: int, why: str) -> None:
    chosen, line = choose({}, model, items)
    assert chosen.contrastive == "in_batch" and chosen.log_q and not chosen.item_bias
    assert len(chosen.stages) == 3 and chosen.stages[2].distillation == 0 and why in line


def test_what_is_given_is_kept() -> None:
    one = choose({"stages": [], "warmup_steps": 7, "epochs": 3})
    assert one[0] == TrainConfig(epochs=3, warmup_steps=7) and "stages=[] was given" in one[1]
    own = choose({"stages": [{"name": "joint"}], "steps": 40})
    assert own[0].stages == (from_dict(TrainConfig, {"stages": [{"name": "joint"}]})).stages
    assert own[0].warmup_steps == 4 and "that were given" in own[1]
    sampled, line = choose({"contrastive": "sampled"})
    assert sampled.contrastive == "sampled" and not sampled.item_bias and re.search("sampled items", line)
    assert not choose({"item_bias": False})[0].item_bias


def test_the_recipe_is_a_configuration_of_training() -> None:
    for all_items in (True, False):
        config = TrainConfig(**staged(9, all_items=all_items))
        assert [stage.epochs for stage in config.stages if stage.name != "quantizer"] == pytest.approx([3, 6])


@pytest.mark.parametrize("kind", ["text", "vectors", "t5"])
def test_the_recipe_trains_every_encoder(kind: str, tmp_path: Path) -> None:
    """From nothing given to an index in which every item has an ID that no other has."""
    test_t5 = pytest.importorskip("tests.dgi.model.test_t5") if kind == "t5" else None
    catalog, clicks = tiny_data(0, rows=40, items=30)
    if kind == "vectors":
        random = np.random.default_rng(1)
        catalog = Catalog(catalog.ids, catalog.texts, random.standard_normal((30, 6)).astype(np.float32))
        clicks = dataclasses.replace(clicks, queries=("",) * 40)
    fields = MODEL | {"encoder": kind, "codebook_sizes": [8, 8], "vector_dim": 6}
    if test_t5 is not None:
        test_t5.T5Config(**test_t5.SMALL).save_pretrained(tmp_path)
        test_t5.make_tokenizer().save_pretrained(tmp_path)
        fields |= {"pretrained": str(tmp_path), "dim": 16}
    model_config = from_dict(ModelConfig, fields)
    training, _ = choose({"epochs": 3, "batch_size": 8}, model_config, 30, 40)
    model = DGIModel(model_config)
    last = Trainer(model, training, catalog, clicks, None, progress=False).fit()
    assert last["stage"] == 3 and "off_trie" in last
    index = DGIIndex.build(model, catalog)
    assert len(index.codes.unique(dim=0)) == 30 and torch.equal(index.codes, model.item_codes)
