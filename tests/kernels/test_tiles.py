"""Tiles that were measured: which file is read, what it may hold, and that the launchers obey it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dgi_kernels import tiles
from dgi_kernels.tiles import Tiles

from .interpreter import TRITON

CPU, DEFAULT = torch.device("cpu"), Tiles(128, 64, 8, 3)


def test_files_of_the_package_hold_tiles() -> None:
    paths = list(tiles.FOLDER.glob("*.json"))
    assert tiles.FALLBACK in {path.stem for path in paths}
    for path in paths:
        assert tiles.read(str(path)).tiles, path
    assert all(tile.warps == 4 for tile in tiles.read(tiles.FALLBACK).tiles.values())


def test_what_is_not_in_a_file_stays() -> None:
    assert tiles.pick("cosine.forward", 64, DEFAULT, CPU) == DEFAULT
    with tiles.override({"cosine.forward": {"64": [64, 32, 4, 2]}, "cosine.chunk_bytes": 7}):
        assert tiles.pick("cosine.forward", 64, DEFAULT, CPU) == (64, 32, 4, 2)
        assert tiles.pick("cosine.forward", 128, DEFAULT, CPU) == DEFAULT
        assert tiles.number("cosine.chunk_bytes", 1, CPU) == 7 and tiles.number("quantize.chunk_bytes", 1, CPU) == 1
        with tiles.override("none"):
            assert tiles.pick("cosine.forward", 64, DEFAULT, CPU) == DEFAULT
    assert tiles.pick("cosine.forward", 64, DEFAULT, CPU) == DEFAULT


def test_the_models_own_file_and_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA  H200 (141GB)")
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    tiles._of_model.cache_clear()
    try:
        (tmp_path / "nvidia-h200-141gb.json").write_text(json.dumps({"noise": {"32": [128, 32, 4, 1]}}))
        assert tiles.pick("noise", 32, DEFAULT, cuda) == (128, 32, 4, 1)
        other = tmp_path / "elsewhere" / "mine.json"
        other.parent.mkdir()
        other.write_text(json.dumps({"noise": {"32": [16, 32, 2, 1]}}))
        monkeypatch.setenv("DGI_TILES", str(other))
        assert tiles.pick("noise", 32, DEFAULT, cuda) == (16, 32, 2, 1)
        monkeypatch.setenv("DGI_TILES", "none")
        assert tiles.pick("noise", 32, DEFAULT, cuda) == DEFAULT
        monkeypatch.setenv("DGI_TILES", "nowhere")
        with pytest.raises(ValueError, match="'nowhere': DGI_TILES must be a file's path, none, or one of nvidia-h200"):
            tiles.pick("noise", 32, DEFAULT, cuda)
    finally:
        tiles._of_model.cache_clear()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "must hold one object"),
        ({"cosine": {}}, "'cosine' must be one of cosine.forward"),
        ({"noise": {"32": [64, 32, 4]}}, "noise, 32: a tile is"),
        ({"noise": {"32": [64, 32, 4, 0]}}, "positive"),
        ({"noise": {"32": [48, 32, 4, 1]}}, "owned must be a power of two; got 48"),
        ({"noise": {"32": [64, 32, 64, 1]}}, "at most 32 warps"),
        ({"cosine.chunk_bytes": "7"}, "positive integer"),
    ],
)
def test_errors_name_the_entry(entries: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message) as error:
        tiles.read(str(path))
    assert str(path) in str(error.value)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
def test_launchers_obey() -> None:
    from dgi_kernels.cosine import triton as cosine
    from dgi_kernels.gumbel import triton_softmax as softmax
    from dgi_kernels.quantize import triton_forms as quantize

    with tiles.override(tiles.FALLBACK):
        for dim in (64, 128):
            assert all(tile.warps == 4 for tile in cosine.flash_config(dim, CPU)[1])
        for dim in (64, 128, 256):
            assert all(tile is None or tile.warps == 4 for tile in quantize.flash_config(dim, CPU)[1])
    with tiles.override({"softmax": {"256": [4, 256, 2, 1]}}):
        assert softmax.tile(250, softmax.SOFTMAX_TILES, "softmax", CPU) == (4, 256, 2)
    with tiles.override({"quantize.weights": {"256": [16, 32, 4, 2]}}):
        assert quantize.flash_config(200, CPU)[1].weights == (16, 32, 4, 2)
