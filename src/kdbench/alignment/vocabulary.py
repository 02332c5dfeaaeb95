"""How the tokens of two tokenizers relate, from their texts alone, computed once for a pair of tokenizers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from kdbench import files, progress
from kdbench.alignment.spelling import bare
from kdbench.data.spans import token_bytes
from kdbench.errors import UserError
from kdbench.signals import Vocabulary

KIND = "vocabulary"
_FILE = "vocabulary.safetensors"
_PART = 512  # texts of the teacher compared at once; with 50,000 texts of the student this takes 25 MB
_SPACE = (b" ", b"\t", b"\n", b"\r", b"\v", b"\f")
PIECE, BYTE, SPECIAL = 0, 1, 2


@dataclass(frozen=True)
class Texts:
    """What the tokens of a tokenizer stand for.

    Attributes:
        texts: bytes of each token, by id.
        kinds: (V,) int8, PIECE; BYTE: a byte that no piece is at hand for, as SentencePiece has them; SPECIAL: a token that no text is
            written in, its bytes are its name.
        end: id of the end of text.
    """

    texts: Sequence[bytes]
    kinds: np.ndarray
    end: int

    @property
    def fingerprint(self) -> str:
        """A name for this content."""
        return files.fingerprint([[text.hex() for text in self.texts], self.kinds.tolist(), self.end])


def texts_of(tokenizer) -> Texts:
    """What the tokens of a tokenizer of transformers stand for.

    Raises:
        UserError: its ids are not 0 to V - 1.
    """
    vocabulary, size = tokenizer.get_vocab(), len(tokenizer)
    if max(vocabulary.values()) >= size:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has {size} tokens, and ids up to {max(vocabulary.values())}"
        )
    texts = token_bytes(tokenizer) or [tokenizer.decode([token]).encode() for token in range(size)]
    kinds = np.zeros(size, np.int8)
    byte = re.compile(r"<0x[0-9A-F]{2}>")
    kinds[[token for name, token in vocabulary.items() if len(texts[token]) == 1 and byte.fullmatch(name)]] = BYTE
    kinds[[token for token, added in tokenizer.added_tokens_decoder.items() if added.special]] = SPECIAL
    return Texts(texts, kinds, tokenizer.eos_token_id)


def relate(student: Texts, teacher: Texts) -> Vocabulary:
    """The relation of two vocabularies.

    The nearest token of the student is, in this order: for the end of text the end of text, and for no other token; a token of the same
    bytes, of the same kind if there is one, a special one only for a special one; a piece of the same bytes but for spaces (the marker of
    a word's start); a piece of minimum edit distance between the bytes without spaces. Of several such tokens it is the one with the lowest
    id, among tokens that differ in nothing but spaces the one that begins with a space as the teacher's does.
    """
    exact = _same_bytes(student, teacher)
    nearest, distance = exact.copy(), np.zeros(len(exact), np.int64)
    missing = np.flatnonzero(exact < 0)
    choice = np.flatnonzero(student.kinds == PIECE)
    choice = choice[choice != student.end]
    found, distance[missing] = closest(
        [teacher.texts[token] for token in missing], [student.texts[token] for token in choice]
    )
    nearest[missing] = choice[found]
    return Vocabulary(
        torch.from_numpy(nearest),
        torch.from_numpy(distance),
        torch.from_numpy(_once(exact, teacher.kinds)),
        torch.from_numpy(_begins_word(student)),
        torch.from_numpy(_begins_word(teacher)),
    )


def closest(texts: Sequence[bytes], choice: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """For each text the one of a choice that is nearest to it, spaces aside.

    Args:
        texts: t texts.
        choice: at least one.

    Returns:
        (t,) int64, places in `choice`; (t,) int64, edit distances in bytes. Of equal distances the first one in `choice` counts; among
        texts that differ in spaces only, the first one that begins with a space where the text does.
    """
    stems: dict[bytes, int] = {}
    variants: dict[
        tuple[int, bool], int
    ] = {}  # (stem, whether it begins with a space) -> the first such text of the choice
    for place, text in enumerate(choice):
        stem = stems.setdefault(bare(text), len(stems))
        variants.setdefault((stem, text.startswith(b" ")), place)
    bares = [bare(text) for text in texts]
    asked = {stem: place for place, stem in enumerate(dict.fromkeys(bares))}
    stem, distance = _closest_stems(list(asked), stems)
    place = np.array([asked[of] for of in bares], np.int64)
    stem, distance = stem[place], distance[place]
    chosen = []
    for text, of in zip(texts, stem.tolist(), strict=True):
        spaced = text.startswith(b" ")
        chosen.append(variants[of, spaced] if (of, spaced) in variants else variants[of, not spaced])
    return np.array(chosen, np.int64), distance


def _closest_stems(texts: list[bytes], stems: dict[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each text the nearest stem, the first one of several, and its distance; (t,) int64 each.

    Texts are compared by length: stems that differ in length by d are at least d edits away, so that a text looks no further than its best
    distance so far.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    letters = [stem.decode("latin-1") for stem in stems]
    lengths = np.array([len(stem) for stem in letters])
    by_length = {length: np.flatnonzero(lengths == length) for length in np.unique(lengths).tolist()}
    sizes = np.array([len(text) for text in texts], np.int64)
    best, where = np.empty(len(texts), np.int64), np.empty(len(texts), np.int64)
    same = np.array([stems.get(text, -1) for text in texts], np.int64)
    best[same >= 0], where[same >= 0] = 0, same[same >= 0]
    open_ = np.flatnonzero(same < 0)
    order = open_[np.argsort(sizes[open_], kind="stable")]
    edges = np.flatnonzero(np.diff(sizes[order])) + 1
    groups = [
        part
        for group in np.split(order, edges)
        if len(group)
        for part in np.split(group, range(_PART, len(group), _PART))
    ]
    for group in progress.over("nearest tokens")(groups):
        size = int(sizes[group[0]])
        best[group], where[group] = np.iinfo(np.int64).max, len(letters)
        for apart in range(int(max(size - lengths.min(), lengths.max() - size)) + 1):
            left = group[best[group] >= apart]
            if not len(left):
                break
            asked = [texts[text].decode("latin-1") for text in left]
            for length in sorted({size - apart, size + apart} & by_length.keys()):
                among = by_length[length]
                limit = int(min(best[left].max(), max(size, length)))
                found = cdist(
                    asked,
                    [letters[stem] for stem in among],
                    scorer=Levenshtein.distance,
                    score_cutoff=limit,
                    dtype=np.int32,
                )
                first = found.argmin(1)
                distance, stem = found[np.arange(len(left)), first], among[first]
                better = (distance < best[left]) | ((distance == best[left]) & (stem < where[left]))
                best[left[better]], where[left[better]] = distance[better], stem[better]
    return where, best


def _same_bytes(student: Texts, teacher: Texts) -> np.ndarray:
    """(V_t,) int64, the student's token of the same bytes, or -1."""
    known: dict[tuple[bytes, int], int] = {}
    for token, (text, kind) in enumerate(zip(student.texts, student.kinds.tolist(), strict=True)):
        if token != student.end:
            known.setdefault((text, kind), token)
    found = np.full(len(teacher.texts), -1, np.int64)
    for token, (text, kind) in enumerate(zip(teacher.texts, teacher.kinds.tolist(), strict=True)):
        kinds = (SPECIAL,) if kind == SPECIAL else (kind, PIECE, BYTE)
        found[token] = next((known[text, of] for of in kinds if (text, of) in known), -1)
    found[teacher.end] = student.end
    return found


def _once(exact: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(k, 2) int64, tokens of student and teacher of the same bytes; of several of the teacher a piece, and the lowest id."""
    order = np.lexsort((np.arange(len(exact)), kinds))
    order = order[exact[order] >= 0]
    ours, first = np.unique(exact[order], return_index=True)
    return np.stack([ours, order[first]], axis=1)


def _begins_word(of: Texts) -> np.ndarray:
    """(V,) bool, whether a token begins with white space or is the end of text."""
    begins = np.array([text.startswith(_SPACE) for text in of.texts])
    begins[of.end] = True
    return begins


def save(folder, vocabulary: Vocabulary, **facts) -> None:
    """Write a relation and the manifest that describes it, all or nothing.

    Args:
        folder: where to.
        vocabulary: what to write.
        facts: what else the manifest is to say, such as the fingerprints of the tokenizers' texts (`tokenizers=`).
    """
    from safetensors.torch import save_file

    part = files.fresh_folder(folder)
    save_file({field.name: getattr(vocabulary, field.name).contiguous() for field in fields(vocabulary)}, part / _FILE)
    files.write_manifest(part, KIND, **facts)
    files.finish_folder(folder)


def load(folder, expected_tokenizers: dict[str, str] | None = None) -> Vocabulary:
    """What `save` wrote.

    Args:
        folder: where it lies.
        expected_tokenizers: fingerprints of the texts of the tokenizers that it has to be of, by "student" and "teacher".

    Raises:
        UserError: the folder is not finished, damaged, or of other tokenizers.
    """
    from safetensors.torch import load_file

    made_of = files.read_manifest(folder, KIND).get("tokenizers")
    if expected_tokenizers not in (None, made_of):
        raise UserError(
            f"{folder} is stale: it is of the tokenizers {made_of}, the run asks for {expected_tokenizers}; "
            f"make it anew: snakemake --cores all --forcerun {files.folder_of(folder) / files.MANIFEST}"
        )
    return Vocabulary(**load_file(files.folder_of(folder) / _FILE))
