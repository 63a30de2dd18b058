"""Which signals ask a run to stop, and that a thread learns of them while the main thread is deaf."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from rae_scale.parallel import Mesh
from rae_scale.train.signals import StopSignal
from rae_scale.train.watch import Watch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_each_signal_asks_to_stop_and_a_second_one_changes_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested and not stop.older_than(0)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.requested, stop.reason) == (True, number.name)
        assert stop.older_than(0) and not stop.older_than(60)
    assert signal.getsignal(number) == before


def test_another_thread_learns_of_a_signal_while_the_main_thread_is_deaf() -> None:
    """In a collective the main thread is in C code: no Python handler runs before it comes back."""
    heard: list[bool] = []
    coming, going = os.pipe()
    main_thread = Path(f"/proc/self/task/{threading.main_thread().native_id}/wchan")

    def listen() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # threads inherit what is blocked
        deadline = time.monotonic() + 10
        while "pipe_read" not in main_thread.read_text() and time.monotonic() < deadline:
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.arrived() and time.monotonic() < deadline:
            pass
        heard.append(stop.requested)
        os.write(going, b"x")

    with StopSignal() as stop:
        # So that the kernel gives the signal to the other thread and the read below is not interrupted.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        thread = threading.Thread(target=listen)
        try:
            thread.start()
            ctypes.CDLL(None).read(coming, ctypes.create_string_buffer(1), 1)
        finally:
            thread.join()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.close(coming)
    os.close(going)
    assert heard == [True] and stop.reason == "SIGTERM"


def test_who_asked_is_said_or_that_it_was_no_rank() -> None:
    """The launcher of a run on other machines leaves a flag, which has no reason."""
    for reason, said in (("SIGTERM", "SIGTERM on rank 0"), ("", "a request in the run's folder")):
        watch = Watch()
        watch.stop.request(reason)
        assert watch.stop_agreed(Mesh(torch.device("cpu")))
        assert watch.stop_reason == said
