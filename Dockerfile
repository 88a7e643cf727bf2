# One image for the API and the workers: `gradstore serve` and `gradstore worker`.
#
# BASE_IMAGE   any image with Python 3.11 or newer and pip. torch's wheels bring their own CUDA libraries, so the slim
#              image does for GPU hosts too: those need NVIDIA's driver and container toolkit, nothing in the image.
# TORCH_INDEX  where torch comes from; empty: pip's default index, whose build for Linux is the CUDA one (several GB).
#              https://download.pytorch.org/whl/cpu has the CPU build (190 MB).
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE}

# PYTHONSAFEPATH: no folder that a process happens to run in is a place of modules.
ENV PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# A named volume mounted on these folders takes their owner over.
RUN useradd --create-home --uid 1000 gradstore \
    && install --directory --owner gradstore --group gradstore /data /models

# From what changes seldom to what changes often.
ARG TORCH_INDEX=
RUN python -m pip install ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} torch==2.13.0
COPY requirements-image.lock /src/
RUN python -m pip install --require-hashes --no-deps -r /src/requirements-image.lock
COPY . /src
RUN python -m pip install --no-deps --no-build-isolation /src/client /src && python -m pip check

USER gradstore
WORKDIR /home/gradstore
ENV GRADSTORE_DATA=/data GRADSTORE_HOST=0.0.0.0 GRADSTORE_PORT=8000 HF_HOME=/models
EXPOSE 8000
ENTRYPOINT ["gradstore"]
CMD ["serve"]
