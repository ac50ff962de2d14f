"""Telling PiSSA from LoRA: whether an adapter's product holds the principal part of the matrix that it belongs to.

A PiSSA adapter begins as P = B0·A0, the r largest singular directions of W, which the trainer takes out of W, and moves
little from there. Its file has a LoRA's names, and added to W it would count that part twice. Two numbers tell:

- Alignment, <BA, W> / (|BA| · S_r), where S_r² is the sum of the r largest squared singular values of W. No matrix of
  rank r has a larger one than 1, and only P itself, times any number, reaches it. A product that has nothing to do with
  W has about 1 / sqrt(out · r) at most, and products of trained LoRAs lie below 0.05 (the directions of W that they
  amplify are not its principal ones: Hu et al. 2021, table 7, 0.32 of 21.67 at r = 4 and 1.90 of 37.71 at r = 64).
- Share, <BA, W> / <BA, BA>. It is exactly 1 where BA is an orthogonal projection of W, which P is, and so are what
  fast SVD with any number of iterations gives, OLoRA's and CorDA's beginnings. Training that moves BA by e of its norm
  makes it about 1 / (1 + e²). A LoRA whose alignment is not small by chance is far smaller than W's principal part,
  and then its share is far above 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Alignment from which, and share up to which, a product is taken for a changed principal part: the first is four times
# what LoRAs have, and is reached by one that moved by twice its norm; the second leaves room for one that shrank.
ALIGNED = 0.2
LARGEST_SHARE = 1.5
# How far the share of what was taken out may be from 1: rounding to bf16 moves it by less than 0.01, another scale of
# the product or another model by more than half.
SHARE_TOLERANCE = 0.1
# Matrices that are looked at; an adapter's are all of one kind.
SAMPLE = 8
_ITERATIONS = 4


@dataclass(frozen=True)
class Alignment:
    """How a product BA lies to a matrix W.

    Attributes:
        inner: <BA, W>.
        squared: <BA, BA>.
        best: the largest <X, W> of a matrix X of the same rank and norm.
    """

    inner: float
    squared: float
    best: float

    def times(self, scale: float) -> Alignment:
        """How the product times a number does."""
        return Alignment(scale * self.inner, scale**2 * self.squared, scale * self.best)

    @property
    def aligned(self) -> float:
        """The alignment, between -1 and 1; 0 where there is nothing to compare."""
        return self.inner / self.best if self.best else 0.0

    @property
    def share(self) -> float:
        """The share; infinite for a product that is zero."""
        return self.inner / self.squared if self.squared else float("inf")


def align(weight: Tensor, up: Tensor, down: Tensor) -> Alignment:
    """How up·down, [out, r]·[r, in], lies to a weight [out, in], all float32."""
    inner = float(((up.T @ weight) * down).sum())
    squared = max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))
    return Alignment(inner, squared, squared**0.5 * _largest(weight, down))


def _largest(weight: Tensor, start: Tensor) -> float:
    """The norm of a matrix's r largest singular values, by orthogonal iteration from r vectors; never above it.

    On the flattest spectra it is up to a quarter below, which is on the side of asking.
    """
    basis = start.T
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis)[0])[0]
    return float((weight @ basis).norm())


def holds_principal_part(found: Sequence[Alignment]) -> bool:
    """Whether products are a changed principal part of their matrices."""
    seen = [one for one in found if one.best]
    if not seen:
        return False
    aligned = sum(one.aligned for one in seen) / len(seen)
    share = sum(one.inner for one in seen) / sum(one.squared for one in seen)
    return aligned >= ALIGNED and share <= LARGEST_SHARE


def sampled(names: Sequence[str]) -> list[str]:
    """Some of an adapter's matrices, spread over all of them."""
    n_sampled = min(SAMPLE, len(names))
    return [names[index * len(names) // n_sampled] for index in range(n_sampled)]
