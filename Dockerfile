# Two images from one file: `--target service` is the API, without torch; `--target worker`, the default, is a worker.
#
# BASE_IMAGE   any image with Python 3.11 or newer and pip; a digest pins it for good: python:3.11.14-slim-bookworm@sha256:…
#              torch's wheels bring their own CUDA libraries, so the slim image does for GPU hosts too: those need
#              NVIDIA's driver and container toolkit, nothing in the image.
# TORCH_INDEX  where the worker's torch comes from; empty: pip's default index, whose build for Linux is the CUDA one
#              (several GB). https://download.pytorch.org/whl/cpu has the CPU build (190 MB).
# VERSION, REVISION  what the image's labels say of it.
ARG BASE_IMAGE=python:3.11.14-slim-bookworm
FROM ${BASE_IMAGE} AS base

# PYTHONSAFEPATH: no folder that a process happens to run in is a place of modules.
ENV PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# A named volume mounted on these folders takes their owner over.
RUN useradd --create-home --uid 1000 gradstore \
    && install --directory --owner gradstore --group gradstore /data /models

# All that is written at run time goes to /data, /models and /tmp, so that the rest may be read-only.
WORKDIR /home/gradstore
ENV GRADSTORE_DATA=/data HF_HOME=/models GRADSTORE_LOG_FORMAT=json
ENTRYPOINT ["gradstore"]
LABEL org.opencontainers.image.title="gradstore" \
    org.opencontainers.image.description="Gradient datastore: computes each training example's gradient once, and selects" \
    org.opencontainers.image.licenses="Apache-2.0"


FROM base AS service

# From what changes seldom to what changes often.
COPY requirements-service.lock /src/
RUN python -m pip install --require-hashes --no-deps -r /src/requirements-service.lock
COPY . /src
RUN python -m pip install --no-deps --no-build-isolation /src/client /src && python -m pip check

USER gradstore
ENV GRADSTORE_HOST=0.0.0.0 GRADSTORE_PORT=8000 GRADSTORE_EMBEDDED_WORKER=false
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --retries=3 --start-period=60s CMD ["python", "-m", "service.alive"]
CMD ["serve"]
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"


FROM base AS worker

ARG TORCH_INDEX=
RUN python -m pip install ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch==2.13.0
COPY requirements-image.lock /src/
RUN python -m pip install --require-hashes --no-deps -r /src/requirements-image.lock
COPY . /src
RUN python -m pip install --no-deps --no-build-isolation /src/client /src && python -m pip check

USER gradstore
# Triton keeps what it compiles below the home folder, unless told otherwise.
ENV TRITON_CACHE_DIR=/tmp/triton
HEALTHCHECK --interval=15s --timeout=10s --retries=4 --start-period=90s CMD ["python", "-m", "worker.alive"]
CMD ["worker"]
ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
