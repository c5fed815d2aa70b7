"""LETTER: its evaluation (LETTER-TIGER/test.py), a T5 whose beams a dict trie in Python constrains.

Their ``test`` runs as it is, on its own data. The script names a GPU: its ``torch.device("cuda", ...)`` is the CPU
here. The T5 has random weights: beams then disagree most.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch

from dropins import Change, DropIn, Outputs, Steps, common

REQUESTS = 16


def steps(_: Path | None) -> Steps:
    import transformers

    sys.path.insert(0, "LETTER-TIGER")
    shutil.copytree("LETTER-TIGER/ckpt/TIGER", "t5-small")  # a local folder of the name that they load
    import test as evaluation
    import utils

    arguments = argparse.ArgumentParser()
    for add in (utils.parse_global_args, utils.parse_dataset_args, utils.parse_test_args):
        arguments = add(arguments)
    args = arguments.parse_args(
        f"--data_path data --dataset Beauty --index_file .index.json --sample_num {REQUESTS} --test_batch_size 8 "
        "--ckpt_path model --results_file results.json".split()
    )
    args.gpu_id = "cpu"
    tokenizer = transformers.T5Tokenizer.from_pretrained("t5-small", model_max_length=512)
    dataset = utils.load_datasets(args)[0].datasets[0]
    tokenizer.add_tokens(dataset.get_new_tokens())
    config = transformers.T5Config.from_pretrained("t5-small")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).eval().save_pretrained("model")

    cpu = types.ModuleType("torch")
    cpu.__dict__.update(torch.__dict__, device=lambda *_: torch.device("cpu"))
    evaluation.torch = cpu
    evaluation.DataLoader = lambda data, batch_size, collate_fn, **_: torch.utils.data.DataLoader(
        data, batch_size=batch_size, collate_fn=collate_fn, shuffle=True
    )  # without its four processes
    judge = evaluation.get_topk_results

    def run() -> Outputs:
        found: list[str] = []
        scores: list[torch.Tensor] = []

        def keep(output, sequence_scores, *rest, **named):  # type: ignore[no-untyped-def]
            found.extend(output)
            scores.append(sequence_scores.clone())
            return judge(output, sequence_scores, *rest, **named)

        evaluation.get_topk_results = keep
        evaluation.test(args)
        letters = np.frombuffer("\n".join(found).encode(), dtype=np.uint8).copy()
        return {"texts": torch.from_numpy(letters), "scores": torch.cat(scores)}

    replay = common.Replay(transformers.T5ForConditionalGeneration)
    return {f"test.py, {REQUESTS} requests, 20 beams": run, "its generate alone, 8 requests": replay}


DROPIN = DropIn(
    title="generate of a T5 with 32,100 words and four codes an item, constrained to the catalog of Beauty",
    kind="constrained decoding",
    source="https://github.com/HonghuiBao2000/LETTER",
    commit="8d0154e28de37dbb6e24871c508ad8ddb1921cda",
    data="",
    packages=("sentencepiece", "accelerate"),
    paths=("LETTER-TIGER", "data/Beauty/Beauty.index.json", "data/Beauty/Beauty.inter.json"),
    changes=(
        Change(
            "LETTER-TIGER/test.py",
            "from generation_trie import Trie\n",
            "from dgi.integrations import TrieSearch\n",
        ),
        Change(
            "LETTER-TIGER/test.py",
            "    candidate_trie = Trie(\n",
            "    candidate_trie = TrieSearch.of_sequences(\n",
        ),
        Change(
            "LETTER-TIGER/test.py",
            "                    prefix_allowed_tokens_fn=prefix_allowed_tokens,\n",
            "                    custom_generate=candidate_trie,\n",
        ),
    ),
    steps=steps,
    tolerance={"scores": 1e-5},
)
