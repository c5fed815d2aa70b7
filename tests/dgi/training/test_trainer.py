"""The trainer: schedule, data order, parameter groups, metrics, errors, and a hundred pairs learnt by heart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dgi.config import ModelConfig, TrainConfig, from_dict
from dgi.data import Catalog, Interactions
from dgi.data.batches import Batch
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.quantizer import ResidualQuantizer
from dgi.training.checkpoint import load_model, unique_tensors
from dgi.training.loss_step import build_optimizer
from dgi.training.schedule import Schedule
from dgi.training.trainer import Trainer, collision_rate
from dgi_kernels import Trie, beam_search, rank_candidates
from tests.dgi.tiny_runs import MODEL, tiny_data, tiny_trainer

ROOT = Path(__file__).parents[3]


def test_schedule_by_hand() -> None:
    schedule = Schedule(TrainConfig(warmup_steps=4, tau_start=1.0, tau_end=0.0625, revive_every=2), total_steps=9)
    assert [schedule.rate(step) for step in range(9)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2]
    assert [schedule.tau(step) for step in range(9)] == pytest.approx([2 ** (-step / 2) for step in range(9)])
    assert [step for step in range(9) if schedule.revives(step)] == [1, 3, 5]  # step 7 lies in the last fifth


@pytest.mark.parametrize(
    ("warmup", "rates"), [(0, [1.0, 2 / 3, 1 / 3]), (3, [1 / 3, 2 / 3, 1.0]), (6, [1 / 6, 2 / 6, 0.5])]
)
def test_schedule_without_warm_up_and_with_nothing_else(warmup: int, rates: list[float]) -> None:
    schedule = Schedule(TrainConfig(warmup_steps=warmup, revive_every=0), total_steps=3)
    assert [schedule.rate(step) for step in range(3)] == pytest.approx(rates)
    assert not any(schedule.revives(step) for step in range(3))
    assert Schedule(TrainConfig(), total_steps=1).tau(0) == 1.0


@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_every_parameter_has_its_learning_rate_and_decay(heads: str) -> None:
    model = DGIModel(from_dict(ModelConfig, MODEL | {"heads": heads}))
    optimizer = build_optimizer(model, TrainConfig(backbone_lr=0.1, quantizer_lr=0.2, weight_decay=0.3))
    settings = {
        parameter: (group["peak_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        if name.startswith(("quantizer.", "heads.")):
            assert settings.pop(parameter) == (0.2, 0.0), name
        else:
            assert settings.pop(parameter) == (0.1, 0.0 if parameter.ndim <= 1 else 0.3), name
    assert not settings


@pytest.mark.parametrize("captured", [False, True])
def test_the_optimizers_state_is_where_its_parameters_are(captured: bool) -> None:
    """The fused update reads all of it on their device, the number of steps too, and in a graph the learning rates."""
    model = DGIModel(from_dict(ModelConfig, MODEL)).to("meta")
    optimizer = build_optimizer(model, TrainConfig(), captured=captured)
    for state in optimizer.state.values():
        assert {tensor.device.type for tensor in state.values()} == {"meta"}
        assert state["step"].dtype == torch.float32
    for group in optimizer.param_groups:
        assert (group["lr"].device.type if captured else type(group["lr"])) == ("meta" if captured else float)


def batches_of(trainer: Trainer, start: int = 0) -> list[Batch]:
    steps = range(start, trainer.schedule.total_steps)
    return [trainer._batch(step, trainer.schedule.span(step)) for step in steps]


def test_every_epoch_reads_whole_batches_in_an_order_of_its_own(seed: int) -> None:
    trainer = tiny_trainer(None, seed)  # 26 rows in batches of 8
    batches = [batch.item_rows[batch.targets].tolist() for batch in batches_of(trainer)]
    assert [len(batch) for batch in batches] == [8] * 6
    clicks = Counter(trainer.data.targets.tolist())
    for epoch in (batches[:3], batches[3:]):
        assert Counter(sum(epoch, [])) <= clicks
    assert batches[:3] != batches[3:]
    assert [batch.item_rows[batch.targets].tolist() for batch in batches_of(trainer, 4)] == batches[4:]


def test_fewer_interactions_than_a_batch_make_one_batch(seed: int) -> None:
    trainer = tiny_trainer(None, seed, train={"batch_size": 1000, "epochs": 3})
    assert [len(batch) for batch in batches_of(trainer)] == [26] * 3


def test_the_latest_items_of_a_history_are_read(seed: int) -> None:
    _, interactions = tiny_data(seed)
    for length in (0, 3, 9):
        histories = tiny_trainer(None, seed, {"max_history": length}).data.requests.histories
        assert histories.tolist() == [row[len(row) - min(length, 5) :].tolist() for row in interactions.histories]


def test_codebooks_start_at_the_clusters_of_the_catalog(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards K-means against dropout, a part of the catalog, and running after the first step."""
    seen = []
    monkeypatch.setattr(ResidualQuantizer, "initialize", lambda self, z, generator: seen.append(z))
    trainer = tiny_trainer(None, seed)
    with torch.no_grad():
        expected = trainer.model.eval().encoder.encode_items(trainer.data.item_features)
    trainer.fit()
    torch.testing.assert_close(seen, [expected])


