"""The configuration dataclasses: every key that a command line or a file in `conf/` may set, with type and default.

They are the schema of Hydra's composition (see `gpt2.cli.schema`) and the arguments of the Python API. The comment of a
field, behind it or on the lines directly above, is its line in `--help`. This module imports nothing heavy, so that a
mistake is reported before torch is loaded.
"""

from dataclasses import dataclass, field
from math import sqrt
from typing import Any, ClassVar, Literal


@dataclass
class GPT2Config:
    """Architecture of the model (Radford et al., 2019). The defaults are GPT-2 124M."""

    vocab_size: int = 50257  # tokens; the scripts set it to the tokenizer's
    context_length: int = 1024  # longest sequence, in tokens
    d_model: int = 768  # width of the residual stream, a multiple of num_heads
    num_heads: int = 12  # attention heads of a block
    num_layers: int = 12  # decoder blocks
    d_ff: int = 3072  # width of the feed-forward layer
    dropout: float = 0.1  # rate after the embeddings
    attention_dropout: float = 0.1  # rate on the attention weights
    residual_dropout: float = 0.1  # rate before each residual addition
    layer_norm_epsilon: float = 1e-5  # is added to the variance
    # Standard deviation of initial weights. For residual projections it is divided by sqrt(2 * num_layers).
    initializer_range: float = 0.02
    use_bias: bool = True  # whether linear layers have a bias
    activation: Literal["gelu_new", "gelu"] = "gelu_new"  # of feed-forward layers; new: OpenAI's tanh approximation
    parametrization: Literal["standard", "mup"] = "standard"  # mup: the best learning rate is the same for all widths
    mup_base_width: int = 256  # d_model at which mup has GPT-2's initialization, rates and logits
    mup_base_head_width: int = 64  # d_model / num_heads at which mup has GPT-2's attention

    @property
    def width_ratio(self) -> float:
        """With mup, the factor on the logits and on the initial variance and learning rate of hidden matrices."""
        return self.mup_base_width / self.d_model if self.parametrization == "mup" else 1.0

    @property
    def query_ratio(self) -> float:
        """With mup, the factor that makes attention divide by the head width instead of its square root."""
        return sqrt(self.mup_base_head_width * self.num_heads / self.d_model) if self.parametrization == "mup" else 1.0


# Fields of GPT2Config that the weights of a trained model determine.
SHAPE = ("vocab_size", "context_length", "d_model", "num_heads", "num_layers", "d_ff", "use_bias")
PARAMETRIZATION = ("parametrization", "mup_base_width", "mup_base_head_width")


@dataclass(frozen=True)
class OptimizerTraits:
    """What an optimizer supports; see `gpt2.training.optimizer.BUILDERS` for how it is built."""

    sharded: bool = True  # works under FSDP, where each rank has only a part of each matrix
    skips_nonfinite: bool = False  # its CUDA kernels skip the step if `found_inf` is 1
    scales: bool = True  # scales its learning rate by the width, which model.parametrization=mup needs
    package: str = "torch"  # pip package that provides it
    ignores: tuple[str, ...] = ("muon_momentum",)  # fields of TrainingConfig; without lr_schedule the rate is constant


OPTIMIZERS = {
    "adamw": OptimizerTraits(skips_nonfinite=True),
    "muon": OptimizerTraits(sharded=False, skips_nonfinite=True, ignores=()),
    "adafactor": OptimizerTraits(sharded=False, scales=False, ignores=("beta1", "beta2", "epsilon", "muon_momentum")),
    "schedule_free": OptimizerTraits(
        sharded=False,
        package="schedulefree",
        ignores=("min_learning_rate", "lr_schedule", "decay_fraction", "muon_momentum"),
    ),
}

# Benchmarks that a model can be evaluated on, and their datasets on the Hub; see `gpt2.tasks.table`.
TASKS = {
    "hellaswag": "Rowan/hellaswag",
    "lambada": "EleutherAI/lambada_openai",
    "piqa": "baber/piqa",
    "arc_easy": "allenai/ai2_arc",
    "winogrande": "allenai/winogrande",
}


