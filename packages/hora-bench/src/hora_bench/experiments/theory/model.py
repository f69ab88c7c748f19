"""The regression of the paper's theorems: attention whose heads carry rank-one updates of Q and V.

With a query ``q`` and tokens ``x_1 .. x_N`` of width ``d``, and equal weights for the heads,

    f(q, x) = 1/H sum_h (P_V + B_Vh A_Vh^T) c_h
    c_h     = sum_j softmax_j(q^T (P_Q + B_Qh A_Qh^T) P_K x_j) x_j

The pretrained ``P_Q, P_K, P_V`` are known; the factors are fitted. The query is an input of its own: with one
input on both sides of the logit, or with learnable head weights, the effect of the theorems hides.

einsum legend: n sample, h head, j token, a and b width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.special import expit, ndtr, softmax
from scipy.stats import norm

Sharing = Literal["full", "a", "b", "none"]
SHARINGS: Final[tuple[Sharing, ...]] = ("full", "a", "b", "none")

WIDTH: Final = 3
TOKENS: Final = 3
NOISE: Final = 0.1
TOKEN_BOUND: Final = 2.0


Elementwise = Callable[[NDArray], NDArray]
ACTIVATIONS: Final[Mapping[str, tuple[Elementwise, Elementwise]]] = {  # of a generator, and its derivative
    "identity": (lambda x: x, np.ones_like),
    "relu": (lambda x: np.maximum(x, 0), lambda x: np.where(x > 0, 1.0, 0.0)),
    "gelu": (lambda x: x * ndtr(x), lambda x: ndtr(x) + x * norm.pdf(x)),
    "sigmoid": (expit, lambda x: expit(x) * expit(-x)),
    "tanh": (np.tanh, lambda x: 1 - np.tanh(x) ** 2),
}


def owners(sharing: Sharing, heads: int) -> Int[np.ndarray, "4 heads"]:
    """Which fitted vector serves as ``B_Q, A_Q, B_V, A_V`` (rows) of each head (columns).

    ``"none"``: every head owns its four vectors (LoRA). ``"a"``: A_Q and A_V are common to the heads. ``"b"``: one
    vector per head is B of Q and of V, the theorems' reading of a shared generator. ``"full"``: both (HoRA).
    """
    head = np.arange(heads)
    a_q, a_v = (np.full(heads, i) for i in range(2)) if sharing in ("full", "a") else (head, head + heads)
    b_q = head + max(a_v) + 1
    b_v = b_q if sharing in ("full", "b") else b_q + heads
    return np.stack([b_q, a_q, b_v, a_v])


def count_params(sharing: Sharing, heads: int) -> int:
    """Free numbers of the model, gauge included."""
    return WIDTH * int(owners(sharing, heads).max() + 1)


@dataclass(frozen=True, slots=True)
class Factors:
    """Rank-one factors of every head: its update of Q is ``b_q[h] a_q[h]^T``, of V ``b_v[h] a_v[h]^T``."""

    b_q: Float[np.ndarray, "heads width"]
    a_q: Float[np.ndarray, "heads width"]
    b_v: Float[np.ndarray, "heads width"]
    a_v: Float[np.ndarray, "heads width"]

    @classmethod
    def unpack(cls, theta: Float[np.ndarray, " params"], sharing: Sharing, heads: int) -> Self:
        """Factors of every head from the fitted vectors."""
        return cls(*theta.reshape(-1, WIDTH)[owners(sharing, heads)])

    def heads(self) -> list[tuple[NDArray, ...]]:
        """``(b_q, a_q, b_v, a_v)`` head by head."""
        return list(zip(self.b_q, self.a_q, self.b_v, self.a_v, strict=True))

    def updates(self) -> Float[np.ndarray, "2 heads width width"]:
        """Products ``B A^T`` of Q and of V: all that data can know, A and B apart are never identified."""
        return np.stack([np.einsum("ha,hb->hab", b, a) for b, a in ((self.b_q, self.a_q), (self.b_v, self.a_v))])


@dataclass(frozen=True, slots=True)
class Data:
    """Samples of one regression: queries, tokens, keys ``P_K x`` and outputs."""

    q: Float[np.ndarray, "samples width"]
    x: Float[np.ndarray, "samples tokens width"]
    k: Float[np.ndarray, "samples tokens width"]
    y: Float[np.ndarray, "samples width"]

    def first(self, n: int) -> Data:
        """The first ``n`` samples."""
        return Data(self.q[:n], self.x[:n], self.k[:n], self.y[:n])

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.y)


@dataclass(frozen=True, slots=True)
class Problem:
    """Known pretrained projections, the true factors: one head, inside every sharing; and what generates them.

    With full sharing the fitted vectors go through the activation, as those of the truth did. Else factors are free.
    """

    p_q: Float[np.ndarray, "width width"]
    p_k: Float[np.ndarray, "width width"]
    p_v: Float[np.ndarray, "width width"]
    truth: Factors
    activation: str = "identity"

    @classmethod
    def draw(cls, rng: np.random.Generator, activation: str = "identity") -> Self:
        """Gaussian projections of unit scale; true factors are the activation of Gaussian vectors, none zero."""
        p_q, p_k, p_v = rng.normal(size=(3, WIDTH, WIDTH)) / np.sqrt(WIDTH)
        vectors = np.zeros((3, WIDTH))
        while not vectors.any(axis=1).all():
            vectors = ACTIVATIONS[activation][0](rng.normal(size=3 * WIDTH)).reshape(3, WIDTH)
        return cls(p_q, p_k, p_v, Factors.unpack(vectors.ravel(), "full", 1), activation)

    def factors(self, theta: Float[np.ndarray, " params"], sharing: Sharing, heads: int) -> Factors:
        """Factors of every head from the numbers that are fitted."""
        return Factors.unpack(self._of(sharing)[0](theta), sharing, heads)

    def slope(self, theta: Float[np.ndarray, " params"], sharing: Sharing) -> Float[np.ndarray, " params"]:
        """Derivative of the fitted vectors by the numbers that are fitted."""
        return self._of(sharing)[1](theta)

    def _of(self, sharing: Sharing) -> tuple[Elementwise, Elementwise]:
        return ACTIVATIONS[self.activation if sharing == "full" else "identity"]

    def sample(self, n: int, rng: np.random.Generator, *, noise: float = NOISE) -> Data:
        """``n`` samples: queries and tokens uniform on ``[-2, 2]^d``, Gaussian noise on the outputs."""
        both = rng.uniform(-TOKEN_BOUND, TOKEN_BOUND, size=(n, 1 + TOKENS, WIDTH))
        q, x = both[:, 0], both[:, 1:]
        clean = predict(self, self.truth, Data(q, x, x @ self.p_k.T, q))
        return Data(q, x, x @ self.p_k.T, clean + noise * rng.normal(size=clean.shape))


def _attention(problem: Problem, b_q: NDArray, a_q: NDArray, data: Data) -> NDArray:
    """Softmax weights ``(samples, tokens)`` of one head."""
    query = data.q @ problem.p_q + np.outer(data.q @ b_q, a_q)
    return softmax(np.einsum("nb,njb->nj", query, data.k), axis=1)


def predict(problem: Problem, factors: Factors, data: Data) -> Float[np.ndarray, "samples width"]:
    """Outputs ``f(q, x)`` of the given factors."""
    total = np.zeros_like(data.q)
    for b_q, a_q, b_v, a_v in factors.heads():
        context = np.einsum("nj,njb->nb", _attention(problem, b_q, a_q, data), data.x)
        total += context @ problem.p_v.T + np.outer(context @ a_v, b_v)
    return total / len(factors.b_q)


def jacobian(
    problem: Problem, theta: Float[np.ndarray, " params"], sharing: Sharing, heads: int, data: Data
) -> Float[np.ndarray, "outputs params"]:
    """Derivative of the flattened outputs by the numbers that are fitted, by hand.

    Per head, with ``C = sum_j s_j (x_j - c) k_j^T`` and ``W = P_V + B_V A_V^T``, ``H`` times the derivative by
    ``B_Q`` is ``(W C A_Q) q^T``, by ``A_Q`` ``W C (q . B_Q)``, by ``B_V`` ``I (A_V . c)``, by ``A_V`` ``B_V c^T``.
    A vector that serves several places collects the sum. The activation's derivative comes last.
    """
    owner = owners(sharing, heads)
    columns = np.zeros((*data.q.shape, theta.size // WIDTH, WIDTH))  # samples, outputs, vector, its entries
    for h, (b_q, a_q, b_v, a_v) in enumerate(problem.factors(theta, sharing, heads).heads()):
        weights = _attention(problem, b_q, a_q, data)
        context = np.einsum("nj,njb->nb", weights, data.x)
        value = problem.p_v + np.outer(b_v, a_v)
        spread = (weights[:, :, None] * (data.x - context[:, None])) @ value.T
        slope = spread.transpose(0, 2, 1) @ data.k
        columns[:, :, owner[0, h]] += (slope @ a_q)[:, :, None] * data.q[:, None, :]
        columns[:, :, owner[1, h]] += slope * (data.q @ b_q)[:, None, None]
        columns[:, :, owner[2, h]] += (context @ a_v)[:, None, None] * np.eye(WIDTH)
        columns[:, :, owner[3, h]] += b_v[:, None] * context[:, None, :]
    return columns.reshape(data.q.size, -1) * problem.slope(theta, sharing) / heads
