"""The T5-family encoder and decoder, on a tiny random model and a tokenizer of whole words: no network."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="the T5 encoder needs transformers: pip install 'dgi-kernels[hf]'")
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    BertConfig,
    MT5Config,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
    UMT5Config,
)

import dgi.model.t5  # noqa: E402
from dgi.config import ModelConfig  # noqa: E402
from dgi.data import Catalog  # noqa: E402
from dgi.data.batches import Batch, make_batch  # noqa: E402
from dgi.model.dgi_model import DGIModel, DualEncoder  # noqa: E402
from dgi.model.encoders import QueryEncoding  # noqa: E402
from dgi.model.losses import DGILoss  # noqa: E402
from dgi.model.t5 import T5Decoder, T5Encoder  # noqa: E402

WORDS = [f"w{n}" for n in range(40)]
SMALL = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
CATALOG = Catalog(tuple("abcdef"), ("w0 w1 w2", "w3", "w4 w5 w6 w7 w8", "w9 w10", "w11 w12 w13", "w1 w3 w5"))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words; as T5's, id 0 pads and id 1 ends every text."""
    vocabulary = {token: n for n, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def ids(text: str) -> list[int]:
    """What the tokenizer makes of ``text``, spelt out."""
    return [3 + int(word[1:]) for word in text.split()] + [1]


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A folder with a configuration and a tokenizer, no weights."""
    folder = tmp_path / "t5"
    T5Config(**SMALL).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_config(pretrained: Path | str = "unused", **changes: object) -> ModelConfig:
    fields = {"encoder": "t5", "dim": 16, "codebook_sizes": (8, 6, 5), "pretrained": str(pretrained), "max_tokens": 6}
    return ModelConfig(**{**fields, **changes})


@pytest.fixture
def model(backbone: Path) -> DGIModel:
    return DGIModel(make_config(backbone)).eval()


def make_test_batch(
    encoder: T5Encoder, histories: list[list[int]], queries: list[str] | None = None, targets: list[int] | None = None
) -> Batch:
    return make_batch(
        encoder.prepare_items(CATALOG),
        torch.tensor(histories),
        None if targets is None else torch.tensor(targets),
        None if queries is None else encoder.prepare_queries(queries),
    )


def encode(encoder: T5Encoder, histories: list[list[int]], queries: list[str] | None = None) -> QueryEncoding:
    batch = make_test_batch(encoder, histories, queries)
    return encoder.encode_queries(batch, encoder.encode_items(batch.item_features))


class Recorder(torch.nn.Module):
    """Stands in for T5's encoder and keeps the tokens that it is given."""

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        self.tokens = tokens
        return torch.zeros(*tokens.shape, SMALL["d_model"])

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        self.mask = attention_mask
        return SimpleNamespace(last_hidden_state=inputs_embeds)


def read_tokens(encoder: T5Encoder, histories: list[list[int]], queries: list[str] | None = None) -> list[list[int]]:
    """The real tokens of every query as T5's encoder is given them; checks that no hole is among them."""
    stack, encoder.stack = encoder.stack, Recorder()
    encode(encoder, histories, queries)
    recorder, encoder.stack = encoder.stack, stack
    lengths = recorder.mask.sum(1)
    assert torch.equal(recorder.mask, torch.arange(recorder.mask.shape[1]) < lengths[:, None])
    assert recorder.mask.shape[1] == lengths.max()
    return [row[:length].tolist() for row, length in zip(recorder.tokens, lengths, strict=True)]


def test_items_are_the_mapped_mean_of_t5s_own_states(model: DGIModel) -> None:
    encoder = model.encoder
    vectors = encoder.encode_items(encoder.prepare_items(CATALOG))
    for text, vector in zip(CATALOG.texts, vectors, strict=True):
        states = encoder.stack(input_ids=torch.tensor([ids(text)]))
        torch.testing.assert_close(vector, encoder.output(states.last_hidden_state[0].mean(0)), rtol=1e-4, atol=1e-5)


def test_features_are_padded_cut_at_max_tokens_and_blank_for_blank_texts(model: DGIModel) -> None:
    """A blank text once read as "</s>" beside others and as nothing alone: one query, two vectors."""
    encoder = model.encoder
    features = encoder.prepare_queries(["w0 w1 w2 w3 w4 w5 w6", "", "w9", " "])
    assert features.tolist() == [[3, 4, 5, 6, 7, 1], [0] * 6, [12, 1, 0, 0, 0, 0], [0] * 6]
    assert encoder.prepare_queries(["", ""]) is None
    assert encoder.prepare_items(Catalog((), ())).shape[0] == 0


def test_query_reads_its_text_then_its_history_oldest_first_without_holes(model: DGIModel) -> None:
    read = read_tokens(model.encoder, [[-1, 1, 3], [0, -1, -1], [-1, -1, -1]], ["w20", "", "w21 w22"])
    assert read == [ids("w20") + ids("w3") + ids("w9 w10"), ids("w0 w1 w2"), ids("w21 w22")]
    assert read_tokens(model.encoder, [[4, 1]]) == [ids("w11 w12 w13") + ids("w3")]


def test_too_long_a_history_loses_its_oldest_tokens(model: DGIModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut at the end would drop the newest titles, which say most."""
    monkeypatch.setattr(dgi.model.t5, "MAX_SEQUENCE", 7)
    whole = ids("w0 w1 w2") + ids("w3") + ids("w9 w10")
    assert read_tokens(model.encoder, [[0, 1, 3]], ["w20 w21"]) == [ids("w20 w21") + whole[-4:]]
    assert read_tokens(model.encoder, [[0, 1, 3]]) == [whole[-7:]]
    monkeypatch.setattr(dgi.model.t5, "MAX_SEQUENCE", 2)
    assert read_tokens(model.encoder, [[0, 1, 3]], ["w20 w21"]) == [ids("w20 w21")[:2]]


def test_padding_changes_nothing(model: DGIModel) -> None:
    """Alone or beside a longer query, with more or fewer columns of padding: one vector, one hidden state."""
    encoder, inputs = model.encoder, torch.randn(1, 2, 16)
    alone = encode(encoder, [[1]], ["w20"])
    beside = encode(encoder, [[-1, -1, 1], [0, 2, 4]], ["w20", "w21 w22 w23 w24"])
    torch.testing.assert_close(beside.vector[:1], alone.vector, rtol=1e-4, atol=1e-5)
    hidden = model.decoder(inputs.repeat(2, 1, 1), beside.memory, beside.mask)
    torch.testing.assert_close(hidden[:1], model.decoder(inputs, alone.memory, alone.mask), rtol=1e-4, atol=1e-5)

    features = encoder.prepare_items(CATALOG)
    wide = torch.nn.functional.pad(features[1:2], (3, 9))
    torch.testing.assert_close(encoder.encode_items(wide), encoder.encode_items(features)[1:2], rtol=1e-4, atol=1e-5)


def test_a_query_of_nothing_and_a_batch_of_none_are_finite(model: DGIModel) -> None:
    for query in (encode(model.encoder, [[-1, -1], [-1, -1]]), encode(model.encoder, [[-1], [2]], ["", "w1"])):
        assert query.mask.any(1).all()
        assert model.decoder(torch.zeros(2, 1, 16), query.memory, query.mask).isfinite().all()
        assert query.vector.isfinite().all()
    alone, beside = encode(model.encoder, [[-1]]), encode(model.encoder, [[-1], [2]], ["", "w1"])
    torch.testing.assert_close(beside.vector[:1], alone.vector, rtol=1e-4, atol=1e-5)

    empty = make_batch(model.encoder.prepare_items(CATALOG), torch.empty(0, 3, dtype=torch.int64), None, None)
    query = model.encoder.encode_queries(empty, torch.empty(0, 16))
    assert query.vector.shape == (0, 16)
    assert model.decoder(torch.zeros(0, 2, 16), query.memory, query.mask).shape == (0, 3, 16)
    no_history = make_batch(
        model.encoder.prepare_items(CATALOG),
        torch.empty(1, 0, dtype=torch.int64),
        None,
        model.encoder.prepare_queries(["w20"]),
    )
    torch.testing.assert_close(
        model.encoder.encode_queries(no_history, torch.empty(0, 16)).vector,
        encode(model.encoder, [[-1]], ["w20"]).vector,
    )


def test_decoder_is_causal_and_reads_every_code_before(model: DGIModel) -> None:
    query = encode(model.encoder, [[1, 2]])
    inputs = torch.randn(1, 3, 16, requires_grad=True)
    hidden = model.decoder(inputs, query.memory.detach(), query.mask)
    for j in range(4):
        (gradient,) = torch.autograd.grad(hidden[0, j].square().sum(), inputs, retain_graph=True)
        assert (gradient[0, j:] == 0).all()
        assert (gradient[0, :j].abs().sum(1) > 0).all()
    torch.testing.assert_close(
        model.decoder(inputs[:, :1], query.memory, query.mask), hidden[:, :2], rtol=1e-4, atol=1e-5
    )


def test_decoder_computes_what_t5_computes() -> None:
    """Against transformers' own model fed the same token embeddings; with dim = d_model nothing is projected."""
    reference = T5Model(T5Config(**SMALL)).eval()
    tokens, mask = torch.randint(2, 48, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    codes = torch.randint(2, 48, (2, 3))
    with torch.no_grad():
        memory = reference.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        expected = reference(
            input_ids=tokens, attention_mask=mask, decoder_input_ids=torch.nn.functional.pad(codes, (1, 0))
        ).last_hidden_state
        inputs = reference.shared(codes)
        decoder = T5Decoder(make_config(dim=32), reference).eval()
        decoder.output = torch.nn.Identity()
        torch.testing.assert_close(decoder(inputs, memory, mask.bool()), expected, rtol=1e-4, atol=1e-5)


def test_next_token_loss_reaches_the_items_through_soft_teacher_forcing(backbone: Path) -> None:
    """The linear map behind the mean gives z and z_q, not the memory: the loss reaches it through z̃ or not at all."""
    for gradient in ("soft", "detached"):
        model = DGIModel(make_config(backbone, gradient=gradient)).eval()
        output = model(make_test_batch(model.encoder, [[0, 1], [2, -1]], ["w20", "w21"], [3, 4]), seed=1)
        DGILoss()(output, model.heads, model.quantizer.codebooks)["ntp"].backward()
        reached = model.encoder.output.weight.grad
        assert reached is None if gradient == "detached" else reached.abs().sum() > 0
        for name, parameter in [*model.decoder.named_parameters(), *model.encoder.stack.named_parameters()]:
            assert parameter.grad.abs().sum() > 0, name


def test_a_few_steps_reduce_the_loss(backbone: Path) -> None:
    model = DGIModel(make_config(backbone))
    batch = make_test_batch(
        model.encoder, [[0, 1], [2, -1], [5, 0], [-1, -1]], ["w20", "w21", "", "w22 w3"], targets=[3, 4, 2, 1]
    )
    objective, optimizer = DGILoss(), torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for step in range(40):
        loss = objective(model(batch, tau=0.5, seed=step), model.heads, model.quantizer.codebooks)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())  # else data-parallel training would wait for ever
        optimizer.step()
        losses.append(loss.item())
    # The targets are the items' own codes and still jump, so single steps go up; 150 seeds gave 0.48 at most.
    assert min(losses[-10:]) < 0.8 * losses[0]


def test_search_sees_the_logits_of_teacher_forcing(model: DGIModel) -> None:
    """Two beams per request, the second from the first's parent, against one pass over whole prefixes."""
    query = encode(model.encoder, [[0, 1], [2, -1]], ["w20", "w21"])
    step = model.beam_step_function(query)
    first, second = torch.tensor([[1, 4], [0, 7]]), torch.tensor([[2, 5], [3, 0]])
    parents = torch.tensor([[1, 1], [0, 1]])
    steps = [step(0, None, None), step(1, first, torch.zeros(2, 2, dtype=torch.int64)), step(2, second, parents)]
    logits = [states.logits() for states in steps]
    for row in range(2):
        for beam in range(2):
            chosen = [first[row, parents[row, beam]], second[row, beam]]
            vectors = torch.stack([model.quantizer.embed(code, level) for level, code in enumerate(chosen)])
            hidden = model.decoder(vectors[None], query.memory[row : row + 1], query.mask[row : row + 1])[0]
            found = logits[0][row, 0], logits[1][row, parents[row, beam]], logits[2][row, beam]
            for level in range(3):
                torch.testing.assert_close(found[level], model.heads[level](hidden[level]), rtol=1e-4, atol=1e-4)


def test_backbone_and_weights_rebuild_the_model(model: DGIModel, tmp_path: Path) -> None:
    """What a checkpoint does; every tensor is stored once (safetensors refuses shared memory)."""
    safetensors = pytest.importorskip("safetensors.torch")
    model.encoder.save_backbone(tmp_path / "backbone")
    assert {path.name for path in (tmp_path / "backbone").iterdir()} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    encoder = {name: value for name, value in model.state_dict().items() if not name.startswith("heads.")}
    safetensors.save_file(encoder, tmp_path / "model.safetensors")

    rebuilt = DGIModel(dataclasses.replace(model.config, pretrained=str(tmp_path / "backbone"))).eval()
    missing, unexpected = rebuilt.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=False)
    assert not unexpected
    assert all(name.startswith("heads.") for name in missing)
    ours, theirs = (encode(m.encoder, [[0, 1], [2, -1]], ["w20", "w21 w22"]) for m in (model, rebuilt))
    inputs = torch.randn(2, 2, 16)
    assert torch.equal(ours.vector, theirs.vector)
    assert torch.equal(
        model.decoder(inputs, ours.memory, ours.mask), rebuilt.decoder(inputs, theirs.memory, theirs.mask)
    )


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_pretrained_weights_are_loaded_as_float32(backbone: Path, stored: str) -> None:
    """A checkpoint in bfloat16 would else train in bfloat16 without a word."""
    original = T5ForConditionalGeneration(T5Config(**SMALL)).to(getattr(torch, stored))
    original.save_pretrained(backbone)
    config = make_config(backbone)
    for part, expected in (
        (T5Encoder.from_pretrained(config), original.encoder),
        (T5Decoder.from_pretrained(config), original.decoder),
    ):
        names = {name for name, _ in part.stack.named_parameters()}
        assert names and names <= {name for name, _ in expected.named_parameters()}
        assert all(module.training for module in part.modules())
        for name, parameter in part.stack.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected.get_parameter(name).float()), name
    assert torch.equal(T5Decoder.from_pretrained(config).bos, original.shared.weight[0].float())


