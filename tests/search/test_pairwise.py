"""The combinations of a sweep that are validated before it starts."""

from itertools import combinations, product

import pytest

from gpt2.cli.compose import parsed
from gpt2.cli.search_space import swept_values
from gpt2.search.pairwise import MAX_COMBINATIONS, combined


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.seed=1,2,3", ["train.seed=1", "train.seed=2", "train.seed=3"]),
        ("train.seed=range(1, 4)", ["train.seed=1", "train.seed=2", "train.seed=3"]),
        ("model=glob(gpt2_n*)", ["model=gpt2_nano"]),
    ],
)
def test_swept_values_are_all_choices(override, expected):
    assert swept_values(parsed([override])) == [expected]


def test_few_combinations_are_complete():
    choices = [["a", "b"], ["c", "d", "e"], ["f"]]
    assert combined(choices) == list(product(*choices))
    assert combined([]) == [()]
    assert len(combined([[str(n) for n in range(100)]])) == 100


@pytest.mark.parametrize("sizes", [(2, 2, 2, 2, 4, 2), (7, 5, 2), (2,) * 12, (40, 3), (3, 3, 3, 3)])
def test_many_combinations_contain_every_pair(sizes):
    choices = [[f"{place}={option}" for option in range(size)] for place, size in enumerate(sizes)]
    rows = combined(choices)
    everything = set(product(*choices))
    assert len(everything) > MAX_COMBINATIONS
    assert set(rows) <= everything
    assert len(rows) < len(everything) or len(sizes) == 2
    pairs = {pair for one, other in combinations(choices, 2) for pair in product(one, other)}
    assert pairs == {pair for row in rows for pair in combinations(row, 2)}
    largest = sorted(sizes)[-2:]
    assert len(rows) <= 3 * largest[0] * largest[1]  # the two longest axes alone need a third of this
