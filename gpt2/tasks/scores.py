"""Log-likelihoods of continuations, and the figures of a task that follow from them.

The continuations of a document mostly share a context. Its tokens are computed once: a row of a batch has the common
prefix and then the rest of each continuation. Each rest attends to the prefix and to itself, and has the positions that
follow the prefix. This halves the time of GPT-2 124M on two cores for documents as HellaSwag has, with four endings of
28 tokens after 70 tokens, compared with a row for each continuation.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import exp, inf, sqrt
from os.path import commonprefix
from statistics import fmean, stdev

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpt2.distributed.process_group import ProcessGroup
from gpt2.model import GPT2Model
from gpt2.tasks.table import Pair, Question
from gpt2.tokenizer import GPT2Tokenizer

Text = tuple[list[int], int]  # tokens, and how many at the end are scored

PADDING = -1  # the branch of a padding token


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a continuation, given its context."""

    log: float  # natural logarithm
    is_greedy: bool  # whether each of its tokens is the most likely one


@dataclass
class Row:
    """Texts with a common prefix, packed into one sequence of t tokens, of which s are scored."""

    ids: list[int]  # (t,)
    positions: list[int]  # (t,)
    branches: list[int]  # (t,): 0 for the prefix, n for the rest of the n-th text
    places: list[int] = field(default_factory=list)  # (s,): the index of the token before, which predicts it
    targets: list[int] = field(default_factory=list)  # (s,): ids
    owners: list[int] = field(default_factory=list)  # (s,): the number of its text among those of all rows


