"""Ops over tensors without values: FakeTensorMode and torch.export, by which programs are planned and shipped."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dgi_kernels import (
    BeamResult,
    CosineLinear,
    DecoderLayer,
    EncoderLayer,
    NodeScores,
    Trie,
    _extension,
    assign_codes,
    attention,
    balanced_codes,
    beam_search,
    beam_step,
    cosine_beam_step,
    cosine_cross_entropy,
    cosine_logits,
    decoder_step,
    dropout,
    encoder_layers,
    gumbel_noise,
    gumbel_softmax,
    log_normalizer,
    rank_candidates,
    residual_quantize,
    unique_codes,
)

ROWS, DIM, CODES, ITEMS = 6, 8, 4, 50
Inputs = dict[str, Tensor]


SCORES: weakref.WeakKeyDictionary[Trie, NodeScores] = weakref.WeakKeyDictionary()


def make_trie() -> Trie:
    trie = Trie.from_codes(torch.randint(CODES, (ITEMS, 3)), codebook_sizes=[CODES] * 3).update(remove=[3, 4])
    SCORES[trie] = trie.node_scores(torch.rand(trie.num_items) + 0.1)
    return trie


def make_inputs(requires_grad: bool = False) -> Inputs:
    inputs = {
        "h": torch.randn(ROWS, DIM),
        "weight": torch.randn(CODES, DIM),
        "scale": torch.tensor(9.0),
        "tau": torch.tensor(0.7),
    }
    return {name: value.requires_grad_(requires_grad) for name, value in inputs.items()} | {
        "target": torch.randint(CODES, (ROWS,)),
        "vectors": torch.randn(ITEMS, DIM),
        "logits": torch.randn(ROWS, 1, CODES),
    }


def search(trie: Trie, i: Inputs) -> BeamResult:
    return beam_search(
        trie, lambda depth, *_: i["logits"].expand(ROWS, 3 if depth else 1, CODES), batch_size=ROWS, num_beams=3
    )


def weighted(trie: Trie, i: Inputs) -> Tensor:
    """A step with node scores, made here, as programs have them: once, of numbers."""
    scores, strength = SCORES[trie], i["h"].detach()[:, 0]
    return beam_step(trie, i["logits"], trie.root(ROWS), num_beams=3, node_scores=scores, strength=strength).scores


def decoded(i: Inputs) -> Tensor:
    """A beam's step after a first one, with the weight (4, 8) as every parameter."""
    wide, vector = i["weight"].detach().repeat(6, 2)[:, :DIM], i["weight"].detach()[0]
    norm, square = (vector, vector), (wide[:DIM], vector)
    layer = DecoderLayer(norm, (wide, wide[:, 0]), square, norm, square, square, norm, square, square)
    memory, mask = [i["h"].detach().repeat(1, 2)[:, None]], torch.ones(ROWS, 1, dtype=torch.bool)
    first, left = decoder_step(i["h"].detach()[:, None], [layer], memory, mask, heads=2)
    parents = torch.zeros(ROWS, 1, dtype=torch.int64)
    return decoder_step(first, [layer], memory, mask, [left], [parents], heads=2)[0]


def encoded(i: Inputs) -> Tensor:
    """Sequences of one place, with the weight (4, 8) as every parameter."""
    wide, vector = i["weight"].detach().repeat(6, 2)[:, :DIM], i["weight"].detach()[0]
    norm, square = (vector, vector), (wide[:DIM], vector)
    layer = EncoderLayer(norm, (wide, wide[:, 0]), square, norm, square, square)
    return encoder_layers(i["h"].detach()[:, None], [layer], torch.ones(ROWS, 1, dtype=torch.bool), heads=2)


def mixtures(i: Inputs) -> Tensor:
    """By distance, with values, a scale of the noise, rows without noise and padding."""
    rows = (i["target"] > 1).reshape(2, 3)
    result = residual_quantize(
        i["h"].reshape(2, 3, DIM),
        [i["weight"]] * 2,
        i["scale"],
        i["tau"],
        metric="euclidean",
        values=[i["weight"][:, :5]] * 2,
        noise_scale=i["tau"],
        noise_rows=rows,
        mask=~rows,
        seed=1,
    )
    return result.mixtures


def without_gradients(i: Inputs) -> tuple[Tensor, list[Tensor]]:
    return i["h"].detach(), [i["weight"].detach(), i["weight"].detach() + 1]


# of a layer of decoder_step, in its order: (out, (in,)), and norms
MAPS = (
    *((DIM, ()), (3 * DIM, (DIM,)), (DIM, (DIM,))),
    *((DIM, ()), (DIM, (DIM,)), (DIM, (DIM,))),
    *((DIM, ()), (12, (DIM,)), (DIM, (12,))),
)

