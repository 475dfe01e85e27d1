"""An update in parts is the update of the whole batch; want of memory changes no number."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from headrace.errors import ConfigError, DataError, ResourceError
from headrace.record import MemoryRecorder
from headrace.training.device import RandomStream
from headrace.training.distributed import Ranks
from headrace.training.learner import Losses
from headrace.training.params import TrainingParams
from headrace.training.precision import Precision
from headrace.training.update import Updater, part_sizes
from tests.training_case import CPU, Toy, go, network_of, plain, values_of

X = torch.randn(29, 2, generator=torch.Generator().manual_seed(0))


class TwoTargets(Toy):
    """Two losses of unlike scales; half the labels of the second are missing, unevenly."""

    scales = {"y": 1.0, "z": 40.0}  # noqa: RUF012

    def weights(self, batch):
        is_known = batch.row_id % 29 > 14
        return {"y": batch.weight.sum(), "z": (batch.weight * is_known).sum()}

    def losses(self, batch):
        out = self.network(batch.x)[:, 0]
        errors = {"y": (out - batch.y) ** 2, "z": (out.sin() - batch.y).abs()}
        is_known = {"y": torch.ones_like(batch.y), "z": (batch.row_id % 29 > 14).float()}
        sums = {name: (batch.weight * is_known[name] * errors[name]).sum() for name in errors}
        return Losses(sums, self.weights(batch), self.scales)


def trained(learner, folder, **settings):
    go(learner, folder, max_epochs=3, **settings)
    return torch.cat([p.detach().flatten() for p in learner.network.parameters()])


@given(st.integers(0, 300), st.integers(2, 300))
def test_parts_are_nearly_even_and_as_large_as_asked(num_rows, most):
    sizes = part_sizes(num_rows, most)

    assert sum(sizes) == num_rows
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(most, 3)
    assert min(sizes) >= min(2, num_rows)


@pytest.mark.parametrize("micro_rows", [2, 3, 5, 7])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_parts_add_up_to_the_batch(tmp_path, micro_rows, optimiser):
    """Unlike weights, missing labels, and a last batch (of 5 rows) that parts do not divide."""
    settings = {"optimiser": optimiser, "clip_norm": 1e9}
    whole = trained(TwoTargets(plain().double(), X.double(), X[:, 0].double()), tmp_path / "a",
                    **settings)  # fmt: skip
    parts = trained(
        TwoTargets(plain().double(), X.double(), X[:, 0].double()),
        tmp_path / "b",
        micro_rows=micro_rows,
        **settings,
    )

    assert not torch.equal(whole, parts)  # else nothing was cut
    assert float((whole - parts).abs().max()) < 1e-6


def test_losses_told_of_parts_are_those_of_the_batch(tmp_path):
    found = []
    for micro_rows in (None, 3):
        learner = TwoTargets(plain(), X, X[:, 0])
        _, recorder = go(learner, tmp_path / str(micro_rows), max_epochs=2, micro_rows=micro_rows)
        curves = [values_of(recorder, f"train_loss_{name}") for name in ("y", "z")]
        found.append(curves[0] + curves[1])

    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Hungry(Toy):
    """A learner whose device holds so many rows; notes what it tried, and what was left."""

    most_rows = 4
    from_call = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.tried = []
        self.leaked = 0
        self._held = []

    def losses(self, batch):
        self.leaked += sum(reference() is not None for reference in self._held)
        self._held.clear()
        self.calls += 1
        if self.calls > self.from_call and torch.is_grad_enabled():
            self.tried.append(len(batch.x))
            if len(batch.x) > self.most_rows:
                activations = self.network(batch.x) + torch.rand(1)  # norms and randomness moved
                self._held.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("out of memory")
        return super().losses(batch)


def test_out_of_memory_is_as_if_parts_had_been_small_from_the_start(tmp_path):
    """Dropout and batch norm included; what the failed try held is gone before the next."""
    small = Toy(network_of(dropout=0.3), X, X[:, 0], batch_rows=16)
    go(small, tmp_path / "small", max_epochs=2, micro_rows=4)
    hungry = Hungry(network_of(dropout=0.3), X, X[:, 0], batch_rows=16)
    _, recorder = go(hungry, tmp_path / "hungry", max_epochs=2)

    assert hungry.tried[:6] == [16, 8, 4, 4, 4, 4]
    assert max(hungry.tried[2:]) == 4  # what was learnt of the device stays
    assert hungry.leaked == 0
    for name, value in small.network.state_dict().items():
        assert torch.equal(hungry.network.state_dict()[name], value), name
    assert [text.partition(";")[0] for text in recorder.warnings] == [
        f"the device ran out of memory in epoch 1, batch 1 with {rows} rows at once"
        for rows in (16, 8)
    ]


def test_a_later_want_of_memory_leaves_what_was_learnt_before(tmp_path):
    """In the second update: the first is that of whole batches, and stays."""

    class Late(Hungry):
        most_rows = 10
        from_call = 1

    whole = Toy(plain().double(), X.double(), X[:, 0].double(), batch_rows=16)
    late = Late(plain().double(), X.double(), X[:, 0].double(), batch_rows=16)
    expected = trained(whole, tmp_path / "whole", micro_rows=None)

    assert float((trained(late, tmp_path / "late") - expected).abs().max()) < 1e-6
    assert late.tried[:4] == [13, 5, 4, 4]


def test_memory_that_is_never_enough_ends_training(tmp_path):
    class Starved(Hungry):
        most_rows = 0

    with pytest.raises(ResourceError, match=r"epoch 1, batch 1 with 2 rows at once, .* be less"):
        go(Starved(plain(), X, X[:, 0]), tmp_path)


def updater_of(network, *, ranks, **settings):
    ranks.share_norms(network)
    return Updater(
        Toy(network, X, X[:, 0]),
        TrainingParams(**settings),
        stream=RandomStream(0, device=CPU),
        ranks=ranks,
        warn=MemoryRecorder().warn,
    )


def test_parts_and_a_norm_over_several_ranks_are_refused():
    two = Ranks(0, 2, 0)
    updater_of(plain(), ranks=two, micro_rows=4)
    updater_of(network_of(), ranks=two)
    with pytest.raises(ConfigError, match="`micro_rows` is 4, but with 2 ranks batch norm"):
        updater_of(network_of(), ranks=two, micro_rows=4)


def test_a_gradient_that_is_not_finite_names_the_rows(tmp_path):
    """The square root of 0 has a finite value and no finite slope."""

    class Steep(Toy):
        def losses(self, batch):
            steep = (0.0 * self.network(batch.x)).sum().sqrt()
            return Losses({"y": steep}, {"y": batch.weight.sum()}, {"y": 1.0})

    with pytest.raises(DataError, match=r"gradient's length is nan in epoch 1, batch 1; first row"):
        go(Steep(plain(), X, X[:, 0]), tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_nearly_the_same(tmp_path, precision):
    losses = {}
    for name in ("float32", precision):
        learner = Toy(plain(), X, X[:, 0].sin())
        outcome, recorder = go(learner, tmp_path / name, max_epochs=30, precision=name)
        losses[name] = outcome.best_value
        assert recorder.recorded_params["precision"] == name
        assert learner.network[0].weight.dtype == torch.float32

    assert losses[precision] != losses["float32"]
    assert losses[precision] == pytest.approx(losses["float32"], rel=0.2, abs=1e-3)


def test_an_update_whose_scaled_gradient_overflows_is_left_out():
    """The loss is finite, 65,536 times its gradient is not; the factor is halved for the next."""
    network = nn.Linear(2, 1)
    learner = Toy(network, 100 * X, 1e3 * X[:, 0])
    updater = Updater(
        learner,
        TrainingParams(precision="fp16"),
        stream=RandomStream(0, device=CPU),
        ranks=Ranks(),
        warn=MemoryRecorder().warn,
    )
    before, scale = network.weight.clone(), updater.state()["precision"]["scale"]
    update = updater.update(learner.rows, rate=0.1, place="here")

    assert math.isinf(update.norm) or math.isnan(update.norm)
    assert torch.equal(network.weight, before)
    assert updater.state()["precision"]["scale"] == scale / 2


def test_auto_is_float32_where_no_gpu_computes_in_bf16():
    assert Precision("auto", CPU).name == "float32"


def test_a_compiled_run_has_the_same_names_and_nearly_the_same_weights(tmp_path, monkeypatch):
    real, calls = torch.compile, []

    def compile_eagerly(call):
        calls.append(call)
        return real(call, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    eager, compiled = (Toy(plain(), X, X[:, 0]) for _ in range(2))
    go(eager, tmp_path / "eager", max_epochs=2)
    go(compiled, tmp_path / "compiled", max_epochs=2, compile=True)

    assert len(calls) == 1
    assert compiled.network._compiled_call_impl is None
    for name, value in eager.network.state_dict().items():
        assert torch.allclose(compiled.network.state_dict()[name], value, atol=1e-6), name
