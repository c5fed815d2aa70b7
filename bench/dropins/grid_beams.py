"""GRID: the beams of its generative model, which it checks against all items; and not at all in its configurations.

With ``should_check_prefix`` its first step indexes logits (B, K) with a mask (K,): it fails unless B = K.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropins import Change, DropIn, Outputs, Steps, common

REQUESTS, BEAMS = 16, 64
PATH = "src/models/modules/semantic_id/tiger_generation_model.py"


def steps(data: Path | None) -> Steps:
    # Without what else the module imports: lightning, torchmetrics, its data loaders.
    def module(name: str, **members: Any) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(members)

    module("torchmetrics")
    module("torchmetrics.aggregation", BaseAggregator=None)
    module("src.data.loading.components.interfaces", SequentialModelInputData=None, SequentialModuleLabelData=None)
    module("src.models.components.interfaces", OneKeyPerPredictionOutput=None)
    module("src.models.components.network_blocks.mlp", MLP=None)
    module("src.models.modules.huggingface.transformer_base_module", TransformerBaseModule=nn.Module)
    names = ("delete_module", "find_module_shape", "get_parent_module_and_attr", "reset_parameters")
    module("src.utils.utils", **dict.fromkeys(names))
    from src.models.modules.semantic_id import tiger_generation_model as theirs

    theirs.EncoderDecoderCache = lambda **_: None  # whose arguments have other names in transformers 5

    def search(codes: Tensor, size: int) -> Callable[[], Outputs]:
        """What their ``generate`` does with the logits of each level, here from a fixed seed."""
        levels = codes.shape[1]
        model = theirs.SemanticIDGenerativeRecommender(codes.t(), levels, size, 8, False, BEAMS)

        def run() -> Outputs:
            random = torch.Generator().manual_seed(0)
            found = probability = None
            for level in range(levels):
                rows = REQUESTS * (BEAMS if level else 1)
                logits = 2 * torch.randn(rows, size, generator=random)
                found, probability, _ = model._beam_search_one_step(logits, found, probability, None, level, REQUESTS)
            assert found is not None and probability is not None
            return {"codes": found, "scores": probability.log()}

        return run

    return {
        "every semantic ID exists": search(torch.cartesian_prod(*[torch.arange(128)] * 3), 128),
        "the catalog of Beauty": search(common.semantic_ids(data), 256),
    }


DROPIN = DropIn(
    title=f"the whole beam search of {REQUESTS} requests with {BEAMS} beams, from logits",
    kind="search alone",
    source="https://github.com/snap-research/GRID",
    commit="63e19a88af6977eba9c3dd1971030573968d99b7",
    data=common.SEMANTIC_IDS,
    packages=(),
    paths=(PATH,),
    changes=(
        Change(PATH, "import transformers\n", "import transformers\nfrom dgi.integrations import GridBeamSearch\n"),
        Change(
            PATH,
            "    def _make_deterministic(self, is_training: bool):\n",
            "    _beam_search_one_step = GridBeamSearch._beam_search_one_step\n\n"
            "    def _make_deterministic(self, is_training: bool):\n",
        ),
    ),
    steps=steps,
    tolerance={"scores": 1e-6},
    differs={"the catalog of Beauty": "theirs keeps prefixes that no item has"},
)
