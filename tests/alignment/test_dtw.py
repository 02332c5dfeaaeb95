from functools import cache

import numpy as np
import pytest

from kdbench.alignment.dtw import on_path, path_costs, warping_path


def naive(distances):
    """Cell by cell, and back from the end: diagonally first, then along the first series, then along the second."""
    n, m = len(distances), len(distances[0])

    @cache
    def cost(i, j):
        if i < 0 or j < 0:
            return np.inf
        before = min(cost(i - 1, j - 1), cost(i - 1, j), cost(i, j - 1)) if i or j else 0
        return distances[i][j] + before

    i, j, path = n - 1, m - 1, []
    while i or j:
        path.append([i, j])
        options = [cost(i - 1, j - 1), cost(i - 1, j), cost(i, j - 1)]
        move = options.index(min(options))
        i, j = i - (move != 2), j - (move != 1)
    return [[0, 0], *path[::-1]], [[cost(i, j) for j in range(m)] for i in range(n)]


def all_paths(n, m):
    if (n, m) == (1, 1):
        return [[(0, 0)]]
    found = []
    for a, b in ((n - 1, m - 1), (n - 1, m), (n, m - 1)):
        if a and b:
            found += [[*path, (n - 1, m - 1)] for path in all_paths(a, b)]
    return found


@pytest.mark.parametrize("highest", [1, 2, 12])  # the lower, the more ties
def test_against_the_plain_programme(highest):
    rng = np.random.default_rng(highest)
    for _ in range(60):
        distances = rng.integers(0, highest + 1, rng.integers(1, 15, 2))
        path, costs = naive(distances.tolist())
        assert path_costs(distances).tolist() == costs
        found = warping_path(distances)
        assert found.tolist() == path
        assert found.dtype == np.int64


def test_no_path_is_cheaper():
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (1, 5), (5, 1), (3, 4), (5, 4), (5, 5)):
        distances = rng.integers(0, 4, (n, m))
        costs = [sum(distances[i, j] for i, j in path) for path in all_paths(n, m)]
        path = warping_path(distances)
        assert distances[path[:, 0], path[:, 1]].sum() == min(costs) == path_costs(distances)[-1, -1]


def test_small_integers_do_not_wrap():
    distances = np.full((40, 50), 200, np.uint8)
    assert path_costs(distances)[-1, -1] == 50 * 200
    assert (warping_path(distances) == warping_path(distances.astype(int))).all()


def test_ties_go_diagonally_then_along_the_first_series():
    assert warping_path(np.zeros((3, 3), int)).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert warping_path(np.zeros((3, 1), int)).tolist() == [[0, 0], [1, 0], [2, 0]]
    # from (1, 1) it is as cheap to come from above as from the left, and neither is as dear as the diagonal
    assert warping_path(np.array([[9, 0], [0, 0]])).tolist() == [[0, 0], [1, 1]]
    assert warping_path(np.array([[0, 0, 0], [0, 9, 9], [0, 9, 0]]))[-2].tolist() == [1, 1]
    crossing = np.array([[0, 0, 0], [0, 5, 0], [0, 0, 0]])
    assert warping_path(crossing).tolist() == [[0, 0], [0, 1], [1, 2], [2, 2]]
    assert warping_path(crossing.T)[:, ::-1].tolist() == [[0, 0], [1, 0], [2, 1], [2, 2]]


def test_costs_on_the_paths_alone():
    crossing = np.array([[0, 2, 0], [2, 9, 2], [0, 2, 4]])
    found = on_path(crossing)
    there, back = warping_path(crossing).tolist(), warping_path(crossing.T)[:, ::-1].tolist()
    for i in range(3):
        for j in range(3):
            assert found[i, j] == crossing[i, j] * (([i, j] in there) + ([i, j] in back)) / 2
    assert (found != crossing).any()