def test_dead_codes_are_revived_until_the_last_fifth(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {}
    revive = ResidualQuantizer.revive

    def recorded(self: ResidualQuantizer, *arguments: Any, **options: Any) -> int:
        moved[int(trainer.steps_done)] = revive(self, *arguments, **options)
        return moved[int(trainer.steps_done)]

    monkeypatch.setattr(ResidualQuantizer, "revive", recorded)
    trainer = tiny_trainer(None, seed, {"codebook_sizes": [20, 16]})
    trainer.fit()
    assert list(moved) == [0, 1, 2, 3]  # of 6 steps
    assert moved[0] == 2 * 8  # the batch uses at most 8 codes of either level, and has a residual for 8 others


def test_a_run_depends_on_nothing_but_its_seed(seed: int) -> None:
    first, second = tiny_trainer(None, seed), tiny_trainer(None, seed)
    first.fit()
    torch.rand(7)  # the caller's own use of the generator
    second.fit()
    for name, tensor in unique_tensors(first.model).items():
        assert torch.equal(tensor, unique_tensors(second.model)[name]), name


def test_files_of_a_run(tmp_path: Path, seed: int) -> None:
    trainer = tiny_trainer(tmp_path, seed, train={"log_every": 4})
    last = trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"]) for row in rows] == [(4, 2), (6, 2)]
    assert rows[-1] == last
    explained = (ROOT / "docs" / "tutorial.md").read_text().split("### What training writes")[1].split("```")[0]
    assert [name for name in last if f"`{name}`" not in explained] == []
    weighted = sum(last[name] for name in ("ntp", "global", "local", "infonce", "diversity"))
    assert last["loss"] == pytest.approx(weighted, rel=1e-5)
    assert last["gamma"] == pytest.approx(float(trainer.model.quantizer.scale.detach()))
    assert last["tau"] == pytest.approx(0.1)
    assert last["usage"] == [float((counts >= 0.05).double().mean()) for counts in trainer.model.quantizer.code_counts]
    assert (tmp_path / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    for name, tensor in unique_tensors(load_model(tmp_path / "model.safetensors")).items():
        assert torch.equal(tensor, unique_tensors(trainer.model)[name]), name


def test_a_dual_encoder_trains_on_infonce_alone(tmp_path: Path, seed: int) -> None:
    row = tiny_trainer(tmp_path, seed, kind=DualEncoder).fit()
    assert row["loss"] == row["infonce"]
    assert not {"ntp", "gamma", "tau", "usage", "collisions"} & row.keys()
    assert isinstance(load_model(tmp_path / "model.safetensors", DualEncoder), DualEncoder)


def test_collision_rate_against_counting() -> None:
    rows, codes = torch.randint(0, 40, (60,)), torch.randint(0, 4, (40, 2))
    sids = {row: tuple(codes[row].tolist()) for row in rows.tolist()}
    owners = Counter(sids.values())
    expected = sum(owners[sid] > 1 for sid in sids.values()) / len(sids)
    assert collision_rate(rows, codes[rows]) == pytest.approx(expected)


def test_a_loss_that_is_not_finite_stops_training_before_the_update(seed: int) -> None:
    trainer = tiny_trainer(None, seed, train={"backbone_lr": 0.02, "quantizer_lr": 0.4, "revive_every": 0})
    weights = trainer.model.decoder.output.weight

    def poison(module: nn.Module, arguments: Any) -> None:
        if trainer.steps_done == 1:
            module.output.weight.data[0, 0] = float("nan")

    trainer.model.decoder.register_forward_pre_hook(poison)
    with pytest.raises(
        FloatingPointError,
        match=r"stopped in step 2, before its update: ntp is nan, loss is nan, "
        r"grad_norm is nan; the learning rates were 0.02 \(backbone\) and "
        r"0.4 \(quantizer\)",
    ):
        trainer.fit()
    assert trainer.steps_done == 1 and int(weights.isnan().sum()) == 1


def test_gradients_are_clipped_by_their_total_norm(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(None, seed, train={"clip_norm": 0.01})
    norms = []
    step = trainer.optimizer.step

    def recorded() -> None:
        norms.append(torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm())
        step()

    monkeypatch.setattr(trainer.optimizer, "step", recorded)
    row = trainer.fit()
    assert row["grad_norm"] > 0.01  # as it was before
    assert torch.stack(norms).tolist() == pytest.approx([0.01] * 6, rel=1e-3)


def test_no_interactions_are_refused() -> None:
    catalog, interactions = tiny_data(0)
    with pytest.raises(ValueError, match="interactions must hold at least one row per process"):
        Trainer(DGIModel(from_dict(ModelConfig, MODEL)), TrainConfig(), catalog, interactions.take([]), None)


def test_a_hundred_pairs_are_learnt_by_heart(seed: int) -> None:
    """Every query finds its own item first, by beam search over semantic IDs and then by cosine."""
    pairs, sizes = 100, (16, 8)
    catalog = Catalog(tuple(map(str, range(pairs))), tuple(f"item{i}" for i in range(pairs)))
    clicks = Interactions(
        tuple(f"query{i}" for i in range(pairs)),
        np.empty((pairs, 0), dtype=np.int64),
        np.random.permutation(pairs),
        np.zeros(pairs),
    )
    # With 10,000 buckets the two hundred words have one each, so that no two texts are the same to the model.
    model = DGIModel(
        ModelConfig(
            dim=32,
            codebook_sizes=sizes,
            attention_heads=2,
            history_layers=1,
            text_layers=0,
            decoder_layers=1,
            dropout=0.0,
            vocabulary_size=10_000,
            max_history=0,
        )
    )
    trainer = Trainer(
        model,
        TrainConfig(epochs=100, batch_size=pairs, backbone_lr=1e-2, quantizer_lr=3e-3, warmup_steps=10, seed=seed),
        catalog,
        clicks,
        None,
        progress=False,
    )
    trainer.fit()
    with torch.no_grad():
        items = model.encoder.encode_items(trainer.data.item_features)
        trie = Trie.from_codes(model.quantizer.assign(items), codebook_sizes=list(sizes))
        queries = model.encode_queries(trainer.data.batch(torch.arange(pairs)))
        beams = beam_search(trie, model.beam_step_function(queries), batch_size=pairs, num_beams=5)
        found = rank_candidates(queries.vector, items, trie, beams, 1).items[:, 0]
    assert found.tolist() == clicks.items.tolist()


def test_validation_while_training_changes_no_bit_of_it(tmp_path: Path) -> None:
    """Measured every few steps and at the end, in evaluation mode, and noted in the metrics of those steps."""
    plain = tiny_trainer(None, 0, train={"steps": 5})
    plain.fit()
    seen: list[bool] = []
    measured = tiny_trainer(tmp_path / "run", 0, train={"steps": 5, "log_every": 100})

    def validate() -> dict[str, float]:
        seen.append(measured.model.training)
        torch.rand(3)  # validation may draw random numbers
        return {"measure": float(len(seen))}

    measured.validate, measured.validate_every = validate, 2
    last = measured.fit()
    assert seen == [False] * 3 and last["step"] == 5 and last["measure"] == 3.0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["measure"]) for row in rows] == [(2, 1.0), (4, 2.0), (5, 3.0)]
    for first, second in zip(plain.model.parameters(), measured.model.parameters(), strict=True):
        assert torch.equal(first, second)
