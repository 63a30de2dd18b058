"""What an attacker would put into a file: something that leaves a trace if it is ever run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)

    @property
    def sings(self) -> bool:
        """Whether it has run."""
        return self.folder.exists()


def yaml_canary(canary: Canary) -> str:
    """A YAML value that makes the folder when an unsafe loader reads it."""
    return f'!!python/object/apply:os.mkdir ["{canary.folder}"]'


def check_that_it_sings(canary: Canary) -> None:
    """A canary that cannot sing proves nothing: run it once, and take the trace away."""
    pickle.loads(pickle.dumps(canary))
    assert canary.sings
    canary.folder.rmdir()
