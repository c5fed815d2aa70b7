"""A logits processor that keeps Hugging Face's ``generate`` on the semantic IDs of a trie.

It does the work of ``prefix_allowed_tokens_fn`` with a dict trie for all rows at once.  It has no state: the node of a
row is found by walking the codes that the row ends with, at most L binary searches, so that beams may be reordered.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor

from dgi.integrations.tokens import CodeTokens, EndTokens
from dgi_kernels import Trie, beam_step, checks
from dgi_kernels.trie import Beams
from dgi_kernels.trie.filters import Filters, check_filters

OFF_TRIE = ("eos", "keep")


class TrieLogitsProcessor(transformers.LogitsProcessor):
    """For ``generate(logits_processor=[...])`` with any strategy: beams, sampling or greedy.

    A token that continues no semantic ID gets score -inf; the others keep theirs. After a complete one only an end
    token is allowed. A row whose prefix leads nowhere (not in the trie, or to no allowed item) is treated as
    ``off_trie`` says; Hugging Face's own PrefixConstrainedLogitsProcessor raises there. Beam search makes such rows
    itself where it has more beams than there are prefixes; they end with scores of -1e9 or less.

    Args:
        trie: the semantic IDs, on the device of the model's scores.
        token_offsets: L integers; code c of level j is token ``token_offsets[j] + c``. With codes that are token ids
            themselves the offsets are 0.
        token_ids: in place of offsets, L integer tensors (K_j,); code c of level j is token ``token_ids[j][c]``. For
            tokenizers whose tokens of one level are not consecutive or not in order: some sort added tokens as
            strings, ``<a_10>`` before ``<a_2>``.
        start: where the semantic ID begins: the number of tokens before it, the same in all rows. For an
            encoder-decoder 1, the start token; for a decoder-only model the length of the (left-padded) prompts.
        start_token_id: instead of ``start``, a token behind whose last occurrence the semantic ID begins, in each row
            where it stands. Rows without it are left as they are.
        eos_token_id: the token that follows a complete semantic ID, or several, each of which may. With None nothing
            follows: generate L new tokens.
        filters: one TrieFilter for all requests, or one (or None) per request; rows are requests by beams.
        off_trie: ``"eos"`` allows the end tokens only; ``"keep"`` leaves the row's scores as they are. Default:
            ``"eos"`` with an ``eos_token_id``, else ``"keep"``, which then holds behind a complete semantic ID too.

    Raises:
        ValueError, TypeError: an argument that does not fit; when called also for ``input_ids`` and ``scores``.
    """

    def __init__(
        self,
        trie: Trie,
        token_offsets: Sequence[int] | None = None,
        *,
        token_ids: Sequence[Tensor] | None = None,
        start: int | None = None,
        start_token_id: int | None = None,
        eos_token_id: EndTokens = None,
        filters: Filters = None,
        off_trie: str | None = None,
    ) -> None:
        self.tokens = CodeTokens(trie, token_offsets, token_ids, eos_token_id)
        self.trie = trie
        if (start is None) == (start_token_id is None):
            raise ValueError("TrieLogitsProcessor needs exactly one of start and start_token_id")
        self.start = None if start is None else checks.integer("start", start, low=0)
        self.start_token_id = None if start_token_id is None else checks.integer("start_token_id", start_token_id)
        if self.start_token_id is not None:  # else a semantic ID would begin behind that code
            self.tokens.refuse_code("start_token_id", self.start_token_id)
        self.filters = filters
        self.per_request = isinstance(filters, Sequence)
        self.requests = len(filters) if isinstance(filters, Sequence) else 1
        check_filters(filters, trie, self.requests)
        default = "keep" if eos_token_id is None else "eos"
        self.off_trie = checks.choice("off_trie", default if off_trie is None else off_trie, OFF_TRIE)
        if self.off_trie == "eos" and eos_token_id is None:
            raise ValueError('off_trie="eos" needs an eos_token_id')

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``input_ids`` (R, T) and ``scores`` (R, V) -> the scores (R, V), -inf where a token is not allowed."""
        self._check(input_ids, scores)
        count, owners = scores.shape[0], None
        if self.per_request:
            owners = [row * self.requests // count for row in range(count)]
        if self.start_token_id is None:
            return self._constrain(input_ids[:, self.start :], scores, owners)
        constrained = scores.clone()
        lengths = _tokens_behind_last(input_ids, self.start_token_id)
        for length in lengths.unique().tolist():  # few: all rows have one prompt format and one step's tokens
            if length >= 0:
                rows = (lengths == length).nonzero()[:, 0]
                behind = input_ids[rows, input_ids.shape[1] - length :]
                own = None if owners is None else [owners[row] for row in rows.tolist()]
                constrained[rows] = self._constrain(behind, scores[rows], own)
        return constrained

    def _check(self, input_ids: Tensor, scores: Tensor) -> None:
        checks.float_tensor("scores", scores, ndim=2)
        if scores.device != self.trie.device:
            raise ValueError(
                f"trie must be on {scores.device}, as the model's scores; it is on {self.trie.device}: "
                f"give trie.to({str(scores.device)!r})"
            )
        checks.tensor("input_ids", input_ids, dtypes=checks.INDEX_DTYPES, ndim=2, like=scores)
        checks.shape("input_ids", input_ids, (scores.shape[0], None), "(rows, tokens)")
        self.tokens.check_vocabulary(scores.shape[1])
        if self.start is not None and input_ids.shape[1] < self.start:
            raise ValueError(
                f"start must be at most the number of tokens so far, {input_ids.shape[1]}; got {self.start}"
            )
        if scores.shape[0] % self.requests:
            raise ValueError(f"filters must have one entry per request; got {self.requests} for {scores.shape[0]} rows")

    def _constrain(self, generated: Tensor, scores: Tensor, owners: list[int] | None) -> Tensor:
        """The scores (r, V) of rows with ``generated`` (r, t) since the start, ``owners`` their requests."""
        depth = generated.shape[1]
        nodes = self.trie.find(self.tokens.decode(generated[:, : self.trie.depth]))
        constrained = torch.full_like(scores, -torch.inf)
        if depth < self.trie.depth:
            children, may_end = self._children(nodes, depth, owners)
            last = children.amax(dim=1, keepdim=True)
            leads_on = last >= 0
            # A place to spare repeats the last child, which writes the same value again.
            place = self.tokens.spell(torch.where(children >= 0, children, last.clamp(min=0)), depth)
            constrained.scatter_(1, place, scores.gather(1, place).masked_fill(~leads_on, -torch.inf))
        else:
            may_end = (nodes >= 0).unsqueeze(1)
            leads_on = torch.zeros_like(may_end)
        ends = may_end | ~leads_on if self.off_trie == "eos" else may_end
        for end in self.tokens.ends:
            constrained[:, end : end + 1] = scores[:, end : end + 1].masked_fill(~ends, -torch.inf)
        if self.off_trie == "keep":
            stuck = ~(leads_on | may_end) if self.tokens.ends else ~leads_on
            constrained = torch.where(stuck, scores, constrained)
        return constrained

    def _children(self, nodes: Tensor, depth: int, owners: list[int] | None) -> tuple[Tensor, Tensor]:
        """The allowed codes (r, C) behind each node, -1 in places to spare, and whether it may end there, (r, 1)."""
        rows, filters = len(nodes), self.filters
        if depth == 0:  # all rows of a request are at the root
            nodes = nodes.new_zeros(self.requests)
        elif owners is not None:
            filters = [self.filters[owner] for owner in owners]  # type: ignore[index]
        # The best children by scores of 0 are all of them, by token.
        zeros = torch.zeros(1, device=nodes.device).expand(len(nodes), 1, self.tokens.sizes[depth])
        beams = Beams(nodes.unsqueeze(1), nodes.unsqueeze(1), nodes.unsqueeze(1), zeros[:, :, 0], depth)
        found = beam_step(
            self.trie, zeros, beams, num_beams=max(1, self.trie.max_degree[depth]), normalize="none", filters=filters
        )
        children, may_end = found.tokens, ((found.nodes >= 0) & (found.tokens < 0)).any(dim=1, keepdim=True)
        if depth == 0:
            request = torch.zeros(rows, dtype=torch.int64) if owners is None else torch.tensor(owners)
            request = request.to(nodes.device)
            children, may_end = children[request], may_end[request]
        return children, may_end


def _tokens_behind_last(input_ids: Tensor, token: int) -> Tensor:
    """For each row the number of tokens behind its last ``token``, -1 where it has none; (R,)."""
    found = input_ids == token
    behind = found.flip(1).to(torch.uint8).argmax(dim=1)
    return torch.where(found.any(dim=1), behind, -1)
