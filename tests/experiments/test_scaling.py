"""The scaling study: its law is recovered from synthetic data, and its prediction is made before the run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2.analysis.runs import UNITS
from gpt2.cli.compose import compose
from gpt2.runtime.repository import ROOT
from tests.analysis.test_compare import make_run

FOLDER = ROOT / "experiments" / "scaling"
sys.path.insert(0, str(FOLDER))  # its modules are not in a package

import fit as study  # noqa: E402
import law as laws  # noqa: E402

WIDTHS = (64, 96, 128, 160, 192, 256, 320)
BUDGETS = (6.25e11, 1.25e12, 2.5e12, 5e12, 1e13)
TRUE = laws.Law(e=0.75, a=0.2, b=0.7, alpha=0.35, beta=0.45)
NOISE = 0.004


def write_results(folder: Path, loss_of) -> study.Runs:
    """Write a results.csv as the study does, with synthetic losses and noise between seeds."""
    random = np.random.default_rng(0)
    lines = ["variant,model.d_model,state,steps,tokens,loss,seconds"]
    for number, flops in enumerate(BUDGETS, 1):
        for width in WIDTHS:
            steps = round(flops / (6e6 * study.size(width)) / study.tokens_per_step(width))
            tokens = steps * study.tokens_per_step(width)
            loss = loss_of(study.size(width), tokens / 1e6) * np.exp(random.normal(0, NOISE))
            loss += 0.5 * (steps < study.MIN_STEPS)  # runs that the fit leaves out
            lines.append(f"budget_{number},{width},finished,{steps},{tokens},{loss},60")
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    return study.Runs((folder / "results.csv").read_text())


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> study.Fit:
    """A fit to synthetic data that follow the law TRUE."""
    return study.Fit(write_results(tmp_path_factory.mktemp("known"), TRUE.loss), samples=30)


@pytest.mark.parametrize("name", ["e", "a", "b", "alpha", "beta", "size_exponent"])
def test_a_known_law_lies_within_the_intervals(known, name):
    low, high = laws.interval([getattr(law, name) for law in known.laws])
    true = getattr(TRUE, name)
    assert low < true < high
    assert high - low < 0.6 * true  # the interval must not be so wide that it always contains the value


def test_a_law_without_noise_is_recovered_exactly(known):
    n, d, _ = known.runs.fitted
    found = laws.fit(n, d, TRUE.loss(n, d))
    assert laws.parameters(found) == pytest.approx(laws.parameters(TRUE), abs=1e-4)


def test_a_wrong_law_leaves_residuals_that_noise_does_not_explain(known, tmp_path):
    assert np.std(known.residuals) < 1.3 * NOISE

    def other(n, d):  # the best size does not grow: beyond a million parameters half of the text's gain is lost
        return 0.75 + 0.7 * d**-0.45 + 0.1 * np.log(n / 0.5) ** 2

    wrong = study.Fit(write_results(tmp_path, other), samples=1)
    assert np.std(wrong.residuals) > 3 * NOISE


def test_gradient_agrees_with_differences(known):
    data = tuple(map(np.log, known.runs.fitted))
    theta = np.array([-0.2, -1.5, -0.4, 0.3, 0.5])
    _, gradient = laws.objective(theta, *data)
    for i, step in enumerate(np.eye(5) * 1e-6):
        difference = laws.objective(theta + step, *data)[0] - laws.objective(theta - step, *data)[0]
        assert gradient[i] == pytest.approx(difference / 2e-6, rel=1e-4)


def test_a_run_that_diverged_is_not_in_the_fit(tmp_path):
    write_results(tmp_path, TRUE.loss)
    text = (tmp_path / "results.csv").read_text()
    line = next(line for line in text.splitlines() if line.startswith("budget_5,64"))
    variant, width, _, steps, tokens, _, seconds = line.split(",")
    lost = study.Runs(text.replace(line, f"{variant},{width},diverged,{steps},{tokens},,{seconds}"))
    assert lost.in_fit.sum() == study.Runs(text).in_fit.sum() - 1
    assert np.isfinite(lost.fitted[2]).all()


def test_best_size_has_the_lowest_loss_of_its_compute():
    for flops in (1e12, 5e13):
        sizes = np.geomspace(0.01, 10, 20_000)
        losses = TRUE.loss(sizes, flops / 6e12 / sizes)
        assert TRUE.best_size(flops) == pytest.approx(sizes[losses.argmin()], rel=1e-3)
        assert TRUE.best_loss(flops) == pytest.approx(losses.min())


def test_prediction_holds_for_a_larger_run_of_the_same_law(known):
    predicted = study.prediction(known)
    assert predicted["flops"] == 5 * BUDGETS[-1]
    low, high = predicted["interval"]
    assert low < TRUE.loss(predicted["size"], predicted["tokens"] / 1e6) < high < 1.1 * low


def test_prediction_is_made_once_and_compared_with_the_run(tmp_path, monkeypatch, capsys):
    write_results(tmp_path, TRUE.loss)
    (tmp_path / "seeds.csv").write_text("variant,model.d_model,loss\nbudget_1,64,2.0\nbudget_1,64,2.02\n")
    (tmp_path / "README.md").write_text(f"Before.\n{study.OPENING}\nold\n{study.CLOSING}\nAfter.\n")
    monkeypatch.setattr(study, "SAMPLES", 3)
    monkeypatch.setattr(sys, "argv", ["fit.py", str(tmp_path)])
    study.main()
    first = json.loads((tmp_path / "prediction.json").read_text())
    first["loss"], first["interval"] = 1.2, [1.19, 1.22]
    (tmp_path / "prediction.json").write_text(json.dumps(first))

    run = make_run(tmp_path / "run", (3.0, 1.23), **{"model.d_model": first["width"]})
    about = json.loads((run.folder / "run.json").read_text())
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    monkeypatch.setattr(sys, "argv", ["fit.py", str(tmp_path), "--held-out", str(run.folder)])
    for started, steps, refusal in (
        ("2100-01-01T00:00:00", 7, "the prediction is for"),
        ("2000-01-01T00:00:00", first["steps"], "started before the prediction"),
        ("2100-01-01T00:00:00", first["steps"], None),
    ):
        (run.folder / "run.json").write_text(json.dumps({**about, "started": started}))
        text = "".join(json.dumps({**record, "step": steps}) + "\n" for record in records)
        (run.folder / "metrics.jsonl").write_text(text)
        if refusal:
            with pytest.raises(SystemExit, match=refusal):
                study.main()
        else:
            study.main()
    assert json.loads((tmp_path / "prediction.json").read_text()) == first
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("Before.")
    assert readme.endswith("After.\n")
    assert "old" not in readme
    assert "reached 1.230: 0.030 nats above the prediction and outside its interval, 2.0 times half the" in readme
    assert "interval and 3.6 times the standard deviation between seeds" in readme
    assert {"compute.png", "sizes.png", "fit.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("width", [64, 320])
def test_presets_give_every_size_the_same_compute(width):
    config = compose("train", ["+scaling=budget_2", f"model.d_model={width}"])
    assert config.train.batch_size * config.data.max_length == study.tokens_per_step(width)
    tokens = config.train.max_steps * study.tokens_per_step(width)
    assert 6e6 * study.size(width) * tokens == pytest.approx(BUDGETS[1], rel=0.02)


def test_picture_over_compute_labels_the_star_and_defines_parameters(known):
    (axes,) = study.over_compute(known, study.prediction(known), {"loss": 1.2}).axes
    colours = {text.get_text().split("\n")[0]: text.get_color() for text in axes.texts}
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert colours["measured ★"] == star.get_color()
    assert colours["predicted"] != colours["measured ★"]
    assert "parameters without embeddings" in axes.get_xlabel()
    assert UNITS["parameters"] == "parameters with embeddings"
