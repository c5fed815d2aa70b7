"""Catalogs spelt as tokens, tiny models to search them with, and generate's way of doing it: shared by these tests."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dgi.integrations import TrieLogitsProcessor, constrained_generate
from dgi_kernels import Trie

PAD, END, FIRST = 0, 1, 5  # token ids of padding, the end, and the first code of the first level
SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
LIVE = -1e6  # generate gives rows of no beam scores of -1e9 and less

EncoderDecoder = ("t5", "bart")
DecoderOnly = ("gpt2", "qwen2", "mistral")


def make_model(family: str, vocabulary: int) -> Any:
    """A tiny random model whose log-probabilities are far apart, so that rounding changes no order."""
    ids = {"vocab_size": vocabulary, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": END}
    decoder = {
        **ids,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    bart = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    model = {
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(**ids, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=PAD)
        ),
        "bart": lambda: BartForConditionalGeneration(
            BartConfig(**ids, d_model=32, **bart, decoder_start_token_id=2, forced_eos_token_id=None)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**ids, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**decoder)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**decoder, sliding_window=4)),
    }[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at the usual start all prompts look alike
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
        model.get_output_embeddings().weight.mul_(3)
    return model


def make_prompts(family: str, vocabulary: int, batch: int) -> dict[str, Tensor]:
    """Prompts of 1 to 9 tokens, padded on the left for a decoder-only model."""
    length = 9
    ids = torch.randint(FIRST, vocabulary, (batch, length))
    mask = torch.arange(length) < torch.tensor(random.choices(range(1, length + 1), k=batch)).unsqueeze(1)
    if family in DecoderOnly:
        mask = mask.flip(1)
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


class Case:
    """A catalog, spelt as tokens, with a model and prompts to search it."""

    def __init__(self, family: str, codes: Sequence[Sequence[int]], sizes: Sequence[int], batch: int = 3) -> None:
        self.codes = [list(map(int, row)) for row in codes]
        self.trie = Trie.from_codes(self.codes, codebook_sizes=list(sizes))
        gaps = np.random.randint(0, 3, len(sizes))
        self.offsets = [FIRST + int(gaps[: j + 1].sum()) + sum(sizes[:j]) for j in range(len(sizes))]
        self.vocabulary = self.offsets[-1] + sizes[-1] + 3
        self.family, self.model = family, make_model(family, self.vocabulary)
        self.prompts = make_prompts(family, self.vocabulary, batch)
        self.start = 1 if family in EncoderDecoder else self.prompts["input_ids"].shape[1]

    def tokens(self, item: int) -> list[int]:
        return [offset + code for offset, code in zip(self.offsets, self.codes[item], strict=False)]

    def allowed_tokens(
        self, end: int | None, subsets: list[Sequence[int]] | None = None
    ) -> Callable[[int, Tensor], list[int]]:
        """prefix_allowed_tokens_fn over a trie of dicts; the end token where nothing follows: it never raises."""

        def build(items: Sequence[int]) -> dict:
            root: dict = {}
            for item in items:
                node = root
                for token in self.tokens(item) + ([] if end is None else [end]):
                    node = node.setdefault(token, {})
            return root

        roots = [build(range(len(self.codes)))] if subsets is None else [build(items) for items in subsets]

        def allowed(request: int, ids: Tensor) -> list[int]:
            node = roots[request if subsets is not None else 0]
            for token in ids[self.start :].tolist():
                node = node.get(token, {})
            return list(node) or [END]

        return allowed

    def processor(self, end: int | None, **options: Any) -> TrieLogitsProcessor:
        return TrieLogitsProcessor(self.trie, self.offsets, start=self.start, eos_token_id=end, **options)

    def generate(self, end: int | None, beams: int, **options: Any) -> Any:
        self.model.generation_config.eos_token_id = end
        return self.model.generate(
            **self.prompts,
            max_new_tokens=self.trie.depth + (end is not None),
            num_beams=beams,
            num_return_sequences=beams,
            return_dict_in_generate=True,
            output_scores=True,
            do_sample=False,
            **options,
        )

    def constrained(self, end: int | None, beams: int | Sequence[int], **options: Any) -> Any:
        self.model.generation_config.eos_token_id = end
        return constrained_generate(
            self.model,
            self.trie,
            **self.prompts,
            token_offsets=self.offsets,
            num_beams=beams,
            eos_token_id=end,
            **options,
        )


def real_codes(name: str) -> np.ndarray:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    with gzip.open(path, "rt") as lines:
        if name.endswith(".jsonl.gz"):
            return np.array([json.loads(line)["sid"] for line in lines])
        return np.loadtxt(lines, dtype=np.int64, skiprows=1)[:, 1:]


REAL = (
    "sid_minionerec/Industrial_and_Scientific.items.jsonl.gz",
    "sid_minionerec/Office_Products.items.jsonl.gz",
    "sid_letter/Instruments.sid.tsv.gz",
    "sid_letter/Yelp.sid.tsv.gz",
)


def ragged_codes(items: int, sizes: Sequence[int]) -> list[list[int]]:
    """Sequences of 1 to L codes, with duplicates and with some that begin others."""
    rows = [[random.randrange(size) for size in sizes[: random.randint(1, len(sizes))]] for _ in range(items)]
    return rows + rows[::5]


def assert_same(generated: Any, ours: Any, batch: int, ends: Sequence[int] = (END,)) -> None:
    """The live rows of ``generate`` are ours: the same scores, and the same sequences where no score is as good."""
    theirs, scores = generated.sequences.view(batch, -1, generated.sequences.shape[1]), generated.sequences_scores
    scores = scores.view(batch, -1)
    own, own_scores = ours.sequences.view(batch, -1, ours.sequences.shape[1]), ours.sequences_scores.view(batch, -1)
    assert torch.equal(scores > LIVE, own_scores > -torch.inf)
    torch.testing.assert_close(own_scores.clamp(min=LIVE), scores.clamp(min=LIVE), rtol=1e-5, atol=1e-4)
    for request in range(batch):
        best = own_scores[request]
        for row in range(int((best > -torch.inf).sum())):
            if ((best - best[row]).abs() < 1e-3).sum() == 1:
                assert _without_padding(own[request, row], ends) == _without_padding(theirs[request, row], ends)


def _without_padding(sequence: Tensor, ends: Sequence[int]) -> list[int]:
    """The tokens up to the first end token behind the codes; generate pads with the first end token where PAD is 0."""
    tokens, last = sequence.tolist(), PAD
    while tokens and tokens[-1] in (PAD, *ends):
        last = tokens.pop()
    return tokens + [last] * (last in ends)
