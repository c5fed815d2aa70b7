"""Steps of training as one CUDA graph: recorded on the CPU, where there is no GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dgi.config import LOSS_TERMS
from dgi.model import distillation, layers
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.training.schedule import Span
from dgi.training.trainer import Trainer
from dgi.training.update import Update
from dgi_kernels import checks, cuda_graphs
from tests.dgi.recorded import record
from tests.dgi.tiny_runs import VARIANTS, tiny_trainer

CASES: dict[str, tuple[dict[str, Any], dict[str, Any], type[DualEncoder]]] = {
    **VARIANTS,
    "sampled": ({}, {"contrastive": "sampled", "contrastive_samples": 20}, DGIModel),
    "sampled inner products": ({"similarity": "inner_product"}, {"contrastive": "sampled"}, DGIModel),
    "no correction": ({}, {"log_q": False}, DGIModel),
}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs on the CPU, whose every operation can be seen: with the ops' references, and no look at values."""
    monkeypatch.setattr(cuda_graphs, "possible", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "WARMUPS", 1)
    monkeypatch.setattr(cuda_graphs, "aside", lambda function, device: function())
    monkeypatch.setattr(cuda_graphs, "capture", record)
    monkeypatch.setattr(checks, "checks_values", lambda device: False)
    monkeypatch.setattr(distillation, "_narrows", lambda device: False)
    monkeypatch.setattr(layers, "_drops", lambda layer, states: False)  # torch's dropout, as on a GPU
    stage_update = Trainer._stage_update

    def with_references(trainer: Trainer, span: Span) -> Update:
        update = stage_update(trainer, span)
        for module in update.loss_step.modules():
            if hasattr(module, "backend"):
                module.backend = "reference"
        return update

    monkeypatch.setattr(Trainer, "_stage_update", with_references)


