"""The optimiser, and which weights it pulls towards zero.

Weight decay is for the matrices of layers. A bias or the scale of a norm has no reason to be small,
and a vector of a rare category would be pulled to zero for all the updates in which it is not used.
Frozen parameters are left out.
"""

from collections.abc import Callable

import torch
from torch import nn

from headrace.training.params import TrainingParams


def make_optimiser(network: nn.Module, params: TrainingParams) -> torch.optim.Optimizer:
    """Return a fresh optimiser of the parameters of ``network`` that learn."""
    spared = _spared(network)
    learning = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in learning if id(p) not in spared],
            "weight_decay": params.weight_decay,
        },
        {"params": [p for p in learning if id(p) in spared], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    make: Callable[..., torch.optim.Optimizer]
    if params.optimiser == "sgd":
        momentum = 0.9 if params.momentum is None else params.momentum
        return torch.optim.SGD(groups, lr=params.learning_rate, momentum=momentum)
    if params.optimiser == "rmsprop":
        momentum = params.momentum or 0.0
        return torch.optim.RMSprop(groups, lr=params.learning_rate, momentum=momentum)
    make = torch.optim.AdamW if params.optimiser == "adamw" else torch.optim.Adam
    return make(groups, lr=params.learning_rate)


def _spared(network: nn.Module) -> set[int]:
    """Return the ids of parameters without decay: vectors, biases of any shape, embeddings.

    An embedding is a module that calls itself one, ``nn.Embedding`` or a numeric one.
    """
    spared = {
        id(p) for name, p in network.named_parameters() if p.ndim < 2 or name.endswith("bias")
    }
    for module in network.modules():
        if "Embedding" in type(module).__name__:
            spared |= {id(p) for p in module.parameters()}
    return spared
