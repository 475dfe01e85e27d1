"""Other ways to run the same step: compiled, as a CUDA graph, with activations computed again.

The loop runs eagerly, or compiled with ``compile: true``; the others are no settings. These are
measurements of what it would gain. Each way gives the same numbers as the eager step, and that is
measured beside its speed: what is faster and different is no variant. Compiled kernels round
differently, so outputs are compared within a tolerance; recomputed gradients are equal to the last
bit.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

from headrace.training.ceilings import time_of, waiter
from headrace.training.compiled import compiled
from headrace.training.device import RandomStream
from headrace.training.diagnosis import kernel_launches
from headrace.training.learner import Learner
from headrace.training.opwatch import watch

_WARM_UP = 3  # steps before a capture, as torch asks
_SEEN = ("eager", "recomputing")  # whose tensors pass the dispatcher, where they can be counted
_MakeStep: TypeAlias = Callable[[Learner, Any], Callable[[], object]]


@dataclass(frozen=True)
class Variant:
    """One way to run a step: its speed, what it launches and holds, how far its outputs are off."""

    name: str
    rows_per_s: float
    launches: int | None  # per step, on CUDA; a replayed graph is one
    peak_bytes: int | None  # of the tensors of forward and backward; None where they are not seen
    max_difference: float  # of loss and gradients from the eager ones, relative to the largest
    is_equal: bool  # to the last bit


def step_variants(learner: Learner, batch: Any, *, seconds: float = 0.5) -> tuple[Variant, ...]:
    """Measure the step of ``learner`` on ``batch``, which is on its device, in each way there is.

    Eager first, then with activations computed again; on CUDA also compiled and as a graph. A step
    is forward, backward and AdamW; dropout is off, so that they can be compared, but
    not where the peak is taken. The learner's weights are as before when it returns.
    """
    network = learner.network
    is_cuda = next(network.parameters()).device.type == "cuda"
    weights = deepcopy(network.state_dict())
    was_training = network.training
    network.eval()
    ways: list[tuple[str, AbstractContextManager[None], _MakeStep]] = [
        ("eager", nullcontext(), _eager_step),
        ("recomputing", recomputing(network), _eager_step),
    ]
    if is_cuda:
        ways += [
            ("compiled", compiled(network), _eager_step),
            ("CUDA graph", nullcontext(), _graphed_step),
        ]
    found = []
    try:
        eager = _outputs(learner, batch)
        for name, way, make_step in ways:
            network.load_state_dict(weights)
            with way:
                found.append(_measured(name, learner, batch, eager, make_step, seconds))
    finally:
        network.load_state_dict(weights)
        network.train(was_training)
        network.zero_grad(set_to_none=True)
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
    make_step: _MakeStep,
    seconds: float,
) -> Variant:
    device = next(learner.network.parameters()).device
    pairs = list(zip(_first_outputs(learner, batch, make_step), eager, strict=True))
    peak = _peak_bytes(learner, batch, device) if name in _SEEN else None
    step = make_step(learner, batch)
    took = time_of(step, budget_s=seconds, wait=waiter(device))
    return Variant(
        name,
        len(batch.row_id) / took,
        kernel_launches(step) if device.type == "cuda" else None,
        peak,
        max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs),
        all(torch.equal(a, b) for a, b in pairs),
    )


def _peak_bytes(learner: Learner, batch: Any, device: torch.device) -> int:
    """Peak of forward and backward as in training: dropout keeps activations of its own."""
    learner.network.train()
    try:
        with RandomStream(0, device=device).lent():
            return watch(lambda: _backward(learner, batch), wait=waiter(device))[0].peak_bytes
    finally:
        learner.network.eval()


def _outputs(learner: Learner, batch: Any) -> list[torch.Tensor]:
    """Loss and gradients of one step from the weights as they are."""
    total = _backward(learner, batch)
    gradients = [p.grad for p in learner.network.parameters() if p.grad is not None]
    return [total.clone(), *(gradient.clone() for gradient in gradients)]


def _backward(learner: Learner, batch: Any) -> torch.Tensor:
    """Forward and backward; the loss is returned, the gradients stay with the parameters."""
    learner.network.zero_grad(set_to_none=True)
    total = learner.losses(batch).total()
    torch.autograd.backward(total)
    return total.detach()


def _first_outputs(learner: Learner, batch: Any, make_step: _MakeStep) -> list[torch.Tensor]:
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
