"""The teacher on disk: its final hidden states at response positions, written in one pass and read a few rows at a time.

A cache folder holds

    hidden.safetensors  `hidden` (N, d): the state that predicts each response token, record after record; `starts` (R + 1) int64: where
                        each record begins in it
    head.safetensors    `weight` (V, d) and `bias` (V) of the head; `embedding` (V, d_embedding), unless it equals the head's weight
    manifest.json       fingerprints of the teacher and of the tokenised records, sizes, checksums

With the head, hidden states give every logit: no top-k, no loss of probability mass. They take d / V of the space of logits.
"""

import json
import shutil
from collections.abc import Callable, Iterable
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
from kdbench.signals import Head, Signal

KIND = "teacher cache"
_DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}


def write(
    folder,
    model,
    tokenizer_size: int,
    tokens: TokenSide,
    dtype: str,
    batch_size: int,
    progress: Callable[[Iterable], Iterable] = iter,
    *,
    teacher_fingerprint: str,
    tokens_fingerprint: str,
) -> dict:
    """Run a teacher once over all records and keep its hidden states at response positions.

    Args:
        folder: where the cache goes; replaced as a whole when it is finished.
        model: causal language model in evaluation mode, on its device.
        tokenizer_size: number of tokens of its tokenizer.
        tokens: the teacher's side of the tokenised records.
        dtype: "bfloat16" or "float32", of the hidden states; the head keeps the model's type.
        batch_size: sequences of one forward pass.
        progress: wraps the iteration over batches, to show how far it is.
        teacher_fingerprint: names the teacher's weights.
        tokens_fingerprint: names the tokenised records.

    Returns:
        The manifest.

    Raises:
        UserError: the model has too few positions; the disk is too small; a hidden state is not finite.
    """
    models.check_positions(model, int(tokens.lengths.max()))
    kept, name = _DTYPES[dtype]
    head = models.head(model, tokenizer_size)
    embedding = model.get_input_embeddings()
    with torch.no_grad():  # looked up, not read: some architectures scale their embeddings
        table = embedding(torch.arange(embedding.weight.shape[0], device=model.device))
    tied = torch.equal(table, head.weight)
    constants = {"weight": head.weight, "bias": head.bias, "embedding": None if tied else table}
    constants = {key: value.detach().cpu().contiguous() for key, value in constants.items() if value is not None}
    lengths, starts = tokens.lengths, tokens.response_starts.astype(np.int64)
    shape = (int(starts[-1]), head.weight.shape[1])
    row_bytes = shape[1] * kept.itemsize
    _check_disk(folder, shape[0] * row_bytes + sum(tensor.nbytes for tensor in constants.values()))

    part = files.fresh_folder(folder)
    longest_first = np.argsort(-lengths, kind="stable")  # too long a batch then fails at once, not in the last minute
    passes = [longest_first[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    with open(part / "hidden.safetensors", "wb") as file:
        first = _write_header(file, name, shape, shape[0] * row_bytes, starts)
        for rows in progress(passes):
            side = batches.side(tokens, rows).to(model.device)
            with torch.no_grad():
                hidden = models.response_rows(model, side).hidden.to(kept)
            finite = hidden.isfinite().all(-1)
            if not finite.all():
                record = int(rows[side.sequence[~finite][0].item()])
                raise UserError(
                    f"the teacher's hidden states of record {record} (counted from 0) are not finite; {folder} is not written"
                )
            for row, states in zip(rows, hidden.cpu().split(side.counts.tolist()), strict=True):
                file.seek(first + int(starts[row]) * row_bytes)
                file.write(states.contiguous().view(torch.uint8).numpy())
        file.truncate(first + shape[0] * row_bytes)
    from safetensors.torch import save_file

    save_file(constants, part / "head.safetensors")
    facts = {"teacher": teacher_fingerprint, "tokens": tokens_fingerprint, "dtype": dtype}
    facts |= {"records": len(lengths), "rows": shape[0], "width": shape[1], "vocabulary": tokenizer_size}
    manifest = files.write_manifest(part, KIND, **facts)
    files.finish_folder(folder)
    return manifest


def _check_disk(folder, needed: int) -> None:
    """Raises UserError where a file system has less than `needed` bytes free."""
    place = Path(folder).absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"the teacher cache {folder} needs {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB free: "
            "make room, or set `cache_dtype: bfloat16` or `training.teacher: live`"
        )


def _write_header(file, dtype: str, shape: tuple[int, int], size: int, starts: np.ndarray) -> int:
    """Begin a safetensors file of `starts` and `hidden`; the place of the latter's first byte. Its rows come in any order, later."""
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
        self.manifest = files.read_manifest(self.folder, KIND)
        asked = {"teacher": expected_teacher_fingerprint, "tokens": expected_tokens_fingerprint}
        for of, expected in asked.items():
            if self.manifest[of] != expected:
                raise UserError(
                    f"{self.folder} is stale: the fingerprint of its {of} is {self.manifest[of]}, the run asks for {expected}; "
                    f"make it anew: snakemake --cores all --forcerun {self.folder / files.MANIFEST}"
                )
        states = safe_open(self.folder / "hidden.safetensors", framework="pt")
        self._starts = states.get_tensor("starts").tolist()
        self._hidden = states.get_slice("hidden")
        self._constants = safe_open(self.folder / "head.safetensors", framework="pt")
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
        pieces = [self._hidden[self._starts[row] : self._starts[row + 1]] for row in rows]
        hidden, counts = torch.cat(pieces).to(device), side.counts.tolist()
        if [len(piece) for piece in pieces] != counts:
            raise ValueError(
                f"records {rows} have {[len(piece) for piece in pieces]} response rows in {self.folder}, the batch has {counts}"
            )
        side = side.to(device)
        return Signal(models.rows(hidden, side), self.head(hidden.device), self._embed)

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
