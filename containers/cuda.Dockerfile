# jaxup on NVIDIA GPUs: CUDA comes with jax, and of the machine only the driver (580 or newer) is needed.
#
#     docker build -f containers/cuda.Dockerfile -t jaxup:cuda .
#     docker run --rm --gpus=all -v "$PWD/runs:/jaxup/runs" jaxup:cuda jaxup train --config=inherit_gpt2.py
#
# Versions are those of containers/constraints.txt. The base image is pinned by its version; who needs the same bytes for
# ever adds its digest: FROM python:3.11.13-slim-bookworm@sha256:...
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/jaxup \
    && /opt/jaxup/bin/pip install --no-cache-dir --constraint containers/constraints.txt '.[cuda,data,lora]'

FROM python:3.11.13-slim-bookworm
COPY --from=build /opt/jaxup /opt/jaxup
ENV PATH=/opt/jaxup/bin:$PATH
# What NVIDIA's container toolkit mounts of the driver.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Not root: what is mounted at /jaxup/runs has to be for this user to write (or --user).
RUN useradd --uid 1000 --create-home jaxup && install -d -o jaxup /jaxup /jaxup/runs
USER 1000
WORKDIR /jaxup
CMD ["jaxup", "--help"]
