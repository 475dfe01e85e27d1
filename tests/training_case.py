"""Toy learners for the tests of the training loop: rows in memory, small networks."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from headrace.record import MemoryRecorder
from headrace.training.checkpoint import Checkpoints
from headrace.training.device import RandomStream
from headrace.training.distributed import ALONE
from headrace.training.learner import Losses, LossMeans, Validation
from headrace.training.loop import train_network
from headrace.training.params import TrainingParams

CPU = torch.device("cpu")


@dataclass
class Rows:
    row_id: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    weight: torch.Tensor

    def part(self, rows):
        return Rows(self.row_id[rows], self.x[rows], self.y[rows], self.weight[rows])

    def split(self, sizes):
        return [self.part(rows) for rows in torch.arange(len(self.x)).split(sizes)]


class Toy:
    """A learner over rows in memory; batches come in an order that depends on the epoch."""

    scales = {"y": 1.0}  # noqa: RUF012

    def __init__(self, network, x, y, *, batch_rows=8, held_back=None, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.network = network
        self.rows = Rows(torch.arange(len(x)), x, y, torch.rand(len(x), generator=generator) + 0.5)
        self.held_back = held_back or self.rows
        self.batch_rows = batch_rows
        self.num_rows = len(x)
        self.num_batches = math.ceil(len(x) / batch_rows)

    def batches(self, epoch, *, used):
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(self.batch_rows)[used:]:
            yield self.rows.part(batch)

    def weights(self, batch):
        return {"y": batch.weight.sum()}

    def losses(self, batch):
        z = self.network(batch.x)[:, 0]
        loss = nn.functional.mse_loss(z, batch.y, reduction="none")
        return Losses({"y": (batch.weight * loss).sum()}, {"y": batch.weight.sum()}, self.scales)

    def validate(self):
        means = LossMeans(self.scales)
        for rows in torch.arange(len(self.held_back.x)).split(5):
            means.add(self.losses(self.held_back.part(rows)))
        return Validation(means)


def network_of(seed=0, *, inputs=2, dropout=0.0):
    with RandomStream(seed, device=CPU).lent():
        return nn.Sequential(
            nn.Linear(inputs, 16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, 1),
        )


def plain(inputs=2, width=16):
    with RandomStream(3, device=CPU).lent():
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 1))


def go(learner, folder, recorder=None, *, stop_on="loss", length=None, observer=None, **params):
    recorder = recorder or MemoryRecorder()
    settings = TrainingParams(
        **{"warmup_steps": 0, "weight_decay": 0.0, "learning_rate": 0.02, **params}
    )
    outcome = train_network(
        learner,
        settings,
        stop_on=stop_on,
        stream=RandomStream(settings.seed, 1, device=CPU),
        checkpoints=Checkpoints(folder, signature="toy", recorder=recorder),
        recorder=recorder,
        length=length,
        observer=observer,
        ranks=ALONE,
    )
    return outcome, recorder


def values_of(recorder, name):
    return [value for key, value, _ in recorder.recorded_metrics if key == name]
