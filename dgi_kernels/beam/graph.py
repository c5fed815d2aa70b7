"""A whole beam search as one CUDA graph: for a small search, host work between steps costs more than the steps.

Possible because no step waits for the host, and its launches have shapes that follow from those of the tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels import checks, cuda_graphs
from dgi_kernels.beam import BeamResult, Step, beam_search
from dgi_kernels.trie import NodeScores, Trie
from dgi_kernels.trie.filters import Filters
from dgi_kernels.types import Backend, Normalize

__all__ = ["CapturedSearch", "capture_search"]


class CapturedSearch:
    """A search that :func:`capture_search` has captured; call it with new inputs to run it again.

    Attributes:
        inputs: the tensors that the graph reads.
        result: the BeamResult that it writes.
    """

    def __init__(
        self, graph: torch.cuda.CUDAGraph, inputs: tuple[Tensor, ...], result: BeamResult, kept_alive: object
    ) -> None:
        self._graph = graph
        self._kept_alive = kept_alive  # the graph reads their memory
        self.inputs = inputs
        self.result = result

    def __call__(self, *inputs: Tensor) -> BeamResult:
        """Search for new inputs.

        Args:
            inputs: as many as were captured, of the same shapes; they are copied into :attr:`inputs`. Without any, the
                graph runs on their present values.

        Returns:
            BeamResult, in memory that the next call overwrites: copy what you keep.

        Raises:
            ValueError: the number or the shapes differ from those captured.
        """
        if inputs and len(inputs) != len(self.inputs):
            raise ValueError(f"inputs must be the {len(self.inputs)} tensors of the captured search; got {len(inputs)}")
        for i, given in enumerate(inputs):
            checks.shape(f"inputs[{i}]", given, tuple(self.inputs[i].shape), "the shape captured")
        for target, given in zip(self.inputs, inputs, strict=False):
            if given is not target:
                target.copy_(given)
        self._graph.replay()
        return self.result


def capture_search(
    trie: Trie,
    step: Step,
    inputs: Sequence[Tensor],
    *,
    batch_size: int,
    num_beams: int | Sequence[int],
    normalize: Normalize = "full",
    filters: Filters = None,
    node_scores: NodeScores | None = None,
    strength: float | Tensor = 1.0,
    backend: Backend = "auto",
) -> CapturedSearch:
    """Capture a :func:`beam_search`, the model's steps included, in one CUDA graph.

    Args:
        trie: the trie, on a CUDA device.
        step: the model's side, as in :func:`beam_search`; it reads ``inputs``, and does nothing that a CUDA graph
            cannot take (no host sync, no new shapes).
        inputs: the tensors that differ from call to call, e.g. the hidden states of a batch of queries. They are kept,
            and written to by calls.
        batch_size, num_beams, normalize, filters, node_scores, strength, backend: as in :func:`beam_search`; fixed from
            here on, the filters with what they allow (a tensor ``strength`` is read again by each call).

    Returns:
        CapturedSearch, to be called with new inputs.

    Raises:
        ValueError: the trie is not on a CUDA device; and as :func:`beam_search`.
        TypeError, BackendUnavailable: as :func:`beam_search`.

    Examples:
        >>> states = torch.randn(8, 64, device="cuda")  # doctest: +SKIP
        >>> search = dgi_kernels.capture_search(trie, step, [states], batch_size=8, num_beams=20)  # doctest: +SKIP
        >>> result = search(torch.randn(8, 64, device="cuda"))  # doctest: +SKIP
    """
    if not isinstance(trie, Trie):
        raise TypeError(f"trie must be a Trie; got {type(trie).__name__}")
    if not cuda_graphs.possible(trie.device):
        raise ValueError(f"trie must be on a CUDA device, which a CUDA graph needs; it is on {trie.device}")
    kept = tuple(inputs)
    for i, tensor in enumerate(kept):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"inputs[{i}] must be a tensor; got {type(tensor).__name__}")

    def search() -> BeamResult:
        with torch.no_grad():
            return beam_search(
                trie,
                step,
                batch_size=batch_size,
                num_beams=num_beams,
                normalize=normalize,
                filters=filters,
                node_scores=node_scores,
                strength=strength,
                backend=backend,
            )

    for _ in range(cuda_graphs.WARMUPS):
        cuda_graphs.aside(search, trie.device)
    graph, result = cuda_graphs.capture(search, trie.device)
    return CapturedSearch(graph, kept, result, (trie, step, filters, node_scores, strength))
