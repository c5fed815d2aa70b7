"""Where encoders start: at what given vectors know, or with short words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dgi.config import ModelConfig, from_file, to_dict
from dgi.data import Catalog
from dgi.data.batches import Batch, make_batch
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.encoders import TextTower, start_at_principal_axes

ITEMS, WIDTH = 30, 12
CONFIG = ModelConfig(encoder="vectors", vector_dim=WIDTH, dim=WIDTH, codebook_sizes=(4, 4), dropout=0.0)


def catalog() -> Catalog:
    ids = tuple(map(str, range(ITEMS)))
    return Catalog(ids, ids, torch.randn(ITEMS, WIDTH).numpy())


def batch_of(items: Catalog, histories: list[list[int]], queries: torch.Tensor | None) -> Batch:
    assert items.vectors is not None
    return make_batch(torch.from_numpy(items.vectors), torch.tensor(histories), None, queries)


@pytest.mark.parametrize("kind", [DualEncoder, DGIModel])
def test_cosines_before_the_first_step_are_those_of_the_given_vectors(kind: type[DualEncoder]) -> None:
    items, queries = catalog(), torch.randn(4, WIDTH)
    assert items.vectors is not None
    given = torch.from_numpy(items.vectors)
    model = kind(CONFIG)
    start_at_principal_axes(model, items)
    z = model.encoder.encode_items(given)
    exact = F.normalize(given, dim=1) @ F.normalize(given, dim=1).T
    torch.testing.assert_close(F.normalize(z, dim=1) @ F.normalize(z, dim=1).T, exact, atol=1e-5, rtol=1e-5)
    by_query = model.encode_queries(batch_of(items, [[-1, -1]] * 4, queries)).vector
    exact = F.normalize(queries, dim=1) @ F.normalize(given, dim=1).T
    torch.testing.assert_close(F.normalize(by_query, dim=1) @ F.normalize(z, dim=1).T, exact, atol=1e-5, rtol=1e-5)
    by_history = model.encode_queries(batch_of(items, [[3, 5], [-1, 7]], None)).vector
    torch.testing.assert_close(by_history, torch.stack([(z[3] + z[5]) / 2, z[7]]))
    both = model.encode_queries(batch_of(items, [[-1, 7]] * 4, queries)).vector
    torch.testing.assert_close(both, (by_query + z[7]) / 2)


def test_fewer_axes_are_those_that_hold_most() -> None:
    """Against the singular value decomposition: no other projection of this width has a smaller error."""
    items = catalog()
    assert items.vectors is not None
    model = DualEncoder(dataclasses.replace(CONFIG, dim=4))
    start_at_principal_axes(model, items)
    given = torch.from_numpy(items.vectors).double()
    axes = model.encoder.tower.linear.weight.detach().double()
    torch.testing.assert_close(axes @ axes.T, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    lost = (given - given @ axes.T @ axes).square().sum()
    assert float(lost) == pytest.approx(float(torch.linalg.svdvals(given)[4:].square().sum()), rel=1e-5)


def test_more_axes_than_the_vectors_have_are_left_empty() -> None:
    items = catalog()
    model = DualEncoder(dataclasses.replace(CONFIG, dim=16))
    start_at_principal_axes(model, items)
    z = model.encoder.encode_items(model.encoder.prepare_items(items))
    assert z.shape == (ITEMS, 16) and not z[:, WIDTH:].any() and z[:, :WIDTH].any(0).all()


@pytest.mark.parametrize("changes", [{"principal_axes": False}, {"encoder": "text"}])
def test_other_models_stay_as_they_are(changes: dict) -> None:
    model = DualEncoder(dataclasses.replace(CONFIG, **changes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start_at_principal_axes(model, catalog())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_corrections_learn_from_the_first_step() -> None:
    items, queries = catalog(), torch.randn(4, WIDTH)
    model = DualEncoder(CONFIG)
    start_at_principal_axes(model, items)
    batch = batch_of(items, [[3, 5], [-1, 7], [-1, -1], [1, 2]], queries)
    vector = model.encode_queries(batch).vector
    (F.normalize(vector, dim=1) @ F.normalize(model.encoder.encode_items(batch.item_features), dim=1).T)[
        :, 0
    ].sum().backward()
    assert model.encoder.output.weight.grad.any() and model.encoder.tower.correction[-1].weight.grad.any()


def test_configurations_of_before_have_neither() -> None:
    stored = to_dict(CONFIG)
    del stored["principal_axes"], stored["word_scale"]
    old = from_file(ModelConfig, stored)
    assert not old.principal_axes and old.word_scale == 1.0


def test_a_text_is_the_mean_of_its_words() -> None:
    """With and without transformer layers padding does not count, and a text without words is the bias."""
    tower = TextTower(ModelConfig(dim=8, text_layers=0, vocabulary_size=20))
    tokens = torch.tensor([[3, 4, 0], [5, 0, 0], [0, 0, 0]])
    words = tower.words.weight
    exact = torch.stack([(words[3] + words[4]) / 2, words[5], torch.zeros(8)])
    torch.testing.assert_close(tower(tokens), tower.output(exact))
    assert tower(tokens[:0]).shape == (0, 8)
    tower(tokens).sum().backward()
    assert not words.grad[0].any() and words.grad[3:6].any(1).all() and not words.grad[6:].any()
    assert np.isfinite(words.grad.numpy()).all()
