# The code and what it needs, at the exact versions of requirements/, for a TPU; for a GPU: --build-arg EXTRA=cuda
FROM python:3.12-slim

# pycosat, which reasoning-gym brings, is compiled on the spot.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
ENV PYTHONUNBUFFERED=1

# First what seldom changes, so that a change of the code makes one small layer.
COPY pyproject.toml requirements.txt ./
COPY requirements/3.12.lock requirements/
ARG EXTRA=tpu
RUN pip install --no-cache-dir --constraint requirements/3.12.lock ".[${EXTRA},gcs,s3,wandb]"

COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
