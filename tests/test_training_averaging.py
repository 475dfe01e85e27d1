"""The average of the weights: a plain twin, what is lent and put back, and what is left alone."""

import numpy as np
import pytest
import torch
from torch import nn

from headrace.training.averaging import WeightAverage


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_the_average_is_that_of_a_plain_loop():
    net = network()
    average = WeightAverage(net, 0.6)
    twin = net[0].weight.detach().double().numpy().copy()
    rng = np.random.default_rng(0)
    for step in range(20):
        drawn = rng.normal(size=(2, 3))
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor(drawn))
        average.update()
        decay = min(0.6, (step + 1) / (step + 10))
        twin = decay * twin + (1 - decay) * drawn

    with average.lent():
        assert net[0].weight.detach().numpy() == pytest.approx(twin, abs=1e-5)
    assert net[0].weight.detach().numpy() == pytest.approx(drawn, abs=1e-6)


def test_running_means_are_averaged_and_counts_are_not():
    net = network()
    average = WeightAverage(net, 0.9)
    for _ in range(3):
        net(torch.randn(8, 3) + 5)
        average.update()
    own = net[1].running_mean.clone()
    with average.lent():
        assert not torch.equal(net[1].running_mean, own)
        assert int(net[1].num_batches_tracked) == 3
    assert torch.equal(net[1].running_mean, own)


def test_without_a_decay_the_network_is_its_own_average():
    net = network()
    average = WeightAverage(net, 0.0)
    before = net[0].weight.detach().clone()
    average.update()
    with average.lent():
        assert torch.equal(net[0].weight, before)
    assert average.state() == {"updates": 0, "average": []}


def test_an_error_inside_puts_the_weights_back():
    net = network()
    average = WeightAverage(net, 0.5)
    with torch.no_grad():
        net[0].weight.zero_()
    with pytest.raises(RuntimeError), average.lent():
        raise RuntimeError
    assert not net[0].weight.any()
