"""Warping paths, edit distances and lexical costs against the published code of DSKD and MCW-KD."""

import numpy as np
import pytest

from kdbench.alignment.dtw import path_costs, warping_path
from kdbench.alignment.spelling import bare, edit_distances, lexical_costs, one_to_one
from kdbench.alignment.vocabulary import BYTE, PIECE, SPECIAL, Texts, relate
from kdbench.data.spans import _byte_letters
from tests.golden import golden


def mapped(path, rows):
    """For each row the columns that a path pairs it with."""
    return [path[path[:, 0] == row, 1].tolist() for row in range(rows)]


def stripped(case, side):
    return [token.replace(case[f"{side}_marker"], "") for token in case[f"{side}_tokens"]]


@pytest.mark.parametrize("case", golden.cases("dtw_alignment"))
def test_path_of_mined(case):
    """The teacher is the first series, markers are no part of a token."""
    distances = edit_distances(stripped(case, "student"), stripped(case, "teacher"))
    path = warping_path(distances.T)
    n, m = distances.shape
    assert mapped(path[:, ::-1], n) == case["mined"]["student_to_teacher"]
    assert mapped(path, m) == case["mined"]["teacher_to_student"]
    assert path_costs(distances)[-1, -1] == path_costs(distances.T)[-1, -1] == case["mined"]["cost"]
    alone = [[i, found[0]] for i, found in enumerate(case["mined"]["student_to_teacher"]) if len(found) == 1]
    assert one_to_one(distances).tolist() == alone


@pytest.mark.parametrize("case", golden.cases("dtw_alignment"))
def test_paths_and_lexical_costs_of_mcw_kd(case):
    """Whole tokens, one path with either side as the first series; costs only on these."""
    student, teacher = case["student_tokens"], case["teacher_tokens"]
    distances = edit_distances(student, teacher)
    there, back = case["mcw"]["student_teacher_pairs"], case["mcw"]["teacher_student_pairs"]
    assert warping_path(distances)[::-1].tolist() == there
    assert warping_path(distances.T)[::-1].tolist() == back
    published = np.zeros(distances.shape)
    for i, j in there:
        published[i, j] += distances[i, j] / 2
    for j, i in back:
        published[i, j] += distances[i, j] / 2
    assert (lexical_costs(student, teacher, published=True) == published).all()
    ours = lexical_costs(student, teacher)
    assert ours.min() >= 0
    assert ours.max() <= 1
    assert ((ours == 0) == (distances == 0)).all()


def as_bytes(token, marker):
    """What a token of byte-level BPE (marker Ġ) or SentencePiece (▁) stands for."""
    if marker == "Ġ":
        letters = _byte_letters()
        return b"".join(letters.get(letter, letter.encode()) for letter in token)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace(marker, " ").encode()


@pytest.mark.parametrize("case", golden.cases("dtw_alignment"))
def test_bytes_spell_as_letters_do(case):
    """Distances of bytes are those of the published strings, but where SentencePiece names bytes or characters of several of them."""
    sides = []
    for side in ("student", "teacher"):
        names, marker = stripped(case, side), case[f"{side}_marker"]
        spelled = [bare(as_bytes(token, marker)) for token in case[f"{side}_tokens"]]
        alike = [marker == "Ġ" or (name.isascii() and not name.startswith("<0x")) for name in names]
        sides.append((names, spelled, np.array(alike)))
    (ours, ours_bytes, a), (theirs, theirs_bytes, b) = sides
    same = a[:, None] & b
    assert same.any()
    assert (edit_distances(ours, theirs)[same] == edit_distances(ours_bytes, theirs_bytes)[same]).all()


def texts(params, side):
    """The reduced vocabulary of a case."""
    names, marker = params[f"{side}_tokens"], params[f"{side}_marker"]
    kinds = np.array([BYTE if name.startswith("<0x") else PIECE for name in names], np.int8)
    kinds[params[f"{side}_eos_id"]] = SPECIAL
    return Texts([as_bytes(name, marker) for name in names], kinds, params[f"{side}_eos_id"])


GROUPS = ("min_edit_dis_kld", "mcw_kd", "mcw_kd_dual")
MAPS = [of for group in GROUPS for of in golden.parameters(group, counted=False) if of.values[2] != "f32"]


@pytest.mark.parametrize(("case", "inputs", "precision"), MAPS)
def test_map_of_the_vocabulary(case, inputs, precision):
    """The published maps are those of the tokens in use alone, and count the marker of a word's start as a letter.

    So the published token is the first one at minimum distance of the names, and ours, wherever it is another one, is nearer or as near
    without the markers. Where the same text is there, the two agree.
    """
    params, published = case["params"], inputs["tea2stu"]
    ours = relate(texts(params, "student"), texts(params, "teacher"))
    names = params["student_tokens"]
    asked = [name.replace(params["teacher_marker"], params["student_marker"]) for name in params["teacher_tokens"]]
    by_name = edit_distances(names, asked).argmin(0)
    assert (by_name == published).all()
    bares = [
        [name.replace(params[f"{side}_marker"], "") for name in params[f"{side}_tokens"]]
        for side in ("student", "teacher")
    ]
    letters = edit_distances(*bares)
    everyone = np.arange(len(published))
    nearest = ours.nearest.numpy()
    differ = nearest != published
    assert (letters[nearest, everyone] <= letters[published, everyone])[differ].all()
    same = [name in names for name in asked]
    assert not differ[same].any()
    assert differ.mean() < 0.06
    assert (ours.distance.numpy()[same] == 0).all()
