# syntax=docker/dockerfile:1
#
#   make image                                                   GPU, on PyTorch's own image
#   make image IMAGE_ARGS="--build-arg BASE=nvcr.io/nvidia/pytorch:<release>"      GPU, on NVIDIA's (torch >= 2.11)
#   make image IMAGE=rae-scale:cpu IMAGE_ARGS="--build-arg DEVICE=cpu"             small, for tests
#
# docs/images.md has what is kept from the base, the build arguments, and how a job runs on several machines.

# gpu or cpu: which base, and whether the layers behind the Python packages are GPU kernels or the tools of the tests.
ARG DEVICE=gpu
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
ARG CPU_BASE=python:3.12-slim

FROM ${BASE} AS base-gpu
FROM ${CPU_BASE} AS base-cpu


FROM base-${DEVICE} AS system
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The compiler is for DeepSpeed's and triton's just-in-time builds, git for apex, pdsh and ssh for runs from a hostfile.
# Host keys in an image would be the same, and known, on every machine: docker/sshd.sh makes a container's own.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      build-essential ca-certificates git openssh-client openssh-server pdsh \
 && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
# Vendor images constrain pip to their own versions of everything (PIP_CONSTRAINT) or forbid installing (PEP 668).
# What has to stay is in our own constraint file.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1
WORKDIR /opt/rae-scale
COPY requirements.txt pyproject.toml docker/packages.py ./


# A GPU base brings its torch. On the CPU base it comes from an index without CUDA: 200 MB in place of 6 GB.
FROM system AS torch-gpu
FROM system AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 packages.py pins torch torchvision > torch.txt \
 && python3 -m pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt


# Packages before code: a change of the code does not install them again.
FROM torch-${DEVICE} AS packages
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 packages.py keep \
 && python3 -m pip install --requirement wanted.txt --constraint constraints.txt \
 && python3 -m pip install --no-deps --requirement bare.txt \
 && python3 packages.py check


# The tools of the tests.
FROM packages AS extras-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 packages.py extra dev > dev.txt \
 && python3 -m pip install --requirement dev.txt --constraint constraints.txt \
 && python3 packages.py check

# GPU kernels, each in a layer of its own: what the base brings stays, what it lacks is compiled for these GPUs, and an
# empty version leaves it out. pip keeps the compiled wheels in the cache: a changed layer before them does not compile
# them again.
FROM packages AS extras-gpu
ARG CUDA_ARCHS="8.0;9.0;10.0"
ARG MAX_JOBS=8
ARG FLASH_ATTN=2.8.3
RUN --mount=type=cache,target=/root/.cache/pip python3 packages.py build flash-attn "$FLASH_ATTN"
ARG MEGATRON_CORE=
RUN --mount=type=cache,target=/root/.cache/pip python3 packages.py build megatron-core "$MEGATRON_CORE"
ARG APEX=
RUN --mount=type=cache,target=/root/.cache/pip python3 packages.py build apex "$APEX"


FROM extras-${DEVICE} AS final
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Nothing of the project runs as root. The id is that of the first user on most hosts, so that mounted folders are
# writable; a user with that id in the base gets our name. Code and packages stay root's: a job cannot change them.
ARG USER_ID=1000
RUN test "$USER_ID" -gt 0 || { echo "USER_ID=0 is root; choose the id of a user" >&2; exit 1; } \
 && name=$(getent passwd "$USER_ID" | cut -d: -f1 || true) \
 && if [ -n "$name" ]; then usermod --login rae --home /home/rae --move-home --shell /bin/bash "$name"; \
    else useradd --create-home --no-log-init --uid "$USER_ID" --shell /bin/bash rae; fi
WORKDIR /app
COPY . .
# Editable: the configs and launchers beside the package are used from /app. A version that is not the code's would be a
# label that lies.
ARG VERSION=
ARG COMMIT=
RUN python3 -m pip install --no-cache-dir --no-deps --editable . \
 && python3 -m compileall -q rae_scale kernels \
 && python3 /opt/rae-scale/packages.py check --version "$VERSION" \
 && install --directory --owner "$USER_ID" data runs \
 && install --mode 644 docker/ssh_config /etc/ssh/ssh_config.d/rae-scale.conf
LABEL org.opencontainers.image.title="rae-scale" \
      org.opencontainers.image.description="Train Scale-RAE text-to-image models on GPUs" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT"
# There is no git tree in the image: a run's version.json names the commit from here. Whatever user `docker run --user`
# names can write its caches to /tmp.
ENV RAE_COMMIT=$COMMIT RAE_PYTHON=python3 HOME=/tmp
USER $USER_ID
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["python3", "/app/docker/health.py"]
ENTRYPOINT ["launchers/docker-entry.sh"]
CMD ["--help"]
