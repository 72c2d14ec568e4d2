"""Generation speed compared with `transformers`: the same weights, interleaved repetitions, medians."""

import copy
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpt2.analysis.tables import from_to, table
from gpt2.benchmarks.common import READ_BYTES, Row, circumstances, headline, interleaved, read_bandwidth, write_json
from gpt2.benchmarks.peers import in_transformers
from gpt2.config import GenerationBenchmark
from gpt2.errors import UserError, one_line
from gpt2.generation.decode import CompiledDecoding, decode
from gpt2.generation.prompt_lookup import MAX_PASS_TOKENS, Drafts
from gpt2.generation.sampling import SamplingParams, next_token
from gpt2.model import GPT2Model
from gpt2.ops.cpu_inference import pack_linears, quantize
from gpt2.runtime.device import choose_device

log = logging.getLogger(__name__)

LEGEND = """\
ratio: to the faster row of transformers. of floor: share of the tokens per second that the measured memory bandwidth
allows if each token reads all weights once. first s: seconds of the first run, including compilation. same tokens:
share of the tokens that equal those of the first row. weights: their layout, see gpt2/ops/cpu_inference.py. prompt
lookup: random weights repeat themselves in greedy text, so most drafts are accepted; other texts gain less."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5 + 4 / 128}  # int4: with the scales of its groups


@dataclass
class Timing:
    """One generation by a contestant."""

    clock: list[float]  # seconds, at the start and after each token
    tokens: Tensor  # (b, n)
    is_even: bool = True  # False: a pass yields several tokens

    @property
    def prefill_seconds(self) -> float:
        """The seconds until the first new token."""
        return self.clock[1] - self.clock[0]

    @property
    def step_seconds(self) -> float:
        """The seconds per later token: the median, or the mean if passes yield several tokens."""
        if not self.is_even:
            return (self.clock[-1] - self.clock[1]) / (len(self.clock) - 2)
        return median(after - before for before, after in pairwise(self.clock[1:]))


Generate = Callable[[Tensor, int], Timing]  # (prompts (b, t), number of new tokens)


def ours(model: GPT2Model, compiled: CompiledDecoding | None = None, speculates: bool = False) -> Generate:
    def run(input_ids: Tensor, max_new_tokens: int) -> Timing:
        sampler = partial(next_token, params=SamplingParams(do_sample=False))
        clock, tokens = [time.perf_counter()], []
        drafts = Drafts() if speculates else None
        for token, _ in decode(model, input_ids, max_new_tokens, sampler, compiled=compiled, drafts=drafts):
            tokens.append(token.tolist())
            clock.append(time.perf_counter())
        return Timing(clock, torch.tensor(tokens).T, is_even=not speculates)

    return run


@dataclass
class Contestant:
    name: str
    generate: Generate
    weight_bytes: float = 4
    layout: str = "Linear"  # the layout of the weights, see `gpt2.ops.cpu_inference`
    first_seconds: float = 0.0  # time of the first run


def theirs(model: Any, **options: Any) -> Generate:
    def run(input_ids: Tensor, max_new_tokens: int) -> Timing:
        clock = [time.perf_counter()]

        def tick(input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            clock.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        whole = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[tick],
            **options,
        )
        return Timing(clock, whole[:, input_ids.size(1) :].cpu())

    return run


class GenerationComparison:
    """`generate` of transformers and our decoding in each number format. Greedy, so that tokens can be compared."""

    def __init__(self, config: GenerationBenchmark):
        self.config = config
        self.device = choose_device(config.device)
        torch.manual_seed(0)
        self.model = GPT2Model(config.model).eval()
        self.reference = in_transformers(config.model, self.model.state_dict()).to(self.device).eval()
        self.memory = torch.ones(READ_BYTES // 4, device=self.device)
        self.weights = self.model.num_parameters() - self.model.position_embedding.weight.numel()

    def contestants(self, batch_size: int) -> list[Contestant]:
        """Return all contestants; `transformers` with its defaults is the first. On a GPU, ours is also compiled."""
        from transformers import CompileConfig

        compile_config: Any = CompileConfig()
        compile_config._compile_all_devices = True  # on a CPU too
        static = theirs(self.reference, cache_implementation="static", compile_config=compile_config)
        result = [
            Contestant("transformers", theirs(self.reference)),
            Contestant("transformers, static, compiled", static),
        ]
        for number_format in WEIGHT_BYTES:
            with suppress(UserError):  # this device does not support the format
                result.append(self.ours_in(number_format, batch_size))
                if self.device.type == "cuda":
                    result.append(self.ours_in(number_format, batch_size, "compiled", compiled=CompiledDecoding()))
                if batch_size == 1:
                    result.append(self.ours_in(number_format, MAX_PASS_TOKENS, "prompt lookup", speculates=True))
        return result

    def ours_in(self, number_format: str, rows: int, variant: str = "", **options: Any) -> Contestant:
        """Return our model in a number format, with weights laid out for passes over `rows` tokens.

        `options` are arguments of `ours`.

        Raises:
            UserError: This device does not support the format.
        """
        model = copy.deepcopy(self.model).to(self.device, DTYPES.get(number_format))
        kind = pack_linears(model, rows) if number_format in DTYPES else quantize(model, number_format)
        name = ", ".join(filter(None, ("gpt2", number_format, variant)))
        return Contestant(name, ours(model, **options), WEIGHT_BYTES[number_format], kind.__name__)

    def warmed_up(self, batch_size: int, input_ids: Tensor) -> list[Contestant]:
        """Run each contestant once, which compiles it. Contestants that fail are left out, except the first one."""
        contestants: list[Contestant] = []
        for contestant in self.contestants(batch_size):
            began = time.perf_counter()
            try:
                contestant.generate(input_ids, self.config.new_tokens)
            except RuntimeError as error:
                if not contestants:
                    raise
                log.warning("%s is left out: %s", contestant.name, one_line(error)[:300])
                continue
            contestant.first_seconds = time.perf_counter() - began
            contestants.append(contestant)
        return contestants

    @torch.no_grad()
    def compare(self, batch_size: int) -> list[Row]:
        """Time all contestants, interleaved. Return a row for each."""
        config, generator = self.config, torch.Generator().manual_seed(batch_size)
        shape = (batch_size, config.prompt_tokens)
        input_ids = torch.randint(config.model.vocab_size, shape, generator=generator).to(self.device)
        contestants = self.warmed_up(batch_size, input_ids)
        turns: list[Callable[[], Any]] = [partial(read_bandwidth, self.memory)]
        turns += [partial(contestant.generate, input_ids, config.new_tokens) for contestant in contestants]
        bandwidths, *timings_of = interleaved(turns, config.repetitions, f"Batch {batch_size}")

        rows: list[Row] = []
        for contestant, timings in zip(contestants, timings_of, strict=True):
            seconds = median(timing.step_seconds for timing in timings)
            rows.append(
                {
                    "batch_size": batch_size,
                    "contestant": contestant.name,
                    "layout": contestant.layout,
                    "tokens_per_second": batch_size / seconds,
                    "tokens_per_second_of_each": [batch_size / timing.step_seconds for timing in timings],
                    "share_of_floor": self.weights * contestant.weight_bytes / median(bandwidths) / seconds,
                    "prefill_seconds": median(timing.prefill_seconds for timing in timings),
                    "first_seconds": contestant.first_seconds,
                    "same_tokens": (timings[0].tokens == timings_of[0][0].tokens).float().mean().item(),
                    "read_bytes_per_second": median(bandwidths),
                }
            )
        best_of_theirs = max(row["tokens_per_second"] for row in rows if row["contestant"].startswith("transformers"))
        return [{**row, "ratio": row["tokens_per_second"] / best_of_theirs} for row in rows]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "": lambda row: row["contestant"],
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.1f}",
    "from - to": lambda row: from_to(row["tokens_per_second_of_each"], 1),
    "ratio": lambda row: f"{row['ratio']:.2f}",
    "of floor": lambda row: f"{row['share_of_floor']:.0%}",
    "prefill ms": lambda row: f"{row['prefill_seconds'] * 1e3:,.0f}",
    "first s": lambda row: f"{row['first_seconds']:.1f}",
    "same tokens": lambda row: f"{row['same_tokens']:.0%}",
    "weights": lambda row: row["layout"],
}


def generation(config: GenerationBenchmark) -> None:
    """Print a table for each batch size, and write all measurements to the file `config.json`."""
    comparison = GenerationComparison(config)
    about = circumstances(comparison.device)
    print(
        f"{comparison.weights / 1e6:,.1f} million weights read per token, prompts of {config.prompt_tokens} tokens, "
        f"{config.new_tokens} new tokens, greedy, medians of {config.repetitions}\n{headline(about)}"
    )
    results = []
    for batch_size in config.batch_sizes:
        rows = comparison.compare(batch_size)
        bandwidth = rows[0]["read_bytes_per_second"] / 1e9
        print(f"\nbatch {batch_size}, memory bandwidth {bandwidth:.1f} GB/s\n{table(rows, COLUMNS)}", flush=True)
        results += rows
    print(f"\n{LEGEND}")
    write_json(config.json, {"benchmark": "generation", "config": asdict(config), **about, "results": results})
