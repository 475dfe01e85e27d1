"""What a training would look at, for a command that only measures one."""

from pathlib import Path

import numpy as np

from headrace.data.shards import open_shards
from headrace.models.bagging import fit_plans
from headrace.models.protocol import TrainViews
from headrace.schema import read_contract


def encoded_views(table: Path, encoded: Path, cache: Path) -> TrainViews:
    """Return the views of one model of all train rows in ``encoded``.

    Raises:
        DataError: if there are too few folds.
        IntegrityError: if ``encode`` has not run, or what it wrote is damaged.
    """
    fold = np.unique(open_shards(encoded, "train").read("fold"))
    folds = tuple(fold[fold >= 0].tolist())
    contract = read_contract(encoded)
    (plan,) = fit_plans(
        table,
        encoded,
        cache,
        contract,
        folds,
        bag="none",
        stop_rows="inner",
        needs_stop_rows=True,
    )
    return plan.views
