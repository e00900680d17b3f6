# syntax=docker/dockerfile:1
#
# The server, for NVIDIA GPUs or, with --build-arg DEVICE=cpu, for CPUs:
#
#   docker build -t plaudit .
#   docker run --gpus all -p 8000:8000 -e PLAUDIT_API_KEY=... -v "$PWD/runs/first/model:/model:ro" plaudit
#
# Outside loopback the server refuses to start without a key; `--insecure` is the explicit way round. The image can run
# with `--read-only --tmpfs /tmp:exec --cap-drop ALL --security-opt no-new-privileges`: it writes to its volumes only.

ARG DEVICE=cuda
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04
ARG CPU_IMAGE=ubuntu:24.04

# --- the wheel ---------------------------------------------------------------------------------------------------------
FROM python:3.12-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY model model
COPY training training
COPY server server
COPY clients clients
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# --- what both devices need at run time --------------------------------------------------------------------------------
# The `base` flavour of the CUDA image is enough: torch's wheels bring the CUDA libraries, Triton's wheel brings ptxas
# and the CUDA headers, and the container toolkit mounts the driver. What no wheel brings is the host side of Triton's
# JIT: it compiles a small launcher in C for every kernel signature, which takes gcc, the C library's headers and
# Python.h. Without them the first request fails with "Failed to find C compiler" or "Python.h: No such file".
FROM ${CUDA_IMAGE} AS base-cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 libpython3.12-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# No kernel is compiled on a CPU. libgomp is what torch's thread pool links to.
FROM ${CPU_IMAGE} AS base-cpu
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12 libgomp1 ca-certificates \
    && rm -rf /var/lib/apt/lists/*

# --- the environment ---------------------------------------------------------------------------------------------------
FROM base-${DEVICE} AS environment
ARG DEVICE
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12-venv python3-pip \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv --without-pip /opt/plaudit
COPY constraints.txt /tmp/constraints.txt
# torch first and alone: it is by far the largest layer and changes least. For CPUs its own index has wheels without
# the CUDA libraries.
RUN torch_index=""; \
    if [ "${DEVICE}" = cpu ]; then torch_index="--index-url https://download.pytorch.org/whl/cpu"; fi; \
    python3.12 -m pip --python /opt/plaudit/bin/python install --no-cache-dir ${torch_index} \
        --constraint /tmp/constraints.txt torch
COPY --from=wheel /wheels /tmp/wheels
RUN python3.12 -m pip --python /opt/plaudit/bin/python install --no-cache-dir \
        --constraint /tmp/constraints.txt "$(echo /tmp/wheels/plaudit-*.whl)[server]"

# --- the image ---------------------------------------------------------------------------------------------------------
FROM base-${DEVICE} AS runtime
COPY --from=environment /opt/plaudit /opt/plaudit

# PYTHONSAFEPATH keeps the working directory off sys.path, whatever is mounted there. Compiled kernels and downloaded
# models are kept in volumes, so that a restart neither compiles nor downloads again.
ENV PATH=/opt/plaudit/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PLAUDIT_HOME=/var/cache/plaudit/home \
    TRITON_CACHE_DIR=/var/cache/plaudit/triton \
    HF_HOME=/var/cache/plaudit/huggingface

RUN useradd --system --uid 10001 --no-create-home --home-dir /srv/plaudit --shell /usr/sbin/nologin plaudit \
    && install -d -o plaudit -g plaudit /srv/plaudit "${PLAUDIT_HOME}" "${TRITON_CACHE_DIR}" "${HF_HOME}"
VOLUME ["/var/cache/plaudit/home", "/var/cache/plaudit/triton", "/var/cache/plaudit/huggingface"]

WORKDIR /srv/plaudit
USER plaudit
EXPOSE 8000

# Ready means that a real score has passed. Loading a large model takes minutes: they do not count as failures.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]

# SIGTERM drains: accepted work is answered before the process ends (docker stop --time 60, so that it may).
STOPSIGNAL SIGTERM
ENTRYPOINT ["plaudit"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