@dataclass
class TrainingConfig:
    """Training. One optimizer step reads batch_size * accumulation_steps blocks of data.max_length tokens."""

    batch_size: int = 8  # blocks in a forward pass
    learning_rate: float = 3e-4  # peak of the schedule
    weight_decay: float = 0.01  # applies to matrices, not to biases and layer norms
    beta1: float = 0.9  # decay rate of AdamW's first moment
    beta2: float = 0.95  # decay rate of AdamW's second moment
    epsilon: float = 1e-8  # is added to AdamW's denominator
    max_epochs: int = 10  # training ends at max_epochs, max_steps or max_training_hours, whichever comes first
    max_training_hours: float = 12.0  # limit for a run with all its resumptions
    warmup_steps: int = 2000  # steps in which the learning rate rises linearly
    gradient_clip: float = 1.0  # largest norm of the whole gradient; 0: no clipping
    accumulation_steps: int = 1  # forward passes in an optimizer step
    save_every: int = 1000  # steps between checkpoints
    eval_every: int = 500  # steps between validations
    log_every: int = 100  # steps between log lines
    checkpoint_dir: str = "checkpoints"  # name of a folder inside the run folder
    device: str = "auto"  # auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu
    num_workers: int = 4  # processes that load data; at most one for each core that is not used for training
    pin_memory: bool = True  # load batches into page-locked memory, from which copies to a GPU are faster
    mixed_precision: bool = True  # false: fp32, regardless of precision
    # Recompute activations in the backward pass: less memory, a third more compute.
    gradient_checkpointing: bool = False

    init_from: str | None = None  # start from the weights of a trained model, named as checkpoint= of generate.py
    max_steps: int | None = None  # null: max_epochs decides
    seed: int = 1  # determines initial weights, dropout and the order of the data
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where it is fast, fp16 on older GPUs
    compile: bool | str = "auto"  # torch.compile: true, false or auto (on CUDA, if the run is long enough to gain)
    min_learning_rate: float | None = None  # end of the schedule; null: a tenth of learning_rate
    lr_schedule: Literal["cosine", "linear", "wsd"] = "cosine"  # decay after the warm-up; wsd: warm-up, stable, decay
    decay_fraction: float = 0.2  # share of the steps in which wsd decays, at the end of the run
    # muon: for the matrices of the blocks, AdamW for the other weights; schedule_free: AdamW without a schedule.
    optimizer: Literal["adamw", "muon", "adafactor", "schedule_free"] = "adamw"
    muon_momentum: float = 0.95
    eval_batches: int | None = None  # batches of a validation; null: the whole split
    # Tasks that each validation scores too: hellaswag, lambada, piqa, arc_easy, winogrande.
    eval_tasks: list[str] = field(default_factory=list)
    eval_tasks_limit: int | None = 500  # first documents of each task; null: all
    eval_tasks_folder: str | None = None  # local folder with their datasets, like tasks_folder of evaluate.py
    keep_checkpoints: int = 2  # newest checkpoints to keep, beside the best and the last
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what to do if the loss or gradient is NaN or infinite
    nonfinite_limit: int = 20  # consecutive steps that may be skipped; one more ends the run
    deterministic: bool = False  # deterministic algorithms on a GPU too; slower
    auto_resume: bool = False  # a repeated command line resumes its run: for schedulers that restart jobs
    detect_anomaly: bool = False  # a NaN in a backward pass ends the run with the traceback of its operation; slow


@dataclass
class DataConfig:
    """The text and its tokenizer. The source is `files` if they are given, otherwise a Hugging Face dataset."""

    dataset_name: str = "wikitext"  # name on the Hugging Face Hub, or a local folder laid out like one
    dataset_config: str | None = "wikitext-2-raw-v1"  # name of the configuration, for datasets that have several
    train_split: str = "train"
    validation_split: str | None = "validation"  # null: validation_fraction of the training split
    test_split: str | None = "test"  # null: test on the validation split
    max_length: int = 1024  # tokens in a block; default in the scripts: model.context_length
    cache_dir: str | None = None  # null: the cache of the Hub for datasets, ~/.cache/gpt2 for tokens
    preprocessing_num_workers: int = 4  # threads of the tokenizer

    text_column: str = "text"  # column of the dataset, or of files that hold records (.jsonl, .csv)
    # Regular expression: a row that matches begins a document (by default a title of WikiText); null: each row is one.
    document_start: str | None = r"^ = [^=]"
    files: list[str] | None = None  # text files, or patterns such as 'corpus/**/*.txt'; each file is a document
    exclude: list[str] = field(default_factory=list)  # patterns of files to leave out
    validation_files: list[str] | None = None  # for validation, whether in `files` or not; null: validation_fraction
    # gpt2, bytes (one token a byte), train (learn it from the text), a folder with a tokenizer, or a trained model.
    tokenizer: str = "gpt2"
    vocab_size: int = 4096  # tokens of a tokenizer that is learned (tokenizer: train)
    validation_fraction: float = 0.1  # share of the training split used if there is no validation split


