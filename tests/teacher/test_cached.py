"""The teacher's cache: the same signal as the running teacher, from a folder that is whole, fresh, or refused."""

import re
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdbench import files, models
from kdbench.errors import UserError
from kdbench.settings import CACHE_PARTS
from kdbench.teacher import cached
from kdbench.teacher.cached import Cached
from kdbench.teacher.live import Live
from kdbench.teacher.parts import join, parts_of_job
from tests import tiny
from tests.methods.cases import WITH_SIGNAL, Pair

MODELS = {"tied": tiny.gpt2, "untied": tiny.qwen2}
PRINTS = {"teacher_fingerprint": "teacher-1", "tokens_fingerprint": "tokens-1"}


def _write(folder, model, data, dtype="float32", batch_size=2, size=38, **options):
    return cached.write(folder, model, size, data, dtype, batch_size, **PRINTS | options)


def _parts(folder):
    """`hidden` and `starts` of each part, in order."""
    return [load_file(folder / f"part{part}" / "hidden.safetensors") for part in range(CACHE_PARTS)]


def _states(folder):
    return torch.cat([part["hidden"] for part in _parts(folder)])


def _open(folder, teacher="teacher-1", tokens="tokens-1"):
    return Cached(folder, teacher, tokens)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "cache"
    _write(folder, tiny.qwen2(), tiny.tokens(38))
    return folder


@pytest.fixture
def cache(written, tmp_path):
    """A copy to damage."""
    return shutil.copytree(written, tmp_path / "cache")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [4, 1], [3]])
def test_gives_the_signal_of_the_running_teacher(kind, rows, tmp_path):
    model, data = MODELS[kind](), tiny.tokens(38)
    _write(tmp_path / "cache", model, data)
    side = tiny.side(data, rows)
    ours, theirs = (source.signal(rows, side, "cpu") for source in (_open(tmp_path / "cache"), Live(model, 38)))
    torch.testing.assert_close(ours.rows.hidden, theirs.rows.hidden, rtol=1e-5, atol=1e-5)
    for field in ("targets", "sequence", "counts"):
        assert torch.equal(getattr(ours.rows, field), getattr(theirs.rows, field))
    assert torch.equal(ours.head.weight, theirs.head.weight)
    assert (ours.head.size, ours.head.bias) == (theirs.head.size, theirs.head.bias) == (38, None)
    ids = torch.tensor([[3, 0], [37, 3]])
    assert torch.equal(ours.embed(ids), theirs.embed(ids))
    assert not any(
        tensor.requires_grad for tensor in (ours.rows.hidden, ours.head.weight, theirs.rows.hidden, theirs.head.weight)
    )


def test_keeps_the_bias_of_a_head(tmp_path):
    model, data = tiny.qwen2(), tiny.tokens(38)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(40.0))
    _write(tmp_path / "cache", model, data)
    signal = _open(tmp_path / "cache").signal([1], tiny.side(data, [1]), "cpu")
    assert torch.equal(signal.head.bias, torch.arange(40.0))


def test_is_plain_safetensors_files_of_response_rows_in_record_order(written):
    data, model, row = tiny.tokens(38), tiny.qwen2(), 0
    for part in _parts(written):
        for start, end in zip(part["starts"][:-1], part["starts"][1:], strict=True):
            alone = models.response_rows(model, tiny.side(data, [row])).hidden
            torch.testing.assert_close(part["hidden"][start:end], alone.detach(), rtol=1e-5, atol=1e-5)
            row += 1
    assert row == 5
    manifest = files.read_json(written / "manifest.json")
    facts = {"teacher": "teacher-1", "tokens": "tokens-1", "dtype": "float32", "records": 5, "rows": 21, "width": 24}
    assert facts.items() <= manifest.items()
    assert manifest["vocabulary"] == 38
    assert set(manifest["files"]) == {"part0/head.safetensors"} | {f"part{n}/hidden.safetensors" for n in range(8)}


