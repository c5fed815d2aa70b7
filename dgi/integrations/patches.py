"""Our ops in code that calls torch's, and codebooks that another library trained."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import has_torch_function

from dgi.model.quantizer import ResidualQuantizer
from dgi_kernels import checks, gumbel_softmax
from dgi_kernels.backend import checks_values
from dgi_kernels.enums import METRICS
from dgi_kernels.types import Backend, Metric

_FLOAT32 = torch.finfo(torch.float32)
UNIT_TOLERANCE = 1e-3  # of the norms of a codebook that is compared with by cosine


@contextlib.contextmanager
def gumbel_softmax_patch(*, backend: Backend = "auto") -> Iterator[None]:
    """Let ``torch.nn.functional.gumbel_softmax`` be :func:`dgi_kernels.gumbel_softmax` inside the ``with`` block.

    What our op does not take stays torch's: another dimension than the last; logits of other dtypes, empty, on the meta
    device, sparse, or of a class with its own ``__torch_function__`` (such as ``DTensor``); a temperature of several
    elements, 0, negative, not finite, of another device or of a dtype that changes the result's. So do calls through a
    name imported before (``from torch.nn.functional import gumbel_softmax``). ``torch.manual_seed`` governs ours too,
    but draws other samples. The patch is of the whole process, all threads included, until the block ends.

    Args:
        backend: of our op.
    """
    original = F.gumbel_softmax

    def patched(
        logits: Tensor, tau: float | Tensor = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
    ) -> Tensor:
        if not (_takes_logits(logits, dim) and _takes_tau(tau, logits)):
            return original(logits, tau, hard, eps, dim)  # type: ignore[arg-type]
        if eps != 1e-10:
            warnings.warn("`eps` parameter is deprecated and has no effect.", stacklevel=2)  # as torch does
        return gumbel_softmax(logits, tau.reshape(()) if isinstance(tau, Tensor) else tau, bool(hard), backend=backend)

    F.gumbel_softmax = patched
    try:
        yield
    finally:
        F.gumbel_softmax = original


def _takes_logits(logits: Tensor, dim: int) -> bool:
    return (
        isinstance(logits, Tensor)
        and not has_torch_function((logits,))
        and not logits.is_meta
        and logits.layout == torch.strided
        and not logits.is_nested
        and logits.dtype in checks.FLOAT_DTYPES
        and logits.ndim > 0
        and dim in (-1, logits.ndim - 1)
        and logits.numel() > 0
    )


def _takes_tau(tau: object, logits: Tensor) -> bool:
    """Whether our op takes a temperature that torch divides by, with the shape and the dtype that torch gives."""
    if not isinstance(tau, Tensor):
        return isinstance(tau, (int, float)) and not isinstance(tau, bool) and _FLOAT32.tiny <= tau <= _FLOAT32.max
    if has_torch_function((tau,)) or tau.numel() != 1 or tau.ndim > logits.ndim or tau.device != logits.device:
        return False
    if tau.dtype not in checks.FLOAT_DTYPES or torch.result_type(logits, tau) != logits.dtype:
        return False
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tau):
        return True  # no value to read; our op checks it
    return not checks_values(tau.device) or _FLOAT32.tiny <= tau.item() <= _FLOAT32.max


@torch.no_grad()
def residual_quantizer_from(
    source: nn.Module | Sequence[Tensor],
    *,
    metric: Metric | None = None,
    initial_scale: float = 30.0,
    backend: Backend = "auto",
) -> ResidualQuantizer:
    """Make our residual quantizer of codebooks trained elsewhere; they are copied.

    Its :meth:`~dgi.ResidualQuantizer.assign` gives the codes that ``source`` gives in evaluation mode, but for ties.

    Args:
        source: a ``ResidualVQ`` of vector-quantize-pytorch without projections, Euclidean or with
            ``use_cosine_sim=True``, or m tensors (K_j, D) of a quantizer that goes by ``metric``, subtracting what it
            chose.
        metric: of :func:`dgi_kernels.residual_quantize`; None: that of the ``ResidualVQ``, or the cosine for tensors.
        initial_scale: the logit scale to start with, for training; it changes no code.
        backend: of the quantizer.

    Raises:
        ValueError, TypeError: a quantizer that goes by another measure or searches its codes by beam, so that ours
            would give other codes, or that has no codebooks yet (``kmeans_init`` before its first batch); or tensors
            that are no codebooks of one width.
    """
    if metric is not None:
        checks.choice("metric", metric, METRICS)
    codebooks: Any = source
    if isinstance(source, nn.Module):
        codebooks, own = _codebooks_of(source)
        if metric not in (None, own):
            raise ValueError(f"metric must be that of source, {own!r}, or its codes differ; got {metric!r}")
        metric = own
    if isinstance(codebooks, str) or not isinstance(codebooks, Sequence) or len(codebooks) == 0:
        raise TypeError(f"source must be a ResidualVQ or a sequence of codebooks; got {type(source).__name__}")
    for level, codebook in enumerate(codebooks):
        checks.float_tensor(f"source[{level}]", codebook, ndim=2, like=codebooks[0])
        checks.shape(f"source[{level}]", codebook, (None, codebooks[0].shape[1]), "(K, D)")
        if not codebook.isfinite().all():
            raise ValueError(f"source[{level}] must be finite")
    quantizer = ResidualQuantizer(
        codebooks[0].shape[1],
        [len(codebook) for codebook in codebooks],
        initial_scale=initial_scale,
        metric=metric or "cosine",
        eps=1e-12,
        backend=backend,
    )
    for own, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        own.copy_(codebook)
    return quantizer.to(codebooks[0].device)


def _codebooks_of(module: nn.Module) -> tuple[list[Tensor], Metric]:
    layers, codebooks = getattr(module, "layers", None), getattr(module, "codebooks", None)
    if layers is None or codebooks is None:
        raise TypeError(f"source must be a ResidualVQ or a sequence of codebooks; got {type(module).__name__}")
    by_cosine = [bool(getattr(layer, "use_cosine_sim", False)) for layer in layers]
    if len(set(by_cosine)) > 1:
        raise ValueError("source must have use_cosine_sim the same at all levels")
    if getattr(module, "has_projections", False) or any(getattr(layer, "has_projections", False) for layer in layers):
        raise ValueError(
            "source must have no projections (codebook_dim = dim); apply its project_in yourself and give its codebooks"
        )
    if getattr(module, "implicit_neural_codebook", False):
        raise ValueError("source must not make its codebooks by a network (implicit_neural_codebook)")
    beams = getattr(module, "eval_beam_size", None) or getattr(module, "beam_size", None) or 1
    if beams > 1:
        raise ValueError(
            f"source must choose its codes level by level; in evaluation mode it searches them with "
            f"{beams} beams (eval_beam_size), and so gives other codes"
        )
    for level, layer in enumerate(layers):
        own = getattr(layer, "_codebook", None)
        if not bool(getattr(own, "initted", True)):
            raise ValueError(f"source has no codebook at level {level} yet (kmeans_init): give it a batch first")
        if getattr(own, "affine_param", False) or getattr(own, "vq_bridge", None) is not None:
            raise ValueError(
                f"source must compare residuals with its codebooks as they are; that of level {level} is transformed "
                f"first (affine_param or vq_bridge)"
            )
    if not by_cosine[0]:
        return [codebook.float() for codebook in codebooks], "euclidean"
    for level, codebook in enumerate(codebooks):
        norms = torch.linalg.vector_norm(codebook.float(), dim=-1)
        if not bool((((norms - 1).abs() < UNIT_TOLERANCE) | (norms == 0)).all()):
            raise ValueError(
                f"source must have vectors of norm 1, since it takes their dot products for cosines; "
                f"those of level {level} have norms from {norms.min():.4g} to {norms.max():.4g} (was it "
                f"trained with orthogonal_reg_weight?)"
            )
    return [codebook.float() for codebook in codebooks], "cosine"
