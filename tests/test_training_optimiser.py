"""Which weights decay, which learn, and that nothing of an earlier training is left."""

import pytest
import torch
from torch import nn

from headrace.training.learner import Losses
from headrace.training.optimiser import make_optimiser
from headrace.training.params import TrainingParams
from tests.training_case import Toy, go

OPTIMISERS = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
}


class NumericEmbedding(nn.Module):
    """Embeds numbers, with a matrix of its own."""

    def __init__(self):
        super().__init__()
        self.slopes = nn.Parameter(torch.ones(2, 3))


def network_of_all():
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    network.embedding = nn.Embedding(3, 2)
    network.numeric = NumericEmbedding()
    network.register_parameter("wide_bias", nn.Parameter(torch.ones(4, 2)))  # of each member
    return network


@pytest.mark.parametrize("name", OPTIMISERS)
def test_biases_norms_and_embeddings_are_not_decayed(tmp_path, name):
    """With no gradient at all, decay alone moves the weights of layers, and only those."""
    network = network_of_all()
    before = {name: value.clone() for name, value in network.named_parameters()}

    class Still(Toy):
        def losses(self, batch):
            zero = sum(0.0 * value.sum() for value in network.parameters())
            return Losses({"y": zero}, {"y": batch.weight.sum()}, {"y": 1.0})

    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    network.train()
    learner = Still(network, x, x[:, 0])
    go(learner, tmp_path, max_epochs=1, weight_decay=0.5, optimiser=name)
    after = dict(network.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}

    assert moved == {"0.weight", "2.weight"}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_each_name_is_torchs_optimiser_of_all_that_learns(name):
    network = network_of_all()
    network.embedding.weight.requires_grad_(False)
    found = make_optimiser(network, TrainingParams(optimiser=name, learning_rate=0.25))
    held = [id(p) for group in found.param_groups for p in group["params"]]

    assert type(found) is OPTIMISERS[name]
    assert {group["lr"] for group in found.param_groups} == {0.25}
    assert sorted(held) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    assert not found.state  # fresh


@pytest.mark.parametrize(
    ("name", "given", "momentum"),
    [("sgd", None, 0.9), ("sgd", 0.5, 0.5), ("rmsprop", None, 0.0), ("rmsprop", 0.5, 0.5)],
)
def test_momentum_is_what_was_set_or_the_usual(name, given, momentum):
    params = TrainingParams(optimiser=name, momentum=given)
    found = make_optimiser(nn.Linear(2, 1), params)

    assert {group["momentum"] for group in found.param_groups} == {momentum}