@dataclass
class InferenceConfig:
    """Text generation: sampling, when to stop, and how the model is loaded."""

    max_new_tokens: int = 100
    temperature: float = 0.8  # divides the logits; 0: greedy
    top_k: int | None = 50  # keep the k likeliest tokens; null: all
    top_p: float | None = 0.95  # keep the fewest tokens whose probabilities sum to this; null: all
    repetition_penalty: float = 1.2  # 1: none
    do_sample: bool = True  # false: greedy
    num_return_sequences: int = 1  # texts per prompt
    stream: bool = True  # print the text as it is generated

    min_p: float | None = None  # keep tokens with at least this fraction of the largest probability; null: all
    stop: list[str] = field(default_factory=list)  # strings that end a text and are not part of it
    stop_at_end_of_text: bool = True  # false: continue after <|endoftext|>, with another document
    seed: int | None = None  # null: random

    # How the model is loaded; not for samples during training.
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # weights and products; auto: bf16 on newer GPUs, else fp32
    # Quantize the weights, on a CPU. int8: a quarter of the bytes, nearly the same loss. int4: an eighth, a slightly
    # higher loss, for one text at a time.
    quantization: Literal["int8", "int4"] | None = None
    compile: bool = False  # CUDA: a static cache and torch.compile(mode="reduce-overhead"), up to a minute at the start
    # prompt_lookup: draft the tokens that followed earlier, check them in one pass; faster if the text is repetitive
    speculate: Literal["prompt_lookup"] | None = None


# Fields of InferenceConfig that are fixed once a model is loaded.
WHEN_LOADED = ("precision", "quantization", "compile", "speculate")


@dataclass
class OptunaConfig:
    """A hyperparameter study. For each trial, the objective is its lowest validation loss."""

    n_trials: int = 50  # total number of trials, including those that are in the storage already
    timeout: int | None = None  # seconds after which the study ends; the same command resumes a running trial
    study_name: str = "gpt2_optimization"
    storage: str | None = None  # sqlite:///FILE, journal:///FILE, postgresql://..., mysql://...; None: memory
    direction: str = "minimize"  # or maximize
    sampler: str = "TPE"  # a name in gpt2/search/algorithms.py: tpe, random, cmaes, gp, qmc, in any case
    pruner: str = "MedianPruner"  # a name in the same file, or Optuna's: median, asha, hyperband, none
    n_startup_trials: int = 10  # random trials before TPE, CMA-ES or GP; trials before the median pruner starts
    n_warmup_steps: int = 5  # first evaluations of a trial, at which the median pruner and asha do not prune it

    trial_timeout: int | None = None  # seconds of training after which a trial is stopped and counts as pruned
    keep: Literal["best", "all"] = "best"  # trials whose checkpoints are not deleted


@dataclass
class StudyConfig(OptunaConfig):
    """Schema of `hydra.sweeper` for `hydra/sweeper: study`.

    The sampler and the pruner are config groups. Without a storage, the study is a file in the folder of the sweep.
    """

    _target_: str = "gpt2.cli.sweeper.StudySweeper"
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "median"}])
    sampler: Any = "???"  # a file of conf/hydra/sweeper/sampler
    pruner: Any = "???"  # a file of conf/hydra/sweeper/pruner
    n_jobs: int = 1  # trials that the launcher runs at a time
    params: dict[str, str | None] = field(default_factory=dict)  # search space, key: sweep; null: not searched


