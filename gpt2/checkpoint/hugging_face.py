"""GPT-2 in the format of `transformers`: a folder of `config.json`, `model.safetensors`, a tokenizer and a model card.

It holds the weights of `GPT2Model` under other names. Those of linear layers are transposed, as in OpenAI's code
(`Conv1D`). Weights are read from safetensors only: a pickle, such as `pytorch_model.bin`, can run code.
"""

import json
import logging
import re
import reprlib
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.checkpoint.format import check_memory, check_tensor_shapes, check_weights, save_tensors, shapes_of
from gpt2.config import GPT2Config
from gpt2.errors import UserError, few
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.validation import replace_checked

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 4 * 2**20
WEIGHT_FILES = [WEIGHTS, INDEX, "model-*-of-*.safetensors"]  # patterns

# Names of modules in `GPT2Model` -> in `transformers`.
_MODULES = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "blocks": "h",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.up": "mlp.c_fc",
    "feed_forward.down": "mlp.c_proj",
    "final_norm": "ln_f",
}
_MODULE = re.compile("|".join(map(re.escape, _MODULES)))
_EXPORTED = re.compile(rf"(blocks\.\d+\.)?({_MODULE.pattern})\.(weight|bias)")

# Fields of `GPT2Config` -> fields in `transformers`.
FIELDS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "d_model": "n_embd",
    "num_heads": "n_head",
    "num_layers": "n_layer",
    "d_ff": "n_inner",
    "dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
    "residual_dropout": "resid_pdrop",
    "layer_norm_epsilon": "layer_norm_epsilon",
    "initializer_range": "initializer_range",
    "use_bias": "use_bias",  # transformers preserves this field, although its GPT-2 always has biases
    "activation": "activation_function",
}

# Other names that the `GPT2Config` of `transformers` accepts (its `attribute_map`).
_ALIASES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
}

# Values of `GPT2Config.activation` -> names of the same function in `transformers`.
_ACTIVATIONS = {
    "gelu_new": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu_python_tanh"),
    "gelu": ("gelu", "gelu_python"),
}

# The values in `config.json` of a GPT-2. Other values are refused.
_REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": (*_ACTIVATIONS["gelu_new"], *_ACTIVATIONS["gelu"]),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

# Heads for other tasks: those of GPT2For... and GPT2DoubleHeadsModel in `transformers`, and the value head of TRL.
_OTHER_HEAD = re.compile(r"(score|classifier|qa_outputs|multiple_choice_head|v_head)\.")


def hf_name(name: str) -> str:
    """Translate a name to `transformers`: `blocks.0.attention.qkv.weight` -> `h.0.attn.c_attn.weight`."""
    return _MODULE.sub(lambda match: _MODULES[match[0]], name)


def hf_layout(name: str, tensor: "Tensor") -> "Tensor":
    """Convert a tensor of `GPT2Model` to the layout of `transformers`, or back.

    Weights of linear layers are transposed: (out, in) <-> (in, out).
    """
    return tensor.T.contiguous() if _is_linear(name) else tensor


def _is_linear(name: str) -> bool:
    return re.search(r"\.(attention|feed_forward)\.\w+\.weight$", name) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_config(folder: Path, source: str) -> GPT2Config:
    """Read the configuration in `config.json`.

    Raises:
        UserError: It does not describe a GPT-2 as OpenAI built it; every difference is named.
    """
    stored = _read_json(folder / CONFIG, source)
    stored = {_ALIASES.get(key, key): value for key, value in stored.items()}
    if {"n_embd", "n_head", "n_layer"} <= stored.keys():  # as in OpenAI's first files, which have no model_type
        stored.setdefault("model_type", "gpt2")
    checked = {key: stored.get(key) for key in _REQUIRED if key in stored or key == "model_type"}
    if wrong := [
        f"{key} is {reprlib.repr(value)}, not {_REQUIRED[key][0]!r}"
        for key, value in checked.items()
        if value not in _REQUIRED[key]
    ]:
        raise UserError(f"{source}: its {CONFIG} does not describe OpenAI's GPT-2: {'; '.join(wrong)}")

    values = {ours: stored[theirs] for ours, theirs in FIELDS.items() if theirs in stored}
    if "activation" in values:
        values["activation"] = next(ours for ours, names in _ACTIVATIONS.items() if values["activation"] in names)
    width = values.get("d_model", GPT2Config.d_model)
    if values.get("d_ff") is None:
        values["d_ff"] = 4 * width if isinstance(width, int) else GPT2Config.d_ff  # the default of transformers
    try:
        return replace_checked(GPT2Config(), values)
    except UserError as error:
        raise UserError(f"{source}: its {CONFIG} describes an invalid model: {few(error.problems, '; ')}") from error


