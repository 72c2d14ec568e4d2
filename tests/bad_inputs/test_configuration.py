"""Configurations that cannot run: types, ranges, contradictions, names that do not exist, presets of users.

`tests/test_config.py` and `tests/cli` check more of them without a process for each.
"""

from tests.bad_inputs.files import PRESETS
from tests.bad_inputs.harness import check, rows

TYPES = [
    ("true for a count", "train train.batch_size=true", "train.batch_size=true: ... Integer"),
    ("a list for a count", "train train.batch_size=[1]", "train.batch_size=[1]: ... Integer"),
    ("a mapping for a count", "train train.batch_size={a:1}", "train.batch_size={a:1}: ... Integer"),
    ("a date for a count", "train train.seed=2026-11-29", "train.seed=2026-11-29: ... Integer"),
    ("a word for a rate", "train train.learning_rate=fast", "train.learning_rate=fast: ... Float"),
    ("an empty rate", "train train.learning_rate=", "train.learning_rate=: ... Float"),
    ("a number for a list", "train data.files=5", "data.files=5: a list is wanted"),
    ("a text for a list", "train data.files=corpus.txt", "data.files=corpus.txt: a list is wanted"),
    ("a list in a list", "train data.files=[[corpus.txt]]", "data.files: [['corpus.txt']] is not a list of texts"),
    (
        "a mapping in a list",
        "generate prompt=x inference.stop=[{a:1}]",
        "inference.stop: [{'a': 1}] is not a list of texts",
    ),
    ("a text for the stop texts", "generate prompt=x inference.stop=end", "inference.stop=end: a list is wanted"),
    ("a word for true or false", "train train.deterministic=maybe", "train.deterministic=maybe: ... not a valid bool"),
    ("a number for a group", "train train=5", "train=5: ... default"),
    ("an unknown optimizer", "train train.optimizer=sgd", "train.optimizer=sgd: ... 'adamw'"),
    ("a choice in capitals", "train wandb.mode=OFFLINE", "wandb.mode=OFFLINE: ... 'offline'"),
    ("a logger alone", "train loggers=wandb", "loggers=wandb: a list is wanted"),
    ("an unknown logger", "train loggers=[wandb,tensorbord]", "loggers=[wandb,tensorbord]: ... 'tensorboard'"),
    ("a logger of a run folder", "evaluate loggers=[csv]", "loggers=[csv]: ... ['wandb', 'mlflow']"),
    ("null as a logger", "generate prompt=x loggers=[null]", "loggers=[null]: "),
    ("an unknown split", "evaluate split=dev", "split=dev: ... 'validation'"),
]

RANGES = [
    ("no rate", "train train.learning_rate=0", "train.learning_rate: 0.0 is not a finite number above 0"),
    ("a negative warm-up", "train train.warmup_steps=-1", "train.warmup_steps: -1 is not ... at least 0"),
    ("a negative seed", "train train.seed=-1", "train.seed: -1 is not between 0 and 2^63 - 1"),
    ("dropout of 1", "train model.dropout=1", "model.dropout: 1.0 is not at least 0 and below 1"),
    ("too many layers", "train model.num_layers=100000", "model.num_layers: 100000 is not between 1 and"),
    ("a vocabulary that is too small", "train data.vocab_size=256", "data.vocab_size: 256 is not at least 257"),
    ("a timeout that is too short", "train distributed.timeout=1", "distributed.timeout: 1.0 is not between 5 and"),
    ("an unknown device", "doctor device=gpu", "device: 'gpu' is none of auto, cuda"),
    ("a device that is not here", "doctor device=cuda:99", "device: there is no cuda:99 here; use auto or ... ; "),
    ("a folder as a file", "doctor json=outputs", "json: outputs is a folder; name a file"),
    ("an unknown key of doctor", "doctor network=false", "network=false: Key 'network' not in 'DoctorRun'"),
    ("checkpoints outside the run folder", "train train.checkpoint_dir=../x", "train.checkpoint_dir: '../x' must be"),
    ("an unknown value of compile", "train train.compile=a_bit", "train.compile: 'a_bit' is none of auto, true, false"),
    ("a stride of 0", "evaluate stride=0", "stride: 0 is not between 1 and data.max_length=32"),
    ("a stride beyond the window", "evaluate stride=33", "stride: 33 is not between 1 and data.max_length=32"),
    ("no precisions", "benchmark training precisions=[]", "precisions: the list is empty"),
    ("a negative number of jobs", "study experiments/x jobs=-1", "jobs: ... is not a whole number"),
]

