"""Other ways to run the same step: compiled, as a CUDA graph, with activations computed again.

The loop runs eagerly. These are measurements of what it would gain, not settings that it has. Each
way gives the same numbers as the eager step, and that is measured beside its speed: what is faster
and different is no variant. Compiled kernels round differently, so outputs are compared within a
tolerance; recomputed gradients are equal to the last bit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from headrace.training.ceilings import time_of, waiter
from headrace.training.diagnosis import kernel_launches
from headrace.training.loop import Learner

_WARM_UP = 3  # steps before a capture, as torch asks


@dataclass(frozen=True)
class Variant:
    """One way to run a step: its speed, what it launches, and how far its outputs are off."""

    name: str
    rows_per_s: float
    launches: int  # per step; a replayed graph is one
    max_difference: float  # of loss and gradients from the eager ones, relative to the largest


def step_variants(learner: Learner, batch: Any, *, seconds: float = 0.5) -> tuple[Variant, ...]:
    """Measure the step of ``learner`` on ``batch``, which is on a CUDA device, in three ways.

    A step is forward, backward and AdamW; dropout is off, so that the three can be compared. The
    learner's weights are as before when it returns.

    Raises:
        RuntimeError: if the network is not on a CUDA device.
    """
    device = next(learner.network.parameters()).device
    if device.type != "cuda":
        raise RuntimeError(f"steps are compared on CUDA; the network is on {device}")
    weights = deepcopy(learner.network.state_dict())
    was_training = learner.network.training
    learner.network.eval()
    try:
        eager = _outputs(learner, batch)
        found = [_measured("eager", learner, batch, eager, _eager_step, seconds)]
        learner.network.load_state_dict(weights)
        with _compiled(learner):
            found.append(_measured("compiled", learner, batch, eager, _eager_step, seconds))
        learner.network.load_state_dict(weights)
        found.append(_measured("CUDA graph", learner, batch, eager, _graphed_step, seconds))
    finally:
        learner.network.load_state_dict(weights)
        learner.network.train(was_training)
        learner.network.zero_grad(set_to_none=True)
    return tuple(found)


@contextmanager
def recomputing(network: nn.Module) -> Iterator[None]:
    """Let the layers of ``network`` keep a few activations alone and compute the rest again.

    Each ``nn.Sequential`` of n layers is cut into about √n parts, and only the inputs of the parts
    are kept. Random numbers are drawn again from the same state, so dropout has the same masks and
    gradients are the same. Costs nearly one more forward pass.
    """
    blocks = [
        module
        for module in network.modules()
        if isinstance(module, nn.Sequential)
        and not any(isinstance(layer, nn.Sequential) for layer in module)
    ]
    for block in blocks:
        block.forward = _in_parts(list(block))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the method of the class is found again


def _in_parts(layers: list[nn.Module]) -> Callable[[torch.Tensor], Any]:
    num_parts = max(1, round(math.sqrt(len(layers))))
    in_parts: Any = checkpoint_sequential  # which torch does not type
    return lambda x: in_parts(layers, num_parts, x, use_reentrant=False)


def _measured(
    name: str,
    learner: Learner,
    batch: Any,
    eager: list[torch.Tensor],
    make_step: Callable[[Learner, Any], Callable[[], object]],
    seconds: float,
) -> Variant:
    difference = max(
        float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
        for mine, theirs in zip(_first_outputs(learner, batch, make_step), eager, strict=True)
    )
    step = make_step(learner, batch)
    wait = waiter(next(learner.network.parameters()).device)
    took = time_of(step, budget_s=seconds, wait=wait)
    return Variant(name, len(batch.row_id) / took, kernel_launches(step), difference)


def _outputs(learner: Learner, batch: Any) -> list[torch.Tensor]:
    """Loss and gradients of one step from the weights as they are."""
    learner.network.zero_grad(set_to_none=True)
    total = learner.losses(batch).total()
    torch.autograd.backward(total)
    gradients = [p.grad for p in learner.network.parameters() if p.grad is not None]
    return [total.detach().clone(), *(gradient.clone() for gradient in gradients)]


def _first_outputs(
    learner: Learner, batch: Any, make_step: Callable[[Learner, Any], Callable[[], object]]
) -> list[torch.Tensor]:
    if make_step is _eager_step:
        return _outputs(learner, batch)
    graph, total = _captured(learner, batch)
    graph.replay()
    gradients = [p.grad for p in learner.network.parameters() if p.grad is not None]
    return [total.detach().clone(), *(gradient.clone() for gradient in gradients)]


def _eager_step(learner: Learner, batch: Any) -> Callable[[], object]:
    optimiser = torch.optim.AdamW(learner.network.parameters(), lr=1e-5)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(learner.losses(batch).total())
        optimiser.step()

    return step


def _graphed_step(learner: Learner, batch: Any) -> Callable[[], object]:
    optimiser = torch.optim.AdamW(learner.network.parameters(), lr=1e-5, capturable=True)
    graph, _ = _captured(learner, batch, optimiser)
    return graph.replay


def _captured(
    learner: Learner, batch: Any, optimiser: torch.optim.Optimizer | None = None
) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Forward and backward (and the optimiser) as a graph; gradients stay where they were."""

    def step() -> torch.Tensor:
        learner.network.zero_grad(set_to_none=True)
        total = learner.losses(batch).total()
        torch.autograd.backward(total)
        if optimiser is not None:
            optimiser.step()
        return total

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    return graph, total


@contextmanager
def _compiled(learner: Learner) -> Iterator[None]:
    network = learner.network
    learner.network = cast(nn.Module, torch.compile(network))
    try:
        yield
    finally:
        learner.network = network
