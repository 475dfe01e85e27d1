"""The training loop on toy problems: learns, weighs rows, stops, resumes bit-equal."""

import math

import pytest
import torch
from torch import nn

from headrace.errors import ConfigError, DataError
from headrace.training.device import torch_threads
from headrace.training.learner import Epoch, Losses, LossMeans, Metric, Validation
from tests.halting import Halt, HaltingRecorder
from tests.training_case import Rows, Toy, go, network_of, plain, values_of


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices are slower with more threads, much so beside other work."""
    with torch_threads(1):
        yield


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0]])
def test_and_or_and_xor_are_learnt(tmp_path, labels):
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    learner = Toy(plain(), x, torch.tensor(labels, dtype=torch.float32), batch_rows=4)
    outcome, _ = go(learner, tmp_path, max_epochs=100, patience=100, learning_rate=0.05)

    assert outcome.best_value < 1e-3


def test_a_line_is_learnt(tmp_path):
    x = torch.linspace(-1, 1, 40)[:, None]
    learner = Toy(plain(1), x, 2 * x[:, 0])
    outcome, _ = go(learner, tmp_path, max_epochs=120, patience=120)

    assert outcome.best_value < 1e-3


def test_losses_are_means_over_weighted_rows_however_short_the_last_batch(tmp_path):
    x = torch.randn(13, 2, generator=torch.Generator().manual_seed(0))
    learner = Toy(plain(), x, x.sum(dim=1), batch_rows=13)
    before = learner.rows
    with torch.no_grad():
        error = (learner.network(x)[:, 0] - before.y) ** 2
    expected = float((before.weight * error).sum() / before.weight.sum())
    _, recorder = go(learner, tmp_path, max_epochs=1, learning_rate=1e-9)

    assert values_of(recorder, "inner_loss_y") == pytest.approx([expected], rel=1e-5)
    assert values_of(recorder, "train_loss_y") == pytest.approx([expected], rel=1e-5)


def test_the_best_weights_stay_not_the_last(tmp_path):
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    y = torch.randn(40, generator=torch.Generator().manual_seed(1))  # noise: soon overfitted
    held_back = Rows(
        torch.arange(30),
        torch.randn(30, 2, generator=torch.Generator().manual_seed(2)),
        torch.randn(30, generator=torch.Generator().manual_seed(3)),
        torch.ones(30),
    )
    learner = Toy(plain(width=64), x, y, held_back=held_back)
    outcome, recorder = go(learner, tmp_path, max_epochs=40, patience=5)
    curve = values_of(recorder, "inner_loss")

    assert outcome.num_epochs == len(curve) == outcome.best_epoch + 5 < 40
    assert outcome.best_value == min(curve) == curve[outcome.best_epoch - 1]
    with torch.no_grad():
        assert learner.validate().losses.total() == outcome.best_value


def test_a_given_length_leaves_the_last_weights_and_needs_no_held_back_rows(tmp_path):
    """The same steps as early stopping takes, and the schedule of ``max_epochs``."""
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    settings = {"max_epochs": 9, "patience": 9, "schedule": "cosine", "weight_average": 0.9}
    stopped = Toy(plain(), x, x.prod(dim=1))
    _, heard = go(stopped, tmp_path / "stopped", **settings)
    learner = Toy(plain(), x, x.prod(dim=1))
    learner.validate = None
    outcome, recorder = go(learner, tmp_path / "of length 9", length=9, **settings)
    short, heard_short = go(
        Toy(plain(), x, x.prod(dim=1)), tmp_path / "of length 4", length=4, **settings
    )

    assert (outcome.best_epoch, outcome.num_epochs, outcome.best_value) == (9, 9, None)
    assert (short.best_epoch, short.num_epochs) == (4, 4)
    for name in ("train_loss", "learning_rate"):
        assert values_of(recorder, name) == values_of(heard, name)
        assert values_of(heard_short, name) == values_of(heard, name)[:4]
    assert not values_of(recorder, "inner_loss")
    assert min(values_of(heard, "inner_loss")) == values_of(heard, "inner_loss")[-1]
    for name, value in stopped.network.state_dict().items():
        assert torch.equal(learner.network.state_dict()[name], value), name


WAYS = {
    "of a given length": {"length": 3},
    "plain": {},
    "sgd, one cycle": {"optimiser": "sgd", "schedule": "one_cycle"},
    "rmsprop, cosine": {"optimiser": "rmsprop", "momentum": 0.5, "schedule": "cosine"},
    "adam, parts": {"optimiser": "adam", "micro_rows": 3},
    "averaged": {"weight_average": 0.9},
    "plateau": {
        "schedule": "plateau",
        "plateau": {"patience": 1, "cooldown": 1, "factor": 0.5},
        "learning_rate": 0.3,
        "max_epochs": 7,
        "patience": 7,
    },
    "bf16": {"precision": "bf16"},
    "fp16, parts": {"precision": "fp16", "micro_rows": 5},
}


def resumed_is_undisturbed(tmp_path, halt_after, **settings):
    """Train once in peace and once with a halt; compare weights, outcome and losses."""
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    settings = {"max_epochs": 4, "patience": 4, "checkpoint_minutes": 0.0, **settings}
    whole = Toy(network_of(dropout=0.3), x, x.prod(dim=1))
    undisturbed, heard = go(whole, tmp_path / "whole", **settings)

    halted = Toy(network_of(dropout=0.3), x, x.prod(dim=1))
    with pytest.raises(Halt):
        go(halted, tmp_path / "halted", HaltingRecorder(halt_after), **settings)
    resumed = Toy(network_of(seed=9, dropout=0.3), x, x.prod(dim=1))  # weights come from the file
    outcome, heard_after = go(resumed, tmp_path / "halted", **settings)

    assert outcome == undisturbed
    for name, value in whole.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name
    for name in ("train_loss", "learning_rate"):
        after = values_of(heard_after, name)
        assert after == values_of(heard, name)[-len(after) :] if after else True
    return heard


@pytest.mark.parametrize("halt_after", [1, 6, 7, 8, 9, 23])
def test_a_halted_run_resumes_to_the_very_same_weights(tmp_path, halt_after):
    """Dropout, batch norm and the optimiser included; also when halted at the end of an epoch."""
    resumed_is_undisturbed(tmp_path, halt_after)


@pytest.mark.parametrize("halt_after", [6, 20])
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("plain", "plateau")])
def test_a_halted_run_resumes_whatever_the_settings(tmp_path, way, halt_after):
    resumed_is_undisturbed(tmp_path, halt_after, **WAYS[way])


@pytest.mark.parametrize("halt_after", [31, 32, 33, 44])
def test_a_resumed_plateau_goes_on_from_where_it_fell(tmp_path, halt_after):
    heard = resumed_is_undisturbed(tmp_path, halt_after, **WAYS["plateau"])

    rates = values_of(heard, "learning_rate")
    assert rates[0] > rates[3] > rates[-1]  # it fell before the halt and after it


@pytest.mark.parametrize("way", WAYS)
def test_the_settings_that_a_run_has_are_those_that_act(tmp_path, way):
    """Each way ends in other weights than the plain one."""
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    ends = []
    for settings in ({}, WAYS[way]):
        learner = Toy(network_of(), x, x.prod(dim=1))
        go(learner, tmp_path / str(len(ends)), **{"max_epochs": 4, **settings})
        ends.append(learner.network[0].weight)

    assert torch.equal(*ends) == (way == "plain")


def test_a_finished_run_resumes_to_its_end_without_a_step(tmp_path):
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    first = Toy(plain(), x, x.sum(dim=1))
    outcome, _ = go(first, tmp_path, max_epochs=3)
    again = Toy(network_of_none(), x, x.sum(dim=1))
    second, recorder = go(again, tmp_path, max_epochs=3)

    assert second == outcome
    assert recorder.recorded_metrics == []
    assert torch.equal(again.network[0].weight, first.network[0].weight)


def network_of_none():
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))


def test_a_loss_that_is_not_finite_names_the_rows(tmp_path):
    x = torch.ones(8, 2)
    y = torch.ones(8)
    y[5] = math.inf
    learner = Toy(plain(), x, y, batch_rows=8)
    first = next(iter(learner.batches(0, used=0))).row_id[:5].tolist()
    with pytest.raises(DataError, match="training loss is inf in epoch 1, batch 1") as caught:
        go(learner, tmp_path)

    assert str([str(i) for i in first]) in str(caught.value)


def test_a_held_back_loss_that_is_never_finite_is_refused(tmp_path):
    x = torch.ones(8, 2)
    bad = Rows(torch.arange(2), torch.ones(2, 2), torch.full((2,), math.inf), torch.ones(2))
    with pytest.raises(DataError, match="diverged in its first epoch"):
        go(Toy(plain(), x, torch.ones(8), held_back=bad), tmp_path)


def test_the_rate_that_was_used_is_recorded(tmp_path):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    _, recorder = go(Toy(plain(), x, x[:, 0]), tmp_path, max_epochs=3, warmup_steps=4)

    assert values_of(recorder, "learning_rate") == pytest.approx([0.01, 0.02, 0.02])


def test_a_name_without_labelled_rows_adds_nothing_and_is_no_number():
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    losses = Losses({"a": 3 * one, "b": zero}, {"a": 2 * one, "b": zero}, {"a": 2.0, "b": 1.0})
    means = LossMeans(losses.scales)
    means.add(losses)

    assert float(losses.total()) == means.total() == 3.0
    assert means.means()["a"] == 1.5
    assert math.isnan(means.means()["b"])


class Scored(Toy):
    """A learner with two metrics that take given values, epoch by epoch."""

    scores = (0.5, 0.7, 0.7, 0.6, 0.9)

    def validate(self):
        found = super().validate()
        score = self.scores[getattr(self, "epoch", 0)]
        self.epoch = getattr(self, "epoch", 0) + 1
        metrics = {"auc_y": Metric(score, higher_is_better=True), "rmse_y": Metric(score, False)}
        return Validation(found.losses, metrics)


@pytest.mark.parametrize(
    ("stop_on", "best_epoch", "num_epochs"), [("auc_y", 2, 4), ("rmse_y", 1, 3)]
)
def test_a_metric_decides_in_its_own_direction(tmp_path, stop_on, best_epoch, num_epochs):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    learner = Scored(plain(), x, x[:, 0])
    outcome, recorder = go(learner, tmp_path, stop_on=stop_on, patience=2)

    assert (outcome.best_epoch, outcome.num_epochs) == (best_epoch, num_epochs)
    assert outcome.best_value == Scored.scores[best_epoch - 1]
    assert values_of(recorder, "inner_auc_y") == list(Scored.scores[:num_epochs])
    assert f"auc_y {Scored.scores[num_epochs - 1]}" in recorder.last_progress[-1]


def test_what_is_not_validated_cannot_end_training(tmp_path):
    x = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"`stop_on` is 'auc_x', .*; nearest name: auc_y"):
        go(Scored(plain(), x, x[:, 0]), tmp_path, stop_on="auc_x")


class Watcher:
    """An observer that keeps what it hears, and draws random numbers while it does."""

    def __init__(self):
        self.heard = []

    def before(self, learner):
        torch.rand(3)
        self.heard.append(["before", len(learner.network.state_dict())])

    def gradients(self, norm):
        self.heard.append(["norm", norm])

    def epoch(self, epoch):
        assert isinstance(epoch, Epoch)
        self.heard.append(["epoch", epoch.number, *epoch.train_losses.values(), epoch.is_best])

    def state(self):
        return {"heard": self.heard}

    def restore(self, state):
        self.heard = state["heard"]


def test_an_observer_hears_every_update_and_epoch_and_changes_no_bit(tmp_path):
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    alone = Toy(network_of(dropout=0.3), x, x.prod(dim=1))
    _, recorder = go(alone, tmp_path / "alone", max_epochs=2)
    watched, watcher = Toy(network_of(dropout=0.3), x, x.prod(dim=1)), Watcher()
    go(watched, tmp_path / "watched", observer=watcher, max_epochs=2)

    assert [kind for kind, *_ in watcher.heard] == ["before", *(["norm"] * 4 + ["epoch"]) * 2]
    assert all(norm > 0 for kind, norm, *_ in watcher.heard if kind == "norm")
    told = [mean for kind, *rest in watcher.heard if kind == "epoch" for mean in rest[1:2]]
    assert told == values_of(recorder, "train_loss_y")
    for name, value in alone.network.state_dict().items():
        assert torch.equal(watched.network.state_dict()[name], value), name


@pytest.mark.parametrize("halt_after", [2, 5, 7])
def test_a_resumed_observer_has_heard_what_an_undisturbed_one_has(tmp_path, halt_after):
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    settings = {"max_epochs": 3, "checkpoint_minutes": 0.0}
    undisturbed, first, second = Watcher(), Watcher(), Watcher()
    go(Toy(plain(), x, x[:, 0]), tmp_path / "whole", observer=undisturbed, **settings)
    with pytest.raises(Halt):
        go(
            Toy(plain(), x, x[:, 0]),
            tmp_path / "halted",
            HaltingRecorder(halt_after),
            observer=first,
            **settings,
        )
    go(Toy(plain(), x, x[:, 0]), tmp_path / "halted", observer=second, **settings)

    assert second.heard == undisturbed.heard
