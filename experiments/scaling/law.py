"""The scaling law of Hoffmann et al. (2022), approach 3: L(N, D) = E + A / N^alpha + B / D^beta, and its fit.

N counts the parameters in millions, without embeddings, and D the tokens in millions, so A and B are nats.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize

from gpt2.runtime.console import track

DELTA = 1e-3  # threshold of the Huber loss of the logarithms, as in Hoffmann et al.
STARTS = [*product((-1.0, 0.0), (-2.0, 0.0), (-1.0, 0.5), (0.2, 0.6), (0.2, 0.6))]  # e, a, b in logarithms


@dataclass(frozen=True)
class Law:
    e: float  # irreducible loss in nats
    a: float  # nats at a million parameters
    b: float  # nats at a million tokens
    alpha: float
    beta: float

    def loss(self, n: ArrayLike, d: ArrayLike) -> NDArray:
        return self.e + self.a * np.asarray(n, float) ** -self.alpha + self.b * np.asarray(d, float) ** -self.beta

    @property
    def size_exponent(self) -> float:
        """The exponent with which the best size grows with compute, at 6 N D FLOPs."""
        return self.beta / (self.alpha + self.beta)

    def best_size(self, flops: ArrayLike) -> NDArray:
        """The N with the lowest loss at 6 N D = `flops`."""
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        return ratio * (np.asarray(flops, float) / 6e12) ** self.size_exponent

    def best_loss(self, flops: ArrayLike) -> NDArray:
        n = self.best_size(flops)
        return self.loss(n, np.asarray(flops, float) / 6e12 / n)


def objective(theta: NDArray, n: NDArray, d: NDArray, y: NDArray) -> tuple[float, NDArray]:
    """The sum of Huber losses of log L, in units of DELTA, and its gradient."""
    e, a, b, alpha, beta = theta
    terms = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
    predicted = np.log(np.exp(terms).sum(axis=0))
    residual = predicted - y
    is_square = np.abs(residual) <= DELTA
    huber = np.where(is_square, residual**2 / 2, DELTA * (np.abs(residual) - DELTA / 2))
    share = np.exp(terms - predicted) * np.clip(residual, -DELTA, DELTA)
    gradient = [*share.sum(axis=1), -(share[1] * n).sum(), -(share[2] * d).sum()]
    return huber.sum() / DELTA, np.array(gradient) / DELTA


def fit(n: ArrayLike, d: ArrayLike, losses: ArrayLike, starts: list = STARTS) -> Law:
    """The law with the lowest Huber loss, over all starts.

    Besiroglu et al. (2024) found that the search of Hoffmann et al. had ended before its minimum, because its objective
    was a mean of small values, below the tolerance. Here it is a sum, divided by DELTA.
    """
    data = (np.log(np.asarray(n, float)), np.log(np.asarray(d, float)), np.log(np.asarray(losses, float)))
    options = {"maxiter": 2000, "ftol": 1e-11, "gtol": 1e-7}
    bounds = [(-5, 3), (-10, 5), (-10, 5), (0.01, 2), (0.01, 2)]
    found = [
        minimize(objective, start, args=data, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        for start in starts
    ]
    e, a, b, alpha, beta = min(found, key=lambda result: result.fun).x
    return Law(*np.exp([e, a, b]), alpha, beta)


def parameters(law: Law) -> tuple[float, ...]:
    """A law in the parametrization of `objective`, as a starting point of `fit`."""
    return (*np.log([law.e, law.a, law.b]), law.alpha, law.beta)


def bootstrap(n: ArrayLike, d: ArrayLike, losses: ArrayLike, law: Law, samples: int) -> list[Law]:
    """Fit a law to each bootstrap sample of the runs. Each fit starts from `law` and from three other points."""
    table = np.array([n, d, losses], float)
    random = np.random.default_rng(0)
    starts = [parameters(law), *STARTS[5::10]]
    laws = []
    with track("Fitting", unit="bootstrap samples") as advance:  # a minute or two
        for number in range(samples):
            drawn = random.integers(table.shape[1], size=table.shape[1])
            laws.append(fit(*table[:, drawn], starts))
            advance(number + 1, samples)
    return laws


def interval(values: ArrayLike) -> tuple[float, float]:
    """The range of the middle 95 % of some values."""
    low, high = np.percentile(np.asarray(values, float), [2.5, 97.5])
    return float(low), float(high)
