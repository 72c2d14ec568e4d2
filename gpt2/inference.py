"""Text from a model: a prompt in, its continuation out, character by character.

`python -m gpt2.inference [OVERRIDES]` is `python generate.py [OVERRIDES]`.
"""

if __name__ == "__main__":  # before torch is imported: --help and mistakes are answered without it
    import runpy
    import sys
    from pathlib import Path

    sys.argv[0] = str(Path(__file__).resolve().parents[1] / "generate.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
    raise SystemExit

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from gpt2.checkpoint.pretrained import open_model
from gpt2.config import InferenceConfig
from gpt2.errors import UserError
from gpt2.generation.decode import Recorder, decode, window_start
from gpt2.generation.sampling import next_token
from gpt2.generation.session import Session
from gpt2.model import GPT2Model
from gpt2.ops.cpu_inference import Linear, pack, quantize, refuse_int8
from gpt2.runtime.device import cuda_or_else
from gpt2.runtime.hub import caches
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.validation import validate

log = logging.getLogger(__name__)


@dataclass
class Speed:
    """How long some texts took: reading their prompts, up to the first new token, and writing the rest."""

    texts: int = 0
    prompt_tokens: int = 0  # that the model saw: the last of them, where the context does not hold all
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0  # from each text's first new token on

    def __str__(self) -> str:
        prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        told = f"read {self.prompt_tokens:,} tokens at {prefill:,.0f} a second, wrote {self.new_tokens:,}"
        if self.new_tokens <= self.texts:
            return told
        return f"{told} at {(self.new_tokens - self.texts) / max(self.decode_seconds, 1e-9):,.1f}"


class Batch:
    """Some texts that are written side by side. Each is read on its own, and written as far as it is read.

    What a text says depends on its own prompt and seed, not on the others; but for rounding, which differs between
    products of different sizes and could decide between two tokens that are as good as equally likely.
    """

    def __init__(
        self,
        model: GPT2Model,
        tokenizer: GPT2Tokenizer,
        prompts: Sequence[list[int]],
        config: InferenceConfig,
        seeds: Sequence[int | None],
        speed: Speed | None = None,
        recorder: Recorder | None = None,
        with_log_probabilities: bool = False,
    ):
        """
        Args:
            prompts: The tokens of each.
            seeds: Of the randomness of each; another one each time if None.
            speed: Where to count.
            recorder: See `gpt2.generation.decode`.

        Raises:
            UserError: `config` makes no sense.
        """
        if found := validate(config, "inference."):
            raise UserError(*found)
        device = model.token_embedding.weight.device
        generators = [torch.Generator(device) for _ in seeds]
        for generator, seed in zip(generators, seeds, strict=True):
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(seed)
        choose = partial(
            next_token,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            do_sample=config.do_sample,
            generator=generators,
            min_p=config.min_p,
        )
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        attention_mask = None if min(map(len, prompts)) == longest else torch.tensor(real, device=device)
        steps = decode(
            model,
            torch.tensor(padded, device=device),
            config.max_new_tokens,
            choose,
            attention_mask,
            recorder=recorder,
        )
        self.speed = speed or Speed()
        self.speed.texts += len(prompts)
        context = model.config.context_length
        self.speed.prompt_tokens += sum(len(prompt) - window_start(len(prompt), context) for prompt in prompts)
        self.steps = on_host(with_log_probability(*step) if with_log_probabilities else step[:1] for step in steps)
        self.written: list[list[list[float]]] = []  # for each step: the tokens and, if wanted, their log-probabilities
        self.rows, self.tokenizer = len(prompts), tokenizer
        self.ends = {tokenizer.eos_token_id} if config.stop_at_end_of_text else set()
        self.stops = config.stop

    def texts(self) -> list["Text"]:
        """All of them, from their beginnings."""
        return [Text(self, row) for row in range(self.rows)]

    def step(self, number: int) -> list[list[float]] | None:
        """The step of that number, from 0, written now unless it was before; None after the last."""
        if number == len(self.written):
            began = time.perf_counter()
            step = next(self.steps, None)
            seconds = time.perf_counter() - began
            if step is None:
                return None
            self.written.append(step)
            if number == 0:
                self.speed.prefill_seconds += seconds
            else:
                self.speed.decode_seconds += seconds
        return self.written[number]


class Text:
    """One text of a `Batch`: its pieces, each character as soon as it is whole.

    Attributes:
        tokens: How many were written by now; one that ends a document and those of a stop text count.
        log_probability: Of these tokens, in nats, by the model's own logits: before temperature, penalty and filters.
    """

    def __init__(self, batch: Batch, row: int):
        self.batch, self.row = batch, row
        self.tokens, self.log_probability = 0, 0.0

    def __iter__(self) -> Iterator[str]:
        return before_stop(self.batch.tokenizer.stream(self._ids()), self.batch.stops)

    def _ids(self) -> Iterator[int]:
        while step := self.batch.step(self.tokens):
            token, *log_probability = (values[self.row] for values in step)
            self.tokens += 1
            self.batch.speed.new_tokens += 1
            self.log_probability += sum(log_probability)
            if token in self.batch.ends:
                return
            yield int(token)


def with_log_probability(token: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (b,) and their log-probabilities (b,) by logits (b, v)."""
    return token, logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]


def on_host(steps: Iterator[Sequence[Tensor]]) -> Iterator[list[list[float]]]:
    """The tensors of each step as lists. A GPU is given its next step before this one's result is waited for."""
    waiting: tuple[torch.cuda.Event, list[Tensor]] | None = None
    for number, tensors in enumerate(steps):
        if number == 0 or tensors[0].device.type != "cuda":  # nothing delays the first token
            yield [tensor.tolist() for tensor in tensors]
            continue
        before = waiting
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        waiting = torch.cuda.Event(), copies
        waiting[0].record()
        if before:
            before[0].synchronize()
            yield [copy.tolist() for copy in before[1]]
    if waiting:
        waiting[0].synchronize()
        yield [copy.tolist() for copy in waiting[1]]


def before_stop(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """A text in pieces, up to the stop that is complete first. Held back is only what may be the beginning of one."""
    run_lock = ""
    for piece in pieces:
        run_lock += piece
        if found := [(run_lock.index(stop) + len(stop), run_lock.index(stop)) for stop in stops if stop in run_lock]:
            _, start = min(found)
            yield run_lock[:start]
            return
        kept = max((n for stop in stops for n in range(1, len(stop)) if run_lock.endswith(stop[:n])), default=0)
        yield run_lock[: len(run_lock) - kept]
        run_lock = run_lock[len(run_lock) - kept :]
    yield run_lock


def stream_text(
    model: GPT2Model,
    tokenizer: GPT2Tokenizer,
    prompt: str,
    config: InferenceConfig,
    seed: int | None,
) -> Iterator[str]:
    """The continuation of a prompt in pieces, up to what `config` stops at or `config.max_new_tokens` tokens.

    The randomness is its own: sampling while training leaves the training as it is. An empty prompt begins a document.

    Raises:
        UserError: `config` makes no sense.
    """
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
    return iter(Batch(model, tokenizer, [prompt_ids], config, [seed]).texts()[0])


def lay_out(model: GPT2Model, quantization: str | None, texts: int) -> type[Linear]:
    """Lay out the weights of a model for writing so many texts side by side, see `gpt2.ops.cpu_inference`."""
    return quantize(model) if quantization == "int8" else pack(model, texts)


@dataclass
class Continuation:
    """What was written after a prompt."""

    prompt: str
    text: str
    tokens: int  # see `Text`
    log_probability: float  # nats


class TextGenerator:
    """Writes text with a trained model."""

    def __init__(
        self,
        model_path: str,
        device: str = "cuda",
        precision: str = "fp32",
        quantization: str | None = None,
        compile: bool = False,
        texts: int = 1,
        allow_special_tokens: bool = False,
    ):
        """Load a trained model.

        Args:
            model_path: A checkpoint, or any other name that `gpt2.checkpoint.pretrained.open_model` accepts.
            device: See `gpt2.runtime.device.cuda_or_else`.
            precision, quantization, compile: As in `InferenceConfig`.
            texts: How many will be written side by side: by `generate_text`, if it is asked for several, and by
                `continuations`; on a CPU, the weights are laid out for so many.
            allow_special_tokens: `<|endoftext|>` in a prompt is the special token, and not thirteen characters.

        Raises:
            UserError: There is none of that name, it is damaged, it holds no tokenizer, or it cannot be quantized here.
        """
        if found := validate(InferenceConfig(precision=precision, quantization=quantization), "inference."):  # type: ignore[arg-type]
            raise UserError(*found)
        where = cuda_or_else(device)
        if quantization == "int8":
            refuse_int8(where)
        self.trained = open_model(model_path)
        self.tokenizer = self.trained.tokenizer_for_text()
        self.where, self.format = where, quantization or precision
        self.model = self.trained.build().to(where, torch.bfloat16 if precision == "bf16" else torch.float32).eval()
        self.texts, self.allow_special_tokens = texts, allow_special_tokens
        self.written: list[str] = []  # what `generate_text` has printed last, without the prompt
        self.recorder = Recorder(self.model, compile) if where.type == "cuda" else None
        if compile and not self.recorder:
            log.info("inference.compile is for CUDA: on %s nothing is compiled.", where)
        lay_out(self.model, quantization, texts)
        self.speed = Speed()  # of the latest texts
        self.told_of_window = False

    def describe(self) -> str:
        """What writes, in a few words."""
        return f"{self.trained.describe()} on {self.where.type} in {self.format}"

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt; an empty one begins a document."""
        ids = self.tokenizer.encode(prompt, self.allow_special_tokens) or [self.tokenizer.eos_token_id]
        if max(ids) >= self.model.config.vocab_size:
            known = self.model.config.vocab_size
            raise UserError(f"prompt: its token {max(ids)} is none of the {known} that {self.trained.source} knows")
        return ids

    def batch(self, prompts: Sequence[str], config: InferenceConfig, numbers: Sequence[int], **options: bool) -> Batch:
        """Continuations of prompts, side by side. `numbers`: which of several texts each is, with a seed of its own."""
        prompt_ids = [self.encode(prompt) for prompt in prompts]
        context = self.model.config.context_length
        if max(map(len, prompt_ids)) + config.max_new_tokens > context and not self.told_of_window:
            self.told_of_window = True
            log.info("Beyond %s tokens, its context, the model sees the last of the text only.", f"{context:,}")
        seeds = [None if config.seed is None else config.seed + number for number in numbers]
        return Batch(self.model, self.tokenizer, prompt_ids, config, seeds, self.speed, self.recorder, **options)

    def stream(self, prompt: str, config: InferenceConfig, number: int = 0) -> Iterator[str]:
        """The continuation of `prompt`, in pieces. `number`: which of several texts, each with a seed of its own."""
        self.speed = Speed()
        return iter(self.batch([prompt], config, [number]).texts()[0])

    def generate_text(self, prompt: str, config: InferenceConfig) -> None:
        """Print `prompt` and its continuation, as it comes (`config.stream`) or when it is done.

        Raises:
            UserError: `config` makes no sense.
        """
        if found := validate(config, "inference."):
            raise UserError(*found)
        self.speed, self.written = Speed(), []
        for start in range(0, config.num_return_sequences, self.texts):
            numbers = range(start, min(start + self.texts, config.num_return_sequences))
            # First, for what it has to say belongs above the text.
            batch = self.batch([prompt] * len(numbers), config, numbers)
            for number, text in zip(numbers, batch.texts(), strict=True):
                if number:
                    print("-" * 80)
                print(prompt, end="", flush=True)
                pieces = []
                for piece in text if config.stream else ["".join(text)]:
                    print(piece, end="", flush=True)
                    pieces.append(piece)
                print()
                self.written.append("".join(pieces))

    def continuations(
        self, prompts: Sequence[str], config: InferenceConfig, batch_size: int = 8
    ) -> Iterator[Continuation]:
        """`config.num_return_sequences` continuations of each prompt, in order, `batch_size` at a time.

        Each says what it would say alone, see `Batch`.

        Raises:
            UserError: `config` or `batch_size` makes no sense.
        """
        found = validate(config, "inference.")
        if batch_size < 1:
            found.append(f"batch_size: {batch_size} is not a whole number of at least 1")
        if found:
            raise UserError(*found)
        self.speed = Speed()
        wanted = ((prompt, number) for prompt in prompts for number in range(config.num_return_sequences))
        while some := list(islice(wanted, batch_size)):
            asked, numbers = zip(*some, strict=True)
            batch = self.batch(asked, config, numbers, with_log_probabilities=True)
            for prompt, text in zip(asked, batch.texts(), strict=True):
                written = "".join(text)
                yield Continuation(prompt, written, text.tokens, text.log_probability)

    def interactive_mode(self, config: InferenceConfig) -> None:
        """Continue each line that is typed, see `gpt2.generation.session`, until Ctrl-D."""
        Session(self.generate_text, config, history=caches() / "history").run()
