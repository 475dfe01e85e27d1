"""Checks around training: what they find, what they say, and that they touch nothing."""

import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from headrace.errors import DataError
from headrace.record import MemoryRecorder
from headrace.training import distributed
from headrace.training.device import torch_threads
from headrace.training.distributed import ALONE, GlobalBatchNorm1d, Ranks
from headrace.training.health import Health, first_checks, idle_units
from headrace.training.loop import Outcome
from headrace.training.params import WarmStart
from headrace.training.verdict import Curves, judge
from tests.halting import Halt, HaltingRecorder
from tests.learner_case import InMemory, go, mlp, rows_of, settings


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices are slower with more threads, much so beside other work."""
    with torch_threads(1):
        yield


def values_of(recorder, name):
    return [value for key, value, _ in recorder.recorded_metrics if key == name]


def regression(num_rows=60, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 3, generator=generator)
    y = x[:, 0] * x[:, 1] + x[:, 2]
    return rows_of(x, (y - y.mean()) / y.std(correction=0))


def classes(num_rows=60, num_classes=4):
    x = torch.randn(num_rows, 3, generator=torch.Generator().manual_seed(0))
    return rows_of(x, torch.arange(num_rows) % num_classes)


def watched(learner, params, folder, recorder, **options):
    folder.mkdir(exist_ok=True)
    return Health(learner, params, folder=folder, recorder=recorder, ranks=ALONE, **options)


def train(learner, params, folder, *, recorder=None):
    """Train with health checks; return what was recorded and the verdict."""
    recorder = recorder or MemoryRecorder()
    health = watched(learner, params, folder, recorder)
    outcome, _ = go(learner, params, folder, recorder=recorder, observer=health)
    return recorder, health.finish(outcome)


def test_the_first_loss_of_a_small_head_is_ln_c_or_the_variance():
    found = first_checks(InMemory(mlp(3, 4), classes()))
    assert found.expected_losses["y"] == pytest.approx(math.log(4))
    assert found.first_losses["y"] == pytest.approx(math.log(4), rel=0.02)

    found = first_checks(InMemory(mlp(3, 1), regression()))
    assert found.expected_losses["y"] == pytest.approx(1)  # standardised over just these rows
    assert found.first_losses["y"] == pytest.approx(1, rel=0.05)
    assert found.faults() == []


def test_a_large_head_is_found_and_named_by_target():
    """Trap 15: weights from U(0, 10) start far from ln C."""
    network = mlp(3, 4)
    nn.init.uniform_(network[-1].weight, 0, 10)
    found = first_checks(InMemory(network, classes()))
    fault = found.faults()[0]

    assert "the first loss of 'y' is" in fault
    assert "1.386" in fault
    assert "small weights" in fault


def test_one_batch_is_learnt_by_heart_but_not_by_a_network_cut_from_its_inputs():
    assert first_checks(InMemory(mlp(3, 1, width=64), regression())).share_left < 0.1

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 1)
            nn.init.zeros_(self.head.bias)

        def forward(self, x):
            return self.head(0 * x)

    found = first_checks(InMemory(Cut(), regression()))
    (fault,) = found.faults()
    assert found.steps == 200
    assert found.share_left > 0.5
    assert "32 rows were not learnt by heart" in fault


class Noted(nn.Dropout):
    """Dropout that notes whether it drops while gradients are taken."""

    modes: ClassVar[list[bool]] = []

    def forward(self, x):
        if torch.is_grad_enabled():
            self.modes.append(self.training)
        return super().forward(x)


def test_one_batch_is_learnt_without_dropout_and_with_norms(monkeypatch):
    """The norms are those of training, of this rank alone."""
    monkeypatch.setattr(distributed, "_current", None)  # who asks other ranks fails
    monkeypatch.setattr(Noted, "modes", [])
    norms = []
    forward = nn.BatchNorm1d.forward

    def noting(self, x):
        if torch.is_grad_enabled():
            norms.append(self.training)
        return forward(self, x)

    monkeypatch.setattr(nn.BatchNorm1d, "forward", noting)
    network = mlp(3, 1, width=64, norm=True)
    network[1].__class__ = GlobalBatchNorm1d
    network[3] = Noted(0.9)

    assert first_checks(InMemory(network, regression())).faults() == []
    assert set(Noted.modes) == {False}
    assert set(norms) == {True}
    assert type(network[1]) is GlobalBatchNorm1d
    assert network[1].num_batches_tracked == 0


def test_a_batch_that_takes_too_long_is_left_undecided():
    ticks = iter(range(10_000))
    found = first_checks(InMemory(mlp(3, 1), regression()), clock=lambda: 0.3 * next(ticks))

    assert found.share_left is None
    assert found.steps < 5
    assert found.faults() == []


def test_rows_without_a_label_are_no_fault():
    class Unlabelled(InMemory):
        def weights(self, _batch):
            return {"y": torch.zeros(())}

        def losses(self, batch):
            found = super().losses(batch)
            return type(found)({"y": 0 * found.sums["y"]}, self.weights(batch), found.scales)

        prediction_losses = losses

    found = first_checks(Unlabelled(mlp(3, 1), regression()))
    assert (found.first_losses, found.share_left, found.faults()) == ({}, None, [])


def test_the_policy_warns_or_refuses_before_the_first_step(tmp_path):
    def bad():
        network = mlp(3, 4)
        nn.init.uniform_(network[-1].weight, 0, 10)
        return InMemory(network, classes())

    recorder, _ = train(bad(), settings(max_epochs=1), tmp_path / "warn")
    assert len([text for text in recorder.warnings if "first loss of 'y'" in text]) == 1

    learner = bad()
    before = [p.clone() for p in learner.network.parameters()]
    with pytest.raises(DataError, match=r"not fit to be trained: the first loss .* `health: warn`"):
        train(learner, settings(max_epochs=1, health="error"), tmp_path / "error")
    assert all(map(torch.equal, before, learner.network.parameters()))


@pytest.mark.parametrize("norm", [False, True])
def test_the_checks_change_no_bit_of_the_run(tmp_path, norm):
    """Weights, buffers and curves, dropout drawing from the run's stream."""
    params = settings(max_epochs=3)
    runs = []
    for name in ("without", "with"):
        learner = InMemory(mlp(3, 1, dropout=0.3, norm=norm), regression())
        recorder = MemoryRecorder()
        observer = watched(learner, params, tmp_path / name, recorder) if name == "with" else None
        outcome, _ = go(learner, params, tmp_path / name, recorder=recorder, observer=observer)
        if observer:
            observer.finish(outcome)
        assert all(layer.training is False for layer in learner.network.modules())
        runs.append((learner.network.state_dict(), outcome, values_of(recorder, "train_loss")))
    (plain, outcome, losses), (checked, checked_outcome, checked_losses) = runs

    assert outcome == checked_outcome
    assert losses == checked_losses
    assert all(torch.equal(checked[name], value) for name, value in plain.items())