@pytest.mark.parametrize("kind", [T5Config, MT5Config, UMT5Config], ids=lambda kind: kind.model_type)
def test_the_whole_family_makes_a_model_from_one_transformer(kind: type) -> None:
    """Encoder and decoder share no parameter, so that each is stored and updated once."""
    transformer = AutoModel.from_config(kind(**SMALL, feed_forward_proj="gated-gelu"))
    config = make_config()
    encoder, decoder = T5Encoder(config, transformer, make_tokenizer()), T5Decoder(config, transformer)
    assert not {*encoder.parameters()} & {*decoder.parameters()}
    model = DGIModel(config, encoder, decoder)
    output = model(make_test_batch(encoder, [[0, 1], [2, -1]], None, [3, 4]), seed=0)
    DGILoss()(output, model.heads, model.quantizer.codebooks)["loss"].backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", [T5Config, MT5Config, UMT5Config], ids=lambda kind: kind.model_type)
@pytest.mark.parametrize("projection", ["relu", "gated-gelu"])
@torch.no_grad()
def test_steps_with_a_cache_compute_what_t5_computes(kind: type, projection: str, trie_depth: int = 3) -> None:
    """Three beams of two requests, reordered twice, against T5's decoder over whole prefixes."""
    transformer = AutoModel.from_config(kind(**SMALL, feed_forward_proj=projection))
    for parameter in transformer.parameters():  # position biases must matter
        torch.nn.init.normal_(parameter, std=0.5)
    decoder = T5Decoder(make_config(), transformer).eval()
    width = transformer.config.d_model
    memory, mask = torch.randn(2, 6, width), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    cache, prefix = decoder.start_search(memory, mask), torch.empty(2, 1, 0, make_config().dim)
    inputs = parents = None
    for _ in range(trie_depth):
        hidden, cache = decoder.search_step(cache, inputs, parents)
        if inputs is not None:
            rows = parents[..., None, None].expand(-1, -1, *prefix.shape[2:])
            prefix = torch.cat([prefix.gather(1, rows), inputs.unsqueeze(2)], 2)
        beams = prefix.shape[1]
        whole = decoder(prefix.flatten(0, 1), memory.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0))[
            :, -1
        ]
        torch.testing.assert_close(hidden.flatten(0, 1), whole, rtol=1e-4, atol=1e-4)
        inputs, parents = torch.randn(2, 3, prefix.shape[3]), torch.randint(beams, (2, 3))


