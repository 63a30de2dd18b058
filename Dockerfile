# syntax=docker/dockerfile:1
#
#   GPU:  docker build -t rae-scale .
#         docker build -t rae-scale --build-arg BASE=nvcr.io/nvidia/pytorch:<release> .   (one with torch >= 2.11)
#   CPU:  docker build -t rae-scale:cpu --build-arg BASE=python:3.12-slim .
#
#   docker run --rm --gpus all --ipc host -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" rae-scale \
#       launchers/torchrun.sh train configs/run/pretrain-2.4b.yaml
#
# The torch of the base image is never replaced: it was built for that image's CUDA, cuDNN and NCCL. Any image with
# Python 3.11 or newer will do; the default is PyTorch's own.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
FROM ${BASE}

# The compiler is for DeepSpeed's and triton's just-in-time builds; git and pdsh are for multi-node runs from a hostfile.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends build-essential git openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/*

# Vendor images constrain pip to their own versions of everything (PIP_CONSTRAINT) or forbid installing (PEP 668).
# What has to stay is in our constraint file below.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# Dependencies before code: a change of the code does not install them again.
# What the base brings stays at its version, and our pin of it is dropped; on a bare base nothing is kept.
COPY requirements.txt /opt/rae-scale/requirements.txt
RUN <<'SETUP'
set -eu
cd /opt/rae-scale
python3 - <<'PYTHON'
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

kept = {}
for name in ("torch", "torchvision", "triton", "pytorch-triton", "transformer-engine", "flash-attn", "apex"):
    try:
        kept[name] = version(name)
    except PackageNotFoundError:
        pass
Path("constraints.txt").write_text("".join(f"{name}=={found}\n" for name, found in kept.items()))
pins = [line for line in Path("requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
# A vendor's triton may carry another name; where there is a vendor torch, its triton stays too.
kept_names = set(kept) | ({"triton", "torchvision"} if "torch" in kept else set())
wanted = [pin for pin in pins if re.split(r"[=<>\[ ]", pin)[0].lower() not in kept_names]
Path("wanted.txt").write_text("\n".join(wanted) + "\n")
print("kept from the base image:", kept or "nothing")
PYTHON
python3 -m pip install --requirement wanted.txt --constraint constraints.txt
python3 - <<'PYTHON'
# Said here, in the build, and not by a wrong result on the cluster.
from importlib.metadata import version
from pathlib import Path

for line in Path("constraints.txt").read_text().split():
    name, _, expected = line.partition("==")
    assert version(name) == expected, f"{name} {expected} of the base image was replaced by {version(name)}"
import torch, torchvision  # noqa: E401  they must fit each other

print("torch", torch.__version__, "CUDA", torch.version.cuda)
PYTHON
SETUP

# Nothing of the project runs as root. The id matches the first user of most hosts, so that mounted folders are writable.
ARG USER_ID=1000
RUN id "$USER_ID" >/dev/null 2>&1 || useradd --create-home --uid "$USER_ID" rae
WORKDIR /app
COPY . /app
# Editable: the configs and launchers beside the package are used from /app.
RUN python3 -m pip install --no-deps --editable . && chown -R "$USER_ID" /app
USER $USER_ID
ENV HOME=/tmp RAE_PYTHON=python3
ENTRYPOINT ["launchers/docker-entry.sh"]
CMD ["--help"]
