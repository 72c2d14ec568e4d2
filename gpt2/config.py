"""Every configuration of this repository, typed: what a YAML line may say, and its default.

A field of a dataclass here is a key of a file in `conf/`, and nothing else is. The dataclasses are registered as
Hydra's schema, so a typo or a wrong type is refused while the configuration is composed; what composition cannot
see (a relation between two fields) is found by `gpt2.problems`. Nothing heavy is imported here: a mistake is answered
before torch is loaded.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class GPT2Config:
    """The architecture (Radford et al., 2019). The defaults are GPT-2 124M."""

    vocab_size: int = 50257  # in a run from a script it follows the tokenizer
    context_length: int = 1024  # tokens
    d_model: int = 768
    num_heads: int = 12
    num_layers: int = 12
    d_ff: int = 3072
    dropout: float = 0.1  # after the embeddings
    attention_dropout: float = 0.1  # on the attention weights
    residual_dropout: float = 0.1  # before each residual addition
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02  # standard deviation; residual projections divide it by sqrt(2 * num_layers)
    use_bias: bool = True  # in the linear layers


@dataclass
class TrainingConfig:
    """How a model is trained. One optimizer step sees batch_size * accumulation_steps blocks."""

    batch_size: int = 8  # blocks in one forward pass
    learning_rate: float = 3e-4  # the peak
    weight_decay: float = 0.01  # on matrices only
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    max_epochs: int = 10
    max_training_hours: float = 12.0
    warmup_steps: int = 2000
    gradient_clip: float = 1.0  # largest norm of the whole gradient; 0 switches clipping off
    accumulation_steps: int = 1
    save_every: int = 1000  # steps
    eval_every: int = 500  # steps
    log_every: int = 100  # steps
    checkpoint_dir: str = "checkpoints"  # inside the run folder
    device: str = "auto"  # auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu
    num_workers: int = 4  # processes that load data, at most one a core that does not train
    pin_memory: bool = True
    mixed_precision: bool = True  # false: fp32 whatever the hardware
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more work

    init_from: str | None = (
        None  # a trained model to start from, see gpt2/checkpoint/pretrained.py; null: random weights
    )
    max_steps: int | None = None  # null: max_epochs decides
    seed: int = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where it is fast, fp16 on older GPUs
    compile: bool | str = "auto"  # torch.compile; auto: on CUDA, in runs that are long enough to gain by it
    min_learning_rate: float | None = None  # where the schedule ends; null: a tenth of learning_rate
    lr_schedule: Literal["cosine", "linear", "wsd"] = "cosine"  # how the rate falls after the warm-up
    decay_fraction: float = 0.2  # of the run's steps, the last ones, in which the rate of wsd falls
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    muon_momentum: float = 0.95
    eval_batches: int | None = None  # null: the whole split
    keep_checkpoints: int = 2  # the newest so many, and the best
    on_nonfinite: Literal["stop", "skip"] = "stop"  # what to do at a loss or gradient that is NaN or infinite
    nonfinite_limit: int = 20  # so many steps are skipped one after another; one more ends the run
    deterministic: bool = False  # the same bits each time on a GPU too, more slowly
    auto_resume: bool = False  # the same command line goes on with the run it began: for schedulers that restart jobs


@dataclass
class DataConfig:
    """Where text comes from and how it becomes tokens. Without `files`, it is a dataset of the Hub's kind."""

    dataset_name: str = "wikitext"  # on the Hugging Face Hub, or a folder laid out like one
    dataset_config: str | None = "wikitext-2-raw-v1"
    train_split: str = "train"
    validation_split: str | None = "validation"  # null: hold out validation_fraction of the training split
    test_split: str | None = "test"  # null: the validation split serves
    max_length: int = 1024  # tokens a block; the scripts let it follow model.context_length
    cache_dir: str | None = None  # null: the Hub's own cache, and ~/.cache/gpt2 for tokens
    preprocessing_num_workers: int = 4  # threads of the tokenizer

    text_column: str = "text"
    document_start: str | None = (
        r"^ = [^=]"  # rows that match begin a document (WikiText's titles); null: each row is one
    )
    files: list[str] | None = None  # text files, or patterns such as 'corpus/**/*.txt'
    exclude: list[str] = field(default_factory=list)  # patterns taken out of `files` again
    tokenizer: str = "gpt2"  # gpt2 | bytes | train (on this very text) | a folder that holds one | a trained model
    vocab_size: int = 4096  # of the tokenizer that `tokenizer: train` makes
    validation_fraction: float = 0.1  # held out where the source brings no validation split


