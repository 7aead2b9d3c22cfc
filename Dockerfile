# Two images of graftwork: for GPUs, on NVIDIA's PyTorch (the default), and a slim one for CPUs.
#
#   docker build --tag graftwork:gpu .
#   docker build --tag graftwork:cpu --target cpu .
#
# docs/docker.md tells how to run them. Other bases: --build-arg CPU_BASE=..., --build-arg GPU_BASE=...
# An index of packages of your own: --secret id=pip,src=pip.conf
ARG CPU_BASE=python:3.11.14-slim-bookworm
ARG GPU_BASE=nvcr.io/nvidia/pytorch:25.09-py3

# What an image needs from elsewhere. Our own code is not in here: a change of it must not install packages anew.
FROM ${CPU_BASE} AS requirements
WORKDIR /src
COPY pyproject.toml ./
COPY constraints.txt /needed/
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > /needed/requirements.txt

FROM ${CPU_BASE} AS wheel
WORKDIR /src
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip install --no-cache-dir --root-user-action=ignore 'setuptools>=77'
COPY pyproject.toml README.md LICENSE ./
COPY graftwork graftwork
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${CPU_BASE} AS cpu
# Any user may run it: HOME is everybody's, and what asks for a user's name finds one.
RUN useradd --no-log-init --create-home --uid 10001 graftwork && chmod 1777 /home/graftwork
ENV HOME=/home/graftwork USER=graftwork PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=bind,from=requirements,source=/needed,target=/mnt \
    python -m pip install --no-cache-dir --root-user-action=ignore --constraint /mnt/constraints.txt \
    --requirement /mnt/requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/mnt \
    python -m pip install --no-cache-dir --root-user-action=ignore --no-deps --no-index /mnt/*.whl
USER graftwork
WORKDIR /home/graftwork
CMD ["nemorun", "graft", "--help"]

FROM ${GPU_BASE} AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN useradd --no-log-init --create-home --uid 10001 graftwork && chmod 1777 /home/graftwork
ENV HOME=/home/graftwork USER=graftwork PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Whatever the base holds (its own torch, CUDA, Transformer Engine) stays as it is; our versions pin the rest.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=bind,from=requirements,source=/needed,target=/mnt \
    python -m pip list --format=freeze | sed -E 's/[=@ ].*//; s/[-_.]+/[-_.]/g; s/.*/^&==/' > /tmp/present \
    && { grep -viEf /tmp/present /mnt/constraints.txt > /tmp/constraints.txt || true; } \
    && python -m pip install --no-cache-dir --root-user-action=ignore --constraint /tmp/constraints.txt \
    --requirement /mnt/requirements.txt \
    && rm /tmp/present /tmp/constraints.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/mnt \
    python -m pip install --no-cache-dir --root-user-action=ignore --no-deps --no-index /mnt/*.whl
USER graftwork
WORKDIR /home/graftwork
CMD ["nemorun", "graft", "--help"]