def encode_pairs(tokenizer: GPT2Tokenizer, pairs: Sequence[Pair], longest: int) -> list[Text]:
    """The tokens of each context and continuation together, and how many of them belong to the continuation.

    White space between the two belongs to the continuation, and an empty context becomes `<|endoftext|>`. The beginning
    of a text that is longer than the model's context is cut off.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    distinct = list(dict.fromkeys([*contexts, *wholes]))  # choices share their context
    encoded = {text: ids.tolist() for text, ids in zip(distinct, tokenizer.encode_batch(distinct), strict=True)}
    texts = []
    for context, whole in zip(contexts, wholes, strict=True):
        head, tokens = encoded[context], encoded[whole]
        if not head:
            head = [tokenizer.eos_token_id]
            tokens = head + tokens
        scored, tokens = max(1, len(tokens) - len(head)), tokens[-(longest + 1) :]
        texts.append((tokens, min(scored, len(tokens) - 1)))
    return texts


def pack(texts: Sequence[Text], first: int, longest: int) -> list[Row]:
    """The texts of one document in rows of at most `longest` tokens.

    Args:
        first: The number of the first text among those of all documents.
    """
    inputs = [tokens[:-1] for tokens, _ in texts]
    shared = list(commonprefix(inputs))  # noqa: RUF071  # of any sequences
    rows: list[Row] = []
    for owner, ((tokens, scored), text) in enumerate(zip(texts, inputs, strict=True), start=first):
        rest = text[len(shared) :]
        if not rows or len(rows[-1].ids) + len(rest) > longest:
            rows.append(Row(list(shared), list(range(len(shared))), [0] * len(shared)))
        row = rows[-1]
        offset = len(row.ids) - len(shared)
        scored_at = range(len(text) - scored, len(text))
        row.places += [place if place < len(shared) else place + offset for place in scored_at]
        row.targets += tokens[len(tokens) - scored :]
        row.owners += [owner] * scored
        row.ids += rest
        row.positions += range(len(shared), len(text))
        row.branches += [max(row.branches, default=0) + 1] * len(rest)
    return rows


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """The arguments of `GPT2Model.score_tokens` for some rows, padded on the right."""

    def padded(lists: list[list[int]], padding: int = 0) -> Tensor:
        return pad_sequence([torch.tensor(values) for values in lists], batch_first=True, padding_value=padding)

    branches = padded([row.branches for row in rows], PADDING)
    length = branches.shape[1]
    arguments = {
        "input_ids": padded([row.ids for row in rows]),
        "positions": padded([row.positions for row in rows]),
        "places": torch.tensor([number * length + place for number, row in enumerate(rows) for place in row.places]),
        "targets": torch.tensor([target for row in rows for target in row.targets]),
    }
    if branches.max() > 1:  # otherwise each row is one text, and the causal mask hides the padding behind it
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        keys, queries = branches[:, None, None, :], branches[:, None, :, None]
        arguments["attention_mask"] = causal & ((keys == 0) | (keys == queries))
    return arguments


class TaskScorer:
    """Questions as batches of rows of similar length, the longest first."""

    def __init__(self, questions: list[Question], tokenizer: GPT2Tokenizer, context_length: int, batch_size: int):
        self.questions, self.texts = questions, 0
        texts = encode_pairs(tokenizer, [pair for question in questions for pair in question.pairs], context_length)
        rows = []
        for question in questions:
            first, self.texts = self.texts, self.texts + len(question.pairs)
            rows += pack(texts[first : self.texts], first, context_length)
        rows.sort(key=lambda row: -len(row.ids))
        self.batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    @torch.no_grad()
    def likelihoods(
        self,
        model: GPT2Model,
        autocast: AbstractContextManager,
        on_batch: Callable[[int, int], bool | None] = lambda batch, batches: None,
        group: ProcessGroup | None = None,
    ) -> list[list[Likelihood]] | None:
        """The likelihoods of the pairs of each question, without dropout.

        Args:
            on_batch: Called before each batch with its index and the number of batches; if it returns False on any
                rank, the result is None.
            group: Rank r of n scores batches r, r + n, ... All ranks return the result of all batches.
        """
        group = group or ProcessGroup()
        device, was_training = next(model.parameters()).device, model.training
        # Copied to the host at the end, because it waits for each copy.
        found: list[tuple[list[int], Tensor, Tensor]] = []
        is_interrupted = False
        model.eval()
        try:
            for number, rows in enumerate(self.batches):
                if number % group.size != group.rank:
                    continue
                if is_interrupted := on_batch(number, len(self.batches)) is False:
                    break
                with autocast:
                    inputs = {key: tensor.to(device) for key, tensor in collate(rows).items()}
                    scores = model.score_tokens(**inputs)
                found.append(([owner for row in rows for owner in row.owners], *scores))
        finally:
            model.train(was_training)
        if any(flag for (flag,) in group.all_gather([is_interrupted])):
            return None
        sums = torch.zeros(2, self.texts, dtype=torch.float64)  # nats; tokens that are not the most likely ones
        for owners, losses, is_likeliest in found:
            values = torch.stack([losses, (~is_likeliest).float()]).cpu().double()
            sums.index_add_(1, torch.tensor(owners), values)
        nats, misses = group.all_reduce_(sums).tolist()
        results = iter(Likelihood(-n, m == 0) for n, m in zip(nats, misses, strict=True))
        return [[next(results) for _ in question.pairs] for question in self.questions]


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def acc(question: Question, likelihoods: list[Likelihood]) -> float:
    """Whether the most likely choice is the answer; for a single continuation, whether greedy decoding yields it."""
    if len(likelihoods) == 1:
        return float(likelihoods[0].is_greedy)
    return float(np.argmax([likelihood.log for likelihood in likelihoods]) == question.answer)


def acc_norm(question: Question, likelihoods: list[Likelihood]) -> float:
    """Whether the choice with the highest log-likelihood per character is the answer."""
    per_length = [
        likelihood.log / length if length else -inf
        for likelihood, length in zip(likelihoods, question.lengths, strict=True)
    ]
    return float(np.argmax(per_length) == question.answer)


def perplexity(question: Question, likelihoods: list[Likelihood]) -> float:
    """The negative log-likelihood of the continuation. `figures` takes e to the power of the mean."""
    return -likelihoods[question.answer].log


METRICS: dict[str, Callable[[Question, list[Likelihood]], float]] = {
    "acc": acc,
    "acc_norm": acc_norm,
    "perplexity": perplexity,
}


def figures(metrics: Sequence[str], questions: list[Question], likelihoods: list[list[Likelihood]]) -> dict[str, float]:
    """The mean of each metric over the documents, its standard error as `<metric>_stderr`, and `documents`.

    The standard error is the sample standard deviation divided by the square root of the sample size. That of a
    perplexity follows by the delta method.
    """
    result: dict[str, float] = {}
    for name in metrics:
        values = [METRICS[name](*document) for document in zip(questions, likelihoods, strict=True)]
        mean, error = fmean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else float("nan")
        if name == "perplexity":
            mean = exp(mean) if mean < 700 else inf
            error *= mean
        result |= {name: mean, f"{name}_stderr": error}
    return {**result, "documents": len(questions)}
