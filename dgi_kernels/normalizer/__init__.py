"""The log-sum-exp of logits over a vocabulary of any size, in one read.

    log_normalizer(x) = log Σ_k exp(x_k)

What :func:`dgi_kernels.beam_step` takes as ``log_normalizer``: the codes of a level may then be a slice of a language
model's vocabulary, and the rest of it is read once, here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import choose_without_gradient
from dgi_kernels.normalizer import native, reference
from dgi_kernels.types import Backend


def log_normalizer(logits: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Compute the log-sum-exp over the last dimension of logits, without a copy of them.

    NaN counts as -inf and +inf as the largest finite number, as in :func:`dgi_kernels.beam_step`; where there is
    nothing to sum up the result is -inf.

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, any strides.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``. Only the reference passes gradients on;
            ``"auto"`` takes it where the logits require one.

    Returns:
        (...) float32, float64 for float64 logits.

    Raises:
        ValueError: the logits have no dimension.
        TypeError: the logits are no tensor, or of another dtype.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> dgi_kernels.log_normalizer(torch.tensor([[0.0, 0.0, float("nan")]])).exp()
        tensor([2.])
    """
    checks.float_tensor("logits", logits, min_ndim=1)
    chosen = choose_without_gradient("log_normalizer", backend, logits)
    if chosen == "native":
        return native.log_normalizer(logits)
    if chosen == "triton":
        from dgi_kernels.normalizer import triton

        return triton.log_normalizer(logits)
    with torch.autocast(logits.device.type, enabled=False):
        return reference.log_normalizer(logits.to(checks.compute_dtype(logits.dtype)))
