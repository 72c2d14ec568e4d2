"""What a sweep or a study would run, before anything runs: which values, and which of them to check together."""

from itertools import combinations, product
from math import prod

from hydra.core.override_parser.types import Glob, IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from gpt2.cli.compose import CONF, composition_error, parsed
from gpt2.errors import UserError

MOST_COMBINATIONS = 32  # that are all checked; of more, every pair of values


def candidates(override: Override) -> list[str]:
    """The overrides that a sweep over one key amounts to: every choice, or both ends of an interval."""
    value = override.value()
    key = override.get_key_element()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    if isinstance(value, Glob):  # names files of the group, which exist
        names = sorted(path.stem for path in (CONF / override.key_or_group).glob("*.yaml"))
        return [f"{key}={choice}" for choice in value.filter(names)]
    return [f"{key}={text}" for text in override.sweep_string_iterator()]


def combined(choices: list[list[str]]) -> list[tuple[str, ...]]:
    """Combinations of one choice from each list: all of them, or if those are many, so many that each pair occurs.

    What is wrong with a configuration is wrong with one value, or with two that contradict each other. Greedy, as
    pairwise testing does it (Cohen et al., 1997).
    """
    if prod(map(len, choices)) <= MOST_COMBINATIONS or len(choices) < 2:
        return list(product(*choices))
    missing = {
        frozenset({one, other})
        for row in combinations(enumerate(choices), 2)
        for one, other in product(*map(_cells, row))
    }
    rows = []
    while missing:
        row = dict(sorted(min(missing, key=sorted)))
        for cell in ((place, options) for place, options in enumerate(choices) if place not in row):
            row |= [max(_cells(cell), key=lambda option: sum({option, other} in missing for other in row.items()))]
        missing -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        rows.append(tuple(row[place] for place in range(len(choices))))
    return rows


def _cells(numbered: tuple[int, list[str]]) -> list[tuple[int, str]]:
    place, options = numbered
    return [(place, option) for option in options]


def searched(sweeper: DictConfig, swept: list[Override], fixed: list[str]) -> list[Override]:
    """The space: what the study says and the command line sweeps, but for what the command line fixes.

    Raises:
        UserError: It is empty, cannot be parsed, or has no end where a grid is asked for.
    """
    try:
        ours = parsed([f"{key}={value}" for key, value in sweeper.params.items() if value is not None])
    except HydraException as error:
        raise UserError(f"hydra.sweeper.params: {composition_error(error)}") from error
    told = {override.key_or_group for override in [*parsed(fixed), *swept]}
    space = [override for override in ours if override.key_or_group not in told] + swept
    found = []
    for override in space:
        value = override.value()
        if not override.is_sweep_override():
            found.append(f"hydra.sweeper.params: {override.input_line} is no search, it has one value")
        elif isinstance(value, IntervalSweep) and not value.start < value.end:  # type: ignore[operator]
            found.append(f"{override.input_line}: an interval goes from the smaller to the larger end")
        elif tags := set(getattr(value, "tags", ())) - {"log"}:
            found.append(f"{override.input_line}: there is no tag {', '.join(map(str, tags))}, only log")
        elif "GridSampler" in sweeper.sampler.get("_target_", "") and isinstance(value, IntervalSweep):
            whole = isinstance(value.start, int) and isinstance(value.end, int)
            if not whole:
                found.append(
                    f"{override.input_line}: a grid needs values, such as {override.key_or_group}="
                    f"{value.start},{value.end}; or take another hydra/sweeper/sampler"
                )
    if not space:
        found.append("hydra.sweeper.params: nothing is left to search, the command line fixes all of it")
    if found:
        raise UserError(*found)
    return space
