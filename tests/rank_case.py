"""One rank of the two that test_distributed starts: python -m tests.rank_case FOLDER PORT...

Each scenario opens its own group, on its own port, and leaves what it saw as a torch file that the
test reads. No torchrun: its agent is tried by the slow tests; here rank 0 keeps the store.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from headrace.errors import DataError, HeadraceError, Stopped
from headrace.models.network import NetworkLearner
from headrace.models.nn import NnParams, fit
from headrace.record import MemoryRecorder
from headrace.training.checkpoint import Checkpoints
from headrace.training.device import RandomStream
from headrace.training.distributed import Launch, current_ranks, joined, read_launch
from headrace.training.learner import Losses, LossMeans, Validation
from headrace.training.loop import train_network
from headrace.training.params import TrainingParams
from tests.halting import Halt, HaltingRecorder
from tests.train_case import RESOURCES, views_of

TRAINED = {
    "device": "cpu",
    "members": 1,
    "numbers": "plain",
    "hidden_sizes": [16],
    "batch_rows": 64,
    "max_epochs": 3,
    "warmup_steps": 0,
    "learning_rate": 0.01,
    "dropout": 0.0,
    "checkpoint_minutes": 0.0,
}
HALT_AFTER = 12  # progress calls: in the second of three epochs


def train(case: Path, checkpoints: Path, *, recorder=None, **params):
    """Fit on the shards below ``case``; return weights, summary and what was recorded."""
    recorder = recorder or MemoryRecorder()
    model = fit(
        views_of(case),
        NnParams.model_validate(TRAINED | params),
        checkpoints=checkpoints,
        resources=RESOURCES,
        recorder=recorder,
    )
    return {
        "weights": dict(model.network.state_dict()),
        "summary": dict(model.summary),
        "metrics": recorder.recorded_metrics,
        "notes": recorder.notes,
        "params": recorder.recorded_params,
    }


def norm_case() -> tuple[nn.Module, torch.Tensor]:
    """A network with a batch norm and an unused parameter, and 11 rows for it."""
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
    network.register_parameter("unused", nn.Parameter(torch.zeros(2)))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return network.double(), torch.randn(11, 3, generator=generator).double() + 100


def norm_result(network: nn.Module, x: torch.Tensor, *, num_rows: int) -> dict:
    """Run forward and backward on ``x``, whose loss is a mean over ``num_rows`` in all."""
    z = network(x)
    torch.autograd.backward((z**2).sum() / num_rows)
    current_ranks().sum_gradients(network)
    return {
        "gradients": {name: p.grad for name, p in network.named_parameters()},
        "state": dict(network.state_dict()),
        "outputs": z.detach(),
    }


def _norm(_folder: Path) -> dict:
    ranks = current_ranks()
    network, x = norm_case()
    ranks.share_norms(network)
    mine = x[:11] if ranks.rank == 0 else x[11:]  # all rows on one rank: the other has none
    empty = norm_result(network, mine, num_rows=11)
    network, x = norm_case()
    ranks.share_norms(network)
    mine = x[:4] if ranks.rank == 0 else x[4:]
    return {"empty": empty, "uneven": norm_result(network, mine, num_rows=11)}


def _train(folder: Path) -> dict:
    return train(folder / "case", folder / "two")


def _normed(folder: Path) -> dict:
    return train(folder / "case", folder / "two-normed", batch_norm=True)


def _parts(folder: Path) -> dict:
    """Rank 1 has memory for 9 rows of its 32; parts of 12 were asked for."""
    whole = NetworkLearner.losses

    def losses(self, batch):
        if len(batch) > 9 and torch.is_grad_enabled() and current_ranks().rank == 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(self, batch)

    recorder = MemoryRecorder()
    NetworkLearner.losses = losses
    try:
        found = train(folder / "case", folder / "parts", recorder=recorder, micro_rows=12)
    finally:
        NetworkLearner.losses = whole
    return found | {"warnings": recorder.warnings}


def _dropout(folder: Path) -> dict:
    recorder = HaltingRecorder(HALT_AFTER)
    whole = train(folder / "case", folder / "drop", dropout=0.3)
    try:
        train(folder / "case", folder / "drop-halted", dropout=0.3, recorder=recorder)
    except Halt:
        resumed = train(folder / "case", folder / "drop-halted", dropout=0.3)
    return {"whole": whole, "resumed": resumed}


class Drawing:
    """A learner that keeps the random number it draws in each step, as dropout would."""

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1)
        nn.init.zeros_(self.network.weight)
        nn.init.zeros_(self.network.bias)
        self.num_batches = 3
        self.draws: list[float] = []

    def batches(self, epoch, *, used):  # noqa: ARG002 - the loop's signature
        return [SimpleNamespace(row_id=torch.zeros(1, dtype=torch.int64))] * (3 - used)

    def weights(self, _batch):
        return {"y": torch.ones(())}

    def losses(self, _batch):
        self.draws.append(float(torch.rand(())))
        loss = self.network(torch.ones(1, 1)).sum() ** 2 + 1
        return Losses({"y": loss}, {"y": torch.ones(())}, {"y": 1.0})

    def validate(self):
        return Validation(LossMeans({"y": 1.0}, {"y": 1.0}, {"y": 1.0}))


def _draws(folder: Path) -> dict:
    learner, recorder = Drawing(), MemoryRecorder()
    train_network(
        learner,
        TrainingParams(max_epochs=2),
        stop_on="loss",
        stream=RandomStream(0, 1, device=torch.device("cpu")),
        checkpoints=Checkpoints(folder / "draws", signature="draws", recorder=recorder),
        recorder=recorder,
        ranks=current_ranks(),
    )
    return {"draws": learner.draws}


def _half(folder: Path) -> dict:
    """Stop in mid-epoch, for one process to go on."""
    try:
        train(folder / "case", folder / "from-two", recorder=HaltingRecorder(HALT_AFTER))
    except Halt:
        return {}
    raise AssertionError("it did not halt")


def _go_on(folder: Path) -> dict:
    """Go on from what one process left."""
    return train(folder / "case", folder / "from-one")


def _uneven(folder: Path) -> dict:
    return train(folder / "case", folder / "uneven", batch_rows=63)


def _diverge(folder: Path) -> dict:
    return train(folder / "case", folder / "diverged", learning_rate=1e30, max_epochs=9)


def _differ(_folder: Path) -> dict:
    current_ranks().require_same("the data", f"digest {min(1, current_ranks().rank)}")
    return {}


def _fail(_folder: Path) -> dict:
    ranks = current_ranks()
    if ranks.rank == 1:
        raise DataError("row 7 is bad")
    ranks.summed(torch.zeros(1))
    return {}


def _stop(_folder: Path) -> dict:
    """torchrun stops all ranks when one fails: the reason is the failure, not the stop."""
    if current_ranks().rank == 1:
        raise DataError("row 8 is bad")
    raise Stopped("stage train@nn was stopped")


def _hang(_folder: Path) -> dict:
    ranks = current_ranks()
    if ranks.rank == 1:
        time.sleep(_TIMEOUTS["hang"] + 4)
        return {}
    ranks.summed(torch.zeros(1))
    return {}


def _die(_folder: Path) -> dict:
    ranks = current_ranks()
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.summed(torch.zeros(1))
    return {}


SCENARIOS = (
    _norm,
    _train,
    _normed,
    _parts,
    _dropout,
    _draws,
    _half,
    _go_on,
    _uneven,
    _diverge,
    _differ,
    _fail,
    _stop,
    _hang,
    _die,  # the last one: rank 1 is gone
)
_TIMEOUTS = {"hang": 1.0}


def main(folder: Path, ports: list[str]) -> None:
    torch.set_num_threads(1)
    launch = read_launch(os.environ)
    assert isinstance(launch, Launch)
    for scenario, port in zip(SCENARIOS, ports, strict=True):
        name = scenario.__name__.strip("_")
        os.environ["MASTER_PORT"] = port
        began = time.monotonic()
        try:
            with joined(launch, timeout_s=_TIMEOUTS.get(name, 60.0)):
                seen = scenario(folder)
        except HeadraceError as error:
            seen = {"error": str(error), "exit_code": error.exit_code}
        seen["seconds"] = time.monotonic() - began
        torch.save(seen, folder / f"{name}-{launch.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
