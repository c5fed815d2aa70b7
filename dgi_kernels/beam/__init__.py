"""Exact beam search over the sequences of a trie; every result is a semantic ID of the catalog.

    score(c_1 … c_t | q) = Σ_j log P(c_j | q, c_{<j})

Paper eq. 13; ``docs/method.md``, "Search, coarse to fine".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import choose, choose_without_gradient, tracing
from dgi_kernels.beam import native, reference
from dgi_kernels.cosine import cosine_logits
from dgi_kernels.enums import NORMALIZERS
from dgi_kernels.trie import MAX_COUNT, Beams, Trie
from dgi_kernels.trie.filters import Filters, TrieFilter, check_filters
from dgi_kernels.trie.node_scores import Bonus, NodeScores, check_node_scores
from dgi_kernels.types import Backend, Normalize

__all__ = ["BeamResult", "Beams", "HiddenStates", "beam_search", "beam_step", "cosine_beam_step"]


class HiddenStates(NamedTuple):
    """What a step of :func:`beam_search` may return instead of logits: the arguments of :func:`cosine_beam_step`.

    Attributes:
        h: (B, M, D) hidden states.
        codebook: (K, D).
        scale: the logit scale (gamma).
        eps: lower bound of the norms.
    """

    h: Tensor
    codebook: Tensor
    scale: float | Tensor
    eps: float = 1e-12

    def logits(self) -> Tensor:
        """The logits (B, M, K) of these hidden states, see :func:`dgi_kernels.cosine_logits`."""
        return cosine_logits(self.h, self.codebook, self.scale, eps=self.eps)


Step = Callable[[int, Tensor | None, Tensor | None], Tensor | HiddenStates]


class BeamResult(NamedTuple):
    """The result of a search: M beams for each of B requests, best first; dead beams have codes -1 and score -inf.

    Attributes:
        codes: (B, M, L) int64 semantic IDs; -1 after the end of one that is shorter than L.
        scores: (B, M) float32 log-probabilities, descending.
        nodes: (B, M) int64 leaves of the trie; ``trie.items(nodes, trie.depth)`` lists their items.
    """

    codes: Tensor
    scores: Tensor
    nodes: Tensor


def beam_step(
    trie: Trie,
    logits: Tensor,
    beams: Beams,
    *,
    num_beams: int,
    normalize: Normalize = "full",
    log_normalizer: Tensor | None = None,
    filters: Filters = None,
    node_scores: NodeScores | None = None,
    strength: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> Beams:
    """Extend every live beam by every code that the trie allows, and keep the ``num_beams`` best.

    The result is the exact top of ``scores[parent] + logp[token]`` over all allowed children of all live beams, sorted
    by score, ties to the lower parent, then the lower token. A child of log-probability -inf is not allowed. The end of
    a sequence that is shorter than others (token -1) has log-probability 0, whatever the logits.

    Args:
        trie: the trie, on the device of ``logits``.
        logits: (B, M, K) for the codes of level ``beams.depth``, any float dtype, any strides; K is the size of the
            level's codebook (or more, where the trie inferred its sizes). NaN counts as -inf, in the normaliser too,
            and +inf as the largest finite number.
        beams: (B, M), from :meth:`Trie.root` or the step before. A beam with node -1 or score -inf or NaN is dead.
        num_beams: how many to keep, any number from 1.
        normalize: ``"full"``: log-softmax over all K codes; ``"children"``: over a beam's allowed children only, not
            counting the end of a sequence; ``"none"``: the logits are log-probabilities already.
        log_normalizer: (B, M) log-sum-exp to use instead of the computed one; not with ``"none"``. No child survives
            a value that is not finite.
        filters: one :class:`TrieFilter` for all requests, or a list with one (or None) per request. A child is allowed
            only while it leads to an allowed item.
        node_scores: from :meth:`Trie.node_scores`, by the weights of items: each child's, times ``strength``, is added
            to its score after any normalisation, that of the end of a sequence too.
        strength: what node scores are multiplied with, a finite float or one per request, (B,).
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``. Only the reference passes gradients on
            to the scores; ``"auto"`` takes it where an input requires one.

    Returns:
        Beams (B, num_beams) of depth ``beams.depth + 1``. Where fewer exist, the rest are dead: score -inf, and node,
        token and parent -1.

    Raises:
        ValueError: a shape, device or filter does not fit, a node is out of range (on CUDA checked inside
            ``dgi_kernels.debug()`` only; it is dead otherwise), or the beams are at the trie's last depth already.
        TypeError: an argument has the wrong type or dtype.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> trie = dgi_kernels.Trie.from_codes([[0, 1], [0, 2], [3, 1]])
        >>> logits = torch.tensor([[[1.0, 9.0, 9.0, 2.0]]])  # no semantic ID starts with code 1 or 2
        >>> beams = dgi_kernels.beam_step(trie, logits, trie.root(1), num_beams=3, normalize="children")
        >>> beams.tokens
        tensor([[ 3,  0, -1]])
    """
    _check_beams(trie, beams)
    _check_logits("logits", logits, trie, beams)
    _check_options(beams, num_beams, normalize, log_normalizer)
    filters = check_filters(filters, trie, beams.nodes.shape[0])
    bonus = check_node_scores(node_scores, strength, trie, beams.nodes.shape[0])
    chosen = choose_without_gradient("beam_step", backend, logits, beams.scores, log_normalizer, strength)

    def step(beams: Beams) -> Beams:
        return _beam_step(trie, logits, beams, num_beams, normalize, log_normalizer, filters, bonus, chosen)

    return _native_step(trie, beams, step) if chosen == "native" else step(_check_nodes(trie, beams))


def _beam_step(
    trie: Trie,
    logits: Tensor,
    beams: Beams,
    num_beams: int,
    normalize: str,
    log_normalizer: Tensor | None,
    filters: TrieFilter | list[TrieFilter | None] | None,
    bonus: Bonus | None,
    chosen: str,
) -> Beams:
    """:func:`beam_step` on arguments that are checked, by the implementation that is chosen."""
    if log_normalizer is not None:
        log_normalizer = log_normalizer.to(checks.compute_dtype(logits.dtype))
    if chosen == "native":
        return native.beam_step(trie, logits, beams, num_beams, normalize, log_normalizer, filters, bonus)
    logits = logits.to(checks.compute_dtype(logits.dtype))
    with torch.autocast(logits.device.type, enabled=False):
        return reference.beam_step(trie, logits, beams, num_beams, normalize, log_normalizer, filters, bonus)


def cosine_beam_step(
    trie: Trie,
    h: Tensor,
    codebook: Tensor,
    scale: float | Tensor,
    beams: Beams,
    *,
    num_beams: int,
    normalize: Normalize = "full",
    log_normalizer: Tensor | None = None,
    filters: Filters = None,
    node_scores: NodeScores | None = None,
    strength: float | Tensor = 1.0,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Beams:
    """Do a :func:`beam_step` on the scaled cosine logits of a head, ``beam_step(cosine_logits(h, codebook, scale))``.

    The logits stay in float32 (float64 for float64 inputs) whatever the dtype of the inputs.

    Args:
        h: (B, M, D) hidden states; float32, bfloat16, float16 or float64.
        codebook: (K, D), the dtype of ``h`` (under autocast they may differ), K as for the logits of ``beam_step``.
        scale: the logit scale (gamma), a finite float or a 0-d tensor.
        eps: lower bound of the norms; a zero vector has cosine 0 with everything.
        trie, beams, num_beams, normalize, log_normalizer, filters, node_scores, strength, backend: as in
            :func:`beam_step`.

    Returns:
        Beams (B, num_beams) of depth ``beams.depth + 1``.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`beam_step`.

    Examples:
        >>> trie = dgi_kernels.Trie.from_codes([[0, 1], [0, 2], [3, 1]])
        >>> h, codebook = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [4.0, 3.0]])
        >>> dgi_kernels.cosine_beam_step(trie, h, codebook, 30.0, trie.root(1), num_beams=2).tokens
        tensor([[3, 0]])
    """
    _check_beams(trie, beams)
    checks.float_tensor("h", h, ndim=3, like=trie.parts.base.tokens[0])
    checks.shape("h", h, (*beams.nodes.shape, None), "(B, M, D)")
    checks.float_tensor("codebook", codebook, ndim=2, like=h)
    checks.shape("codebook", codebook, (None, h.shape[2]), "(K, D)")
    _check_codes_dimension("codebook", codebook.shape[0], trie, beams.depth)
    checks.same_dtype("codebook", codebook, "h", h)
    scale = checks.scalar("scale", scale, h)
    eps = checks.number("eps", eps, positive=True)
    _check_options(beams, num_beams, normalize, log_normalizer)
    filters = check_filters(filters, trie, beams.nodes.shape[0])
    bonus = check_node_scores(node_scores, strength, trie, beams.nodes.shape[0])
    h, codebook = checks.autocast_operand(h), checks.autocast_operand(codebook)
    common = torch.promote_types(h.dtype, codebook.dtype)
    compute = checks.compute_dtype(common)
    if log_normalizer is not None:
        log_normalizer = log_normalizer.to(compute)
    chosen = choose_without_gradient(
        "cosine_beam_step", backend, h, codebook, scale, beams.scores, log_normalizer, strength
    )
    if chosen == "native":
        return _native_step(
            trie,
            beams,
            lambda beams: native.cosine_beam_step(
                trie,
                h.to(common),
                codebook.to(common),
                scale,
                eps,
                beams,
                num_beams,
                normalize,
                log_normalizer,
                filters,
                bonus,
            ),
        )
    beams = _check_nodes(trie, beams)
    with torch.autocast(h.device.type, enabled=False):
        logits = cosine_logits(
            h.to(compute), codebook.to(compute), checks.to_dtype(scale, compute), eps=eps, backend="reference"
        )
        return reference.beam_step(trie, logits, beams, num_beams, normalize, log_normalizer, filters, bonus)


def beam_search(
    trie: Trie,
    step: Step,
    *,
    batch_size: int,
    num_beams: int | Sequence[int],
    normalize: Normalize = "full",
    filters: Filters = None,
    node_scores: NodeScores | None = None,
    strength: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> BeamResult:
    """Search the whole depth of a trie for the best semantic IDs of each request.

    Args:
        trie: the trie, on the device of the logits.
        step: the model's side, ``step(depth, tokens, parents) -> logits``. At depth 0 tokens and parents are None and
            the logits (B, 1, K_0). Later tokens and parents are (B, M) int64, M the width of the level before, -1 where
            dead: the code that each beam has just got, and the beam of the step before that it continues (reorder a
            key-value cache by it); the logits are (B, M, K_depth). In a live beam token -1 says that its sequence has
            ended. A cosine head may return :class:`HiddenStates`, so that its logits are never formed. Once all
            sequences of all requests have ended or are dead it is not called again, but on CUDA, where to see that
            would take a host sync.
        batch_size: the number of requests B.
        num_beams: beams per request M, any number from 1; or L such numbers, how many survive each level, such as
            ``[10, 50, 80]``. The last is the M of the result.
        normalize, filters, node_scores, strength, backend: as in :func:`beam_step`.

    Returns:
        BeamResult: codes (B, M, L), scores (B, M), nodes (B, M), best first. A dead row, where the catalog has fewer
        (allowed) semantic IDs than beams, has codes and node -1 and score -inf.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`beam_step`, also for what ``step`` returns.

    Examples:
        >>> trie = dgi_kernels.Trie.from_codes([[0, 1], [0, 2], [3, 1]])
        >>> def step(depth, tokens, parents):
        ...     return torch.zeros(1, 1 if depth == 0 else 3, 4)
        >>> result = dgi_kernels.beam_search(trie, step, batch_size=1, num_beams=3)
        >>> result.codes
        tensor([[[0, 1],
                 [0, 2],
                 [3, 1]]])
    """
    _check_trie(trie)
    if not callable(step):
        raise TypeError(f"step must be callable as step(depth, tokens, parents); got {type(step).__name__}")
    beams = trie.root(batch_size)
    widths = beam_widths(num_beams, trie.depth)
    checks.choice("normalize", normalize, NORMALIZERS)
    filters = check_filters(filters, trie, batch_size)
    bonus = check_node_scores(node_scores, strength, trie, batch_size)
    history: list[Beams] = []
    chosen = "reference"  # or what runs, for logits of `dtype`: asked for once, where no gradient is in play
    dtype: torch.dtype | None = None
    for depth in range(trie.depth):
        if depth > 0 and _all_ended(beams, chosen):  # their ends cost nothing, whatever the logits
            logits: Tensor | HiddenStates = _no_logits(trie, beams)
        else:
            logits = step(depth, None, None) if depth == 0 else step(depth, beams.tokens, beams.parents)
        if isinstance(logits, HiddenStates):
            beams = cosine_beam_step(
                trie,
                logits.h,
                logits.codebook,
                logits.scale,
                beams,
                num_beams=widths[depth],
                normalize=normalize,
                filters=filters,
                node_scores=node_scores,
                strength=strength,
                eps=logits.eps,
                backend=backend,
            )
        else:
            _check_logits(f"logits of step(depth={depth})", logits, trie, beams)
            if logits.dtype is not dtype or logits.requires_grad:
                chosen = choose_without_gradient("beam_step", backend, logits, beams.scores, strength)
                dtype = logits.dtype
            beams = _beam_step(trie, logits, beams, widths[depth], normalize, None, filters, bonus, chosen)
        history.append(beams)
    return BeamResult(_codes(history, backend), beams.scores, beams.nodes)


def beam_widths(num_beams: object, depth: int) -> list[int]:
    """How many beams survive each of ``depth`` levels: ``num_beams`` is one number for all of them, or one for each.

    Raises:
        ValueError, TypeError: it is neither.
    """
    if isinstance(num_beams, str) or not isinstance(num_beams, Sequence):
        return [checks.integer("num_beams", num_beams, low=1, high=MAX_COUNT)] * depth
    if len(num_beams) != depth:
        raise ValueError(f"num_beams must be an integer, or have one per level of the trie, {depth}; got {num_beams}")
    return [checks.integer(f"num_beams[{t}]", width, low=1, high=MAX_COUNT) for t, width in enumerate(num_beams)]


def _all_ended(beams: Beams, chosen: str) -> bool:
    """Whether no beam of a step has got a code; False where it is not known without waiting for the device."""
    tokens = beams.tokens
    if tokens.device.type != "cpu" or tracing():
        return False
    if chosen == "native":
        return native.all_ended(tokens)
    return tokens.numel() == 0 or int(tokens.max()) < 0


def _no_logits(trie: Trie, beams: Beams) -> Tensor:
    """(B, M, K) zeros that take no memory."""
    return beams.scores.new_zeros(()).expand(*beams.nodes.shape, trie.codebook_sizes[beams.depth])


def _codes(history: list[Beams], backend: str) -> Tensor:
    """The codes (B, M, L) of the last beams, following each one's parents back through all steps; -1 where dead."""
    device = history[-1].tokens.device
    if device.type == "cpu" and choose("beam_codes", backend, device) == "native":
        return native.beam_codes(history)
    return reference.beam_codes(history)


