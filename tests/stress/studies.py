"""Studies whose processes are killed, share a storage or start at once, and trials that die in different ways."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from gpt2.search.storage import open_storage
from tests.stress.table import Row, complain
from tests.stress.warm import Place

# A trial has 8 steps and four evaluations; a study samples two trials at random, then with TPE.
TRIAL = [
    *("data=text", "data.files=[corpus.txt]", "data.tokenizer=bytes", "wandb=off"),
    *("model=gpt2_nano", "model.num_layers=1", "model.d_model=32", "model.d_ff=64", "model.context_length=32"),
    *("train.batch_size=4", "train.num_workers=0", "train.max_steps=8", "train.eval_every=2", "train.eval_batches=2"),
    *("train.warmup_steps=2", "train.log_every=1", "train.save_every=2"),
]
NAME = "study"
STUDY = ["-m", "hparams_search=optuna", f"hydra.sweeper.study_name={NAME}", *TRIAL]
STUDY += ["hydra.sweeper.sampler.n_startup_trials=2"]
NO_PRUNER = "hydra/sweeper/pruner=none"


def trials_of(place: Place) -> list[FrozenTrial]:
    storage = f"sqlite:///{place.folder}/outputs/sweeps/{NAME}/study.db"
    return optuna.load_study(study_name=NAME, storage=storage).trials


def complaints(trials: list[FrozenTrial], count: int) -> list[str]:
    """The problems of a study that should have ended with a number of trials."""
    found = [] if len(trials) == count else [f"{len(trials)} trials, not {count}"]
    found += [f"trial {t.number} is {t.state.name}" for t in trials if not t.state.is_finished()]
    draws = {tuple(trial.params.values()) for trial in trials}
    return found if len(draws) == len(trials) else [*found, "a draw is repeated"]


def results(trials: list[FrozenTrial]) -> list[tuple]:
    return [(t.number, t.state.name, t.value, t.params, t.intermediate_values) for t in trials]


def sweeper_kills(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Send SIGKILL at random moments and repeat the command, until `count` is reached and studies have ended."""
    command = [*STUDY, "hydra.sweeper.n_trials=4", NO_PRUNER]
    straight = Place(folder / "straight")
    ended = straight.run("train.py", *command)
    lost = list(complain(straight, ended, {0}))
    expected, longest = results(trials_of(straight)), ended.seconds
    killed = studies = 0
    while killed < count:
        studies += 1
        place = Place(folder / f"study {studies}")
        for attempt in range(100):
            process = place.start("train.py", *command)
            if attempt < 8 and killed < count:
                time.sleep(random.uniform(0.05, longest))
                os.kill(process, signal.SIGKILL)
            ended = place.wait(process)
            if ended.code != -signal.SIGKILL:
                break
            killed += 1
        lost += complain(place, ended, {0})
        trials = trials_of(place)
        lost += [f"{place.folder}: {complaint}" for complaint in complaints(trials, 4)]
        if results(trials) != expected:
            lost.append(f"{place.folder}: not the study that was not killed: {results(trials)}, not {expected}")
        shutil.rmtree(place.folder)
    return [
        Row("SIGKILL of a study at a random moment", killed, "lost, double or other trials", lost, f"{studies} studies")
    ]


def shared_studies(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Start one study on a new storage by three processes at the same moment."""
    lost: list[str] = []
    for number in range(count):
        file = folder / f"{number}" / "shared"
        url = f"sqlite:///{file}"
        command = [*STUDY, "hydra.sweeper.n_trials=4", "train.max_steps=2", f"hydra.sweeper.storage='{url}'"]
        places = [Place(folder / f"{number}" / f"{worker}") for worker in range(3)]
        for place in places:
            place.environment = {"OMP_NUM_THREADS": "1"}
        processes = [place.start("train.py", *command) for place in places]
        for place, process in zip(places, processes, strict=True):
            lost += complain(place, place.wait(process), {0})
        trials = optuna.load_study(study_name=NAME, storage=open_storage(url)).trials
        lost += [f"{file}: {complaint}" for complaint in complaints(trials, 4)]
        runs = sorted(int(run.name) for place in places for run in place.folder.glob(f"outputs/sweeps/{NAME}/[0-9]*"))
        if runs != [0, 1, 2, 3]:
            lost.append(f"{file}: runs {runs}")
        shutil.rmtree(folder / f"{number}")
    return [Row("three processes begin one study at once", count, "lost or double trials, lost workers", lost)]


WAYS_TO_DIE = {  # the state of the trial, and a part of its reason
    "exception@3": ("FAIL", "RuntimeError: on purpose"),
    "memory_error@3": ("PRUNED", "out of memory"),
    "out_of_memory@3": ("PRUNED", "out of memory"),
    "nan_loss@3": ("PRUNED", "the loss is nan"),
    "exit@3": ("FAIL", "SystemExit: 7"),
    "no_evaluation@1-99": ("FAIL", "its validation loss is None"),
    "slow@1-99": ("PRUNED", "longer than trial_timeout=3 seconds"),
    "kill@3": ("FAIL", "its process died 3 times"),
}


def deaths(count: int, folder: Path, random: random.Random) -> list[Row]:
    """Run a study in which all trials but the first and the last die in different ways, without effect on others."""
    ways = list(WAYS_TO_DIE.items())[:count]
    random.shuffle(ways)
    place = Place(folder, {"GPT2_FAULT": ",".join(f"{fault}#{number + 1}" for number, (fault, _) in enumerate(ways))})
    command = [*STUDY, f"hydra.sweeper.n_trials={len(ways) + 2}", NO_PRUNER]
    command += ["hydra.sweeper.trial_timeout=3", "train.max_steps=80"]
    ended = place.run("train.py", *command)
    while ended.code == -signal.SIGKILL:
        ended = place.run("train.py", *command)
    trials = trials_of(place)
    lost = [*complain(place, ended, {0}), *complaints(trials, len(ways) + 2)]
    for trial, (fault, (state, reason)) in zip(trials[1:-1], ways, strict=True):
        message = trial.user_attrs.get("reason") or ""
        if trial.state.name != state or reason not in message:
            lost.append(f"{fault}: {trial.state.name}, {message}")
    lost += [f"trial {n} is {trials[n].state.name}" for n in (0, -1) if trials[n].state.name != "COMPLETE"]
    return [Row("trials of one study die, each in its own way", len(ways), "misjudged, or others harmed", lost)]
