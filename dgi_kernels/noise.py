"""The noise of ``docs/method.md``: a pure function of seed, level, row and code, in plain PyTorch.

The uniform word for (row n, code k) of level j is word ``k % 4`` of Philox4x32-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) with key ``(seed & 0xffffffff, seed >> 32)`` and counter
``(k // 4, n, j, stream)``. A word x becomes Gumbel(0, 1) noise by

    u = (x + 0.5) * 2**-32,    E = -log1p(-u),    g = -log E

so the upper tail (u -> 0, E -> u) keeps its full resolution: g lies in [-3.14, 22.88].
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels import checks

STREAM_RESIDUAL_QUANTIZE = 0
STREAM_GUMBEL_SOFTMAX = 1
STREAM_KMEANS = 2
STREAM_DROPOUT = 3
STREAM_ATTENTION = 4

WORD = 0xFFFFFFFF  # a 32-bit word, held in int64 since PyTorch computes little in uint32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10: counters (..., 4) and a key (2,) -> words (..., 4), all int64 in [0, 2**32).

    A round takes words 0 and 2 of the counter, ``even``, times a multiplier each, and exchanges the two.
    """
    multipliers, key_steps = _constants(_MULTIPLIERS, key), _constants(_KEY_STEPS, key)
    keys = (key + torch.arange(_ROUNDS, device=key.device).unsqueeze(1) * key_steps) & WORD
    even, odd = counter[..., 0::2], counter[..., 1::2]
    for round_key in keys.unbind():
        high, low = _multiply(multipliers, even)
        even, odd = high.flip(-1) ^ odd ^ round_key, low.flip(-1)
    return torch.stack((even, odd), dim=-1).flatten(-2)


def _constants(values: tuple[int, ...], like: Tensor) -> Tensor:
    """Made on the device: ``torch.tensor`` would copy from the host, which a CUDA graph cannot capture."""
    return torch.stack([like.new_full((), value) for value in values])


def _multiply(multiplier: Tensor, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32-bit product, by 16-bit halves: the whole product could overflow int64."""
    low = multiplier * (word & 0xFFFF)
    high = multiplier * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def random_words(seed: Tensor, level: int, rows: int, codes: int, stream: int, row_offset: int) -> Tensor:
    """The uniform words of one level, (rows, codes) int64 in [0, 2**32)."""
    device = seed.device
    counter = torch.stack(
        torch.broadcast_tensors(
            torch.arange((codes + 3) // 4, device=device),
            torch.arange(rows, device=device).unsqueeze(1) + row_offset,
            seed.new_full((), level),
            seed.new_full((), stream),
        ),
        dim=-1,
    )
    key = torch.cat([seed & WORD, (seed >> 32) & WORD])
    return philox4x32(counter, key).flatten(1)[:, :codes]


def gumbel_from_words(words: Tensor) -> Tensor:
    """Gumbel(0, 1) noise, float32, from uniform words; computed in float64, where ``x + 0.5`` is exact."""
    uniform = (words.double() + 0.5) * 2.0**-32
    return (-(-torch.log1p(-uniform)).log()).float()


def gumbel_noise(seed: Tensor, level: int, rows: int, codes: int, stream: int, row_offset: int) -> Tensor:
    """The reference of :func:`dgi_kernels.gumbel_noise`: ``seed`` int64 of one element -> (rows, codes) float32."""
    return gumbel_from_words(random_words(seed, level, rows, codes, stream, row_offset))


def resolve_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A seed as an int64 tensor of one element on ``device``.

    Args:
        seed: an int in [-2**63, 2**64), taken modulo 2**64; an int64 tensor of one element, used as it is and never
            read by the host; or None: drawn from torch's default generator for ``device``.

    Raises:
        TypeError: ``seed`` is neither, or a tensor of another dtype.
        ValueError: ``seed`` is out of range, has not exactly one element or is on another device.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    if not isinstance(seed, Tensor):
        seed = checks.integer("seed", seed, low=-(2**63), high=2**64 - 1)
        return torch.full((1,), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
    checks.tensor("seed", seed, dtypes=(torch.int64,))
    if seed.numel() != 1:
        raise ValueError(f"seed must be an int or a tensor of one element; got shape {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed must be on {device}, as the other inputs; it is on {seed.device}")
    return seed.reshape(1)


def check_row_offset(row_offset: int, rows: int) -> int:
    """Check that the row numbers ``row_offset ... row_offset + rows - 1`` fit the counter's 32-bit word."""
    row_offset = checks.integer("row_offset", row_offset, low=0, high=WORD)
    if rows + row_offset > 2**32:
        raise ValueError(
            f"row_offset must leave room for the rows: row_offset + rows <= 2**32 is needed; got {row_offset} + {rows}"
        )
    return row_offset
