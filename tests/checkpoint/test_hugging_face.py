"""The format of `transformers`: reading what it writes, and writing what it reads."""

import json
import os
import resource
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from gpt2.checkpoint import format as checkpoint
from gpt2.checkpoint.hugging_face import _REQUIRED, WEIGHT_FILES
from gpt2.checkpoint.pretrained import export, open_model
from gpt2.config import GPT2Config, TrainingConfig
from gpt2.errors import UserError
from gpt2.model import GPT2Model
from gpt2.runtime.rng import versions
from gpt2.tokenizer import GPT2Tokenizer
from tests.conftest import ROOT, SHARED
from tests.helpers import CORPUS, noisy_model, only_a_pickle, rewrite_record, tiny_config, transformers_twin, with_value


def rewrite(folder: Path, change) -> None:
    """Change the stored tensors of a folder: `change` receives them as a dict by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def describe(folder: Path, **fields) -> None:
    """Change fields of a folder's `config.json`."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("size", ["gpt2", "gpt2_medium", "gpt2_large", "gpt2_xl"])
def test_logits_and_greedy_text_match_transformers(tmp_path, size):
    """With the layers and heads of each size, but narrow."""
    shape = OmegaConf.load(ROOT / "conf" / "model" / f"{size}.yaml")
    width = 4 * shape.num_heads
    shape = {"d_model": width, "d_ff": 4 * width, "num_heads": shape.num_heads, "num_layers": shape.num_layers}
    config = tiny_config(**shape, layer_norm_epsilon=1e-3)
    theirs = transformers_twin(noisy_model(config, std=0.1)).eval()
    theirs.save_pretrained(tmp_path)

    trained = open_model(str(tmp_path))
    ours = trained.build().eval()
    assert trained.config == config
    input_ids = torch.randint(config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(ours(input_ids)[0], theirs(input_ids).logits, atol=1e-5, rtol=1e-5)
    expected = theirs.generate(input_ids[:1, :4], max_new_tokens=12, do_sample=False, pad_token_id=0)
    ours_greedy = torch.stack(list(ours.generate(input_ids[:1, :4], 12, do_sample=False)), dim=1)
    assert ours_greedy.tolist() == expected[:, 4:].tolist()


def without_prefix(folder: Path) -> None:
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    rewrite(folder, strip)


def as_openai_stored_it(folder: Path) -> None:
    """Like `gpt2` on the Hub: without the prefix and the output layer, with a causal mask in each layer."""
    without_prefix(folder)

    def add_masks(tensors):
        tensors.pop("lm_head.weight", None)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(16, 16).tril().view(1, 1, 16, 16)
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(folder, add_masks)


def with_the_head_stored_too(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))


def in_shards(folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2


def with_the_head_only(folder: Path) -> None:
    """One tensor has two names, and a tool chose the other one."""
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))


LAYOUTS = [without_prefix, as_openai_stored_it, with_the_head_stored_too, with_the_head_only, in_shards]


@pytest.mark.parametrize("store", LAYOUTS, ids=lambda store: store.__name__)
def test_all_layouts_give_the_same_weights(folder, store):
    expected = open_model(str(folder)).tensors()
    store(folder)
    assert_close(open_model(str(folder)).tensors(), expected, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_fp32(folder, dtype):
    expected = open_model(str(folder)).tensors()
    rewrite(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    tensors = open_model(str(folder)).tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert_close(tensors, {name: t.to(dtype).float() for name, t in expected.items()}, atol=0, rtol=0)


def test_configuration_in_the_original_openai_format(folder):
    """Few fields, `n_ctx` beside `n_positions`, and no `n_inner`."""
    described = {"model_type": "gpt2", "n_ctx": 16, "n_positions": 16, "n_embd": 32, "n_head": 4, "n_layer": 2}
    (folder / "config.json").write_text(json.dumps({**described, "activation_function": "gelu_new"}))
    expected = GPT2Config(context_length=16, d_model=32, num_heads=4, num_layers=2, d_ff=128)
    assert open_model(str(folder)).config == expected


def test_all_names_of_transformers_for_a_field_are_accepted(folder):
    from transformers import GPT2Config as TheirConfig

    config, expected = json.loads((folder / "config.json").read_text()), open_model(str(folder)).config
    names = {theirs: alias for alias, theirs in TheirConfig.attribute_map.items()}
    assert {"n_embd", "n_layer", "n_head", "n_positions"} <= names.keys()
    (folder / "config.json").write_text(json.dumps({names.get(key, key): value for key, value in config.items()}))
    assert open_model(str(folder)).config == expected


def test_all_names_of_the_activation_are_accepted(folder):
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 999)
    for name in _REQUIRED["activation_function"]:
        describe(folder, activation_function=name)
        assert open_model(str(folder)).config.d_model == 16
        assert_close(ACT2FN[name](x), torch.nn.functional.gelu(x, approximate="tanh"), atol=1e-6, rtol=0)


def test_configuration_without_a_model_type_is_accepted_if_it_names_the_fields_of_gpt2(folder):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": 5}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    assert open_model(str(folder)).config.d_model == 16
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type is None, not 'gpt2'"):
        open_model(str(folder))


def test_classification_head_is_refused_and_its_base_is_accepted(folder):
    from transformers import GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(folder.parent / "classifier")
    with pytest.raises(
        UserError, match=r"it is a GPT2ForSequenceClassification.*transformer\.save_pretrained"
    ) as refused:
        open_model(str(folder.parent / "classifier"))
    assert len(refused.value.problems) == 1
    model.transformer.save_pretrained(folder.parent / "base")
    assert_close(open_model(str(folder.parent / "base")).tensors(), open_model(str(folder)).tensors(), atol=0, rtol=0)


def test_single_file_takes_precedence_over_an_index(folder):
    expected = open_model(str(folder)).tensors()
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"transformer.wte.weight": "gone.safetensors"}}'
    )
    assert_close(open_model(str(folder)).tensors(), expected, atol=0, rtol=0)


