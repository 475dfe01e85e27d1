"""The settings of the training loop, apart from it, so that reading params.yaml loads no torch.

A setting that cannot take effect beside the others is refused, not ignored.
"""

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from headrace.params import Section

Activation: TypeAlias = Literal["relu", "leaky_relu", "gelu", "silu", "tanh"]
Share: TypeAlias = Annotated[float, Field(ge=0, lt=1)]


class Plateau(Section):
    """How the schedule ``plateau`` lowers the learning rate when validation no longer gains."""

    patience: Annotated[int, Field(ge=1)] = 3  # epochs in a row without a gain before it falls
    cooldown: Annotated[int, Field(ge=0)] = 0  # epochs after a fall that are not counted
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.3  # of the rate before


class WarmStart(Section):
    """Weights of an earlier training to begin from; a smaller ``learning_rate`` goes with it.

    DVC does not see the file, so its digest is a parameter: other weights are another setting.
    """

    path: str  # weights.safetensors of the same network, copied to where no stage writes
    digest: str  # SHA-256 of the file, in hexadecimal
    # Parameters that stay as they are, by name; * stands for any characters, as in trunk.*
    freeze: Annotated[tuple[str, ...], Field(strict=False)] = ()


class PredictDraws(Section):
    """Over which draws of noise and mask a prediction is the mean; part of a saved network."""

    seed: int
    draws: int
    input_noise: float
    column_mask: float


class TrainingParams(Section):
    """What every network is trained with; a model's section adds its own shape to it."""

    seed: Annotated[int, Field(ge=0)] = 0
    # Of torch; the weights' bits depend on it. Small layers gain little from a second thread and
    # lose much when another process wants the core.
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    # Results depend on it. auto: the first present of cuda, mps, cpu
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # Of products and activations; weights stay float32. auto: bf16 on a GPU that computes in it,
    # float32 elsewhere. fp16 has less range than bf16, so its losses are scaled
    precision: Literal["auto", "float32", "bf16", "fp16"] = "float32"
    compile: bool = False  # torch.compile: fewer, larger kernels, after a minute of compiling
    max_epochs: Annotated[int, Field(ge=1)] = 60
    patience: Annotated[int, Field(ge=1)] = 6  # epochs without a gain before training ends
    # Which rows come when (see headrace.data.order). auto: exact up to 8 GiB of rows, then window
    order: Literal["auto", "exact", "window", "block"] = "auto"
    batch_rows: Annotated[int, Field(ge=2)] | None = None  # None: by the number of rows
    # Rows that go through the network at once; gradients are summed over a batch. None: all of them
    micro_rows: Annotated[int, Field(ge=2)] | None = None
    optimiser: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    momentum: Share | None = None  # of sgd (None: 0.9) and rmsprop (None: 0)
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-3
    # After the warm-up: constant; cosine falls over max_epochs; one_cycle is cosine after a long
    # warm-up; plateau falls when validation no longer gains
    schedule: Literal["constant", "cosine", "one_cycle", "plateau"] = "constant"
    # Updates of linear rise. None: 100, or 30 % of all under one_cycle
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    rate_floor: Annotated[float, Field(ge=0, le=1)] = 0.01  # least rate, as share of learning_rate
    plateau: Plateau = Plateau()
    # Matrices only: no bias, norm or embedding. Decoupled with adamw, else part of the gradient
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-3
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # longest gradient that is applied as it is
    # While learning, in the encoder's units (see headrace.training.augment); 0: off
    input_noise: Annotated[float, Field(ge=0)] = 0.0  # standard deviation added to numbers
    column_mask: Share = 0.0  # probability that an input of a row is made missing
    mixup: Annotated[float, Field(ge=0)] = 0.0  # rows are mixed by shares from Beta(mixup, mixup)
    # Share of itself that an average of the weights keeps at each update; the average is what is
    # validated and kept (see headrace.training.averaging). 0: no average
    weight_average: Share = 0.0
    # Predictions are the mean over so many draws of noise and mask; 0: of the inputs as they are
    predict_draws: Annotated[int, Field(ge=0, le=1000)] = 0
    warm_start: WarmStart | None = None
    # How batches reach the device; results do not depend on it. auto: resident where the set fits
    # half of a GPU's free memory, else prefetch there, plain elsewhere
    transfer: Literal["auto", "plain", "prefetch", "resident"] = "auto"
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 1.0  # within an epoch; 0: every batch
    # Checks before and during training (see headrace.training.health). error: a network that fails
    # those before its first step is not trained
    health: Literal["warn", "error", "off"] = "warn"

    @property
    def draws_for_predictions(self) -> PredictDraws | None:
        """How predictions are averaged, if they are."""
        if not self.predict_draws:
            return None
        return PredictDraws(
            seed=self.seed,
            draws=self.predict_draws,
            input_noise=self.input_noise,
            column_mask=self.column_mask,
        )

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        faults = [*_idle_settings(self), *_impatience(self)]
        if faults:
            raise ValueError("; ".join(faults))
        return self


def _idle_settings(params: TrainingParams) -> list[str]:
    """Say which settings could not take effect beside the others."""
    idle = []
    if params.momentum is not None and params.optimiser not in ("sgd", "rmsprop"):
        idle.append(f"momentum is for sgd and rmsprop, but optimiser is {params.optimiser}")
    if params.plateau != Plateau() and params.schedule != "plateau":
        idle.append(f"plateau is for schedule: plateau, but schedule is {params.schedule}")
    if (
        params.schedule == "constant"
        and params.warmup_steps == 0
        and params.rate_floor != TrainingParams.model_fields["rate_floor"].default
    ):
        idle.append("rate_floor has no effect on a constant rate without a warm-up")
    if params.micro_rows and params.batch_rows and params.micro_rows >= params.batch_rows:
        idle.append(
            f"micro_rows is {params.micro_rows}, but a batch has only batch_rows = "
            f"{params.batch_rows}"
        )
    if params.predict_draws and not (params.input_noise or params.column_mask):
        idle.append(
            f"predict_draws is {params.predict_draws}, but input_noise and column_mask are 0, so "
            f"that all draws are the same"
        )
    return idle


def _impatience(params: TrainingParams) -> list[str]:
    least = 2 * params.plateau.patience + params.plateau.cooldown
    if params.schedule != "plateau" or params.patience >= least:
        return []
    return [
        f"patience is {params.patience}, which ends training before a second fall of the learning "
        f"rate; with schedule: plateau set it to at least 2 × plateau.patience + plateau.cooldown "
        f"= {least}"
    ]


def batch_rows_for(num_rows: int) -> int:
    """Return the rows of a batch where none are set: 256, doubled per fourfold of 50,000 rows.

    A smaller set is one batch.

    >>> [batch_rows_for(n) for n in (10, 50_000, 199_999, 200_000, 800_000)]
    [10, 256, 256, 512, 1024]
    """
    rows, doublings = num_rows // 200_000, 0
    while rows:
        rows, doublings = rows // 4, doublings + 1
    return max(1, min(256 << doublings, num_rows))
