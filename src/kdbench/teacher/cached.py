"""The teacher on disk: its final hidden states at response positions, written in one pass and read a few rows at a time.

A cache folder holds

    part0/ ... part7/   the records in order, cut where each part has about as many tokens; written by one job or by several
        hidden.safetensors  `hidden` (N, d): the state that predicts each response token, record after record; `starts` (R + 1) int64: where
                            each record of the part begins in it
        head.safetensors    in the first part alone: `weight` (V, d) and `bias` (V) of the head; `embedding` (V, d_embedding), unless it
                            equals the head's weight
        manifest.json       of this part
    manifest.json       fingerprints of the teacher and of the tokenised records, sizes, the files of all parts

With the head, hidden states give every logit: no top-k, no loss of probability mass. They take d / V of the space of logits. Into how many
parts they are cut does not depend on the number of jobs, so that one may change without the other.
"""

import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench import files, models
from kdbench.data import batches
from kdbench.data.batches import Side
from kdbench.data.tokens import TokenSide
from kdbench.errors import UserError
from kdbench.methods.base import Shape
from kdbench.settings import CACHE_PARTS
from kdbench.signals import Head, Signal
from kdbench.teacher.parts import HEAD, HIDDEN, KIND, PART_KIND, join, part_name

_DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}
_ADVICE = "set `cache_dtype: bfloat16` or `training.teacher: live`"


def write(folder, model, tokenizer_size: int, tokens: TokenSide, dtype: str, batch_size: int, *args, **kwargs) -> dict:
    """`write_parts` for the whole cache, and `join`; the same arguments, and the manifest of the cache."""
    write_parts(folder, model, tokenizer_size, tokens, dtype, batch_size, *args, **kwargs)
    return join(folder)


def write_parts(
    folder,
    model,
    tokenizer_size: int,
    tokens: TokenSide,
    dtype: str,
    batch_size: int,
    progress: Callable[[Iterable], Iterable] = iter,
    parts: Sequence[int] = range(CACHE_PARTS),
    *,
    teacher_fingerprint: str,
    tokens_fingerprint: str,
) -> None:
    """Run a teacher once over the records of some parts and keep its hidden states at response positions.

    Args:
        folder: of the cache; each part is replaced as a whole when it is finished.
        model: causal language model in evaluation mode, on its device.
        tokenizer_size: number of tokens of its tokenizer.
        tokens: the teacher's side of the tokenised records, all of them.
        dtype: "bfloat16" or "float32", of the hidden states; the head keeps the model's type.
        batch_size: sequences of one forward pass.
        progress: wraps the iteration over batches, to show how far it is.
        parts: which to write, numbers below CACHE_PARTS.
        teacher_fingerprint: names the teacher's weights.
        tokens_fingerprint: names the tokenised records.

    Raises:
        UserError: the model has too few positions; the disk is too small; a hidden state is not finite.
    """
    models.check_positions(model, int(tokens.lengths.max()))
    check_space(folder, model, tokens, dtype, parts)
    models.pack(model)
    kept, name = _DTYPES[dtype]
    head = models.head(model, tokenizer_size)
    width, row_bytes = head.weight.shape[1], head.weight.shape[1] * kept.itemsize
    bounds, starts = part_bounds(tokens), tokens.response_starts.astype(np.int64)
    folders = {part: Path(folder) / part_name(part) for part in parts}
    facts = {"teacher": teacher_fingerprint, "tokens": tokens_fingerprint, "dtype": dtype}
    facts |= {"width": width, "vocabulary": tokenizer_size}

    rows = np.concatenate([np.arange(bounds[part], bounds[part + 1]) for part in parts])
    rows = rows[
        np.argsort(-tokens.lengths[rows], kind="stable")
    ]  # too long a batch fails at once, not in the last minute
    of_row = np.searchsorted(bounds, np.arange(tokens.rows), side="right") - 1
    with ExitStack() as stack:
        opened = {}
        for part, place in folders.items():
            file = stack.enter_context(open(files.fresh_folder(place) / HIDDEN, "wb"))
            of_part = starts[bounds[part] : bounds[part + 1] + 1]
            first = _write_header(file, name, (int(of_part[-1] - of_part[0]), width), row_bytes, of_part - of_part[0])
            opened[part] = file, first - int(of_part[0]) * row_bytes
        for batch in progress([rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]):
            side = batches.side(tokens, batch).to(model.device)
            with torch.no_grad():
                hidden = models.response_rows(model, side).hidden.to(kept)
            finite = hidden.isfinite().all(-1)
            if not finite.all():
                record = int(batch[side.sequence[~finite][0].item()])
                raise UserError(
                    f"the teacher's hidden states of record {record} (counted from 0) are not finite; {folder} is not written"
                )
            for row, states in zip(batch, hidden.cpu().split(side.counts.tolist()), strict=True):
                file, first = opened[of_row[row]]
                file.seek(first + int(starts[row]) * row_bytes)
                file.write(states.contiguous().view(torch.uint8).numpy())
    for part, place in folders.items():
        if part == 0:
            _write_head(Path(f"{place}.part") / HEAD, model, head)
        range_ = slice(bounds[part], bounds[part + 1])
        sizes = {"first": int(range_.start), "records": int(range_.stop - range_.start)}
        sizes["rows"] = int(tokens.response_counts[range_].sum())
        files.write_manifest(Path(f"{place}.part"), PART_KIND, **facts, **sizes)
        files.finish_folder(place)