CONTRADICTIONS = [
    ("a rising schedule", "train train.min_learning_rate=1", "train.min_learning_rate: 1.0 is above"),
    ("longer than the context", "evaluate data.max_length=64", "data.max_length: windows of 64 ... checkpoint="),
    ("resuming into another folder", "train resume=latest hydra.run.dir=x", "hydra.run.dir: ... drop one of the two"),
    ("a sweep that is shown", "train -m train.seed=1,2 --cfg job", "-m: not together with --cfg"),
    (
        "a folder name that changes",
        "train train.auto_resume=true hydra.run.dir=${now:%S}",
        "hydra.run.dir: ... plain name",
    ),
    ("fewer steps than the run has", "train resume=latest train.max_steps=4", "train.max_steps: ... 8 steps already"),
    (
        "another model on resuming",
        "train resume=latest model.num_layers=2",
        "model.num_layers: 2 was requested, but the run has 1, which its weights require",
    ),
    (
        "another parametrization, whatever changes",
        "train resume=latest model.parametrization=mup resume_changes=true",
        "model.parametrization: mup was requested, but the run has standard, which its weights require",
    ),
    (
        "another tokenizer on resuming",
        "train resume=latest data.tokenizer=gpt2 resume_changes=true",
        "data.tokenizer: gpt2 was requested, but the run has bytes, which its weights require",
    ),
    (
        "another batch on resuming",
        "train resume=latest train.batch_size=2",
        "train.batch_size: ... resume_changes=true allows the change",
    ),
]

UNKNOWN = [
    ("a forced key", "train ++train.new=1", "Key 'new' not in 'TrainingConfig'"),
    ("a new key at the top", "train +new.key=1", "Key 'new' not in 'TrainRun'"),
    ("an unknown group", "train +nogroup=x", "nogroup"),
    ("an unknown launcher", "train -m hydra/launcher=pbs train.seed=1,2", "hydra/launcher=pbs: ... joblib"),
    ("an unknown key of Hydra", "train hydra.rnu.dir=x", "hydra.rnu.dir=x: ... 'rnu'"),
    ("a key of another script", "generate train.seed=1", "train.seed=1: Key 'train'"),
    ("a group of another script", "evaluate model=gpt2", "model=gpt2: "),
    ("deleting a key", "train ~train.seed", "~train.seed: keys cannot be deleted"),
    ("an unknown column", "compare sort=beauty", "sort: there is no beauty; there are loss"),
    ("unknown columns", "compare columns=seed,beauty", "columns: there is no beauty; there are loss"),
    ("an unknown format of pictures", "compare picture=a.gif", "picture: a.gif is none of .png"),
    ("an unknown option", "compare --fast", "--fast: there is no such option; there are sort="),
    ("a missing run", "compare nowhere", "nowhere does not exist; a run is a folder with"),
    ("a folder without a run", "compare folder", "folder contains no run"),
    ("a missing study", "study nowhere", "study: nowhere does not exist; experiments/"),
    ("a folder without a study", "study folder", "study: folder has no study.yaml"),
    ("no study", "study", "study: one folder is needed, such as"),
    ("an existing target of an export", "export to=folder", "to: folder exists already"),
    ("an export without a target", "export", "to: the folder to write is missing"),
    ("an invalid repository", "export push=mine", "push: 'mine' is not OWNER/NAME"),
    ("a push to a folder", "export push=a/b/c", "push: 'a/b/c' is not OWNER/NAME"),
    ("an invalid licence", "export to=a license='do what you want'", "license: 'do what you want' is not the name of"),
    ("the name of a language", "export to=a language=English", "language: 'English' is not the code of a language"),
    ("a push without a login", "export push=me/first", "push: not logged in to the Hugging Face Hub"),
    ("a target on the command line", "train +train._target_=os.system", "_target_"),
    (
        "another sweeper's target",
        "train -m hydra.sweeper._target_=os.system train.seed=1,2",
        "os.system: a group chooses",
    ),
    ("another launcher's target", "train -m hydra.launcher._target_=os.system train.seed=1,2", "os.system: a group"),
    ("a target of a single run", "train ++hydra.sweeper._target_=os.system", "os.system: a group chooses"),
    ("another configuration", "train --config-dir folder", "--config-dir ... conf/experiment"),
]

