"""Reading and writing the format of `transformers`."""

import json
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from gpt2.checkpoint.hugging_face import _ACTIVATIONS, WEIGHT_FILES
from gpt2.checkpoint.pretrained import open_model
from gpt2.config import GPT2Config
from gpt2.errors import UserError
from gpt2.model import APPROXIMATIONS, GPT2Model
from tests.conftest import ROOT
from tests.helpers import noisy_model, only_a_pickle, tiny_config, transformers_twin


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
    """The models have the layers and heads of each size, but are narrow."""
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
    """The embedding has two names, and some tools store only the one of the output layer."""
    rewrite(folder, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))


def by_save_model_of_safetensors(folder: Path) -> None:
    """`save_model` stores one of two names of a tensor."""
    from safetensors.torch import save_model
    from transformers import GPT2LMHeadModel

    save_model(GPT2LMHeadModel.from_pretrained(folder), str(folder / "model.safetensors"))
    assert {"lm_head.weight", "transformer.wte.weight"} - set(load_file(folder / "model.safetensors"))


def inside(around: str, within: str = ""):
    """Add a prefix to the names, as DDP, PEFT, FSDP and torch.compile do."""

    def store(folder: Path) -> None:
        def wrap(tensors):
            for name in list(tensors):
                new = name.replace("transformer.", f"transformer.{within}").replace("h.0.", f"h.0.{within}")
                tensors[around + new] = tensors.pop(name)

        with_the_head_stored_too(folder)
        rewrite(folder, wrap)

    store.__name__ = f"inside {around}{within}"
    return store


LAYOUTS = [
    *(without_prefix, as_openai_stored_it, with_the_head_stored_too, with_the_head_only, in_shards),
    *(by_save_model_of_safetensors, inside("module."), inside("base_model.model."), inside("model.")),
    *(inside("module._orig_mod."), inside("", "_orig_mod."), inside("", "_checkpoint_wrapped_module.")),
]


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


def test_all_names_of_an_activation_are_accepted(folder):
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 999)
    for activation, names in _ACTIVATIONS.items():
        for name in names:
            describe(folder, activation_function=name)
            assert open_model(str(folder)).config.activation == activation
            expected = torch.nn.functional.gelu(x, approximate=APPROXIMATIONS[activation])
            assert_close(ACT2FN[name](x), expected, atol=1e-6, rtol=0)


def test_configuration_without_a_model_type_is_accepted_if_it_names_the_fields_of_gpt2(folder):
    config = json.loads((folder / "config.json").read_text()) | {"architectures": 5}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    assert open_model(str(folder)).config.d_model == 16
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type is None, not 'gpt2'"):
        open_model(str(folder))


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("GPT2ForSequenceClassification", "score.weight"),
        ("GPT2ForTokenClassification", "classifier.bias, classifier.weight"),
        ("GPT2ForQuestionAnswering", "qa_outputs.bias, qa_outputs.weight"),
        ("GPT2DoubleHeadsModel", "multiple_choice_head.summary.bias, multiple_choice_head.summary.weight"),
    ],
)
def test_head_of_another_task_is_left_out_with_a_warning(folder, caplog, kind, head):
    import transformers

    getattr(transformers, kind).from_pretrained(folder).save_pretrained(folder.parent / "other")
    caplog.clear()
    expected = open_model(str(folder)).tensors()
    assert caplog.messages == []
    assert_close(open_model(str(folder.parent / "other")).tensors(), expected, atol=0, rtol=0)
    (warning,) = caplog.messages
    assert f"{folder.parent / 'other'}: left out {head}, the head of a classifier" in warning


def test_adapter_without_its_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a PEFT adapter, not a whole model; save what merge_and_unload\(\)"):
        open_model(str(tmp_path))


def test_reordered_and_upcast_attention_is_the_same_function(folder):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, reorder_and_upcast_attn=True, attn_implementation="eager").eval()
    model.save_pretrained(folder.parent / "other")
    ours = open_model(str(folder.parent / "other")).build().eval()
    input_ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert_close(ours(input_ids)[0], model(input_ids).logits, atol=1e-5, rtol=1e-5)


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
        tensors["scores.weight"] = torch.zeros(2, 16)
        tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(40, 16)

    rewrite(folder, spoil)
    with pytest.raises(UserError) as refused:
        open_model(str(folder)).build()
    (line,) = refused.value.problems
    assert "2 missing: h.0.ln_1.bias, wpe.weight" in line
    assert "2 unexpected: h.7.ln_1.bias, scores.weight" in line
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


def an_index_with_a_path_outside(folder: Path) -> None:
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


def an_adapter(folder: Path) -> None:
    def add(tensors):
        tensors["transformer.h.0.attn.c_attn.base_layer.weight"] = tensors.pop("transformer.h.0.attn.c_attn.weight")
        tensors["transformer.h.0.attn.c_attn.lora_A.default.weight"] = torch.zeros(8, 16)

    rewrite(folder, add)


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
    (an_adapter, r"its weights hold adapters of PEFT; save what merge_and_unload\(\) returns$"),
    (a_tensor_twice, "hold wte.weight more than once"),
    (lambda folder: (folder / "config.json").write_text("[" * 200_000), "cannot read its config.json"),
    (lambda folder: (folder / "config.json").write_text("[]"), "its config.json is not a JSON object"),
    (lambda folder: describe(folder, tie_word_embeddings=False), "tie_word_embeddings is False, not True"),
    (lambda folder: describe(folder, add_cross_attention=True), "add_cross_attention is True, not False"),
    (lambda folder: describe(folder, scale_attn_weights=False), "scale_attn_weights is False, not True"),
    *(
        (lambda folder, values=values: describe(folder, **values), f"describes an invalid model: {complaint}")
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
    (an_index_with_a_path_outside, "missing: ../model.safetensors"),
    (a_config_of_words, "cannot read its config.json"),
    (lambda folder: describe(folder, model_type="llama"), "model_type is 'llama', not 'gpt2'"),
    (lambda folder: describe(folder, activation_function="relu"), "activation_function is 'relu', not 'gelu_new'"),
    (lambda folder: describe(folder, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (lambda folder: describe(folder, n_head=3), "3 heads do not divide d_model=16"),
    (lambda folder: describe(folder, use_bias=False), "has use_bias=false, but"),
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
