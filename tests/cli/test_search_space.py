"""Search spaces and sweeps in Hydra's notation. Values that Optuna cannot search are reported before the first run."""

import pytest
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gpt2.cli.complete import resolve
from gpt2.cli.compose import compose, parsed
from gpt2.cli.search_space import distributions, swept_values
from gpt2.errors import UserError
from tests.cli.test_sweeper import STUDY, check, study_in
from tests.conftest import Workspace


def problem(*arguments: str, study: bool = True) -> str:
    line = ["-m", "data=stdlib", "model=gpt2_nano", *(["hparams_search=optuna"] if study else []), *arguments]
    with pytest.raises(UserError) as error:
        check(*line)
    return "\n".join(error.value.problems)


@pytest.mark.parametrize("study", [True, False])
@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ("train.seed=range(10,1)", "no number from 10 to below 1 in steps of 1"),
        ("train.seed=range(1,10,-1)", "no number from 1 to below 10 in steps of -1"),
        ("train.seed=range(1,10,0)", "no number from 1 to below 10 in steps of 0"),
        ("train.learning_rate=range(0.1,0.2,0.0)", "no number from 0.1 to below 0.2 in steps of 0.0"),
        ("train.min_learning_rate=choice(null,1e-5)", "Hydra's functions accept no null; write key=null,1e-5"),
        ("train.seed=choice()", "empty choice is not legal"),
        ("train.learning_rate=interval(1e-4,abc)", "mismatch type argument end: str is incompatible with Union[int, f"),
    ],
)
def test_sweep_without_values_is_refused(sweep, reason, study):
    assert problem(sweep, study=study).startswith(f"{sweep}: {reason}")


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ("model=glob(*)", "a study needs the names, such as model=gpt2,gpt2_medium"),
        ("train.seed=choice(1,1)", "has one value; train.seed=VALUE fixes it, a search needs two"),
        ("train.beta2=interval(0.9,0.9)", "has one value; train.beta2=VALUE fixes it, a search needs two"),
        ("train.seed=range(3,4)", "has one value; train.seed=VALUE fixes it, a search needs two"),
        ("model=gpt2,gpt2_nano,gpt2", "gpt2 is repeated"),
        ("train.seed=2,1,1,2", "1, 2 is repeated"),
        ("train.learning_rate=interval(1,0)", "`low <= high` must hold"),
        ("train.learning_rate=tag(log,interval(0,1))", "`low > 0` must hold for `log=True`"),
        ("train.learning_rate=tag(b,a,interval(1e-4,1))", "there is no tag a, b, only log"),
    ],
)
def test_invalid_space_is_refused(sweep, reason):
    assert problem(sweep).startswith(f"{sweep}: {reason}")


@pytest.mark.parametrize(
    ("sweeps", "problems"),
    [
        (["train.seed=1,a"], ["train.seed=a: Value 'a' of type 'str' could not be converted to Integer"]),
        (["train.learning_rate=[1],[2]"], ["train.learning_rate=[1]: Value '[1]' of", "train.learning_rate=[2]: Val"]),
        (["model=gpt2,nope"], ["model=nope: Could not find 'model/nope'. Available options in 'model': gpt2, "]),
        (["train.seed=a,b", "train.beta2=c,d"], [f"{text}: " for text in ("train.seed=a", "train.seed=b")]),
    ],
)
def test_value_that_does_not_fit_is_named_once(sweeps, problems):
    lines = problem(*sweeps).splitlines()
    assert len(lines) == len(problems) + 2 * (len(sweeps) - 1)
    for line, start in zip(lines, problems, strict=False):
        assert line.startswith(start)


def test_tokenizers_are_not_searched():
    assert problem("data.tokenizer=bytes,train").startswith("data.tokenizer: losses per token cannot be compared")


