"""Rows changed while learning: what changes, how much, and that it is the same again."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from headrace.data.stream import Batch
from headrace.training.augment import Augmentation, _mixed, draws
from headrace.training.device import RandomStream
from headrace.training.learner import Losses, LossMeans, Validation
from headrace.training.params import PredictDraws, TrainingParams
from tests.halting import Halt, HaltingRecorder
from tests.training_case import CPU, go, values_of

NAN = float("nan")


def batch_of(num_rows, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        row_id=torch.arange(num_rows),
        numeric=torch.randn(num_rows, 3, generator=generator),
        codes=torch.randint(2, 9, (num_rows, 2), generator=generator, dtype=torch.int32),
        targets=torch.randn(num_rows, 1, generator=generator, dtype=torch.float64),
        weight=torch.rand(num_rows, generator=generator) + 0.5,
        fold=torch.zeros(num_rows, dtype=torch.int8),
    )


def changed(batch, *, rank=0, step=0, **settings):
    return Augmentation(TrainingParams(**settings), device=CPU).changed(batch, rank=rank, step=step)


def test_all_is_off_by_default():
    assert not Augmentation(TrainingParams(), device=CPU).is_on
    for name in ("mixup", "input_noise", "column_mask"):
        assert Augmentation(TrainingParams(**{name: 0.1}), device=CPU).is_on


def test_noise_has_the_spread_asked_for_and_leaves_missing_and_codes_alone():
    batch = batch_of(20_000)
    batch.numeric[::2, 1] = NAN
    found = changed(batch, input_noise=0.5)
    moved = (found.numeric - batch.numeric)[:, [0, 2]]

    assert torch.equal(found.numeric.isnan(), batch.numeric.isnan())
    assert float(moved.std()) == pytest.approx(0.5, rel=0.02)
    assert float(moved.mean()) == pytest.approx(0, abs=0.02)
    assert torch.equal(found.codes, batch.codes)


def test_a_mask_makes_its_share_missing_and_leaves_the_rest_alone():
    batch = batch_of(20_000)
    found = changed(batch, column_mask=0.2)
    is_kept = ~found.numeric.isnan()

    assert float(1 - is_kept.float().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(found.numeric[is_kept], batch.numeric[is_kept])
    assert float((found.codes == 1).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert torch.equal(found.codes[found.codes != 1], batch.codes[found.codes != 1])
    assert found.codes.dtype == torch.int32


def test_an_update_has_its_own_changes_again_and_no_other_draws_them():
    batch = batch_of(50)
    settings = {"mixup": 0.4, "input_noise": 0.1, "column_mask": 0.1}
    torch.manual_seed(0)
    first = changed(batch, step=3, **settings).numeric.nan_to_num()
    drawn = torch.rand(1)
    torch.manual_seed(0)

    assert torch.equal(first, changed(batch, step=3, **settings).numeric.nan_to_num())
    assert torch.equal(drawn, torch.rand(1))  # nothing outside is drawn
    for other in ({"step": 4}, {"step": 3, "rank": 1}, {"step": 3, "seed": 1}):
        assert not torch.equal(first, changed(batch, **other, **settings).numeric.nan_to_num())


def test_mixed_rows_are_between_two_rows_and_learn_both_labels():
    batch = batch_of(40)
    batch.numeric[:7, 0] = NAN
    with RandomStream(1, device=CPU).lent():
        found = _mixed(batch, 0.75)
    own, other = found.split([40, 40])
    partner = other.row_id

    assert sorted(partner.tolist()) == list(range(40))
    assert torch.equal(own.row_id, batch.row_id)
    assert torch.equal(own.numeric.nan_to_num(), other.numeric.nan_to_num())
    assert torch.equal(own.targets, batch.targets)
    assert torch.equal(other.targets, batch.targets[partner])
    assert torch.equal(own.weight, 0.75 * batch.weight)
    assert torch.equal(other.weight, 0.25 * batch.weight[partner])
    expected = 0.75 * batch.numeric + 0.25 * batch.numeric[partner]
    both = ~expected.isnan()
    assert torch.allclose(own.numeric[both], expected[both])
    assert own.numeric[:7, 0].isnan().all()  # missing stays missing
    lone = batch.numeric[partner].isnan() & ~batch.numeric.isnan()
    assert torch.allclose(own.numeric[lone], batch.numeric[lone])
    is_own, is_other = own.codes == batch.codes, own.codes == batch.codes[partner]
    assert bool((is_own | is_other).all())
    assert not bool(is_own.all())


def test_the_loss_of_mixed_rows_is_the_mixed_loss():
    """One error for each label, weighted by its share: what mixup is for any loss."""
    batch = batch_of(30)
    with RandomStream(1, device=CPU).lent():
        found = _mixed(batch, 0.75)
    partner = found.row_id[30:]
    z = found.numeric.sum(dim=1)
    loss = float((found.weight * (z - found.targets[:, 0].float()).abs()).sum())
    y, weight, z = batch.targets[:, 0].float(), batch.weight, z[:30]
    own, other = weight * (z - y).abs(), weight[partner] * (z - y[partner]).abs()

    assert loss == pytest.approx(float((0.75 * own + 0.25 * other).sum()), rel=1e-5)


@dataclass
class Encoded:
    """A learner over encoded rows in memory."""

    network: nn.Module
    num_batches: int = 3
    scales = {"y": 1.0}  # noqa: RUF012

    def batches(self, epoch, *, used):
        return [batch_of(16, seed=10 * epoch + place) for place in range(used, 3)]

    def weights(self, batch):
        return {"y": batch.weight.sum()}

    def losses(self, batch):
        z = self.network(batch.numeric.nan_to_num())[:, 0]
        loss = (batch.weight * (z - batch.targets[:, 0].float()) ** 2).sum()
        return Losses({"y": loss}, self.weights(batch), self.scales)

    def validate(self):
        means = LossMeans(self.scales)
        means.add(self.losses(batch_of(16, seed=99)))
        return Validation(means)


def linear(seed=0):
    with RandomStream(seed, device=CPU).lent():
        return nn.Linear(3, 1)


@pytest.mark.parametrize("name", ["mixup", "input_noise", "column_mask"])
def test_a_halted_run_resumes_to_the_very_same_weights(tmp_path, name):
    settings = {name: 0.3, "max_epochs": 3, "checkpoint_minutes": 0.0}
    whole, halted, plain = Encoded(linear()), Encoded(linear()), Encoded(linear())
    go(whole, tmp_path / "whole", **settings)
    with pytest.raises(Halt):
        go(halted, tmp_path / "halted", HaltingRecorder(6), **settings)
    resumed = Encoded(linear(seed=5))
    go(resumed, tmp_path / "halted", **settings)
    _, recorder = go(plain, tmp_path / "plain", max_epochs=3)

    assert torch.equal(resumed.network.weight, whole.network.weight)
    assert not torch.equal(plain.network.weight, whole.network.weight)
    assert len(values_of(recorder, "inner_loss")) == 3


PREDICT_DRAWS = PredictDraws(seed=3, draws=400, input_noise=0.5, column_mask=0.1)


def test_draws_for_predictions_change_all_rows_alike():
    numeric, codes = torch.zeros(2, 3), torch.full((2, 2), 5)
    found = [draw.changed(numeric, codes) for draw in draws(PREDICT_DRAWS, num_numeric=3,
                                                           num_categories=2)]  # fmt: skip
    numbers = torch.stack([x for x, _ in found])
    masked = torch.stack([c for _, c in found]) == 1

    assert torch.equal(numbers[:, 0].nan_to_num(), numbers[:, 1].nan_to_num())
    assert torch.equal(masked[:, 0], masked[:, 1])
    known = numbers[:, 0][~numbers[:, 0].isnan()]
    assert float(known.std()) == pytest.approx(0.5, rel=0.1)
    assert float(numbers.isnan().float().mean()) == pytest.approx(0.1, abs=0.03)
    assert float(masked.float().mean()) == pytest.approx(0.1, abs=0.03)


def test_draws_for_predictions_are_the_same_for_any_caller():
    first, second = (draws(PREDICT_DRAWS, num_numeric=3, num_categories=2) for _ in range(2))

    assert all(torch.equal(a.noise_N, b.noise_N) for a, b in zip(first, second, strict=True))
