"""RQ-VAE-Recommender: ``generate`` of its T5 retrieval model, which compares every candidate with every item."""

from __future__ import annotations

from pathlib import Path

import torch

from dropins import Change, DropIn, Outputs, Steps, common


def steps(data: Path | None) -> Steps:
    from modules.model import EncoderDecoderRetrievalModel

    ids = common.semantic_ids(data)[:, :3]
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(ids, num_hierarchies=3, num_embeddings_per_hierarchy=256).eval()
    history = ids[torch.randint(len(ids), (8, 20))].flatten(1)
    mask = torch.ones_like(history)

    def generate() -> Outputs:
        torch.manual_seed(1)  # it draws its candidates
        codes, scores = model.generate(mask, history)
        return {"codes": codes, "scores": scores}

    return {"generate": generate}


DROPIN = DropIn(
    title="which prefixes exist, in the beam search of a T5; 8 requests, 10 beams of 64 candidates",
    kind="constrained decoding",
    source="https://github.com/EdoardoBotta/RQ-VAE-Recommender",
    commit="0e4ae0c036c291cf6c900ea198641341553080a0",
    data=common.SEMANTIC_IDS,
    packages=(),
    paths=("modules", "data", "distributions", "init"),
    changes=(
        Change("modules/model.py", "import torch.nn as nn\n", "import torch.nn as nn\nimport dgi_kernels\n"),
        Change(
            "modules/model.py",
            '        self.register_buffer("codebooks", codebooks)\n',
            '        self.register_buffer("codebooks", codebooks)\n'
            "        self.trie = dgi_kernels.Trie.from_codes(codebooks)\n",
        ),
        Change(
            "modules/model.py",
            "        if prefix.device != self.codebooks.device:\n",
            "        return self.trie.is_valid(prefix)\n        if prefix.device != self.codebooks.device:\n",
        ),
    ),
    steps=steps,
)
