"""Two machines on one: what tells Linux processes that they share a machine is taken from them.

    with Cluster(tmp_path) as nodes:
        nodes[0].start(["hostname"], log)

A node has its own network (joined to the other's by a virtual cable), host name, processes, mounts, shared memory,
/run and /var/tmp, and an sshd. It shares the files with this machine, as a cluster's nodes share theirs.

A node lives as long as its first process. When that ends the kernel kills every other process of the node and removes
its network and mounts; and it ends with this process, however this one ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
CABLE = "eth0"
SSHD = "/usr/sbin/sshd"
NAMESPACES = ("--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc")

# What a tool is called, and the Debian package that brings it.
TOOLS = {"ip": "iproute2", SSHD: "openssh-server", "pdsh": "pdsh", "unshare": "util-linux", "nsenter": "util-linux"}

# What the first process of a node does: a host name, files of its own over this machine's, and then nothing.
BOOT = """
set -e
hostname {name}
for folder in /run /var/tmp /dev/shm; do mount -t tmpfs tmpfs $folder; done
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh /etc/ssh
ip link set lo up
echo ready
set +e
while :; do sleep 3600; done 2> /dev/null
"""

SSHD_CONFIG = """
HostKey /etc/ssh/id
AuthorizedKeysFile /etc/ssh/id.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
PidFile none
SetEnv TMPDIR=/var/tmp
"""

SSH_CONFIG = """
Host *
  IdentityFile /etc/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing() -> str:
    """Why no nodes can be made here; empty if they can."""
    if os.geteuid() != 0:
        return "two nodes need root, for network namespaces"
    packages = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    if packages:
        return f"two nodes need {', '.join(packages)}: apt-get install {' '.join(packages)}"
    trial = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"this machine makes no namespaces: {trial.stderr.strip()}" if trial.returncode else ""


class Node:
    def __init__(self, number: int, folder: Path) -> None:
        self.name = f"node{number}"
        self.address = f"10.77.0.{number + 1}"
        boot = BOOT.format(name=self.name, folder=folder)
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "bash", "-c", boot]
        # Ends with this process, and the first process of the node with it.
        self.holder = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError(f"{self.name} did not start: see the messages above")
        self.first = int(Path(f"/proc/{self.holder.pid}/task/{self.holder.pid}/children").read_text())

    def enter(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "--target", str(self.first), "--all", f"--wdns={ROOT}", *command]

    def start(self, command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Begin `command` in the checkout with these variables and no others; its output goes to `log`.

        What is returned stands for it and ends with its status, but a signal to it would not reach the node.
        """
        return subprocess.Popen(
            self.enter(command), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )

    def run(self, *command: str) -> str:
        done = subprocess.run(self.enter(command), capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} on {self.name}: {done.stdout}{done.stderr}")
        return done.stdout

    def kill_processes(self) -> None:
        """SIGKILL for everything on the node, at once, except its first process. The network stays: what was
        connected is told so, as by a machine whose processes the kernel has killed."""
        subprocess.run(self.enter(["bash", "-c", "kill -KILL -1"]), check=False, capture_output=True)

    def unplug(self) -> None:
        """Nothing reaches the other node any more, and no one is told: as by a machine that lost its power."""
        self.run("ip", "link", "set", CABLE, "down")

    def plug_in(self) -> None:
        self.run("ip", "link", "set", CABLE, "up")

    def start_sshd(self) -> None:
        self.run(SSHD)

    def processes(self) -> list[str]:
        """Command lines of what runs on the node, without its first process, that one's sleep, and sshd."""
        lines = self.run("ps", "-e", "-o", "pid=,stat=,args=").splitlines()
        own = ("sleep 3600", "sshd: /usr/sbin/sshd [listener]", "ps -e")
        rows = [line.split(maxsplit=2) for line in lines]
        return [args for pid, stat, args in rows if pid != "1" and stat[0] != "Z" and not args.startswith(own)]

    def files(self) -> list[str]:
        """What lies in the node's temporary folders and shared memory, but for torch's cache."""
        found = self.run("find", "/var/tmp", "/dev/shm", "-mindepth", "1", "-not", "-path", "*/torchinductor_*")
        return sorted(found.split())

    def close(self) -> None:
        self.holder.kill()
        self.holder.wait()
        if self.holder.stdout is not None:
            self.holder.stdout.close()


class Cluster:
    """Two nodes, each with an address and a name that the other knows, and ssh between them without a password."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[Node] = []

    def __enter__(self) -> list[Node]:
        self.write_files()
        try:
            self.nodes = [Node(number, self.folder) for number in range(2)]
            self.connect(*self.nodes)
            for node in self.nodes:
                node.start_sshd()
        except BaseException:
            self.__exit__()
            raise
        return self.nodes

    def __exit__(self, *exc: object) -> None:
        for node in self.nodes:
            node.close()

    def write_files(self) -> None:
        ssh = self.folder / "ssh"
        ssh.mkdir(parents=True)
        (ssh / "sshd_config").write_text(SSHD_CONFIG)
        (ssh / "ssh_config").write_text(SSH_CONFIG)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "id")], check=True)
        hosts = ["127.0.0.1 localhost", *(f"10.77.0.{number + 1} node{number}" for number in range(2))]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")

    def connect(self, first: Node, second: Node) -> None:
        # Made inside the first node: this machine's own network never sees it.
        subprocess.run(
            f"nsenter --target {first.first} --net "
            f"ip link add {CABLE} type veth peer name {CABLE} netns {second.first}".split(),
            check=True,
        )
        for node in (first, second):
            node.run("ip", "address", "add", f"{node.address}/24", "dev", CABLE)
            node.plug_in()
