"""The settings of the training loop, apart from it, so that reading params.yaml loads no torch."""

from typing import Annotated, Literal

from pydantic import Field

from headrace.params import Section


class TrainingParams(Section):
    """What every network is trained with; a model's section adds its own shape to it."""

    seed: Annotated[int, Field(ge=0)] = 0
    # Of torch; the weights' bits depend on it. Small layers gain little from a second thread and
    # lose much when another process wants the core.
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    max_epochs: Annotated[int, Field(ge=1)] = 30
    patience: Annotated[int, Field(ge=1)] = 4  # epochs without a gain before training ends
    batch_rows: Annotated[int, Field(ge=2)] = 1024
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-3
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 1 % over max_epochs
    warmup_steps: Annotated[int, Field(ge=0)] = 100  # linear rise of the learning rate
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-3  # decoupled; matrices only
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # longest gradient that is applied as it is
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 2.0  # within an epoch; 0: every batch