def trained(case: str, seed: int, captured: bool, dropout: float = 0.0) -> tuple[DualEncoder, dict[str, Any]]:
    model, train, kind = CASES[case]
    trainer = tiny_trainer(None, seed, model | {"dropout": dropout}, train, kind, cuda_graph=captured)
    return trainer.model, trainer.fit()


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_replays_as_one_that_is_run(
    case: str, autocast: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, too, as on a GPU."""
    monkeypatch.setattr(Update, "_autocast", lambda self: torch.autocast("cpu", torch.bfloat16, enabled=autocast))
    replayed, replayed_metrics = trained(case, seed, True, 0.2)
    monkeypatch.setattr(cuda_graphs, "WARMUPS", 1000)
    run, metrics = trained(case, seed, True, 0.2)
    for (name, want), got in zip(run.state_dict().items(), replayed.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    assert replayed_metrics | {"seconds": 0} == metrics | {"seconds": 0}


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("case", CASES)
def test_training_with_graphs_is_that_without(case: str, seed: int) -> None:
    """But for rounding: in a graph all batches have the shape of the largest."""
    torch.set_default_dtype(torch.float64)
    try:
        _, metrics = trained(case, seed, False)
        _, captured = trained(case, seed, True)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in {*metrics} - {"seconds"}:
        assert captured[name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-5), name


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("case", CASES)
def test_a_step_makes_its_tensors_on_the_models_device(case: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What names no device would be on the CPU, beside a model on a GPU: here it is on none, and mixes with nothing."""

    def filled(value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return value.to(dtype) if isinstance(value, torch.Tensor) else torch.full((), value, dtype=dtype, device=device)

    monkeypatch.setattr(checks, "scalar_tensor", filled)  # as on a GPU
    step = Update._step

    def elsewhere(*arguments: Any) -> Any:
        with torch.device("meta"):
            return step(*arguments)

    monkeypatch.setattr(Update, "_step", elsewhere)
    trained(case, seed, False)


def poisoned(trainer: Trainer, step: int, seen: list[dict[str, torch.Tensor]]) -> None:
    """Let one step of a trainer have a NaN among its weights, that one alone; ``seen`` gets the state after each."""
    update, bias = trainer._update, trainer.model.encoder.output.bias

    def watched(*arguments: Any) -> Any:
        before = bias.detach().clone()
        if trainer.steps_done == step:
            bias.data[0] = torch.nan
        result = update(*arguments)
        if trainer.steps_done == step:
            assert bias[1:].equal(before[1:])
            bias.data[0] = before[0]
        seen.append({name: x.clone() for name, x in trainer._state().items() if name != "steps_done"})
        return result

    trainer._update = watched  # type: ignore[method-assign]


# What makes the host look at a step's values -> the step at which it then finds that the fifth has failed.
LOOKS: dict[str, tuple[dict[str, Any], int]] = {
    "the last step": ({}, 12),
    "metrics": ({"log_every": 7}, 7),
    "a checkpoint": ({"checkpoint_every": 4}, 8),
    "revival": ({"revive_every": 3}, 6),
    "the end of a stage": ({"stages": [{"name": "joint", "epochs": 3}, {"name": "decoder"}]}, 6),
}


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("look", LOOKS)
def test_nothing_changes_from_the_first_step_that_is_not_finite(look: str, seed: int, tmp_path: Path) -> None:
    """The host learns of it where it looks next, before it does anything with the model."""
    more, found_at = LOOKS[look]
    train = {"epochs": 4, "log_every": 100, "checkpoint_every": 100, "revive_every": 0, **more}
    trainer = tiny_trainer(tmp_path / "run", seed, train=train, cuda_graph=True)
    states: list[dict[str, torch.Tensor]] = []
    poisoned(trainer, 4, states)
    with pytest.raises(FloatingPointError, match=r"stopped in step 5, before its update: .*loss is nan, grad_norm"):
        trainer.fit()
    assert len(states) == found_at and trainer.steps_done == 4
    for state in states[4:]:
        for name, before in states[3].items():
            assert torch.equal(state[name].nan_to_num(), before.nan_to_num()), name  # changed_codes is NaN at first
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.safetensors")] == (
        ["step-00000004.safetensors"] if look == "a checkpoint" else []
    )


@pytest.mark.usefixtures("graphs")
def test_a_step_that_is_not_finite_is_named_in_a_later_stage(seed: int) -> None:
    stages = [{"name": "joint"}, {"name": "joint", "epochs": 3}]
    trainer = tiny_trainer(None, seed, train={"stages": stages, "log_every": 100, "revive_every": 0}, cuda_graph=True)
    poisoned(trainer, 7, [])
    with pytest.raises(FloatingPointError, match="stopped in step 8, before its update"):
        trainer.fit()


def test_what_has_no_graph_is_named(seed: int) -> None:
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device; the model is on cpu"):
        tiny_trainer(None, seed, cuda_graph=True)


@pytest.mark.usefixtures("graphs")
def test_models_whose_shapes_follow_the_batch_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="cuda_graph needs steps of one shape, whatever the batch; a causal model"):
        tiny_trainer(None, seed, {"causal": True}, cuda_graph=True)
    trainer = tiny_trainer(None, seed, cuda_graph=True)
    span = trainer.schedule.span(0)
    update, batch = trainer._stage_update(span), trainer._batch(0, span)
    trainer._update(update, batch, 0)
    with pytest.raises(ValueError, match=r"shapes of the first one.*'query_features': \(8, 1\).*\(7, 1\)"):
        trainer._update(update, dataclasses.replace(batch, query_features=batch.query_features[1:]), 1)


def test_a_recording_refuses_what_waits_for_the_device() -> None:
    x = torch.tensor([1.0, -1.0])
    for waits in (x.tolist, lambda: x[x > 0], lambda: x.unique(), lambda: float(x.sum()), lambda: x.to(int).bincount()):
        with pytest.raises(AssertionError, match="waits for the device"):
            record(waits, x.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", ["dgi", "stages", "sampled"])  # each compiles for some seconds
def test_a_captured_step_replays_as_one_that_is_run_on_a_gpu(
    case: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage is captured, but for sums by atomic additions with the losses of the same steps without a graph."""
    captured: list[object] = []
    capture = cuda_graphs.capture
    monkeypatch.setattr(cuda_graphs, "capture", lambda *arguments: captured.append(0) or capture(*arguments))
    monkeypatch.setattr(cuda_graphs, "WARMUPS", 1)
    _, replayed = trained(case, seed, True, 0.1)
    stages = CASES[case][1].get("stages", [{"name": "joint"}])
    assert len(captured) == sum(stage["name"] != "quantizer" for stage in stages)
    monkeypatch.setattr(cuda_graphs, "WARMUPS", 1000)
    _, run = trained(case, seed, True, 0.1)
    for name in {*LOSS_TERMS, "loss"} & {*run}:
        assert replayed[name] == pytest.approx(run[name], rel=1e-2), name
