"""Telling families of transformers, built tiny: constrained_generate as generate with TrieLogitsProcessor.

bench/families.py does the same for every family, and writes the table of docs/families.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'dgi-kernels[hf]'")
ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "bench"))
import families  # noqa: E402
import tiny_models  # noqa: E402

from dgi.integrations import TrieLogitsProcessor, constrained_generate  # noqa: E402
from dgi.integrations.model_steps import ModelSteps  # noqa: E402
from dgi_kernels import Trie  # noqa: E402

TELLING = {
    "gpt2": "learned positions",
    "llama": "rotary positions",
    "mistral": "a sliding window",
    "gemma3_text": "windows and full attention by turns",
    "mixtral": "experts",
    "mamba2": "a state alone",
    "qwen3_next": "states and attention by turns",
    "openai-gpt": "no cache",
    "xlnet": "a cache of its own kind",
    "deepseek_v3": "latent attention",
    "t5": "relative positions behind an encoder",
    "bart": "a forced end",
    "t5gemma": "encoder outputs by name",
    "qwen2_vl": "positions in three dimensions",
}


@pytest.mark.parametrize("family", TELLING)
def test_telling_families(family: str) -> None:
    """With an end token and ragged semantic IDs, and without; prompts padded on the left."""
    row = families.examine(family)
    assert row["with an end token"]["result"] == "equal", row
    assert row["without"]["result"] == "equal", row


@pytest.mark.parametrize("family", ["minimax", "recurrent_gemma"])
def test_states_that_would_follow_no_beams_are_refused(family: str) -> None:
    """generate takes them, with wrong results; without a cache both are right."""
    row = families.examine(family)
    assert row["without"]["result"] == "refused"
    assert row["without"]["detail"].endswith("give use_cache=False; equal with use_cache=False"), row


def test_a_state_that_cannot_be_reordered_is_refused() -> None:
    model = tiny_models.tiny_model("rwkv")
    trie = Trie.from_codes(families.catalog(ragged=False), codebook_sizes=families.SIZES)
    with pytest.raises(TypeError, match="RwkvForCausalLM keeps it as 'state', a list: give use_cache=False"):
        constrained_generate(model, trie, torch.full((2, 5), 50), token_offsets=families.OFFSETS, num_beams=5)


@pytest.mark.parametrize("family", ["gpt2", "mamba2", "t5"])
def test_a_fault_is_seen(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails where the cache does not follow the beams."""
    monkeypatch.setattr(ModelSteps, "_reorder", lambda self, rows: None)
    assert families.examine(family)["without"]["result"] == "differs"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_with_images(family: str, use_cache: bool) -> None:
    """An image of 4 by 4 patches, four tokens, in each prompt; positions count it in three dimensions."""
    start, image, end = 6, 5, 7
    vision = {"vision_config": {"deepstack_visual_indexes": [0, 1]}} if family == "qwen3_vl" else {}
    model = tiny_models.tiny_model(
        family, image_token_id=image, video_token_id=8, vision_start_token_id=start, vision_end_token_id=end, **vision
    )
    ids = torch.randint(families.FIRST_WORD, tiny_models.VOCABULARY, (3, 14))
    for row, padded in enumerate((3, 5, 2)):
        ids[row, :padded] = tiny_models.PAD
        ids[row, padded + 1 : padded + 7] = torch.tensor([start, *[image] * 4, end])
    patch = model.config.vision_config.patch_size
    prompts: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": (ids != tiny_models.PAD).long(),
        "mm_token_type_ids": (ids == image).int(),
        "pixel_values": torch.randn(3 * 16, 3 * 2 * patch**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 3),
    }
    trie = Trie.from_codes(families.catalog(ragged=False), codebook_sizes=families.SIZES)
    options = {"num_beams": 5, "num_return_sequences": families.RETURNED, "use_cache": use_cache}
    theirs = model.generate(
        **prompts,
        **options,
        do_sample=False,
        eos_token_id=None,
        max_new_tokens=3,
        logits_processor=[TrieLogitsProcessor(trie, families.OFFSETS, start=14)],
        return_dict_in_generate=True,
        output_scores=True,
    )
    ours = constrained_generate(model, trie, **prompts, **options, token_offsets=families.OFFSETS)
    outcome = families.agreement(ours.sequences, ours.sequences_scores, theirs.sequences, theirs.sequences_scores)
    assert outcome.result == "equal", outcome


def test_the_page_is_that_of_the_results() -> None:
    """The table in the documentation is what the script writes of the recorded outcomes; none differs."""
    results = json.loads((ROOT / "bench" / "families.json").read_text())
    assert (ROOT / "docs" / "families.md").read_text() == families.page(results)
    assert len(results["families"]) > 200
    for row in results["families"]:
        for way in ("with an end token", "without"):
            assert row[way]["result"] in ("equal", "refused", "generate fails", "not built"), row
