"""Stages of training: which steps they take, what each trains, the semantic IDs they give, and resuming in them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dgi.config import ModelConfig, TrainConfig, from_dict
from dgi.data import Catalog
from dgi.model import distillation
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.distillation import code_targets
from dgi.model.encoding import encode_items
from dgi.retrieval.index import DGIIndex
from dgi.training.checkpoint import load_model, read_tensors
from dgi.training.diagnostics import diagnose
from dgi.training.item_codes import renumbering
from dgi.training.loss_step import parts_of
from dgi.training.schedule import Schedule
from dgi.training.trainer import Trainer
from tests.dgi.tiny_runs import MODEL, STAGES, tiny_data, tiny_trainer


@pytest.fixture(autouse=True)
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgi.training.curve.training_curve", lambda *_: None)


def stages(*given: dict[str, Any], **fields: Any) -> TrainConfig:
    return from_dict(TrainConfig, {"stages": list(given), **fields})


def test_steps_and_rates_by_hand() -> None:
    """A part's warm-up and decay are over the steps that train it: the encoder's go on in the joint stage."""
    config = stages(
        {"name": "encoder", "epochs": 2},
        {"name": "quantizer"},
        {"name": "joint", "epochs": 1, "rates": {"encoder": 0.5}},
        {"name": "decoder", "epochs": 1},
        warmup_steps=2,
        backbone_lr=0.1,
        quantizer_lr=0.2,
    )
    schedule = Schedule(config, total_steps=8)
    assert [(span.start, span.end) for span in schedule.spans] == [(0, 4), (4, 4), (4, 6), (6, 8)]
    assert [(span.codes, span.inputs) for span in schedule.spans[2:]] == [("never", "soft"), ("never", "hard")]
    rates = {
        part: [schedule.peak(step, part) * schedule.rate(step, part) for step in range(8)]
        for part in ("encoder", "decoder")
    }
    assert rates["encoder"] == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.25, 0.125, 0, 0])
    assert rates["decoder"] == pytest.approx([0, 0, 0, 0, 0.05, 0.1, 0.1, 0.05])
    assert [schedule.learning_rate(step, "quantizer") for step in (3, 5)] == pytest.approx([0, 0.2])
    assert schedule.tau(4) == config.tau_start and schedule.tau(5) == pytest.approx(config.tau_end)


def test_the_papers_recipe_is_one_stage(seed: int) -> None:
    """The same bits as without stages."""
    plain, staged = (
        tiny_trainer(None, seed, train={"stages": given}) for given in ([], [{"name": "joint", "epochs": 2}])
    )
    plain.fit()
    staged.fit()
    for first, second in zip(plain.model.parameters(), staged.model.parameters(), strict=True):
        assert torch.equal(first, second)


def test_each_stage_changes_its_own_parts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(None, seed, train=STAGES)
    moved: dict[int, set[str]] = {}
    update = trainer._update

    def watched(*arguments: Any) -> Any:
        before = {
            part: [p.detach().clone() for p in parameters] for part, parameters in parts_of(trainer.model).items()
        }
        result = update(*arguments)
        moved[int(trainer.steps_done)] = {
            part
            for part, parameters in parts_of(trainer.model).items()
            if any(not torch.equal(old, new) for old, new in zip(before[part], parameters, strict=True))
        }
        return result

    monkeypatch.setattr(trainer, "_update", watched)
    trainer.fit()
    assert moved == {
        **dict.fromkeys(range(2), {"encoder"}),
        **dict.fromkeys(range(2, 6), {"encoder", "quantizer", "decoder"}),
        **dict.fromkeys(range(6, 9), {"quantizer", "decoder"}),
    }
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


@pytest.mark.parametrize("step", range(1, 9))
def test_resumed_in_any_stage_a_run_has_the_bits_of_a_whole_one(step: int, tmp_path: Path) -> None:
    train = STAGES | {"checkpoint_every": 9}
    whole = tiny_trainer(tmp_path / "whole", 0, train=train)
    whole.fit()
    train["checkpoint_every"] = 1
    stopped = tiny_trainer(tmp_path / "stopped", 0, train=train)

    class Stop(Exception):
        pass

    tend_codes = stopped._tend_codes

    def stop(at: int, result: Any) -> None:
        if at == step:
            raise Stop
        tend_codes(at, result)

    stopped._tend_codes = stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        stopped.fit()
    resumed = tiny_trainer(tmp_path / "stopped", 0, train=train)
    resumed.fit(resume=True)
    for name, tensor in whole._state().items():
        assert torch.equal(tensor, resumed._state()[name]), name
    rows = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / run / "metrics.jsonl").open()
        ]
        for run in ("whole", "stopped")
    ]
    assert rows[0] == rows[1]


def test_metrics_of_stages(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, 1, train=STAGES)
    trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["stage"] for row in rows] == [1] * 2 + [3] * 4 + [5] * 3
    measured = [row["step"] for row in rows if "nll_hard" in row]
    assert measured == [5, 6, 9]  # ends of epochs and stages that have a decoder
    assert [set(row) & {"ntp", "infonce", "local"} for row in rows[::4]] == [
        {"infonce"},
        {"ntp", "infonce", "local"},
        {"ntp"},
    ]
    assert all(0 <= row["off_trie"] <= 1 for row in rows if "off_trie" in row)
    assert all(0 <= row["changed_codes"] <= 1 for row in rows[5:]) and "changed_codes" not in rows[4]


def test_semantic_ids_of_training_are_those_of_the_index_and_are_saved(tmp_path: Path) -> None:
    """Items that are new to the catalog get others; the ones that were trained on keep theirs, in any order."""
    trainer = tiny_trainer(tmp_path, 2, {"codebook_sizes": [20, 16]}, STAGES)
    trainer.fit()
    model = load_model(tmp_path / "model.safetensors")
    codes = trainer.model.item_codes
    assert isinstance(codes, torch.Tensor) and len(codes.unique(dim=0)) == len(codes)
    catalog, _ = tiny_data(2)
    assert torch.equal(DGIIndex.build(model, catalog).codes, codes)
    assert model.item_bias is not None and bool(model.item_bias.any())
    order = list(range(len(codes)))[::-1]
    texts = [catalog.texts[row] for row in order] * 2
    grown = Catalog(tuple([catalog.ids[row] for row in order] + [f"new{row}" for row in order]), tuple(texts))
    found = DGIIndex.build(model, grown).codes
    assert torch.equal(found[: len(order)], codes[order])
    assert len(found.unique(dim=0)) == len(found), "new items with the old ones' texts have other IDs"


def test_codes_follow_the_vectors_when_they_are_asked_to(seed: int) -> None:
    """After a stage with codes of every step, the next one takes those that its end would give."""
    train = {"stages": [{"name": "joint", "epochs": 1}, {"name": "decoder", "epochs": 1, "trains": ["decoder"]}]}
    trainer = tiny_trainer(None, seed, {"codebook_sizes": [20, 16]}, train)
    trainer.fit()
    z = encode_items(trainer.model, trainer.data.item_features)
    model = trainer.model
    assert isinstance(model, DGIModel)
    nearest, given = model.quantizer.assign(z), model.item_codes
    assert given is not None and len(given.unique(dim=0)) == len(given)
    alone = [row for row in range(len(z)) if int((nearest == nearest[row]).all(1).sum()) == 1]
    assert torch.equal(nearest[alone], given[alone])


def test_renumbering_keeps_as_many_as_any_permutation(seed: int) -> None:
    old, new = torch.randint(0, 5, (2, 30))
    result = renumbering(old, new, 5)
    assert sorted(result.tolist()) == list(range(5))

    def kept(order: tuple[int, ...]) -> int:
        return sum(int(((old == number) & (new == code)).sum()) for number, code in enumerate(order))

    assert kept(tuple(result.tolist())) == max(map(kept, itertools.permutations(range(5))))


def test_item_targets_against_enumeration(seed: int) -> None:
    """Levels multiplied up, the targets of an item's own path are the softmax over the items."""
    codes = torch.stack([torch.randint(0, 3, (40,)), torch.randint(0, 4, (40,))], 1)
    probabilities = torch.rand(6, 40, dtype=torch.float64)
    probabilities /= probabilities.sum(1, keepdim=True)
    own = codes[torch.randint(0, 40, (6,))]
    for share in (1.0, 0.25):
        first, second = code_targets(probabilities, codes, own, (3, 4), share)
        for row in range(6):
            for k in range(3):
                exact = probabilities[row, codes[:, 0] == k].sum()
                assert first[row, k] == pytest.approx(float(share * exact + (1 - share) * (own[row, 0] == k)))
            below = probabilities[row] * (codes[:, 0] == own[row, 0])
            for k in range(4):
                exact = below[codes[:, 1] == k].sum() / below.sum()
                assert second[row, k] == pytest.approx(float(share * exact + (1 - share) * (own[row, 1] == k)))
    nothing = torch.zeros(6, 40)
    targets = code_targets(nothing, codes, own, (3, 4), 1.0)
    assert torch.equal(targets[1], F.one_hot(own[:, 1], 4).float()), "no NaN below a prefix without probability"


