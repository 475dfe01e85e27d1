"""A learner over a few rows in memory, and what it takes to train it."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from headrace.record import MemoryRecorder
from headrace.training.checkpoint import Checkpoints
from headrace.training.device import RandomStream
from headrace.training.learner import Losses, LossMeans, Metric, Validation
from headrace.training.loop import train_network
from headrace.training.params import TrainingParams

CPU = torch.device("cpu")


@dataclass
class Rows:
    row_id: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor

    def part(self, rows):
        return Rows(self.row_id[rows], self.x[rows], self.y[rows])

    def split(self, sizes):
        return [self.part(rows) for rows in torch.arange(len(self.x)).split(sizes)]


def rows_of(x, y):
    return Rows(torch.arange(len(x)), x, y)


class InMemory:
    """Learns ``y``: a class code for a network with several outputs, else a standardised value."""

    def __init__(self, network, learnt, held_back=None, *, batch_rows=16):
        self.network = network
        self.learnt = learnt
        self.held_back = held_back or learnt
        self.batch_rows = batch_rows
        self.num_batches = math.ceil(len(learnt.x) / batch_rows)

    def batches(self, epoch, *, used):
        order = torch.randperm(len(self.learnt.x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(self.batch_rows)[used:]:
            yield self.learnt.part(batch)

    def weights(self, batch):
        return {"y": torch.tensor(float(len(batch.x)))}

    def losses(self, batch):
        z = self.network(batch.x)
        if z.shape[1] == 1:
            loss = (z[:, 0] - batch.y) ** 2
        else:
            loss = F.cross_entropy(z, batch.y.long(), reduction="none")
        return Losses({"y": loss.sum()}, self.weights(batch), {"y": 1.0})

    prediction_losses = losses

    def validate(self):
        means = LossMeans({"y": 1.0})
        means.add(self.losses(self.held_back))
        return Validation(means, {"half_y": Metric(means.total() / 2, higher_is_better=False)})

    def learnt_rows(self, num_rows):
        return self.learnt.part(slice(num_rows))

    def held_back_rows(self, num_rows):
        return self.held_back.part(slice(num_rows))

    def constant_losses(self):
        y = self.learnt.y.double()
        if not self.learnt.y.is_floating_point():
            share = torch.bincount(self.learnt.y) / len(y)
            return {"y": float(-(share * share.clamp_min(1e-12).log()).sum())}
        return {"y": float(y.var(correction=0))}


def mlp(inputs, outputs, *, width=16, activation=nn.ReLU, dropout=0.0, norm=False, seed=0):
    """A network with one hidden layer and a small head."""
    with RandomStream(seed, device=CPU).lent():
        norms = [nn.BatchNorm1d(width)] if norm else []
        layers = [nn.Linear(inputs, width), *norms, activation(), nn.Dropout(dropout)]
        network = nn.Sequential(*layers, nn.Linear(width, outputs))
        nn.init.normal_(network[-1].weight, std=0.01)
        nn.init.zeros_(network[-1].bias)
    return network


def settings(**values):
    """Training without warm-up or decay, fit for a few rows."""
    return TrainingParams(
        **{"warmup_steps": 0, "weight_decay": 0.0, "learning_rate": 0.02, **values}
    )


def go(learner, params, folder, *, recorder=None, observer=None, **options):
    """Train; return the outcome and what was recorded."""
    recorder = recorder or MemoryRecorder()
    outcome = train_network(
        learner,
        params,
        stop_on="loss",
        stream=RandomStream(params.seed, 1, device=CPU),
        checkpoints=Checkpoints(folder, signature="rows", recorder=recorder),
        recorder=recorder,
        observer=observer,
        **options,
    )
    return outcome, recorder
