"""Masks of allowed tokens as other people's code asks for them, made by :class:`TrieLogitsProcessor` for all rows."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgi.integrations.processor import TrieLogitsProcessor
from dgi_kernels import Trie, checks

FRESH_PAGES = 2**20  # bytes from which a mask is given memory of its own
FORBIDDEN = -1e6  # what MiniOneRec adds to a token that may not follow


class TrieItemMaskProvider:
    """``TrieItemMaskProvider`` of NVIDIA's ``sid-gr-inference``, for a trie of ours and any number of beams.

    Args:
        trie: the semantic IDs, on the device of the logits.
        vocab_size: the number of tokens V.
        eos_token_id: the token that ends a sequence, if any.
        allow_eos_for_terminal: whether it may follow a complete semantic ID.
        token_offsets, token_ids: how codes are spelt, as for :class:`TrieLogitsProcessor`; by default codes are tokens.
        item_ids: what :meth:`resolve_item_ids` gives for the trie's ids 0, 1, …; by default the trie's ids.
    """

    def __init__(
        self,
        trie: Trie,
        *,
        vocab_size: int,
        eos_token_id: int | None = None,
        allow_eos_for_terminal: bool = True,
        token_offsets: Sequence[int] | None = None,
        token_ids: Sequence[Tensor] | None = None,
        item_ids: Sequence[Any] | None = None,
    ) -> None:
        self.item_ids = item_ids
        self.vocab_size = checks.integer("vocab_size", vocab_size, low=1)
        self.eos_token_id, self.allow_eos_for_terminal = eos_token_id, allow_eos_for_terminal
        if token_offsets is None and token_ids is None:
            token_offsets = [0] * trie.depth
        # Sequences end with a token beyond the vocabulary, which is that of no code.
        self._processor = TrieLogitsProcessor(
            trie, token_offsets, token_ids=token_ids, start=0, eos_token_id=self.vocab_size
        )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        return () if self.eos_token_id is None else (self.eos_token_id,)

    def initial_mask(self, logits: Any) -> Tensor:
        """Which tokens (V,) a semantic ID may begin with."""
        return self._mask(torch.empty(1, 0, dtype=torch.int64, device=self._processor.trie.device))[0]

    def step_mask(self, generation: Any, logits: Tensor) -> Tensor:
        """Which tokens (W, V) may follow each beam, whose tokens ``generation.beam_path.token_trace(beam)`` gives."""
        if generation.beam_path.steps_done == 0:
            raise ValueError("beam_path must be initialized before step masks")
        if logits.ndim != 3 or logits.shape[0] != 1:
            raise ValueError(f"logits must be (1, W, V); got shape {tuple(logits.shape)}")
        traces = [list(generation.beam_path.token_trace(beam)) for beam in range(logits.shape[1])]
        return self._mask(torch.tensor(traces, dtype=torch.int64, device=self._processor.trie.device))

    def allowed_next(self, prefix: Iterable[int] = ()) -> set[int]:
        """The tokens that may follow one prefix."""
        tokens = torch.tensor([[*prefix]], dtype=torch.int64, device=self._processor.trie.device)
        return set(self._mask(tokens)[0].nonzero()[:, 0].tolist())

    def is_complete(self, token_ids: Iterable[int]) -> bool:
        """Whether tokens are a whole semantic ID."""
        tokens = torch.tensor([[*token_ids]], dtype=torch.int64, device=self._processor.trie.device)
        return bool(self._children(tokens)[1][0, 0])

    def resolve_item_ids(self, token_ids: Iterable[int]) -> tuple[Any, ...]:
        """The items whose semantic ID the tokens are, up to an end token; none where they are no whole one."""
        trie, tokens = self._processor.trie, list(self._semantic(token_ids))
        if not 0 < len(tokens) <= trie.depth:
            return ()
        codes = self._processor.tokens.decode(torch.tensor([tokens], dtype=torch.int64, device=trie.device))
        leaf = trie.find(torch.nn.functional.pad(codes, (0, trie.depth - len(tokens)), value=-1))
        found = trie.items(leaf, trie.depth).item_ids.tolist() if int(leaf) >= 0 else []
        return tuple(found if self.item_ids is None else [self.item_ids[item] for item in found])

    def beam_item_results(self, beam_path: Any, *, beam_width: int) -> tuple[dict[str, Any], ...]:
        """What became of each beam: its tokens, whether they are a whole semantic ID, and its items."""
        results = []
        for beam in range(beam_width):
            tokens = tuple(beam_path.token_trace(beam))
            items = self.resolve_item_ids(tokens)
            results.append(
                {
                    "rank": beam,
                    "token_ids": tokens,
                    "semantic_token_ids": self._semantic(tokens),
                    "is_complete": bool(items),
                    "item_ids": items,
                    "item_id": items[0] if len(items) == 1 else None,
                }
            )
        return tuple(results)

    def _semantic(self, token_ids: Iterable[int]) -> tuple[int, ...]:
        """The tokens before the end token."""
        tokens = tuple(map(int, token_ids))
        return tokens[: tokens.index(self.eos_token_id)] if self.eos_token_id in tokens else tokens

    def _mask(self, tokens: Tensor) -> Tensor:
        """(W, V) of prefixes (W, t)."""
        codes, may_end = self._children(tokens)
        mask = _nothing_allowed(len(tokens), self.vocab_size, tokens.device)
        if codes.shape[1]:
            last = codes.amax(dim=1, keepdim=True)  # repeated in places to spare; of a row without any False is written
            places = self._processor.tokens.spell(torch.where(codes >= 0, codes, last.clamp(min=0)), tokens.shape[1])
            mask.scatter_(1, places, (last >= 0).expand_as(places))
        if self.eos_token_id is not None:
            if not self.allow_eos_for_terminal:
                may_end = (tokens == self.eos_token_id).any(dim=1, keepdim=True)
            mask[:, self.eos_token_id : self.eos_token_id + 1] = may_end
        return mask

    def _children(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The codes (W, C) that may follow each prefix (W, t), -1 in places to spare; whether it may end, (W, 1)."""
        if self.eos_token_id is not None:
            tokens = tokens.masked_fill(tokens == self.eos_token_id, self.vocab_size)
        trie, spelling, depth = self._processor.trie, self._processor.tokens, tokens.shape[1]
        nodes = trie.find(spelling.decode(tokens[:, : trie.depth]))
        if depth < trie.depth:
            return self._processor._children(nodes, depth, None)
        return nodes.new_empty(len(nodes), 0), (nodes >= 0).unsqueeze(1)


