"""A command with the variables that it is given, as bash would read it and as it is started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


class StopBy(Enum):
    """Whom a supervisor asks to stop a command's processes after a step."""

    WORKERS = "SIGTERM to each training process that runs here"
    LAUNCHER = "SIGUSR1 to the command, which passes it on to every machine"
    RUN_FOLDER = "a request in the run's folder, which every rank sees"
    STDIN = "the command ends what it has started when its standard input is closed"


@dataclass(frozen=True)
class Command:
    """`argv` with `environment` in addition to what is inherited."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_by: StopBy = StopBy.WORKERS

    def line(self) -> str:
        """For bash. `env` sets the variables, so that the line can also stand behind ssh or sudo."""
        setting = [f"{name}={value}" for name, value in self.environment.items()]
        return quote(["env", *setting, *self.argv] if setting else self.argv)


@dataclass(frozen=True)
class NodeCommand:
    """What one machine executes. `node`: which machine, for whoever reads it."""

    node: str
    command: Command


@dataclass(frozen=True)
class Launch:
    """Commands that belong together, started at the same time.

    files: text files that must exist before, readable by the user alone.
    here: the commands that this machine starts; the others are for somebody to start on theirs.
    """

    commands: tuple[NodeCommand, ...]
    here: tuple[int, ...]
    files: Mapping[Path, str] = field(default_factory=dict)

    def script(self) -> str:
        """Everything as a bash script. Commands of several machines, each in a terminal there."""
        parts = []
        for path, text in self.files.items():
            parts.append(f"install -D -m 600 /dev/stdin {shlex.quote(str(path))} <<'END'\n{text}END")
        parts += [f"# {each.node}\n{each.command.line()}" for each in self.commands]
        return "\n".join(parts) + "\n"


@dataclass(frozen=True)
class Submission:
    """A text that another program takes from its standard input: a batch script or a manifest."""

    argv: tuple[str, ...]
    text: str

    def script(self) -> str:
        return self.text


def quote(argv: Sequence[str]) -> str:
    return " ".join(shlex.quote(argument) for argument in argv)
