"""How near `headrace diagnose` foretells what its proposal brings, on the default network.

The loop is measured at small, middle and large batches of the flights example; each time the best
proposal is run beside the present setting. The worst of the errors is judged; a busy machine shows
there first, so their median stands beside it. The network is trained for a fraction of a second at
a time; nothing is kept.
"""

import os
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row
from headrace.commands.views import encoded_views
from headrace.models.nn import NnParams, open_learner
from headrace.params import Resources
from headrace.training.diagnosis import Check, Diagnosis, Setting, diagnose

BATCH_ROWS = (64, 128, 256)  # larger ones are bound by arithmetic, and nothing is proposed
BUDGET_BYTES = 8 << 30


def rows(encoded: Path, *, quick: bool) -> list[Row]:
    """Return the errors of what is foretold of speed and memory, from shards in ``encoded``."""
    repeats = 1 if quick else 3
    found = [
        examine(encoded, size, seconds=0.1 if quick else 0.3)
        for size in BATCH_ROWS
        for _ in range(repeats)
    ]
    checks = [one.check for one in found if one.check is not None]
    errors = [100 * abs(check.error) for check in checks]
    memory = [100 * abs(one.memory.error) for one in found]
    for one in found:
        print(told(one))
    return [
        _error_row("worst", max(errors, default=100.0), must=25, reference=_reference(checks)),
        _error_row(
            "median",
            statistics.median(errors) if errors else 100.0,
            reference=", ".join(f"{error:.0f} %" for error in sorted(errors)),
        ),
        Row(
            "diagnose: peak memory of a step from smaller batches",
            statistics.median(memory),
            "%",
            must=25,
            higher_is_better=False,
            reference=f"{min(memory):.0f}-{max(memory):.0f} %",
        ),
    ]


def examine(encoded: Path, batch_rows: int, *, seconds: float) -> Diagnosis:
    """Diagnose the default network at one batch size."""
    params = NnParams(batch_rows=batch_rows, device="cpu")
    views = encoded_views(encoded, encoded, encoded)  # the network reads the shards alone

    def opened(setting: Setting) -> Any:
        changed = {"batch_rows": setting.batch_rows, "threads": setting.threads}
        return open_learner(
            views,
            params.model_copy(update=changed),
            resources=Resources(workers=setting.workers),
        )

    return diagnose(
        opened,
        Setting(batch_rows, params.threads, 0),
        params,
        device=torch.device("cpu"),
        files=sorted(path for path in (encoded / "train").rglob("*") if path.is_file()),
        budget_bytes=BUDGET_BYTES,
        cores=os.cpu_count() or 1,
        seconds=seconds,
    )


def told(found: Diagnosis) -> str:
    """Return one line on what was found."""
    line = f"diagnose at {found.setting.batch_rows} rows: {found.binding.name} binds"
    if found.check is None:
        return f"{line}; nothing proposed"
    check = found.check
    return (
        f"{line}; {check.proposal.field} {getattr(check.proposal.setting, check.proposal.field)}: "
        f"{check.proposal.gain:.2f}x foretold, {check.rate_then / check.rate_now:.2f}x measured"
    )


def _error_row(which: str, error: float, *, must: float | None = None, reference: str) -> Row:
    return Row(
        f"diagnose: predicted against measured rows/s of the proposal, {which} error",
        error,
        "%",
        must=must,
        higher_is_better=False,
        reference=reference,
    )


def _reference(checks: list[Check]) -> str:
    if not checks:
        return "nothing was proposed"
    fields = ", ".join(sorted({check.proposal.field for check in checks}))
    return f"{len(checks)} checks of {fields}"
