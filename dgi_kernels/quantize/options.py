"""The options of residual quantization, passed whole from the public function to every implementation."""

from __future__ import annotations

from dataclasses import dataclass

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
