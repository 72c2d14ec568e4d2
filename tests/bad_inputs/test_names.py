"""Names of runs, studies and outputs that are paths, commands or invalid: nothing is written elsewhere."""

from tests.bad_inputs.harness import TRAIN, check, rows

NAMES = [
    ("a path to the parent folder", "../x"),
    ("a command", r"\$(touch p)"),
    ("a line break", "a\nb"),
    ("an option", "-rf"),
    ("an emoji", "🦜"),
    ("an empty name", ""),
    ("a control character", "a\x1b[31m"),
    ("a mark that changes the direction of text", "a\u202eb"),
]

PLACES = [
    (
        "a study in the parent folder",
        "train -m hparams_search=optuna hydra.sweeper.study_name=../x",
        "hydra.sweeper.study_name: '../x'",
    ),
    (
        "a study with the name of a group",
        "train -m hparams_search=optuna hydra.sweeper.study_name=model",
        "hydra.sweeper.study_name",
    ),
    (
        "checkpoints in the parent folder",
        "train train.checkpoint_dir=..",
        "train.checkpoint_dir: '..' must be the plain name",
    ),
    ("checkpoints at an absolute path", "train train.checkpoint_dir=/tmp/x", "train.checkpoint_dir: '/tmp/x' must be"),
    ("a run in /proc", f"{TRAIN} hydra.run.dir=/proc/x", "hydra.run.dir: ... /proc/x"),
    ("a run in a file", f"{TRAIN} hydra.run.dir=corpus.txt", "hydra.run.dir: ... corpus.txt"),
    ("an empty run folder", f"{TRAIN} hydra.run.dir=''", "hydra.run.dir"),
    ("a sweep in /proc", f"{TRAIN} -m train.seed=1,2 hydra.sweep.dir=/proc/x", "hydra.sweep.dir: ... /proc/x"),
    ("a result in /proc", "evaluate wandb=off output=/proc/x.json", "output: cannot write"),
    (
        "a result in a file",
        "evaluate wandb=off output=corpus.txt/x.json",
        "output: ... corpus.txt",
    ),
    ("a result over a text", "evaluate wandb=off output=corpus.txt", "output: corpus.txt exists and is not a result"),
    ("an export in a file", "export to=corpus.txt/x", "to: ... corpus.txt/x"),
    ("an export in /proc", "export to=/proc/x", "to: ... /proc/x"),
    ("a page in /proc", "compare html=/proc/x.html", "/proc/x.html"),
    ("a picture in a file", "compare picture=corpus.txt/x.png", "corpus.txt/x.png"),
    ("a name of 300 characters", f"evaluate wandb=off output={'a' * 300}", "output: cannot write"),
]


def quoted(name: str) -> str:
    return "'name=\"" + name + "\"'"


@rows([(what, f"{TRAIN} {quoted(name)}", "name: ... must be letters") for what, name in NAMES])
def test_names_of_runs(place, row):
    check(place, row)


@rows(PLACES)
def test_paths(place, row):
    check(place, row)