@dataclass
class InferenceConfig:
    """How text is written."""

    max_new_tokens: int = 100
    temperature: float = 0.8  # 0 is greedy
    top_k: int | None = 50  # null: all
    top_p: float | None = 0.95  # null: all
    repetition_penalty: float = 1.2  # 1 is none
    do_sample: bool = True  # false is greedy
    num_return_sequences: int = 1
    stream: bool = True

    min_p: float | None = None  # tokens less likely than this share of the likeliest are left out; null: none
    stop: list[str] = field(default_factory=list)  # texts before which to end
    stop_at_end_of_text: bool = True  # false: go on after <|endoftext|>, with another document
    seed: int | None = None  # null: another text each time

    # How a trained model is loaded for writing; the samples of a training are written with the model as it is trained.
    precision: Literal["fp32", "bf16"] = "fp32"  # of the weights and all that is computed
    quantization: Literal["int8"] | None = None  # weights in 8 bits, on a CPU: a quarter of the bytes, nearly as good
    compile: bool = False  # torch.compile on CUDA: up to a minute at the start, faster after it


WHEN_LOADED = ("precision", "quantization", "compile")  # of InferenceConfig: nothing that a loaded model can change


@dataclass
class OptunaConfig:
    """A hyperparameter study."""

    n_trials: int = 50  # in all: a study that a storage holds is only filled up
    timeout: int | None = None  # seconds after which the study ends; a trial that is under way is saved, to go on later
    study_name: str = "gpt2_optimization"
    storage: str | None = None  # sqlite:///FILE, journal:///FILE, postgresql://..., mysql://...; None: memory
    direction: str = "minimize"  # or maximize: of each trial's lowest validation loss
    sampler: str = "TPE"  # TPE, Random, CmaEs, GP or QMC, in any case
    pruner: str = "MedianPruner"  # or median, SuccessiveHalvingPruner or asha, HyperbandPruner or hyperband, none
    n_startup_trials: int = 10  # drawn at random before TPE, CmaEs or GP begins; completed before the median prunes
    n_warmup_steps: int = 5  # evaluations: so many of each trial are not judged by the median or by asha

    trial_timeout: int | None = None  # seconds of training after which a trial is given up
    keep: Literal["best", "all"] = "best"  # the trials whose checkpoints stay


@dataclass
class StudyConfig:
    """`hydra.sweeper`, when a study is run from the command line: `OptunaConfig`, its sampler and pruner as groups."""

    _target_: str = "gpt2.cli.sweeper.StudySweeper"
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}, {"pruner": "median"}])
    sampler: Any = "???"  # conf/hydra/sweeper/sampler
    pruner: Any = "???"  # conf/hydra/sweeper/pruner
    n_trials: int = 50
    timeout: int | None = None
    study_name: str = "gpt2_optimization"
    storage: str | None = None  # null: study.db in the sweep's folder
    direction: str = "minimize"
    trial_timeout: int | None = None
    keep: Literal["best", "all"] = "best"
    n_jobs: int = 1  # trials that a launcher is handed at a time
    params: dict[str, str | None] = field(default_factory=dict)  # the space: key: sweep; null: not searched


