"""Our ops in code that calls torch's, and codebooks that another library trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi.model.quantizer import ResidualQuantizer
from dgi_kernels import checks, gumbel_softmax


@contextlib.contextmanager
def gumbel_softmax_patch(*, backend: str = "auto") -> Iterator[None]:
    """Let ``torch.nn.functional.gumbel_softmax`` be :func:`dgi_kernels.gumbel_softmax` inside the ``with`` block.

    Calls over another dimension than the last, of other dtypes or of empty logits stay torch's. So do calls through a
    name imported before (``from torch.nn.functional import gumbel_softmax``). ``torch.manual_seed`` governs ours too,
    but draws other samples. The patch is of the whole process, all threads included, until the block ends.

    Args:
        backend: of our op.
    """
    original = F.gumbel_softmax

    def patched(logits: Tensor, tau: float | Tensor = 1, hard: bool = False, eps: float = 1e-10,
                dim: int = -1) -> Tensor:
        last = logits.ndim > 0 and dim in (-1, logits.ndim - 1)
        if not last or logits.dtype not in checks.FLOAT_DTYPES or logits.numel() == 0:
            return original(logits, tau, hard, eps, dim)  # type: ignore[arg-type]
        return gumbel_softmax(logits, tau, bool(hard), backend=backend)

    F.gumbel_softmax = patched
    try:
        yield
    finally:
        F.gumbel_softmax = original


@torch.no_grad()
def residual_quantizer_from(source: nn.Module | Sequence[Tensor], *, initial_scale: float = 30.0,
                            backend: str = "auto") -> ResidualQuantizer:
    """Make our residual quantizer of codebooks trained elsewhere; they are copied.

    Its :meth:`~dgi.ResidualQuantizer.assign` gives the codes that ``source`` gives in evaluation mode, but for ties.

    Args:
        source: a ``ResidualVQ`` of vector-quantize-pytorch with ``use_cosine_sim=True`` and without projections, or m
            tensors (K_j, D) of a quantizer that goes by the cosine of the residual, subtracting what it chose.
        initial_scale: the logit scale to start with, for training; it changes no code.
        backend: of the quantizer.

    Raises:
        ValueError, TypeError: a quantizer that goes by another measure, so that ours would give other codes; or tensors
            that are no codebooks of one width.
    """
    codebooks = _codebooks_of(source) if isinstance(source, nn.Module) else source
    if isinstance(codebooks, str) or not isinstance(codebooks, Sequence) or len(codebooks) == 0:
        raise TypeError(f"source must be a ResidualVQ or a sequence of codebooks; got {type(source).__name__}")
    for level, codebook in enumerate(codebooks):
        checks.float_tensor(f"source[{level}]", codebook, ndim=2, like=codebooks[0])
        checks.shape(f"source[{level}]", codebook, (None, codebooks[0].shape[1]), "(K, D)")
        if not codebook.isfinite().all():
            raise ValueError(f"source[{level}] must be finite")
    quantizer = ResidualQuantizer(codebooks[0].shape[1], [len(codebook) for codebook in codebooks],
                                  initial_scale=initial_scale, eps=1e-12, backend=backend)
    for own, codebook in zip(quantizer.codebooks, codebooks, strict=True):
        own.copy_(codebook)
    return quantizer.to(codebooks[0].device)


def _codebooks_of(module: nn.Module) -> list[Tensor]:
    layers, codebooks = getattr(module, "layers", None), getattr(module, "codebooks", None)
    if layers is None or codebooks is None:
        raise TypeError(f"source must be a ResidualVQ or a sequence of codebooks; got {type(module).__name__}")
    if not all(getattr(layer, "use_cosine_sim", False) for layer in layers):
        raise ValueError("source must have use_cosine_sim=True: with Euclidean distances it gives other codes")
    if getattr(module, "has_projections", False) or any(getattr(layer, "has_projections", False) for layer in layers):
        raise ValueError("source must have no projections (codebook_dim = dim); apply its project_in yourself and give "
                         "its codebooks")
    if getattr(module, "implicit_neural_codebook", False):
        raise ValueError("source must not make its codebooks by a network (implicit_neural_codebook)")
    return [codebook.float() for codebook in codebooks]