def test_patterns_match_all_files_of_sharded_weights(folder):
    in_shards(folder)
    files = {path.name for path in folder.glob("model*")}
    assert {name for name in files if any(fnmatch(name, pattern) for pattern in WEIGHT_FILES)} == files


def test_all_wrong_tensors_are_named_in_one_error(folder):
    def spoil(tensors):
        del tensors["transformer.h.0.ln_1.bias"], tensors["transformer.wpe.weight"]
        tensors["transformer.h.7.ln_1.bias"] = torch.zeros(16)
        tensors["score.weight"] = torch.zeros(2, 16)
        tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(40, 16)

    rewrite(folder, spoil)
    with pytest.raises(UserError) as refused:
        open_model(str(folder)).build()
    (line,) = refused.value.problems
    assert "2 missing: h.0.ln_1.bias, wpe.weight" in line
    assert "2 unexpected: h.7.ln_1.bias, score.weight" in line
    assert "1 misshapen: h.1.mlp.c_fc.weight (40, 16) instead of (16, 40)" in line


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def a_head_of_its_own(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"] + 1}))


def whole_numbers(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: t.to(torch.int8) for name, t in tensors.items()}))


def a_shard_too_few(folder: Path) -> None:
    in_shards(folder)
    next(folder.glob("model-00002-*")).unlink()


def an_index_that_leads_elsewhere(folder: Path) -> None:
    in_shards(folder)
    index = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder.parent / "model.safetensors").touch()


def a_config_of_words(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def an_index(content):
    def spoil(folder: Path) -> None:
        in_shards(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return spoil


def a_scalar_head(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.tensor(1.0)}))


def a_nan(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"][0].fill_(torch.nan))


def an_infinity(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors["transformer.wte.weight"].neg_().div_(0))


def a_tensor_twice(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"wte.weight": tensors["transformer.wte.weight"] + 1}))


