"""How fast the project's network learns, beside its matrix products alone and beside its data."""

import torch
from torch import nn

from headrace.data.encoder import Encoder
from headrace.data.rates import Steps, Task, epoch_name
from headrace.models.nn import NnParams, open_learner
from headrace.models.protocol import TrainViews
from headrace.params import Resources
from headrace.training.device import RandomStream, torch_threads
from headrace.training.loop import training_update

_PRODUCTS = "matrix products of nn"


def training_tasks(
    views: TrainViews, encoder: Encoder, params: NnParams, resources: Resources
) -> tuple[Task, ...]:
    """Return the training of ``train.nn`` as a task, after its ceiling; nothing is kept of it.

    The ceiling are the products of a step, forward and backward, with nothing between them.
    """
    # Worker processes would not count in this one's CPU seconds.
    learner = open_learner(views, params, resources=resources.model_copy(update={"workers": 0}))
    device = next(learner.network.parameters()).device
    row_bytes = encoder.layout.row_bytes
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
