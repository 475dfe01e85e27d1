"""Progress of a run: bars where there is a terminal, plain lines where there is none."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from headrace.memory import format_bytes
from headrace.tracking.history import Progress as StageProgress

_PLAIN_INTERVAL_S = 10.0
_STATES = {
    "ran": "done",
    "restored": "restored from the cache",
    "unchanged": "unchanged",
    "failed": "FAILED",
}


class Display:
    """Shows stages as they start, go on and end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not self._is_live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._rates: dict[str, _Rate] = {}
        self._told: dict[str, float] = {}
        self._waiting: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def wait_for(self, what: str) -> None:
        """Tell that the run waits for ``what``; ends with the next stage."""
        if self._is_live:
            self.done_waiting()
            self._waiting = self._bars.add_task(what, total=None, detail="")
        else:
            self.say(what)

    def done_waiting(self) -> None:
        """Take away what ``wait_for`` showed."""
        if self._waiting is not None:
            self._bars.remove_task(self._waiting)
            self._waiting = None

    def started(self, stage: str) -> None:
        """Show that ``stage`` has started."""
        self.done_waiting()
        self._rates[stage] = _Rate()
        self._told[stage] = time.monotonic()
        if self._is_live:
            self._tasks[stage] = self._bars.add_task(stage, total=None, detail="")

    def progress(self, states: Mapping[str, StageProgress]) -> None:
        """Show how far the running stages are."""
        for stage, state in states.items():
            rate = self._rates.get(stage)
            if rate is None:
                continue
            detail = _detail(state, rate.update(state))
            if stage in self._tasks:
                self._bars.update(
                    self._tasks[stage], completed=state.done, total=state.total, detail=detail
                )
            elif not self._is_live and time.monotonic() - self._told[stage] > _PLAIN_INTERVAL_S:
                self._told[stage] = time.monotonic()
                self.say(f"{stage}: {detail}")

    def ended(self, stage: str, state: str, seconds: float, peak_bytes: int) -> None:
        """Show what became of ``stage``."""
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))
        self._rates.pop(stage, None)
        told = _STATES.get(state, state)
        cost = f"{seconds:.1f} s" if state in ("ran", "restored", "failed") else ""
        peak = format_bytes(peak_bytes) if peak_bytes else ""
        self.say("  ".join(part for part in (f"{stage:<22}", f"{told:<10}", cost, peak) if part))


class _Rate:
    """Units per second between the first and the latest report of one counter."""

    def __init__(self) -> None:
        self._first: StageProgress | None = None

    def update(self, state: StageProgress) -> float:
        first = self._first
        is_new = first is None or (first.unit, first.total) != (state.unit, state.total)
        if first is None or is_new or state.done < first.done:
            self._first = state
            return 0.0
        seconds = state.time - first.time
        return (state.done - first.done) / seconds if seconds > 0 else 0.0


def _detail(state: StageProgress, rate: float) -> str:
    total = f"/{state.total:,}" if state.total else ""
    parts = [f"{state.done:,}{total} {state.unit}"]
    if rate >= 1:
        parts.append(f"{rate:,.0f} {state.unit}/s")
    if state.detail:
        parts.append(state.detail)
    return "  ".join(parts)