def _native_step(trie: Trie, beams: Beams, step: Callable[[Beams], Beams]) -> Beams:
    """Run a compiled step. On the CPU it refuses nodes out of range itself: here they are only named."""
    if tracing() or beams.nodes.device.type != "cpu":
        return step(_check_nodes(trie, beams))
    try:
        return step(beams)
    except RuntimeError:
        _check_nodes(trie, beams)
        raise


def _check_trie(trie: object) -> None:
    if not isinstance(trie, Trie):
        raise TypeError(f"trie must be a Trie; got {type(trie).__name__}")


def _check_beams(trie: Trie, beams: Beams) -> None:
    """Check the trie and the beams against each other; only nodes, scores and depth are read."""
    _check_trie(trie)
    if not isinstance(beams, Beams):
        raise TypeError(f"beams must be Beams, from trie.root() or the step before; got {type(beams).__name__}")
    depth = checks.integer("beams.depth", beams.depth, low=0)
    if depth >= trie.depth:
        raise ValueError(f"beams.depth must be less than the trie's depth {trie.depth}: there is no level {depth}")
    checks.tensor("beams.nodes", beams.nodes, dtypes=(torch.int64, torch.int32), ndim=2, like=trie.parts.base.tokens[0])
    checks.float_tensor("beams.scores", beams.scores, like=trie.parts.base.tokens[0])
    checks.shape("beams.scores", beams.scores, tuple(beams.nodes.shape), "(B, M)")


