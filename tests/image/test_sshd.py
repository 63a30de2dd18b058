"""The ssh server of a container: in by key alone, with the image's environment."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.image.conftest import ROOT

SCRIPT = str(ROOT / "docker/sshd.sh")


@contextlib.contextmanager
def server(keys: Path, port: int, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The server of docker/sshd.sh, once it listens."""
    environment |= {"RAE_SSH_KEYS": str(keys), "RAE_SSH_PORT": str(port), "PATH": "/usr/sbin:/usr/bin:/bin"}
    process = subprocess.Popen([SCRIPT], env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if "Server listening" in line:
                break
        else:
            pytest.fail("".join(said))
        yield process
    finally:
        process.terminate()
        process.stderr.close()
        process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with a key that may log in, and one that may not."""
    if not shutil.which("ssh") or not os.path.exists("/usr/sbin/sshd"):
        pytest.skip("no ssh client and server: apt-get install openssh-client openssh-server")
    if os.geteuid() == 0:
        # As root sshd wants the folder that its service creates.
        Path("/run/sshd").mkdir(exist_ok=True)
    folder = tmp_path / "ssh"
    folder.mkdir()
    for name in ("id_ed25519", "stranger"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized_keys").write_text((folder / "id_ed25519.pub").read_text())
    return folder


def connect(keys: Path, port: int, key: str, command: str) -> subprocess.CompletedProcess[str]:
    # The image's own client settings, with the keys of this test.
    settings = keys / "config"
    settings.write_text((ROOT / "docker/ssh_config").read_text().replace("/ssh/id_ed25519", str(keys / key)))
    user = pwd.getpwuid(os.geteuid()).pw_name
    only = ["-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "IdentityAgent=none"]
    where = ["-F", str(settings), "-p", str(port), f"{user}@127.0.0.1"]
    return subprocess.run(["ssh", *only, *where, command], capture_output=True, text=True, check=False, timeout=20)


def test_a_key_gets_in_and_finds_the_images_programs(keys: Path) -> None:
    (keys / "authorized_keys").chmod(0o644)
    keys.chmod(0o777)  # a mounted folder belongs to anyone
    port = free_port()
    with server(keys, port, LD_LIBRARY_PATH="/opt/a b:/opt/c", HF_TOKEN="hf-secret"):
        inside = connect(keys, port, "id_ed25519", "env")
        stranger = connect(keys, port, "stranger", "env")
    assert inside.returncode == 0, inside.stderr
    found = dict(line.split("=", 1) for line in inside.stdout.splitlines() if "=" in line)
    assert found["LD_LIBRARY_PATH"] == "/opt/a b:/opt/c"
    assert found["PATH"].endswith("/usr/sbin:/usr/bin:/bin")  # behind what the shell puts first
    assert "hf-secret" not in inside.stdout
    assert stranger.returncode == 255 and "Permission denied (publickey)" in stranger.stderr


def test_without_keys_it_says_what_to_mount(tmp_path: Path) -> None:
    environment = {"RAE_SSH_KEYS": str(tmp_path / "nothing"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"mount the folder with -v FOLDER:{tmp_path}/nothing:ro" in done.stderr
