"""Loads the compiled extension, or remembers why it could not be loaded.

The extension registers its ops under ``torch.ops.dgi_kernels``; the fake kernels here tell ``torch.compile`` the
shapes and dtypes of what they return.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, library

LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    """Load the extension and register its fake kernels; return the reason where that cannot be."""
    if not LIBRARY.exists():
        return ("the extension is not built (there was no C++ compiler when dgi-kernels was installed, or compiling "
                "failed); install one, e.g. `apt install g++`, then install dgi-kernels again: `pip install -v` shows "
                "the build's messages")
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        # torch says which library it was, and its cause why: a symbol that is missing, an old glibc.
        reason = f": {error.__cause__}" if error.__cause__ is not None else ""
        return f"{LIBRARY} was found but could not be loaded by torch {torch.__version__}: {error}{reason}"
    try:
        _register_fakes()
    except RuntimeError as error:
        return (f"{LIBRARY} is of another version of dgi-kernels than the Python files around it ({error}); install "
                "dgi-kernels again: `pip install .`, or `pip install -e .` in a source tree")
    return None


def _register_fakes() -> None:
    library.register_fake("dgi_kernels::gumbel_noise", _fake_gumbel_noise)
    library.register_fake("dgi_kernels::code_ranges", _fake_code_ranges)
    library.register_fake("dgi_kernels::find_children", _fake_find_children)
    library.register_fake("dgi_kernels::child_masks", _fake_child_masks)
    library.register_fake("dgi_kernels::item_set", _fake_item_set)
    library.register_fake("dgi_kernels::parent_set", _fake_parent_set)
    library.register_fake("dgi_kernels::run_starts", _fake_run_starts)
    library.register_fake("dgi_kernels::cosine_logits", _fake_cosine_logits)
    library.register_fake("dgi_kernels::cosine_logits_backward", _fake_cosine_logits_backward)
    library.register_fake("dgi_kernels::cosine_cross_entropy", _fake_cosine_cross_entropy)
    library.register_fake("dgi_kernels::gumbel_softmax", _fake_gumbel_softmax)
    library.register_fake("dgi_kernels::gumbel_softmax_backward", _fake_gumbel_softmax_backward)
    library.register_fake("dgi_kernels::residual_quantize", _fake_residual_quantize)
    library.register_fake("dgi_kernels::assign_codes", _fake_assign_codes)
    library.register_fake("dgi_kernels::residual_quantize_backward", _fake_residual_quantize_backward)
    library.register_fake("dgi_kernels::beam_step", _fake_beam_step)
    library.register_fake("dgi_kernels::cosine_beam_step", _fake_cosine_beam_step)
    library.register_fake("dgi_kernels::beam_codes", _fake_beam_codes)
    library.register_fake("dgi_kernels::rank_candidates", _fake_rank_candidates)


def _fake_gumbel_noise(seed: Tensor, level: int, stream: int, row_offset: int, rows: int, codes: int) -> Tensor:
    return seed.new_empty((rows, codes), dtype=torch.float32)


def _fake_code_ranges(codes: Tensor) -> Tensor:
    return codes.new_empty((2, codes.shape[1]), dtype=torch.int64)


def _fake_find_children(tokens: Tensor, child_start: Tensor, nodes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(nodes), torch.empty_like(nodes, dtype=torch.bool)


def _fake_child_masks(tokens: Tensor, child_start: Tensor, codes: int) -> Tensor:
    return tokens.new_empty((child_start.shape[0] - 1, (codes + 31) // 32), dtype=torch.int32)


def _fake_item_set(members: Tensor, item_order: Tensor | None) -> tuple[Tensor, Tensor]:
    return _fake_set(members, members.shape[0])


def _fake_parent_set(words: Tensor, ranks: Tensor, starts: Tensor, parents: int) -> tuple[Tensor, Tensor]:
    return _fake_set(words, parents)


def _fake_set(like: Tensor, places: int) -> tuple[Tensor, Tensor]:
    blocks = places // 512 + 1
    return like.new_empty(8 * blocks, dtype=torch.int64), like.new_empty(blocks, dtype=torch.int64)


def _fake_run_starts(starts: Tensor, runs: Tensor) -> Tensor:
    return torch.empty_like(runs)


def _fake_cosine_logits(h: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    return h.new_empty((h.shape[0], weight.shape[0]))


def _fake_cosine_gradients(h: Tensor, weight: Tensor, scale: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) if want else x.new_empty(0, dtype=torch.float32)
                 for x, want in zip((h, weight, scale), wanted, strict=True))


def _fake_cosine_logits_backward(dlogits: Tensor, h: Tensor, weight: Tensor, scale: Tensor, eps: float, wants_h: bool,
                                 wants_weight: bool, wants_scale: bool) -> tuple[Tensor, ...]:
    return _fake_cosine_gradients(h, weight, scale, wants_h, wants_weight, wants_scale)


def _fake_cosine_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, upstream: Tensor | None,
                               ignore_index: int, reduction: int, label_smoothing: float, eps: float, wants_h: bool,
                               wants_weight: bool, wants_scale: bool) -> tuple[Tensor, ...]:
    loss = scale.new_empty((h.shape[0],) if reduction == 0 else ())
    return loss, *_fake_cosine_gradients(h, weight, scale, wants_h, wants_weight, wants_scale)


def _fake_gumbel_softmax(logits: Tensor, tau: Tensor, seed: Tensor, hard: bool) -> Tensor:
    return torch.empty_like(logits)


def _fake_gumbel_softmax_backward(dout: Tensor, logits: Tensor, tau: Tensor, seed: Tensor,
                                  wants_tau: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), tau.new_empty(()) if wants_tau else tau.new_empty(0)


def _fake_residual_quantize(z: Tensor, codebooks: Tensor, sizes: list[int], scale: Tensor, tau: Tensor,
                            seed: Tensor | None, row_offset: int, mode: int, eps: float,
                            list_room: int) -> tuple[Tensor, ...]:
    rows, levels = z.shape[0], len(sizes)
    vectors, codes = z.new_empty((rows, levels, z.shape[1])), z.new_empty((rows, levels), dtype=torch.int64)
    return (vectors, codes, torch.empty_like(codes), z.new_empty(codebooks.shape[0]), torch.empty_like(vectors),
            z.new_empty((rows, levels)), codes.new_empty((rows, levels, 2)),
            z.new_empty((rows, levels, list_room), dtype=torch.int32), z.new_empty((rows, levels, list_room)))


def _fake_assign_codes(z: Tensor, codebooks: Tensor, sizes: list[int], eps: float) -> Tensor:
    return z.new_empty((z.shape[0], len(sizes)), dtype=torch.int64)


def _fake_residual_quantize_backward(
        dquantized: Tensor | None, dusage: Tensor | None, dresiduals: Tensor | None, dlog_normalizer: Tensor | None,
        residuals: Tensor, sampled: Tensor, log_normalizer: Tensor, list_range: Tensor, list_code: Tensor,
        list_p: Tensor, codebooks: Tensor, sizes: list[int], scale: Tensor, tau: Tensor, seed: Tensor | None,
        row_offset: int, mode: int, eps: float, *wanted: bool) -> tuple[Tensor, ...]:
    shapes = ((residuals.shape[0], residuals.shape[2]), codebooks.shape, (), ())
    return tuple(codebooks.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))


def _fake_beams(like: Tensor, num_beams: int) -> tuple[Tensor, ...]:
    integers = [like.new_empty((like.shape[0], num_beams), dtype=torch.int64) for _ in range(3)]
    return *integers, like.new_empty((like.shape[0], num_beams), dtype=torch.float32)


def _fake_beam_codes(tokens: list[Tensor], parents: list[Tensor]) -> Tensor:
    return tokens[-1].new_empty((*tokens[-1].shape, len(tokens)))


def _fake_beam_step(tokens: Tensor, child_start: Tensor, delta: list[Tensor], anchors: list[Tensor],
                    sets: list[Tensor], set_of: list[int], logits: Tensor, nodes: Tensor, scores: Tensor,
                    log_normalizer: Tensor | None, num_beams: int, normalize: int,
                    child_masks: Tensor | None = None, max_degree: int = -1) -> tuple[Tensor, ...]:
    return _fake_beams(logits, num_beams)


def _fake_cosine_beam_step(tokens: Tensor, child_start: Tensor, delta: list[Tensor], anchors: list[Tensor],
                           sets: list[Tensor], set_of: list[int], h: Tensor, codebook: Tensor, scale: Tensor,
                           eps: float, nodes: Tensor, scores: Tensor, log_normalizer: Tensor | None, num_beams: int,
                           normalize: int, max_degree: int = -1) -> tuple[Tensor, ...]:
    return _fake_beams(h, num_beams)


def _fake_rank_candidates(query: Tensor, item_vectors: Tensor, num_nodes: int, below: list[Tensor],
                          item_order: Tensor | None, item_ids: Tensor | None, delta_below: list[Tensor],
                          delta_order: Tensor | None, delta_ids: Tensor | None, delta_anchors: Tensor | None,
                          sets: list[Tensor], set_of: list[int], nodes: Tensor, scores: Tensor, k: int,
                          eps: float) -> tuple[Tensor, ...]:
    shape, compute = (query.shape[0], k), torch.float64 if query.dtype == torch.float64 else torch.float32
    return (query.new_empty(shape, dtype=torch.int64), query.new_empty(shape, dtype=torch.float32),
            query.new_empty(shape, dtype=compute))


load_error: str | None = _load()

# Whether CUDA kernels are in it; without a GPU too.
has_cuda = load_error is None and torch._C._dispatch_has_kernel_for_dispatch_key("dgi_kernels::gumbel_noise", "CUDA")
