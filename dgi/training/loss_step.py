"""Model and objective in one forward pass, and the optimizer with its parts."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dgi.config import LOSS_TERMS, PARTS, TrainConfig
from dgi.data.batches import Batch
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.losses import DGILoss
from dgi.training.schedule import Span

TERMS_OF = {"encoder": ("infonce",), "decoder": ("ntp",), "joint": LOSS_TERMS}


class StepResult(NamedTuple):
    """Terms of the objective with their gradient, and without any what logging and revival read.

    Attributes:
        terms: by name, ``loss`` their weighted sum.
        item_rows: (B,) catalog rows of the clicked items.
        codes: (B, m) their hard codes, or None where none were made.
        residuals: (B, m, d) what every level saw of them, or None.
    """

    terms: dict[str, Tensor]
    item_rows: Tensor
    codes: Tensor | None
    residuals: Tensor | None


def stage_weights(config: TrainConfig, span: Span) -> dict[str, float]:
    """Weight of every term in a stage: 0 for those that are no business of it."""
    weights = dict.fromkeys(LOSS_TERMS, 1.0) | config.loss_weights
    if span.inputs == "hard":  # nothing is quantized
        weights |= dict.fromkeys(("global", "local", "diversity"), 0.0)
    own = TERMS_OF[span.stage.name]
    return {name: weight if name in own else 0.0 for name, weight in weights.items()} | span.stage.loss_weights


class LossStep(nn.Module):
    """One stage's model and objective in one forward pass, which is what DistributedDataParallel wraps.

    Args:
        model: what is trained.
        config: how.
        span: the stage.
        item_log_q: of its candidates, see :class:`dgi.DGILoss`.
    """

    def __init__(self, model: DualEncoder, config: TrainConfig, span: Span, item_log_q: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.span = span
        self.loss = DGILoss(
            stage_weights(config, span),
            beta=config.beta,
            similarity=model.config.similarity,
            contrastive_temperature=config.contrastive_temperature,
            contrastive=span.stage.contrastive or config.contrastive,
            item_log_q=item_log_q,
            distillation=span.stage.distillation,
        )

    def forward(self, batch: Batch, tau: float, seed: int, row_offset: int) -> StepResult:
        model, span = self.model, self.span
        if span.stage.name == "encoder":
            output = model.encode_clicks(batch)[0]
            return StepResult(self.loss(output), output.item_rows, None, None)
        usual = span.inputs == "soft" and span.codes == "step"
        options = {} if usual else {"inputs": span.inputs, "fixed": span.codes != "step"}
        output = model(batch, tau=tau, seed=seed, row_offset=row_offset, **options)
        if not isinstance(model, DGIModel):
            return StepResult(self.loss(output), output.item_rows, None, None)
        terms = self.loss(output, list(model.heads), list(model.quantizer.codebooks), model.item_codes)
        residuals = None if output.quantization is None else output.quantization.residuals.detach()
        return StepResult(terms, output.item_rows, output.codes, residuals)


def parts_of(model: DualEncoder) -> dict[str, list[nn.Parameter]]:
    """The parameters of every part that stages name, each in one part."""
    quantizer: set[nn.Parameter] = set()
    decoder: set[nn.Parameter] = set()
    if isinstance(model, DGIModel):
        quantizer = {*model.quantizer.parameters(), *model.heads.parameters()}
        decoder = {*model.decoder.parameters()} - set(getattr(model.encoder, "parameters", list)())
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for parameter in model.parameters():
        part = "quantizer" if parameter in quantizer else "decoder" if parameter in decoder else "encoder"
        parts[part].append(parameter)
    return parts


def build_optimizer(model: DualEncoder, config: TrainConfig, *, captured: bool = False) -> torch.optim.AdamW:
    """AdamW with a separate learning rate for codebooks, heads and γ, which do not decay.

    Neither do norms, biases and other vectors of the backbone.  The moments are made here, at zero, not in the first
    step: the state of training then has the same tensors from start to end, to be saved, loaded and broadcast alike.

    Args:
        model: on its device.
        config: peak learning rates and decay.
        captured: for steps in a CUDA graph: learning rates are tensors, which its replays read.
    """
    groups = []
    for part, parameters in parts_of(model).items():
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        if part == "quantizer":
            groups.append(_group(part, parameters, config.quantizer_lr, 0.0))
            continue
        groups.append(_group(part, [p for p in trained if p.ndim > 1], config.backbone_lr, config.weight_decay))
        groups.append(_group(part, [p for p in trained if p.ndim <= 1], config.backbone_lr, 0.0))
    # One pass over each tensor, where torch's own default takes some ten on a CPU.
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True, capturable=captured)
    for group in optimizer.param_groups:
        if captured:
            device = group["params"][0].device
            group["lr"] = torch.full((), group["lr"], device=device)
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                # On the parameter's device, where the fused update reads it.
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def _group(part: str, parameters: list[nn.Parameter], peak_lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "peak_lr": peak_lr, "lr": peak_lr, "weight_decay": weight_decay, "part": part}
