"""A tokenizer of the user's own for the text encoder, one of the package tokenizers (Hugging Face)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Tokenizer:
    """Cuts texts into the tokens of a vocabulary; made by :meth:`open` or :meth:`from_bytes`.

    Attributes:
        size: the number of tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def open(cls, name: str) -> Tokenizer:
        """Read a file, a folder with a ``tokenizer.json``, or what the Hugging Face hub has under that name.

        Raises:
            ImportError: the package tokenizers is not installed.
            ValueError: there is no such tokenizer, or it cannot be read.
        """
        library = _library(name)
        path = Path(name)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file() and (path.suffix == ".json" or path.is_absolute()):
            raise ValueError(f"tokenizer {path}: there is no such file")  # the hub is not asked for what is a path
        try:
            return cls(library.from_file(str(path)) if path.is_file() else library.from_pretrained(name))
        except Exception as error:  # the library raises plain Exceptions, too
            raise ValueError(
                f"tokenizer {name!r} cannot be read: it must be a tokenizer.json of the package "
                f"tokenizers, a folder that holds one, or a name on the Hugging Face hub ({error})"
            ) from None

    @classmethod
    def from_bytes(cls, content: bytes, origin: object) -> Tokenizer:
        """Read what :meth:`to_bytes` gave; ``origin`` is the file that messages name."""
        try:
            return cls(_library(origin).from_str(content.decode()))
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(
                f"{origin} holds a tokenizer that the installed package tokenizers cannot read "
                f"({error}); update it: pip install -U tokenizers"
            ) from None

    def to_bytes(self) -> bytes:
        """The tokenizer as a ``tokenizer.json``."""
        return self._tokenizer.to_str().encode()

    def rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """The first tokens of every text, from 0 to ``size - 1``; without special tokens around them."""
        plain = [text.encode(errors="replace").decode() for text in texts]  # the library takes no lone surrogates
        return [encoding.ids[:max_tokens] for encoding in self._tokenizer.encode_batch(plain, add_special_tokens=False)]


def _library(name: object) -> Any:
    try:
        from tokenizers import Tokenizer as Library
    except ImportError as error:
        raise ImportError(
            f"the tokenizer of {name} needs the package tokenizers: pip install tokenizers ({error})"
        ) from error
    return Library
