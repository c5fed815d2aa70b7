"""Codebooks and codes from data: K-means, residual K-means, balanced codes, and codes that no two items share.

    code_n = argmin_k cost(x_n, c_k)        c_k = sum_{n: code_n = k} w_n x_n / sum_{n: code_n = k} w_n

with the metrics of :func:`dgi_kernels.assign_codes`. Nothing here has gradients.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels import noise as reference_noise
from dgi_kernels.backend import choose, tracing
from dgi_kernels.clustering import lloyd, native, reference
from dgi_kernels.clustering.options import KMeansOptions
from dgi_kernels.clustering.result import KMeans
from dgi_kernels.enums import METRICS
from dgi_kernels.progress import Progress
from dgi_kernels.quantize import check_codebooks
from dgi_kernels.types import Backend, Metric

__all__ = ["KMeans", "balanced_codes", "kmeans", "residual_kmeans", "unique_codes"]

Init = Literal["kmeans++", "random"]


@torch.no_grad()
def kmeans(
    x: Tensor,
    clusters: int,
    *,
    metric: Metric = "euclidean",
    iterations: int = 25,
    init: Init | Tensor = "kmeans++",
    weights: Tensor | None = None,
    seed: int | Tensor | None = None,
    tol: float = 1e-4,
    eps: float = 1e-12,
    progress: bool = False,
    backend: Backend = "auto",
) -> KMeans:
    """K-means by Lloyd's algorithm: assign each point to its nearest centroid, move each centroid to its points' mean.

    The cost of a point under a centroid c is, by the metric,

    - ``"euclidean"``: ``||x - c||^2``.
    - ``"cosine"``: ``1 - x^ . c^``, where x^ = x / ||x||. The centroid is the mean of the points themselves, which
      residual quantization subtracts; normalise the points first for spherical K-means.
    - ``"dot"``: ``-x . c``, in which long centroids win: no iteration need lower the sum of the costs.

    A cluster without points restarts at one of the points that cost most. Sums are float64, in the
    order of the points: the same seed gives the same bits.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64, finite, N >= 1; any strides. In 16 bits it is converted a batch
            at a time.
        clusters: K >= 1, which may exceed N: the surplus begins as copies of points, moved by 1 % of their norm.
        metric: ``"euclidean"``, ``"cosine"`` or ``"dot"``.
        iterations: at most so many rounds, >= 0. It ends earlier once no code changes.
        init: ``"kmeans++"`` (Arthur and Vassilvitskii 2007; greedy: the best of 2 + log K draws; with many points, from
            a random sample of 16 K of them, at least 8192), ``"random"`` points, or the first centroids (K, D).
        weights: (N,) floating-point, >= 0, not all 0: how much each point counts. None: 1 each.
        seed: of the start, as in :func:`dgi_kernels.gumbel_noise`, whose stream 2 this is.
        tol: a round that moves the centroids by at most ``tol`` times the mean variance of the columns of x, as a sum
            of squares, is the last, as in scikit-learn.
        eps: lower bound of the norms. Of the cosine alone.
        progress: show a progress bar on standard error if it takes more than a second.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        KMeans, a named tuple:

        - ``centroids`` (K, D) float32 (float64 for float64 points).
        - ``codes`` (N,) int64: those of ``assign_codes(x, [centroids], metric=metric)``.
        - ``inertia``, 0-d: the weighted sum of the costs.
        - ``iterations``: an int, rounds that moved centroids.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device, or is out of range; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [8.0, 8.0], [8.0, 9.0]])
        >>> result = dgi_kernels.kmeans(points, 2, seed=0)
        >>> result.centroids.sort(0).values, result.inertia
        (tensor([[0.0000, 0.5000],
                [8.0000, 8.5000]]), tensor(1.))
    """
    x, weights, seed = _check_points(x, weights, seed)
    options = _options(clusters, metric, iterations, tol, eps)
    start = _check_init(init, x, options.clusters)
    kernels = _kmeans_kernels(backend, x)
    with Progress(options.iterations, "clustering", unit="rounds", delay=1.0, shown=progress) as bar:
        return lloyd.run(x, start, weights, seed, options, kernels, backend, bar)


@torch.no_grad()
def residual_kmeans(
    x: Tensor,
    sizes: Iterable[int],
    *,
    metric: Metric = "euclidean",
    iterations: int = 25,
    init: Init = "kmeans++",
    weights: Tensor | None = None,
    seed: int | Tensor | None = None,
    tol: float = 1e-4,
    eps: float = 1e-12,
    progress: bool = False,
    backend: Backend = "auto",
) -> tuple[list[Tensor], Tensor]:
    """K-means on what the levels before leave of the points: codebooks for :func:`dgi_kernels.residual_quantize`.

    Level j clusters ``r_{j-1}`` into K_j codes and leaves ``r_j = r_{j-1} - c_{code}``, with ``r_0 = x``.

    Args:
        x: (N, D), as in :func:`kmeans`.
        sizes: K_j >= 1 for each of m >= 1 levels.
        metric, iterations, init, weights, seed, tol, eps, progress, backend: as in :func:`kmeans`.

    Returns:
        The codebooks, a list of m tensors (K_j, D), float32 (float64 for float64 points), and the codes (N, m) int64:
        those of ``assign_codes(x, codebooks, metric=metric)``.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device, or is out of range; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [8.0, 8.0], [8.0, 9.0]])
        >>> codebooks, codes = dgi_kernels.residual_kmeans(points, [2, 2], seed=0)
        >>> sum(codebook[codes[:, level]] for level, codebook in enumerate(codebooks))
        tensor([[0., 0.],
                [0., 1.],
                [8., 8.],
                [8., 9.]])
    """
    x, weights, seed = _check_points(x, weights, seed)
    if isinstance(sizes, (int, str, Tensor)) or not isinstance(sizes, Iterable):
        raise TypeError(f"sizes must be a sequence of integers, one per level; got {type(sizes).__name__}")
    levels = [
        _options(size, metric, iterations, tol, eps, level=level, name=f"sizes[{level}]")
        for level, size in enumerate(sizes)
    ]
    if not levels:
        raise ValueError("sizes must hold at least one number of codes; got none")
    checks.choice("init", init, ("kmeans++", "random"))
    kernels = _kmeans_kernels(backend, x)
    codebooks, codes = [], []
    residual = x.to(checks.compute_dtype(x.dtype))
    with Progress(sum(o.iterations for o in levels), "clustering", unit="rounds", delay=1.0, shown=progress) as bar:
        for options in levels:
            result = lloyd.run(residual, init, weights, seed, options, kernels, backend, bar)
            bar.update(options.iterations - result.iterations)
            codebooks.append(result.centroids)
            codes.append(result.codes)
            if options is not levels[-1]:
                residual = residual - result.centroids[result.codes]
    return codebooks, torch.stack(codes, dim=1)


@torch.no_grad()
def balanced_codes(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    epsilon: float = 0.003,
    iterations: int = 50,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Tensor:
    """The codes of vectors such that all codes are used about equally: entropic optimal transport by Sinkhorn.

    With the cost d_nk of a vector under a code, as in :func:`kmeans`, and half its range as the unit,
    ``amplitude = (max d - min d) / 2 + 1e-5``:

        s = -d / (epsilon * amplitude)
        repeat: f_n = -log sum_k exp(s_nk + g_k),  g_k = -log sum_n exp(s_nk + f_n)
        code_n = argmax_k s_nk + g_k

    These are the steps of LETTER, LC-Rec, MiniOneRec and OpenOneRec, whose loop over the N x K matrix in float64 gives
    the same codes but for ties. Here nothing of that size is kept: memory is O(N + K), and 16 MB on the CPU.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64, finite; any strides; N may be 0.
        codebook: (K, D), K >= 1, in the dtype of ``x``.
        metric: ``"euclidean"``, ``"cosine"`` or ``"dot"``.
        epsilon: how soft the transport is, positive: smaller is nearer to the cheapest balanced codes, and slower to
            become balanced.
        iterations: rounds, >= 0; 0 gives the codes of :func:`dgi_kernels.assign_codes`.
        eps: lower bound of the norms. Of the cosine alone.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        (N,) int64.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device, or is out of range; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> x = torch.tensor([[0.0], [0.1], [0.2], [0.9]])  # three of the four are nearest to the first code
        >>> dgi_kernels.balanced_codes(x, torch.tensor([[0.0], [1.0]]), epsilon=0.1)
        tensor([0, 0, 1, 1])
    """
    checks.float_tensor("x", x, ndim=2)
    checks.float_tensor("codebook", codebook, ndim=2, like=x)
    checks.shape("codebook", codebook, (None, x.shape[1]), "(K, D)")
    checks.same_dtype("codebook", codebook, "x", x)
    if len(codebook) == 0:
        raise ValueError(f"codebook must have at least one row; got shape {tuple(codebook.shape)}")
    _check_finite("x", x)
    _check_finite("codebook", codebook)
    checks.choice("metric", metric, METRICS)
    epsilon = checks.number("epsilon", epsilon, positive=True)
    iterations = checks.integer("iterations", iterations, low=0)
    eps = checks.number("eps", eps, positive=True)
    dtype = torch.promote_types(x.dtype, codebook.dtype)
    compute = checks.compute_dtype(dtype)
    kernels = implementation(choose("balanced_codes", backend, x.device, dtype))
    return kernels.balanced_codes(x.to(compute), codebook.to(compute), metric, eps, epsilon, iterations)


@torch.no_grad()
def unique_codes(
    codes: Tensor,
    z: Tensor,
    codebooks: Iterable[Tensor],
    *,
    metric: Metric = "cosine",
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Tensor:
    """Give each item a semantic ID that no other item has, by as few and as small moves as its prefix allows.

    Of items that share an ID the nearest to its last code keeps it; all others move, and no more than these. They move
    to free codes of the last level: within a prefix the nearest pair of an item and a free code comes first, then the
    next nearest of those left. Items whose prefix has no free code move in the last two levels, to the nearest code of
    the last level but one below which there is room, and there to the nearest free code; then in the last three, and so
    on. Distances are those of the metric to what the levels before leave of the item, in float64; of equal ones the
    lower row, then the lower code, comes first. Which IDs are taken does not depend on anything but the arguments.

    Args:
        codes: (N, m) integers, the code of each item at each level, as :func:`dgi_kernels.assign_codes` gives them.
        z: (N, D) float32, bfloat16, float16 or float64, finite: the items; any strides; N may be 0.
        codebooks: m tensors (K_j, D) in the dtype of ``z``, the product of the K_j at least N.
        metric: ``"cosine"``, ``"dot"`` or ``"euclidean"``: that of the codes.
        eps: lower bound of the norms. Of the cosine alone.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``. ``"auto"`` works on the CPU, wherever the
            tensors are.

    Returns:
        (N, m) int64 on the device of ``codes``, no two rows alike.

    Raises:
        ValueError: there are fewer semantic IDs than items, or an argument has a wrong shape or is out of range; it is
            named.
        TypeError: an argument has the wrong type.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> z, codebook = torch.tensor([[0.1], [0.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0]])
        >>> codes = dgi_kernels.assign_codes(z, [codebook], metric="euclidean")
        >>> codes.T, dgi_kernels.unique_codes(codes, z, [codebook], metric="euclidean").T
        (tensor([[0, 0, 2]]), tensor([[1, 0, 2]]))
    """
    checks.float_tensor("z", z, ndim=2)
    codebooks = check_codebooks(codebooks, z)
    checks.tensor("codes", codes, dtypes=checks.INDEX_DTYPES, ndim=2, like=z)
    checks.shape("codes", codes, (len(z), len(codebooks)), "(N, m)")
    checks.choice("metric", metric, METRICS)
    eps = checks.number("eps", eps, positive=True)
    _check_finite("z", z)
    sizes = [len(codebook) for codebook in codebooks]
    for level, (codebook, size) in enumerate(zip(codebooks, sizes, strict=True)):
        _check_finite(f"codebooks[{level}]", codebook)
        checks.index(f"codes[:, {level}]", codes[:, level], 0, size)
    if math.prod(sizes) < len(z):
        raise ValueError(
            f"codebooks must have at least as many semantic IDs as there are items; sizes {sizes} give "
            f"{math.prod(sizes)}, for {len(z)} items"
        )
    where = torch.device("cpu") if backend == "auto" else z.device
    compute = functools.reduce(torch.promote_types, (c.dtype for c in codebooks), checks.compute_dtype(z.dtype))
    kernels = implementation(choose("unique_codes", backend, where, compute))
    books = [codebook.to(where, compute) for codebook in codebooks]
    return kernels.unique_codes(codes.to(where, torch.int64), z.to(where, compute), books, metric, eps).to(codes.device)


def implementation(chosen: str) -> Any:
    """The implementation of a backend."""
    if chosen == "triton":
        from dgi_kernels.clustering import triton

        return triton
    return native if chosen == "native" else reference


def _kmeans_kernels(backend: Backend, x: Tensor) -> Any:
    """All of K-means but the assignment, which is that of ``assign_codes``. On GPUs sums are those of plain PyTorch."""
    return implementation("native" if choose("kmeans", backend, x.device, x.dtype) == "native" else "reference")


def _check_points(x: Tensor, weights: Tensor | None, seed: int | Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """The points, contiguous; the weights in float64; the seed as a tensor."""
    checks.float_tensor("x", x, ndim=2)
    if len(x) == 0:
        raise ValueError(f"x must have at least one row; got shape {tuple(x.shape)}")
    _check_finite("x", x)
    if weights is not None:
        checks.float_tensor("weights", weights, ndim=1, like=x)
        checks.shape("weights", weights, (len(x),), "(N,)")
        _check_finite("weights", weights)
        weights = weights.to(torch.float64).contiguous()
        if not bool((weights >= 0).all()) or not bool((weights > 0).any()):
            raise ValueError("weights must be at least 0, and not all of them 0")
    return x.contiguous(), weights, reference_noise.resolve_seed(seed, x.device)


def _check_finite(name: str, value: Tensor) -> None:
    if tracing() or value.numel() == 0:  # there are no values
        return
    # NaN wins both; unlike isfinite, and a sum in float64, this makes no tensor of their size.
    if not bool(torch.stack(torch.aminmax(value)).isfinite().all()):
        raise ValueError(f"{name} must be finite; {int((~value.isfinite()).sum())} of {value.numel()} values are not")


def _options(
    clusters: int, metric: Metric, iterations: int, tol: float, eps: float, *, level: int = 0, name: str = "clusters"
) -> KMeansOptions:
    checks.choice("metric", metric, METRICS)
    return KMeansOptions(
        checks.integer(name, clusters, low=1, high=2**31 - 1),
        metric,
        checks.integer("iterations", iterations, low=0),
        checks.number("tol", tol, low=0.0, high=torch.inf),
        checks.number("eps", eps, positive=True),
        level,
    )


def _check_init(init: Init | Tensor, x: Tensor, clusters: int) -> str | Tensor:
    if not isinstance(init, Tensor):
        return checks.choice("init", init, ("kmeans++", "random"))
    checks.float_tensor("init", init, ndim=2, like=x)
    checks.shape("init", init, (clusters, x.shape[1]), "(K, D)")
    _check_finite("init", init)
    return init.to(checks.compute_dtype(x.dtype)).contiguous()