GRAMMAR = [
    ("a value without a key", "train =5", "=5: "),
    ("a line break without a key", "train 'a\n\x85b'", r"a\n\nb: not of the form key=value"),
    ("an open list", "train data.files=[a", "data.files=[a: not of the form key=value"),
    ("an open mapping", "train train={", "train={: not of the form key=value"),
    ("an open quote", 'train "name=\'a"', "name='a: not of the form key=value"),
    ("a sweep without -m", "train train.seed=1,2", "train.seed=1,2 ... -m"),
    ("an interpolation of an unknown key", "train sample_prompt=${nowhere}", "sample_prompt ... 'nowhere'"),
    ("an interpolation of itself", "train sample_prompt=${sample_prompt}", "sample_prompt"),
    ("an unknown resolver", "train sample_prompt=${random:}", "sample_prompt ... random"),
    ("an unset variable", "train sample_prompt=${oc.env:NOT_SET_HERE}", "sample_prompt ... NOT_SET_HERE"),
    ("a value that is missing", "train train.max_steps=???", "train.max_steps"),
]

YAML_WORDS = [
    ("wandb=no", "train wandb=no", "wandb=no: ... off"),
    ("data=null", "train data=null", "data=null: ... wikitext2"),
    ("model=true", "train model=true", "model=true: ... gpt2_nano"),
    ("experiment=1.5 in a sweep", "train -m experiment=1.5 train.seed=1,2", "experiment=1.5: ... quickstart"),
    ("data=null in evaluate.py", "evaluate data=null", "data=null: ... text"),
    ("hydra/launcher=null", "train -m hydra/launcher=null train.seed=1,2", "hydra/launcher=null: ... joblib"),
]

SWEEPS = [
    (
        "a file of a sweep",
        "train -m data=text data.files=[corpus.txt],[no.txt]",
        "data.files: no file matches 'no.txt'",
    ),
    ("a key of a sweep", "train -m train.sede=1 train.seed=1,2", "train.sede=1: Key 'sede'"),
    ("a run folder for a sweep", "train -m hydra.run.dir=a train.seed=1,2", "hydra.run.dir=a: is for one run; with -m"),
    ("a configuration of nanoGPT", "train config/train_gpt2.py", "config/train_gpt2.py: ... experiment=NAME chooses"),
    ("an option of nanoGPT", "train --n_layer=6", "unrecognized arguments: --n_layer=6; settings have no dashes"),
    ("another folder of configurations", "train --config-dir=/tmp", "--config-dir: is not supported here"),
    ("a sweep of Hydra's keys", "train -m hydra.run.dir=a,b", "hydra.run.dir=a,b: Hydra's own keys cannot be swept"),
    (
        "a storage that is a picture",
        "train -m hparams_search=optuna hydra.sweeper.storage=a.png",
        "hydra.sweeper.storage: 'a.png' is none of sqlite:///FILE",
    ),
    (
        "an unknown direction",
        "train -m hparams_search=optuna hydra.sweeper.direction=down",
        "hydra.sweeper.direction: 'down' is none of minimize, maximize",
    ),
    ("a reversed interval", "train -m hparams_search=optuna train.beta2=interval(1,0)", "train.beta2"),
    ("an unknown tag", "train -m hparams_search=optuna train.beta2=tag(ln,interval(0,1))", "no tag ln, only"),
    ("another sweeper in a study", "train -m hparams_search=optuna hydra/sweeper=basic", "hydra/sweeper"),
    ("a sweep of exports", "export -m to=a", "-m: only train.py makes several runs"),
]

PRESET_WORDS = {
    "missing_file": "data.files: no file matches 'nowhere.txt'",
    "missing_group_file": "model/gtp2",
    "missing_group": "modle",
    "unknown_key": "sede",
    "wrong_type": "seed",
    "wrong_range": "train.batch_size: 0 is not",
    "interpolation_of_nothing": "nowhere",
    "no_resolver": "random",
    "circle": "sample_prompt",
    "division_by_zero": "division by zero",
}


@rows([*TYPES, *RANGES, *CONTRADICTIONS])
def test_invalid_values(place, row):
    check(place, row)


@rows([*UNKNOWN, *GRAMMAR, *YAML_WORDS, *SWEEPS])
def test_unknown_names(place, row):
    check(place, row)


@rows([(name, f"train +mine={name}", PRESET_WORDS.get(name, f"mine={name}")) for name in PRESETS])
def test_presets_of_users(place, row):
    check(place, row)
