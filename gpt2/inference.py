"""Text from a model: a prompt in, its continuation out, character by character.

`python -m gpt2.inference [OVERRIDES]` is `python generate.py [OVERRIDES]`.
"""

if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered without it
    from gpt2.main import run_script

    run_script("generate")
    raise SystemExit

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpt2.config import InferenceConfig, UserError, inference_faults
from gpt2.device import cuda_or_else
from gpt2.model import GPT2Model
from gpt2.packed import pack
from gpt2.pretrained import open_model
from gpt2.session import Session
from gpt2.sources import cache_folder
from gpt2.tokenizer import GPT2Tokenizer

log = logging.getLogger(__name__)


@dataclass
class Speed:
    """How long a text took: reading its prompt, up to the first new token, and writing the rest."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0  # from the first new token to the last

    def __str__(self) -> str:
        prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        told = f"read {self.prompt_tokens:,} tokens at {prefill:,.0f} a second, wrote {self.new_tokens:,}"
        if self.new_tokens < 2:
            return told
        return f"{told} at {(self.new_tokens - 1) / max(self.decode_seconds, 1e-9):,.1f}"


def timed(tokens: Iterator[torch.Tensor], speed: Speed) -> Iterator[int]:
    """The tokens of one sequence as numbers, the time they take kept in `speed`."""
    began = time.perf_counter()
    for token in tokens:
        number = int(token)  # waits for the device
        now = time.perf_counter()
        if speed.new_tokens == 0:
            speed.prefill_seconds, first = now - began, now
        speed.new_tokens += 1
        speed.decode_seconds = now - first
        yield number


def before_stop(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """A text in pieces, up to the stop that is complete first. Held back is only what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]:
            _, start = min(found)
            yield held[:start]
            return
        kept = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - kept]
        held = held[len(held) - kept :]
    yield held


def stream_text(
    model: GPT2Model,
    tokenizer: GPT2Tokenizer,
    prompt: str,
    config: InferenceConfig,
    seed: int | None,
    speed: Speed | None = None,
) -> Iterator[str]:
    """The continuation of a prompt in pieces, up to what `config` stops at or `config.max_new_tokens` tokens.

    The randomness is its own: sampling while training leaves the training as it is. An empty prompt begins a document.

    Raises:
        UserError: `config` makes no sense.
    """
    if found := inference_faults(config):
        raise UserError(*found)
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
        eos_token_id=tokenizer.eos_token_id if config.stop_at_end_of_text else None,
        generator=generator,
        min_p=config.min_p,
    )
    speed = speed or Speed()
    speed.prompt_tokens = len(prompt_ids)
    ends = {tokenizer.eos_token_id} if config.stop_at_end_of_text else set()
    yield from before_stop(tokenizer.stream(i for i in timed(tokens, speed) if i not in ends), config.stop)


class TextGenerator:
    """Writes text with a trained model."""

    def __init__(self, model_path: str, device: str = "cuda"):
        """Load a trained model.

        Args:
            model_path: A checkpoint, or any other name of a trained model that `gpt2.pretrained.open_model` takes.
            device: See `gpt2.device.cuda_or_else`.

        Raises:
            UserError: There is none of that name, it is damaged, or it holds no tokenizer.
        """
        self.trained = open_model(model_path)
        self.tokenizer = self.trained.tokenizer_for_text()
        self.model = self.trained.build().to(cuda_or_else(device)).eval()
        pack(self.model)
        self.speed = Speed()  # of the latest text
        self.told_of_window = False

    def stream(self, prompt: str, config: InferenceConfig, number: int = 0) -> Iterator[str]:
        """The continuation of `prompt`, in pieces. `number`: which of several texts, each with a seed of its own."""
        context = self.model.config.context_length
        if len(self.tokenizer.encode(prompt)) + config.max_new_tokens > context and not self.told_of_window:
            self.told_of_window = True
            log.info("Beyond %s tokens, its context, the model sees the last of the text only.", f"{context:,}")
        seed = None if config.seed is None else config.seed + number
        self.speed = Speed()
        return stream_text(self.model, self.tokenizer, prompt, config, seed, self.speed)

    def generate_text(self, prompt: str, config: InferenceConfig) -> None:
        """Print `prompt` and its continuation, as it comes (`config.stream`) or when it is done."""
        for number in range(config.num_return_sequences):
            if number:
                print("-" * 80)
            continuation = self.stream(prompt, config, number)  # first, for what it has to say belongs above the text
            print(prompt, end="", flush=True)
            for piece in continuation if config.stream else ["".join(continuation)]:
                print(piece, end="", flush=True)
            print()

    def interactive_mode(self, config: InferenceConfig) -> None:
        """Continue each line that is typed, see `gpt2.session`, until Ctrl-D."""
        Session(self.generate_text, config, history=cache_folder() / "history").run()