@dataclass
class WandbConfig:
    """Tracking with Weights & Biases. Whatever happens there, the run goes on and `metrics.jsonl` holds everything."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online when logged in, otherwise offline
    project: str = "gpt2"
    entity: str | None = None
    log_checkpoints: Literal["none", "best"] = "none"  # best: upload it when the run ends, which may take ten minutes


@dataclass
class DistributedConfig:
    """Training on several devices; a process that torchrun has not started is alone, and none of it matters."""

    strategy: Literal["ddp", "fsdp"] = "ddp"  # ddp: each rank holds the whole model; fsdp: a part of it, for gpt2_xl
    timeout: float = 60.0  # seconds within which all ranks end, once one of them fails, dies or hangs


@dataclass
class StudyOfRun:
    """Which trial of which study a run is; null of none."""

    name: str | None = None
    trial: int | None = None
    claim: str | None = None  # which time that it was taken; a job of another time has no say any more


@dataclass
class TrainRun:
    """All that `train.py` needs."""

    name: str = "gpt2"  # the run lies in outputs/runs/<name>/
    model: GPT2Config = field(default_factory=GPT2Config)
    train: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)  # for the samples written while training
    wandb: WandbConfig = field(default_factory=WandbConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    profile: bool = False  # true: trace a few steps, and tell what takes the time
    sample_prompt: str = ""  # where each sample of text starts; empty: at the beginning of a document
    resume: str | None = None  # a run folder, or `latest`
    resume_changes: bool = False  # true: a resumed run may be told anything anew
    started_with: list[str] = field(default_factory=list)  # the command line that began it; filled in, not asked for
    choices: dict[str, str] = field(default_factory=dict)  # the file of each group of conf/; filled in, not asked for
    study: StudyOfRun = field(default_factory=StudyOfRun)  # filled in by a study, not asked for


@dataclass
class GenerateRun:
    """All that `generate.py` needs. `prompt` is taken from the command line exactly as the shell passed it."""

    prompt: str | None = None  # null: what is typed, in a session on a terminal; or else standard input, to its end
    prompts_file: str | None = None  # a prompt a line, or JSON objects with a "prompt" if its name ends in .jsonl
    batch_size: int = 8  # texts that are written side by side, where there are several
    allow_special_tokens: bool = False  # true: <|endoftext|> in a prompt is the special token, not its characters
    checkpoint: str | None = (
        None  # a trained model, see gpt2/checkpoint/pretrained.py; null: the best of the latest run
    )
    device: str = "auto"
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    quiet: bool = False  # say nothing of the model and its speed on standard error
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(mode="off"))  # prompts and texts, as a table


@dataclass
class EvaluateRun:
    """All that `evaluate.py` needs."""

    checkpoint: str | None = (
        None  # a trained model, see gpt2/checkpoint/pretrained.py; null: the best of the latest run
    )
    data: DataConfig = field(default_factory=DataConfig)  # the scripts: that of the checkpoint's run, unless chosen
    split: Literal["test", "validation", "train", "all"] = "test"
    stride: int | None = None  # tokens from one window of data.max_length to the next; null: windows do not overlap
    batch_size: int = 8  # windows in one forward pass
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    quantization: Literal["int8"] | None = None  # as InferenceConfig has it: what it costs
    wandb: WandbConfig = field(default_factory=WandbConfig)
    output: str | None = None  # null: evaluation.json in the checkpoint's run folder, or else in outputs/evaluations


@dataclass
class ExportRun:
    """All that `python -m gpt2.main export` needs."""

    checkpoint: str | None = (
        None  # a trained model, see gpt2/checkpoint/pretrained.py; null: the best of the latest run
    )
    to: str | None = None  # a folder that is not there yet


@dataclass
class GenerationBenchmark:
    """All that `python -m gpt2.main benchmark generation` needs."""

    model: GPT2Config = field(default_factory=GPT2Config)  # with random weights
    checkpoint: str | None = None  # a trained model instead, see gpt2/checkpoint/pretrained.py
    device: str = "auto"
    prompt_tokens: int = 64
    new_tokens: int = 128
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    repetitions: int = 5
    formats: list[str] = field(default_factory=lambda: ["fp32", "bf16", "int8"])  # of our weights; int8 on a CPU
    compile: bool = False  # ours, on CUDA
    json: str | None = None  # a file for everything that was measured


@dataclass
class TrainingBenchmark:
    """All that `python -m gpt2.main benchmark training` needs."""

    model: GPT2Config = field(default_factory=GPT2Config)  # with random weights
    train: TrainingConfig = field(default_factory=TrainingConfig)
    context: int | None = None  # tokens a block; null: model.context_length
    repetitions: int = 5  # in each, every contestant has its turn
    steps: int = 1  # a turn
    warmup: int = 2  # steps before, not counted; the first compiles
    precisions: list[str] = field(default_factory=lambda: ["auto"])  # fp32, bf16, fp16; auto: as train.precision says
    peer: str | None = None  # FILE.py:FUNCTION, see gpt2/benchmarks/peers.py
    memory: bool = True  # the peak of each contestant, in a process of its own
    overhead: bool = False  # Trainer.train() against its bare steps
    overhead_steps: int = 30  # of each, a repetition
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(mode="offline"))  # which Trainer.train() tells too
    json: str | None = None  # a file for everything that was measured


@dataclass
class DataBenchmark:
    """All that `python -m gpt2.main benchmark data` needs."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainingConfig = field(default_factory=TrainingConfig)  # batch_size, num_workers, pin_memory
    repetitions: int = 5
    batches: int = 200  # of the training loader, a repetition; at most an epoch
    json: str | None = None  # a file for everything that was measured


@dataclass
class StartupBenchmark:
    """All that `python -m gpt2.main benchmark startup` needs."""

    repetitions: int = 5
    json: str | None = None  # a file for everything that was measured


@dataclass
class StudyPlan:
    """`experiments/<study>/study.yaml`: the runs of a recorded study, and how they are shown.

    Its runs are all variants at all values of the sweep with all seeds.
    """

    variants: list[str] = "???"  # type: ignore[assignment]  # files beside it: what +<study>=<variant> chooses
    sweep: dict[str, list[Any]] = field(default_factory=dict)  # key: values
    seeds: list[int] = field(default_factory=lambda: [1])  # train.seed
    metric: str = "loss"  # what is compared, a column of gpt2/analysis/runs.py
    x: str = "variant"  # what it is shown over: a key, or a column
    lines: str = "variant"  # a line in the picture for each value of this key


Benchmark = GenerationBenchmark | TrainingBenchmark | DataBenchmark | StartupBenchmark
Run = TrainRun | EvaluateRun | GenerateRun | ExportRun | Benchmark
