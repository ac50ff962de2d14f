"""Two things a trainer shares with its helpers: the optimiser's pieces, and single-threaded processes that do the work.

A step is cut into many small jobs (a few lanes forward and backward; then one layer's update), and every process takes
the next job when it is free. So a machine that other people use slows a step in proportion, whereas threads that meet
after every operation stand and wait: 11 s instead of 1.5 s a step were measured beside one busy neighbour.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from torch import Tensor

# --- optimiser --------------------------------------------------------------------------------------------------------


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan 2024) on [M, rows, columns], rows <= columns: U S V^T -> about U V^T.

    Each step is X <- (a I + b A + c A^2) X with A = X X^T. The polynomials commute, so they are gathered in the small
    Gram matrices and X is multiplied once, at the end.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    gram = x @ x.mT
    eye = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    gathered: Tensor | None = None
    for step in range(steps):
        factor = a * eye + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        gathered = factor if gathered is None else factor @ gathered
        if step + 1 < steps:
            gram = factor @ gram @ factor
            gram = (gram + gram.mT) / 2
    return x if gathered is None else torch.bmm(gathered, x)


class Piece:
    """Some parameters with one rule and one peak learning rate. All its memory is made at once, so it can be shared."""

    def __init__(self, params: dict[str, Tensor], lr: float, weight_decay: float) -> None:
        self.params, self.lr, self.weight_decay = params, lr, weight_decay
        self.memory: dict[str, Tensor] = {}

    def step(self, grads: dict[str, Tensor], factor: float, count: int) -> None:
        """Update from the gradients, by name, at ``factor`` of the peak rate; ``count`` is 1 at the first update."""
        raise NotImplementedError


class Muon(Piece):
    """Nesterov momentum, orthogonalized; for hidden matrices. Equal shapes (or transposed) are done in one batch."""

    def __init__(self, params: dict[str, Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, lr, weight_decay)
        self.momentum = momentum
        self.memory = {f"{name}.momentum": torch.zeros_like(p) for name, p in params.items()}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], factor: float, count: int) -> None:
        """One update; see ``Piece.step``."""
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for name, p in self.params.items():
            memory = self.memory[f"{name}.momentum"].lerp_(grads[name], 1 - self.momentum)
            update = grads[name].lerp(memory, self.momentum)
            update = update if update.shape[0] <= update.shape[1] else update.mT
            by_shape.setdefault(tuple(update.shape), []).append((p, update))
        for members in by_shape.values():
            updates = orthogonalize(torch.stack([update for _, update in members]))
            for (p, _), update in zip(members, updates, strict=True):
                rows, columns = p.shape
                p.mul_(1 - factor * self.lr * self.weight_decay)
                p.add_(
                    update if rows <= columns else update.mT, alpha=-factor * self.lr * max(1, rows / columns) ** 0.5
                )


class AdamW(Piece):
    """Adam with decoupled weight decay; for embedding, head, low-rank paths and vectors."""

    def __init__(
        self, params: dict[str, Tensor], lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.98)
    ) -> None:
        super().__init__(params, lr, weight_decay)
        self.betas = betas
        for kind in ("mean", "square"):
            self.memory |= {f"{name}.{kind}": torch.zeros_like(p) for name, p in params.items()}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], factor: float, count: int) -> None:
        """One update; see ``Piece.step``."""
        first, second = self.betas
        for name, p in self.params.items():
            mean = self.memory[f"{name}.mean"].lerp_(grads[name], 1 - first)
            square = self.memory[f"{name}.square"].mul_(second).addcmul_(grads[name], grads[name], value=1 - second)
            size = square.sqrt().mul_((1 - second**count) ** -0.5).add_(1e-12)
            p.mul_(1 - factor * self.lr * self.weight_decay)
            p.addcdiv_(mean, size, value=-factor * self.lr / (1 - first**count))


# --- processes --------------------------------------------------------------------------------------------------------


class Crew:
    """This process and ``size - 1`` forked ones, which take numbered jobs until none is left.

    Jobs are functions of a number; the processes share memory only through tensors that were shared before ``start``.
    ``rank`` says which process runs: a job may write to what belongs to its rank, or to its number.
    """

    def __init__(self, size: int, jobs: dict[str, Callable[[int, int], None]]) -> None:
        self.size, self.jobs, self.names = size, jobs, list(jobs)
        context = mp.get_context("fork")
        self.next_job, self.count = context.Value("i", 0), context.Value("i", 0, lock=False)
        self.kind = context.Value("i", 0, lock=False)
        self.go = [context.Semaphore(0) for _ in range(size - 1)]
        self.done = context.Semaphore(0)
        self.failed = context.Value("i", 0, lock=False)
        self.helpers = [context.Process(target=self._help, args=(rank,), daemon=True) for rank in range(1, size)]

    def start(self) -> None:
        """Fork. Nothing may have run on more than one thread before, nor any backward pass."""
        for helper in self.helpers:
            helper.start()

    def _help(self, rank: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        parent = os.getppid()
        while True:
            while not self.go[rank - 1].acquire(timeout=5):
                if os.getppid() != parent:
                    return
            try:
                self._take(rank)
            except BaseException:
                self.failed.value = 1
                raise
            finally:
                self.done.release()

    def _take(self, rank: int) -> None:
        job = self.jobs[self.names[self.kind.value]]
        while True:
            with self.next_job.get_lock():
                number = self.next_job.value
                self.next_job.value += 1
            if number >= self.count.value:
                return
            job(rank, number)

    def run(self, name: str, count: int) -> None:
        """Do jobs 0 … count - 1 of one kind; returns when all are done."""
        self.kind.value, self.count.value, self.next_job.value = self.names.index(name), count, 0
        for go in self.go:
            go.release()
        self._take(0)
        for helper in self.helpers:
            while not self.done.acquire(timeout=5):
                if not helper.is_alive():
                    raise RuntimeError("a helper process has died")
        if self.failed.value:
            raise RuntimeError("a helper process has failed")

    def stop(self) -> None:
        """End the helpers."""
        for helper in self.helpers:
            helper.terminate()
            helper.join()


def share(tensors: list[Tensor]) -> None:
    """Move CPU tensors to memory that forked processes share; leaves those on a device alone."""
    for tensor in tensors:
        if tensor.device.type == "cpu":
            tensor.share_memory_()  # type: ignore[no-untyped-call]
