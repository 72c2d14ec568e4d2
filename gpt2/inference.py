"""Text from a model: a prompt in, its continuation out, character by character."""

from collections.abc import Iterator
from pathlib import Path

import torch

from gpt2 import checkpoint
from gpt2.config import GPT2Config, InferenceConfig, UserError
from gpt2.device import cuda_or_else
from gpt2.model import GPT2Model
from gpt2.tokenizer import GPT2Tokenizer


def stream_text(
    model: GPT2Model, tokenizer: GPT2Tokenizer, prompt: str, config: InferenceConfig, seed: int | None
) -> Iterator[str]:
    """The continuation of a prompt in pieces, up to `<|endoftext|>` or `config.max_new_tokens` tokens.

    The randomness is its own: sampling while training leaves the training as it is. An empty prompt begins a document.
    """
    device = model.token_embedding.weight.device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
    tokens = model.generate(
        torch.tensor([prompt_ids], device=device),
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        config.repetition_penalty,
        config.do_sample,
        eos_token_id=tokenizer.eos_token_id,
        generator=generator,
    )
    ids = (int(token) for token in tokens)
    yield from tokenizer.stream(i for i in ids if i != tokenizer.eos_token_id)


class TextGenerator:
    """Writes text with a trained model."""

    def __init__(self, model_path: str, device: str = "cuda"):
        """Load a checkpoint: a file, or the best one of a run folder.

        Args:
            device: See `gpt2.device.cuda_or_else`.

        Raises:
            UserError: There is no checkpoint there, it is damaged, or it holds no tokenizer.
        """
        self.path: Path = checkpoint.find(model_path)
        self.record = checkpoint.read_record(self.path)
        if self.record["tokenizer"] is None:
            raise UserError(f"checkpoint: {self.path} was trained on numbers, not on text: it holds no tokenizer")
        self.tokenizer = GPT2Tokenizer.from_json(self.record["tokenizer"])
        with torch.device("meta"):  # no time spent on weights that the checkpoint's replace
            self.model = GPT2Model(GPT2Config(**self.record["model"]))
        self.model.load_state_dict(checkpoint.read_tensors(self.path, "model/"), assign=True)
        self.model.to(cuda_or_else(device)).eval()

    def stream(self, prompt: str, config: InferenceConfig, number: int = 0) -> Iterator[str]:
        """The continuation of `prompt`, in pieces. `number`: which of several texts, each with a seed of its own."""
        seed = None if config.seed is None else config.seed + number
        return stream_text(self.model, self.tokenizer, prompt, config, seed)

    def generate_text(self, prompt: str, config: InferenceConfig) -> None:
        """Print `prompt` and its continuation, as it comes (`config.stream`) or when it is done."""
        for number in range(config.num_return_sequences):
            if number:
                print("-" * 80)
            print(prompt, end="", flush=True)
            continuation = self.stream(prompt, config, number)
            for piece in continuation if config.stream else ["".join(continuation)]:
                print(piece, end="", flush=True)
            print()