REFUSED = [
    (an_index({"weight_map": ["a"]}), "the weight_map of its model.safetensors.index.json names no files"),
    (an_index({"weight_map": {"a": 1}}), "names no files"),
    (an_index({}), "names no files"),
    (a_nan, "NaN or infinity among the weights, in h.1.mlp.c_fc.weight$"),
    (an_infinity, "NaN or infinity among the weights, in wte.weight$"),
    (lambda folder: describe(folder, n_layer=900), r"10,776 missing: h.10.attn.c_attn.bias, \S+, \S+ and 10,773 more$"),
    (lambda folder: (folder / "config.json").write_text(f"[{'[],' * 2**21}0]"), "config.json: more than 4 MiB"),
    (a_scalar_head, r"1 misshapen: lm_head.weight \(\) instead of \(257, 16\)"),
    (a_tensor_twice, "holds wte.weight a second time"),
    (lambda folder: (folder / "config.json").write_text("[" * 200_000), "cannot read its config.json"),
    (lambda folder: (folder / "config.json").write_text("[]"), "its config.json holds no object"),
    (lambda folder: describe(folder, tie_word_embeddings=False), "tie_word_embeddings is False, not True"),
    (lambda folder: describe(folder, add_cross_attention=True), "add_cross_attention is True, not False"),
    (lambda folder: describe(folder, scale_attn_weights=False), "scale_attn_weights is False, not True"),
    *(
        (lambda folder, values=values: describe(folder, **values), f"describes no valid model: {complaint}")
        for values, complaint in (
            ({"n_layer": 2.5}, "num_layers: "),
            ({"n_layer": None}, "num_layers: "),
            ({"n_layer": 10**9}, "num_layers: "),
            ({"n_layer": 3000}, "num_layers: 3000 is not between 1 and 1000$"),
            ({"n_embd": 10**7, "n_inner": None}, "d_ff: 40000000 is not between 1 and 10"),
            ({"n_embd": 10**6, "n_head": 1, "n_inner": None}, "d_model: 1000000 makes a model of 2e[+]13 weights"),
            ({"n_embd": 10**400}, "d_model: .{,60} is not between 1 and .{,60}$"),
            ({"vocab_size": [[]] * 10**5}, "vocab_size: .{,60} is not a whole number$"),
            ({"n_head": 4.0}, "num_heads: "),
            ({"n_positions": None}, "context_length: "),
            ({"vocab_size": 10**30}, "vocab_size: "),
            ({"layer_norm_epsilon": None}, "layer_norm_epsilon: "),
            ({"attn_pdrop": 2}, "attention_dropout: "),
            ({"n_inner": "wide", "n_embd": "x"}, "d_model: .*; d_ff: "),
        )
    ),
    (only_a_pickle, r"pytorch_model.bin, a pickle, which can run code"),
    (no_weights, "it holds no model.safetensors"),
    (a_head_of_its_own, "its lm_head differs from its token embedding"),
    (whole_numbers, "stored as I8, not as plain floats"),
    (a_shard_too_few, "missing: model-00002-of-"),
    (an_index_that_leads_elsewhere, "missing: ../model.safetensors"),
    (a_config_of_words, "cannot read its config.json"),
    (lambda folder: describe(folder, model_type="llama"), "model_type is 'llama', not 'gpt2'"),
    (lambda folder: describe(folder, activation_function="gelu"), "activation_function is 'gelu', not 'gelu_new'"),
    (lambda folder: describe(folder, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (lambda folder: describe(folder, n_head=3), "3 heads do not divide d_model=16"),
    (lambda folder: describe(folder, use_bias=False), "says use_bias=false, but"),
]


def test_large_model_is_refused_before_it_is_built_or_read(folder, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda _: 100)  # 10 kB of memory
    with pytest.raises(UserError, match=r"a model of 2 layers, width 16 and 257 tokens takes 0 GB, this machine has"):
        open_model(str(folder)).build()


def test_no_model_is_built_to_compare_shapes(folder, monkeypatch):
    describe(folder, n_layer=900)
    built: list[int] = []
    monkeypatch.setattr(GPT2Model, "_initialize", lambda model: built.append(len(model.blocks)))
    with pytest.raises(UserError, match="10,776 missing"):
        open_model(str(folder)).build()
    assert set(built) == {1}


@pytest.mark.parametrize(
    ("spoil", "complaint"), REFUSED, ids=[f"{number} {complaint}" for number, (_, complaint) in enumerate(REFUSED)]
)
def test_other_models_are_refused_with_the_reason(folder, spoil, complaint):
    spoil(folder)
    with pytest.raises(UserError, match=complaint) as refused:
        open_model(str(folder)).build()
    assert str(folder) in str(refused.value)


def test_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged or incomplete"):
            open_model(str(folder)).build()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def save_checkpoint(path: Path, config: GPT2Config, tokenizer: GPT2Tokenizer) -> dict[str, torch.Tensor]:
    """A checkpoint as `Trainer` writes it, of an untrained model. Returns its weights."""
    tensors = noisy_model(config, std=0.05).state_dict()
    progress = {"step": 7, "tokens": 99, "seconds": 3.0, "val_loss": 2.5, "evaluated_at": 6}
    train = vars(TrainingConfig(batch_size=4))
    record = {"model": vars(config), "train": train, "run": None, "tokenizer": tokenizer.to_json()}
    about = {**record, "data": None, "progress": progress, "scaler": {}, "versions": versions()}
    checkpoint.write_checkpoint(path, {f"model/{name}": tensor for name, tensor in tensors.items()}, about)
    return tensors


@pytest.mark.parametrize("use_bias", [True, False])
def test_exported_model_is_bit_identical(tmp_path, use_bias):
    weights = save_checkpoint(
        tmp_path / "a.pth", tiny_config(vocab_size=257, use_bias=use_bias, dropout=0.2), GPT2Tokenizer.of_bytes()
    )
    original = open_model(str(tmp_path / "a.pth"))
    export(original, tmp_path / "out")
    again = open_model(str(tmp_path / "out"))
    assert again.config == original.config
    assert again.tokenizer.fingerprint == original.tokenizer.fingerprint
    assert_close(again.tensors(), weights, atol=0, rtol=0)


def test_export_equals_the_file_of_transformers(folder):
    export(open_model(str(folder)), folder.parent / "out")
    assert (folder.parent / "out" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


LOAD = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging
logging.disable_progress_bar()
results = []
for folder, prompt, text in json.load(sys.stdin):
    AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write = pipeline("text-generation", folder)
    texts = write([prompt, prompt * 2], batch_size=2, do_sample=False, max_new_tokens=9)  # needs a padding token
    written = texts[0][0]["generated_text"]
    ids = tokenizer(text)["input_ids"]
    results.append([written, ids, tokenizer.decode(ids)])
print(json.dumps(results))
"""


def test_transformers_loads_exports_without_warnings_and_generates_the_same(tmp_path):
    """All kinds of tokenizer in one process, because importing transformers takes seconds."""
    tokenizers = [GPT2Tokenizer.of_bytes(), GPT2Tokenizer.train([CORPUS], 300)]
    if (SHARED / "tokenizers" / "gpt2").is_dir():  # OpenAI's, beside some checkouts
        tokenizers.append(GPT2Tokenizer.from_folder(SHARED / "tokenizers" / "gpt2"))
    text = "The fox's 3 dogs …\n\n  jump — é漢🦊 ."
    requests, expected = [], []
    for number, tokenizer in enumerate(tokenizers):
        path, folder = tmp_path / f"{number}.pth", tmp_path / f"out{number}"
        config = tiny_config(vocab_size=tokenizer.vocab_size, use_bias=number == 0, context_length=64)
        save_checkpoint(path, config, tokenizer)
        trained = open_model(str(path))
        export(trained, folder)
        prompt = "The quick 🦊"
        model = trained.build()
        ids = tokenizer.encode(prompt)
        written = list(model.generate(torch.tensor([ids]), 9, do_sample=False, eos_token_id=tokenizer.eos_token_id))
        text_ids = [int(token) for token in written if int(token) != tokenizer.eos_token_id]
        requests.append([str(folder), prompt, text])
        expected.append([prompt + tokenizer.decode(text_ids), tokenizer.encode(text), text])
    done = subprocess.run([sys.executable, "-c", LOAD], input=json.dumps(requests), capture_output=True, text=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == expected


def test_export_states_special_tokens_and_length(tmp_path):
    save_checkpoint(tmp_path / "a.pth", tiny_config(vocab_size=257), GPT2Tokenizer.of_bytes())
    export(open_model(str(tmp_path / "a.pth")), tmp_path / "out")
    names = ("config", "generation_config", "tokenizer_config", "tokenizer")
    config, generation, about, tokenizer = (json.loads((tmp_path / "out" / f"{n}.json").read_text()) for n in names)
    assert config["bos_token_id"] == config["eos_token_id"] == generation["eos_token_id"] == 256
    assert generation["pad_token_id"] == 256
    assert about["model_max_length"] == config["n_ctx"] == 16
    assert (about["pad_token"], about["padding_side"]) == ("<|endoftext|>", "left")
    assert [token["content"] for token in tokenizer["added_tokens"] if token["special"]] == ["<|endoftext|>"]


def full_disk(folder: Path) -> Path:
    """Limit the size of files, which fails a write like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "out"


def where_something_is(folder: Path) -> Path:
    (folder / "out").mkdir()
    return folder / "out"


@pytest.mark.parametrize(
    ("place", "complaint"),
    [(full_disk, "cannot write"), (below_a_file, "cannot write"), (where_something_is, "exists already")],
)
def test_failed_export_leaves_nothing(folder, place, complaint):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = sorted(folder.parent.rglob("*"))
    try:
        to = place(folder.parent)
        with pytest.raises(UserError, match=f"to: .*{complaint}"):
            export(open_model(str(folder)), to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {path.name for path in folder.parent.rglob("*")} - {path.name for path in before} <= {"file", "out"}
    assert not list(folder.parent.glob("out/*"))


def test_model_without_tokenizer_is_exported_with_a_warning(folder, caplog):
    export(open_model(str(folder)), folder.parent / "out")
    assert "holds no tokenizer, so the exported folder has none" in caplog.text
    assert open_model(str(folder.parent / "out")).tokenizer is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda record: {}, "was not written by Trainer: model: missing; train: missing; progress: missing and 3 more"),
        (lambda record: with_value(record, "model.depth", 3), "this one does not know its model.depth$"),
        (lambda record: with_value(record, "model.num_layers", 3), r"12 missing: blocks.2.(\S+ ){3}and 9 more$"),
        (lambda record: with_value(record, "model.num_layers", 1), r"12 unexpected: blocks.1.(\S+ ){3}and 9 more$"),
    ],
)
def test_checkpoint_with_another_record_is_refused(tmp_path, change, complaint):
    save_checkpoint(tmp_path / "a.pth", tiny_config(vocab_size=257), GPT2Tokenizer.of_bytes())
    rewrite_record(tmp_path / "a.pth", change)
    with pytest.raises(UserError, match=complaint):
        open_model(str(tmp_path / "a.pth")).build()
