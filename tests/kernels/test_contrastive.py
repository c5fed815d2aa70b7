"""In-batch and sampled softmax against float64 sums, and the frequencies that correct them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import FrequencyEstimator, InfoNCELoss, SampledSoftmaxLoss, backend

BACKENDS = ("reference", "native")


def skip_without(name: str) -> None:
    problem = backend.why_not("cosine_cross_entropy", name, torch.device("cpu"), torch.float32)
    if problem is not None:
        pytest.skip(problem)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x.double(), dim=-1) @ F.normalize(y.double(), dim=-1).T


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad((actual * upstream.to(actual.dtype)).sum(), inputs)
    right = torch.autograd.grad((expected * upstream).sum(), inputs)
    for a, e in zip(found, right, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_infonce_is_corrected_and_leaves_copies_out(reduction: str, name: str) -> None:
    skip_without(name)
    queries, items = leaves((9, 6), (12, 6))  # three more candidates than queries
    ids = torch.tensor([0, 1, 2, 0, 4, 5, 1, 7, 0, 9, 2, 11])
    log_q = torch.randn(12)
    loss = InfoNCELoss(8.0, reduction=reduction, backend=name)(queries, items, log_q=log_q, same_as=ids)
    logits = 8.0 * cosines(queries, items) - log_q.double()
    copies = (ids[:9, None] == ids) & (torch.arange(9)[:, None] != torch.arange(12))
    expected = F.cross_entropy(logits.masked_fill(copies, -torch.inf), torch.arange(9), reduction=reduction)
    assert_same(loss, expected, [queries, items])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_ids", [True, False])
def test_sampled_softmax_follows_its_formula(with_ids: bool, reduction: str, name: str) -> None:
    skip_without(name)
    queries, items, sampled = leaves((7, 6), (7, 6), (11, 6))
    item_ids, sampled_ids = torch.arange(7), torch.tensor([0, 0, 3, 9, 9, 12, 3, 5, 20, 21, 0])
    log_q = -3 + torch.randn(11)
    ids = {"item_ids": item_ids, "sampled_ids": sampled_ids} if with_ids else {}
    loss = SampledSoftmaxLoss(9.0, reduction=reduction, backend=name)(queries, items, sampled, log_q=log_q, **ids)
    own = 9.0 * (F.normalize(queries.double(), dim=-1) * F.normalize(items.double(), dim=-1)).sum(-1, keepdim=True)
    others = 9.0 * cosines(queries, sampled) - log_q.double() - math.log(11)
    if with_ids:
        others = others.masked_fill(item_ids[:, None] == sampled_ids, -torch.inf)
    expected = F.cross_entropy(torch.cat([own, others], 1), torch.zeros(7, dtype=torch.long), reduction=reduction)
    assert_same(loss, expected, [queries, items, sampled])


def test_a_query_whose_every_draw_is_its_own_item_has_no_loss() -> None:
    queries, items = leaves((2, 4), (2, 4))
    sampled = items[:1].expand(3, 4)
    loss = SampledSoftmaxLoss(5.0, reduction="none")(
        queries, items, sampled, item_ids=torch.tensor([8, 9]), sampled_ids=torch.tensor([8, 8, 8])
    )
    gradients = torch.autograd.grad(loss.sum(), (queries, items))
    assert loss[0] == 0 and loss[1] > 0 and all(g.isfinite().all() for g in gradients)
    none = SampledSoftmaxLoss(5.0, reduction="none")(
        queries, items, items[:0], item_ids=torch.tensor([8, 9]), sampled_ids=torch.zeros(0, dtype=torch.long)
    )
    assert (none == 0).all()


def test_the_sum_over_draws_is_that_over_all_items_on_average() -> None:
    """exp(loss) - 1, in units of the own term, is linear in the sum that the draws estimate."""
    table, query = torch.randn(40, 8), torch.randn(1, 8)
    q = torch.rand(40) + 0.1
    q /= q.sum()
    criterion = SampledSoftmaxLoss(3.0, reduction="none")
    total, rounds = 0.0, 400
    for _ in range(rounds):
        drawn = q.multinomial(64, replacement=True)
        loss = criterion(
            query, table[7:8], table[drawn], log_q=q[drawn].log(), item_ids=torch.tensor([7]), sampled_ids=drawn
        )
        total += math.expm1(loss.item()) / rounds
    logits = 3.0 * cosines(query, table)[0]
    others = (logits[torch.arange(40) != 7] - logits[7]).exp().sum().item()
    assert total == pytest.approx(others, rel=0.06)


def test_near_one_the_sampled_loss_keeps_its_digits() -> None:
    items = F.normalize(torch.randn(5, 32), dim=-1)
    criterion = SampledSoftmaxLoss(30.0, reduction="none")
    sampled = -items + 0.1 * torch.randn(5, 32)
    loss = criterion(items, items, sampled)
    exact = torch.log1p((30.0 * (cosines(items, sampled) - 1)).exp().sum(1))
    assert loss.max() < 1e-5 and ((loss.double() - exact).abs() <= 2e-5 * exact).all()


@pytest.mark.parametrize("criterion", [InfoNCELoss, SampledSoftmaxLoss])
def test_scales_are_learnt_saved_and_bounded(criterion: Callable[..., InfoNCELoss]) -> None:
    one = criterion(20.0, learnable_scale=True, max_scale=50.0)
    assert one.log_scale.shape == (1,) and one.scale.shape == ()
    old = {"log_scale": torch.tensor(math.log(7.0))}  # 0-d, of an older version
    one.load_state_dict(old)
    assert old["log_scale"].ndim == 0 and one.scale.item() == pytest.approx(7.0)
    with torch.no_grad():
        one.log_scale.fill_(math.log(80.0))
    assert one.scale.item() == pytest.approx(50.0)
    assert torch.autograd.grad(-one.scale, one.log_scale)[0] == 0  # a step would raise it
    assert torch.autograd.grad(one.scale, one.log_scale)[0].item() == pytest.approx(50.0)
    assert "scale=80" in repr(copy.deepcopy(one))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: InfoNCELoss()(torch.randn(3, 4), torch.randn(2, 4)), "items"),
        (lambda: InfoNCELoss()(torch.randn(3, 4), torch.randn(3, 4), log_q=torch.zeros(2)), "log_q"),
        (lambda: InfoNCELoss(reduction="all"), "reduction"),
        (lambda: InfoNCELoss(max_scale=0.0), "max_scale"),
        (lambda: SampledSoftmaxLoss()(torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 4)), "items"),
        (
            lambda: SampledSoftmaxLoss()(
                torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4), item_ids=torch.arange(3)
            ),
            "item_ids",
        ),
        (lambda: FrequencyEstimator(0), "buckets"),
        (lambda: FrequencyEstimator(rate=1.5), "rate"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        call()


def test_frequencies_are_learnt_from_the_stream() -> None:
    """Items of Zipf's law, in batches: estimates come near the share of batches that hold each."""
    torch.manual_seed(0)
    shares = 1 / torch.arange(1.0, 51)
    shares /= shares.sum()
    estimator = FrequencyEstimator(4096, rate=0.01, initial_interval=10.0)
    steps, held = 2000, torch.zeros(50)
    for _ in range(steps):
        batch = shares.multinomial(20, replacement=True)
        estimator(batch.view(4, 5))
        held[batch.unique()] += 1
    estimate = estimator.log_q(torch.arange(50)).exp()
    assert ((estimate / (held / steps)).log().abs() < 0.5).all()
    assert (estimate.log() - (held / steps).log()).mean().abs() < 0.1
    unseen = estimator.log_q(torch.tensor([10**12]))
    assert unseen.exp().item() == pytest.approx(0.1)


