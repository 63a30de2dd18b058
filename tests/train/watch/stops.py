"""What two ranks do that are asked to stop at the worst moments. Run by `test_stops.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `tiny_world`

from tiny_world import SignalAt

from rae_scale.config import parse_config
from rae_scale.data.loader import Loader
from rae_scale.state import Saver
from rae_scale.train import setup
from rae_scale.train.callbacks import Callback, samples

RANK = int(os.environ.get("RANK", "0"))
Moment = contextlib.AbstractContextManager[Any]


def stop_at_every_moment(settings: dict[str, dict[str, Any]]) -> None:
    """For each moment in `settings`: train until it, and again to the end. settings: of each moment's run, and of
    `straight`, which nobody stops."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # The runs share the processes and their group; everything else is as in a run of its own.
    shared = mock.patch.multiple(
        setup, init_distributed=lambda *args, **options: torch.device("cpu"), shutdown_distributed=lambda: None
    )
    with shared:
        setup.train(parse_config(settings["straight"]))
        for name in sorted(settings.keys() - {"straight"}):
            config = parse_config(settings[name])
            with MOMENTS[name](Path(config.run.dir)):
                setup.train(config)
            dist.barrier()
            if RANK == 0:
                keep_what_the_stop_left(Path(config.run.dir))
            dist.barrier()
            setup.train(config)
    dist.destroy_process_group()


def keep_what_the_stop_left(run_dir: Path) -> None:
    latest = run_dir / "checkpoints" / "latest"
    left = {
        "status": json.loads((run_dir / "status.json").read_text()),
        "latest": latest.read_text() if latest.exists() else None,
        "pictures": sorted(path.name for path in run_dir.glob("samples/*")),
    }
    (run_dir / "stopped.json").write_text(json.dumps(left))


def send(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def on_rank_1(patch: Callable[[], Moment]) -> Moment:
    return patch() if RANK == 1 else contextlib.nullcontext()


def with_callbacks(first: Callback | None = None, last: Callback | None = None) -> Moment:
    build = setup.build_callbacks
    return mock.patch.object(
        setup,
        "build_callbacks",
        lambda *args: [each for each in (first, *build(*args), last) if each is not None],
    )


def between_steps(run_dir: Path) -> Moment:
    return on_rank_1(lambda: with_callbacks(SignalAt(3)))


def twice(run_dir: Path) -> Moment:
    """The second signal comes while the last checkpoint is written."""
    save = Saver.save

    def signal_and_save(*args: Any) -> None:
        send()
        save(*args)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with with_callbacks(SignalAt(3)), mock.patch.object(Saver, "save", signal_and_save):
            yield

    return on_rank_1(both)


class ReleaseSave(Callback):
    """SIGUSR1 while the checkpoint of step 2 is in flight, which it keeps there until then."""

    main_only = False

    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate

    def on_step_end(self, run: Any, metrics: Any) -> None:
        if run.step == 2:
            send(signal.SIGUSR1)
            self.gate.set()


def during_a_save(run_dir: Path) -> Moment:
    gate, write = threading.Event(), Saver._write

    def wait_and_write(*args: Any) -> None:
        gate.wait()
        write(*args)

    @contextlib.contextmanager
    def both() -> Iterator[None]:
        with with_callbacks(last=ReleaseSave(gate)), mock.patch.object(Saver, "_write", wait_and_write):
            yield

    return on_rank_1(both)


def while_drawing(run_dir: Path) -> Moment:
    draw = samples.sample_latents

    def signal_and_draw(*args: Any, **options: Any) -> torch.Tensor:
        send()
        return draw(*args, **options)

    return on_rank_1(lambda: mock.patch.object(samples, "sample_latents", signal_and_draw))


def while_data_hangs(run_dir: Path) -> Moment:
    """Rank 1's storage hangs for ever; rank 0, which waits for it in a collective, is asked to stop."""
    following = Loader.__next__

    def hang(loader: Loader[Any]) -> Any:
        if loader.step == 3:
            os.kill(json.loads((run_dir / "heartbeats" / "rank-00000.json").read_text())["pid"], signal.SIGTERM)
            threading.Event().wait()
        return following(loader)

    return on_rank_1(lambda: mock.patch.object(Loader, "__next__", hang))


def in_start_up(run_dir: Path) -> Moment:
    build = setup.build_shared_parts

    def signal_and_build(*args: Any) -> Any:
        send()
        return build(*args)

    return on_rank_1(lambda: mock.patch.object(setup, "build_shared_parts", signal_and_build))


MOMENTS: dict[str, Callable[[Path], Moment]] = {
    moment.__name__: moment
    for moment in (between_steps, twice, during_a_save, while_drawing, while_data_hangs, in_start_up)
}