def _check_nodes(trie: Trie, beams: Beams) -> Beams:
    return beams._replace(nodes=checks.index("beams.nodes", beams.nodes, 0, trie.num_nodes_at(beams.depth), also=-1))


def _check_logits(name: str, logits: Tensor, trie: Trie, beams: Beams) -> None:
    checks.float_tensor(name, logits, ndim=3, like=trie.parts.base.tokens[0])
    _check_codes_dimension(name, logits.shape[2], trie, beams.depth)
    checks.shape(name, logits, (*beams.nodes.shape, logits.shape[2]), "(B, M, K)")


def _check_codes_dimension(name: str, codes: int, trie: Trie, depth: int) -> None:
    size = trie.codebook_sizes[depth]
    if codes != size and not (trie.sizes_inferred and codes > size):
        at_least = "at least " if trie.sizes_inferred else ""
        raise ValueError(f"{name} must be over {at_least}{size} codes, the codebook of level {depth}; got {codes}")


def _check_options(beams: Beams, num_beams: int, normalize: str, log_normalizer: Tensor | None) -> None:
    checks.integer("num_beams", num_beams, low=1, high=MAX_COUNT)
    checks.choice("normalize", normalize, NORMALIZERS)
    if log_normalizer is None:
        return
    if normalize == "none":
        raise ValueError('log_normalizer must be None with normalize="none", which subtracts no normaliser')
    checks.float_tensor("log_normalizer", log_normalizer, like=beams.nodes)
    checks.shape("log_normalizer", log_normalizer, tuple(beams.nodes.shape), "(B, M)")
