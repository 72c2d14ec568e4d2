"""The promised Python API, in the order of its reference: each default, each signature, each example.

`docs/api.md` is compared with the code too.
"""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from gpt2.checkpoint.pretrained import export, open_model
from gpt2.config import DataConfig, GPT2Config, InferenceConfig, OptunaConfig, TrainingConfig
from gpt2.data_loader import get_dataloaders, load_split, load_text_data
from gpt2.errors import UserError
from gpt2.evaluate import Evaluator
from gpt2.generation.text import stream_text
from gpt2.inference import TextGenerator
from gpt2.model import DecoderBlock, FeedForward, GPT2Model, MultiHeadAttention
from gpt2.optimize import OptunaOptimizer
from gpt2.tasks.run import TaskEvaluator, Tasks
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.train import Trainer
from tests.conftest import ROOT, SHARED, TEXT, Workspace

DOCUMENT = (ROOT / "docs" / "api.md").read_text()

# Configuration classes

PROMISED = {
    GPT2Config: {
        "vocab_size": 50257,
        "context_length": 1024,
        "d_model": 768,
        "num_heads": 12,
        "num_layers": 12,
        "d_ff": 3072,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "use_bias": True,
    },
    TrainingConfig: {
        "batch_size": 8,
        "learning_rate": 3e-4,
        "weight_decay": 0.01,
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "max_epochs": 10,
        "max_training_hours": 12.0,
        "warmup_steps": 2000,
        "gradient_clip": 1.0,
        "accumulation_steps": 1,
        "save_every": 1000,
        "eval_every": 500,
        "log_every": 100,
        "checkpoint_dir": "checkpoints",
        "device": "auto",
        "num_workers": 4,
        "pin_memory": True,
        "mixed_precision": True,
        "gradient_checkpointing": False,
    },
    DataConfig: {
        "dataset_name": "wikitext",
        "dataset_config": "wikitext-2-raw-v1",
        "train_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "max_length": 1024,
        "cache_dir": None,
        "preprocessing_num_workers": 4,
    },
    OptunaConfig: {
        "n_trials": 50,
        "timeout": None,
        "study_name": "gpt2_optimization",
        "storage": None,
        "direction": "minimize",
        "sampler": "TPE",
        "pruner": "MedianPruner",
        "n_startup_trials": 10,
        "n_warmup_steps": 5,
    },
    InferenceConfig: {
        "max_new_tokens": 100,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "repetition_penalty": 1.2,
        "do_sample": True,
        "num_return_sequences": 1,
        "stream": True,
    },
}


@pytest.mark.parametrize("cls", PROMISED, ids=lambda cls: cls.__name__)
def test_the_promised_fields_come_first_in_their_order_with_their_defaults(cls):
    promised = PROMISED[cls]
    fields = [(field.name, field.default) for field in dataclasses.fields(cls)]
    assert fields[: len(promised)] == list(promised.items())
    assert vars(cls(*promised.values())) == vars(cls(**promised)) == vars(cls())


def test_the_example_of_the_configuration():
    config = GPT2Config(d_model=1024, num_heads=16, num_layers=24)
    assert (config.d_model, config.num_heads, config.num_layers, config.vocab_size) == (1024, 16, 24, 50257)


# Signatures

SIGNATURES = [
    (GPT2Model, "config"),
    (GPT2Model.forward, "input_ids, labels=None"),
    (
        GPT2Model.generate,
        "input_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, do_sample=True",
    ),
    (MultiHeadAttention, "d_model, num_heads, dropout, use_bias"),
    (MultiHeadAttention.forward, "hidden_states, attention_mask=None"),
    (FeedForward, "d_model, d_ff, dropout, use_bias"),
    (FeedForward.forward, "x"),
    (DecoderBlock, "d_model, num_heads, d_ff, dropout, attention_dropout, layer_norm_epsilon, use_bias"),
    (DecoderBlock.forward, "hidden_states, attention_mask=None"),
    (Trainer, "model, train_loader, val_loader, config, checkpoint_dir=None"),
    (Trainer.train, ""),
    (Trainer.train_epoch, ""),
    (Trainer.validate, ""),
    (Trainer.save_checkpoint, "filename"),
    (Trainer.load_checkpoint, "filepath"),
    (Evaluator, "model, test_loader, device='cuda'"),
    (Evaluator.evaluate, ""),
    (Evaluator.print_metrics, "metrics"),
    (OptunaOptimizer, "train_loader, val_loader, base_config, training_config, optuna_config"),
    (OptunaOptimizer.optimize, ""),
    (TextGenerator, "model_path, device='cuda'"),
    (TextGenerator.generate_text, "prompt, config"),
    (TextGenerator.interactive_mode, "config"),
    (load_text_data, "data_config"),
    (get_dataloaders, "train_dataset, val_dataset, test_dataset, training_config"),
]