WITH_GRADIENTS: dict[str, Callable[[Inputs], Tensor]] = {
    "cosine_logits": lambda i: cosine_logits(i["h"], i["weight"], i["scale"]),
    "cosine_cross_entropy": lambda i: cosine_cross_entropy(i["h"], i["weight"], i["target"], i["scale"]),
    "loss of every row": lambda i: cosine_cross_entropy(i["h"], i["weight"], i["target"], 9.0, reduction="none"),
    "gumbel_softmax": lambda i: gumbel_softmax(i["h"], i["tau"], seed=3),
    "dropout": lambda i: dropout(i["h"], 0.3, seed=1),
    "attention": lambda i: attention(i["h"].reshape(2, 3, DIM), i["weight"].reshape(2, 1, 2 * DIM), heads=2, seed=1),
    "residual_quantize": lambda i: residual_quantize(i["h"], [i["weight"]], i["scale"], i["tau"], seed=1).quantized,
    "residual_quantize, options": lambda i: mixtures(i),
}
OPS: dict[str, Callable[[Trie, Inputs], Tensor]] = {
    **{name: lambda _, i, op=op: op(i) for name, op in WITH_GRADIENTS.items()},
    "hard codes": lambda _, i: residual_quantize(i["h"], [i["weight"]], 9.0, mode="hard").codes,
    "assign_codes": lambda _, i: assign_codes(i["h"], [i["weight"]]),
    "balanced_codes": lambda _, i: balanced_codes(i["h"].detach(), i["weight"].detach(), epsilon=0.1),
    "unique_codes": lambda _, i: unique_codes(i["target"].unsqueeze(1).expand(-1, 2), *without_gradients(i)),
    "gumbel_noise": lambda _, i: gumbel_noise(3, 0, 4, 5),
    "beam_step": lambda trie, i: beam_step(trie, i["logits"], trie.root(ROWS), num_beams=3).scores,
    "beam_step with node scores": weighted,
    "log_normalizer": lambda _, i: log_normalizer(i["logits"]),
    "cosine_beam_step": lambda trie, i: (
        cosine_beam_step(trie, i["h"].detach()[:, None], i["weight"].detach(), 9.0, trie.root(ROWS), num_beams=3).scores
    ),
    "decoder_step": lambda _, i: decoded(i),
    "encoder_layers": lambda _, i: encoded(i),
    "beam_search": lambda trie, i: search(trie, i).codes,
    "rank_candidates": lambda trie, i: rank_candidates(i["h"].detach(), i["vectors"], trie, search(trie, i), 5).items,
}


@pytest.mark.parametrize("name", OPS)
def test_fake_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    """Guards against ops that read values that are not there, and against fake tensors left in a trie's caches."""
    trie, inputs = make_trie(), make_inputs()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = OPS[name](trie, {key: mode.from_tensor(value) for key, value in inputs.items()})
    real = OPS[name](trie, inputs)
    assert type(real) is Tensor
    assert (fake.shape, fake.dtype, fake.device) == (real.shape, real.dtype, real.device)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_fake_tensors_go_backward(name: str) -> None:
    mode = FakeTensorMode()
    inputs = {key: mode.from_tensor(value) for key, value in make_inputs(True).items()}
    with mode:
        WITH_GRADIENTS[name](inputs).sum().backward()
    assert inputs["h"].grad is not None and inputs["h"].grad.shape == inputs["h"].shape


@pytest.mark.parametrize("name", OPS)
def test_export(name: str) -> None:
    trie, inputs = make_trie(), make_inputs()

    class Program(nn.Module):
        def forward(self, inputs: Inputs) -> Tensor:
            return OPS[name](trie, inputs)

    exported = torch.export.export(Program(), (inputs,)).module()
    others = make_inputs()
    torch.testing.assert_close(exported(others), OPS[name](trie, others))


def test_a_head_can_be_exported() -> None:
    class Program(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = CosineLinear(DIM, CODES)

        def forward(self, h: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(h), self.head.loss(h, target)

    program, inputs = Program(), make_inputs()
    exported = torch.export.export(program, (inputs["h"], inputs["target"])).module()
    h = torch.randn(ROWS, DIM)
    torch.testing.assert_close(exported(h, inputs["target"]), program(h, inputs["target"]))


@pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))
def test_the_ops_of_a_model_and_of_a_vocabulary_are_well_registered() -> None:
    ops, trie = torch.ops.dgi_kernels, make_trie()
    depth = (trie.parts.base.tokens[0], trie.parts.base.child_start[0], [], [], [], [])
    own, root = SCORES[trie].base[0], trie.root(2)
    scored = (None, 3, 0, None, -1, own, None, torch.tensor([0.5, -1.0]), 1.0)
    library.opcheck(ops.beam_step.default, (*depth, torch.randn(2, 1, CODES), root.nodes, root.scores, *scored))
    library.opcheck(ops.log_normalizer.default, (torch.randn(2, 3, 70)[..., ::2],))
    parameters = [torch.randn(shape) for rows, inside in MAPS for shape in ((rows, *inside), (rows,))]
    past, ancestors = [torch.randn(1, 2, 1, 2 * DIM)], [torch.zeros(2, 3, dtype=torch.int64)]
    memory, mask = [torch.randn(2, 5, 2 * DIM)], torch.rand(2, 5) < 0.7
    library.opcheck(
        ops.decoder_step.default, (torch.randn(2, 3, DIM), parameters, memory, mask, past, ancestors, 2, 1e-5)
    )
    own = [*parameters[:6], *parameters[12:]]  # without the attention to a memory
    library.opcheck(ops.encoder_layers.default, (torch.randn(2, 5, DIM), own, mask, 2, 1e-5))
    seed = torch.tensor([3])
    library.opcheck(ops.dropout.default, (torch.randn(3, 5), torch.randn(3, 5), 0.3, seed))
    queries, options = torch.randn(2, 4, DIM), (mask, 2, True, 0.3, seed)
    library.opcheck(ops.attention.default, (queries, memory[0], *options))
    library.opcheck(ops.attention_backward.default, (torch.randn(2, 4, DIM), queries, memory[0], *options))