def test_item_targets_are_the_same_from_all_items_and_from_those_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU and as on the CPU, to the bit; an item's code may be that of none."""
    sizes = (3, 4, 5)
    codes, own = (torch.stack([torch.randint(0, size, (rows,)) for size in sizes], 1) for rows in (60, 9))
    probabilities = torch.randn(9, 60).mul(3).softmax(1)
    below = code_targets(probabilities, codes, own, sizes, 0.7)
    monkeypatch.setattr(distillation, "_narrows", lambda device: False)
    for want, got in zip(below, code_targets(probabilities, codes, own, sizes, 0.7), strict=True):
        assert torch.equal(got, want)


def test_probability_off_the_trie_against_enumeration() -> None:
    trainer = tiny_trainer(None, 0, train=STAGES)
    trainer.fit()
    model = trainer.model
    assert isinstance(model, DGIModel) and model.item_codes is not None
    model.item_codes.copy_(model.item_codes[torch.randint(0, 6, (len(model.item_codes),))])  # few IDs exist
    batch = trainer.data.batch(torch.zeros(64, dtype=torch.int64))
    estimates = torch.tensor([diagnose(model, model.item_codes, batch, 1.0, seed)["off_trie"] for seed in range(20)])
    with torch.no_grad():
        query = model.encode_queries(trainer.data.batch(torch.zeros(1, dtype=torch.int64)))
        total = 0.0
        for code in model.item_codes.unique(dim=0):
            vectors = model.quantizer.embed(code[:1], 0)[None]
            hidden = model.decoder(vectors, query.memory, query.mask)
            levels = [head(hidden[:, j]).softmax(-1)[0, code[j]] for j, head in enumerate(model.heads)]
            total += float(levels[0] * levels[1])
    error = float(estimates.std()) / 20**0.5
    assert abs(float(estimates.mean()) - (1 - total)) < 4 * error + 1e-6 and 0.01 < 1 - total < 0.99


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": [{"name": "decoder"}]}, r"stages\[0\] trains a decoder before any stage makes codes"),
        ({"stages": [{"name": "joint"}, {"name": "quantizer"}]}, "must not end with the quantizer"),
        (
            {"stages": [{"name": "joint", "distillation": 0.5}]},
            r"stages\[0\] needs codes of all items for distillation",
        ),
        ({"stages": [{"epochs": 1}]}, r"TrainConfig.stages\[0\] must have a name among encoder, quantizer"),
        ({"stages": [{"name": "joint", "epoch": 1}]}, r"stages\[0\]: unknown field 'epoch' in Stage"),
        (
            {"stages": [{"name": "joint", "trains": ["heads"]}]},
            "trains must name parts among encoder, quantizer, decoder",
        ),
        ({"stages": [{"name": "joint", "rates": {"decoder": 0}}]}, r"rates\['decoder'\] must be positive"),
        ({"stages": [{"name": "joint", "epochs": 0}]}, "epochs must be positive and finite; got 0"),
        ({"stages": [3]}, "must be a list of stages"),
        ({"item_bias": True}, 'item_bias needs contrastive="all_items"'),
    ],
)
def test_stages_that_cannot_be_are_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, given)


def test_stages_need_a_generative_model() -> None:
    with pytest.raises(ValueError, match="stages and item_bias need a DGIModel; got DualEncoder"):
        Trainer(
            DualEncoder(from_dict(ModelConfig, MODEL)),
            stages({"name": "encoder"}, {"name": "quantizer"}, {"name": "decoder"}),
            *tiny_data(0),
            None,
        )


def test_a_checkpoint_of_other_stages_is_refused(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, 0, train=STAGES).fit()
    _, description = read_tensors(max((tmp_path / "checkpoints").iterdir()), "checkpoint")
    assert [stage["name"] for stage in description["train_config"]["stages"]][1] == "quantizer"
    with pytest.raises(ValueError, match="train_config.stages is"):
        tiny_trainer(tmp_path, 0, train=STAGES | {"stages": STAGES["stages"][:3]}).fit(resume=True)