def read_tensors(folder: Path, config: GPT2Config, source: str) -> "dict[str, Tensor]":
    """Read the weights in fp32, with the names of `GPT2Model`.

    Raises:
        UserError: The model does not fit into memory; a file is damaged; tensors are missing, unexpected, misshapen or
            not finite; or the output layer is not tied to the token embedding.
    """
    check_memory(config, source)
    shapes = shapes_of(replace(config, use_bias=True))
    with ExitStack() as files:
        stored = _open(files, _weight_files(folder, source), source)
        if "wte.weight" not in stored and "lm_head.weight" in stored:  # some tools store the tied tensor by this name
            stored["wte.weight"] = stored.pop("lm_head.weight")
        expected = {hf_name(name): shape[::-1] if _is_linear(name) else shape for name, shape in shapes.items()}
        head = stored.get("lm_head.weight")
        if head:
            expected["lm_head.weight"] = expected["wte.weight"]
        check_tensor_shapes(source, {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}, expected)
        if wrong := {tensor.get_dtype() for tensor in stored.values()} - {"F64", "F32", "F16", "BF16"}:
            raise UserError(f"{source}: its weights are stored as {', '.join(sorted(wrong))}, not as plain floats")

        tensors = {name: hf_layout(name, stored[hf_name(name)][:].float()) for name in shapes}
        check_weights(source, {hf_name(name): tensor for name, tensor in tensors.items()})
        if head and not head[:].float().equal(tensors["token_embedding.weight"]):
            raise UserError(f"{source}: its lm_head differs from its token embedding; in GPT-2 they are one tensor")
    return tensors if config.use_bias else _without_biases(tensors, config, source)


def _without_biases(tensors: "dict[str, Tensor]", config: GPT2Config, source: str) -> "dict[str, Tensor]":
    """Drop the zero biases with which `write_folder` exports a model that has none."""
    biases = tensors.keys() - shapes_of(config).keys()
    if nonzero := sorted(name for name in biases if tensors[name].any()):
        raise UserError(f"{source}: its {CONFIG} has use_bias=false, but these are not zero: {few(nonzero)}")
    return {name: tensor for name, tensor in tensors.items() if name not in biases}


def _open(files: ExitStack, paths: list[Path], source: str) -> dict[str, Any]:
    """Open the stored tensors as safetensors slices, which are not read yet, by their names without a prefix.

    Causal masks, which old files hold, are left out. Heads for other tasks are left out with a warning.
    """
    from safetensors import SafetensorError, safe_open

    stored: list[tuple[str, Any]] = []
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source}: {path.name} is damaged or incomplete: {error}") from error
        stored += [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118  # not a mapping

    names = _without_prefix([name for name, _ in stored])
    if any(".lora_" in name for name in names):
        raise UserError(f"{source}: its weights hold adapters of PEFT; save what merge_and_unload() returns")
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"{source}: its weights hold {few(twice)} more than once")
    if heads := [name for name in names if _OTHER_HEAD.match(name)]:
        log.warning(
            f"{source}: left out {few(heads)}, the head of a classifier or of another task; the model below it may not "
            "predict tokens."
        )
    ignored = re.compile(rf"{_OTHER_HEAD.pattern}|.*\.attn\.(masked_)?bias$")
    return {name: tensor for name, (_, tensor) in zip(names, stored, strict=True) if not ignored.match(name)}


