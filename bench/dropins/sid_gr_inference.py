"""NVIDIA recsys-examples, examples/sid-gr-inference: masks of allowed tokens, from a dict trie walked by each beam."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from dropins import Change, DropIn, Outputs, Steps, common

BEAMS, VOCABULARY, FIRST, SIZE = 256, 151_936, 150_000, 256
PATH = "examples/sid-gr-inference/src/gr_inference/gr_runtime/item_constraints.py"


def steps(data: Path | None) -> Steps:
    sys.path.insert(0, "examples/sid-gr-inference/src")
    from gr_inference.gr_kv import BeamPath
    from gr_inference.gr_runtime.beam_search import item_mask_limited_beam_width, select_initial_topk, select_next_topk
    from gr_inference.gr_runtime.item_constraints import SemanticItemCatalog

    codes = common.semantic_ids(data)
    torch.manual_seed(0)
    tokens = (codes + FIRST + SIZE * torch.arange(codes.shape[1])).tolist()
    catalog = SemanticItemCatalog.from_records(
        [{"item_id": item, "token_ids": row} for item, row in enumerate(tokens)], allow_duplicate_token_paths=True
    )
    provider = catalog.provider(vocab_size=VOCABULARY)

    every = torch.randn(1, BEAMS, VOCABULARY)  # the model's part, which is no part of a step

    class Generation:  # what a mask reads of their state
        def __init__(self) -> None:
            self.beam_path = BeamPath(max_decode_steps=codes.shape[1], max_beam_width=BEAMS)

    def search() -> Outputs:
        """Their steps of a request: a mask, then the best of beams and vocabulary."""
        state, logits = Generation(), every[:, :1]
        mask = provider.initial_mask(logits)
        width = item_mask_limited_beam_width(BEAMS, mask)
        chosen = select_initial_topk(logits, beam_width=width, item_mask=mask, score_mode="logprob")
        for level in range(codes.shape[1]):
            state.beam_path.append(chosen.parent_beams, chosen.token_ids, chosen.scores)
            if level + 1 < codes.shape[1]:
                logits = every[:, : len(chosen.token_ids)]
                mask = provider.step_mask(state, logits)
                chosen = select_next_topk(
                    logits, previous_scores=chosen.scores, beam_width=BEAMS, item_mask=mask, score_mode="logprob"
                )
        found = [state.beam_path.token_trace(beam) for beam in range(BEAMS)]
        return {"tokens": torch.tensor(found), "scores": torch.tensor(chosen.scores)}

    def masks_alone() -> Outputs:
        """The masks of one step, without the model's logits."""
        state = Generation()
        first = provider.initial_mask(torch.empty(1, VOCABULARY)).nonzero()[:, 0].tolist()
        state.beam_path.append([0] * len(first), first, [0.0] * len(first))
        return {"allowed": provider.step_mask(state, torch.empty(1, len(first), VOCABULARY))}

    return {f"four steps, {BEAMS} beams": search, "masks of a step": masks_alone}


DROPIN = DropIn(
    title=f"a search with masks over {VOCABULARY:,} words and the catalog of Beauty",
    kind="search alone",
    source="https://github.com/NVIDIA/recsys-examples",
    commit="43465aeabf61515e28d74cbb5234ff7c627dcc19",
    data=common.SEMANTIC_IDS,
    packages=(),
    paths=("examples/sid-gr-inference/src",),
    changes=(
        Change(
            PATH,
            "        return TokenTrie.from_items(self.items)\n",
            "        return dgi_kernels.Trie.from_codes([item.token_ids for item in self.items])\n",
        ),
        Change(
            PATH,
            "from gr_inference.gr_runtime.generation import GRGenerationState\n",
            "from gr_inference.gr_runtime.generation import GRGenerationState\nimport dgi.integrations, dgi_kernels\n",
        ),
        Change(
            PATH,
            "        return TrieItemMaskProvider(\n",
            "        return dgi.integrations.TrieItemMaskProvider(\n",
        ),
    ),
    steps=steps,
)
