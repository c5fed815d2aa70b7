"""What several drop-ins share: real vectors and semantic IDs, and models with codebooks as training leaves them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dropins import Outputs

VECTORS = "genrec_beauty/items.minilm.f16.npy"  # (12086, 384) of item titles
SEMANTIC_IDS = "sid_letter/Beauty.sid.tsv.gz"  # (12101, 4) codes below 256, 12,088 of them distinct


def vectors(path: Path | None) -> Tensor:
    """(N, D) float32."""
    return torch.from_numpy(np.load(path)).float()  # type: ignore[arg-type]


def semantic_ids(path: Path | None) -> Tensor:
    """(N, L) int64, in the order of the items."""
    return torch.from_numpy(np.loadtxt(path, dtype=np.int64, skiprows=1)[:, 1:])  # type: ignore[arg-type]


@torch.no_grad()
def fill_codebooks(tables: Sequence[nn.Embedding], inputs: Tensor) -> None:
    """Codebooks near what each level sees: rows of the residuals, moved a little, so that no two codes are equal."""
    rest = inputs
    for table in tables:
        rows = rest[torch.randperm(len(rest))[: table.num_embeddings]]
        table.weight.copy_(rows + 0.1 * rest.std() * torch.randn_like(rows))
        rest = rest - table(torch.cdist(rest, table.weight).argmin(dim=1))


def get_indices_steps(
    model: nn.Module, inputs: Tensor, get: Callable[[Tensor], Tensor]
) -> dict[str, Callable[[], Outputs]]:
    """Codes of a catalog by a model of the LC-Rec family, as its scripts call it and in larger batches."""
    fill_codebooks([layer.embedding for layer in model.rq.vq_layers], model.encoder(inputs))  # type: ignore[union-attr]
    return {
        f"batches of {size}": lambda size=size: {"codes": torch.cat([get(batch) for batch in inputs.split(size)])}
        for size in (64, 2048)
    }


class Replay:
    """The first call of a model's ``generate`` in a run, to be made again by itself."""

    def __init__(self, kind: type) -> None:
        self.call: Callable[[], Any] | None = None
        genuine = kind.generate  # type: ignore[attr-defined]

        def generate(model: nn.Module, *arguments: Any, **named: Any) -> Any:
            if self.call is None:
                fresh = copy.deepcopy(named.get("logits_processor"))  # some count their calls
                self.call = lambda: genuine(
                    model, *arguments, **named | ({} if fresh is None else {"logits_processor": copy.deepcopy(fresh)})
                )
            return genuine(model, *arguments, **named)

        kind.generate = generate  # type: ignore[attr-defined]

    @torch.no_grad()
    def __call__(self) -> Outputs:
        assert self.call is not None, "the run comes before"
        found = self.call()
        return {"sequences": found.sequences, "scores": found.sequences_scores}
