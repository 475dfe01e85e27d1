"""Each activation by its name, against its formula."""

import math
from typing import get_args

import pytest
import torch

from headrace.training.activations import activation
from headrace.training.params import Activation

FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "tanh": math.tanh,
}


@pytest.mark.parametrize("name", get_args(Activation))
def test_each_name_gives_its_formula(name):
    values = [-3.0, -0.5, 0.0, 0.5, 3.0]
    found = activation(name)(torch.tensor(values, dtype=torch.float64)).tolist()

    assert found == pytest.approx([FORMULAS[name](x) for x in values])


def test_two_layers_share_nothing():
    assert activation("relu") is not activation("relu")
