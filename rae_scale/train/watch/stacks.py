"""What all threads of a process are doing, for people and in one line."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

# Where a rank waits for others: in a collective, or in what reads its result back from a GPU.
WAITING = ("torch.distributed", "rae_scale.parallel.mesh", "rae_scale.parallel.collectives")


def write_stacks(path: Path, header: str) -> None:
    """`header` and the Python stack of every thread but the calling one, the training thread first."""
    frames, me = sys._current_frames(), threading.get_ident()
    threads = sorted(threading.enumerate(), key=lambda thread: thread is not threading.main_thread())
    parts = [header]
    for thread in threads:
        if thread.ident is not None and thread.ident in frames and thread.ident != me:
            stack = "".join(traceback.format_stack(frames[thread.ident]))
            parts.append(f"Thread {thread.name} (most recent call last):\n{stack}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts), encoding="utf-8")


def training_thread() -> tuple[str | None, bool]:
    """(`file:line function` of our innermost code in the main thread, whether it waits there for other ranks)."""
    ident = threading.main_thread().ident
    frame = sys._current_frames().get(ident) if ident is not None else None
    waiting = False
    while frame is not None:
        module = module_of(frame)
        waiting = waiting or module.startswith(WAITING)
        if module.startswith("rae_scale."):
            code = frame.f_code
            return f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}", waiting
        frame = frame.f_back
    return None, waiting


def module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))
