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
    # Results depend on it. auto: the first present of cuda, mps, cpu
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    max_epochs: Annotated[int, Field(ge=1)] = 60
    patience: Annotated[int, Field(ge=1)] = 6  # epochs without a gain before training ends
    # Which rows come when (see headrace.data.order). auto: exact up to 8 GiB of rows, then window
    order: Literal["auto", "exact", "window", "block"] = "auto"
    batch_rows: Annotated[int, Field(ge=2)] | None = None  # None: by the number of rows
    learning_rate: Annotated[float, Field(gt=0)] = 1.0e-3
    schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 1 % over max_epochs
    warmup_steps: Annotated[int, Field(ge=0)] = 100  # linear rise of the learning rate
    weight_decay: Annotated[float, Field(ge=0)] = 1.0e-3  # decoupled; matrices only
    clip_norm: Annotated[float, Field(gt=0)] = 1.0  # longest gradient that is applied as it is
    # How batches reach the device; results do not depend on it. auto: resident where the set fits
    # half of a GPU's free memory, else prefetch there, plain elsewhere
    transfer: Literal["auto", "plain", "prefetch", "resident"] = "auto"
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 1.0  # within an epoch; 0: every batch


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
