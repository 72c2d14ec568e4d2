"""GPT-2 as the folder that `transformers` reads and writes: `config.json`, `model.safetensors`, a tokenizer, a card.

Theirs and ours hold the same numbers under other names; theirs keep the weights of linear layers transposed, as
OpenAI's code did. Weights are read from safetensors only: a pickle, such as `pytorch_model.bin`, can run code.
"""

import json
import re
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2.checkpoint.format import check_tensor_shapes, save_tensors, shapes_of
from gpt2.config import GPT2Config
from gpt2.errors import UserError
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.validation import replace_checked

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = [WEIGHTS, INDEX, "model-*-of-*.safetensors"]  # patterns

_THEIR_NAMES = {
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
_OUR_NAMES = re.compile("|".join(map(re.escape, _THEIR_NAMES)))

_THEIR_FIELDS = {
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
    "use_bias": "use_bias",  # a word of ours, which theirs keep: their GPT-2 always has biases, then zeros
}

# What makes a GPT-2 of transformers the one that OpenAI built; for each key the values that do.
_OPENAI = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def hf_name(name: str) -> str:
    """`blocks.0.attention.qkv.weight` -> `h.0.attn.c_attn.weight`."""
    return _OUR_NAMES.sub(lambda match: _THEIR_NAMES[match[0]], name)


def hf_layout(name: str, tensor: "Tensor") -> "Tensor":
    """A tensor of ours, of that name, as theirs; or theirs as ours: (out, in) <-> (in, out) in linear layers."""
    is_linear = re.search(r"\.(attention|feed_forward)\.\w+\.weight$", name)
    return tensor.T.contiguous() if is_linear else tensor


def read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot read its {path.name}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{source}: its {path.name} holds no object")
    return content


# ---------------------------------------------------------------------------------------------------------------------
# In


def read_config(folder: Path, source: str) -> GPT2Config:
    """What `config.json` says.

    Raises:
        UserError: It describes no GPT-2, or not the one that OpenAI built; all that differs is named.
    """
    described = read_json(folder / CONFIG, source)
    said = {key: described.get(key) for key in _OPENAI if key in described or key == "model_type"}
    if other := {key: value for key, value in said.items() if value not in _OPENAI[key]}:
        told = "; ".join(f"{key} is {value!r}, not {_OPENAI[key][0]!r}" for key, value in other.items())
        raise UserError(f"{source}: its {CONFIG} describes no GPT-2 as OpenAI built it: {told}")

    values = {ours: described[theirs] for ours, theirs in _THEIR_FIELDS.items() if theirs in described}
    has_d_ff = values.get("d_ff") is not None
    if not has_d_ff:
        values.pop("d_ff", None)
    try:
        config = replace_checked(GPT2Config(), values)
    except UserError as error:
        raise UserError(f"{source}: its {CONFIG} describes no model: {'; '.join(error.problems)}") from error
    return config if has_d_ff else replace(config, d_ff=4 * config.d_model)  # unsaid, it is as OpenAI had it


def read_tensors(folder: Path, config: GPT2Config, source: str) -> "dict[str, Tensor]":
    """The weights in fp32 under the names of `GPT2Model`.

    Raises:
        UserError: A file is damaged; tensors are missing, unexpected or misshapen, and then all are named; or the
            head is not tied to the token embedding.
    """
    our_shapes = shapes_of(replace(config, use_bias=True))
    names = {name: hf_name(name) for name in our_shapes}
    with ExitStack() as files:
        stored = _open(files, _weight_files(folder, source), source)
        found = {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}
        expected = {names[ours]: _their_shape(ours, shape) for ours, shape in our_shapes.items()}
        head = stored.get("lm_head.weight")
        check_tensor_shapes(source, found, expected | ({"lm_head.weight": expected["wte.weight"]} if head else {}))
        if wrong := {tensor.get_dtype() for tensor in stored.values()} - {"F64", "F32", "F16", "BF16"}:
            raise UserError(f"{source}: its weights are stored as {', '.join(sorted(wrong))}, not as plain floats")

        tensors = {ours: hf_layout(ours, stored[theirs][:].float()) for ours, theirs in names.items()}
        if head and not head[:].float().nan_to_num().equal(tensors["token_embedding.weight"].nan_to_num()):
            raise UserError(f"{source}: its lm_head is not its token embedding; in GPT-2 they are one tensor")
    return tensors if config.use_bias else _without_biases(tensors, config, source)


def _their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    import torch

    return tuple(hf_layout(name, torch.empty(shape, device="meta")).shape)


def _without_biases(tensors: "dict[str, Tensor]", config: GPT2Config, source: str) -> "dict[str, Tensor]":
    """Leave out the biases that a model of ours without any was given for `transformers`: zeros."""
    biases = tensors.keys() - shapes_of(config).keys()
    if nonzero := sorted(name for name in biases if tensors[name].any()):
        raise UserError(f"{source}: its {CONFIG} says use_bias=false, yet {', '.join(nonzero)} is not zero")
    return {name: tensor for name, tensor in tensors.items() if name not in biases}


def _open(files: ExitStack, paths: list[Path], source: str) -> dict[str, Any]:
    """The stored tensors, none of them read yet, by name without the prefix `transformer.`.

    Left out are the causal masks that old files hold beside the weights.
    """
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Any] = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{source}: {path.name} is damaged or incomplete: {error}") from error
        for name in file.keys():  # noqa: SIM118  # no mapping
            short = name.removeprefix("transformer.")
            if short in stored:
                raise UserError(f"{source}: {path.name} holds {short} a second time")
            stored[short] = file.get_slice(name)
    return {name: tensor for name, tensor in stored.items() if not re.search(r"\.attn\.(masked_)?bias$", name)}


