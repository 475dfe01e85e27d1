"""Whether a network can learn, is learning, and has learnt: checks around the training loop.

Before the first step of a network with fresh weights, on a few rows that are learnt from:

- *first loss*: within 10 % of the loss of an output of 0. That is ln C of a target with C classes
  and, of a regression target, the mean square of its standardised values, whose expectation is the
  target's variance, 1. It is taken from the same rows, by the learner's own loss. A head with small
  weights and no bias passes.
- *one batch*: a copy of the network without dropout or noise learns 32 rows by heart: its loss
  falls below a tenth of the first within 200 steps of Adam. If not, the network is not connected to
  its loss or its inputs do not tell the rows apart.

By policy a failed check is a warning with advice, or an error before anything is trained.

While training, per epoch: median and largest gradient norm; on 256 held-back rows the share of
ReLU units that are 0 on every row (*dead*), and of tanh and sigmoid units within 1 % of an end of
their range on every row (*saturated*). Gradients pass through neither.

At the end: the curves as a figure, and a verdict with one setting to try (``verdict``).

The checks look and do not touch: the run's weights, random numbers and optimiser are the same bits
without them. The first of several ranks does them all. They cost a forward pass of 256 rows per
epoch, one of up to 8192 rows at the end, and at most a CPU second before the first step.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from headrace.errors import DataError
from headrace.record import Recorder
from headrace.storage import write_file
from headrace.training.curves import LearningCurves, curves_json, learning_curves
from headrace.training.distributed import Ranks, own_norms
from headrace.training.learner import Epoch, Learner, Losses
from headrace.training.loop import Outcome
from headrace.training.params import TrainingParams
from headrace.training.verdict import Curves, Verdict, judge

_TOLERANCE = 0.1  # of the expected first loss
_ONE_BATCH_ROWS = 32
_ONE_BATCH_STEPS = 200
_ONE_BATCH_SHARE = 0.1  # of the first loss
_ONE_BATCH_RATE = 0.01  # of Adam
_ONE_BATCH_SECONDS = 1.0  # after which the check is left undecided
_ONE_BATCH_PARAMETERS = 10_000_000  # a larger network is not copied
_SAMPLE_ROWS = 256
_LEARNT_ROWS = 8192
_SATURATED = 0.99  # of tanh; of a sigmoid scaled to −1…1
_MANY_IDLE = 0.5  # share of a layer's units that is worth a warning


class Watched(Learner, Protocol):
    """A learner that can show some of its rows."""

    def learnt_rows(self, num_rows: int) -> Any:
        """Return a batch of at most so many of the rows learnt from, mixed, always the same."""

    def held_back_rows(self, num_rows: int) -> Any:
        """Return a batch of at most so many held-back rows, mixed, always the same."""

    def prediction_losses(self, batch: Any) -> Losses:
        """Return the losses of predictions, as ``validate`` counts them."""

    def constant_losses(self) -> Mapping[str, float]:
        """Return per loss that of the best constant prediction of the rows learnt from."""


@dataclass(frozen=True)
class FirstChecks:
    """What was seen before the first step; losses by name, beside those expected.

    ``share_left`` is the least that was left of the loss of one batch, after ``steps`` steps; None
    if that was not tried to its end.
    """

    first_losses: Mapping[str, float]
    expected_losses: Mapping[str, float]
    share_left: float | None
    steps: int

    def faults(self) -> list[str]:
        """Return what is wrong, with advice; nothing for a healthy network."""
        found = []
        for name, expected in self.expected_losses.items():
            first = self.first_losses[name]
            if expected > 0 and not abs(first / expected - 1) <= _TOLERANCE:
                found.append(
                    f"the first loss of {name!r} is {first:.4g}, not within {_TOLERANCE:.0%} of "
                    f"{expected:.4g}, that of an output of 0: give the last layer small weights "
                    f"and no bias, and look for extreme values in the numeric columns"
                )
        if self.share_left is not None and not self.share_left < _ONE_BATCH_SHARE:
            found.append(
                f"{_ONE_BATCH_ROWS} rows were not learnt by heart: after {self.steps} steps "
                f"{self.share_left:.0%} of their loss is left, more than {_ONE_BATCH_SHARE:.0%}: "
                f"look for rows with the same inputs and different labels, then try larger "
                f"`hidden_sizes` or another `activation`"
            )
        return found

    def metrics(self) -> dict[str, float]:
        """Return the figures as they are recorded."""
        values = {f"health/first_loss_{n}": value for n, value in self.first_losses.items()}
        values |= {f"health/zero_loss_{n}": value for n, value in self.expected_losses.items()}
        if self.share_left is not None:
            values["health/one_batch_loss_left"] = self.share_left
            values["health/one_batch_steps"] = self.steps
        return values


class Health:
    """The observer that checks a training run; call ``finish`` when the loop has ended.

    ``folder`` takes the figure. ``clock`` gives the CPU seconds that bound the check of one batch.
    """

    def __init__(
        self,
        learner: Watched,
        params: TrainingParams,
        *,
        folder: Path,
        recorder: Recorder,
        ranks: Ranks,
        clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._learner = learner
        self._params = params
        self._folder = folder
        self._recorder = recorder
        self._ranks = ranks
        self._clock = clock
        self._sample: Any = None  # of the held-back rows
        self._norms: list[float] = []  # of the running epoch's gradients
        self._idle: dict[str, float] = {}  # per layer, after the last epoch
        self._history: list[dict[str, dict[str, float]]] = []

    def before(self, learner: Learner) -> None:
        """Check the network that is about to take its first step.

        Raises:
            DataError: if a check fails and the policy is ``error``.
        """
        del learner  # the one that was given at construction
        if self._params.warm_start is not None:
            return  # it knows much already, and what is frozen may learn nothing by heart
        found = self._ranks.from_first(lambda: first_checks(self._learner, clock=self._clock))
        self._record(found.metrics())
        if not (faults := found.faults()):
            return
        if self._params.health == "error":
            raise DataError(
                f"the network is not fit to be trained: {'; '.join(faults)}. Or set `health: warn`"
            )
        for fault in faults:
            self._recorder.warn(f"Health check: {fault}")

    def gradients(self, norm: float) -> None:
        """Keep the length of one update's gradient."""
        self._norms.append(norm)

    def epoch(self, epoch: Epoch) -> None:
        """Record gradients and idle units of a finished epoch, and keep its place in the curves."""
        metrics = {name: metric.value for name, metric in epoch.metrics.items()}
        self._history.append(
            {
                "train": dict(epoch.train_losses),
                "inner": dict(epoch.inner_losses),
                "metrics": metrics,
            }
        )
        values = {}
        if self._norms:
            values["health/gradient_norm_median"] = float(np.median(self._norms))
            values["health/gradient_norm_max"] = max(self._norms)
        self._norms = []
        if self._ranks.is_first:
            if self._sample is None:
                self._sample = self._learner.held_back_rows(_SAMPLE_ROWS)
            self._idle = idle_units(self._learner, self._sample)
            values |= self._idle
        self._record(values, step=epoch.number)

    def state(self) -> dict[str, Any]:
        """Return the curves and the running epoch's gradient norms."""
        return {
            "history": self._history,
            "norms": torch.tensor(self._norms, dtype=torch.float64),
            "idle": self._idle,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state()`` returned."""
        self._history = list(state["history"])
        self._norms = state["norms"].tolist()
        self._idle = dict(state["idle"])

    def finish(self, outcome: Outcome) -> Verdict | None:
        """Record the verdict, the figure of the curves, and layers whose units are mostly idle.

        Returns the verdict on the first rank; None on the others and where no rows were held back.
        """
        if not self._ranks.is_first:
            return None
        if not self._history[0]["inner"]:  # nothing was held back to judge by
            self._warn_of_idle()
            return None
        rows = self._learner.learnt_rows(_LEARNT_ROWS)
        with _looked_at(self._learner.network):
            losses = self._learner.prediction_losses(rows)
        constants = self._learner.constant_losses()
        curves = Curves(
            train=[_total(one["train"], losses.scales) for one in self._history],
            inner=[_total(one["inner"], losses.scales) for one in self._history],
            kept_epoch=outcome.best_epoch,
            max_epochs=self._params.max_epochs,
            constant=_total(constants, losses.scales),
            learnt=float(losses.total()),
        )
        verdict = judge(curves, dict(self._params))
        self._record(
            {
                "health/learnt_loss": curves.learnt,
                "health/constant_loss": curves.constant,
                "health/gap": curves.gap,
                "health/excess": curves.excess,
                "health/widening": curves.widening,
            }
        )
        self._recorder.params({"verdict": verdict.name})
        self._recorder.note(f"Verdict on the training curves: {verdict.text()}.")
        self._warn_of_idle()
        self._draw(outcome, verdict)
        return verdict

    def curves(self, outcome: Outcome) -> list[dict[str, Any]]:
        """Return the curves as JSON values; none where no rows were held back."""
        return curves_json(self._parts(), step="epoch", kept=outcome.best_epoch)

    def _draw(self, outcome: Outcome, verdict: Verdict) -> None:
        figure = learning_curves(self._parts(), kept_epoch=outcome.best_epoch, verdict=verdict.name)
        path = self._folder / f"{figure.name}.svg"
        write_file(path, figure.file_text())
        self._recorder.file(path, folder="figures")

    def _parts(self) -> list[LearningCurves]:
        parts = [
            LearningCurves(
                f"loss of {name}", self._series("inner", name), self._series("train", name)
            )
            for name in self._history[0]["inner"]
        ]
        return parts + [
            LearningCurves(name, self._series("metrics", name))
            for name in self._history[0]["metrics"]
        ]

    def _series(self, part: str, name: str) -> list[float]:
        return [one[part].get(name, math.nan) for one in self._history]

    def _warn_of_idle(self) -> None:
        for name, share in self._idle.items():
            if share > _MANY_IDLE:
                kind, layer = name.removeprefix("health/").split("_units_")
                self._recorder.warn(
                    f"Health check: {share:.0%} of the units of layer {layer} are {kind} after the "
                    f"last epoch and pass no gradient; try a lower `learning_rate`, or another "
                    f"`activation`"
                )

    def _record(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        if self._ranks.is_first:
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            self._recorder.metrics(finite, step=step)


def first_checks(
    learner: Watched, *, clock: Callable[[], float] = time.process_time
) -> FirstChecks:
    """Look at the first loss, and whether a copy of the network learns one batch by heart."""
    rows = learner.learnt_rows(_SAMPLE_ROWS)
    with _looked_at(learner.network):
        first = _means(learner.losses(rows))
        with _silenced(learner.network):
            expected = _means(learner.losses(rows))
    share_left, steps = None, 0
    if sum(p.numel() for p in learner.network.parameters()) <= _ONE_BATCH_PARAMETERS:
        share_left, steps = _learn_by_heart(learner, learner.learnt_rows(_ONE_BATCH_ROWS), clock)
    return FirstChecks(first, expected, share_left, steps)


def idle_units(learner: Watched, rows: Any) -> dict[str, float]:
    """Return the share of units per layer through which no gradient of ``rows`` passes.

    ``health/dead_units_LAYER`` of ReLU layers, ``health/saturated_units_LAYER`` of tanh and
    sigmoid. Only activations that are modules are seen.
    """
    if not len(rows.row_id):
        return {}
    found: dict[str, list[torch.Tensor]] = {}
    network = learner.network
    hooks: list[RemovableHandle] = []
    for name, layer in network.named_modules():
        if test := _IDLE.get(type(layer)):
            kind, is_idle = test
            seen = found.setdefault(f"health/{kind}_units_{name}", [])
            hooks.append(layer.register_forward_hook(_Look(seen, is_idle)))
    try:
        with _looked_at(network):
            learner.prediction_losses(rows)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: float(torch.cat(parts).double().mean()) for name, parts in found.items() if parts}


@dataclass
class _Look:
    """A forward hook that keeps which units are idle on all rows."""

    seen: list[torch.Tensor]
    is_idle: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, layer: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        del layer, inputs
        self.seen.append(self.is_idle(output.detach()).flatten(1).all(dim=0))


_IDLE: Mapping[type[nn.Module], tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    nn.ReLU: ("dead", lambda out: out == 0),
    nn.Tanh: ("saturated", lambda out: out.abs() > _SATURATED),
    nn.Sigmoid: ("saturated", lambda out: (2 * out - 1).abs() > _SATURATED),
}


def _learn_by_heart(
    learner: Watched, rows: Any, clock: Callable[[], float]
) -> tuple[float | None, int]:
    """Return the least share of the first loss that was left, and the steps taken.

    The share is None if there was no time or no labelled row to tell.
    """
    network = copy.deepcopy(learner.network)
    own_norms(network)
    network.eval()  # no dropout, no noise …
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train()  # … but the norms of training
    began = clock()
    with _standing_in(learner, network), torch.enable_grad():
        optimiser = torch.optim.Adam(
            [p for p in network.parameters() if p.requires_grad], lr=_ONE_BATCH_RATE
        )
        first = least = math.nan
        for step in range(_ONE_BATCH_STEPS + 1):
            total = learner.losses(rows).total()
            loss = float(total.detach())
            first, least = (loss, loss) if step == 0 else (first, min(least, loss))
            if not first > 0:
                return None, step
            if least < _ONE_BATCH_SHARE * first or step == _ONE_BATCH_STEPS:
                return least / first, step
            if clock() - began > _ONE_BATCH_SECONDS:
                return None, step
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(total)
            optimiser.step()
    raise AssertionError("the last step returns")


@contextmanager
def _standing_in(learner: Watched, network: nn.Module) -> Iterator[None]:
    """Let ``learner`` compute with ``network`` for a while."""
    own = learner.network
    learner.network = network
    try:
        yield
    finally:
        learner.network = own


@contextmanager
def _looked_at(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients, not compiled; afterwards all is as it was."""
    modes = [(layer, layer.training) for layer in network.modules()]
    compiled = network._compiled_call_impl  # it would not see hooks
    network._compiled_call_impl = None
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network._compiled_call_impl = compiled
        for layer, mode in modes:
            layer.training = mode


@contextmanager
def _silenced(network: nn.Module) -> Iterator[None]:
    """Let every output of ``network`` be 0."""
    hook = network.register_forward_hook(lambda _layer, _inputs, output: _zeros(output))
    try:
        yield
    finally:
        hook.remove()


def _zeros(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return torch.zeros_like(output)
    return [_zeros(part) for part in output]


def _means(losses: Losses) -> dict[str, float]:
    """Return the mean per name that has a labelled row."""
    return {
        name: float(total.detach()) / float(losses.weights[name])
        for name, total in losses.sums.items()
        if float(losses.weights[name]) > 0
    }


def _total(means: Mapping[str, float], scales: Mapping[str, float]) -> float:
    return sum(
        scale * means[name]
        for name, scale in scales.items()
        if math.isfinite(means.get(name, math.nan))
    )
