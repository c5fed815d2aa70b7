"""Stages that have worked, by validation data; what `dgi train` takes where it is given none."""

from __future__ import annotations

from typing import Any

from dgi.config import Stage

# Terms of the quantizer that codes which stay have no use for.
_FIXED = {"local": 0.0, "diversity": 0.0}


def staged(first: float = 1 / 3, distillation: float = 0.5) -> dict[str, Any]:
    """Fields of :class:`dgi.TrainConfig`: an encoder over all items, codes of its vectors, then all on those codes.

    Args:
        first: the part of the steps that trains the encoder alone; its schedule goes on in the joint stage.
        distillation: of :class:`dgi.Stage`.
    """
    return {
        "contrastive": "all_items",
        "item_bias": True,
        "stages": (
            Stage("encoder", epochs=first),
            Stage("quantizer"),
            Stage("joint", epochs=1 - first, inputs="mixed", distillation=distillation, loss_weights=_FIXED),
        ),
    }
