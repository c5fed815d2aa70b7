"""The model: where the next-token gradient goes, what is shared, and that search and training compute the same."""

from __future__ import annotations

import pytest
import torch

from dgi.config import ModelConfig
from dgi.data.batches import Batch, make_batch
from dgi.model.dgi_model import DGIModel
from dgi.model.losses import DGILoss

SIZES = (7, 5, 3)


def tiny_config(**changes: object) -> ModelConfig:
    values: dict = {
        "encoder": "vectors",
        "vector_dim": 6,
        "dim": 8,
        "codebook_sizes": SIZES,
        "attention_heads": 2,
        "history_layers": 1,
        "decoder_layers": 1,
        "dropout": 0.0,
    } | changes
    return ModelConfig(**values)


def random_batch(rows: int = 5, items: int = 12, *, queries: bool = True) -> Batch:
    histories = torch.randint(0, items, (rows, 4))
    histories[0] = -1
    histories[1, :2] = -1
    return make_batch(
        torch.randn(items, 6), histories, torch.randint(0, items, (rows,)), torch.randn(rows, 6) if queries else None
    )


def ntp_gradients(model: DGIModel, batch: Batch) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Gradient of the next-token loss alone with respect to z and to every codebook."""
    output = model(batch, tau=0.7, seed=1)
    loss = DGILoss()(output, model.heads, list(model.quantizer.codebooks))["ntp"]
    z, *codebooks = torch.autograd.grad(loss, [output.z, *model.quantizer.codebooks], allow_unused=True)
    return z, codebooks


@pytest.mark.parametrize("gradient", ["soft", "straight_through"])
@pytest.mark.parametrize("similarity", ["cosine", "inner_product"])
def test_next_token_loss_reaches_the_item_encoder_and_the_codebooks(gradient: str, similarity: str) -> None:
    model = DGIModel(tiny_config(gradient=gradient, similarity=similarity, heads="separate"))
    z, codebooks = ntp_gradients(model, random_batch())
    assert z is not None and z.norm() > 0
    # The last level's z̃ is no decoder input, so with separate heads it gets no next-token gradient.
    for codebook in codebooks[:-1]:
        assert codebook is not None and codebook.norm() > 0


def test_shared_heads_pass_the_gradient_to_every_codebook() -> None:
    _, codebooks = ntp_gradients(DGIModel(tiny_config()), random_batch())
    assert all(codebook is not None and codebook.norm() > 0 for codebook in codebooks)


@pytest.mark.parametrize("heads", ["shared", "separate"])
@pytest.mark.parametrize("similarity", ["cosine", "inner_product"])
def test_detached_next_token_loss_leaves_encoder_and_codebooks_alone(heads: str, similarity: str) -> None:
    model = DGIModel(tiny_config(gradient="detached", heads=heads, similarity=similarity))
    z, codebooks = ntp_gradients(model, random_batch())
    for gradient in [z, *codebooks]:
        assert gradient is None or gradient.count_nonzero() == 0


def test_detached_variant_freezes_item_tower_parameters_when_histories_are_empty() -> None:
    """Histories run through the item tower too; without them the next-token loss must not touch its parameters."""
    batch = random_batch(queries=False)
    batch = Batch(batch.item_rows, batch.item_features, batch.targets, torch.full_like(batch.histories, -1), None)
    for gradient, expected in (("detached", False), ("soft", True)):
        model = DGIModel(tiny_config(gradient=gradient))
        loss = DGILoss()(model(batch, tau=1.0, seed=3), model.heads, list(model.quantizer.codebooks))["ntp"]
        gradients = torch.autograd.grad(loss, list(model.encoder.tower.parameters()), allow_unused=True)
        reached = any(g is not None and g.count_nonzero() for g in gradients)
        assert reached == expected


def test_quantizer_and_head_share_one_parameter_object() -> None:
    model = DGIModel(tiny_config())
    for codebook, head in zip(model.quantizer.codebooks, model.heads, strict=True):
        assert head.weight is codebook
        assert head.log_scale is model.quantizer.log_scale
    names = [name for name, _ in model.named_parameters() if "codebooks" in name or "heads" in name]
    assert names == [f"quantizer.codebooks.{level}" for level in range(3)]


def test_separate_heads_are_parameters_of_their_own() -> None:
    model = DGIModel(tiny_config(heads="separate"))
    for codebook, head in zip(model.quantizer.codebooks, model.heads, strict=True):
        assert head.weight is not codebook and head.weight.shape == codebook.shape
        assert not torch.equal(head.weight, codebook)


def test_search_logits_equal_teacher_forced_ones_on_hard_codes() -> None:
    """Beam search's step, told the hard codes, must give the logits that the detached variant trains on."""
    model = DGIModel(tiny_config(gradient="detached")).eval()
    batch = random_batch()
    with torch.no_grad():
        output = model(batch, tau=1.0, seed=0)
        step = model.beam_step_function(model.encode_queries(batch))
        parents = torch.zeros(len(batch), 1, dtype=torch.int64)
        for level, head in enumerate(model.heads):
            tokens = output.codes[:, level - 1 : level] if level else None
            logits = step(level, tokens, parents if level else None).logits()
            torch.testing.assert_close(logits[:, 0], head(output.hidden[:, level]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_search_step_follows_the_parents_of_its_beams(
    residual: bool, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DGIModel(tiny_config(principal_axes=False, residual_decoder=residual)).eval()
    monkeypatch.setattr("dgi.model.dgi_model.caches", lambda decoder: cached)
    batch = random_batch()
    with torch.no_grad():
        query = model.encode_queries(batch)
        first = torch.tensor([[0, 1, 2]]).expand(len(batch), 3)
        chosen = torch.tensor([[3, 0, 1]]).expand(len(batch), 3)
        parents = torch.tensor([[2, 2, 0]]).expand(len(batch), 3)
        step = model.beam_step_function(query)
        step(0, None, None)
        step(1, first, torch.zeros_like(first))
        logits = step(2, chosen, parents).logits()
        for beam, (a, b) in enumerate([(2, 3), (2, 0), (0, 1)]):
            inputs = torch.stack([model.quantizer.codebooks[0][a], model.quantizer.codebooks[1][b]])
            hidden = model.decoder(inputs.expand(len(batch), 2, -1), query.memory, query.mask)[:, -1]
            if residual:
                hidden = hidden + query.vector - inputs.sum(0)
            torch.testing.assert_close(logits[:, beam], model.heads[2](hidden), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [{"residual_decoder": True, "principal_axes": False}, {}])
def test_a_residual_decoder_begins_as_residual_quantization_of_the_query(given: dict) -> None:
    model = DGIModel(tiny_config(**given)).eval()
    batch = random_batch()
    with torch.no_grad():
        query = model.encode_queries(batch)
        codes = model.quantizer.assign(query.vector)
        step = model.beam_step_function(query)
        for level in range(model.depth):
            parents = torch.zeros(len(batch), 1, dtype=torch.int64) if level else None
            logits = step(level, codes[:, level - 1 : level] if level else None, parents).logits()[:, 0]
            assert torch.equal(logits.argmax(1), codes[:, level])


def test_a_residual_decoder_learns_and_moves_the_query() -> None:
    model = DGIModel(tiny_config())
    output = model(random_batch(), tau=0.7, seed=1)
    loss = DGILoss()(output, model.heads, list(model.quantizer.codebooks))["ntp"]
    found = torch.autograd.grad(loss, [output.query, model.decoder.output.weight, model.quantizer.codebooks[0]])
    assert all(gradient.isfinite().all() and gradient.any() for gradient in found)


def test_decoder_is_causal_and_ignores_padding() -> None:
    model = DGIModel(tiny_config()).eval()
    batch = random_batch()
    with torch.no_grad():
        query = model.encode_queries(batch)
        inputs = torch.randn(len(batch), 2, 8)
        hidden = model.decoder(inputs, query.memory, query.mask)
        changed = inputs.clone()
        changed[:, 1] += 1.0
        torch.testing.assert_close(model.decoder(changed, query.memory, query.mask)[:, :2], hidden[:, :2])
        memory = torch.where(query.mask.unsqueeze(-1), query.memory, torch.randn_like(query.memory))
        torch.testing.assert_close(model.decoder(inputs, memory, query.mask), hidden)


def test_a_longer_padding_of_the_history_changes_nothing() -> None:
    model = DGIModel(tiny_config()).eval()
    features = torch.randn(9, 6)
    histories = torch.tensor([[-1, 3, 4], [0, 1, 2]])
    padded = torch.cat([torch.full((2, 4), -1), histories], 1)
    with torch.no_grad():
        vectors = [model.encode_queries(make_batch(features, h, None, None)).vector for h in (histories, padded)]
    torch.testing.assert_close(vectors[0], vectors[1])


@pytest.mark.parametrize("eps, norm_is_sane", [(None, True), (1e-12, False)])
def test_items_alone_in_their_cluster_do_not_drown_the_gradient(eps: float | None, norm_is_sane: bool) -> None:
    """With as many codes as items K-means leaves residuals of nothing; the ops' own eps of 1e-12 blows them up."""
    model = DGIModel(tiny_config(codebook_sizes=(64, 16, 8)))
    features = torch.randn(70, 6)
    with torch.no_grad():
        model.quantizer.initialize(model.encoder.encode_items(features), generator=torch.Generator().manual_seed(0))
    if eps is not None:
        for module in (model.quantizer, *model.heads):
            module.eps = eps
    batch = make_batch(features, torch.randint(0, 70, (64, 4)), torch.arange(64), None)
    terms = DGILoss()(model(batch, tau=1.0, seed=0), model.heads, list(model.quantizer.codebooks))
    gradients = torch.autograd.grad(terms["loss"], list(model.parameters()), allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    assert (norm < 1e5) == norm_is_sane


def test_batch_holds_each_item_once() -> None:
    features = torch.arange(20.0).reshape(10, 2)
    batch = make_batch(features, torch.tensor([[-1, 7, 3], [3, 3, 9]]), torch.tensor([7, 0]), None)
    assert batch.item_rows.tolist() == [0, 3, 7, 9]
    assert torch.equal(batch.item_features, features[[0, 3, 7, 9]])
    assert batch.targets.tolist() == [2, 0]
    assert batch.histories.tolist() == [[-1, 2, 1], [1, 1, 3]]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"codebook_sizes": ()}, "codebook_sizes"),
        ({"dim": 9}, "attention_heads"),
        ({"vector_dim": 0}, "vector_dim"),
        ({"initial_scale": 0.0}, "initial_scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"encoder": "t5"}, "pretrained"),
    ],
)
def test_bad_configurations_are_named(changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(**changes)
