"""What a run in another process tells whoever shows it: one JSON line per event in the run's logs.

The journal is history and written by the stages; this is the run's own word on stages that did not
run (unchanged, restored from the cache) and on how it ended. Nothing reads it after the run.
"""

import json
from pathlib import Path
from typing import Any

RUN_OPENED = "run_opened"  # run_id
STAGE_STARTED = "stage_started"  # stage
STAGE_ENDED = "stage_ended"  # stage, state, seconds, peak_bytes
MESSAGE = "message"  # text
WAITING = "waiting"  # text: what the run does beside its stages
ENDED = "ended"  # state, exit_code, message


class EventLog:
    """Appends events; each line is written at once, so several threads may share one log."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "events.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def tell(self, kind: str, **data: Any) -> None:
        """Append one event."""
        with self._path.open("ab", buffering=0) as file:
            file.write((json.dumps({"event": kind, **data}) + "\n").encode())


class LineReader:
    """Reads the lines that were added to a growing file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def new(self) -> list[str]:
        """Return the whole lines that are new; none while the file is not there yet."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        return whole.decode(errors="replace").splitlines()


class EventReader:
    """Reads a run's events as they come."""

    def __init__(self, folder: Path) -> None:
        self._lines = LineReader(folder / "events.jsonl")

    def new(self) -> list[dict[str, Any]]:
        """Return the events since the last look."""
        return [json.loads(line) for line in self._lines.new()]