def part_bounds(tokens: TokenSide) -> np.ndarray:
    """(CACHE_PARTS + 1,) int64, the record at which each part begins: parts have about as many tokens. A part may be empty."""
    goals = np.linspace(0, tokens.starts[-1], CACHE_PARTS + 1)
    return np.searchsorted(tokens.starts, goals).astype(np.int64)


def check_space(folder, model, tokens: TokenSide, dtype: str, parts: Sequence[int] = range(CACHE_PARTS)) -> None:
    """Make sure that the disk has room for a cache, or for what is left to write of it: before the teacher's weights are read.

    Several jobs may write at the same time, so each looks for room for all that is not yet there; what lies in its own parts is no part
    of a finished cache, and is removed.

    Args:
        folder: of the cache.
        model: the teacher, or its outline without weights (`models.outline`).
        tokens: the teacher's side of the tokenised records, all of them.
        dtype: of the hidden states.
        parts: those that this job is about to write.

    Raises:
        UserError: there is not; says how much is needed and how much is free.
    """
    folder = Path(folder)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    constants = [head.weight, getattr(head, "bias", None), None if embedding is head.weight else embedding]
    needed = int(tokens.response_counts.sum()) * head.weight.shape[1] * _DTYPES[dtype][0].itemsize
    needed += sum(tensor.nbytes for tensor in constants if tensor is not None)
    for part in parts:
        place = folder / part_name(part)
        if not (place / files.MANIFEST).exists():
            shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(f"{place}.part", ignore_errors=True)
    there = sum(files.allocated(f"{folder / part_name(part)}{end}") for part in _others(parts) for end in ("", ".part"))
    files.check_space(folder, needed - there, "the teacher cache", _ADVICE)


def _others(parts: Sequence[int]) -> list[int]:
    return [part for part in range(CACHE_PARTS) if part not in parts]


def _write_head(path: Path, model, head: Head) -> None:
    from safetensors.torch import save_file

    embedding = model.get_input_embeddings()
    with torch.no_grad():  # looked up, not read: some architectures scale their embeddings
        table = embedding(torch.arange(embedding.weight.shape[0], device=model.device))
    tied = torch.equal(table, head.weight)
    constants = {"weight": head.weight, "bias": head.bias, "embedding": None if tied else table}
    save_file({key: value.detach().cpu().contiguous() for key, value in constants.items() if value is not None}, path)


