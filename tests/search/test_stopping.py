"""A request to stop: heeded where the trainer asks, enforced where it does not, never in the middle of a write."""

import multiprocessing
import time

import pytest

from dense_lab.search import stopping


def polite(conn, told):
    """Ends with 1 when stopped by the question, 2 by force, in so many seconds as it says."""
    stopping.POLITE = 0.5
    stop, start = stopping.Stop(conn), time.monotonic()
    told.send("ready")
    code = 0
    try:
        with stop.interrupting():
            while not stop.requested and time.monotonic() - start < 20:
                time.sleep(0.01)
            code = 1
    except KeyboardInterrupt:
        code = 2
    told.send((code, time.monotonic() - start))


def deaf(conn, told):
    stopping.POLITE = 0.5
    stop, start = stopping.Stop(conn), time.monotonic()
    told.send("ready")
    writing, code = 0.0, 0
    try:
        with stop.interrupting():
            with stop.deferring():
                while time.monotonic() - start < 1.5:
                    time.sleep(0.01)
                writing = time.monotonic() - start
            while time.monotonic() - start < 20:
                time.sleep(0.01)
    except KeyboardInterrupt:
        code = 2
    told.send((code, writing))


@pytest.mark.parametrize(("child", "code"), [(polite, 1), (deaf, 2)])
@pytest.mark.parametrize("how", ["word", "orphaned"])
def test_a_worker_stops(child, code, how):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    hear, told = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs, told))
    process.start()
    theirs.close()
    hear.recv()
    if how == "word":
        ours.send("stop")
    else:
        # The child of a fork holds a copy of our end, which a forked worker does not: a word stands for its end.
        ours.send_bytes(b"")
    got, seconds = hear.recv()
    assert got == code
    # What must not be interrupted ran to its end, although the request was overdue by then.
    assert code == 1 or seconds >= 1.5
    process.join()
