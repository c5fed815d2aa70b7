"""The options and operands of residual quantization, passed whole from the public function to every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dgi_kernels.enums import METRICS, MODES


@dataclass(frozen=True)
class QuantizeOptions:
    """What :func:`dgi_kernels.residual_quantize` is told besides tensors; checked there.

    Attributes:
        mode, metric: a name of :data:`MODES` and of :data:`METRICS`.
        row_offset: number of the first row, for the noise.
        eps: lower bound of the norms that the cosine divides by.
    """

    mode: str
    metric: str
    row_offset: int
    eps: float

    @property
    def mode_number(self) -> int:
        return MODES.index(self.mode)

    @property
    def metric_number(self) -> int:
        return METRICS.index(self.metric)


class Operands(NamedTuple):
    """The tensors of a call, with one leading dimension; the first six may carry gradients.

    Attributes:
        z: (N, D).
        codebooks: m of (K_j, D).
        scale, tau: a float or a 0-d tensor.
        noise_scale: (N,) what multiplies the noise of each row, or None: 1.
        values: m of (K_j, V), or None.
        seed: (1,) int64, or None: no noise.
        padding: (N,) bool, rows that ``usage`` does not count, or None.
    """

    z: Tensor
    codebooks: Sequence[Tensor]
    scale: float | Tensor
    tau: float | Tensor
    noise_scale: Tensor | None = None
    values: Sequence[Tensor] | None = None
    seed: Tensor | None = None
    padding: Tensor | None = None
