"""The training loop: epochs, validation, early stopping, checkpoints.

It knows nothing of tables or layers: a ``Learner`` hands it batches and losses, and ``update`` does
what one batch takes. After each epoch the learner validates on rows it does not learn from; the
weights of the best epoch are those that stay.

A checkpoint holds all that the next step depends on: weights, their average, optimiser, loss scale,
what a plateau left of the learning rate, random stream, epoch and batches used, the sums of the
running epoch, the best weights so far. A resumed run is bit-equal to an undisturbed one on a CPU
with the same number of threads. One is written every ``checkpoint_minutes`` (see ``cadence``), when
a signal asks to stop, and at the end. Cost: three to five times the weights on disk, at most 3 % of
the time.

Several processes may run the loop together (``distributed``): the same steps on each, gradients and
losses of the global batch, checkpoints by the first alone. A checkpoint fits any number of them.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headrace.errors import ConfigError, DataError, nearest
from headrace.record import MemoryRecorder, Recorder
from headrace.training.averaging import WeightAverage
from headrace.training.cadence import Cadence
from headrace.training.checkpoint import Checkpoints
from headrace.training.compiled import compiled
from headrace.training.device import RandomStream
from headrace.training.distributed import ALONE, Ranks, weights_digest
from headrace.training.learner import Epoch, Learner, LossMeans, Observer, Validation
from headrace.training.params import TrainingParams
from headrace.training.schedule import PlateauRate, learning_rate
from headrace.training.signals import HeldSignals, held_signals
from headrace.training.stopping import EarlyStopping
from headrace.training.update import Updater
from headrace.training.warm_start import hold_frozen, start_warm

_UNSEEN = Validation(LossMeans({}))  # of an epoch that is not validated


@dataclass(frozen=True)
class Outcome:
    """How a training run ended; the learner's network holds the weights of ``best_epoch``."""

    best_epoch: int  # from 1
    num_epochs: int
    best_value: float | None  # of what early stopping looked at; None without it
    num_parameters: int


