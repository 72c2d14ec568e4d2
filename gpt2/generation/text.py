"""Text streams: from prompts to pieces of generated text, with stop strings, seeds and speed figures."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpt2.config import InferenceConfig, TrainRun
from gpt2.errors import UserError
from gpt2.generation.decode import CompiledDecoding, LanguageModel, decode, window_start
from gpt2.generation.prompt_lookup import Drafts
from gpt2.generation.sampling import SamplingParams, next_token
from gpt2.tokenizer import GPT2Tokenizer
from gpt2.validation import validate


@dataclass
class Speed:
    """How long texts took: prefill (reading prompts, up to the first new token) and decoding (the rest)."""

    texts: int = 0
    prompt_tokens: int = 0  # that fit into the model's context
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0  # after the first new token of each text
    drafts: Drafts | None = None  # of speculative decoding

    def __str__(self) -> str:
        prefill = self.prompt_tokens / max(self.prefill_seconds, 1e-9)
        text = f"read {self.prompt_tokens:,} tokens at {prefill:,.0f} tokens/s, generated {self.new_tokens:,}"
        if self.new_tokens <= self.texts:
            return text
        text += f" at {(self.new_tokens - self.texts) / max(self.decode_seconds, 1e-9):,.1f} tokens/s"
        return f"{text}; {self.drafts}" if self.drafts and self.drafts.passes else text


class TextBatch:
    """Texts that are generated side by side. Each can be read at its own pace; a step runs when a text needs it.

    A text depends on its own prompt and seed, not on the other texts, but for rounding: products of other sizes round
    differently, which can decide between two tokens of nearly equal probability.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: GPT2Tokenizer,
        prompts: Sequence[list[int]],
        config: InferenceConfig,
        seeds: Sequence[int | None],
        speed: Speed | None = None,
        compiled: CompiledDecoding | None = None,
        with_log_probabilities: bool = False,
    ):
        """
        Args:
            prompts: Token ids of each text.
            seeds: Of each text's generator; None is random.
            speed: Counters to add to. If it has `drafts`, decoding is speculative.

        Raises:
            UserError: `config` is invalid.
        """
        if problems := validate(config, "inference."):
            raise UserError(*problems)
        self.tokenizer, self.stops = tokenizer, config.stop
        self.ends = {tokenizer.eos_token_id} if config.stop_at_end_of_text else set()
        self.speed = speed or Speed()
        self.speed.texts += len(prompts)
        context = model.config.context_length
        self.speed.prompt_tokens += sum(len(prompt) - window_start(len(prompt), context) for prompt in prompts)

        device = next(iter(model.parameters())).device
        generators = [new_generator(seed, device) for seed in seeds]
        sampler = partial(next_token, params=SamplingParams.from_config(config), generators=generators)
        input_ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        attention_mask = torch.arange(input_ids.size(1), device=device) < rearrange(lengths, "b -> b 1")
        steps = decode(
            model,
            input_ids,
            config.max_new_tokens,
            sampler,
            attention_mask,
            compiled=compiled,
            drafts=self.speed.drafts,
        )
        self.steps = (with_log_probability(*step) if with_log_probabilities else step[:1] for step in steps)
        self.results: list[list[list[float]]] = []  # of each step: token ids and, if requested, log-probabilities
        self.rows = len(prompts)

    def texts(self) -> list["GeneratedText"]:
        return [GeneratedText(self, row) for row in range(self.rows)]

    def step(self, number: int) -> list[list[float]] | None:
        """Result of a step, counted from 0, which runs now unless it ran before; None after the last one."""
        if number == len(self.results):
            began = time.perf_counter()
            tensors = next(self.steps, None)
            if tensors is None:
                return None
            self.results.append([tensor.tolist() for tensor in tensors])
            seconds = time.perf_counter() - began
            if number == 0:
                self.speed.prefill_seconds += seconds
            else:
                self.speed.decode_seconds += seconds
        return self.results[number]


class GeneratedText:
    """One text of a batch. Iterating yields its pieces, each character as soon as all its bytes are there.

    Attributes:
        tokens: Number of tokens so far, including an end-of-text token and those of a stop string.
        log_probability: Of these tokens, in nats, by the model's own logits, before temperature, penalty and filters.
    """

    def __init__(self, batch: TextBatch, row: int):
        self.batch, self.row = batch, row
        self.tokens, self.log_probability = 0, 0.0

    def __iter__(self) -> Iterator[str]:
        return before_stop(self.batch.tokenizer.stream(self._token_ids()), self.batch.stops)

    def _token_ids(self) -> Iterator[int]:
        while result := self.batch.step(self.tokens):
            token, *log_probability = (values[self.row] for values in result)
            self.tokens += 1
            self.batch.speed.new_tokens += 1
            self.log_probability += sum(log_probability)
            if token in self.batch.ends:
                return
            yield int(token)


def new_generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def with_log_probability(tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (b,) and their log-probabilities (b,) given logits (b, v)."""
    return tokens, logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def before_stop(pieces: Iterator[str], stops: list[str]) -> Iterator[str]:
    """The pieces of a text up to its first stop string, holding back only what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        if matches := [(held.index(stop) + len(stop), held.index(stop)) for stop in stops if stop in held]:
            _, start = min(matches)  # the stop that is complete first
            yield held[:start]
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def stream_text(
    model: LanguageModel, tokenizer: GPT2Tokenizer, prompt: str, config: InferenceConfig, seed: int | None
) -> Iterator[str]:
    """Continue a prompt, in pieces. An empty prompt starts a document.

    Uses its own random generator: sampling during training does not change the training.

    Raises:
        UserError: `config` is invalid.
    """
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
    return iter(TextBatch(model, tokenizer, [prompt_ids], config, [seed]).texts()[0])


def stream_sample(model: LanguageModel, tokenizer: GPT2Tokenizer, config: TrainRun, step: int) -> Iterator[str]:
    """The sample of a training at a step: its prompt and the continuation, with another seed at each step."""
    yield config.sample_prompt
    yield from stream_text(model, tokenizer, config.sample_prompt, config.inference, config.train.seed + step)
