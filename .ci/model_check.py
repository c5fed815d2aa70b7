"""Checks an installed model layer: training, an index, a search; and generate of Hugging Face kept on a trie."""

import importlib.metadata
import tempfile
from pathlib import Path

import torch
import transformers

import dgi_kernels
from dgi import cli
from dgi.integrations import TrieLogitsProcessor, constrained_generate

with tempfile.TemporaryDirectory() as temporary:
    data, output = Path(temporary, "data"), Path(temporary, "run")
    data.mkdir()
    (data / "items.tsv").write_text("id\ttext\n" + "".join(f"i{n}\ttitle{n} kind{n % 5}\n" for n in range(40)))
    rows = [f"kind{n % 5}\ti{n % 40}\ti{(n + 5) % 40}\t{n}" for n in range(200)]
    (data / "interactions.tsv").write_text("query\thistory\titem_id\ttimestamp\n" + "\n".join(rows) + "\n")
    settings = ["dim=16", "codebook_sizes=8,4", "attention_heads=2", "text_layers=0", "epochs=1", "warmup_steps=2"]
    options = [part for setting in settings for part in ("--set", setting)]
    files = ["--data", str(data), "--no-progress"]
    index = str(output / "index.safetensors")
    assert cli.main(["train", *files, "--output", str(output), *options]) == 0
    assert cli.main(["index", *files, "--model", str(output), "--output", index]) == 0
    assert cli.main(["search", "--data", str(data), "--model", str(output), "--index", index, "--query", "kind3"]) == 0

torch.manual_seed(0)
config = transformers.T5Config(
    vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1,
    decoder_start_token_id=0,
)  # fmt: skip
model = transformers.T5ForConditionalGeneration(config).eval()
trie = dgi_kernels.Trie.from_codes(torch.randint(16, (200, 3)), codebook_sizes=[16] * 3)
prompt, offsets = torch.randint(2, 10, (2, 6)), [10, 26, 42]
found = model.generate(
    prompt,
    num_beams=5,
    num_return_sequences=5,
    max_new_tokens=4,
    do_sample=False,
    logits_processor=[TrieLogitsProcessor(trie, offsets, start=1, eos_token_id=1)],
    return_dict_in_generate=True,
    output_scores=True,
)
assert bool(trie.is_valid(found.sequences[:, 1:4] - torch.tensor(offsets)).all())
ours = constrained_generate(model, trie, prompt, token_offsets=offsets, num_beams=5, eos_token_id=1)
torch.testing.assert_close(ours.sequences_scores, found.sequences_scores, rtol=1e-4, atol=1e-4)
print(
    f"dgi-kernels {importlib.metadata.version('dgi-kernels')}, torch {torch.__version__}, transformers "
    f"{transformers.__version__}: trained, indexed, searched; constrained_generate equals generate"
)