def test_a_dense_dual_encoder_holds_no_decoder(backbone: Path) -> None:
    names = [name for name, _ in DualEncoder(make_config(backbone)).named_parameters()]
    assert not [name for name in names if "EncDec" in name or "decoder" in name]


def test_bfloat16_autocast_stays_close(model: DGIModel) -> None:
    inputs = torch.randn(2, 2, 16)
    exact = encode(model.encoder, [[0, 1], [2, -1]])
    with torch.autocast("cpu", torch.bfloat16):
        rough = encode(model.encoder, [[0, 1], [2, -1]])
        hidden = model.decoder(inputs, rough.memory, rough.mask)
    torch.testing.assert_close(rough.vector.float(), exact.vector, rtol=0.1, atol=0.05)
    torch.testing.assert_close(hidden.float(), model.decoder(inputs, exact.memory, exact.mask), rtol=0.1, atol=0.1)


def test_what_is_no_t5_is_refused_by_name(tmp_path: Path) -> None:
    BertConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    for part in (T5Encoder, T5Decoder):
        with pytest.raises(ValueError, match=r"pretrained must be a T5-family model \(t5, mt5, umt5\); got a 'bert'"):
            part.from_pretrained(make_config(tmp_path))


def test_folders_that_cannot_be_loaded_are_named(backbone: Path, tmp_path: Path) -> None:
    """Weights that are there but unreadable must not pass for "no weights", which means random ones."""
    (tmp_path / "empty").mkdir()
    for folder, spoil in ((tmp_path / "empty", None), (backbone, "pytorch_model.bin"), (backbone, "model.safetensors")):
        if spoil:
            (folder / spoil).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=f"pretrained must be a T5-family model that can be.*{folder.name}"):
            T5Encoder.from_pretrained(make_config(folder))
    (backbone / "model.safetensors").unlink()
    (backbone / "pytorch_model.bin").unlink()
    (backbone / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer's files"):
        T5Encoder.from_pretrained(make_config(backbone))


def test_an_unknown_name_without_a_network_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/no-such-t5' cannot[\s\S]*hf download nobody/no-such-t5"):
        T5Encoder.from_pretrained(make_config("nobody/no-such-t5"))


def test_objects_that_do_not_fit_are_refused() -> None:
    transformer, tokenizer = T5Model(T5Config(**SMALL)), make_tokenizer()
    with pytest.raises(ValueError, match="tokenizer must have at most the 40 tokens"):
        T5Encoder(make_config(), T5Model(T5Config(**{**SMALL, "vocab_size": 40})), tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer must have a pad token"):
        T5Encoder(make_config(), transformer, tokenizer)
    with pytest.raises(ValueError, match="transformer must have a decoder; got T5EncoderModel"):
        T5Decoder(make_config(), T5EncoderModel(T5Config(**SMALL)))


def test_encoder_made_from_objects_saves_a_backbone_that_has_a_decoder(tmp_path: Path) -> None:
    """T5EncoderModel marks its configuration as encoder-only; the decoder must be rebuilt all the same."""
    config = make_config(tmp_path / "saved")
    T5Encoder(config, T5EncoderModel(T5Config(**SMALL, num_decoder_layers=1)), make_tokenizer()).save_backbone(
        tmp_path / "saved"
    )
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["num_decoder_layers"] == 1
    assert len(T5Decoder.from_pretrained(config).stack.block) == 1


def test_without_transformers_the_cure_is_named() -> None:
    program = "import sys; sys.modules['transformers'] = None; import dgi.model.t5"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ModuleNotFoundError: encoder \"t5\" needs the package transformers: pip install 'dgi-kernels[hf]'" in (
        result.stderr
    )
