"""Words of a text in any script, for the hashing text encoder.

A text is brought to one form first: NFKC, case folded, without characters that show nothing (joiners, marks of
direction, variation selectors).  Then its tokens are

- words: letters, digits and ``_`` with their combining marks (vowel signs, tones, accents);
- of scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Javanese, …) every two
  neighbouring letters with their marks, or a single letter;
- symbols and emoji, each by itself, and ``# % & * @``: "C++" is not "C#";
- of a text that has none of these, every character that is no space.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from itertools import pairwise

_LAST_MARK = 0x20000  # behind it there are only ideographs and the tags and selectors that are left out
_UNSPACED = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x1950, 0x19DF),
    (0x1A20, 0x1AAF),
    (0x1B00, 0x1B7F),
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xA980, 0xA9FF),
    (0xAA60, 0xAA7F),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_EMOJI = "\U0001f000-\U0001fbff"  # those of later versions of Unicode too
_SEPARATORS = "|~^`"
_MORE_SYMBOLS = "#%&*@"
_ASCII_TOKEN = re.compile(r"\w+|[$+<=>#%&*@]")  # what the pattern for all scripts finds in ASCII, six times as fast


def split_words(text: str) -> list[str]:
    """The tokens of a text, in order; none where it is empty or shows nothing."""
    text = _one_form(text)
    tokens: list[str] = _ASCII_TOKEN.findall(text) if text.isascii() else _tokens_of_any_script(text)
    return tokens or [character for character in text if not character.isspace()]


def _tokens_of_any_script(text: str) -> list[str]:
    tokens: list[str] = []
    for unspaced, other in _token_pattern().findall(text):
        if not unspaced:
            tokens.append(other)
            continue
        letters = _letter_pattern().findall(unspaced)
        tokens += map("".join, pairwise(letters)) if len(letters) > 1 else letters
    return tokens


def _one_form(text: str) -> str:
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _ignorable_pattern().sub("", text)


@functools.cache
def _token_pattern() -> re.Pattern[str]:
    marks, unspaced = _marks(), _unspaced_letters()
    symbols = _category_class("S", _SEPARATORS) + re.escape(_MORE_SYMBOLS) + _EMOJI
    return re.compile(
        rf"([{unspaced}][{unspaced}{marks}]*)|((?![{unspaced}])\w(?:(?![{unspaced}])[\w{marks}])*"
        rf"|[{symbols}])"
    )


@functools.cache
def _letter_pattern() -> re.Pattern[str]:
    return re.compile(rf"[{_unspaced_letters()}][{_marks()}]*")


@functools.cache
def _ignorable_pattern() -> re.Pattern[str]:
    return re.compile(rf"[{_category_class('Cf')}\ufe00-\ufe0f\U000e0000-\U000e0fff]")


@functools.cache
def _marks() -> str:
    return _category_class("M")


@functools.cache
def _unspaced_letters() -> str:
    return "".join(
        _class([code for code in range(first, last + 1) if unicodedata.category(chr(code))[0] == "L"])
        for first, last in _UNSPACED
    )


def _category_class(category: str, without: str = "") -> str:
    """The characters of a category of Unicode, given by the beginning of its name, as the inside of a ``[…]``."""
    return _class(
        [
            code
            for code in range(_LAST_MARK)
            if chr(code) not in without and unicodedata.category(chr(code)).startswith(category)
        ]
    )


def _class(codes: list[int]) -> str:
    """Ascending code points as ranges."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in ranges)