def parameters(function) -> list[str]:
    """The parameters of a function or constructor in Python's syntax, without types."""
    found = inspect.signature(function).parameters.values()
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found if parameter.name != "self"]
    assert all(parameter.kind is parameter.POSITIONAL_OR_KEYWORD for parameter in bare)
    return [str(parameter) for parameter in bare]


@pytest.mark.parametrize(("function", "promised"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures_begin_as_promised_and_other_parameters_have_defaults(function, promised):
    found, expected = parameters(function), promised.split(", ") if promised else []
    assert found[: len(expected)] == expected
    assert all("=" in parameter for parameter in found[len(expected) :])


# The examples, from data to text, with a small model and a text of two pages.


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    (folder / "book.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))


@pytest.fixture(scope="module")
def data(place):
    data_config = DataConfig(files=[str(place / "book.txt")], tokenizer="bytes", cache_dir=str(place), max_length=16)
    return load_text_data(data_config)


@pytest.fixture(scope="module")
def train_config() -> TrainingConfig:
    return TrainingConfig(max_steps=6, warmup_steps=2, eval_every=3, eval_batches=2, num_workers=0)


@pytest.fixture(scope="module")
def loaders(data, train_config):
    train_dataset, val_dataset, test_dataset, _ = data
    return get_dataloaders(train_dataset, val_dataset, test_dataset, training_config=train_config)


class Endless(IterableDataset):
    def __iter__(self):
        yield torch.zeros(4, dtype=torch.long)


@pytest.fixture(scope="module")
def config() -> GPT2Config:
    return GPT2Config(vocab_size=257, context_length=16, d_model=16, num_heads=2, num_layers=1, d_ff=32)


@pytest.fixture(scope="module")
def model(config) -> GPT2Model:
    return GPT2Model(config=config)


@pytest.fixture(scope="module")
def input_ids(data) -> torch.Tensor:
    return torch.tensor([data[-1].encode("def function")])


def test_load_text_data_and_get_dataloaders(data, loaders):
    assert isinstance(data[-1], GPT2Tokenizer)
    assert len(data) == 4
    assert len(loaders) == 3
    assert all(isinstance(loader, DataLoader) for loader in loaders)


def test_the_example_of_forward(model, input_ids):
    labels = input_ids
    logits, loss = model(input_ids, labels)
    assert logits.shape == (1, 12, 257)
    assert loss.dim() == 0
    assert model(input_ids=input_ids, labels=None)[1] is None


def test_the_example_of_generate(model, input_ids, data):
    tokenizer = data[-1]
    yielded = []
    for token in model.generate(input_ids, max_new_tokens=100):
        print(tokenizer.decode(token.tolist()))
        yielded.append(token)
    assert len(yielded) == 100


def test_generate_yields_tokens_and_returns_the_full_sequence(model, input_ids):
    positionally = model.generate(input_ids, 3, 0.5, 10, 0.9, 1.1, False)
    tokens = []
    while True:
        try:
            tokens.append(next(positionally))
        except StopIteration as stop:
            whole = stop.value
            break
    assert whole.tolist() == [input_ids[0].tolist() + [int(token) for token in tokens]]


def test_the_parts_of_the_model(input_ids):
    hidden_states = torch.randn(2, 5, 16)
    for positional, named in (
        (
            MultiHeadAttention(16, 2, 0.1, True),
            MultiHeadAttention(d_model=16, num_heads=2, dropout=0.1, use_bias=False),
        ),
        (FeedForward(16, 32, 0.1, True), FeedForward(d_model=16, d_ff=32, dropout=0.1, use_bias=False)),
        (
            DecoderBlock(16, 2, 32, 0.1, 0.1, 1e-5, True),
            DecoderBlock(
                d_model=16,
                num_heads=2,
                d_ff=32,
                dropout=0.1,
                attention_dropout=0.1,
                layer_norm_epsilon=1e-5,
                use_bias=False,
            ),
        ),
    ):
        assert positional(hidden_states).shape == named(hidden_states).shape == (2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    block = DecoderBlock(16, 2, 32, 0.0, 0.0, 1e-5, True)
    changed = hidden_states.clone()
    changed[1, 0] += 1  # under the mask
    assert torch.equal(block(hidden_states, attention_mask=mask)[1, 2:], block(changed, mask)[1, 2:])


def test_the_example_of_the_trainer(model, loaders, train_config):
    train_loader, val_loader, _ = loaders
    config = train_config
    trainer = Trainer(model, train_loader, val_loader, config)
    assert trainer.train() is None
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == [
        *("best_model.pth", "last.pth", "step_00000003.pth", "step_00000006.pth"),
    ]


def test_the_methods_of_the_trainer(config, loaders, train_config, tmp_path):
    train_loader, val_loader, _ = loaders
    trainer = Trainer(
        model=GPT2Model(config),
        train_loader=train_loader,
        val_loader=val_loader,
        config=train_config,
        checkpoint_dir=str(tmp_path),
    )
    assert isinstance(trainer.train_epoch(), float)
    loss = trainer.validate()
    assert isinstance(loss, float)
    assert trainer.save_checkpoint("mine.pth") is None
    other = Trainer(GPT2Model(config), train_loader, val_loader, train_config, str(tmp_path))
    assert other.load_checkpoint(filepath=str(tmp_path / "mine.pth")) is None
    assert other.validate() == loss


def test_the_example_of_the_evaluator(model, loaders, capsys):
    _, _, test_loader = loaders
    evaluator = Evaluator(model, test_loader)
    metrics = evaluator.evaluate()
    print(f"Perplexity: {metrics['perplexity']:.2f}")
    evaluator.print_metrics(metrics)
    assert {"loss", "perplexity"} <= metrics.keys()
    assert f"{metrics['loss']:.4f}" in capsys.readouterr().out


def test_the_example_of_the_optimizer(config, loaders, train_config):
    train_loader, val_loader, _ = loaders
    optuna_config = OptunaConfig(n_trials=2)
    optimizer = OptunaOptimizer(train_loader, val_loader, config, train_config, optuna_config)
    best_params = optimizer.optimize()
    assert 0 < best_params["train.learning_rate"] < 1


@pytest.fixture(scope="module")
def trained_here(place, config, loaders, train_config) -> None:
    """`checkpoints/best_model.pth`, in the place where all examples run."""
    train_loader, val_loader, _ = loaders
    Trainer(GPT2Model(config), train_loader, val_loader, train_config, str(place / "checkpoints")).train()


@pytest.mark.usefixtures("trained_here")
def test_the_example_of_the_generator(capsys):
    generator = TextGenerator("checkpoints/best_model.pth")
    config = InferenceConfig(max_new_tokens=100)
    generator.generate_text("Once upon a time", config)
    assert capsys.readouterr().out.startswith("Once upon a time")


@pytest.mark.usefixtures("trained_here")
def test_the_interactive_mode_continues_each_line_until_the_end(monkeypatch, capsys):
    lines = iter(["def f", KeyboardInterrupt(), "", "def g", EOFError()])

    def typed(_prompt: str) -> str:
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    TextGenerator("checkpoints/best_model.pth", "cpu").interactive_mode(InferenceConfig(max_new_tokens=5))
    printed = capsys.readouterr().out
    assert printed.index("def f") < printed.index("def g")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            lambda model, a, b: Trainer(model, a, b, TrainingConfig(precision="fp8")),
            "train.precision: 'fp8' is none of",
        ),
        (lambda model, a, b: Trainer(model, a, b, TrainingConfig(max_steps=-1)), "train.max_steps: -1 is not"),
        (lambda model, a, b: Trainer(model, a, b, TrainingConfig(max_steps=True)), "train.max_steps: True is not"),
        (lambda model, a, b: Trainer(model, a, b, TrainingConfig(learning_rate="1")), "train.learning_rate: '1' is"),
        (lambda model, a, b: Trainer(model, a, b, TrainingConfig(device=torch.device("cpu"))), "train.device: device"),
        (
            lambda model, a, b: Trainer(
                GPT2Model(dataclasses.replace(model.config, vocab_size=99)), a, b, TrainingConfig()
            ),
            "model.vocab_size: 99 is less than the 257 tokens of the data",
        ),
        (lambda model, a, b: Trainer(model, [1], b, TrainingConfig()), r"train_loader: \[1\] is not a DataLoader"),
        (lambda model, a, b: Trainer(model, a, None, TrainingConfig()), "val_loader: None is not a DataLoader"),
        (
            lambda model, a, b: Trainer(model, DataLoader(Endless()), b, TrainingConfig()),
            "train_loader: its dataset has no length",
        ),
        (lambda model, a, b: Evaluator(model, b, "tpu"), "device: 'tpu' is none of"),
        (
            lambda model, a, b: Evaluator(GPT2Model(dataclasses.replace(model.config, vocab_size=99)), b),
            "model.vocab_size: 99 is less than the 257 tokens of the data",
        ),
        (
            lambda model, a, b: Evaluator(GPT2Model(dataclasses.replace(model.config, context_length=8)), b),
            "data.max_length: blocks of 16 tokens do not fit into the context, 8",
        ),
        (
            lambda m, *_: list(stream_text(m, GPT2Tokenizer.of_bytes(), "", InferenceConfig(top_k=0), 1)),
            "inference.top_k: 0 is not",
        ),
        (lambda *_: load_text_data(DataConfig(files="book.txt")), "data.files: 'book.txt' is not a list of texts"),
        (
            lambda *_: load_text_data(DataConfig(files=["book.txt"], tokenizer="wat")),
            "data.tokenizer: 'wat' is neither gpt2, bytes nor train",
        ),
    ],
)
def test_mistakes_are_errors_of_one_line(model, loaders, make, complaint):
    train_loader, val_loader, _ = loaders
    with pytest.raises(UserError, match=complaint):
        make(model, train_loader, val_loader)


# Command line


@pytest.mark.parametrize("command", ["train", "evaluate", "optimize", "generate", "export"])
def test_each_command_of_the_module_answers_help(workspace: Workspace, command):
    done = workspace.module("gpt2.main", command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Keys (KEY=VALUE)" in done.stdout


def test_the_module_of_inference_is_the_script(trained: Workspace):
    done = trained.module("gpt2.inference", "prompt=def f", "inference.seed=1")
    assert done.stdout == trained.run("generate.py", "prompt=def f", "inference.seed=1").stdout
    assert done.returncode == 0


# docs/api.md


def tables(document: str) -> dict[str, list[list[str]]]:
    """The rows of the first table under each heading, a list of cells each, without the two lines of its head."""
    sections = re.split(r"^#{2,4} ", document, flags=re.MULTILINE)
    rows = {section.split("\n")[0]: re.findall(r"^\|(.*)\|$", section, flags=re.MULTILINE) for section in sections}
    return {name: [[cell.strip(" `") for cell in row.split("|")] for row in found[2:]] for name, found in rows.items()}


@pytest.mark.parametrize("cls", PROMISED, ids=lambda cls: cls.__name__)
def test_the_tables_of_the_document_are_the_fields_of_the_classes(cls):
    hints = inspect.get_annotations(cls)
    expected = [
        [field.name, hint.__name__ if isinstance(hint, type) else str(hint), repr(getattr(cls(), field.name))]
        for field in dataclasses.fields(cls)
        for hint in [hints[field.name]]
    ]
    found = [[name, kind.replace(" or ", " | "), default] for name, kind, default, _ in tables(DOCUMENT)[cls.__name__]]
    assert [[name, default] for name, _, default in found] == [[name, default] for name, _, default in expected]
    assert [kind.split("[")[0] for _, kind, _ in found] == [
        re.sub(r"typing\.(Optional\[)?", "", kind).split("[")[0] for _, kind, _ in expected
    ]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def test_the_signatures_of_the_document_are_those_of_the_code():
    others = (open_model, export, load_split, Tasks, TaskEvaluator)
    known = {function.__qualname__: function for function in (*dict(SIGNATURES), *others)}
    documented = {
        line.split("(")[0]: line for block in blocks("text") for line in re.sub(r"\n +", " ", block).splitlines()
    }
    for name, line in documented.items():
        assert line == f"{name}({', '.join(parameters(known[name]))})"
    methods = {re.sub(r"=.*?(?=[,)])", "", call) for call in re.findall(r"`(\w+\([\w, =]*\))", DOCUMENT)}
    for name in known.keys() - documented.keys():
        names_only = [parameter.split("=")[0] for parameter in parameters(known[name])]
        assert f"{name.split('.')[1]}({', '.join(names_only)})" in methods


def test_the_examples_of_the_document_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT)
    examples = blocks("python")
    assert len(examples) > 7
    names: dict = {}
    for example in examples:
        exec(example.replace("max_steps=100", "max_steps=4"), names)
    assert "Once upon a time" in capsys.readouterr().out
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the reference is not beside this checkout")
def test_the_tables_above_are_those_of_the_reference():
    reference = tables((SHARED / "api_reference.md").read_text())
    for cls, promised in PROMISED.items():
        rows = {name: default.strip('"') for name, _, default, _ in reference[cls.__name__]}
        assert rows.keys() == promised.keys()
        for name, default in rows.items():
            assert str(promised[name]) == default or float(promised[name]) == float(default)
