# The server as an image: docker build --target cpu (the default), or --target cuda. What it needs to
# run, and how it is kept: docs/operations.md, "As a container".
#
# One base for all stages, because the CPU kernels are kept under the interpreter that they were built
# for. To pin it: --build-arg BASE=docker.io/library/python:3.11-slim-bookworm@sha256:…
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# ---- a virtual environment and a compiler ----

FROM ${BASE} AS builder
# Of the distribution's own release, whose fixes are wanted: a pinned version would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ARG PREFIX=/opt/polypeft
# What is run is what was installed, not what lies in the working directory.
ENV PATH="${PREFIX}/bin:${PATH}" PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv "${PREFIX}"
ARG TORCH=2.13.0
WORKDIR /src

FROM builder AS builder-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "${TORCH_INDEX}" "torch==${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY peftcore peftcore
COPY server server
COPY clients clients
COPY loadtests loadtests
# xgrammar brings Triton, a gigabyte, and uses it on GPUs alone.
RUN pip install . "torch==${TORCH}" \
    && find "${PREFIX}" -type d -path "*/site-packages/triton" -prune -exec rm -r {} +
# For every kind of CPU of this architecture, or some, since the image has no compiler.
ARG CAPABILITIES=""
RUN python -m peftcore.ops.cpu "${PREFIX}/kernels" ${CAPABILITIES:+--for "${CAPABILITIES}"}
# A model to bake in, as `--model` takes it; without one it is fetched into the volume at start.
ARG MODEL=""
RUN python -m peftcore.sources "${PREFIX}/models" "${MODEL}" > "${PREFIX}/settings.yaml"

FROM builder AS builder-cuda
RUN pip install "torch==${TORCH}"
COPY pyproject.toml README.md LICENSE ./
COPY peftcore peftcore
COPY server server
COPY clients clients
COPY loadtests loadtests
RUN pip install . "torch==${TORCH}"
# Triton compiles its binding to the driver at its first use. It is compiled here; the driver itself
# comes into the container with the GPU. Triton keeps the binding under where it was linked, which is
# therefore named in the image too, and under the platform, which Python tells otherwise where the
# program `file` is installed: in no stage.
ENV TRITON_LIBCUDA_PATH="${PREFIX}/libcuda"
RUN TRITON_CACHE_DIR="${PREFIX}/triton" python -m peftcore.ops.triton_driver
ARG MODEL=""
RUN python -m peftcore.sources "${PREFIX}/models" "${MODEL}" > "${PREFIX}/settings.yaml"

# ---- what both images are ----

FROM ${BASE} AS runtime
ARG PREFIX=/opt/polypeft
ARG DATA=/data
# All that is ever written lies under DATA, and what is short-lived in /tmp.
ENV PATH="${PREFIX}/bin:${PATH}" \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME="${DATA}" \
    XDG_CACHE_HOME="${DATA}/cache" \
    HF_HOME="${DATA}/cache/huggingface" \
    TORCHINDUCTOR_CACHE_DIR="${DATA}/cache/inductor" \
    TRITON_CACHE_DIR="${DATA}/cache/triton" \
    POLYPEFT_CACHE="${DATA}/cache/polypeft" \
    POLYPEFT_DATA_DIR="${DATA}/adapters" \
    POLYPEFT_CONFIG="${PREFIX}/settings.yaml" \
    POLYPEFT_HOST=0.0.0.0 \
    POLYPEFT_PORT=8000
RUN groupadd --gid 10001 polypeft \
    && useradd --uid 10001 --gid polypeft --home-dir "${DATA}" --no-create-home --shell /usr/sbin/nologin polypeft \
    && install -d -o polypeft -g polypeft "${DATA}"
USER 10001:10001
WORKDIR ${DATA}
VOLUME ${DATA}
EXPOSE 8000
STOPSIGNAL SIGTERM
# A model may have to be fetched and converted before the server is ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-m", "server.healthcheck"]
ENTRYPOINT ["polypeft-serve"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_LIBCUDA_PATH="${PREFIX}/libcuda" \
    POLYPEFT_TRITON="${PREFIX}/triton" \
    POLYPEFT_DEVICE=cuda
COPY --from=builder-cuda ${PREFIX} ${PREFIX}
# Triton has one folder for what is compiled, and must write to it: it gets what was compiled ahead.
ENTRYPOINT ["/bin/sh", "-ec", "mkdir -p \"$TRITON_CACHE_DIR\" && cp -R --remove-destination \"$POLYPEFT_TRITON/.\" \"$TRITON_CACHE_DIR\" && exec polypeft-serve \"$@\"", "polypeft-serve"]

FROM runtime AS cpu
ENV POLYPEFT_DEVICE=cpu POLYPEFT_KERNELS="${PREFIX}/kernels"
COPY --from=builder-cpu ${PREFIX} ${PREFIX}
