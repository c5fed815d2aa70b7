"""Random and hostile calls of every public op: a result without NaN, or an error of the documented kinds. Nothing else.

1,200 calls. Half are valid, with random shapes, dtypes and strides: they must succeed, twice with the same bits. In the
other half one argument is replaced by something wrong, or merely odd: that must succeed or raise ValueError, TypeError
or BackendUnavailable.
"""

from __future__ import annotations

import faulthandler
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dgi_kernels
from dgi_kernels import Trie

DOCUMENTED = (ValueError, TypeError, dgi_kernels.BackendUnavailable)
CASES = 100
SIZES = (1, 2, 3, 5, 8, 17)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def size() -> int:
    return random.choice(SIZES)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values in random strides: contiguous, transposed storage, every second element, or offset."""
    layout = random.choice(("contiguous", "transposed", "strided", "offset"))
    if layout == "transposed" and len(shape) >= 2:
        value = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    elif layout == "strided":
        value = torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]
    elif layout == "offset":
        value = torch.randn(*shape[:-1], shape[-1] + 3)[..., 3:]
    else:
        value = torch.randn(*shape)
    return value.to(dtype)


def scale() -> float | Tensor:
    value = random.uniform(1.0, 60.0)
    return torch.tensor(value) if random.random() < 0.5 else value


def trie(levels: int | None = None) -> Trie:
    levels = levels or random.randint(1, 4)
    sizes = [random.randint(1, 6) for _ in range(levels)]
    items = random.randint(0, 12)
    if items and random.random() < 0.3:
        ragged = [[random.randrange(k) for k in sizes[: random.randint(1, levels)]] for _ in range(items)]
        levels = max(map(len, ragged))
        return Trie.from_codes(ragged, codebook_sizes=sizes[:levels])
    codes = torch.stack([torch.randint(0, k, (items,)) for k in sizes], 1)
    return Trie.from_codes(codes, codebook_sizes=sizes)


def filters(index: Trie, requests: int) -> Any:
    allowed = [index.filter(mask=torch.rand(index.num_items) < 0.5) for _ in range(requests)]
    return random.choice([None, allowed[0] if allowed else None, [random.choice([f, None]) for f in allowed]])


def node_scores(index: Trie, requests: int) -> dict[str, Any]:
    if random.random() < 0.5:
        return {}
    strength = random.choice([0.5, torch.tensor(-2.0), floats(requests)])
    return {"node_scores": index.node_scores(torch.rand(index.num_items) + 0.1), "strength": strength}


def cosine_logits_call() -> dict[str, Any]:
    dtype, dim = random.choice(DTYPES), size()
    return {
        "h": floats(*random.choice([(), (0,), (size(),), (2, size())]), dim, dtype=dtype),
        "weight": floats(size(), dim, dtype=dtype),
        "scale": scale(),
    }


def cosine_cross_entropy_call() -> dict[str, Any]:
    call = cosine_logits_call()
    target = torch.randint(0, len(call["weight"]), call["h"].shape[:-1])
    target[torch.rand(target.shape) < 0.2] = -100
    reduction = random.choice(["mean", "sum", "none"])
    if reduction == "mean":  # F.cross_entropy's mean over no rows is NaN
        call["h"], target = floats(3, call["h"].shape[-1], dtype=call["h"].dtype), torch.zeros(3, dtype=torch.int64)
    return call | {"target": target, "reduction": reduction, "label_smoothing": random.choice([0.0, 0.1])}


def gumbel_noise_call() -> dict[str, Any]:
    return {
        "seed": random.choice([random.randrange(-(2**63), 2**64), torch.randint(0, 2**62, (1,)), 0]),
        "level": random.randint(0, 4),
        "rows": random.randint(0, 9),
        "codes": random.randint(0, 9),
        "stream": random.randint(0, 3),
        "row_offset": random.choice([0, 7, 2**31]),
    }


def gumbel_softmax_call() -> dict[str, Any]:
    return {
        "logits": floats(*random.choice([(), (0,), (size(),), (2, size())]), size(), dtype=random.choice(DTYPES)),
        "tau": random.uniform(0.1, 2.0),
        "hard": random.random() < 0.5,
        "seed": random.randrange(2**40),
    }


def residual_quantize_call() -> dict[str, Any]:
    dtype, dim, leading = random.choice(DTYPES), size(), random.choice([(), (0,), (size(),), (2, size())])
    codebooks = [floats(size(), dim, dtype=dtype) for _ in range(random.randint(1, 4))]
    marked = [random.choice([None, torch.rand(leading) < 0.5]) for _ in range(2)]
    width = random.choice([None, 0, size()])
    return {
        "z": floats(*leading, dim, dtype=dtype),
        "codebooks": codebooks,
        "metric": random.choice(["cosine", "dot", "euclidean"]),
        "values": None if width is None else [floats(len(c), width, dtype=dtype) for c in codebooks],
        "noise_scale": random.choice([None, random.uniform(-1, 2)]),
        "noise_rows": marked[0],
        "mask": marked[1],
        "scale": scale(),
        "tau": random.uniform(0.2, 2.0),
        "mode": random.choice(["soft", "straight_through", "hard", "rotation"]),
        "noise": random.random() < 0.7,
        "seed": random.randrange(2**40),
        "row_offset": random.randint(0, 100),
    }


def assign_codes_call() -> dict[str, Any]:
    call = residual_quantize_call()
    return {key: call[key] for key in ("z", "codebooks", "metric")}


def kmeans_call() -> dict[str, Any]:
    x, clusters = floats(random.choice((1, 5, 40)), size(), dtype=random.choice(DTYPES)), size()
    return {
        "x": x,
        "clusters": clusters,
        "metric": random.choice(["cosine", "dot", "euclidean"]),
        "iterations": random.randint(0, 3),
        "init": random.choice(["kmeans++", "random", floats(clusters, x.shape[1], dtype=x.dtype)]),
        "weights": random.choice([None, torch.rand(len(x)) + 0.1]),
        "seed": random.randrange(2**40),
        "tol": random.choice([0.0, 1e-3]),
    }


def residual_kmeans_call() -> dict[str, Any]:
    call = kmeans_call()
    del call["clusters"], call["init"]
    return {**call, "sizes": [size() for _ in range(random.randint(1, 3))]}


def balanced_codes_call() -> dict[str, Any]:
    dtype, dim = random.choice(DTYPES), size()
    return {
        "x": floats(random.choice((0, *SIZES)), dim, dtype=dtype),
        "codebook": floats(size(), dim, dtype=dtype),
        "metric": random.choice(["cosine", "dot", "euclidean"]),
        "epsilon": random.uniform(0.003, 1.0),
        "iterations": random.randint(0, 4),
    }


def unique_codes_call() -> dict[str, Any]:
    codebooks, dim = [floats(random.randint(2, 9), 3) for _ in range(2)], 3
    rows = random.randint(0, len(codebooks[0]) * len(codebooks[1]))
    codes = torch.stack([torch.randint(len(c), (rows,)) for c in codebooks], 1)
    return {
        "codes": codes,
        "z": floats(rows, dim),
        "codebooks": codebooks,
        "metric": random.choice(["cosine", "dot", "euclidean"]),
    }


def trie_call() -> dict[str, Any]:
    index = trie()
    codes, ids = index.codes()
    return {"codes": codes.clamp(min=0), "item_ids": random.choice([None, ids + 3])}


def beam_step_call() -> dict[str, Any]:
    index, requests = trie(), random.choice((0, *SIZES))
    logits = floats(requests, 1, index.codebook_sizes[0], dtype=random.choice(DTYPES))
    logits = torch.where(torch.rand(logits.shape) < 0.1, random.choice([-math.inf, math.nan]), logits)
    return {
        "trie": index,
        "logits": logits,
        "beams": index.root(requests),
        "num_beams": size(),
        "normalize": random.choice(["full", "children", "none"]),
        "filters": filters(index, requests),
        **node_scores(index, requests),
    }


def cosine_beam_step_call() -> dict[str, Any]:
    index, requests, dim = trie(), random.choice((0, *SIZES)), size()
    return {
        "trie": index,
        "h": floats(requests, 1, dim),
        "codebook": floats(index.codebook_sizes[0], dim),
        "scale": scale(),
        "beams": index.root(requests),
        "num_beams": size(),
        "filters": filters(index, requests),
        **node_scores(index, requests),
    }


def beam_search_call() -> dict[str, Any]:
    index, requests, beams = trie(), random.choice((0, *SIZES)), size()
    tables = [floats(requests, beams if depth else 1, k) for depth, k in enumerate(index.codebook_sizes)]
    return {
        "trie": index,
        "step": lambda depth, tokens, parents: tables[depth],
        "batch_size": requests,
        "num_beams": beams,
        "filters": filters(index, requests),
        **node_scores(index, requests),
    }


def rank_candidates_call() -> dict[str, Any]:
    call = beam_search_call()
    beams = dgi_kernels.beam_search(**call)
    dim = size()
    return {
        "query": floats(call["batch_size"], dim),
        "item_vectors": floats(max(1, call["trie"].num_items), dim),
        "trie": call["trie"],
        "beams": beams,
        "k": size(),
    }


def log_normalizer_call() -> dict[str, Any]:
    logits = floats(*random.choice([(), (0,), (size(),), (2, size())]), size(), dtype=random.choice(DTYPES))
    return {"logits": torch.where(torch.rand(logits.shape) < 0.2, random.choice([-math.inf, math.nan]), logits)}


def decoder_step_call() -> dict[str, Any]:
    heads = random.choice((1, 2, 3))
    dim, hidden, layers = heads * random.choice((1, 4, 5)), size(), random.choice((1, 2))
    requests, slots = random.choice((0, *SIZES)), size()
    beams = (1, size())

    def pair(out: int, *inside: int) -> tuple[Tensor, Tensor]:
        return torch.randn(out, *inside), torch.randn(out)

    def layer() -> dgi_kernels.DecoderLayer:
        norm, square = pair(dim), pair(dim, dim)
        return dgi_kernels.DecoderLayer(
            norm, pair(3 * dim, dim), square, norm, square, square, norm, pair(hidden, dim), pair(dim, hidden)
        )

    return {
        "states": torch.randn(requests, beams[1], dim),
        "layers": [layer() for _ in range(layers)],
        "memory": [torch.randn(requests, slots, 2 * dim) for _ in range(layers)],
        "mask": torch.rand(requests, slots) < 0.5,
        "past": [torch.randn(layers, requests, beams[0], 2 * dim)],
        "ancestors": [torch.zeros(requests, beams[1], dtype=torch.int64)],
        "heads": heads,
    }


def encoder_layers_call() -> dict[str, Any]:
    heads = random.choice((1, 2, 3))
    dim, hidden, requests, length = heads * random.choice((1, 4, 5)), size(), random.choice((0, *SIZES)), size()

    def pair(out: int, *inside: int) -> tuple[Tensor, Tensor]:
        return torch.randn(out, *inside), torch.randn(out)

    def layer() -> dgi_kernels.EncoderLayer:
        maps = pair(3 * dim, dim), pair(dim, dim), pair(dim), pair(hidden, dim), pair(dim, hidden)
        return dgi_kernels.EncoderLayer(pair(dim), *maps)

    return {
        "states": torch.randn(requests, length, dim),
        "layers": [layer() for _ in range(random.choice((1, 2)))],
        "mask": torch.rand(requests, length) < 0.5,
        "heads": heads,
    }


OPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "cosine_logits": (dgi_kernels.cosine_logits, cosine_logits_call),
    "cosine_cross_entropy": (dgi_kernels.cosine_cross_entropy, cosine_cross_entropy_call),
    "gumbel_noise": (dgi_kernels.gumbel_noise, gumbel_noise_call),
    "gumbel_softmax": (dgi_kernels.gumbel_softmax, gumbel_softmax_call),
    "residual_quantize": (dgi_kernels.residual_quantize, residual_quantize_call),
    "assign_codes": (dgi_kernels.assign_codes, assign_codes_call),
    "kmeans": (dgi_kernels.kmeans, kmeans_call),
    "residual_kmeans": (dgi_kernels.residual_kmeans, residual_kmeans_call),
    "balanced_codes": (dgi_kernels.balanced_codes, balanced_codes_call),
    "unique_codes": (dgi_kernels.unique_codes, unique_codes_call),
    "Trie.from_codes": (Trie.from_codes, trie_call),
    "beam_step": (dgi_kernels.beam_step, beam_step_call),
    "cosine_beam_step": (dgi_kernels.cosine_beam_step, cosine_beam_step_call),
    "beam_search": (dgi_kernels.beam_search, beam_search_call),
    "rank_candidates": (dgi_kernels.rank_candidates, rank_candidates_call),
    "log_normalizer": (dgi_kernels.log_normalizer, log_normalizer_call),
    "decoder_step": (dgi_kernels.decoder_step, decoder_step_call),
    "encoder_layers": (dgi_kernels.encoder_layers, encoder_layers_call),
    "dropout": (dgi_kernels.dropout, lambda: {"x": floats(size(), size()), "p": 0.3, "seed": 3}),
    "attention": (
        dgi_kernels.attention,
        lambda: {"queries": floats(size(), size(), 24), "heads": 2, "causal": True, "p": 0.3, "seed": 3},
    ),
    "Trie.find": (
        lambda trie, prefixes: trie.find(prefixes),
        lambda: {"trie": trie(3), "prefixes": torch.randint(-1, 6, (size(), 1))},
    ),
    "Trie.items": (
        lambda trie, nodes, depth: trie.items(nodes, depth),
        lambda: {"trie": trie(), "nodes": torch.tensor([-1, 0]), "depth": 0},
    ),
}


def tensors(result: Any) -> Iterator[Tensor]:
    """All tensors in a result, however nested."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Trie):
        yield from result.arrays.values()
    elif isinstance(result, (tuple, list)):
        for value in result:
            yield from tensors(value)


