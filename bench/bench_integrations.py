"""Semantic IDs from Hugging Face models: generate with a dict trie, with our processor, and without generate.

The models have random weights and usual sizes: a T5 as small as recommenders train (TIGER, LETTER) with a vocabulary of
codes, the same with T5's own words besides, as LETTER has it, and a decoder-only model with a vocabulary of words.
Prompts are of different lengths. The floor is the model alone: it reads the prompts once and takes the same steps with
cache and reordering, but nothing is searched. Sequences and scores of all systems are compared before any is timed.

Run: python bench/bench_integrations.py [--cases t5 decoder] [--batch B] [--beams M] [--rounds N] [--threads N]
                                        [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from measure import Results, Step, interleaved, peak_bytes, title
from torch import Tensor

pytest.importorskip("transformers")
from transformers import Qwen2Config, Qwen2ForCausalLM, T5Config, T5ForConditionalGeneration  # noqa: E402

from dgi.integrations import TrieLogitsProcessor, constrained_generate  # noqa: E402
from dgi.integrations.model_steps import ModelSteps  # noqa: E402
from dgi_kernels import Trie  # noqa: E402

PAD, END = 0, 1


@dataclass(frozen=True)
class Case:
    """B requests of M beams and prompts up to T tokens, N items with L codes of K each, then an end token."""

    model: str
    levels: int
    beams: int
    batch: int = 8
    length: int = 64
    items: int = 20_000
    codes: int = 256

    def catalog(self) -> np.ndarray:
        """(N, L) codes; each level's follow Zipf's law, in an order that the prefix decides."""
        random = np.random.default_rng(0)
        weights = 1 / np.arange(1, self.codes + 1)
        ranks = random.choice(self.codes, (self.items, self.levels), p=weights / weights.sum())
        shift = np.zeros(self.items, dtype=np.int64)
        for level in range(self.levels):
            ranks[:, level] = (ranks[:, level] + shift) % self.codes
            shift = shift * 31 + ranks[:, level] + 1
        return ranks

    @property
    def words(self) -> int:
        return {"t5": 100, "letter": 32_100, "decoder": 32_000}[self.model]

    def language_model(self) -> Any:
        ids = {"vocab_size": self.words + self.levels * self.codes, "pad_token_id": PAD, "eos_token_id": END}
        if self.model in ("t5", "letter"):
            return T5ForConditionalGeneration(
                T5Config(**ids, d_model=128, d_kv=64, d_ff=1024, num_layers=4, num_heads=6, decoder_start_token_id=PAD)
            ).eval()
        return Qwen2ForCausalLM(
            Qwen2Config(
                **ids,
                bos_token_id=2,
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        ).eval()


CASES = {
    "t5": Case("t5", levels=4, beams=20),
    "t5 wide": Case("t5", levels=4, beams=50),
    "letter": Case("letter", levels=4, beams=20, batch=16),
    "decoder": Case("decoder", levels=3, beams=20),
}


def systems(case: Case) -> dict[str, Step]:
    """What is timed, by name, after a check that all give the same."""
    torch.manual_seed(0)
    codes, model = case.catalog(), case.language_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)  # log-probabilities apart, so that all agree on the order
    trie = Trie.from_codes(codes, codebook_sizes=[case.codes] * case.levels)
    offsets = [case.words + level * case.codes for level in range(case.levels)]
    encodes = model.config.is_encoder_decoder
    ids = torch.randint(10, case.words, (case.batch, case.length))
    mask = torch.arange(case.length) < torch.randint(case.length // 2, case.length + 1, (case.batch, 1))
    mask = (mask if encodes else mask.flip(1)).long()
    prompts = {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}
    start = 1 if encodes else case.length

    def generate(**constraint: Any) -> Any:
        return model.generate(
            **prompts,
            num_beams=case.beams,
            num_return_sequences=case.beams,
            do_sample=False,
            max_new_tokens=case.levels + 1,
            return_dict_in_generate=True,
            output_scores=True,
            **constraint,
        )

    tree: dict = {}
    for row in (codes + np.array(offsets)).tolist():
        node = tree
        for token in [*row, END]:
            node = node.setdefault(token, {})

    def allowed(request: int, tokens: Tensor) -> list[int]:
        node = tree
        for token in tokens[start:].tolist():
            node = node.get(token, {})
        return list(node) or [END]

    processor = TrieLogitsProcessor(trie, offsets, start=start, eos_token_id=END)

    def steps_alone(
        model: Any, prompt: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any
    ) -> Tensor:
        steps = ModelSteps(model, prompt, inputs)
        steps.first()
        tokens, parents = torch.randint(case.words, (2, case.batch, case.beams))
        steps.next(tokens, torch.zeros_like(parents))
        for _ in range(case.levels - 1):
            steps.next(tokens, parents % case.beams)
        return prompt

    def model_alone() -> None:
        model.generate(**prompts, custom_generate=steps_alone, max_new_tokens=case.levels + 1)

    found: dict[str, Step] = {
        "floor": model_alone,
        "constrained_generate": lambda: constrained_generate(
            model, trie, **prompts, token_offsets=offsets, num_beams=case.beams, eos_token_id=END
        ),
        "generate, TrieLogitsProcessor": lambda: generate(logits_processor=[processor]),
        "generate, dict trie": lambda: generate(prefix_allowed_tokens_fn=allowed),
        "generate, unconstrained": generate,
    }
    _compare(*(found[name]() for name in list(found)[1:4]))
    return found


def _compare(ours: Any, processed: Any, by_dict: Any) -> None:
    """The same rows and scores; two whose scores are equal to rounding may change places."""
    assert torch.equal(processed.sequences, by_dict.sequences)
    torch.testing.assert_close(ours.sequences_scores, by_dict.sequences_scores, rtol=1e-4, atol=1e-4)
    same = (ours.sequences == by_dict.sequences).all(dim=1).float().mean()
    assert same > 0.98, f"only {same:.1%} of the sequences are those of generate"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch", type=int, help="instead of the case's own")
    parser.add_argument("--beams", type=int, help="instead of the case's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = Results()
    print(title())
    for name in options.cases:
        case = CASES[name]
        case = replace(case, beams=options.beams or case.beams, batch=options.batch or case.batch)
        found = systems(case)
        times = interleaved(found, options.rounds)
        floor = statistics.median(times["floor"])
        print(f"\n{case}, medians of {options.rounds} rounds\n{'':32}{'ms':>10}{'x floor':>10}{'peak MB':>10}")
        for system, run in found.items():
            memory = peak_bytes(run)
            median = statistics.median(times[system])
            print(
                f"{system:32}{1e3 * median:10.1f}{median / floor:10.2f}"
                f"{'' if memory is None else f'{memory / 1e6:10.0f}'}",
                flush=True,
            )
            results.add(
                "constrained_generate", {**vars(case), "threads": options.threads}, system, times[system], memory
            )
    if options.json:
        results.write(options.json)


if __name__ == "__main__":
    main()
