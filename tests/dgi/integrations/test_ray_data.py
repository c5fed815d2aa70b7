"""A catalog encoded, assigned and merged by workers, as docs/scale.md has it: with Ray Data, and without any engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dgi.config import ModelConfig, from_dict
from dgi.data import Catalog
from dgi.integrations.ray_data import CodesOfItems
from dgi.model.dgi_model import DGIModel
from dgi.retrieval.index import DGIIndex
from dgi.training.checkpoint import save_model
from dgi_kernels import Trie
from tests.dgi.tiny_runs import MODEL

ITEMS = 60


@pytest.fixture
def made(tmp_path: Path) -> tuple[DGIModel, Catalog]:
    model = DGIModel(from_dict(ModelConfig, {**MODEL, "encoder": "vectors", "vector_dim": 6}))
    save_model(model, tmp_path / "model.safetensors")
    vectors = np.random.default_rng(1).standard_normal((ITEMS, 6), dtype=np.float32)
    return model, Catalog(tuple(map(str, range(ITEMS))), ("",) * ITEMS, vectors)


def check(parts: list[dict[str, Any]], made: tuple[DGIModel, Catalog]) -> None:
    """Shards of workers merge into the trie of the index, whatever the order in which they come."""
    model, catalog = made
    index = DGIIndex.build(model, catalog, unique=False)
    shards = [
        Trie.from_codes(part["codes"], [int(item) for item in part["id"]], codebook_sizes=index.trie.codebook_sizes)
        for part in parts
    ]
    codes, ids = Trie.merge(shards).codes()
    assert len(shards) > 1 and torch.equal(codes[ids.argsort()], index.codes)
    rows = torch.cat([torch.from_numpy(np.stack([*part["vector"]])) for part in parts])[ids.argsort()]
    torch.testing.assert_close(torch.nn.functional.normalize(rows, dim=1), index.vectors)


def test_batches_of_any_engine(tmp_path: Path, made: tuple[DGIModel, Catalog]) -> None:
    worker, (_, catalog) = CodesOfItems(tmp_path), made
    assert catalog.vectors is not None
    cut = [slice(20, ITEMS), slice(0, 20)]
    check([worker({"id": np.array(catalog.ids)[rows], "vector": catalog.vectors[rows]}) for rows in cut], made)
    with pytest.raises(ValueError, match="gives item '7' a vector that is not finite"):
        worker({"id": np.array(["3", "7"]), "vector": np.array([[0.0] * 6, [np.inf] * 6], dtype=np.float32)})


def test_texts(tmp_path: Path) -> None:
    model = DGIModel(from_dict(ModelConfig, MODEL))
    save_model(model, tmp_path / "m.safetensors")
    texts = [f"name{item} kind{item % 5}" for item in range(9)]
    made = CodesOfItems(tmp_path / "m.safetensors")({"id": np.arange(9), "text": np.array(texts)})
    catalog = Catalog(tuple(map(str, range(9))), tuple(texts))
    assert made["codes"].tolist() == DGIIndex.build(model, catalog, unique=False).codes.tolist()
    assert made["id"].tolist() == [*catalog.ids]


def test_ray_data(tmp_path: Path, made: tuple[DGIModel, Catalog]) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
    data = pytest.importorskip("ray.data", reason="needs the extra 'ray'")
    _, catalog = made
    assert catalog.vectors is not None
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        rows = [{"id": item, "vector": vector} for item, vector in zip(catalog.ids, catalog.vectors, strict=True)]
        found = data.from_items(rows, override_num_blocks=3).map_batches(
            CodesOfItems, fn_constructor_kwargs={"model": str(tmp_path)}, batch_size=16, concurrency=1
        )
        check([*found.iter_batches(batch_size=16)], made)
    finally:
        ray.shutdown()
