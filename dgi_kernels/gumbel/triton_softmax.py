"""Launchers of gumbel_noise and gumbel_softmax in Triton: operators that torch.compile keeps whole."""

from __future__ import annotations

import torch
import triton
from torch import Tensor, library

from dgi_kernels import checks
from dgi_kernels import tiles as measured
from dgi_kernels.gumbel import triton_noise as kernels
from dgi_kernels.noise import STREAM_GUMBEL_SOFTMAX

# (rows, codes) of a tile, for at most so many codes; beyond, a row is several tiles. bench/gpu_code.py compiles them
# all. Measured ones, by these numbers of codes, are kept by GPU model in dgi_kernels/tiles.
NOISE_TILES = ((64, 32), (4, 512))
SOFTMAX_TILES = ((64, 32), (8, 256), (1, 2048))
WARPS = 4


def tile(codes: int, tiles: tuple[tuple[int, int], ...], name: str, device: torch.device) -> tuple[int, int, int]:
    """Rows, codes and warps of a tile of the kernels ``name``."""
    b_n, b_k = next((tile for tile in tiles if codes <= tile[1]), tiles[-1])
    chosen = measured.pick(name, b_k, measured.Tiles(b_n, b_k, WARPS, 1), device)
    return chosen.owned, b_k, chosen.warps


@library.custom_op("dgi_kernels::gumbel_noise_triton", mutates_args=())
def gumbel_noise(seed: Tensor, level: int, stream: int, row_offset: int, rows: int, codes: int) -> Tensor:
    """``seed`` int64 of one element -> (rows, codes) float32 on its device."""
    out = seed.new_empty(rows, codes, dtype=torch.float32)
    b_n, b_k, warps = tile(codes, NOISE_TILES, "noise", seed.device)
    if out.numel():
        with torch.cuda.device_of(seed):
            kernels.noise_kernel[(triton.cdiv(rows, b_n) * triton.cdiv(codes, b_k),)](
                seed,
                p_out=out,
                N=rows,
                K=codes,
                level=level,
                noise_stream=stream,
                row_offset=row_offset,
                b_n=b_n,
                b_k=b_k,
                num_warps=warps,
            )
    return out


@gumbel_noise.register_fake
def _(seed, level, stream, row_offset, rows, codes):
    return seed.new_empty(rows, codes, dtype=torch.float32)


def gumbel_softmax(logits: Tensor, tau: float | Tensor, hard: bool, seed: Tensor) -> Tensor:
    """(..., K) float32, bfloat16 or float16 -> (..., K) of the same dtype."""
    tau = checks.scalar_tensor(tau, torch.float32, logits.device)
    rows = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
    return _softmax(rows, tau, hard, seed)[0].reshape(logits.shape)


@library.custom_op("dgi_kernels::gumbel_softmax_triton", mutates_args=())
def _softmax(logits: Tensor, tau: Tensor, hard: bool, seed: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> the sample (N, K), and the log-normalizer (N,) in base 2, from which backward makes p again."""
    logits = logits.contiguous()
    rows, codes = logits.shape
    out, lse = torch.empty_like(logits), logits.new_empty(rows, dtype=torch.float32)
    b_n, b_k, warps = tile(codes, SOFTMAX_TILES, "softmax", logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            kernels.softmax_kernel[(triton.cdiv(rows, b_n),)](
                logits,
                p_seed=seed,
                p_tau=tau,
                p_out=out,
                p_lse=lse,
                N=rows,
                K=codes,
                noise_stream=STREAM_GUMBEL_SOFTMAX,
                hard=hard,
                one_tile=codes <= b_k,
                b_n=b_n,
                b_k=b_k,
                num_warps=warps,
            )
    return out, lse


@_softmax.register_fake
def _(logits, tau, hard, seed):
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape[0], dtype=torch.float32)


@library.custom_op("dgi_kernels::gumbel_softmax_triton_backward", mutates_args=())
def _softmax_backward(
    upstream: Tensor, logits: Tensor, tau: Tensor, seed: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """-> dlogits (N, K), dtau ()."""
    logits, upstream = logits.contiguous(), upstream.contiguous()
    rows, codes = logits.shape
    dlogits, dtau = torch.empty_like(logits), torch.empty_like(lse)
    b_n, b_k, warps = tile(codes, SOFTMAX_TILES, "softmax", logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            kernels.softmax_backward_kernel[(triton.cdiv(rows, b_n),)](
                logits,
                p_seed=seed,
                p_tau=tau,
                p_lse=lse,
                p_upstream=upstream,
                p_out=dlogits,
                p_dtau=dtau,
                N=rows,
                K=codes,
                noise_stream=STREAM_GUMBEL_SOFTMAX,
                one_tile=codes <= b_k,
                b_n=b_n,
                b_k=b_k,
                num_warps=warps,
            )
    return dlogits, dtau.sum()


@_softmax_backward.register_fake
def _(upstream, logits, tau, seed, lse):
    return logits.new_empty(logits.shape), torch.empty_like(tau)


def _save(ctx, inputs, output) -> None:
    logits, tau, _, seed = inputs
    ctx.save_for_backward(logits, tau, seed, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, upstream: Tensor | None, _: None):
    if upstream is None:
        return None, None, None, None
    dlogits, dtau = _softmax_backward(upstream, *ctx.saved_tensors)
    return dlogits, dtau, None, None


_softmax.register_autograd(_differentiate, setup_context=_save)