def test_frequencies_stay_as_they_are_in_evaluation_and_in_files() -> None:
    estimator = FrequencyEstimator(64)
    for _ in range(3):
        estimator(torch.tensor([5, 5, 9]))
    before = estimator.log_q(torch.arange(20))
    estimator.eval()
    estimator(torch.arange(20))
    assert torch.equal(estimator.log_q(torch.arange(20)), before)
    other = FrequencyEstimator(64)
    other.load_state_dict(estimator.state_dict())
    other.train()
    estimator.train()
    assert torch.equal(other(torch.tensor([5])), estimator(torch.tensor([5]))) and int(other.step) == 4


def test_an_item_twice_in_a_batch_counts_once_and_a_shared_bucket_does_no_harm() -> None:
    one, other = FrequencyEstimator(32, rate=0.5), FrequencyEstimator(32, rate=0.5)
    for _ in range(5):
        one(torch.tensor([3, 3, 3, 4]))
        other(torch.tensor([4, 3]))
    assert torch.equal(one.interval, other.interval)
    crowded = FrequencyEstimator(1, hashes=1, rate=1.0)
    for _ in range(3):
        crowded(torch.tensor([1, 2, 3]))
    assert crowded.log_q(torch.tensor([1])) == 0  # as frequent as all that share its bucket


def test_more_hashes_estimate_rare_items_better() -> None:
    errors = []
    for hashes in (1, 3):
        estimator = FrequencyEstimator(64, hashes=hashes, rate=0.1, initial_interval=1.0)
        for step in range(300):
            estimator(torch.tensor([step % 3, 1000 + step % 40]))
        estimate = estimator.log_q(1000 + torch.arange(40)).exp()
        errors.append((estimate - 1 / 40).clamp(min=0).mean())
    assert errors[1] < errors[0]