@dataclass
class WandbConfig:
    """Tracking with Weights & Biases. Its failures never end a run, and `metrics.jsonl` holds everything."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online when logged in, otherwise offline
    project: str = "gpt2"
    entity: str | None = None
    log_checkpoints: Literal["none", "best"] = "none"  # best: upload it at the end, which may take ten minutes


@dataclass
class MlflowConfig:
    """Tracking with MLflow, if `loggers` has it."""

    tracking_uri: str | None = None  # a folder or an address; null: MLFLOW_TRACKING_URI, or else outputs/mlruns
    experiment: str = "gpt2"  # experiment of all runs; runs of the same study or name share the tag `group`


Logger = Literal["wandb", "tensorboard", "mlflow", "csv"]
ServerLogger = Literal["wandb", "mlflow"]  # loggers that need no run folder, which only train.py has
EXTRA_LOGGERS = ("tensorboard", "mlflow")  # loggers with a package and an extra of the same name in pyproject.toml


@dataclass
class DistributedConfig:
    """Training with torchrun on several devices. It has no effect in a single process."""

    strategy: Literal["ddp", "fsdp"] = "ddp"  # ddp: each rank has the whole model; fsdp: a shard of it, for gpt2_xl
    timeout: float = 600.0  # seconds that a collective operation may wait for the slowest rank


@dataclass
class StudyOfRun:
    """The trial that a run of a study trains; all null for other runs. Set by the study."""

    name: str | None = None
    trial: int | None = None  # number of the trial
    claim: str | None = None  # identifies this attempt at the trial; a job with an older claim may not report


@dataclass
class TrainRun:
    """The configuration of `train.py`."""

    name: str = "gpt2"  # runs are written to outputs/runs/<name>/
    model: GPT2Config = field(default_factory=GPT2Config)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)  # for the samples written during training
    loggers: list[Logger] = field(default_factory=lambda: ["wandb"])  # any of wandb, tensorboard, mlflow, csv; []: none
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    plan: bool = False  # print what the run costs here (tokens, FLOPs, memory, hours) and end; nothing is downloaded
    profile: bool = False  # trace a few steps with PyTorch's profiler and print where the time goes
    sample_prompt: str = ""  # prompt of the samples; empty: the beginning of a document
    resume: str | None = None  # run folder to resume, or latest
    resume_changes: bool = False  # true: a resumed run may change all but shape and tokenizer of its model
    started_with: list[str] = field(default_factory=list)  # set by train.py: the command line that started the run
    choices: dict[str, str] = field(default_factory=dict)  # set by train.py: the file chosen in each group of conf/
    study: StudyOfRun = field(default_factory=StudyOfRun)  # set by a study


@dataclass
class GenerateRun:
    """The configuration of `generate.py`."""

    # Any text, exactly as the shell passes it. null: a session on a terminal, or the text from standard input.
    prompt: str | None = None
    prompts_file: str | None = None  # a prompt per line, or a JSON object with "prompt" (.jsonl); prints JSON
    batch_size: int = 8  # texts that are generated at a time
    allow_special_tokens: bool = False  # true: <|endoftext|> in a prompt is the special token, not its characters
    # Run folder, checkpoint file, Hugging Face folder, or a model on the Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    # OWNER/NAME); null: the best checkpoint of the latest run.
    checkpoint: str | None = None
    device: str = "auto"  # auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu
    inference: InferenceConfig = field(default_factory=InferenceConfig)  # default: as in the run of the checkpoint
    quiet: bool = False  # print nothing about the model and its speed on standard error
    loggers: list[ServerLogger] = field(default_factory=lambda: ["wandb"])  # any of wandb, mlflow, to log the texts
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(mode="off"))
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)


@dataclass
class EvaluateRun:
    """The configuration of `evaluate.py`."""

    # Run folder, checkpoint file, Hugging Face folder, or a model on the Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    # OWNER/NAME); null: the best checkpoint of the latest run. [A,B]: several, on the data of the first.
    checkpoint: Any = None
    all_checkpoints: bool = False  # evaluate every checkpoint of the run: a table and a curve
    data: DataConfig = field(default_factory=DataConfig)  # default: the data that the model was trained on
    split: Literal["test", "validation", "train", "all"] = "test"
    stride: int | None = None  # tokens between the starts of two windows; null: windows do not overlap
    # Instead of a corpus: any of hellaswag, lambada, piqa, arc_easy, winogrande.
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None  # first documents of each task, for a quick try; null: all
    # Local folder that holds the datasets of tasks under their names on the Hub, such as FOLDER/Rowan/hellaswag; null:
    # from the Hub or its cache.
    tasks_folder: str | None = None
    batch_size: int = 8  # windows, or documents of a task, in a forward pass
    device: str = "auto"  # auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: as train.precision on CUDA, fp32 elsewhere
    quantization: Literal["int8", "int4"] | None = None  # quantize the weights, on a CPU
    loggers: list[ServerLogger] = field(default_factory=lambda: ["wandb"])  # any of wandb, mlflow
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    output: str | None = None  # null: evaluation.json in the run folder of the checkpoint, else in outputs/evaluations
    others: ClassVar[list["EvaluateRun"]] = []  # set by `resolve`: configurations of the other checkpoints; not a key


@dataclass
class ExportRun:
    """The configuration of `python -m gpt2.main export`."""

    checkpoint: str | None = None  # run folder or checkpoint file; null: the best checkpoint of the latest run
    to: str | None = None  # folder to create
    push: str | None = None  # OWNER/NAME: upload the exported files to this repository of the Hugging Face Hub
    private: bool = True  # a repository that push creates is private; one that exists keeps its visibility
    license: str = "unknown"  # name for the model card, as on the Hub: mit, apache-2.0, cc-by-sa-4.0, other, ...
    language: str | None = None  # language of the text, for the model card: en; several: 'en de'


@dataclass
class GenerationBenchmark:
    """The configuration of `python -m gpt2.main benchmark generation`."""

    model: GPT2Config = field(default_factory=GPT2Config)  # with random weights
    device: str = "auto"
    prompt_tokens: int = 64
    new_tokens: int = 128
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    repetitions: int = 5
    json: str | None = None  # file for all results


@dataclass
class TrainingBenchmark:
    """The configuration of `python -m gpt2.main benchmark training`."""

    model: GPT2Config = field(default_factory=GPT2Config)  # with random weights
    train: TrainingConfig = field(default_factory=TrainingConfig)
    repetitions: int = 5  # each program has one turn per repetition
    steps: int = 1  # optimizer steps in a turn
    warmup: int = 2  # steps that are not timed; the first compiles
    # auto: train.precision
    precisions: list[Literal["auto", "fp32", "bf16", "fp16"]] = field(default_factory=lambda: ["auto"])
    peer: str | None = None  # FILE.py:FUNCTION, see gpt2/benchmarks/peers.py
    json: str | None = None  # file for all results


@dataclass
class DoctorRun:
    """The configuration of `python -m gpt2.main doctor`."""

    device: str = "auto"  # auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu
    json: str | None = None  # file for all results


@dataclass
class StudyPlan:
    """`experiments/<study>/study.yaml`: the runs of a recorded study and how their results are shown.

    The runs are all combinations of variants, values of the sweep and seeds.
    """

    variants: list[str]  # files beside study.yaml, chosen as +<study>=<variant>
    sweep: dict[str, list[Any]] = field(default_factory=dict)  # key: values
    seeds: list[int] = field(default_factory=lambda: [1])  # values of train.seed
    metric: str = "loss"  # what is compared: a column of gpt2/analysis/runs.py
    x: str = "variant"  # x axis of the plot: a key or a column
    lines: str = "variant"  # key whose values are the lines of the plot; the key of x: one line
    panels: str | None = None  # key whose values are the panels of the plot, one below the other


# Keys of a TrainRun that are never taken from a checkpoint: accounts, places, devices and workers of its user.
USER_KEYS = (
    *("wandb.mode", "wandb.project", "wandb.entity", "wandb.log_checkpoints"),
    *("mlflow.tracking_uri", "mlflow.experiment"),
    *("data.cache_dir", "data.preprocessing_num_workers", "train.device", "train.num_workers"),
)

Run = TrainRun | EvaluateRun | GenerateRun | ExportRun | GenerationBenchmark | TrainingBenchmark | DoctorRun

# The configuration of each command, by the name of its file in conf/. --help reads it without Hydra.
SCHEMAS: dict[str, type[Run]] = {
    "train": TrainRun,
    "evaluate": EvaluateRun,
    "generate": GenerateRun,
    "export": ExportRun,
    "benchmark_generation": GenerationBenchmark,
    "benchmark_training": TrainingBenchmark,
    "doctor": DoctorRun,
}