@pytest.mark.parametrize("halt_after", [2, 5, 6, 9])
def test_what_is_recorded_survives_a_halt(tmp_path, halt_after):
    """Gradient norms of a half epoch and the curves go on from the checkpoint."""
    params = settings(max_epochs=3, checkpoint_minutes=0.0)

    def learner():
        return InMemory(mlp(3, 1, dropout=0.3), regression())

    whole, verdict = train(learner(), params, tmp_path / "whole")
    halted = HaltingRecorder(halt_after)
    with pytest.raises(Halt):
        train(learner(), params, tmp_path / "halted", recorder=halted)
    resumed, resumed_verdict = train(learner(), params, tmp_path / "halted")

    def health_of(*recorders):
        found = {}
        for recorder in recorders:
            for name, value, step in recorder.recorded_metrics:
                if name.startswith("health/"):
                    found[name, step] = value
        return found

    assert resumed_verdict == verdict
    assert health_of(halted, resumed) == health_of(whole)
    figures = [(tmp_path / run / "learning_curves.svg").read_bytes() for run in ("whole", "halted")]
    assert figures[0] == figures[1]


def test_each_epoch_records_gradients_and_idle_units(tmp_path):
    recorder, verdict = train(InMemory(mlp(3, 1), regression()), settings(max_epochs=3), tmp_path)
    steps = {step for name, _, step in recorder.recorded_metrics if name.startswith("health/dead")}
    middle = values_of(recorder, "health/gradient_norm_median")

    assert steps == {1, 2, 3}
    assert len(middle) == 3
    assert all(
        0 < a <= b
        for a, b in zip(middle, values_of(recorder, "health/gradient_norm_max"), strict=True)
    )
    assert recorder.recorded_params["verdict"] == verdict.name
    assert any(verdict.text() in note for note in recorder.notes)
    assert (tmp_path / "learning_curves.svg", "figures") in recorder.files