def _weight_files(folder: Path, source: str) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, source).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{source}: the weight_map of its {INDEX} names no files")
        names = sorted(set(weight_map.values()))
        lacking = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if lacking or not names:
            raise UserError(f"{source}: {INDEX} names files that are not there: {', '.join(lacking) or 'none at all'}")
        return [folder / name for name in names]
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        raise UserError(
            f"{source}: its weights are in {', '.join(pickles)}, a pickle, which can run code when it is read; "
            f"{WEIGHTS} is what is read, and what save_pretrained of transformers writes"
        )
    raise UserError(f"{source}: it holds no {WEIGHTS}, and other formats are not read")


# ---------------------------------------------------------------------------------------------------------------------
# Out


def write_folder(
    folder: Path, config: GPT2Config, tensors: "dict[str, Tensor]", tokenizer: GPT2Tokenizer | None, card: str
) -> None:
    """Fill a folder with what `AutoModelForCausalLM` and `AutoTokenizer` of `transformers` load."""
    if not config.use_bias:
        tensors = {**_zero_biases(tensors, config), **tensors}
    theirs = {f"transformer.{hf_name(name)}": hf_layout(name, tensor) for name, tensor in tensors.items()}
    save_tensors(folder / WEIGHTS, theirs, {"format": "pt"})

    end_of_text = tokenizer and tokenizer.eos_token_id
    tokens = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    _write_json(
        folder / CONFIG,
        {
            "architectures": ["GPT2LMHeadModel"],
            **{key: values[0] for key, values in _OPENAI.items()},
            **{_THEIR_FIELDS[ours]: value for ours, value in asdict(config).items()},
            **tokens,
            "dtype": "float32",
        },
    )
    _write_json(folder / "generation_config.json", {**tokens, "pad_token_id": end_of_text})
    if tokenizer is not None:
        tokenizer.to_folder(folder, config.context_length)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _zero_biases(tensors: "dict[str, Tensor]", config: GPT2Config) -> "dict[str, Tensor]":
    import torch

    shapes = shapes_of(replace(config, use_bias=True))
    return {name: torch.zeros(shape) for name, shape in shapes.items() if name not in tensors}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
