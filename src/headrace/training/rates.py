"""How fast a network learns, beside its matrix products alone and beside its data."""

from typing import Protocol

import torch
from torch import nn

from headrace.data.rates import Steps, Task, epoch_name
from headrace.training.device import RandomStream, torch_threads
from headrace.training.learner import Learner
from headrace.training.loop import training_update
from headrace.training.params import TrainingParams

_PRODUCTS = "matrix products of nn"


class SizedLearner(Learner, Protocol):
    """A learner that knows how much it reads."""

    batch_rows: int
    num_rows: int  # of an epoch


def training_tasks(
    learner: SizedLearner, params: TrainingParams, *, row_bytes: int
) -> tuple[Task, ...]:
    """Return training as a task, after its ceiling; the network learns, nothing is kept of it.

    The ceiling are the products of a step, forward and backward, with nothing between them.
    """
    device = next(learner.network.parameters()).device
    update = training_update(learner, params)
    stream = RandomStream(params.seed, device=device)
    learner.network.train()

    def read() -> Steps:
        """An epoch touches, and so verifies, every block of the shards, which takes long once."""
        for batch in learner.batches(0, used=0):
            yield len(batch)

    def train() -> Steps:
        epoch = 0
        while True:
            for batch in learner.batches(epoch, used=0):
                with torch_threads(params.threads), stream.lent():
                    update(batch)
                yield len(batch)
            epoch += 1

    def multiply() -> Steps:
        layers = [layer for layer in learner.network.modules() if isinstance(layer, nn.Linear)]
        rows = min(learner.batch_rows, learner.num_rows)
        held = [_operands(layer, rows, device) for layer in layers]
        while True:
            with torch_threads(params.threads), torch.inference_mode():
                for x_BI, w_OI, dy_BO in held:
                    x_BI @ w_OI.T
                    dy_BO.T @ x_BI
                    dy_BO @ w_OI
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
            yield rows

    return (
        Task(_PRODUCTS, row_bytes, multiply),
        Task(
            "train nn",
            row_bytes,
            train,
            (_PRODUCTS, epoch_name("exact")),
            warm_rows=learner.num_rows,
            warm=read,
        ),
    )


def _operands(
    layer: nn.Linear, rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = (
        (rows, layer.in_features),
        (layer.out_features, layer.in_features),
        (rows, layer.out_features),
    )
    x_BI, w_OI, dy_BO = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    return x_BI, w_OI, dy_BO
