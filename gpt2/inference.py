"""`TextGenerator`: load a trained model and generate text from prompts.

`python -m gpt2.inference [OVERRIDES]` is `python generate.py [OVERRIDES]`.
"""

if __name__ == "__main__":  # before torch is imported: --help and configuration errors do not need it
    import runpy
    import sys

    from gpt2.runtime.repository import ROOT

    sys.argv[0] = str(ROOT / "generate.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
    raise SystemExit

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from gpt2.checkpoint.pretrained import open_model
from gpt2.config import InferenceConfig
from gpt2.errors import UserError
from gpt2.generation.decode import CompiledDecoding
from gpt2.generation.prompt_lookup import Drafts, draft_length
from gpt2.generation.session import Session
from gpt2.generation.text import GeneratedText, Speed, TextBatch
from gpt2.ops.cpu_inference import pack_linears, quantize, refuse_quantization
from gpt2.runtime.device import Precision, auto_without_training, choose_precision, cuda_or_fallback
from gpt2.runtime.plain_values import brief
from gpt2.validation import validate

log = logging.getLogger(__name__)


def precision_of_weights(name: str, device: torch.device) -> Precision:
    """The format in which weights are kept for generation: bf16 or fp32, not fp16, which may overflow."""
    chosen = choose_precision(auto_without_training(name, device), device)
    return chosen if chosen.name == "bf16" else Precision("fp32", device)


@dataclass
class Continuation:
    """The text generated after a prompt. See `gpt2.generation.text.GeneratedText`."""

    prompt: str
    text: str
    tokens: int
    log_probability: float  # nats


class TextGenerator:
    """Generates text with a trained model."""

    def __init__(
        self,
        model_path: str,
        device: str = "cuda",
        precision: str = "auto",
        quantization: str | None = None,
        compile: bool = False,
        texts: int = 1,
        allow_special_tokens: bool = False,
        speculate: str | None = None,
    ):
        """Load a trained model.

        Args:
            model_path: A checkpoint, or any other name that `gpt2.checkpoint.pretrained.open_model` accepts.
            device: See `gpt2.runtime.device.cuda_or_fallback`.
            precision, quantization, compile, speculate: As in `InferenceConfig`.
            texts: How many texts to generate side by side. On a CPU, the weights are laid out for this number.
            allow_special_tokens: Whether `<|endoftext|>` in a prompt is the special token; else it is plain text.

        Raises:
            UserError: The model is missing, damaged, without a tokenizer, or cannot be quantized on this device.
        """
        loading = InferenceConfig(precision=precision, quantization=quantization, speculate=speculate)  # type: ignore[arg-type]
        if problems := validate(loading, "inference."):
            raise UserError(*problems)
        self.device = cuda_or_fallback(device)
        kept = precision_of_weights(precision, self.device)
        self.format = quantization or kept.name
        if kept.is_emulated:
            log.info("inference.precision=bf16: this device emulates it; prompts and batches are slower than in fp32.")
        if quantization:
            refuse_quantization(quantization, self.device)
        self.trained = open_model(model_path)
        self.tokenizer = self.trained.tokenizer_for_text()
        self.model = self.trained.build().to(self.device, kept.dtype).eval()
        if quantization:
            quantize(self.model, quantization)
        else:
            pack_linears(self.model, texts * (1 + draft_length(texts)) if speculate else texts)
        self.compiled = CompiledDecoding() if compile and self.device.type == "cuda" else None
        if compile and not self.compiled:
            log.info("inference.compile has no effect on %s: it needs CUDA.", self.device)
        if speculate and not draft_length(texts):
            log.info("inference.speculate has no effect on %s texts side by side: take batch_size=3 or less.", texts)
        self.texts, self.allow_special_tokens, self.speculate = texts, allow_special_tokens, speculate
        self.printed: list[str] = []  # the texts of the latest `generate_text`, without the prompt
        self.speed = self.new_speed()  # of the latest call
        self.has_warned_of_window = False

    def new_speed(self) -> Speed:
        return Speed(drafts=Drafts() if self.speculate else None)

    def describe(self) -> str:
        """The model, device and number format in a few words."""
        return f"{self.trained.describe()} on {self.device.type} in {self.format}"

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt; an empty one starts a document."""
        ids = self.tokenizer.encode(prompt, self.allow_special_tokens) or [self.tokenizer.eos_token_id]
        vocab_size = self.model.config.vocab_size
        if max(ids) >= vocab_size:
            raise UserError(
                f"prompt: token {max(ids)} is outside the vocabulary of {self.trained.source} ({vocab_size} tokens)"
            )
        return ids

    def batch(
        self, prompts: Sequence[str], config: InferenceConfig, numbers: Sequence[int], **options: bool
    ) -> TextBatch:
        """Continuations of prompts, side by side. Text number n uses `config.seed` + n."""
        prompt_ids = [self.encode(prompt) for prompt in prompts]
        context = self.model.config.context_length
        if max(map(len, prompt_ids)) + config.max_new_tokens > context and not self.has_warned_of_window:
            self.has_warned_of_window = True
            log.info("Beyond its context of %s tokens, the model reads only the end of the text.", f"{context:,}")
        seeds = [None if config.seed is None else config.seed + number for number in numbers]
        return TextBatch(self.model, self.tokenizer, prompt_ids, config, seeds, self.speed, self.compiled, **options)

    def stream(self, prompt: str, config: InferenceConfig, number: int = 0) -> Iterator[str]:
        """The continuation of `prompt`, in pieces. `number` selects one of several texts, each with its own seed."""
        self.speed = self.new_speed()
        return iter(self.batch([prompt], config, [number]).texts()[0])

    def generate_text(self, prompt: str, config: InferenceConfig) -> None:
        """Print `prompt` and its continuations, as they are generated (`config.stream`) or at once.

        Raises:
            UserError: `config` is invalid.
        """
        self.printed = []
        for _, text in self._generate([prompt], config, self.texts):
            if self.printed:
                print("-" * 80)
            print(prompt, end="", flush=True)
            pieces = []
            for piece in text if config.stream else ["".join(text)]:
                print(piece, end="", flush=True)
                pieces.append(piece)
            print()
            self.printed.append("".join(pieces))

    def continuations(
        self, prompts: Sequence[str], config: InferenceConfig, batch_size: int = 8
    ) -> Iterator[Continuation]:
        """`config.num_return_sequences` continuations of each prompt, in order, `batch_size` at a time.

        Each is the same as alone, see `TextBatch`.

        Raises:
            UserError: `config` or `batch_size` is invalid, or `prompts` is a single text.
        """
        for prompt, text in self._generate(prompts, config, batch_size, with_log_probabilities=True):
            yield Continuation(prompt, "".join(text), text.tokens, text.log_probability)

    def _generate(
        self, prompts: Sequence[str], config: InferenceConfig, batch_size: int, **options: bool
    ) -> Iterator[tuple[str, GeneratedText]]:
        problems = validate(config, "inference.")
        if isinstance(prompts, str):
            problems.append(f"prompts: {brief(prompts)} is not a list of texts")
        if batch_size < 1:
            problems.append(f"batch_size: {batch_size} is not a whole number of at least 1")
        if problems:
            raise UserError(*problems)
        self.speed = self.new_speed()
        remaining = ((prompt, number) for prompt in prompts for number in range(config.num_return_sequences))
        while items := list(islice(remaining, batch_size)):
            batch_prompts, numbers = zip(*items, strict=True)
            yield from zip(batch_prompts, self.batch(batch_prompts, config, numbers, **options).texts(), strict=True)

    def interactive_mode(self, config: InferenceConfig) -> None:
        """Continue each line that is typed until Ctrl-D, see `gpt2.generation.session`."""
        Session(self.generate_text, config).run()
