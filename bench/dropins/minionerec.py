"""MiniOneRec: its evaluation (evaluate.py), a language model whose beams a dict of prefixes in Python constrains.

Their ``main`` runs as it is, on its own data, with a Qwen2 of four small layers, random weights and Qwen's vocabulary
size. Its tokenizer is made here of their texts, so that "### Response:" and a line break are three tokens (as in Qwen).
"""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import torch

from dropins import Change, DropIn, Outputs, Steps, common

CATEGORY, REQUESTS = "Industrial_and_Scientific", 8
FILE = f"{CATEGORY}_5_2016-10-2018-11"
PIECES = r"<[a-d]_\d+>|:\n|\n|\s?\w+|\s?[^\w\s]+?|\s"


def steps(_: Path | None) -> Steps:
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    sys.modules["bitsandbytes"] = types.ModuleType("bitsandbytes")  # imported there, not used
    rows = Path(f"data/Amazon/test/{FILE}.csv").read_text().splitlines(keepends=True)
    Path("few.csv").write_text("".join(rows[: REQUESTS + 1]))
    info = Path(f"data/Amazon/info/{FILE}.txt").read_text()
    prompt = "Below is an instruction that describes a task, paired with an input that provides further context. "
    text = info + Path("data.py").read_text() + prompt + Path("few.csv").read_text() + "### Response:\n"
    words = ["<unk>", "<end>", *sorted({*re.findall(PIECES, text), "###", " Response"})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("###|" + PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained("model")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=151_936,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained("model")
    import evaluate as evaluation

    evaluation.AutoTokenizer = transformers.PreTrainedTokenizerFast  # Auto would take Qwen's for a Qwen
    wide = types.ModuleType("torch")  # in bfloat16 rounding would choose the beams: they load the model in float32
    wide.__dict__.update(torch.__dict__, bfloat16=torch.float32)
    evaluation.torch = wide

    def run() -> Outputs:
        evaluation.main(
            base_model="model",
            info_file=f"data/Amazon/info/{FILE}.txt",
            category=CATEGORY,
            test_data_path="few.csv",
            result_json_data="result.json",
            batch_size=8,
            num_beams=20,
            max_new_tokens=8,
        )
        found = [line for request in json.loads(Path("result.json").read_text()) for line in request["predict"]]
        assert len(found) == 20 * REQUESTS and all(re.fullmatch(r"(<[a-d]_\d+>)+", line) for line in found), found[:3]
        return {"texts": torch.from_numpy(np.frombuffer("\n".join(found).encode(), dtype=np.uint8).copy())}

    replay = common.Replay(transformers.Qwen2ForCausalLM)
    return {f"evaluate.py, {REQUESTS} requests, 20 beams": run, "its generate alone, 8 requests": replay}


DROPIN = DropIn(
    title="generate of a language model with 151,936 words, constrained to the catalog of Industrial and Scientific",
    kind="constrained decoding",
    source="https://github.com/AkaliKong/MiniOneRec",
    commit="81b4ba9811cfb152cf161f1c486fe516510d081e",
    data="",
    packages=("accelerate", "fire", "pandas"),
    paths=(
        "evaluate.py",
        "data.py",
        "LogitProcessor.py",
        f"data/Amazon/info/{FILE}.txt",
        f"data/Amazon/test/{FILE}.csv",
    ),
    changes=(
        Change(
            "evaluate.py",
            "from LogitProcessor import ConstrainedLogitsProcessor\n",
            "from LogitProcessor import ConstrainedLogitsProcessor\nimport dgi.integrations, dgi_kernels\n",
        ),
        Change(
            "evaluate.py",
            "    # Convert sets to lists for both dictionaries\n",
            "    trie = dgi_kernels.Trie.from_codes([ID[prefix_index:-1] for ID in prefixID])\n"
            "    # Convert sets to lists for both dictionaries\n",
        ),
        Change(
            "evaluate.py",
            "                logits_processor=logits_processor,\n",
            "                custom_generate=dgi.integrations.TrieSearch(trie, [0] * trie.depth, eos_token_id="
            "tokenizer.eos_token_id),\n",
        ),
    ),
    steps=steps,
    tolerance={"scores": 1e-5},
)
