"""The ops need torch and numpy alone; what the model layer needs besides is named with the command that installs it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from dgi import extras

# As on a machine with nothing but torch, numpy and what torch itself needs.
WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"safetensors", "tqdm", "matplotlib", "scipy", "transformers", "tokenizers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    return subprocess.run(
        [sys.executable, "-c", path + WITHOUT + textwrap.dedent(code)], cwd=folder, capture_output=True, text=True
    )


def test_ops_and_model_need_no_extra(tmp_path: Path) -> None:
    done = run(
        """
        import torch, dgi_kernels as dk
        for name in dk.__all__:
            getattr(dk, name)
        z, codebooks = torch.randn(5, 8), [torch.randn(4, 8), torch.randn(3, 8)]
        trie = dk.Trie.from_codes(dk.assign_codes(z, codebooks), codebook_sizes=(4, 3))
        trie.save("trie.dgi")
        step = lambda depth, tokens, parents: torch.zeros(2, 4 if depth else 1, (4, 3)[depth])
        print(dk.beam_search(dk.Trie.load("trie.dgi"), step, batch_size=2, num_beams=4).codes.shape)
        sys.stderr.isatty = lambda: True
        dk.kmeans(z, 2, progress=True)
        from dgi import DGIModel, ModelConfig
        DGIModel(ModelConfig(dim=16, codebook_sizes=(4, 4), attention_heads=2))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([2, 4, 2])\n"


@pytest.mark.parametrize(
    ("code", "package", "extra"),
    [
        ("from dgi import save_model", "safetensors", "model"),
        ("from dgi.evaluation.metrics import hubness; hubness([[0, 1], [1, 0]], 3, 2)", "scipy", "model"),
        ("from dgi.pictures import figure; figure()", "matplotlib", "model"),
        ("import dgi.model.t5", "transformers", "hf"),
    ],
    ids=["save_model", "hubness", "picture", "t5"],
)
def test_a_missing_package_is_named_with_its_command(code: str, package: str, extra: str, tmp_path: Path) -> None:
    done = run(code, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ") and package in last and f"'dgi-kernels[{extra}]'" in last


def test_the_command_line_says_it_without_a_traceback(tmp_path: Path) -> None:
    done = run("from dgi.cli import main; sys.exit(main(['train', '--data', '.', '--output', 'run']))", tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "pip install 'dgi-kernels[model]'" in done.stderr


def test_a_package_that_is_there_but_broken_keeps_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_neighbour.py").write_text("import what_it_lacks\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_lacks"):
        extras.require("broken_neighbour")
