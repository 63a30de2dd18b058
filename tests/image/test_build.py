"""The Dockerfile built for real and run, without Docker: `make test-image`. Every RUN step of both devices is executed.

TORCH_INDEX names an index whose torch needs no CUDA (default: PyTorch's). Empty is pip's own, which brings 6 GB of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import rae_scale
from tests.image.conftest import ROOT
from tests.image.engine import Engine, why_not

pytestmark = pytest.mark.image

TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LABELS = {"VERSION": rae_scale.__version__, "COMMIT": COMMIT}
# A base with a torch that is not our pin, and a flash-attn that pip has not made.
VENDOR_TORCH = "torch==2.14.1 torchvision==0.29.1"
VENDOR_FLASH_ATTN = """
folder=$(python3 -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$folder/flash_attn" "$folder/flash_attn-2.7.4.dist-info"
touch "$folder/flash_attn/__init__.py"
printf 'Metadata-Version: 2.1\\nName: flash_attn\\nVersion: 2.7.4\\n' > "$folder/flash_attn-2.7.4.dist-info/METADATA"
echo flash_attn > "$folder/flash_attn-2.7.4.dist-info/top_level.txt"
"""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """With a bare Debian in it. What it has written, up to 20 GB, is removed in the end."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    engine = Engine(Path(tempfile.mkdtemp(prefix="rae-image-")))
    try:
        engine.make_debian("localhost/debian")
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def checkout(engine: Engine) -> Path:
    """A copy of this one as a user's looks: with keys, a token and a run in it."""
    # Not in pytest's folder, which three other sessions of pytest remove.
    folder = engine.folder / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info"))
    for name in (".env", "ssh/id_ed25519", "runs/demo/config.yaml"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("HF_TOKEN=canary\n")
    return folder


def test_the_cpu_image(engine: Engine, checkout: Path) -> None:
    settings = {"DEVICE": "cpu", "CPU_BASE": "localhost/debian", "TORCH_INDEX": TORCH_INDEX, **LABELS}
    log = engine.build("rae-scale:cpu", checkout, settings)
    assert re.search(r"in the image: .*flash-attn none, megatron-core none, apex none", log)
    check_configuration(engine, "rae-scale:cpu")
    container = engine.start("rae-scale:cpu")
    assert "Train Scale-RAE" in engine.run(container, "launchers/docker-entry.sh", "--help")
    assert engine.run(container, "id", "--user", "--name").splitlines()[-1] == "rae"
    found = engine.run(container, "sh", "-c", "ls -A /app; find /etc/ssh -name 'ssh_host_*'; touch /app/rae_scale/x; :")
    assert not {".env", "ssh"} & set(found.split()) and "docker" in found.split()
    assert engine.run(container, "find", "runs", "-type", "f").splitlines() == [], "runs of the checkout"
    assert "ssh_host" not in found, "host keys that every container would share"
    assert "Permission denied" in found, "a job can change the code"
    assert f"rae-scale {rae_scale.__version__}" in engine.run(container, "python3", "docker/health.py")
    version = "from rae_scale.train.provenance import code_version; print(code_version()['git_commit'])"
    assert engine.run(container, "python3", "-c", version).splitlines()[-1] == COMMIT
    few = ("tests/image", "tests/config", "tests/flow", "tests/train/test_stages.py")
    tests = engine.run(container, "python3", "-m", "pytest", "-p", "no:cacheprovider", "-m", "not image", *few)
    assert " passed" in tests
    engine.remove(container, "rae-scale:cpu")


def test_the_gpu_image_on_a_base_that_brings_its_own(engine: Engine, checkout: Path) -> None:
    index = f"--index-url {TORCH_INDEX}" if TORCH_INDEX else ""
    install = f"python3 -m pip install --break-system-packages --no-cache-dir {index} {VENDOR_TORCH}"
    engine.extend("localhost/debian", "localhost/vendor", install, VENDOR_FLASH_ATTN)
    settings = {"DEVICE": "gpu", "BASE": "localhost/vendor", "MEGATRON_CORE": "0.16.1", **LABELS}
    log = engine.build("rae-scale:gpu", checkout, settings)
    assert re.search(r"kept from the base: .*torch 2\.14\.1.*flash_attn 2\.7\.4", log)
    assert "flash-attn: kept from the base (2.7.4); FLASH_ATTN='2.8.3' is not used" in log
    assert "megatron-core: 0.16.1 was built" in log
    assert "apex: not in the base and left out, since APEX is empty" in log
    assert re.findall(r"in the image: .*", log)[-1].count("torch 2.14.1") == 1
    check_configuration(engine, "rae-scale:gpu")
    container = engine.start("rae-scale:gpu")
    assert "Train Scale-RAE" in engine.run(container, "launchers/docker-entry.sh", "--help")
    engine.remove(container, "rae-scale:gpu")


def check_configuration(engine: Engine, image: str) -> None:
    """What Docker reads of the image beside its files."""
    command = ["buildah", *engine.store, "inspect", "--type", "image", image]
    inspected = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(inspected)["Docker"]["config"]
    assert found["User"] == "1000"
    assert found["Entrypoint"] == ["launchers/docker-entry.sh"]
    assert found["Healthcheck"]["Test"] == ["CMD", "python3", "/app/docker/health.py"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in found["Labels"].items()}
    assert (labels["version"], labels["revision"]) == (rae_scale.__version__, COMMIT)
