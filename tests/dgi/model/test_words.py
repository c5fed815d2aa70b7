"""Words of all scripts, the words that older models were trained with, and tokenizers of the user's own."""

from __future__ import annotations

import json
import logging
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from dgi.config import WORDS_1, WORDS_2, ModelConfig, from_dict, from_file, to_dict
from dgi.data import Catalog
from dgi.model import words
from dgi.model.dgi_model import DGIModel
from dgi.model.encoders import SequenceEncoder, hash_words
from dgi.model.words import split_words
from dgi.training.checkpoint import load_model, read_tensors, save_model, write_tensors
from tests.dgi.tiny_runs import MODEL


def same_tokens(a: str, b: str, tokenizer: str = WORDS_2) -> bool:
    return torch.equal(hash_words([a], 16384, 8, tokenizer), hash_words([b], 16384, 8, tokenizer))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("பூ", "பு"),
        ("ไม่", "ไม"),
        ("किताब", "कतब"),
        ("C++", "C#"),
        ("C", "C#"),
        ("🎬", "$"),
        ("👍🏽", "👍"),
        ("...", "!!!"),
        ("流浪地球", "流浪地图"),
        ("résumé", "resume"),
        ("שָׁלוֹם", "שלום"),
    ],
)
def test_other_words_have_other_tokens(a: str, b: str) -> None:
    """Guards against vowel signs, tones, accents and symbols that are taken for gaps."""
    assert not same_tokens(a, b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("café", unicodedata.normalize("NFD", "café")),
        ("Straße", "STRASSE"),
        ("ＡＢＣ １２", "abc 12"),
        ("ﬁn", "fin"),
        ("می‌خواهم", "میخواهم"),
        ("❤️", "❤"),
        ("a\u200eb", "ab"),
        ("Beauty, and: the Beast!", "beauty and the beast"),
    ],
)
def test_one_text_in_two_spellings_has_one_list_of_tokens(a: str, b: str) -> None:
    assert same_tokens(a, b)


def test_words_by_script() -> None:
    assert split_words("किताब और क़लम") == ["किताब", "और", unicodedata.normalize("NFKC", "क़लम")]
    assert split_words("流浪地球 2") == ["流浪", "浪地", "地球", "2"] and split_words("猫") == ["猫"]
    assert split_words("iPhone用ケース") == ["iphone", "用ケ", "ケー", "ース"]
    assert split_words("The Matrix (1999) & foo_bar's $5") == ["the", "matrix", "1999", "&", "foo_bar", "s", "$", "5"]
    assert split_words("👩‍🚀🎬") == ["👩", "🚀", "🎬"]
    assert split_words("  \u200b ") == [] and split_words("?!") == ["?", "!"]
    assert split_words("a\ud800b") == ["a", "b"]


def test_the_short_way_for_ascii_finds_the_same() -> None:
    text = "".join(map(chr, range(128))).lower()
    texts = [text, *(f"a{character}b {character}" for character in text)]
    for given in texts:
        assert words._ASCII_TOKEN.findall(given) == words._tokens_of_any_script(given)


def test_tokens_of_old_models_stay() -> None:
    """Guards against a change of what saved models and their indexes were made of: buckets as version 0.1.0 gave."""
    tokens = hash_words(["The Café (1995), C++", "किताब"], 16384, 8, WORDS_1)
    assert tokens.tolist() == [[7936, 9588, 220, 14935], [2635, 3456, 11843, 0]]


def test_a_model_of_a_version_without_tokenizers_keeps_its_vectors(tmp_path: Path) -> None:
    catalog = Catalog(("a", "b"), ("Größe C++", "किताब"))
    old = DGIModel(from_dict(ModelConfig, MODEL | {"tokenizer": WORDS_1})).eval()
    path = tmp_path / "model.safetensors"
    save_model(old, path)
    tensors, description = read_tensors(path, "DGIModel")
    del description["model_config"]["tokenizer"], description["version"]
    write_tensors(path, tensors, description)
    loaded = load_model(path)
    assert loaded.config.tokenizer == WORDS_1 and ModelConfig().tokenizer == WORDS_2
    features = loaded.encoder.prepare_items(catalog)
    assert torch.equal(features, hash_words(catalog.texts, MODEL["vocabulary_size"], MODEL["max_tokens"], WORDS_1))
    assert torch.equal(loaded.encoder.encode_items(features), old.encoder.encode_items(features))


def test_a_stored_configuration_is_read_as_it_was_meant() -> None:
    stored = to_dict(ModelConfig(dim=8))
    assert from_file(ModelConfig, stored) == ModelConfig(dim=8)
    del stored["tokenizer"]
    assert from_file(ModelConfig, stored) == ModelConfig(dim=8, tokenizer=WORDS_1)


def test_items_without_a_word_are_told(caplog: pytest.LogCaptureFixture) -> None:
    encoder = SequenceEncoder(from_dict(ModelConfig, MODEL))
    with caplog.at_level(logging.WARNING, "dgi"):
        encoder.prepare_items(Catalog(("a", "b"), ("word", "?")))
        assert not caplog.records
        encoder.prepare_items(Catalog(("a", "b", "c"), ("word", "\u200b", "\u00ad")))
    assert "2 of 3 items" in caplog.text and "item 'b'" in caplog.text


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    """A tokenizer of three words, that would pad and cut if it were let."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "red": 1, "green": 2, "blue": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=9)
    tokenizer.enable_truncation(1)
    folder = tmp_path / "colours"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_of_ones_own_is_read_and_goes_with_the_model(tmp_path: Path, tokenizer_file: Path) -> None:
    catalog = Catalog(("a", "b", "c"), ("green red blue red green", "blue", "mauve \ud7ff"))
    for name in (tokenizer_file, tokenizer_file.parent):
        model = DGIModel(from_dict(ModelConfig, MODEL | {"tokenizer": str(name), "max_tokens": 4})).eval()
        features = model.encoder.prepare_items(catalog)
        assert features.tolist() == [[3, 2, 4, 2], [4, 0, 0, 0], [1, 1, 0, 0]]
        assert model.encoder.tower.words.num_embeddings == 5
    z = model.encoder.encode_items(features)
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    tokenizer_file.unlink()
    tokenizer_file.parent.rmdir()
    loaded = load_model(path)
    assert torch.equal(loaded.encoder.prepare_items(catalog), features)
    assert torch.equal(loaded.encoder.encode_items(features), z)
    save_model(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_tokenizer_that_cannot_be_had_is_told(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(ValueError, match="broken.json' cannot be read: it must be a tokenizer.json"):
        SequenceEncoder(ModelConfig(tokenizer=str(tmp_path / "broken.json")))
    with pytest.raises(ValueError, match="tokenizer must be"):
        ModelConfig(tokenizer="")
    path = tmp_path / "model.safetensors"
    save_model(DGIModel(from_dict(ModelConfig, MODEL | {"tokenizer": str(tokenizer_file)})), path)
    tensors, description = read_tensors(path, "DGIModel")
    del description["version"]
    write_tensors(path, tensors | {"tokenizer": torch.zeros(3, dtype=torch.uint8)}, description)
    with pytest.raises(ValueError, match="model.safetensors holds a tokenizer that the installed package"):
        load_model(path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        SequenceEncoder(ModelConfig(tokenizer=str(tokenizer_file)))