def train_network(
    learner: Learner,
    params: TrainingParams,
    *,
    stop_on: str,
    stream: RandomStream,
    checkpoints: Checkpoints,
    recorder: Recorder,
    length: int | None = None,
    observer: Observer | None = None,
    ranks: Ranks = ALONE,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Train ``learner.network`` until it stops improving; leave the best weights in it.

    With ``length`` it is trained for just so many epochs, without validation, and the last weights
    are left; the schedule stays that of ``max_epochs``. ``stop_on`` is ``loss`` (the total), the
    name of one of the losses, or of a metric of the learner's ``Validation``. Random numbers
    (dropout) come from ``stream``; with several ``ranks`` each draws its own, anew for every step.
    ``observer`` hears what happens and changes nothing. ``clock`` gives the seconds by which
    checkpoints are due. SIGINT and SIGTERM take effect between two steps, after a checkpoint.

    Raises:
        ConfigError: if ``stop_on`` names nothing that the learner validates, or a setting does not
            fit the network.
        DataError: if a loss or gradient is not finite, with the first row ids of the batch.
        ResourceError: if the device's memory runs out, however small the parts of a batch.
    """
    if params.warm_start is not None:
        start_warm(learner.network, params.warm_start)
        recorder.warn(
            "warm_start: if the earlier training learnt from rows of this table, predictions of "
            "those rows are too good to be true, out of fold as well, and `stack` cannot know"
        )
    quickly = compiled(learner.network) if params.compile else nullcontext()
    with held_signals() as signals, stream.lent(), quickly:
        run = _Run(
            learner,
            params,
            stop_on,
            length,
            stream,
            checkpoints,
            recorder,
            observer,
            ranks,
            clock,
            signals,
        )
        run.resume()
        while not run.is_over:
            run.one_epoch()
    return run.finish()


def training_update(learner: Learner, params: TrainingParams) -> Callable[[Any], None]:
    """Return the loop's update of ``learner`` by one batch, for a measurement of what it takes.

    The network learns from it. Nothing is saved or recorded.
    """
    recorder = MemoryRecorder()
    unused = Checkpoints(Path(), signature="", recorder=recorder)
    stream = RandomStream(params.seed, device=_device_of(learner.network))
    clock, signals = time.monotonic, HeldSignals()
    run = _Run(learner, params, "loss", None, stream, unused, recorder, None, ALONE, clock, signals)
    return run.learn


class _Run:
    """One training run: the state that a checkpoint keeps, and the steps that change it."""

    def __init__(
        self,
        learner: Learner,
        params: TrainingParams,
        stop_on: str,
        length: int | None,
        stream: RandomStream,
        checkpoints: Checkpoints,
        recorder: Recorder,
        observer: Observer | None,
        ranks: Ranks,
        clock: Callable[[], float],
        signals: HeldSignals,
    ) -> None:
        self._ranks = ranks
        self._learner = learner
        self._params = params
        self._stop_on = stop_on
        self._length = length
        self._stream = stream
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._observer = observer
        ranks.share_norms(learner.network)
        self._updater = Updater(learner, params, stream=stream, ranks=ranks, warn=recorder.warn)
        self._average = WeightAverage(learner.network, params.weight_average)
        self._best: dict[str, torch.Tensor] = {}
        self._sums: LossMeans | None = None
        self._clock = clock
        self._signals = signals
        recorder.params({"precision": self._updater.precision})
        self._cadence = Cadence(60 * params.checkpoint_minutes, clock())
        self._plateau = PlateauRate(params.plateau)
        self.stopping = EarlyStopping(params.patience)
        self.epoch = 0  # finished ones
        self.used = 0  # batches of the running epoch

    @property
    def is_over(self) -> bool:
        """Whether no further epoch is wanted."""
        return self.stopping.is_over or self.epoch >= self._num_epochs

    @property
    def _num_epochs(self) -> int:
        return self._params.max_epochs if self._length is None else self._length

    def one_epoch(self) -> None:
        """Finish the running epoch, validate, and keep the weights if they are the best."""
        network, learner = self._learner.network, self._learner
        network.train()
        hold_frozen(network)
        began, num_rows = time.monotonic(), 0
        for batch in learner.batches(self.epoch, used=self.used):
            self.learn(batch)
            self.used += 1
            num_rows += len(batch.row_id) * self._ranks.size
            rate = num_rows / max(1e-9, time.monotonic() - began)
            self._recorder.progress(
                self.epoch,
                self._num_epochs,
                unit="epochs",
                detail=f"batch {self.used}/{learner.num_batches}, {rate:,.0f} rows/s",
            )
            self._end_step()
        self._require_same_weights()
        with self._average.lent():
            if self._length is None:
                found = self._validate()
                figure = found.figure(self._stop_on)
                is_best = self.stopping.see(
                    self.epoch, figure.value, higher_is_better=figure.higher_is_better
                )
            else:
                network.eval()
                found, is_best = _UNSEEN, self.epoch + 1 == self._length
            if is_best:
                self._best = _copy(network.state_dict())
        self._log(found)
        self._plateau.see(is_gain=is_best)
        self._tell(found, is_best=is_best)
        self.epoch, self.used, self._sums = self.epoch + 1, 0, None
        self._end_step()
        self._recorder.progress(
            self.epoch, self._num_epochs, unit="epochs", detail=_in_words(found)
        )

    def learn(self, batch: Any) -> None:
        """Update the weights by one batch."""
        params = self._params
        rate = learning_rate(
            self._updater.step,
            self._learner.num_batches * params.max_epochs,
            params,
            plateau_share=self._plateau.share,
        )
        place = f"epoch {self.epoch + 1}, batch {self.used + 1}"
        update = self._updater.update(batch, rate=rate, place=place)
        self._average.update()
        if self._sums is None:
            self._sums = LossMeans(dict(update.losses.scales))
        self._sums.add(update.losses)
        if self._observer is not None and math.isfinite(update.norm):
            self._observer.gradients(update.norm)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        state = self._ranks.from_first(self._checkpoints.load)
        if state is not None:
            self._take_over(state)
        elif self._observer is not None:
            before = self._stream.state()
            self._observer.before(self._learner)
            self._stream.restore(before)
        self._require_same_weights()

    def _take_over(self, state: Mapping[str, Any]) -> None:
        self._learner.network.load_state_dict(state["network"])
        self._updater.restore(state["updater"])
        self._average.restore(state["average"])
        self._plateau.restore(state["plateau"])
        self._stream.restore(state["stream"])
        self.stopping.restore(state["stopping"])
        self._best = {
            name: value.to(_device_of(self._learner.network))
            for name, value in state["best"].items()
        }
        self.epoch, self.used = state["epoch"], state["used"]
        if state["sums"] is not None:
            self._sums = LossMeans(**state["sums"])
        if self._observer is not None:
            self._observer.restore(state["observer"])
        self._recorder.note(f"Resumed in epoch {self.epoch + 1} after {self.used} batches.")
        if (before := state.get("ranks", 1)) != self._ranks.size:
            self._recorder.note(
                f"The checkpoint was written by {before} ranks and goes on with "
                f"{self._ranks.size}: the same rows in the same batches, sums rounded in another "
                f"order, other dropout masks."
            )

    def finish(self) -> Outcome:
        """Put the best weights back and say how it went."""
        network = self._learner.network
        if not self._best:
            raise DataError(
                f"training diverged in its first epoch: on the held-back rows, {self._stop_on!r} "
                f"is not finite; set a smaller learning_rate, or look for extreme values in the "
                f"numeric columns"
            )
        network.load_state_dict(self._best)
        network.eval()
        is_stopped = self._length is None
        return Outcome(
            best_epoch=self.stopping.best_epoch + 1 if is_stopped else self.epoch,
            num_epochs=self.epoch,
            best_value=self.stopping.best if is_stopped else None,
            num_parameters=sum(p.numel() for p in network.parameters()),
        )

    def _require_same_weights(self) -> None:
        if self._ranks.size > 1:
            self._ranks.require_same("the network", weights_digest(self._learner.network))

    def _validate(self) -> Validation:
        self._learner.network.eval()
        with torch.no_grad():
            found = self._learner.validate()
        if self._stop_on not in (names := found.names()):
            raise ConfigError(
                f"`stop_on` is {self._stop_on!r}, which is not validated"
                f"{nearest(self._stop_on, names) or f'; there are: {names}'}"
            )
        if math.isnan(found.figure(self._stop_on).value) and math.isfinite(found.losses.total()):
            raise DataError(
                f"`stop_on` is {self._stop_on!r}, which has no value on the held-back rows (one "
                f"class only, say); set it to loss or to another metric"
            )
        return found

    def _log(self, found: Validation) -> None:
        values = {"learning_rate": self._updater.rate}
        if found.losses.sums:
            values["inner_loss"] = found.losses.total()
        values |= {f"inner_loss_{name}": value for name, value in found.losses.means().items()}
        values |= {f"inner_{name}": metric.value for name, metric in found.metrics.items()}
        if self._sums is not None:
            values["train_loss"] = self._sums.total()
            values |= {f"train_loss_{name}": value for name, value in self._sums.means().items()}
        self._recorder.metrics(
            {name: value for name, value in values.items() if math.isfinite(value)},
            step=self.epoch + 1,
        )

    def _tell(self, found: Validation, *, is_best: bool) -> None:
        if self._observer is not None:
            self._observer.epoch(
                Epoch(
                    number=self.epoch + 1,
                    train_losses={} if self._sums is None else self._sums.means(),
                    inner_losses=found.losses.means(),
                    metrics=found.metrics,
                    learning_rate=self._updater.rate,
                    is_best=is_best,
                )
            )

    def _end_step(self) -> None:
        """Save if it is time, training is over or a signal came; obey the signal."""
        began = self._clock()
        if self._cadence.is_due(began) or self.is_over or self._signals.is_stop_asked:
            self._save()
            self._cadence.saved(began, self._clock())
        self._signals.release()

    def _save(self) -> None:
        if not self._ranks.is_first:
            return
        sums = self._sums
        self._checkpoints.save(
            {
                "network": self._learner.network.state_dict(),
                "updater": self._updater.state(),
                "average": self._average.state(),
                "plateau": self._plateau.state(),
                "stream": self._stream.state(),
                "stopping": self.stopping.state(),
                "best": self._best,
                "epoch": self.epoch,
                "used": self.used,
                "ranks": self._ranks.size,
                "observer": {} if self._observer is None else self._observer.state(),
                "sums": None
                if sums is None
                else {
                    "scales": dict(sums.scales),
                    "sums": dict(sums.sums),
                    "weights": dict(sums.weights),
                },
            }
        )


def _in_words(found: Validation) -> str:
    """The validation for a progress line: ``loss 0.431, auc_late 0.692``."""
    figures = {"loss": found.losses.total()} if found.losses.sums else {}
    figures |= {name: metric.value for name, metric in found.metrics.items()}
    return ", ".join(f"{name} {value:.5g}" for name, value in figures.items())


def _copy(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
