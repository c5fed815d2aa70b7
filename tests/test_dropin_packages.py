"""Drop-ins in packages of PyPI, run where these are installed: theirs and ours on the same small vectors, in turn."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

BENCH = Path(__file__).resolve().parent.parent / "bench"
# name of the drop-in -> the package, and what it imports at once
PACKAGES = {
    "vector-quantize-pytorch": ("vector_quantize_pytorch", "einx"),
    "semantic-id": ("semantic_id", "sklearn"),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_outputs_are_equal(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the three lines in the package that a user has installed."""
    package = PACKAGES[name][0]
    for module in PACKAGES[name]:
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(BENCH)
    import dropins
    from dropin import apply, copy_source, difference

    dropin = dropins.load(name)
    data = tmp_path / "vectors.npy"
    np.save(data, torch.randn(1560, 16).numpy().astype(np.float16))
    kept: dict[str, Path] = {}
    for version in ("theirs", "ours"):
        folder = tmp_path / version
        folder.mkdir()
        copy_source(dropin, None, folder)
        if version == "ours":
            apply(dropin.changes, folder)
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder)
            for step, run in dropin.steps(data).items():
                kept[version] = tmp_path / f"{version}.{step}"
                save_file({key: value.detach().contiguous() for key, value in run().items()}, kept[version])
            assert Path(str(sys.modules[package].__file__)).is_relative_to(folder)
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[module]
    assert difference(dropin, kept["theirs"], kept["ours"])[0] == []
