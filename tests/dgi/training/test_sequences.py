"""Training on whole sequences: the same requests as expanded examples have, with the same vectors and the same loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dgi.config import ModelConfig, TrainConfig
from dgi.data import Catalog, SequenceRows, Sequences, next_items, training_rows
from dgi.data.batches import make_batch, make_sequence_batch
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.encoding import Requests, encode_requests
from dgi.model.losses import DGILoss
from dgi.training.sequences import SequenceTrainer
from dgi.training.trainer import Trainer

ITEMS, HISTORY = 23, 6
CONFIG = ModelConfig(
    dim=16,
    codebook_sizes=(8, 4),
    attention_heads=2,
    text_layers=0,
    decoder_layers=1,
    vocabulary_size=64,
    max_history=HISTORY,
    dropout=0.0,
    causal=True,
)
CATALOG = Catalog(tuple(map(str, range(ITEMS))), tuple(f"word{i} word{i % 5}" for i in range(ITEMS)))


def random_sequences(users: int = 40, longest: int = HISTORY + 1) -> Sequences:
    items = tuple(np.random.randint(0, ITEMS, np.random.randint(1, longest + 1)) for _ in range(users))
    return Sequences(items, tuple(np.zeros(len(row)) for row in items))


def requests(rows: SequenceRows) -> list[tuple[tuple[int, ...], int]]:
    """(history, target) of every target."""
    found = []
    for history, targets in zip(rows.histories.tolist(), rows.targets.tolist(), strict=True):
        found += [(tuple(history[: place + 1]), target) for place, target in enumerate(targets) if target >= 0]
    return found


@pytest.mark.parametrize("history", [1, 2, 5, 30])
def test_every_example_is_in_one_row(history: int) -> None:
    sequences = random_sequences(longest=24)
    rows = training_rows(sequences, max_history=history)
    examples = next_items(sequences, max_history=history)
    found, expected = (
        requests(rows),
        [
            (tuple(past[past >= 0].tolist()), item)
            for past, item in zip(examples.histories, examples.items.tolist(), strict=True)
        ],
    )
    assert sorted(item for _, item in found) == sorted(item for _, item in expected)
    if history == 30:
        assert sorted(found) == sorted(expected)
    enough = {past for past, _ in expected if len(past) == history}
    for past, _ in found:
        assert len(past) >= history / 2 or past not in enough
    assert (rows.histories[rows.targets >= 0] >= 0).all()


@pytest.mark.parametrize("longest", [2, HISTORY + 1])
def test_vectors_and_loss_are_those_of_the_expanded_examples(longest: int) -> None:
    sequences = random_sequences(longest=longest)
    rows, examples = training_rows(sequences, max_history=HISTORY), next_items(sequences, max_history=HISTORY)
    model = DualEncoder(CONFIG).double().eval()
    with torch.no_grad():
        model.encoder.positions.normal_()
    features = model.encoder.prepare_items(CATALOG)
    everything = torch.arange(ITEMS)
    whole = make_sequence_batch(features, torch.from_numpy(rows.histories), torch.from_numpy(rows.targets), everything)
    single = make_batch(
        features, torch.from_numpy(examples.histories), torch.from_numpy(examples.items), None, everything
    )
    loss = DGILoss(contrastive="all_items")
    results = []
    for batch in (whole, single):
        output = model(batch)
        model.zero_grad()
        terms = loss(output)
        terms["loss"].backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        order = np.lexsort(np.concatenate([output.query.detach().numpy().T, output.item_rows.numpy()[None]]))
        results.append((output.query.detach()[order.copy()], output.item_rows[order.copy()], terms["loss"], gradients))
    (ours, items, value, gradients), (expected, expected_items, expected_value, expected_gradients) = results
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(items, expected_items)
    torch.testing.assert_close(value, expected_value, rtol=1e-6, atol=0)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)


def test_a_causal_decoder_reads_what_its_request_has_seen() -> None:
    """DGI on whole rows: hidden states are those of the expanded examples, each with its own part of the memory."""
    sequences = random_sequences(users=12)
    rows, examples = training_rows(sequences, max_history=HISTORY), next_items(sequences, max_history=HISTORY)
    model = DGIModel(dataclasses.replace(CONFIG, gradient="detached")).double().eval()
    features = model.encoder.prepare_items(CATALOG)
    whole = make_sequence_batch(features, torch.from_numpy(rows.histories), torch.from_numpy(rows.targets))
    single = make_batch(features, torch.from_numpy(examples.histories), torch.from_numpy(examples.items), None)
    hidden = []
    for batch in (whole, single):
        output = model(batch, seed=1)
        rounded = output.hidden.detach().flatten(1)
        hidden.append(rounded[np.lexsort(rounded.numpy().T).copy()])
    torch.testing.assert_close(hidden[0], hidden[1], rtol=1e-10, atol=1e-10)


def test_no_item_sees_a_later_one_and_padding_is_not_read() -> None:
    model = DualEncoder(CONFIG).eval()
    features = model.encoder.prepare_items(CATALOG)
    short = torch.tensor([[3, 4, -1, -1, -1, -1], [-1, -1, -1, -1, 3, 4], [-1] * 6])
    vectors = encode_requests(model, Requests(short, None), features)
    torch.testing.assert_close(vectors[0], vectors[1])
    targets = torch.tensor([[1, 2, 3, 4, 5, 6]])
    first, second = (
        model(make_sequence_batch(features, torch.tensor([row]), targets)).query
        for row in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9])
    )
    torch.testing.assert_close(first[:3], second[:3])
    assert (first[3:] - second[3:]).abs().amax(1).min() > 1e-4
    assert torch.isfinite(vectors).all()


def test_training_on_rows_learns_and_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After item i comes i + 1: rows of sequences teach it, and a run in two parts has the bits of one."""
    monkeypatch.setattr("dgi.training.curve.training_curve", lambda *_: None)
    starts = np.random.randint(0, ITEMS, 60)
    items = tuple((start + np.arange(np.random.randint(2, 2 * HISTORY))) % ITEMS for start in starts)
    rows = training_rows(Sequences(items, tuple(np.zeros(len(row)) for row in items)), max_history=HISTORY)
    config = TrainConfig(
        steps=60, batch_size=16, backbone_lr=1e-2, warmup_steps=5, contrastive="all_items", checkpoint_every=25
    )

    def train(folder: Path, stop: bool) -> tuple[DualEncoder, dict[str, float]]:
        torch.manual_seed(0)
        model = DualEncoder(dataclasses.replace(CONFIG, dropout=0.1))
        trainer = SequenceTrainer(model, config, CATALOG, rows, folder, progress=False)
        if stop:
            update, done = trainer._update, []

            def interrupted(*args):
                if len(done) == 30:
                    raise KeyboardInterrupt
                done.append(1)
                return update(*args)

            trainer._update = interrupted
            with pytest.raises(KeyboardInterrupt):
                trainer.fit()
            return train(folder, False)
        return model, trainer.fit(resume=folder.exists())

    model, last = train(tmp_path / "whole", False)
    again, _ = train(tmp_path / "parts", True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert last["infonce"] < 0.7 * np.log(ITEMS)


def test_what_does_not_fit_is_refused() -> None:
    rows = training_rows(random_sequences(), max_history=HISTORY)
    with pytest.raises(ValueError, match="model must be causal"):
        model = DualEncoder(dataclasses.replace(CONFIG, causal=False))
        SequenceTrainer(model, TrainConfig(), CATALOG, rows, None)
    with pytest.raises(ValueError, match="max_history must be at least 1"):
        training_rows(random_sequences(), max_history=0)
    model = DualEncoder(CONFIG)
    features = model.encoder.prepare_items(CATALOG)
    with pytest.raises(ValueError, match="at most max_history = 6 items; got 7"):
        model.encode_queries(make_batch(features, torch.zeros(2, 7, dtype=torch.int64), None, None))
    with pytest.raises(ValueError, match="must have no queries"):
        model.encode_queries(make_batch(features, torch.zeros(2, 3, dtype=torch.int64), None, features[:2]))
    with pytest.raises(ValueError, match='causal must be False where encoder is "t5"'):
        ModelConfig(encoder="t5", pretrained="x", causal=True)
    assert issubclass(SequenceTrainer, Trainer)


def test_word_vectors_start_as_long_as_the_configuration_says() -> None:
    long, short = (
        DualEncoder(dataclasses.replace(CONFIG, word_scale=scale)).encoder.tower.words.weight.detach()
        for scale in (1.0, 0.05)
    )
    assert 0.9 < float(long[1:].std()) < 1.1 and 0.045 < float(short[1:].std()) < 0.055
    assert not short[0].any() and not long[0].any(), "padding is 0"
    with pytest.raises(ValueError, match="word_scale must be positive"):
        dataclasses.replace(CONFIG, word_scale=0.0)
