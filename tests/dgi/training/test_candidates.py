"""Candidates of InfoNCE: what is drawn, how probable that was, and that training with each kind runs and repeats."""

from __future__ import annotations

import pytest
import torch

from dgi.config import TrainConfig, from_dict, from_file, to_dict
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.training.candidates import Candidates, log_inclusion
from tests.dgi.tiny_runs import tiny_trainer

TARGETS = torch.tensor([4, 4, 4, 1, 1, 0, 4, 1])


def test_draws_follow_the_clicks() -> None:
    candidates = Candidates("sampled", TARGETS, 6, batch_size=3, samples=20_000)
    drawn = candidates.draw(torch.Generator().manual_seed(3))
    assert drawn is not None and candidates.log_q is not None
    shares = torch.tensor([1, 3, 0, 0, 4, 0]) / 8
    torch.testing.assert_close(torch.bincount(drawn, minlength=6) / 20_000, shares, rtol=0, atol=0.02)
    torch.testing.assert_close(candidates.log_q.exp(), shares)
    again = candidates.draw(torch.Generator().manual_seed(3))
    assert again is not None and torch.equal(drawn, again)


def test_in_batch_probabilities_are_those_of_being_in_a_batch() -> None:
    candidates = Candidates("in_batch", TARGETS, 6, batch_size=3, samples=1)
    assert candidates.draw(torch.Generator()) is None and candidates.log_q is not None
    shares = torch.tensor([1, 3, 0, 0, 4, 0]) / 8
    torch.testing.assert_close(candidates.log_q.exp(), 1 - (1 - shares) ** 3)
    tiny = log_inclusion(torch.tensor([1e-12], dtype=torch.float64), 100).exp()
    torch.testing.assert_close(tiny, torch.tensor([1e-10], dtype=torch.float64), rtol=1e-6, atol=0)


def test_all_items_need_no_correction() -> None:
    candidates = Candidates("all_items", TARGETS, 6, batch_size=3, samples=1)
    drawn = candidates.draw(torch.Generator())
    assert candidates.log_q is None and drawn is not None and drawn.tolist() == list(range(6))


@pytest.mark.parametrize("kind", [DualEncoder, DGIModel])
@pytest.mark.parametrize("contrastive", ["in_batch", "sampled", "all_items"])
def test_training_repeats_and_learns(contrastive: str, kind: type[DualEncoder], seed: int) -> None:
    found = []
    for corrected in (True, True, False):
        settings = {"contrastive": contrastive, "contrastive_samples": 16, "log_q": corrected}
        found.append(tiny_trainer(None, seed, train=settings, kind=kind).fit())
        del found[-1]["seconds"]
    assert found[0] == found[1]
    assert (found[0]["infonce"] != found[2]["infonce"]) == (contrastive != "all_items")


def test_configurations_of_older_versions_mean_what_they_meant() -> None:
    old = to_dict(TrainConfig())
    for name in ("contrastive", "contrastive_samples", "log_q"):
        del old[name]
    assert from_file(TrainConfig, old) == TrainConfig(log_q=False)
    assert from_dict(TrainConfig, old).log_q
    with pytest.raises(ValueError, match="contrastive"):
        from_dict(TrainConfig, {"contrastive": "all"})
    with pytest.raises(ValueError, match="contrastive_samples"):
        TrainConfig(contrastive_samples=0)
