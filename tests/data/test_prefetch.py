"""The reading-ahead thread: bounded, orderly, and gone when it should be."""

import gc
import threading
import weakref

import pytest

from longstride.data import SequenceLoader
from longstride.data.prefetch import Prefetcher
from tests.data.memory import MemoryCorpus


def test_order_is_kept_and_the_end_is_the_end():
    prefetcher = Prefetcher(range(50), 3)
    assert list(prefetcher) == list(range(50))
    with pytest.raises(StopIteration):
        next(prefetcher)
    prefetcher.close()


def test_it_reads_no_further_than_asked():
    read, enough = [], threading.Event()

    def source():
        for item in range(100):
            read.append(item)
            if len(read) == 4:
                enough.set()
            yield item

    prefetcher = Prefetcher(source(), 3)
    assert enough.wait(5)
    prefetcher.close()  # after this the thread is gone: three waiting, one in its hand
    assert read == [0, 1, 2, 3]
    with pytest.raises(StopIteration):
        next(prefetcher)


def test_an_exception_comes_after_the_items_before_it_and_again():
    def source():
        yield 1
        raise KeyError("lost")

    prefetcher = Prefetcher(source(), 5)
    assert next(prefetcher) == 1
    for _ in range(2):
        with pytest.raises(KeyError, match="lost"):
            next(prefetcher)
    prefetcher.close()


def test_a_dropped_loader_leaves_no_thread():
    before = threading.active_count()
    loader = SequenceLoader(MemoryCorpus(), 10, 1, seed=0)
    next(loader)
    thread = next(thread for thread in threading.enumerate() if thread.name == "prefetch")
    watch = weakref.ref(loader)
    del loader
    gc.collect()
    assert watch() is None
    thread.join(5)
    assert threading.active_count() == before
