"""The five terms against their formulas in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dgi.model.dgi_model import DGIOutput
from dgi.model.heads import CosineHead, InnerProductHead
from dgi.model.losses import DGILoss
from dgi.model.quantizer import ResidualQuantizer


def make_output(rows: int = 6, dim: int = 5) -> tuple[DGIOutput, list[CosineHead], list[torch.Tensor]]:
    quantizer = ResidualQuantizer(dim, (4, 3), initial_scale=7.0)
    z = torch.randn(rows, dim, requires_grad=True)
    item_rows = torch.tensor([3, 1, 3, 0, 2, 1])[:rows]
    z = z[[int((item_rows == row).nonzero()[0]) for row in item_rows]]  # one item has one vector
    output = DGIOutput(
        z, torch.randn(rows, dim), item_rows, quantizer(z, 0.8, seed=4), quantizer.assign(z), torch.randn(rows, 2, dim)
    )
    heads = [CosineHead(codebook, quantizer.log_scale) for codebook in quantizer.codebooks]
    return output, heads, list(quantizer.codebooks)


def test_every_term_follows_its_formula() -> None:
    output, heads, codebooks = make_output()
    weights = {"ntp": 0.5, "global": 2.0, "local": 0.1, "infonce": 3.0, "diversity": 0.7}
    terms = DGILoss(weights, beta=0.3, contrastive_temperature=0.1)(output, heads, codebooks)
    q = output.quantization
    expected = {
        "ntp": sum(
            F.cross_entropy(
                7.0 * F.normalize(output.hidden[:, j].double(), dim=-1) @ F.normalize(E.double(), dim=-1).T,
                output.codes[:, j],
            )
            for j, E in enumerate(codebooks)
        ),
        "global": (1 - F.cosine_similarity(output.z.double(), q.quantized.double().sum(1))).mean(),
        "local": sum(
            1.3 * (q.residuals[:, j] - E[q.codes[:, j]]).double().square().sum(1).mean()
            for j, E in enumerate(codebooks)
        ),
        "diversity": sum((usage.double() * (usage.double() + 1e-9).log()).sum() for usage in q.usage),
    }
    distinct = torch.stack([output.z[int((output.item_rows == row).nonzero()[0])] for row in range(4)]).double()
    cosines = F.normalize(output.query.double(), dim=-1) @ F.normalize(distinct, dim=-1).T
    expected["infonce"] = F.cross_entropy(cosines / 0.1, output.item_rows)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        terms["loss"].double(), sum(weights[name] * value for name, value in expected.items()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("similarity", ["cosine", "inner_product"])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("contrastive", ["in_batch", "sampled", "all_items"])
def test_infonce_over_its_candidates(contrastive: str, corrected: bool, similarity: str) -> None:
    """Against a sum over the columns, written out: the batch's distinct items, draws, or the whole catalog."""
    output, _, _ = make_output()
    table, log_q = torch.randn(7, 5), torch.randn(7).log_softmax(0)
    rows = {"in_batch": None, "sampled": torch.tensor([5, 3, 3, 6, 0]), "all_items": torch.arange(7)}[contrastive]
    output = DGIOutput(
        output.z, output.query, output.item_rows, candidates=None if rows is None else table[rows], candidate_rows=rows
    )
    loss = DGILoss(
        {"infonce": 1.0},
        contrastive_temperature=0.2,
        similarity=similarity,
        contrastive=contrastive,
        item_log_q=log_q if corrected else None,
    )(output)["infonce"]

    def scores(items: torch.Tensor) -> torch.Tensor:
        if similarity == "inner_product":
            return output.query.double() @ items.double().T
        return 5.0 * F.normalize(output.query.double(), dim=-1) @ F.normalize(items.double(), dim=-1).T

    targets = output.item_rows
    if contrastive == "in_batch":
        logits = scores(torch.stack([output.z[int((output.item_rows == row).nonzero()[0])] for row in range(4)]))
        logits = logits - log_q[:4] if corrected else logits
    elif contrastive == "sampled":
        drawn = scores(output.candidates)
        drawn = drawn - log_q[rows] - torch.tensor(5.0).log() if corrected else drawn
        drawn = drawn.masked_fill(targets[:, None] == rows, -torch.inf)
        logits, targets = torch.cat([scores(output.z).diagonal()[:, None], drawn], 1), torch.zeros_like(targets)
    else:
        logits = scores(output.candidates)
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, targets), rtol=1e-5, atol=1e-5)


def test_missing_candidates_are_named() -> None:
    output, _, _ = make_output()
    with pytest.raises(ValueError, match="^output must have candidates"):
        DGILoss(contrastive="sampled")(DGIOutput(output.z, output.query, output.item_rows))


def test_local_loss_splits_its_gradient_by_beta() -> None:
    output, heads, codebooks = make_output()
    only_local = dict.fromkeys(("ntp", "global", "infonce", "diversity"), 0.0)
    residuals = output.quantization.residuals
    terms = DGILoss(only_local, beta=0.25)(output, heads, codebooks)
    gradient = torch.autograd.grad(terms["loss"], residuals)[0]
    codes = torch.stack([E[output.quantization.codes[:, j]] for j, E in enumerate(codebooks)], 1)
    torch.testing.assert_close(gradient, 0.25 * 2 * (residuals - codes) / len(residuals), rtol=1e-4, atol=1e-6)


def test_a_weight_of_zero_leaves_the_term_out() -> None:
    output, heads, codebooks = make_output()
    terms = DGILoss({"local": 0.0, "diversity": 0.0})(output, heads, codebooks)
    assert set(terms) == {"ntp", "global", "infonce", "loss"}


def test_dual_encoder_output_gives_infonce_alone() -> None:
    output, _, _ = make_output()
    terms = DGILoss()(DGIOutput(output.z, output.query, output.item_rows))
    assert set(terms) == {"infonce", "loss"} and torch.equal(terms["infonce"], terms["loss"])


def test_unknown_terms_are_named() -> None:
    with pytest.raises(ValueError, match="weights.*entropy"):
        DGILoss({"entropy": 1.0})


def test_the_inner_product_head_keeps_the_shape_of_its_targets() -> None:
    """Guards against rows that come back in one dimension with reduction="none"."""
    head = InnerProductHead(torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.zeros(1)))
    h, target = torch.randn(2, 3, 5), torch.randint(7, (2, 3))
    loss = head.loss(h, target, reduction="none")
    assert loss.shape == target.shape
    expected = F.cross_entropy(h.double().flatten(0, 1) @ head.weight.double().T, target.flatten(), reduction="none")
    torch.testing.assert_close(loss.double().flatten(), expected)
    torch.testing.assert_close(head.loss(h, target).double(), expected.mean())
