"""A recorder that stops what it listens to, as a signal would: at a place one can choose."""

from headrace.record import MemoryRecorder


class Halt(Exception):
    pass


class HaltingRecorder(MemoryRecorder):
    """Raises ``Halt`` after so many calls of ``progress``."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls_left = calls

    def progress(self, done, total, *, unit, detail=""):
        super().progress(done, total, unit=unit, detail=detail)
        self.calls_left -= 1
        if self.calls_left < 0:
            raise Halt