def _without_prefix(names: list[str]) -> list[str]:
    """Remove the prefixes of names: `transformer.h.0.ln_1.bias` -> `h.0.ln_1.bias`.

    The prefix is longer if DDP or PEFT wrapped the model. torch.compile, FSDP and activation checkpointing may also
    wrap parts of the model.
    """
    names = [re.sub(r"_(orig_mod|\w+_wrapped_module)\.", "", name) for name in names]
    prefix = next((name.removesuffix("wpe.weight") for name in names if name.endswith("wpe.weight")), "transformer.")
    outer_prefix = prefix.removesuffix("transformer.")  # of lm_head, which is not part of the transformer
    return [name.removeprefix(prefix if name.startswith(prefix) else outer_prefix) for name in names]


def _weight_files(folder: Path, source: str) -> list[Path]:
    """The paths of `model.safetensors`, or of the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX, source).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"{source}: the weight_map of its {INDEX} names no files")
        names = sorted(set(names))
        if missing := [name for name in names if Path(name).name != name or not (folder / name).is_file()]:
            raise UserError(f"{source}: files named in {INDEX} are missing: {few(missing)}")
        return [folder / name for name in names]
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise UserError(
            f"{source}: its weights are in {', '.join(pickles)}, a pickle, which can run code when it is read; "
            f"provide {WEIGHTS}, as save_pretrained of transformers writes it"
        )
    raise UserError(f"{source}: it holds no {WEIGHTS}, and other formats are not supported")


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:  # parsed, it may take 20 times its size in memory
            raise ValueError(f"more than {MAX_JSON_BYTES / 2**20:.0f} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot read its {path.name}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: its {path.name} is not a JSON object")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_folder(
    folder: Path, config: GPT2Config, tensors: "dict[str, Tensor]", tokenizer: GPT2Tokenizer | None, card: str
) -> None:
    """Write the files that `AutoModelForCausalLM` and `AutoTokenizer` of `transformers` load.

    Args:
        tensors: The weights, with the names of `GPT2Model`.
        card: The model card, written as README.md.

    Raises:
        UserError: There are tensors that the GPT-2 of `transformers` does not have.
    """
    if others := [name for name in tensors if not _EXPORTED.fullmatch(name)]:
        raise UserError(f"checkpoint: cannot be exported, because GPT-2 of transformers has no {few(others)}")
    if config.parametrization == "mup":
        tensors = _in_standard(tensors, config)
    if not config.use_bias:
        tensors = _with_zero_biases(tensors, config)
    weights = {f"transformer.{hf_name(name)}": hf_layout(name, tensor) for name, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS, weights, {"format": "pt"})

    end_of_text = tokenizer and tokenizer.eos_token_id
    tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    description = {
        "architectures": ["GPT2LMHeadModel"],
        **{key: values[0] for key, values in _REQUIRED.items()},
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "n_ctx": config.context_length,  # as in OpenAI's files; the converter to GGUF reads it
        **tokens,
        "dtype": "float32",
    }
    _write_json(folder / CONFIG, description)
    _write_json(folder / "generation_config.json", {**tokens, "pad_token_id": end_of_text})
    if tokenizer is not None:
        tokenizer.to_folder(folder, config.context_length)
    (folder / "README.md").write_text(card, encoding="utf-8")


def logits(folder: Path, input_ids: "Tensor") -> "Tensor":
    """Compute the logits (b, t, v) of the model in a folder with `transformers`."""
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging as progress  # of loading

    shows_bars = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        model = GPT2LMHeadModel.from_pretrained(folder)
    finally:
        if shows_bars:
            progress.enable_progress_bar()
    return model.eval()(input_ids).logits


def _in_standard(tensors: "dict[str, Tensor]", config: GPT2Config) -> "dict[str, Tensor]":
    """Multiply mup's factors into weights: the scores' into the queries, the logits' into the final norm."""
    folded = dict(tensors)
    for name, tensor in tensors.items():
        if ".qkv." in name:
            folded[name] = tensor.clone()
            folded[name][: config.d_model] *= config.query_ratio
        elif name.startswith("final_norm."):
            folded[name] = tensor * config.width_ratio
    return folded


def _with_zero_biases(tensors: "dict[str, Tensor]", config: GPT2Config) -> "dict[str, Tensor]":
    shapes = shapes_of(replace(config, use_bias=True))
    weight = tensors["token_embedding.weight"]
    return {name: tensors[name] if name in tensors else weight.new_zeros(shape) for name, shape in shapes.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
