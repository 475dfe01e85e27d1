"""What a training would look at, for a command that only measures one."""

from pathlib import Path

import numpy as np

from headrace.data.shards import open_shards
from headrace.models.protocol import TrainViews, choose_stop_fold
from headrace.schema import read_contract


def encoded_views(table: Path, encoded: Path, cache: Path) -> TrainViews:
    """Return the views of all folds of the train rows in ``encoded``, the last one for stopping.

    Raises:
        DataError: if there are fewer than two folds.
        IntegrityError: if ``encode`` has not run, or what it wrote is damaged.
    """
    fold = np.unique(open_shards(encoded, "train").read("fold"))
    folds = tuple(fold[fold >= 0].tolist())
    return TrainViews(table, encoded, cache, read_contract(encoded), folds, choose_stop_fold(folds))
