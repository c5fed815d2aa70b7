"""How the codes of a trie are spelt in a language model's vocabulary, and which tokens end a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels import Trie, checks
from dgi_kernels.trie.arrays import END

_NO_CODE = torch.iinfo(torch.int32).max  # larger than any code of any trie

EndTokens = int | Sequence[int] | None


class CodeTokens:
    """The tokens of a trie's codes, and those that end a sequence.

    Args:
        trie: the trie.
        token_offsets: L integers; code c of level j is token ``token_offsets[j] + c``.
        token_ids: in place of offsets L integer tensors (K_j,); code c of level j is token ``token_ids[j][c]``.
        eos_token_id: the token, or several, that may follow a complete semantic ID; None where nothing does.

    Attributes:
        ends: the end tokens, in the order given; empty where nothing follows.
        sizes: per level, the number of codes K.
        device: that of the trie.

    Raises:
        ValueError, TypeError: tokens that do not fit the trie, or an end token that is the token of a code.
    """

    def __init__(
        self,
        trie: Trie,
        token_offsets: Sequence[int] | None,
        token_ids: Sequence[Tensor] | None,
        eos_token_id: EndTokens,
    ) -> None:
        if not isinstance(trie, Trie):
            raise TypeError(f"trie must be a Trie; got {type(trie).__name__}")
        if (token_offsets is None) == (token_ids is None):
            raise ValueError("exactly one of token_offsets and token_ids must be given")
        self.trie, self.sizes, self.device = trie, trie.codebook_sizes, trie.device
        self.ends = _end_tokens(eos_token_id)
        # Per level: the tokens of its codes, and the first of them where they are consecutive.
        self._tables: list[Tensor] = []
        self._offsets: list[int | None]
        self._by_table = token_ids is not None
        if token_offsets is not None:
            self._offsets = [*_checked_offsets(token_offsets, trie)]
        elif token_ids is not None:
            self._tables = _checked_tables(token_ids, trie)
            self._offsets = [_first_of_run(table) for table in self._tables]
        self._sorted = [table.sort() for table in self._tables]
        self._offset_row = torch.tensor([offset or 0 for offset in self._offsets], device=trie.device)
        self._ends = torch.tensor(self.ends, dtype=torch.int64, device=trie.device)
        for end in self.ends:
            self.refuse_code("eos_token_id", end)

    def refuse_code(self, name: str, token: int) -> None:
        """Raise ValueError where ``token`` is the token of a code.

        With offsets a token may lie among the numbers of a level, as 1 does where codes are token ids, and yet be the
        token of no code that the trie holds.
        """
        for j, size in enumerate(self.sizes):
            if self._by_table:
                codes = (self._tables[j] == token).nonzero()[:1, 0].tolist()
            else:
                code = token - (self._offsets[j] or 0)
                codes = [code] if 0 <= code < size and _occurs(self.trie, code, j) else []
            if codes:
                raise ValueError(f"{name} must not be the token of a code; {token} is code {codes[0]} of level {j}")

    def check_vocabulary(self, size: int) -> None:
        """Check that all tokens are in a vocabulary of ``size``."""
        for j, codes in enumerate(self.sizes):
            offset = self._offsets[j]
            if not self._by_table and offset is not None and offset + codes > size:
                raise ValueError(
                    f"token_offsets[{j}] must leave room for the {codes} codes of level {j} in the "
                    f"model's vocabulary of {size}; got {offset}"
                )
        for j, (tokens, _) in enumerate(self._sorted):
            if len(tokens) and tokens[-1] >= size:
                raise ValueError(
                    f"token_ids[{j}] must be below the size of the model's vocabulary, {size}; got {int(tokens[-1])}"
                )
        for end in self.ends:
            if end >= size:
                raise ValueError(f"eos_token_id must be below the size of the model's vocabulary, {size}; got {end}")

    def spell(self, codes: Tensor, depth: int) -> Tensor:
        """The tokens of ``codes`` (...) of level ``depth``, all at least 0."""
        offset = self._offsets[depth]
        return self._tables[depth][codes] if offset is None else codes + offset

    def encode(self, codes: Tensor, pad: int) -> Tensor:
        """The tokens of ``codes`` (..., L), ``pad`` where a code is -1."""
        tokens = [self.spell(level.clamp(min=0), depth) for depth, level in enumerate(codes.unbind(-1))]
        return torch.stack(tokens, dim=-1).masked_fill(codes < 0, pad)

    def decode(self, tokens: Tensor) -> Tensor:
        """The codes of ``tokens`` (..., t), t up to L: -1 for an end token, and no code of any trie for others."""
        if self._by_table:
            codes = [self._look_up(level, depth) for depth, level in enumerate(tokens.unbind(-1))]
            found = torch.stack(codes, dim=-1) if codes else tokens
        else:
            found = tokens - self._offset_row[: tokens.shape[-1]]
            found = found.masked_fill(found < 0, _NO_CODE)
        return found.masked_fill(self.is_end(tokens), END)

    def is_end(self, tokens: Tensor) -> Tensor:
        """Whether each of ``tokens`` (...) is an end token."""
        if len(self.ends) == 1:
            return tokens == self.ends[0]
        return torch.isin(tokens, self._ends)

    def level(self, scores: Tensor, depth: int) -> Tensor:
        """The scores (..., K) of the codes of level ``depth``, of those (..., V) of the vocabulary.

        A view where the tokens are consecutive, as they are with offsets.
        """
        offset = self._offsets[depth]
        if offset is None:
            return scores.index_select(-1, self._tables[depth])
        return scores[..., offset : offset + self.sizes[depth]]

    def of_ends(self, scores: Tensor) -> Tensor:
        """The scores (..., n) of the n end tokens, of those (..., V) of the vocabulary."""
        return scores.index_select(-1, self._ends)

    def end_of(self, number: Tensor) -> Tensor:
        """The end tokens (...) by their ``number`` (...), from 0."""
        return self._ends[number]

    def _look_up(self, tokens: Tensor, depth: int) -> Tensor:
        known, codes = self._sorted[depth]
        if len(known) == 0:
            return torch.full_like(tokens, _NO_CODE)
        place = torch.searchsorted(known, tokens.contiguous()).clamp(max=len(known) - 1)
        return torch.where(known[place] == tokens, codes[place], _NO_CODE)


def _end_tokens(eos_token_id: EndTokens) -> list[int]:
    if eos_token_id is None:
        return []
    if isinstance(eos_token_id, str) or not (isinstance(eos_token_id, Sequence) or hasattr(eos_token_id, "tolist")):
        return [checks.integer("eos_token_id", eos_token_id, low=0)]
    ends = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else list(eos_token_id)
    if not isinstance(ends, list):  # a tensor or an array without dimensions
        return [checks.integer("eos_token_id", ends, low=0)]
    ends = [checks.integer(f"eos_token_id[{i}]", end, low=0) for i, end in enumerate(ends)]
    if not ends:
        raise ValueError("eos_token_id must be a token or a list of at least one; None where nothing follows; got []")
    if len(set(ends)) < len(ends):
        raise ValueError(f"eos_token_id must not repeat a token; got {ends}")
    return ends


def _checked_offsets(token_offsets: Sequence[int], trie: Trie) -> list[int]:
    if isinstance(token_offsets, str) or not hasattr(token_offsets, "__len__"):
        raise TypeError(f"token_offsets must be a sequence of integers; got {type(token_offsets).__name__}")
    offsets = token_offsets.tolist() if hasattr(token_offsets, "tolist") else list(token_offsets)
    if len(offsets) != trie.depth:
        raise ValueError(f"token_offsets must have one entry per level of the trie, {trie.depth}; got {len(offsets)}")
    return [checks.integer(f"token_offsets[{j}]", offset, low=0) for j, offset in enumerate(offsets)]


def _occurs(trie: Trie, code: int, level: int) -> bool:
    """Whether an item of the trie has ``code`` at ``level``."""
    parts = trie.parts
    nodes = (parts.base.tokens[level] == code).nonzero()[:, 0]
    if parts.added is not None:
        added = (parts.added.tokens[level] == code).nonzero()[:, 0]
        nodes = torch.cat([nodes, added + parts.base.num_nodes_at(level + 1)])
    return bool(parts.holds(nodes, level + 1, parts.live, None).any())


def _checked_tables(token_ids: Sequence[Tensor], trie: Trie) -> list[Tensor]:
    """The tables as int64 on the trie's device, each (K_j,), no token twice in one."""
    if isinstance(token_ids, str) or not hasattr(token_ids, "__len__"):
        raise TypeError(
            f"token_ids must be a sequence of {trie.depth} integer tensors, one per level of the trie; "
            f"got {type(token_ids).__name__}"
        )
    if len(token_ids) != trie.depth:
        raise ValueError(f"token_ids must have one tensor per level of the trie, {trie.depth}; got {len(token_ids)}")
    tables = []
    for j, (given, size) in enumerate(zip(token_ids, trie.codebook_sizes, strict=True)):
        name = f"token_ids[{j}]"
        try:
            table = torch.as_tensor(given, device=trie.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name} must be an integer tensor; got {type(given).__name__} ({error})") from None
        table = checks.tensor(name, table, dtypes=checks.INDEX_DTYPES).long()
        expected = (
            f"(K_{j},), the token of every code of level {j} (give codebook_sizes to Trie.from_codes where "
            "the largest code does not occur)"
        )
        checks.shape(name, table, (size,), expected)
        if size and table.min() < 0:
            raise ValueError(f"{name} must hold tokens of at least 0; got {int(table.min())}")
        values, counts = table.unique(return_counts=True)
        if (counts > 1).any():
            token = int(values[counts > 1][0])
            codes = (table == token).nonzero()[:2, 0].tolist()
            raise ValueError(f"{name} must not repeat a token; {token} is that of codes {codes[0]} and {codes[1]}")
        tables.append(table)
    return tables


def _first_of_run(table: Tensor) -> int | None:
    """The first token where the tokens are consecutive, else None."""
    if len(table) == 0:
        return 0
    first = int(table[0])
    return first if torch.equal(table, torch.arange(first, first + len(table), device=table.device)) else None
