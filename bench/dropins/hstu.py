"""HSTU (generative-recommenders): the sampled softmax, which gathers the vectors of R negatives for each row.

Its loss draws negatives for every position; ours takes all items, which is what the draw estimates. Where every other
item is drawn once, both are the same number; that is the step whose results must be equal.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

from dropins import Change, DropIn, Outputs, Steps, common

ROWS, ITEMS, DIM, SAMPLED, TEMPERATURE = 128, 4096, 64, 128, 0.05
PATH = "generative_recommenders/research/modeling/sequential/losses/sampled_softmax.py"


def steps(data: Path | None) -> Steps:
    class SimilarityModule(torch.nn.Module):
        """Their base class, without what its package imports."""

    name = "generative_recommenders.research.rails.similarities.module"
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].SimilarityModule = SimilarityModule  # type: ignore[attr-defined]
    from generative_recommenders.research.modeling.sequential.autoregressive_losses import LocalNegativesSampler
    from generative_recommenders.research.modeling.sequential.losses.sampled_softmax import SampledSoftmaxLoss

    class DotProduct:
        """``similarity_fn`` of their models, by the formula of their DotProductSimilarity."""

        def similarity_fn(self, query_embeddings, item_ids, item_embeddings):  # type: ignore[no-untyped-def]
            return torch.bmm(item_embeddings, query_embeddings.unsqueeze(2)).squeeze(2), {}

    torch.manual_seed(0)
    vectors = common.vectors(data)[: ITEMS + 1, :DIM]
    table = torch.nn.Embedding.from_pretrained(vectors / vectors.std(), freeze=False, padding_idx=0)
    ids = torch.randint(1, ITEMS + 1, (ROWS,))
    states = (table.weight[ids] + 0.5 * torch.randn(ROWS, DIM)).detach()
    weights = (torch.rand(ROWS) < 0.9).float()

    def loss(rows: int, sampled: int, every: bool) -> Outputs:
        torch.manual_seed(1)
        sampler = LocalNegativesSampler(ITEMS, table, list(range(1, ITEMS + 1)), l2_norm=True, l2_norm_eps=1e-6)
        if every:  # each of the others once: an item's own column is masked by theirs
            shape = (rows, ITEMS)
            draw = torch.arange(1, ITEMS + 1).expand(shape)
            sampler.forward = lambda positive_ids, num_to_sample: (  # type: ignore[method-assign]
                draw,
                sampler.normalize_embeddings(table(draw)),
            )
        table.weight.grad = None
        queries = states.clone().requires_grad_()
        value, _ = SampledSoftmaxLoss(sampled, TEMPERATURE, DotProduct()).jagged_forward(
            output_embeddings=F.normalize(queries, dim=-1, eps=1e-6),
            supervision_ids=ids,
            supervision_embeddings=table(ids),
            supervision_weights=weights,
            negatives_sampler=sampler,
        )
        value.backward()
        return {"loss": value, "dqueries": queries.grad, "dtable": table.weight.grad[1:]}  # type: ignore[dict-item]

    return {
        f"{ITEMS:,} negatives, all items": lambda: loss(ROWS, ITEMS, True),
        f"{SAMPLED} negatives drawn": lambda: loss(ROWS, SAMPLED, False),
    }


DROPIN = DropIn(
    title=f"the loss of {ROWS} positions over {ITEMS:,} items, forward and backward, D = {DIM}",
    kind="loss",
    source="https://github.com/facebookresearch/generative-recommenders",
    commit="2e81fab69a497fb5e24cd23569adf1e78070e4ec",
    data=common.VECTORS,
    packages=(),
    paths=(PATH, "generative_recommenders/research/modeling/sequential/autoregressive_losses.py"),
    changes=(
        Change(PATH, "import torch.nn.functional as F\n", "import torch.nn.functional as F, dgi_kernels\n"),
        Change(
            PATH,
            "        sampled_ids, sampled_negative_embeddings = negatives_sampler(\n",
            "        loss = dgi_kernels.cosine_cross_entropy(output_embeddings, "
            "negatives_sampler._item_emb.weight[1:], supervision_ids - 1, 1 / self._softmax_temperature, "
            'reduction="none")\n'
            "        return (loss * supervision_weights).sum() / supervision_weights.sum(), {}\n"
            "        sampled_ids, sampled_negative_embeddings = negatives_sampler(\n",
        ),
    ),
    steps=steps,
    tolerance={"loss": 1e-5, "dqueries": 1e-4, "dtable": 1e-4},
    differs={f"{SAMPLED} negatives drawn": "theirs estimates the softmax over all items from a draw"},
)
