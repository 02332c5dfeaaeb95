"""Which bytes of a text each of its tokens covers, exactly, and the proof that the tokens give the text back."""

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdbench.data.text import Once, encode
from kdbench.errors import UserError

_SPACE = "▁"  # how SentencePiece writes a space
_SHOWN = 24  # bytes of a text that a message quotes


class Encoded(NamedTuple):
    """A text in tokens.

    Attributes:
        ids: (n,) int32.
        ends: (n,) int32, where each token ends in the text's UTF-8, bytes. The space that SentencePiece puts before a text is not
            part of it: a token of nothing but this space ends at 0.
        difference: None if the tokens stand for exactly the text's bytes, else where they first differ.
    """

    ids: np.ndarray
    ends: np.ndarray
    difference: str | None


class Spans:
    """Byte spans of the tokens of one tokenizer.

    Byte-level BPE and SentencePiece write the bytes of a token into its name, so that a token may hold a part of a character. Of other
    kinds only the characters that a token covers are known.

    Args:
        tokenizer: of transformers, with a backend of the `tokenizers` library.

    Raises:
        UserError: it has no such backend.
    """

    def __init__(self, tokenizer):
        if not tokenizer.is_fast:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer does not tell where its tokens stand in a text; it needs a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._bytes = token_bytes(tokenizer)
        if self._bytes is not None:
            self._sizes = np.array([len(token) for token in self._bytes], np.int64)
            (ids,) = encode(tokenizer, ["a"])["input_ids"]
            self._before = b" " if self._joined(ids) == b" a" else b""

    def encode(self, texts: Sequence[str], tokenizer: Once | None = None) -> list[Encoded]:
        """Tokens of each text, with their spans; `tokenizer` is this one, where it has read the texts before."""
        if self._bytes is None:
            found = encode(self._tokenizer, texts, return_offsets_mapping=True)
            rows = zip(texts, found["input_ids"], found["offset_mapping"], strict=True)
            return [self._by_characters(text, ids, offsets) for text, ids, offsets in rows]
        return [
            self._by_bytes(text, ids)
            for text, ids in zip(texts, encode(tokenizer or self._tokenizer, texts)["input_ids"], strict=True)
        ]

    def _joined(self, ids) -> bytes:
        return b"".join([self._bytes[token] for token in ids])

    def _by_bytes(self, text: str, ids: list[int]) -> Encoded:
        before = self._before if text else b""  # where there is no text, no space is put before it
        expected, found = before + text.encode(), self._joined(ids)
        row = np.array(ids, np.int32)
        ends = (self._sizes[row].cumsum() - len(before)).clip(min=0).astype(np.int32)
        return Encoded(row, ends, None if found == expected else _difference(expected, found))

    def _by_characters(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        bytes_before = np.cumsum([0, *(len(letter.encode()) for letter in text)])
        ends = bytes_before[[end for _, end in offsets]].astype(np.int32)
        found = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode()
        expected = text.encode()
        if found == expected and len(ids) and (ends[-1] != len(expected) or (np.diff(ends) < 0).any()):
            return Encoded(np.array(ids, np.int32), ends, "the tokens' offsets do not cover the text")
        return Encoded(np.array(ids, np.int32), ends, None if found == expected else _difference(expected, found))


def token_bytes(tokenizer) -> list[bytes] | None:
    """The bytes of every token by id, where their names tell them, else None. Those of a special token are its name."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    decoders = _decoders(backend["decoder"])
    if "ByteLevel" in decoders:
        letters = _byte_letters()

        def spell(token: str) -> bytes:
            return b"".join(letters.get(letter, letter.encode()) for letter in token)

    elif "Metaspace" in decoders or {"Replace", "ByteFallback"} <= decoders:
        single = re.compile(r"<0x([0-9A-F]{2})>") if "ByteFallback" in decoders else None

        def spell(token: str) -> bytes:
            match = single.fullmatch(token) if single else None
            return bytes.fromhex(match[1]) if match else token.replace(_SPACE, " ").encode()

    else:
        return None
    added = tokenizer.get_added_vocab()
    table = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    for token, index in tokenizer.get_vocab().items():
        table[index] = token.encode() if token in added else spell(token)
    return table


def _decoders(decoder: dict | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoders(part) for part in decoder.get("decoders", [])))


def _byte_letters() -> dict[str, bytes]:
    """The letters in which byte-level BPE writes bytes (Radford et al. 2019): printable Latin-1 is itself, the rest starts at 256."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): bytes([byte]) for byte in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(other)}


def _difference(expected: bytes, found: bytes) -> str:
    same = min(len(expected), len(found))
    at = next((at for at in range(same) if expected[at] != found[at]), same)
    return f"at byte {at} the text has {_quoted(expected, at)}, its tokens {_quoted(found, at)}"


def _quoted(text: bytes, at: int) -> str:
    piece = text[at : at + _SHOWN].decode("utf-8", errors="backslashreplace")
    return repr(piece) if piece else "nothing more"
