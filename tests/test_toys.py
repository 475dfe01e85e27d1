"""What can be known beforehand of a network, its losses and its training, on toys."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from headrace.models.mlp import MlpDesign
from headrace.models.network import (
    Inputs,
    InputSample,
    TargetScale,
    constant_loss,
    mean_losses,
    member_losses,
)
from headrace.models.nn import NnParams, fit
from headrace.record import MemoryRecorder
from headrace.schema import Target
from headrace.training.device import RandomStream, torch_threads
from tests.encode_tables import write_table
from tests.train_case import RESOURCES, encode_only

VALUE = Target(name="value", task="regression")
LATE = Target(name="late", task="binary", labels=("no", "yes"))
CLASS = Target(name="class", task="multiclass", labels=("a", "b", "c"))
TARGETS = (VALUE, LATE, CLASS)
PLAIN = TargetScale(mean=0.0, std=1.0)
RANGED = TargetScale(mean=3.0, std=1.0, low=1.0, high=5.0)
INPUTS = Inputs(
    numeric=("x", "y", "z"), has_missing=(1,), categories=("c", "d"), cardinalities=(5, 10)
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small matrices are slower with more threads, much so beside other work."""
    with torch_threads(1):
        yield


PLAIN_MLP = MlpDesign(
    members=1,
    hidden_sizes=(7,),
    activation="relu",
    dropout=0.0,
    batch_norm=False,
    numbers="plain",
    bins=3,
    number_size=2,
    one_hot_labels=3,
    embedding_size=8,
)
NORMED_MLP = PLAIN_MLP.model_copy(update={"batch_norm": True})
ENSEMBLE = PLAIN_MLP.model_copy(update={"members": 4, "numbers": "piecewise"})


def network_of(design, **changes):
    """A fresh network of ``design``, whose numbers take four values in three bins."""
    design = design.model_copy(update=changes)
    sample = InputSample(
        np.repeat(np.array([[-1.5], [-0.5], [0.5], [1.5]], np.float32), 3, axis=1),
        np.zeros((4, 2), np.int32),
    )
    with RandomStream(0, device=torch.device("cpu")).lent():
        return design.build(INPUTS, TARGETS, design.statistics(sample, INPUTS, seed=0))


def rows_of(num_rows, *, dtype=torch.float32):
    """Numbers, one in five missing in a column, and codes; fit for ``INPUTS``."""
    generator = torch.Generator().manual_seed(1)
    numeric_BN = torch.randn(num_rows, 3, generator=generator, dtype=dtype)
    numeric_BN[::5, 1] = math.nan
    codes_BC = torch.stack(
        [torch.randint(count, (num_rows,), generator=generator) for count in (5, 10)], dim=1
    )
    return numeric_BN, codes_BC


def labels_of(target, num_rows, *, dtype=torch.float32):
    if target.task == "regression":
        generator = torch.Generator().manual_seed(2)
        return torch.randn(num_rows, generator=generator, dtype=dtype)
    return (torch.arange(num_rows) % len(target.labels)).to(dtype)


def train(folder, columns, targets, **params):
    """Fit the network of kind ``nn`` to a table whose inputs are numeric."""
    names = {target.name for target in targets}
    roles = {name: "target" if name in names else "numeric" for name in columns}
    write_table(
        folder / "reduce",
        dict.fromkeys(("train", "valid", "test"), columns),
        roles=roles,
        targets=targets,
    )
    recorder = MemoryRecorder()
    settings = {
        "device": "cpu",
        "hidden_sizes": [16],
        "dropout": 0.0,
        "weight_decay": 0.0,
        "batch_rows": 32,
        "warmup_steps": 0,
        "learning_rate": 0.03,
        "max_epochs": 150,
        "patience": 150,
    }
    fit(
        encode_only(folder),
        NnParams.model_validate(settings | params),
        checkpoints=folder / "checkpoints",
        resources=RESOURCES,
        recorder=recorder,
    )
    return recorder


