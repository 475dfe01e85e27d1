"""Rows changed at random while a network learns from them, so that it trusts no single input.

Legend of axes: B rows of the batch, N numeric inputs, C categories.

All three work on what the encoder wrote: numbers in standard deviations, NaN where missing, and
codes, of which 1 is missing. Off by default. The losses logged while learning are those of changed
rows; held-back rows are never changed.

- mixup: a batch is mixed with itself in another order. One share, from Beta(mixup, mixup), goes for
  the whole batch: numbers are averaged by it where both rows have one, each category is the row's
  own with that probability, else its partner's. Each mixed row is learnt twice, with the label of
  either row, weighted by its share: for any loss and any missing labels that is the mixed loss. It
  costs twice the time. Source: Zhang et al. 2018, "mixup".
- input_noise: normal noise is added to the numbers.
- column_mask: each input of each row is made missing with this probability.

The random numbers of an update depend on seed, rank and update alone: nothing to keep in a
checkpoint.

Predictions may be averaged over some draws of noise and mask. A draw shifts and masks all rows
alike, so the prediction of a row does not depend on the rows beside it.
"""

from dataclasses import dataclass

import torch

from headrace.data.stream import Batch
from headrace.training.device import RandomStream
from headrace.training.params import PredictDraws, TrainingParams

_MISSING = 1  # the encoder's code
_LEARN, _PREDICT = 100, 101  # names of random streams; models name theirs from 0


class Augmentation:
    """Changes the batches of one training run on ``device``."""

    def __init__(self, params: TrainingParams, *, device: torch.device) -> None:
        self._params = params
        self._stream = RandomStream(params.seed, _LEARN, device=device)

    @property
    def is_on(self) -> bool:
        """Whether it changes anything."""
        params = self._params
        return max(params.mixup, params.input_noise, params.column_mask) > 0

    def changed(self, batch: Batch, *, rank: int, step: int) -> Batch:
        """Return the rows of ``batch`` as update ``step`` learns from them."""
        params = self._params
        self._stream.restart(rank, step)
        with self._stream.lent():
            if params.mixup:
                share = float(torch.distributions.Beta(params.mixup, params.mixup).sample())
                batch = _mixed(batch, share)
            numeric_BN, codes_BC = batch.numeric, batch.codes
            if params.input_noise:
                numeric_BN = numeric_BN + params.input_noise * torch.randn_like(numeric_BN)
            if params.column_mask:
                is_masked_BN = torch.rand_like(numeric_BN) < params.column_mask
                is_masked_BC = (
                    torch.rand(codes_BC.shape, device=codes_BC.device) < params.column_mask
                )
                numeric_BN = numeric_BN.masked_fill(is_masked_BN, torch.nan)
                codes_BC = codes_BC.masked_fill(is_masked_BC, _MISSING)
        return Batch(batch.row_id, numeric_BN, codes_BC, batch.targets, batch.weight, batch.fold)


@dataclass(frozen=True)
class Draw:
    """One draw for predictions: what is added to the inputs of every row, and which are missing."""

    noise_N: torch.Tensor
    is_masked_N: torch.Tensor
    is_masked_C: torch.Tensor

    def changed(
        self, numeric_BN: torch.Tensor, codes_BC: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs as this draw has them."""
        device = numeric_BN.device
        numeric_BN = (numeric_BN + self.noise_N.to(device)).masked_fill(
            self.is_masked_N.to(device), torch.nan
        )
        return numeric_BN, codes_BC.masked_fill(self.is_masked_C.to(device), _MISSING)


def draws(settings: PredictDraws, *, num_numeric: int, num_categories: int) -> list[Draw]:
    """Return the draws that predictions are averaged over: the same for any rows."""
    stream = RandomStream(settings.seed, _PREDICT, device=torch.device("cpu"))
    with stream.lent():
        return [
            Draw(
                settings.input_noise * torch.randn(num_numeric),
                torch.rand(num_numeric) < settings.column_mask,
                torch.rand(num_categories) < settings.column_mask,
            )
            for _ in range(settings.draws)
        ]


def _mixed(batch: Batch, share: float) -> Batch:
    """Return 2B rows: each mixed row with its own label, then each with its partner's."""
    device = batch.numeric.device
    partner_B = torch.randperm(len(batch), device=device)
    other_BN = batch.numeric[partner_B]
    other_BN = torch.where(torch.isnan(other_BN), batch.numeric, other_BN)
    numeric_BN = share * batch.numeric + (1 - share) * other_BN
    is_own_BC = torch.rand(batch.codes.shape, device=device) < share
    codes_BC = torch.where(is_own_BC, batch.codes, batch.codes[partner_B])
    return Batch(
        row_id=torch.cat([batch.row_id, batch.row_id[partner_B]]),
        numeric=torch.cat([numeric_BN, numeric_BN]),
        codes=torch.cat([codes_BC, codes_BC]),
        targets=torch.cat([batch.targets, batch.targets[partner_B]]),
        weight=torch.cat([share * batch.weight, (1 - share) * batch.weight[partner_B]]),
        fold=torch.cat([batch.fold, batch.fold[partner_B]]),
    )