def _nothing_allowed(rows: int, tokens: int, device: torch.device) -> Tensor:
    """(rows, tokens) False. On Linux's CPU of fresh pages, which the system clears when something touches them: the
    tokens of codes are on few of them. ``torch.zeros`` writes all, which was four fifths of a mask's time."""
    if device.type == "cpu" and rows * tokens >= FRESH_PAGES and hasattr(mmap, "MAP_ANONYMOUS"):
        fresh = mmap.mmap(-1, rows * tokens, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(fresh, dtype=torch.bool).view(rows, tokens)
    return torch.zeros(rows, tokens, dtype=torch.bool, device=device)


class ConstrainedLogitsProcessor(TrieLogitsProcessor):
    """MiniOneRec's ``ConstrainedLogitsProcessor``: log-probabilities, less 1e6 for a token that may not follow.

    One per call of ``generate``, as theirs: the semantic ID begins behind the prompt that it is called with first.

    Args:
        trie: the semantic IDs, in place of ``prefix_allowed_tokens_fn``.
        num_beams, base_model: taken as theirs takes them, and not needed.
        token_offsets, token_ids, eos_token_id: as for :class:`TrieLogitsProcessor`.
    """

    def __init__(
        self,
        trie: Trie,
        num_beams: int | None = None,
        base_model: str | None = None,
        *,
        token_offsets: Sequence[int] | None = None,
        token_ids: Sequence[Tensor] | None = None,
        eos_token_id: int,
    ) -> None:
        super().__init__(trie, token_offsets, token_ids=token_ids, start=0, eos_token_id=eos_token_id)
        self.is_new = True

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` (R, T) and ``scores`` (R, V) -> (R, V)."""
        if self.is_new:
            self.start, self.is_new = input_ids.shape[1], False
        logp = scores.log_softmax(dim=-1)
        return torch.where(super().__call__(input_ids, logp) == -torch.inf, logp + FORBIDDEN, logp)


def prefix_allowed_tokens_fn(
    trie: Trie,
    separator: Sequence[int],
    *,
    token_offsets: Sequence[int] | None = None,
    token_ids: Sequence[Tensor] | None = None,
    eos_token_id: int,
) -> Callable[[int, Tensor], list[int]]:
    """What LC-Rec's data sets give ``generate``: the tokens that may follow a sentence.

    Theirs allows all tokens of a level; this one, those that the trie allows. It is asked beam by beam, as transformers
    does; :class:`TrieLogitsProcessor` answers for all beams at once.

    Args:
        trie: the semantic IDs.
        separator: the tokens behind whose last occurrence a semantic ID begins ("Response:" in LC-Rec).
        token_offsets, token_ids, eos_token_id: as for :class:`TrieLogitsProcessor`.

    Returns:
        ``(batch_id, sentence) -> tokens``; where the separator is missing or nothing follows, the end token.
    """
    mark = list(separator)
    if not mark:
        raise ValueError("separator must hold at least one token; got none")
    processor = TrieLogitsProcessor(trie, token_offsets, token_ids=token_ids, start=0, eos_token_id=eos_token_id)
    tokens = [processor.tokens.spell(torch.arange(size), j) for j, size in enumerate(processor.tokens.sizes)]
    vocabulary = max(eos_token_id, *(int(level.max()) for level in tokens if len(level))) + 1

    def allowed(batch_id: int, sentence: Tensor) -> list[int]:
        words = sentence.tolist()
        begins = [i + len(mark) for i in range(len(words)) if words[i : i + len(mark)] == mark]
        if not begins:
            return [eos_token_id]
        behind = torch.tensor([words[begins[-1] :]], dtype=torch.int64, device=trie.device)
        scores = processor(behind, torch.zeros(1, vocabulary, device=trie.device))
        return (scores[0] == 0).nonzero()[:, 0].tolist()

    return allowed