def least(recorder, name):
    return min(value for key, value, _ in recorder.recorded_metrics if key == name)


def test_and_or_and_xor_are_learnt_by_three_heads_of_one_network(tmp_path):
    a, b = np.tile([0, 0, 1, 1], 40), np.tile([0, 1, 0, 1], 40)
    truth = {"and": a & b, "or": a | b, "xor": a ^ b}
    targets = tuple(Target(name=name, task="binary", labels=("false", "true")) for name in truth)
    columns = {"a": pa.array(a.astype(float)), "b": pa.array(b.astype(float))}
    columns |= {name: pa.array(values.astype(bool)) for name, values in truth.items()}
    recorder = train(tmp_path, columns, targets)

    for name in truth:
        assert least(recorder, f"inner_loss_{name}") < 1e-3, name
    assert recorder.recorded_params["verdict"] == "fine"
    assert recorder.warnings == []


def test_a_line_is_learnt(tmp_path):
    """y = 2x; the loss is in squares of the target's standard deviation."""
    x = np.linspace(-1, 1, 200)
    columns = {"x": pa.array(x), "value": pa.array(2 * x)}
    recorder = train(tmp_path, columns, (VALUE,), learning_rate=0.01)

    assert least(recorder, "inner_loss_value") < 1e-3
    assert least(recorder, "inner_rmse_value") < math.sqrt(1e-3) * 2 * x.std()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [PLAIN, RANGED])
@pytest.mark.parametrize("losses", [member_losses, mean_losses])
def test_gradients_of_the_losses_equal_finite_differences(target, scale, losses):
    generator = torch.Generator().manual_seed(0)
    shape = (6, 3, target.num_outputs)  # three members
    z_BKO = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    y_B = labels_of(target, 6, dtype=torch.float64)

    assert gradcheck(lambda z: losses(z, y_B, target, scale), z_BKO)


@pytest.mark.parametrize("design", [PLAIN_MLP, NORMED_MLP, ENSEMBLE])
def test_gradients_of_the_network_equal_finite_differences(design):
    """With a smooth activation, of the summed losses of all heads by every parameter."""
    network = network_of(design, hidden_sizes=(4, 3), activation="silu").double()
    numeric_BN, codes_BC = rows_of(8, dtype=torch.float64)
    names = [name for name, _ in network.named_parameters()]
    labels = [labels_of(target, 8, dtype=torch.float64) for target in TARGETS]

    def total(*values):
        outputs = functional_call(
            network, dict(zip(names, values, strict=True)), (numeric_BN, codes_BC)
        )
        parts = zip(outputs, labels, TARGETS, strict=True)
        return sum(member_losses(z, y, target, PLAIN).mean() for z, y, target in parts)

    values = [p.detach().clone().requires_grad_() for p in network.parameters()]
    assert gradcheck(total, values)


def test_parameters_are_as_many_as_counted_by_hand():
    """Numbers, an indicator of a missing one, 5 one-hot labels, and vectors of 6 for 10 labels."""
    width = 3 + 1 + 5 + 6
    plain = 10 * 6 + (width * 7 + 7) + 2 * (7 + 1) + (7 * 3 + 3)
    numbers = 3 * (2 + 2) + 3 * 3 * 2  # a line and three bins per number, in vectors of 2
    width = 3 * 2 + 1 + 5 + 6
    shared, own = width * 7, 4 * (width + 7 + 7)  # scalings of inputs and outputs, and biases
    ensemble = 10 * 6 + numbers + shared + own + 4 * (2 * (7 + 1) + (7 * 3 + 3))

    def count(design):
        return sum(p.numel() for p in network_of(design).parameters())

    assert count(PLAIN_MLP) == plain == 212
    assert count(NORMED_MLP) == plain + 2 * 7
    assert count(ENSEMBLE) == ensemble == 504


