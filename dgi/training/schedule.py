"""When training does what: the steps of each stage, learning rates, temperature and revivals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from dgi.config import PARTS, Stage, TrainConfig, stages_of

REVIVED_SHARE = 0.8  # of training; see Schedule.revives
USUAL_PARTS: dict[str, tuple[str, ...]] = {
    "encoder": ("encoder",),
    "quantizer": (),
    "decoder": ("quantizer", "decoder"),
    "joint": PARTS,
}


@dataclass(frozen=True)
class Span:
    """The steps ``start`` to ``end - 1`` of one stage, and what its empty fields stand for.

    Attributes:
        parts: of the model that learn.
        codes: when semantic IDs follow the item vectors: ``never``, ``epoch`` or ``step``.
        inputs: of the decoder: ``soft``, ``hard`` or ``mixed``.
        quantizes: whether soft assignments are computed.
    """

    stage: Stage
    start: int
    end: int
    parts: tuple[str, ...]
    codes: str
    inputs: str
    quantizes: bool


def spans(config: TrainConfig, total_steps: int) -> tuple[Span, ...]:
    """The stages with their steps: of ``total_steps`` each gets as many as its epochs are of all epochs."""
    stages = stages_of(config)
    epochs = [0.0 if stage.name == "quantizer" else stage.epochs for stage in stages]
    made: list[Span] = []
    done, start, coded = 0.0, 0, False
    for stage, own in zip(stages, epochs, strict=True):
        done += own
        end = round(total_steps * done / sum(epochs))
        joint = stage.name == "joint"
        codes = stage.codes or ("step" if joint and not coded else "never")
        inputs = stage.inputs or ("soft" if joint else "hard")
        made.append(Span(stage, start, end, stage.trains or USUAL_PARTS[stage.name], codes, inputs, joint))
        start, coded = end, coded or stage.name == "quantizer"
    return tuple(made)


@dataclass(frozen=True)
class Schedule:
    """Learning rate, temperature and revivals of every step; steps count from 0 to ``total_steps - 1``.

    The schedule of a part of the model is over the steps that train it, whatever the stages.
    """

    config: TrainConfig
    total_steps: int

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        return spans(self.config, self.total_steps)

    def span(self, step: int) -> Span:
        """The stage that a step belongs to."""
        return next(span for span in self.spans if span.start <= step < span.end)

    def rate(self, step: int, part: str = "encoder") -> float:
        """Share of the peak learning rate: linear up to 1 at the end of warm-up, then linear down to 0 at the end."""
        place, total = self._place(step, lambda span: part in span.parts)
        warmup = self.config.warmup_steps
        return (place + 1) / warmup if place < warmup else (total - place) / max(1, total - warmup)

    def peak(self, step: int, part: str) -> float:
        """Peak learning rate of a part in a step's stage; 0 where the stage does not train it."""
        span = self.span(step)
        if part not in span.parts:
            return 0.0
        usual = self.config.quantizer_lr if part == "quantizer" else self.config.backbone_lr
        return span.stage.rates.get(part, usual)

    def learning_rate(self, step: int, part: str) -> float:
        """Of a part; ``backbone`` is the faster of encoder and decoder."""
        if part == "backbone":
            return max(self.learning_rate(step, part) for part in ("encoder", "decoder"))
        return self.peak(step, part) * self.rate(step, part)

    def tau(self, step: int) -> float:
        """Gumbel-Softmax temperature, geometric from ``tau_start`` in the first step to ``tau_end`` in the last."""
        start, end = self.config.tau_start, self.config.tau_end
        place, total = self._place(step, lambda span: span.quantizes)
        return start * (end / start) ** (min(1.0, place / max(1, total - 1)))

    def revives(self, step: int) -> bool:
        """Whether dead codes are revived after ``step``: every ``revive_every`` steps, but not in the last fifth.

        A revived code changes the semantic IDs of the items around it, which the decoder then has to learn again; in
        the last fifth, with the learning rate near zero, it no longer could. Where semantic IDs do not follow the
        codebooks at every step, nothing is revived.
        """
        every = self.config.revive_every
        place, total = self._place(step, lambda span: span.quantizes and span.codes == "step")
        done = place + 1
        return self.span(step).codes == "step" and every > 0 and done % every == 0 and done <= REVIVED_SHARE * total

    def _place(self, step: int, counts: Callable[[Span], bool]) -> tuple[int, int]:
        """How many steps before ``step``, and how many in all, are of stages that count."""
        counted = [span for span in self.spans if counts(span)]
        before = sum(min(max(step - span.start, 0), span.end - span.start) for span in counted)
        return before, sum(span.end - span.start for span in counted)
