"""Other ways to run a step give the same numbers: recomputed anywhere, the rest on a GPU."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from headrace.training import variants
from headrace.training.device import RandomStream
from headrace.training.learner import Losses
from headrace.training.opwatch import watch
from headrace.training.variants import recomputing, step_variants

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network_of(*, device=CPU):
    with RandomStream(3, device=CPU).lent():
        layers = []
        for _ in range(6):
            layers += [nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(nn.Sequential(*layers), nn.Linear(64, 1)).to(device)


def gradients(network, x_BN, *, device=CPU):
    """Return loss and gradients with the dropout masks of one fixed stream."""
    network.zero_grad(set_to_none=True)
    with RandomStream(5, device=device).lent():
        loss = network(x_BN).pow(2).mean()
        loss.backward()
    return [loss.detach().clone(), *(p.grad.clone() for p in network.parameters())]


class Rows:
    def __init__(self, x_BN):
        self.x = x_BN
        self.row_id = torch.arange(len(x_BN))


class Toy:
    def __init__(self, network):
        self.network = network

    def losses(self, batch):
        loss_B = self.network(batch.x)[:, 0].pow(2)
        weight = torch.ones_like(loss_B).sum()
        return Losses({"y": loss_B.sum()}, {"y": weight}, {"y": 1.0})


def test_recomputed_gradients_are_the_same_bits_at_a_lower_peak():
    network, x_BN = network_of(), torch.ones(512, 64)
    plain, kept = watch(lambda: gradients(network, x_BN))
    with recomputing(network):
        again, computed = watch(lambda: gradients(network, x_BN))
    assert all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))
    assert again.peak_bytes < 0.8 * plain.peak_bytes
    assert again.flops > plain.flops


def test_after_recomputing_the_network_is_as_before():
    network, x_BN = network_of(), torch.ones(8, 64)
    before = watch(lambda: gradients(network, x_BN))[0]
    with recomputing(network):
        pass
    after = watch(lambda: gradients(network, x_BN))[0]
    assert (before.flops, before.num_ops) == (after.flops, after.num_ops)


def test_the_variants_of_a_cpu_are_the_eager_step_and_the_recomputed_one():
    toy = Toy(network_of())
    before = {name: value.clone() for name, value in toy.network.state_dict().items()}
    eager, recomputing_ = step_variants(toy, Rows(torch.rand(512, 64)), seconds=0.05)
    assert (eager.name, recomputing_.name) == ("eager", "recomputing")
    assert eager.is_equal
    assert recomputing_.is_equal
    assert recomputing_.max_difference == 0.0
    assert recomputing_.peak_bytes < 0.8 * eager.peak_bytes
    assert min(eager.rows_per_s, recomputing_.rows_per_s) > 0
    assert (eager.launches, recomputing_.launches) == (None, None)
    assert toy.network.training
    assert "forward" not in vars(toy.network[0])
    after = toy.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_variant_with_other_gradients_is_told(monkeypatch):
    """A way that changes the numbers is no gain, and must not look like one."""
    real = nn.Sequential.forward

    @contextmanager
    def broken(network):
        network[0].forward = lambda x: real(network[0], x) * 1.5
        yield
        del network[0].forward

    monkeypatch.setattr(variants, "recomputing", broken)
    _, other = step_variants(Toy(network_of()), Rows(torch.rand(64, 64)), seconds=0.02)
    assert not other.is_equal
    assert other.max_difference > 0.1


@pytest.mark.gpu
@needs_cuda
def test_compiled_and_graph_steps_give_the_eager_numbers_with_fewer_launches():
    device = torch.device("cuda")
    toy = Toy(network_of(device=device))
    before = {name: value.clone() for name, value in toy.network.state_dict().items()}
    batch = Rows(torch.ones(256, 64, device=device))
    eager, recomputed, compiled, graph = step_variants(toy, batch, seconds=0.2)
    assert (eager.name, compiled.name, graph.name) == ("eager", "compiled", "CUDA graph")
    assert eager.max_difference == recomputed.max_difference == 0.0
    assert recomputed.peak_bytes < eager.peak_bytes
    assert graph.max_difference < 1e-6
    assert compiled.max_difference < 1e-3
    assert graph.launches < compiled.launches < eager.launches
    assert graph.rows_per_s > eager.rows_per_s
    after = toy.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.gpu
@needs_cuda
def test_recomputation_lowers_the_peak_of_the_device():
    device = torch.device("cuda")
    network, x_BN = network_of(device=device), torch.ones(65_536, 64, device=device)

    def peak():
        torch.cuda.reset_peak_memory_stats()
        found = gradients(network, x_BN, device=device)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), found

    plain, kept = peak()
    with recomputing(network):
        again, computed = peak()
    assert all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))
    assert again < 0.8 * plain
