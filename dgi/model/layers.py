"""Layers of the built-in transformers: torch's own, with the same parameters, but for what dropout costs on a CPU.

In training with dropout torch draws every mask with a serial generator and writes the attention's scores, weights and
masks out; here the ops of :mod:`dgi_kernels` do without both. Where no gradient is wanted, an encoder is one call for
all its layers. Wherever these have no kernel the layers are torch's to the bit.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi_kernels import EncoderLayer as LayerParameters
from dgi_kernels import attention, dropout, encoder_layers, why_not


def _drops(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, states: Tensor) -> bool:
    """Whether dropout is on, and has kernels for these states."""
    return (
        layer.training
        and layer.dropout.p > 0
        and not torch.is_autocast_enabled(states.device.type)
        and why_not("attention", "native", states.device, states.dtype) is None
    )


def _feed_forward(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, normed: Tensor, x: Tensor) -> Tensor:
    p = layer.dropout.p
    return dropout(layer.linear2(dropout(F.gelu(layer.linear1(normed)), p)), p, residual=x)


class Encoder(nn.TransformerEncoder):
    """Layers of :class:`EncoderLayer` and a norm behind them."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if mask is not None or is_causal or src_key_padding_mask is None or not self._in_one_call(src):
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        layers = [cast(EncoderLayer, layer) for layer in self.layers]
        heads, eps = _shape(layers[0])
        real = src_key_padding_mask.logical_not()
        states = encoder_layers(src, [_parameters(layer) for layer in layers], real, heads=heads, eps=eps)
        return states if self.norm is None else self.norm(states)

    def _in_one_call(self, states: Tensor) -> bool:
        """Whether no gradient and no dropout is wanted, there is a kernel, and all layers are as it takes them."""
        return (
            not self.training
            and not torch.is_grad_enabled()
            and states.ndim == 3
            and why_not("encoder_layers", "native", states.device, states.dtype) is None
            and not torch.is_autocast_enabled(states.device.type)
            and all(type(layer) is EncoderLayer and _is_usual(layer) for layer in self.layers)
            and len({_shape(cast(EncoderLayer, layer)) for layer in self.layers}) == 1
        )


def _is_usual(layer: EncoderLayer) -> bool:
    """Whether a layer is a pre-norm one with GELU, of torch's own modules, which no hook looks at or changes."""
    part = layer.self_attn
    modules = (layer, part, part.out_proj, layer.norm1, layer.norm2, layer.linear1, layer.linear2)
    return (
        layer.norm_first
        and layer.activation_relu_or_gelu == 2
        and part.batch_first
        and part.in_proj_weight is not None
        and part.in_proj_bias is not None
        and layer.norm1.eps == layer.norm2.eps
        and type(layer.norm1) is type(layer.norm2) is nn.LayerNorm
        and type(layer.linear1) is type(layer.linear2) is nn.Linear
        and not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    )


def _shape(layer: EncoderLayer) -> tuple[int, float]:
    """Heads of a layer, and the eps of its norms."""
    return layer.self_attn.num_heads, layer.norm1.eps


def _parameters(layer: EncoderLayer) -> LayerParameters:
    part = layer.self_attn
    return LayerParameters(
        pair(layer.norm1),
        (part.in_proj_weight, part.in_proj_bias),
        pair(part.out_proj),
        pair(layer.norm2),
        pair(layer.linear1),
        pair(layer.linear2),
    )


def pair(part: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, as the ops take them."""
    return part.weight, part.bias


class EncoderLayer(nn.TransformerEncoderLayer):
    """A pre-norm layer with GELU; ``batch_first`` and ``norm_first``."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if (src_mask is not None and not is_causal) or not _drops(self, src):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        part, p = self.self_attn, self.dropout.p
        packed = F.linear(self.norm1(src), part.in_proj_weight, part.in_proj_bias)
        mixed = attention(packed, heads=part.num_heads, mask=_real(src_key_padding_mask), causal=bool(is_causal), p=p)
        x = dropout(part.out_proj(mixed), p, residual=src)
        return _feed_forward(self, self.norm2(x), x)


class DecoderLayer(nn.TransformerDecoderLayer):
    """A pre-norm layer with GELU whose self-attention is causal; ``batch_first`` and ``norm_first``."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if memory_mask is not None or tgt_key_padding_mask is not None or not _drops(self, tgt):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        prefix, cross, p, width = self.self_attn, self.multihead_attn, self.dropout.p, tgt.shape[-1]
        packed = F.linear(self.norm1(tgt), prefix.in_proj_weight, prefix.in_proj_bias)
        mixed = attention(packed, heads=prefix.num_heads, causal=True, p=p)
        x = dropout(prefix.out_proj(mixed), p, residual=tgt)
        queries = F.linear(self.norm2(x), cross.in_proj_weight[:width], cross.in_proj_bias[:width])
        keys_values = F.linear(memory, cross.in_proj_weight[width:], cross.in_proj_bias[width:])
        mixed = attention(queries, keys_values, heads=cross.num_heads, mask=_real(memory_key_padding_mask), p=p)
        x = dropout(cross.out_proj(mixed), p, residual=x)
        return _feed_forward(self, self.norm3(x), x)


def _real(padding: Tensor | None) -> Tensor | None:
    """Where keys are real, of where they are padding: in a float mask, which torch makes of it, where it is 0."""
    return None if padding is None else padding.logical_not()
