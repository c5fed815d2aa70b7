"""Cosine logits as a tensor, for 16-bit operands on a GPU: one product, whose tiles are scaled before they are stored.

    s_nk = scale rh_n rw_k (h_n . w_k)
    dh_n = scale rh_n (I - h^ h^T) sum_k G_nk w^_k,    dw_k likewise,    dscale = sum_n h^_n . sum_k G_nk w^_k

G is the gradient of the logits. Backward's products take w^ and h^ rounded to 16 bits, as torch's own formula does, and
are added up in float32. Bytes: the logits once forward, G twice backward.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor, library

from dgi_kernels import checks
from dgi_kernels.cosine import triton_products as products
from dgi_kernels.cosine.triton_fused import blocks, fitting_tiles
from dgi_kernels.cosine.triton_launch import finish, tiled
from dgi_kernels.triton_common import norms, product


def cosine_logits(h: Tensor, weight: Tensor, scale: float | Tensor, eps: float) -> Tensor:
    """(..., D), (K, D) of one 16-bit dtype -> (..., K) of the same."""
    scale = checks.scalar_tensor(scale, torch.float32, h.device)
    logits, *_ = _forward(h.reshape(-1, h.shape[-1]), weight, scale, eps)
    return logits.reshape(*h.shape[:-1], len(weight))


@library.custom_op("dgi_kernels::cosine_logits_triton", mutates_args=())
def _forward(h: Tensor, weight: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> logits (N, K), 1 / norms (N,) and (K,)"""
    outputs = logits, rnorm_h, rnorm_w = _empty_outputs(h, weight)
    h, weight = tiled(h), tiled(weight)
    (rows, dim), codes = h.shape, len(weight)
    tiles = fitting_tiles(dim, codes, h.device, plain=True)
    with torch.cuda.device_of(h):
        norms(h, eps, rnorm_h)
        norms(weight, eps, rnorm_w)
        if logits.numel() == 0:
            return outputs
        products.cosine_logits_kernel[(triton.cdiv(codes, tiles.step), triton.cdiv(rows, tiles.owned))](
            h,
            weight,
            p_rnorm_h=rnorm_h,
            p_rnorm_w=rnorm_w,
            p_scale=scale,
            p_out=logits,
            N=rows,
            K=codes,
            D=dim,
            stride_h=h.stride(0),
            stride_w=weight.stride(0),
            **blocks(tiles),
        )
    return outputs


def _empty_outputs(h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    numbers = (h.new_empty(len(x), dtype=torch.float32) for x in (h, weight))
    return h.new_empty(len(h), len(weight)), *numbers  # type: ignore[return-value]


@_forward.register_fake
def _(h, weight, scale, eps):
    return _empty_outputs(h, weight)


@library.custom_op("dgi_kernels::cosine_logits_triton_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    h: Tensor,
    weight: Tensor,
    scale: Tensor,
    rnorm_h: Tensor,
    rnorm_w: Tensor,
    eps: float,
    need_h: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh, dweight (empty where not needed), dscale"""
    dh, dweight = h.new_empty(h.shape if need_h else (0, 0)), weight.new_empty(weight.shape if need_weight else (0, 0))
    radial = torch.zeros_like(rnorm_h)
    h, weight = tiled(h), tiled(weight)
    with torch.cuda.device_of(h):
        if len(h):
            total = rnorm_h.new_empty(1, *h.shape)
            product(upstream, _unit(weight, rnorm_w), total[0])
            finish(total, None, h, rnorm_h, None, None, scale, eps, False, dh, radial)
        if need_weight and len(weight):
            total = rnorm_w.new_empty(1, *weight.shape)
            product(upstream.T, _unit(h, rnorm_h), total[0])
            finish(total, None, weight, rnorm_w, None, None, scale, eps, False, dweight, None)
    return dh, dweight, (radial * rnorm_h).sum()


def _unit(x: Tensor, rnorm: Tensor) -> Tensor:
    return (x * rnorm[:, None]).to(x.dtype)


@_backward.register_fake
def _(upstream, h, weight, scale, rnorm_h, rnorm_w, eps, need_h, need_weight):
    return (
        h.new_empty(h.shape if need_h else (0, 0)),
        weight.new_empty(weight.shape if need_weight else (0, 0)),
        torch.empty_like(scale),
    )


def _save(ctx, inputs, output) -> None:
    h, weight, scale, ctx.eps = inputs
    _, rnorm_h, rnorm_w = output
    ctx.save_for_backward(h, weight, scale, rnorm_h, rnorm_w)
    ctx.mark_non_differentiable(rnorm_h, rnorm_w)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, upstream: Tensor | None, *_):
    if upstream is None:
        return (None,) * 4
    need_h, need_weight, need_scale, _ = ctx.needs_input_grad
    dh, dweight, dscale = _backward(upstream, *ctx.saved_tensors, ctx.eps, need_h, need_weight)
    return dh if need_h else None, dweight if need_weight else None, dscale if need_scale else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
