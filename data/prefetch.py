"""Reading ahead in one background thread: same items, same order, a bounded number of them in memory."""

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class _Channel(Generic[Item]):
    """A bounded queue whose both ends can be released at once by `close`."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.items: deque[Item] = deque()
        self.error: BaseException | None = None
        self.finished = False  # the producer has nothing more
        self.closed = False  # the consumer wants nothing more
        self.changed = threading.Condition()

    def fill(self, source: Iterable[Item]) -> None:
        error = None
        try:
            for item in source:
                if not self.put(item):
                    break
        except BaseException as caught:  # handed to the consumer, who raises it
            error = caught
        with self.changed:
            self.error, self.finished = error, True
            self.changed.notify_all()

    def put(self, item: Item) -> bool:
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.items) < self.depth)
            if not self.closed:
                self.items.append(item)
                self.changed.notify_all()
            return not self.closed

    def get(self) -> Item:
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.items or self.finished)
            if self.items:
                item = self.items.popleft()
                self.changed.notify_all()
                return item
            if self.error is not None:
                raise self.error
            raise StopIteration

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.items.clear()
            self.changed.notify_all()


class Prefetcher(Iterator[Item]):
    """Iterates over `source` in a background thread, at most `depth` items ahead of the consumer.

    An exception of the source is raised where its item would have come, after the items before it. `close`, or dropping
    the last reference, ends the thread (once the item it is working on is done); a closed prefetcher is exhausted.
    """

    def __init__(self, source: Iterable[Item], depth: int) -> None:
        self._channel: _Channel[Item] = _Channel(depth)
        self._thread = threading.Thread(target=self._channel.fill, args=(source,), name="prefetch", daemon=True)
        self._release = weakref.finalize(self, self._channel.close)  # the thread holds the channel, never `self`
        self._thread.start()

    def __next__(self) -> Item:
        return self._channel.get()

    def close(self) -> None:
        """Stop reading ahead and wait for the thread to end."""
        self._release()
        self._thread.join()
