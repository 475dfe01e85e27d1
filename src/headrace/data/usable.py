"""What no model can learn from: weights below zero or not finite, and infinite targets.

They are refused, not repaired: a row left out in silence would be missing from every figure.
"""

import numpy as np

from headrace.data.encoder import EncodedBatch, Encoder
from headrace.errors import DataError


def refuse_unusable(batch: EncodedBatch, encoder: Encoder, where: str) -> None:
    """Check weights and targets; ``where`` is the split or the file, for the message.

    Raises:
        DataError: naming each fault, how many rows have it, and the first of them.
    """
    faults = []
    is_bad = ~((batch.weight >= 0) & np.isfinite(batch.weight))
    if is_bad.any():
        faults.append(
            (f"the weight {encoder.contract.weight!r} null, negative or infinite", is_bad)
        )
    for j, target in enumerate(encoder.targets):
        is_bad = np.isinf(batch.targets[:, j])
        if is_bad.any():
            faults.append((f"the target {target.name!r} infinite or beyond float32", is_bad))
    if faults:
        named = "; ".join(
            f"{int(is_bad.sum())} rows of {where} have {what} "
            f"(first row ids: {[str(row) for row in batch.row_id[is_bad][:3]]})"
            for what, is_bad in faults
        )
        raise DataError(f"{named}. Filter or repair them (in a project: in the SQL recipe)")
