"""A launch under supervision whose commands are shell scripts: `supervised.py FOLDER RESTARTS GRACE STOP_BY SCRIPT...`.

With STOP_BY "stdin" it ends its commands when its own standard input ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rae_scale.launch.command import Command, Launch, NodeCommand, StopBy
from rae_scale.launch.requeue import Restarts
from rae_scale.launch.supervise import Supervisor, configure_logging


def main() -> int:
    folder, restarts, grace, stop_by, *scripts = sys.argv[1:]
    commands = tuple(
        NodeCommand(f"node {number}", Command(("bash", "-c", script), {}, StopBy[stop_by]))
        for number, script in enumerate(scripts)
    )
    configure_logging()
    supervisor = Supervisor(
        lambda: (Launch(commands, tuple(range(len(commands)))), 31998),
        Path(folder),
        trains=True,
        restarts=Restarts(Path(folder), int(restarts)) if int(restarts) else None,
        grace_s=float(grace),
        first_wait_s=0.01,
    )
    if stop_by == "STDIN":
        supervisor.stop_with_stdin()
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
