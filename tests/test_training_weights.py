"""Weights in a file: each tensor once, and all of them back under every name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headrace.training.weights import load_weights, stored_weights


class Twice(nn.Module):
    """A layer that is used in two places, as the feature transformers of TabNet share theirs."""

    def __init__(self):
        super().__init__()
        self.own = nn.Linear(3, 3)
        self.first = nn.Linear(3, 3, bias=False)
        self.again = nn.Sequential(self.first, nn.BatchNorm1d(3))
        self.register_buffer("none", torch.zeros(0))
        self.register_buffer("nothing", torch.zeros(0))


def test_each_tensor_is_stored_once_and_found_under_all_names(tmp_path):
    network, other = Twice(), Twice()
    network.again[1].running_mean += 2
    stored = stored_weights(network)
    save_file(stored, tmp_path / "w.safetensors")
    load_weights(other, load_file(tmp_path / "w.safetensors"))

    names = set(network.state_dict())
    assert names - set(stored) == {"again.0.weight"}
    for name, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert other.first.weight is other.again[0].weight


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w.pop("own.bias"), "Missing key.*own.bias"),
        (lambda w: w.pop("first.weight"), "Missing key.*first.weight.*again.0.weight"),
        (lambda w: w.update(more=torch.zeros(1)), "Unexpected key.*more"),
        (lambda w: w.update({"first.weight": torch.zeros(2, 3)}), "size mismatch"),
    ],
)
def test_a_tensor_that_is_missing_left_over_or_of_another_shape_is_refused(change, told):
    weights = stored_weights(Twice())
    change(weights)
    with pytest.raises(RuntimeError, match=f"(?s){told}"):
        load_weights(Twice(), weights)