def test_interval_of_an_integer_key_suggests_the_syntax():
    assert "; int(...) around an interval draws whole numbers" in problem("train.seed=interval(1,3)")
    check("-m", "data=stdlib", "hparams_search=optuna", "train.seed=int(interval(1,3))")


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ("train.learning_rate=interval(1e-4,1e-2)", "an interval needs hparams_search=NAME; a sweep needs values"),
        ("model=glob(nope*)", "no file of the group has such a name"),
        ("train.seed=glob(*)", "no file of the group has such a name"),
    ],
)
def test_sweep_that_is_only_for_a_study_is_refused(sweep, reason):
    assert problem(sweep, study=False).startswith(f"{sweep}: {reason}")


def test_number_of_runs_is_bounded():
    assert problem("train.seed=range(0,1000000000)", study=False).startswith("-m: more than 1,000 runs; ")
    assert problem("train.seed=range(40)", "train.max_steps=range(1,41)", study=False).startswith("-m: more than")
    check("-m", "data=stdlib", "hparams_search=optuna", "train.seed=range(0,1000000000)")


@pytest.mark.parametrize("name", ["basic", "optuna", "foo"])
def test_sweeper_beside_a_study_is_refused(name):
    wanted = f"hydra/sweeper={name}: hparams_search=optuna has its own; leave it out"
    assert problem(f"hydra/sweeper={name}") == wanted
    if name != "basic":
        assert problem(f"hydra/sweeper={name}", study=False).endswith("a study is hparams_search=NAME; leave it out")


def test_choices_are_quoted_as_arguments():
    """Hydra drops the quotes in choice('a,b',c), which would make the job another sweep."""
    texts = ["it's", 'say "x"', "a,b", " c", "", "d e"]
    quoted = ",".join(QuotedString(text, Quote.single).with_quotes() for text in texts)
    for sweep in (f"sample_prompt=choice({quoted})", f"sample_prompt={quoted}"):
        (override,) = parsed([sweep])
        (values,) = swept_values([override])
        assert [parsed([value])[0].value() for value in values] == texts
        choices = distributions([sweep])[0]["sample_prompt"].choices
        assert [parsed([f"sample_prompt={choice}"])[0].value() for choice in choices] == texts
    space, fixed = distributions(
        ["a=null,1e-5", "b=[1],[x,'y z']", "c=choice(1,2.5)", "d=true,false", "e=range(1,9,3)", "f=choice(3)"]
    )
    assert space == {
        "a": CategoricalDistribution(["null", 1e-5]),
        "b": CategoricalDistribution(["[1]", "[x,'y z']"]),
        "c": CategoricalDistribution([1, 2.5]),
        "d": CategoricalDistribution([True, False]),
        "e": IntDistribution(1, 7, step=3),
    }
    assert fixed == {"f": "3"}
    assert distributions(["g=interval(1e-4,0.1)"])[0] == {"g": FloatDistribution(1e-4, 0.1)}


@pytest.mark.slow
def test_null_lists_and_quotes_are_searched(workspace: Workspace, monkeypatch):
    monkeypatch.chdir(workspace.folder)
    line = ["train.learning_rate=1e-3", "train.weight_decay=0.1", "train.beta2=0.9", "model.dropout=0.0"]
    line += ["train.warmup_steps=2", "hydra.sweeper.n_trials=2", "hydra/sweeper/sampler=grid"]
    over = [
        "train.min_learning_rate=null,1e-5",
        "sample_prompt=choice(\"it's, 'x'\",\"it's, 'y'\")",
        "data.exclude=choice([],[x])",
    ]
    workspace.run("train.py", *STUDY, *line, *over)
    best = study_in(workspace.folder).best_trial
    saved = OmegaConf.load(workspace.folder / f"outputs/sweeps/mine/{best.number}/.hydra/config.yaml")
    assert saved.sample_prompt in ("it's, 'x'", "it's, 'y'")
    again = resolve("train", compose("train", ["+mine=best"]), ["+mine=best"])
    assert again.train.min_learning_rate == saved.train.min_learning_rate
    assert again.data.exclude == saved.data.exclude