@pytest.mark.parametrize(
    ("design", "off"), [(PLAIN_MLP, 0.03), (NORMED_MLP, 0.1), (ENSEMBLE, 0.03)]
)
def test_the_first_loss_is_that_of_an_output_of_zero(design, off):
    """Trap 15: ln C of a target of C classes, the variance of a standardised value.

    Within 10 % everywhere; hidden layers that are normed have larger outputs at first.
    """
    network, rows = network_of(design, hidden_sizes=(64, 64)), rows_of(3000)
    value = labels_of(VALUE, 3000)
    expected = {"value": float(value.square().mean()), "late": math.log(2), "class": math.log(3)}
    for target, z_BKO in zip(TARGETS, network(*rows), strict=True):
        loss_BK = member_losses(z_BKO.detach(), labels_of(target, 3000), target, PLAIN)
        assert float(loss_BK.mean()) == pytest.approx(expected[target.name], rel=off)

    for parameter in network.heads[2].parameters():  # what the trap is about
        nn.init.uniform_(parameter, 0, 9)
    z_BKO = network(*rows)[2].detach()
    loss_BK = member_losses(z_BKO, labels_of(CLASS, 3000), CLASS, PLAIN)
    assert float(loss_BK.mean()) > 1.1 * math.log(3)


@pytest.mark.parametrize("losses", [member_losses, mean_losses])
def test_losses_stay_finite_and_gradients_whole_far_out(losses):
    """Trap 18: a sigmoid followed by a loss of probabilities has gradient 0 there."""
    z_BKO = torch.tensor([1e4, -1e4, 1e4, -1e4]).view(4, 1, 1).requires_grad_()
    y_B = torch.tensor([0.0, 1, 1, 0])
    loss_B = losses(z_BKO, y_B, LATE, PLAIN)
    loss_B.sum().backward()
    assert loss_B.flatten().tolist() == [1e4, 1e4, 0, 0]
    assert z_BKO.grad.flatten().tolist() == [1, -1, 0, 0]

    z_BKO = torch.tensor([[1e4, 0, -1e4]]).view(1, 1, 3).requires_grad_()
    loss_B = losses(z_BKO, torch.tensor([2.0]), CLASS, PLAIN)
    loss_B.sum().backward()
    assert loss_B.flatten().tolist() == [2e4]
    assert z_BKO.grad.flatten().tolist() == [1, 0, -1]


@pytest.mark.parametrize("losses", [member_losses, mean_losses])
@pytest.mark.parametrize(
    ("target", "shape", "num_labels"),
    [
        (VALUE, (4, 1), 4),  # (4, 1) − (4) would silently be 4 × 4
        (VALUE, (4, 1, 1), 1),
        (LATE, (4, 1, 2), 4),
        (CLASS, (4, 1, 2), 4),
        (CLASS, (4, 3), 4),
    ],
)
def test_shapes_that_do_not_match_are_refused(losses, target, shape, num_labels):
    """Trap 20."""
    with pytest.raises(ValueError, match=r"outputs of shape .* expected \(rows, members, "):
        losses(torch.zeros(shape), torch.zeros(num_labels), target, PLAIN)


def test_a_batch_of_one_keeps_its_axis():
    outputs = network_of(ENSEMBLE)(*rows_of(1))
    assert [tuple(z.shape) for z in outputs] == [(1, 4, 1), (1, 4, 1), (1, 4, 3)]


def test_the_best_constant_loses_the_variance_or_the_entropy():
    weight = np.array([1.0, 3, 0, 2])
    y = np.array([0, 1, 1, math.nan])
    scale = TargetScale(mean=0.75, std=math.sqrt(0.75 * 0.25))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))

    assert constant_loss(y, weight, VALUE, scale) == pytest.approx(1)
    assert constant_loss(y, weight, LATE, PLAIN) == pytest.approx(entropy)
    assert constant_loss(y, weight, CLASS, PLAIN) == pytest.approx(entropy)
    assert constant_loss(np.zeros(4), weight, LATE, PLAIN) == 0
    assert math.isnan(constant_loss(y * math.nan, weight, LATE, PLAIN))
