"""A search's step and a cosine head as programs: exported, saved, loaded and run without Python's autograd."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dgi import DGIModel, ModelConfig
from dgi_kernels import Beams, CosineLinear, Trie, beam_step, cosine_beam_step, decoder_step

SIZES, DIM, BATCH, BEAMS, SLOTS = (9, 7, 5), 16, 2, 4, 6


class SearchStep(nn.Module):
    """The second step of a search: codes just chosen -> hidden states -> the best of their continuations."""

    def __init__(self, model: DGIModel, trie: Trie) -> None:
        super().__init__()
        self.model, self.trie = model, trie

    def forward(
        self, memory: list[Tensor], mask: Tensor, past: Tensor, tokens: Tensor, nodes: Tensor, scores: Tensor
    ) -> tuple[Tensor, ...]:
        decoder, quantizer = self.model.decoder, self.model.quantizer
        states = decoder.input(quantizer.embed(tokens, 0)) + decoder.positions[1]
        layers = decoder.start_search(mask.new_zeros(1, 1, DIM, dtype=torch.float32), mask[:1, :1]).layers
        parents = torch.zeros_like(tokens)
        states, left = decoder_step(states, layers, memory, mask, [past], [parents], heads=decoder.heads)
        hidden = decoder.output(decoder.layers.norm(states))
        head = self.model.heads[1]
        beams = Beams(nodes, tokens, parents, scores, 1)
        fused = cosine_beam_step(self.trie, hidden, head.vectors, head.scale, beams, num_beams=BEAMS, eps=head.eps)
        plain = beam_step(self.trie, head(hidden), beams, num_beams=BEAMS)
        return left, fused.nodes, fused.tokens, fused.parents, fused.scores, plain.scores


def make_step() -> tuple[SearchStep, tuple[object, ...]]:
    config = ModelConfig(dim=DIM, codebook_sizes=SIZES, attention_heads=2, decoder_layers=2, vocabulary_size=10)
    model = DGIModel(config).eval().requires_grad_(False)
    codes = torch.stack([torch.randint(size, (80,)) for size in SIZES], 1)
    trie = Trie.from_codes(codes, codebook_sizes=SIZES)
    return SearchStep(model, trie), make_inputs(trie)


def make_inputs(trie: Trie) -> tuple[object, ...]:
    root = beam_step(trie, torch.randn(BATCH, 1, SIZES[0]), trie.root(BATCH), num_beams=BEAMS)
    mask = torch.rand(BATCH, SLOTS) < 0.7
    mask[:, 0] = True
    memory = [torch.randn(BATCH, SLOTS, 2 * DIM) for _ in range(2)]
    return memory, mask, torch.randn(2, BATCH, 1, 2 * DIM), root.tokens, root.nodes, root.scores


@torch.no_grad()
def test_a_search_step_is_exported_saved_and_loaded(tmp_path: Path) -> None:
    step, inputs = make_step()
    torch.export.save(torch.export.export(step, inputs), tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    others = make_inputs(step.trie)
    for got, want in zip(loaded(*others), step(*others), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@torch.no_grad()
def test_a_search_step_and_a_head_are_compiled_ahead_of_time(tmp_path: Path) -> None:
    """One package of both: a library that needs no Python but to be loaded here."""

    class Both(nn.Module):
        def __init__(self, step: SearchStep) -> None:
            super().__init__()
            self.step, self.head = step, CosineLinear(DIM, 8).requires_grad_(False)

        def forward(self, h: Tensor, *inputs: object) -> tuple[Tensor, ...]:
            return self.head(h), *self.step(*inputs)

    step, inputs = make_step()
    both = Both(step)
    exported = torch.export.export(both, (torch.randn(3, DIM), *inputs))
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "step.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    others = torch.randn(3, DIM), *make_inputs(step.trie)
    for got, want in zip(compiled(*others), both(*others), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
