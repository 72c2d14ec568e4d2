"""The combinations of swept values that are validated before a sweep starts."""

from itertools import combinations, product
from math import prod

MAX_COMBINATIONS = 32  # if there are more, only enough are validated to contain every pair of values


def combined(choices: list[list[str]]) -> list[tuple[str, ...]]:
    """Return combinations of one choice from each list: all of them, or if these are many, enough for every pair.

    Pairs suffice, because a configuration is invalid due to one value or two contradicting values. The algorithm is
    greedy pairwise testing (Cohen et al., 1997).
    """
    if prod(map(len, choices)) <= MAX_COMBINATIONS or len(choices) < 2:
        return list(product(*choices))
    columns = [[(column, option) for option in options] for column, options in enumerate(choices)]
    missing = {frozenset(pair) for one, other in combinations(columns, 2) for pair in product(one, other)}
    rows = []
    while missing:
        row = dict(sorted(min(missing, key=sorted)))
        for cells in (cells for column, cells in enumerate(columns) if column not in row):
            row |= [max(cells, key=lambda cell: sum({cell, other} in missing for other in row.items()))]
        missing -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        rows.append(tuple(row[column] for column in range(len(choices))))
    return rows
