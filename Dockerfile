# SPDX-License-Identifier: Apache-2.0
# GPUs (the last stage):  docker build -t megatron_cream .
#                         docker run --gpus all --ipc host -it megatron_cream
# CPU, runs make demo:    docker build -t megatron_cream:cpu --target cpu .
#                         docker run --rm megatron_cream:cpu

FROM python:3.12.12-slim-bookworm AS cpu
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make=4.3-4.1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 cream \
    && install --directory --owner cream /home/cream/megatron_cream
USER 10001
WORKDIR /home/cream/megatron_cream
# What the install depends on comes first: a change of the source does not install 6 GB again.
COPY --chown=cream LICENSE Makefile NOTICE README.md pyproject.toml requirements.lock setup.cfg ./
COPY --chown=cream tools/find_python.sh tools/
COPY --chown=cream megatron_cream/__init__.py megatron_cream/
RUN make setup
COPY --chown=cream . .
# The files just copied may be newer than the mark of the set-up, which they do not change.
RUN make --touch setup && make check
CMD ["make", "demo"]

# Python 3.12, and the image that Megatron-Core 0.19 is itself tested in.
FROM nvcr.io/nvidia/pytorch:26.06-py3 AS gpu
ENV PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 10001 cream \
    && install --directory --owner cream /workspace/megatron_cream /workspace/megatron_cream/runs
WORKDIR /workspace/megatron_cream
COPY --chown=cream LICENSE NOTICE README.md pyproject.toml requirements.lock setup.cfg ./
COPY --chown=cream megatron_cream/__init__.py megatron_cream/
# torch, transformer-engine, apex and flash-attn stay the image's: PIP_CONSTRAINT holds them there.
# Of our lock only what the image lacks is taken.
RUN grep -E '^(accelerate|Flask-RESTful|megatron-core|omegaconf|sentencepiece|tiktoken|tokenizers|transformers|wandb|zstandard)==' \
        requirements.lock > /tmp/missing.txt \
    && python -m pip install --no-cache-dir --constraint /tmp/missing.txt --editable '.[hf,plot,zstd]' \
    && rm /tmp/missing.txt
COPY --chown=cream . .
USER 10001
RUN megatron-cream check-install
CMD ["bash"]
