"""The picture of a comparison."""

from gpt2.analysis.compare import Comparison
from gpt2.analysis.compare_html import page
from gpt2.analysis.compare_plot import colours, curves
from gpt2.analysis.plotting import picture
from gpt2.analysis.runs import find_runs
from tests.analysis.test_compare import make_run


def test_colours_of_numbers_and_names():
    scale = colours([3, 1, 2])
    assert [scale[1], scale[2], scale[0]] == colours([1, 2, 3])
    assert len(set(colours(["a", "b"]))) == 2


def test_seeds_share_a_name(tmp_path):
    for rate in (1e-3, 3e-3):
        for seed in (1, 2):
            make_run(tmp_path / f"{rate}-{seed}", **{"train.learning_rate": rate, "train.seed": seed})
    figure = curves(Comparison(find_runs([str(tmp_path)])))
    assert [text.get_text() for text in figure.axes[1].texts] == [
        *("learning_rate=0.001 (2 seeds)", "learning_rate=0.003 (2 seeds)")
    ]
    by_tokens, by_time = figure.axes
    assert len(by_tokens.lines) == len(by_time.lines) == 4
    assert list(by_tokens.lines[0].get_xdata()) == [1000, 2000]
    assert list(by_time.lines[0].get_xdata()) == [36, 72]


def test_name_counts_seeds_and_repetitions(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / "seeds" / str(seed), **{"train.seed": seed})
    for number in range(2):
        make_run(tmp_path / "again" / str(number), **{"train.learning_rate": 1.0})
    make_run(tmp_path / "again" / "other", **{"train.learning_rate": 2.0})

    def names(place: str) -> list[str]:
        return [text.get_text() for text in curves(Comparison(find_runs([str(tmp_path / place)]))).axes[1].texts]

    assert names("seeds") == ["tiny (2 seeds)"]
    assert sorted(names("again")) == ["learning_rate=1 (2 runs)", "learning_rate=2"]


def test_labels_are_escaped(tmp_path):
    make_run(tmp_path / "1.2.3", name=r"$\foo$ a")
    make_run(tmp_path / "b", name="_b")
    found = Comparison(find_runs([str(tmp_path)]))
    picture(curves(found))
    assert "1.2.3" in page(found)
    names = {text.get_text().strip("\u200b").replace("\\$", "$") for text in curves(found).axes[1].texts}
    assert names == {r"$\foo$ a", "_b"}


def test_many_groups_are_grey_and_counted(tmp_path):
    for number in range(15):
        make_run(tmp_path / str(number), (3.0 + number / 10,), **{"train.weight_decay": number / 100})
    names = [text.get_text() for text in curves(Comparison(find_runs([str(tmp_path)]))).axes[1].texts]
    assert len(names) == 13
    assert names[-1] == "3 others"


def test_long_names_leave_room_for_the_lines(tmp_path):
    for number in range(3):
        make_run(tmp_path / str(number), **{"name": "a" * 40, "train.max_steps": number})
    names = [text.get_text() for text in curves(Comparison(find_runs([str(tmp_path)]))).axes[1].texts]
    assert len(set(names)) == 3
    assert max(map(len, names)) <= 40


def test_different_tokenizers_are_plotted_in_bits_per_byte(tmp_path):
    make_run(tmp_path / "a", **{"model.vocab_size": 300})
    make_run(tmp_path / "b", **{"model.vocab_size": 400})
    assert curves(Comparison(find_runs([str(tmp_path)]))).axes[0].get_ylabel() == "bits per byte of text"


def test_plot_of_runs_without_evaluations_is_empty(tmp_path):
    make_run(tmp_path / "a", ())
    assert not curves(Comparison(find_runs([str(tmp_path)]))).axes[0].lines
