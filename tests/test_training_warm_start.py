"""Training that begins from earlier weights: all of them or one clear reason."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from headrace.errors import ConfigError
from headrace.storage import digest_bytes
from tests.training_case import Toy, go, network_of, plain

X = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))


def saved(network, path):
    save_file({**network.state_dict(), "statistics/bins": torch.zeros(3)}, path)  # as models do
    return {"path": str(path), "digest": digest_bytes(path.read_bytes())}


def warm(network, folder, settings, **params):
    learner = Toy(network, X, X.prod(dim=1))
    _, recorder = go(learner, folder / "checkpoints", warm_start=settings, max_epochs=1, **params)
    return learner.network.state_dict(), recorder


def test_training_begins_from_the_earlier_weights_and_buffers(tmp_path):
    earlier = network_of(seed=7)
    earlier(X)  # moves the norm's means
    settings = saved(earlier, tmp_path / "w.safetensors")
    found, recorder = warm(network_of(), tmp_path, settings, learning_rate=1e-9, warmup_steps=0)

    for name in ("0.weight", "0.bias", "4.weight"):
        assert torch.allclose(found[name], earlier.state_dict()[name], atol=1e-6), name
    assert found["1.num_batches_tracked"] == earlier[1].num_batches_tracked + 3
    assert any("out of fold" in text for text in recorder.warnings)


def test_what_is_frozen_stays_to_the_last_bit_norms_included(tmp_path):
    earlier = network_of(seed=7)
    earlier(X)
    settings = saved(earlier, tmp_path / "w.safetensors") | {"freeze": ["0.*", "1.*"]}
    before = {name: value.clone() for name, value in earlier.state_dict().items()}
    found, _ = warm(network_of(), tmp_path, settings, weight_decay=0.5)
    same = {name for name, value in before.items() if torch.equal(found[name], value)}

    assert same == {name for name in before if name[0] in "01"}
    assert {"1.running_mean", "1.num_batches_tracked"} <= same


FAULTS = {
    "shape": (lambda s: s, plain(width=8), "0.weight has the shape (16, 2) instead of (8, 2)"),
    "names": (lambda s: s, nn.Sequential(nn.Linear(2, 16)), "2.weight is not in the network"),
    "more": (lambda s: s, network_of(), "1.weight is missing"),
    "path": (lambda s: s | {"path": "none.safetensors"}, plain(), "none.safetensors, which is no"),
    "digest": (lambda s: s | {"digest": "ab"}, plain(), "`warm_start.digest` is 'ab', but"),
    "pattern": (
        lambda s: s | {"freeze": ["0.weigth"]},
        plain(),
        "has '0.weigth', which fits no parameter; nearest name: 0.weight",
    ),
    "all": (lambda s: s | {"freeze": ["*"]}, plain(), "leaves nothing to learn"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_start_that_cannot_be_is_refused_with_its_reason(tmp_path, fault):
    change, network, message = FAULTS[fault]
    settings = saved(plain(), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=re.escape(message)):
        warm(network, tmp_path, change(settings))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"no weights")
    settings = {"path": str(path), "digest": digest_bytes(b"no weights")}
    with pytest.raises(ConfigError, match="is no safetensors file"):
        warm(plain(), tmp_path, settings)
