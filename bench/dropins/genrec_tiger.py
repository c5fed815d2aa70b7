"""phonism/genrec: ``generate`` of its TIGER, which keeps a node of a dict trie for each beam.

Theirs draws ``6 M`` candidates per beam at random. With as many beams as here these are all codes, so that its result
is the exact one, whatever was drawn.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch

from dropins import Change, DropIn, Outputs, Steps, common

REQUESTS, BEAMS, SIZE = 8, 50, 256
PATH = "genrec/models/tiger.py"


def steps(data: Path | None) -> Steps:
    for name in ("genrec", "genrec.modules", "genrec.models"):  # without what their __init__ import: datasets, gin
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [name.replace(".", "/")]
    from genrec.models.tiger import Tiger

    ids = common.semantic_ids(data)[:, :3]
    torch.manual_seed(0)
    model = Tiger(
        embedding_dim=64, attn_dim=64, dropout=0.0, num_heads=4, n_layers=4, num_item_embeddings=SIZE,
        num_user_embeddings=100, sem_id_dim=3,
    ).eval()  # fmt: skip
    history = ids[torch.randint(len(ids), (REQUESTS, 20))].flatten(1)
    users, kinds = torch.arange(REQUESTS).unsqueeze(1), torch.arange(3).repeat(20).expand(REQUESTS, -1)

    @torch.no_grad()
    def generate() -> Outputs:
        torch.manual_seed(1)
        found = model.generate(
            users,
            history,
            kinds,
            torch.ones_like(history),
            temperature=1.0,
            n_top_k_candidates=BEAMS,
            valid_item_ids=ids,
        )
        return {"codes": found.sem_ids, "scores": found.log_probas}

    return {"generate": generate}


DROPIN = DropIn(
    title=f"the beams of a small TIGER; {REQUESTS} requests, {BEAMS} beams",
    kind="constrained decoding",
    source="https://github.com/phonism/genrec",
    commit="b0272248020b7037b892ff6c598f710ab090212e",
    data=common.SEMANTIC_IDS,
    packages=("einops",),
    paths=("genrec",),
    changes=(
        Change(
            PATH,
            "import torch\nfrom torch import nn\n",
            "import torch, dgi.integrations, dgi_kernels\nfrom torch import nn\n",
        ),
        Change(
            PATH,
            '                self.trie_root = build_trie(valid_item_ids.to("cpu"))\n',
            "                self.trie_root = dgi_kernels.Trie.from_codes(valid_item_ids)\n",
        ),
        Change(
            PATH,
            "            if use_trie:\n                # Apply trie constraint\n",
            "            beam_seqs, beam_logps, _ = dgi.integrations.extend_beams(self.trie_root, "
            "logits[:, vocab_offset : vocab_offset + self.num_item_embeddings] / temperature, beam_seqs, beam_logps, "
            'K, normalize="children"); continue\n'
            "            if use_trie:\n                # Apply trie constraint\n",
        ),
    ),
    steps=steps,
    tolerance={"scores": 1e-5},
)
