"""How the codes of a trie are spelt in a language model's vocabulary: code c of level j is token ``offsets[j] + c``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels import Trie, checks
from dgi_kernels.trie.arrays import END

_NO_CODE = torch.iinfo(torch.int32).max  # larger than any code of any trie


class CodeTokens:
    """The tokens of a trie's codes, and the one that ends a sequence.

    Args:
        trie: the trie.
        token_offsets: L integers, the token id of each level's code 0.
        eos_token_id: the token that follows a complete semantic ID, or None where nothing does.

    Raises:
        ValueError, TypeError: offsets that do not fit the trie, or an end token that is a code's token too.
    """

    def __init__(self, trie: Trie, token_offsets: Sequence[int], eos_token_id: int | None) -> None:
        if not isinstance(trie, Trie):
            raise TypeError(f"trie must be a Trie; got {type(trie).__name__}")
        if isinstance(token_offsets, str) or not hasattr(token_offsets, "__len__"):
            raise TypeError(f"token_offsets must be a sequence of integers; got {type(token_offsets).__name__}")
        offsets = token_offsets.tolist() if hasattr(token_offsets, "tolist") else list(token_offsets)
        if len(offsets) != trie.depth:
            raise ValueError(f"token_offsets must have one entry per level of the trie, {trie.depth}; "
                             f"got {len(offsets)}")
        self.sizes = trie.codebook_sizes
        self.offsets = [checks.integer(f"token_offsets[{j}]", offset, low=0) for j, offset in enumerate(offsets)]
        self.end = None if eos_token_id is None else checks.integer("eos_token_id", eos_token_id, low=0)
        for j, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            if self.end is not None and offset <= self.end < offset + size:
                raise ValueError(f"eos_token_id must not be the token of a code; {self.end} is code "
                                 f"{self.end - offset} of level {j}")
        self._offset_row = torch.tensor(self.offsets, dtype=torch.int64)

    def check_vocabulary(self, size: int) -> None:
        """Check that all tokens lie in a vocabulary of ``size``."""
        for j, (offset, codes) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            if offset + codes > size:
                raise ValueError(f"token_offsets[{j}] must leave room for the {codes} codes of level {j} in the "
                                 f"model's vocabulary of {size}; got {offset}")
        if self.end is not None and self.end >= size:
            raise ValueError(f"eos_token_id must be below the size of the model's vocabulary, {size}; got {self.end}")

    def decode(self, tokens: Tensor) -> Tensor:
        """The codes of ``tokens`` (..., t), t up to L: -1 for the end token, and no code of any trie for others."""
        codes = tokens - self._offset_row[: tokens.shape[-1]].to(tokens.device)
        codes = codes.masked_fill(codes < 0, _NO_CODE)
        return codes if self.end is None else codes.masked_fill(tokens == self.end, END)

    def encode(self, codes: Tensor, pad: int) -> Tensor:
        """The tokens of ``codes`` (..., L), ``pad`` where a code is -1."""
        return torch.where(codes < 0, pad, codes + self._offset_row.to(codes.device))

    def level(self, scores: Tensor, depth: int) -> Tensor:
        """The scores (..., K) of the codes of level ``depth``: a view of those (..., V) of the vocabulary."""
        return scores[..., self.offsets[depth]:self.offsets[depth] + self.sizes[depth]]
