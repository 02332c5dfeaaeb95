"""Dynamic time warping over a matrix of distances between two series."""

import numpy as np


def warping_path(distances: np.ndarray) -> np.ndarray:
    """The cheapest monotone path from the first pair to the last one that leaves no element of either series out.

    Each step goes on by one in the first series, in the second, or in both; a path costs the sum of the distances of its pairs (Sakoe and
    Chiba 1978). Of paths that cost the same the one is taken that, followed from its end, goes diagonally where it can, else along the
    first series (rows), else along the second: so does the published code of FuseLLM (arXiv 2401.10491) and its descendants, DSKD with the
    teacher as the first series, MCW-KD once with either. A path of the transposed matrix may therefore differ where costs tie.

    Args:
        distances: (n, m) of integers, n and m at least 1.

    Returns:
        (p, 2) int64, pairs (row, column) from (0, 0) to (n - 1, m - 1).
    """
    costs = path_costs(distances).tolist()
    row, column = len(costs) - 1, len(costs[0]) - 1
    pairs = [(row, column)]
    while row or column:
        if row == 0:
            column -= 1
        elif column == 0:
            row -= 1
        else:
            diagonal, up, left = costs[row - 1][column - 1], costs[row - 1][column], costs[row][column - 1]
            if diagonal <= up and diagonal <= left:
                row, column = row - 1, column - 1
            elif up <= left:
                row -= 1
            else:
                column -= 1
        pairs.append((row, column))
    return np.array(pairs[::-1], dtype=np.int64)


def path_costs(distances: np.ndarray) -> np.ndarray:
    """(n, m) int64, what the cheapest path from the first pair to each pair costs.

    Row by row: within a row, cost[j] = sums[j] + min over k ≤ j of (entry[k] - sums[k - 1]), entry[k] being the cheaper one of the two ways
    from the row before.
    """
    distances = np.asarray(distances).astype(np.int64)
    costs = np.empty_like(distances)
    costs[0] = distances[0].cumsum()
    for row in range(1, len(distances)):
        entry = costs[row - 1].copy()
        np.minimum(entry[1:], costs[row - 1, :-1], out=entry[1:])
        sums = distances[row].cumsum()
        costs[row] = sums + np.minimum.accumulate(entry - sums + distances[row])
    return costs


def on_path(distances: np.ndarray) -> np.ndarray:
    """(n, m) float64, half of the distances on the path of rows to columns and half of those on that of columns to rows; 0 elsewhere.

    This is the published lexical cost of MCW-KD (MCW_KD.py, `compute_ot_hidden`): where the two paths agree it is the distance.
    """
    distances = np.asarray(distances)
    visits = np.zeros(distances.shape)
    for path in (warping_path(distances), warping_path(distances.T)[:, ::-1]):
        visits[path[:, 0], path[:, 1]] += 0.5
    return visits * distances
