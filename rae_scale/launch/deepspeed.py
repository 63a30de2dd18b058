"""DeepSpeed's launcher, `deepspeed.launcher.runner`: on this machine, from here on all machines, or on each by itself.

It gives processes on other machines the variables that begin with NCCL, PYTHON, MLFLOW, MV2 or UCX, and what is in the
file that DS_ENV_FILE names; the rest of what they need is written there. Its pdsh puts all of it, and the command, on a
shell's command line with little quoting, which is made up for here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from rae_scale.launch.command import Command, Launch, NodeCommand, StopBy
from rae_scale.launch.environment import to_other_machines
from rae_scale.launch.hosts import threads_per_process
from rae_scale.launch.place import Place

RUNNER = ("-m", "deepspeed.launcher.runner")
# A connection that is dead for a minute ends, and with it the run, which can then be restarted elsewhere.
KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
# Beginnings of the names that DeepSpeed passes on of itself.
EXPORTED = ("MLFLOW", "MV2", "NCCL", "PYTHON", "UCX")
SHELL_SPECIAL = re.compile(r"[^\w@%+=:,./-]")


def launch(place: Place, environ: Mapping[str, str]) -> Launch:
    """One command per machine, of which this one starts its own; or one in all, where it is on one machine."""
    if place.nodes == 1 and place.hostfile is None:
        return Launch((NodeCommand(place.title(0), on_this_machine(place, environ)),), (0,))
    hostfile = place.subject.folder / "launch" / "hostfile"
    files = {hostfile: "".join(f"{host.name} slots={host.slots}\n" for host in place.hosts)}
    commands = tuple(
        NodeCommand(place.title(node), without_ssh(place, node, hostfile, environ)) for node in range(place.nodes)
    )
    return Launch(commands, () if place.node_rank is None else (place.node_rank,), files)


def on_this_machine(place: Place, environ: Mapping[str, str]) -> Command:
    processes, environment = place.slots(0), variables(place, 0, environ)
    # Not the default /job/hostfile: a run on one machine stays there.
    where = ["--hostfile", os.devnull, "--master_port", str(place.master_port)]
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    if place.gpus and visible:
        # With a number of GPUs it would forget which ones are ours, and take the first of the machine.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:processes])
    else:
        where += ["--num_gpus", str(processes)]
    return Command(runner(place, where), environment)


def without_ssh(place: Place, node: int, hostfile: Path, environ: Mapping[str, str]) -> Command:
    """What the machine with this rank executes itself."""
    first = ["--master_addr", place.master_addr, "--master_port", str(place.master_port)]
    where = ["--hostfile", str(hostfile), *first, "--no_ssh", "--node_rank", str(node)]
    return Command(runner(place, where), variables(place, node, environ))


def launch_with_pdsh(place: Place, environ: Mapping[str, str]) -> Launch:
    """One command, here, which starts the launcher on all machines; the first is asked for its address if need be."""
    folder = place.subject.folder / "launch"
    hostfile, environment_file = (folder / "hostfile").absolute(), (folder / "deepspeed.env").absolute()
    threads = threads_per_process(max(place.slots(node) for node in range(place.nodes)), environ)
    chosen = to_other_machines(environ, {"OMP_NUM_THREADS": threads} | dict(place.environment))
    # It passes these itself; PYTHONPATH after it has put the current folder into it.
    passed = {name: value for name, value in chosen.variables.items() if name != "PYTHONPATH"}
    lines = "".join(f"{name}={in_double_quotes(value)}\n" for name, value in passed.items())
    files = {
        hostfile: "".join(f"{host.name} slots={host.slots}\n" for host in place.hosts),
        environment_file: own_environment_file(environ) + lines,
    }
    where = ["--hostfile", str(hostfile), "--force_multi", "--launcher", "pdsh"]
    if place.master_addr:
        where += ["--master_addr", place.master_addr]
    where += ["--master_port", str(place.master_port)]
    environment = {
        "DS_ENV_FILE": str(environment_file),
        "PDSH_SSH_ARGS_APPEND": f"{environ.get('PDSH_SSH_ARGS_APPEND', '')} {KEEP_ALIVE}".strip(),
        # A secret with such a name would stand in a command line on every machine.
        **{name: "" for name in chosen.held_back if name.startswith(EXPORTED)},
    }
    argv = runner(place, where, [for_pdsh(word) for word in place.subject.command])
    where_all = f"this machine, for {', '.join(host.name for host in place.hosts)}"
    return Launch((NodeCommand(where_all, Command(argv, environment, StopBy.RUN_FOLDER)),), (0,), files)


def runner(place: Place, where: list[str], command: list[str] | None = None) -> tuple[str, ...]:
    words = place.subject.command if command is None else command
    return (place.python, *RUNNER, *where, "--log_level", "error", "--module", "rae_scale", *words)


def variables(place: Place, node: int, environ: Mapping[str, str]) -> dict[str, str]:
    """For processes that inherit this shell's."""
    given = {"OMP_NUM_THREADS": threads_per_process(place.slots(node), environ)}
    if not place.gpus and "DS_ACCELERATOR" not in environ:
        given["DS_ACCELERATOR"] = "cpu"
    return given | dict(place.environment)


def own_environment_file(environ: Mapping[str, str]) -> str:
    """What the user's file says, which ours takes the place of: in the home folder, then in this one."""
    name = environ.get("DS_ENV_FILE", ".deepspeed_env")
    paths = dict.fromkeys((Path.home() / name, Path(name)))
    texts = [path.read_text(encoding="utf-8").rstrip("\n") + "\n" for path in paths if path.is_file()]
    return "".join(texts)


def in_double_quotes(value: str) -> str:
    """As it must stand between the double quotes that DeepSpeed puts around a value with special characters."""
    value = value.replace("%", "%%")  # pdsh replaces %h, %u and %n
    return re.sub(r'([\\"$`])', r"\\\1", value) if SHELL_SPECIAL.search(value) else value


def for_pdsh(word: str) -> str:
    """As the remote shell must find it. DeepSpeed puts words with spaces in double quotes, and escapes such quotes."""
    word = word.replace("%", "%%")
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return SHELL_SPECIAL.sub(lambda match: "\\" + match[0], word)