def wrong(value: Any) -> Any:
    """Something else in the place of ``value``: another type, dtype, shape, device, sign or magnitude."""
    anything: list[Any] = [
        None,
        "soft",
        "",
        object(),
        [],
        {},
        -1,
        0,
        2**70,
        -0.5,
        math.nan,
        math.inf,
        True,
        b"x",
        1j,
        torch.tensor(math.nan),
        torch.tensor([]),
        torch.zeros(3, 4, 5),
        np.zeros((2, 2)),
        torch.randn(2, 2).to_sparse(),
        torch.zeros(2, 2, dtype=torch.complex64),
        [[1], "a"],
        torch.ones(2, dtype=torch.bool),
        torch.zeros(2, 2, device="meta"),
        float,
        range(3),
    ]
    if isinstance(value, Tensor):
        anything += [
            value.unsqueeze(0),
            value.flatten(),
            value.to(torch.int32),
            value.to("meta"),
            value.bool(),
            value[..., :0] if value.ndim else None,
            value.double(),
            value + 1000,
            ~value if value.dtype == torch.bool else -value,
            value.tolist(),
            None if value.dtype == torch.bfloat16 else value.numpy(),
            value.to(torch.complex64),
        ]
    if isinstance(value, list):
        anything += [value[:0], value[0] if value else None, [*value, None], [*value, torch.zeros(1)]]
    if isinstance(value, (int, float)):
        anything += [-value, str(value), torch.tensor(float(value)), [value], value + 0.5]
    return random.choice(anything)


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A hang ends the run with a traceback of every thread in place of a silent stop."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("name", OPS)
def test_valid_calls_succeed_and_repeat_bit_for_bit(name: str) -> None:
    op, make = OPS[name]
    for _ in range(CASES // 2):
        call = make()
        first, second = list(tensors(op(**call))), list(tensors(op(**call)))
        assert first and len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one, other), f"{name} gave other bits the second time"
            assert not one.isnan().any(), f"{name} gave NaN"


@pytest.mark.parametrize("name", OPS)
def test_hostile_calls_succeed_or_raise_documented_errors(name: str) -> None:
    op, make = OPS[name]
    refused = 0
    for _ in range(CASES // 2):
        call = make()
        if name != "Trie.from_codes" and random.random() < 0.1:
            call["backend"] = random.choice(["triton", "cuda", "", None, "native"])
        argument = random.choice([key for key in call if key not in ("trie",) or not name.startswith("Trie.")])
        before, call[argument] = call[argument], wrong(call[argument])
        try:
            op(**call)
        except DOCUMENTED:
            refused += 1
        except Exception as error:
            pytest.fail(
                f"{name}({argument}={call[argument]!r} in place of {before!r}) raised {type(error).__name__}: {error}"
            )
    assert refused > CASES // 10