def test_is_the_same_file_every_time_and_for_every_batch_size_the_same_states(tmp_path):
    model, data = tiny.qwen2(), tiny.tokens(38)
    first, again = (_write(tmp_path / name, model, data) for name in ("first", "again"))
    assert first["fingerprint"] == again["fingerprint"]
    _write(tmp_path / "whole", model, data, batch_size=100)
    torch.testing.assert_close(*(_states(tmp_path / name) for name in ("first", "whole")), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jobs", [2, 8])
def test_several_jobs_write_the_same_cache(written, tmp_path, jobs):
    for job in reversed(range(1, jobs + 1)):
        cached.write_parts(
            tmp_path / "cache", tiny.qwen2(), 38, tiny.tokens(38), "float32", 2, parts=parts_of_job(job, jobs), **PRINTS
        )
    joined, whole = join(tmp_path / "cache"), files.read_json(written / "manifest.json")
    torch.testing.assert_close(_states(tmp_path / "cache"), _states(written), rtol=1e-5, atol=1e-5)
    contents = ("files", "fingerprint")
    assert {k: v for k, v in joined.items() if k not in contents} == {
        k: v for k, v in whole.items() if k not in contents
    }
    assert joined["files"].keys() == whole["files"].keys()


def test_jobs_share_the_work_by_tokens():
    lengths = np.random.default_rng(0).integers(1, 60, (500, 2))
    data = tiny.tokens(38, lengths=lengths.tolist())
    bounds = cached.part_bounds(data)
    assert (bounds[0], bounds[-1]) == (0, 500)
    shares = np.diff(data.starts[bounds]) / data.starts[-1]
    assert abs(shares - 1 / CACHE_PARTS).max() < 120 / data.starts[-1]


def test_parts_that_do_not_belong_together_are_no_cache(cache):
    options = PRINTS | {"teacher_fingerprint": "teacher-2"}
    cached.write_parts(cache, tiny.qwen2(), 38, tiny.tokens(38), "float32", 2, parts=[3], **options)
    with pytest.raises(UserError, match=r"part3 does not belong to .*part0: its teacher is teacher-2, not teacher-1"):
        join(cache)
    (cache / "part3/manifest.json").unlink()
    with pytest.raises(UserError, match="part3 holds no finished part of a teacher cache"):
        join(cache)


def test_bfloat16_rounds_the_states_and_nothing_else(tmp_path):
    model, data, rows = tiny.qwen2(), tiny.tokens(38), [2, 0]
    _write(tmp_path / "wide", model, data)
    _write(tmp_path / "narrow", model, data, dtype="bfloat16")
    side = tiny.side(data, rows)
    wide, narrow = (_open(tmp_path / name).signal(rows, side, "cpu") for name in ("wide", "narrow"))
    assert narrow.rows.hidden.dtype == torch.bfloat16
    assert torch.equal(narrow.rows.hidden, wide.rows.hidden.bfloat16())
    assert torch.equal(narrow.head.weight, wide.head.weight)


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_methods_learn_the_same_from_the_cache_as_from_the_running_teacher(name, tmp_path):
    pair, rows = Pair(name, dtype=torch.float32), [4, 0, 2]
    _write(tmp_path / "cache", pair.teacher, pair.data[1], size=pair.sizes[1])
    sources = Live(pair.teacher, pair.sizes[1]), _open(tmp_path / "cache")
    live, read = (pair.terms(rows, source) for source in sources)
    torch.testing.assert_close(read.total, live.total, rtol=1e-5, atol=1e-5)
    for term in live.sums:
        torch.testing.assert_close(read.sums[term], live.sums[term], rtol=1e-5, atol=1e-5)
    for one, other in zip(pair.gradients(read), pair.gradients(live), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("name", WITH_SIGNAL)
def test_methods_take_a_cache_of_bfloat16(name, tmp_path):
    pair, rows = Pair(name, dtype=torch.float32), [4, 0, 2]
    _write(tmp_path / "cache", pair.teacher, pair.data[1], size=pair.sizes[1], dtype="bfloat16")
    live, read = (pair.terms(rows, source) for source in (Live(pair.teacher, pair.sizes[1]), _open(tmp_path / "cache")))
    torch.testing.assert_close(read.total, live.total, rtol=1e-2, atol=0)
    assert read.total != live.total


def test_reads_the_rows_of_a_batch_and_no_others(written):
    """Bytes of other records may be anything: they are not looked at."""
    source = _open(written)
    data = tiny.tokens(38)
    read = []

    class Counting:
        def __init__(self, part, states):
            self.part, self.states = part, states

        def __getitem__(self, key):
            read.append((self.part, key.start, key.stop))
            return self.states[key]

    source._hidden = [Counting(part, states) for part, states in enumerate(source._hidden)]
    source.signal([3, 1], tiny.side(data, [3, 1]), "cpu")
    assert read == [(5, 0, 1), (1, 0, 2)]


@pytest.mark.parametrize("kind", MODELS)
def test_knows_the_sizes_of_the_teacher(kind, tmp_path):
    model = MODELS[kind]()
    _write(tmp_path / "cache", model, tiny.tokens(38))
    assert _open(tmp_path / "cache").shape == models.shape(model, range(38))


def test_takes_a_manifest_for_its_folder(written):
    assert _open(written / "manifest.json").folder == written


@pytest.mark.parametrize(("of", "asked"), [("teacher", "teacher-2"), ("tokens", "tokens-2")])
def test_a_stale_cache_is_refused(written, of, asked):
    with pytest.raises(UserError) as told:
        _open(written, **{of: asked})
    message = str(told.value)
    assert f"fingerprint of its {of} is {of}-1, the run asks for {asked}" in message
    assert f"remove {written} and run snakemake again" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["part3/hidden.safetensors", "part0/head.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_cache_is_refused(cache, name, damage):
    path = cache / name
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        content[-5] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"{name} is {'missing' if damage == 'missing' else 'damaged'}.*remove {cache}"):
        _open(cache)


def test_an_unfinished_cache_is_refused(cache, tmp_path):
    (cache / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished teacher cache"):
        _open(cache)
    with pytest.raises(UserError, match="no finished teacher cache"):
        _open(tmp_path / "nothing")


def _free(monkeypatch, size):
    """Only the free space is made up: a full disk is nothing to make in a test."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - size, size))


def _sizes(model):
    """What a cache of 21 response rows takes: states of 24 float32; head and embedding of 40 tokens, once if tied."""
    return 21 * 24 * 4 + (1 if model.config.tie_word_embeddings else 2) * 40 * 24 * 4


@pytest.mark.parametrize("tied", [True, False])
def test_too_small_a_disk_is_found_before_the_weights_are_read(tmp_path, monkeypatch, tied):
    tiny.qwen2(tied=tied).save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    outline, place = models.outline(tmp_path / "model"), tmp_path / "deep" / "cache"
    needed = _sizes(outline)
    _free(monkeypatch, needed)
    cached.check_space(place, outline, tiny.tokens(38), "float32")
    _free(monkeypatch, needed - 1)
    with pytest.raises(UserError) as told:
        cached.check_space(place, outline, tiny.tokens(38), "float32")
    assert re.fullmatch(
        rf"the teacher cache {place} needs \S+ GB, {tmp_path} has \S+ GB free: .*cache_dtype.*", str(told.value)
    )
    assert not place.parent.exists()


def test_a_job_looks_for_room_for_what_is_not_there_yet(cache, monkeypatch):
    """What other jobs have written counts; what an earlier attempt left in one's own parts is removed."""
    model, data, big = tiny.qwen2(), tiny.tokens(38), 2**20
    (cache / "part1/manifest.json").unlink()
    (cache / "part7.part").mkdir()
    (cache / "part7.part/hidden.safetensors").write_bytes(b"x" * big)
    _free(monkeypatch, 0)
    cached.check_space(cache, model, data, "float32", parts=[1])
    assert not (cache / "part1").exists()
    with pytest.raises(UserError, match="the teacher cache"):
        cached.check_space(cache.parent / "other", model, data, "float32", parts=[1])


def test_a_teacher_that_is_not_finite_is_refused(tmp_path):
    model = tiny.qwen2()
    broken = int(tiny.tokens(38).ids[-2])  # a token of the last record
    with torch.no_grad():
        model.model.embed_tokens.weight[broken] = torch.nan
    with pytest.raises(UserError, match=r"record \d.*not finite"):
        _write(tmp_path / "cache", model, tiny.tokens(38))
    assert not list((tmp_path / "cache").glob("part?"))


def test_another_batch_than_the_cache_was_made_from_is_refused(written):
    with pytest.raises(ValueError, match="response rows"):
        _open(written).signal([0, 1], tiny.side(tiny.tokens(38), [1, 0]), "cpu")


def test_progress_sees_every_batch(tmp_path):
    seen = []

    def progress(batches):
        for batch in batches:
            seen.append(len(batch))
            yield batch

    _write(tmp_path / "cache", tiny.qwen2(), tiny.tokens(38), progress=progress)
    assert seen == [2, 2, 1]
