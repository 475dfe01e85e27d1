"""Work on spans of a table in threads, hear the results in order.

Decoding Parquet and filling rows run without Python's lock, so threads are enough. Each works on
one span at a time and runs at most one result ahead of the consumer: memory is a batch or two per
thread, and what comes out does not depend on their number.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

Span = TypeVar("Span")
Result = TypeVar("Result")

_END = object()
_POLL_S = 0.1


def in_order(
    spans: Sequence[Span], work: Callable[[Span], Iterator[Result]], *, threads: int
) -> Iterator[Result]:
    """Yield what ``work`` yields for each span, span after span, computed by ``threads`` threads.

    An error in a thread is raised here, at its place; closing the iterator stops the threads.
    """
    if threads <= 1 or len(spans) <= 1:
        for span in spans:
            yield from work(span)
        return
    is_over = threading.Event()
    slots: list[queue.Queue[object]] = [queue.Queue(maxsize=1) for _ in spans]

    def fill(place: int) -> None:
        try:
            for result in work(spans[place]):
                if not put_until(is_over, slots[place], result):
                    return
            put_until(is_over, slots[place], _END)
        except BaseException as error:  # noqa: BLE001 - raised by the consumer, where it is in turn
            put_until(is_over, slots[place], error)

    # A pool takes work first in, first out: the span that is waited for is always being worked on.
    with ThreadPoolExecutor(threads, thread_name_prefix="span") as pool:
        try:
            for place in range(len(spans)):
                pool.submit(fill, place)
            for slot in slots:
                while (result := slot.get()) is not _END:
                    if isinstance(result, BaseException):
                        raise result
                    yield result  # type: ignore[misc]
        finally:
            is_over.set()
            pool.shutdown(cancel_futures=True)


def put_until(is_over: threading.Event, slot: "queue.Queue[Any]", item: object) -> bool:
    """Put ``item`` into a bounded queue; return False if that is over before there is room."""
    while not is_over.is_set():
        try:
            slot.put(item, timeout=_POLL_S)
        except queue.Full:
            continue
        return True
    return False
