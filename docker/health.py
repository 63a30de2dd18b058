"""Health check of a container: do the processes that it runs still give signs of life?

RAE_RUN_DIR names the folder of the run, into which every rank writes a heartbeat. The container is unhealthy when the
ranks on this host have all fallen silent, or when one that exists has: it is stopped or its disk hangs. A run without
heartbeats yet is still starting; one that has ended is nothing to restart. Without RAE_RUN_DIR nothing runs that could
be judged (a shell, a sampling command), and Python's start and the package's import are the check.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULT_AGE_S = 120.0


def judge(folder: Path, host: str, now: float, limit: float) -> tuple[bool, str]:
    """(healthy, why) of the ranks that `host` has in the run of `folder`.

    now: seconds since the epoch. limit: age in seconds from which a heartbeat counts as silence.
    """
    state = read(folder / "status.json").get("state")
    if state in ("finished", "failed", "requeue"):
        return True, f"the run has ended: {state}"
    beats = [beat for path in sorted((folder / "heartbeats").glob("rank-*.json")) if (beat := read(path))]
    own = [beat for beat in beats if beat.get("host") == host]
    if not own:
        return True, "no heartbeat from this host yet"
    ages = {beat["rank"]: now - beat["time"] for beat in own}
    youngest = min(ages.values())
    if youngest > limit:
        return False, f"no rank of this host has given a sign of life for {youngest:.0f} s"
    for beat in own:
        # One of an earlier attempt has no process any more and is not missed.
        if ages[beat["rank"]] > limit and Path(f"/proc/{beat['pid']}").exists():
            return False, f"rank {beat['rank']}, process {beat['pid']}, is silent for {ages[beat['rank']]:.0f} s"
    return True, f"{len(own)} ranks, the last sign of life {youngest:.0f} s ago"


def read(path: Path) -> dict[str, Any]:
    """Empty for a file that is not there or is just being replaced."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def main(environ: Mapping[str, str]) -> int:
    folder = environ.get("RAE_RUN_DIR")
    if not folder:
        import rae_scale

        print(f"rae-scale {rae_scale.__version__}; RAE_RUN_DIR names no run to watch")
        return 0
    limit = float(environ.get("RAE_HEALTH_AGE_S", DEFAULT_AGE_S))
    healthy, why = judge(Path(folder), socket.gethostname(), time.time(), limit)
    print(why)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main(os.environ))