def test_dead_and_saturated_units_are_counted_by_layer():
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    with torch.no_grad():
        for layer in (network[0], network[2]):
            nn.init.zeros_(layer.weight)
        network[0].bias.copy_(torch.tensor([-1.0, 0, 1, 1]))  # two never fire
        network[2].bias.copy_(torch.tensor([9.0, -9, 9, 0]))  # three at an end of tanh
    rows = rows_of(torch.randn(20, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(20))

    assert idle_units(InMemory(network, rows), rows) == {
        "health/dead_units_1": 0.5,
        "health/saturated_units_3": 0.75,
    }
    assert network.training
    assert not any(layer._forward_hooks for layer in network)


def test_a_unit_that_fires_on_one_row_is_alive():
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    nn.init.ones_(network[0].weight)
    rows = rows_of(torch.tensor([[-1.0], [-2], [3]]), torch.zeros(3))

    assert idle_units(InMemory(network, rows), rows) == {"health/dead_units_1": 0.0}
    assert idle_units(InMemory(network, rows), rows.part(slice(2))) == {"health/dead_units_1": 1.0}
    assert idle_units(InMemory(network, rows), rows.part(slice(0))) == {}


def test_a_compiled_network_is_looked_at_as_it_was_written():
    """Compiled code does not call hooks."""

    def compiled(*_):
        raise AssertionError("the compiled code was called")

    learner = InMemory(mlp(3, 1), regression())
    learner.network._compiled_call_impl = compiled
    assert set(idle_units(learner, learner.learnt)) == {"health/dead_units_1"}
    assert first_checks(learner).faults() == []
    assert learner.network._compiled_call_impl is compiled


def test_a_warm_start_is_no_fault(tmp_path):
    """Its first loss is low for a good reason."""
    params = settings(warm_start=WarmStart(path="weights.safetensors", digest="0" * 64))
    recorder = MemoryRecorder()
    network = mlp(3, 4)
    nn.init.uniform_(network[-1].weight, 0, 10)
    learner = InMemory(network, classes())
    watched(learner, params, tmp_path, recorder).before(learner)

    assert recorder.warnings == []


def test_mostly_dead_layers_are_warned_of_at_the_end(tmp_path):
    network = mlp(3, 1)
    with torch.no_grad():
        network[0].bias.fill_(-100.0)
    recorder, _ = train(InMemory(network, regression()), settings(max_epochs=1), tmp_path)

    assert any("100% of the units of layer 1 are dead" in text for text in recorder.warnings)


class Second(Ranks):
    """The second of two ranks; the first sends it what it found."""

    def __init__(self, found):
        super().__init__(1, 2, 0)
        object.__setattr__(self, "found", found)

    def from_first(self, make):
        del make
        return self.found


def test_a_second_rank_does_not_check_but_refuses_with_the_first(tmp_path):
    network = mlp(3, 4)
    nn.init.uniform_(network[-1].weight, 0, 10)
    learner = InMemory(network, classes())
    recorder = MemoryRecorder()
    health = Health(
        learner, settings(health="error"), folder=tmp_path, recorder=recorder,
        ranks=Second(first_checks(learner)),
    )  # fmt: skip
    with pytest.raises(DataError, match="not fit to be trained"):
        health.before(learner)

    assert health.finish(Outcome(1, 1, 1.0, 1)) is None
    assert recorder.recorded_metrics == []


def curves(train, inner, **values):
    given = {
        "kept_epoch": inner.index(min(inner)) + 1,
        "max_epochs": 100,
        "constant": 1.0,
        "learnt": min(train),
    }
    return Curves(train, inner, **(given | values))


PARAMS = {
    "max_epochs": 100,
    "dropout": 0.1,
    "weight_decay": 0.1,
    "hidden_sizes": [8],
    "learning_rate": 0.1,
}
NOTHING_LEARNT = curves([1.1, 1.0], [1.0, 1.1], learnt=1.1)


@pytest.mark.parametrize(
    ("found", "name", "setting", "direction"),
    [
        (curves([0.9, 0.7], [0.9, 0.7], max_epochs=2), "underfit", "max_epochs", "higher"),
        (curves([1.1, 1.0], [1.0, 1.0], learnt=1.0), "underfit", "learning_rate", "higher"),
        (NOTHING_LEARNT, "underfit", "learning_rate", "higher"),
        (curves([0.6, 0.3], [0.7, 0.9], learnt=0.4), "overfit", "dropout", "higher"),
        (curves([0.1, 1e-5], [0.1, 1e-5]), "fine", "learning_rate", "lower"),
        (curves([0.9, 0.75], [0.8, 0.7], learnt=0.7), "over-regularised", "dropout", "lower"),
        (curves([0.8, 0.7, 0.7], [0.8, 0.7, 0.7]), "underfit", "hidden_sizes", "higher"),
        (curves([0.8, 0.7, 0.6], [0.8, 0.7, 0.75], learnt=0.7), "fine", "learning_rate", "lower"),
        (curves([0.6, 0.3], [0.6, 0.4]), "fine", "learning_rate", "lower"),
    ],
)
def test_a_verdict_names_one_setting(found, name, setting, direction):
    verdict = judge(found, PARAMS)

    assert (verdict.name, verdict.setting, verdict.direction) == (name, setting, direction)
    assert f"a {direction} `{setting}`" in verdict.text()


def test_a_verdict_names_only_settings_that_exist():
    found = curves([0.6, 0.3, 0.1], [0.7, 0.8, 0.9], learnt=0.4)

    assert judge(found, {"weight_decay": 0.0}).setting == "weight_decay"


def test_real_runs_get_the_verdict_they_deserve(tmp_path):
    """Noise is learnt by heart; a line does not fit a product; a wider network does."""
    noise = rows_of(
        torch.randn(40, 8, generator=torch.Generator().manual_seed(0)),
        torch.randn(40, generator=torch.Generator().manual_seed(1)),
    )
    other = rows_of(
        torch.randn(300, 8, generator=torch.Generator().manual_seed(2)),
        torch.randn(300, generator=torch.Generator().manual_seed(3)),
    )
    _, verdict = train(
        InMemory(mlp(8, 1, width=64), noise, other), settings(max_epochs=40), tmp_path / "noise"
    )
    assert verdict.name == "overfit"

    line = nn.Sequential(nn.Linear(3, 1))
    nn.init.normal_(line[0].weight, std=0.01)
    learner = InMemory(line, regression(3000), batch_rows=300)
    _, verdict = train(learner, settings(max_epochs=40, patience=3), tmp_path / "line")
    assert (verdict.name, verdict.setting) == ("underfit", "learning_rate")

    learner = InMemory(mlp(3, 1, width=64), regression(2000), regression(seed=1), batch_rows=50)
    _, verdict = train(learner, settings(max_epochs=20, patience=8), tmp_path / "good")
    assert verdict.name == "fine"
