"""Stages that have worked, by validation data; what ``dgi train`` takes where it is given none."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

from dgi.config import ModelConfig, Stage, TrainConfig

FEW_ITEMS = 20_000  # so many are encoded in every step, for a softmax over all of them


def staged(
    epochs: float = 1.0,
    *,
    first: float = 1 / 3,
    all_items: bool = True,
    distillation: float = 0.5,
    inputs: Literal["hard", "mixed", "soft"] = "hard",
    ntp: float = 0.05,
    decoder_rate: float = 2e-3,
) -> dict[str, Any]:
    """Fields of :class:`dgi.TrainConfig`: an encoder, codes of its vectors, then everything on those codes.

    The next-token loss reaches the encoder through the request's memory, not through the items' codes.

    Args:
        epochs: of all stages.
        first: the part of them that trains the encoder alone; its schedule goes on in the joint stage.
        all_items: softmax over the whole catalog, with a bias for each item; the decoder learns from it too.
        distillation: see :class:`dgi.Stage`; without ``all_items`` there is none.
        inputs: of the decoder in the joint stage, see :class:`dgi.Stage`.
        ntp: weight of the next-token loss beside InfoNCE. AdamW's steps do not depend on the size of a loss: with a
            small weight the decoder learns what it would, and the encoder listens to InfoNCE.
        decoder_rate: peak learning rate of decoder and quantizer in the joint stage; 0 for the configuration's.
    """
    share = distillation if all_items else 0.0
    # Codes that stay have no use for terms that keep codes in use and near.
    weights = {"ntp": ntp} | ({} if inputs == "hard" else {"local": 0.0, "diversity": 0.0})
    joint = Stage(
        "joint",
        epochs=(1 - first) * epochs,
        rates=dict.fromkeys(("quantizer", "decoder"), decoder_rate) if decoder_rate else {},
        inputs=inputs,
        distillation=share,
        loss_weights=weights,
    )
    fields: dict[str, Any] = {"stages": (Stage("encoder", epochs=first * epochs), Stage("quantizer"), joint)}
    return fields | ({"contrastive": "all_items", "item_bias": True} if all_items else {})


def recommended(
    model: ModelConfig, training: TrainConfig, given: Collection[str], num_items: int, num_interactions: int
) -> tuple[TrainConfig, str]:
    """Settings for a data set where the user gave none, and one line that says which and why.

    Args:
        model, training: the configuration, with defaults for what was not given.
        given: names of the settings that the user gave; they are kept.
        num_items, num_interactions: size of the catalog and of the training set.
    """
    changes: dict[str, Any] = {}
    batch = max(1, min(training.batch_size, num_interactions))
    steps = training.steps or training.epochs * max(1, num_interactions // batch)
    if "warmup_steps" not in given:
        changes["warmup_steps"] = min(training.warmup_steps, steps // 10)
    if "stages" in given:
        if not training.stages:
            return dataclasses.replace(
                training, **changes
            ), "training in one stage, as the paper does: stages=[] was given"
        return dataclasses.replace(training, **changes), "training in the stages that were given"
    few = num_items <= FEW_ITEMS and model.encoder != "t5"
    kind = training.contrastive if "contrastive" in given else "all_items" if few else "in_batch"
    # A decoder from scratch learns faster than the encoder; T5's is no beginner, and rates that are given are kept.
    fresh = model.encoder != "t5" and not {"quantizer_lr", "backbone_lr"}.intersection(given)
    rate = 2 * training.backbone_lr if fresh else 0.0
    recipe = staged(training.epochs, all_items=kind == "all_items", decoder_rate=rate)
    changes |= {name: value for name, value in recipe.items() if name not in given}
    changes["contrastive"] = kind
    why = {
        "all_items": f"softmax over all {num_items:,} items",
        "sampled": "softmax over sampled items",
        "in_batch": "softmax over the items of a batch",
    }[kind]
    if "contrastive" not in given:
        too_much = "T5 is too slow to encode all" if model.encoder == "t5" else "they are too many for all"
        why += ", since they are few" if few else f", since {too_much}"
    stages = ", ".join(
        stage.name if stage.name == "quantizer" else f"{stage.name} {stage.epochs:.3g} epochs"
        for stage in recipe["stages"]
    )
    line = f"training in stages ({stages}): none were given; {why}. stages=[] is the paper's single stage"
    return dataclasses.replace(training, **changes), line