def _write_header(file, dtype: str, shape: tuple[int, int], row_bytes: int, starts: np.ndarray) -> int:
    """Begin a safetensors file of `starts` and `hidden`; the place of the latter's first byte. Its rows come in any order, later."""
    size = shape[0] * row_bytes
    description = {
        "starts": {"dtype": "I64", "shape": list(starts.shape), "data_offsets": [0, starts.nbytes]},
        "hidden": {"dtype": dtype, "shape": list(shape), "data_offsets": [starts.nbytes, starts.nbytes + size]},
    }
    text = json.dumps(description).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text + starts.astype("<i8").tobytes())
    return file.tell()


class Cached:
    """A teacher that is read from its cache; a batch reads its own rows from the disk and no others.

    Args:
        folder: the cache, or its manifest.
        expected_teacher_fingerprint: the teacher that the run asks for.
        expected_tokens_fingerprint: the tokenised records that the run trains on.

    Raises:
        UserError: the cache is missing, damaged, or made from another teacher or other records; says how to make it anew.
    """

    def __init__(self, folder, expected_teacher_fingerprint: str, expected_tokens_fingerprint: str):
        from safetensors import safe_open

        self.folder = files.folder_of(folder)
        remedy = f"remove {self.folder} and run snakemake again, which makes it anew"
        self.manifest = files.read_manifest(self.folder, KIND, remedy)
        asked = {"teacher": expected_teacher_fingerprint, "tokens": expected_tokens_fingerprint}
        for of, expected in asked.items():
            if self.manifest[of] != expected:
                raise UserError(
                    f"{self.folder} is stale: the fingerprint of its {of} is {self.manifest[of]}, the run asks for {expected}; {remedy}"
                )
        parts = [self.folder / part_name(part) for part in range(CACHE_PARTS)]
        states = [safe_open(part / HIDDEN, framework="pt") for part in parts]
        self._firsts = self.manifest["firsts"]
        self._starts = [of.get_tensor("starts").tolist() for of in states]
        self._hidden = [of.get_slice("hidden") for of in states]
        self._constants = safe_open(parts[0] / HEAD, framework="pt")
        self._names = set(self._constants.keys())
        self._head: Head | None = None
        self._embedding: Tensor | None = None

    @property
    def shape(self) -> Shape:
        """The teacher's sizes."""
        table = self._constants.get_slice("embedding" if "embedding" in self._names else "weight")
        return Shape(self.manifest["width"], table.get_shape()[1], self.manifest["vocabulary"])

    def signal(self, rows: list[int], side: Side, device) -> Signal:
        """See `TeacherSource`."""
        pieces, counts = [self._states(row) for row in rows], side.counts.tolist()
        if [len(piece) for piece in pieces] != counts:
            raise ValueError(
                f"records {rows} have {[len(piece) for piece in pieces]} response rows in {self.folder}, the batch has {counts}"
            )
        hidden = torch.cat(pieces)
        if torch.device(device).type == "cuda":  # from pinned memory the copy runs while the student computes
            hidden = hidden.pin_memory().to(device, non_blocking=True)
        return Signal(models.rows(hidden, side.to(device)), self.head(device), self._embed)

    def _states(self, row: int) -> Tensor:
        """(n, d) of one record; only these pages of the file are read."""
        part = bisect_right(self._firsts, row) - 1
        starts, place = self._starts[part], row - self._firsts[part]
        return self._hidden[part][starts[place] : starts[place + 1]]

    def head(self, device) -> Head:
        """See `TeacherSource`."""
        device = torch.device(device)
        if self._head is None or self._head.weight.device != device:
            bias = self._constants.get_tensor("bias").to(device) if "bias" in self._names else None
            self._head = Head(self._constants.get_tensor("weight").to(device), self.manifest["vocabulary"], bias)
        return self._head

    def _embed(self, ids: Tensor) -> Tensor:
        """Embeddings of ids on the ids' device. A table of its own stays in main memory: only some methods read a few rows of it."""
        if "embedding" not in self._names:
            return F.embedding(ids, self.head(ids.device).weight)
        if self._embedding is None:
            self._embedding = self._constants.get_tensor("embedding")
        return F.embedding(ids.to("cpu"), self._embedding).to(ids.device)
