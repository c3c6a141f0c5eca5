# PyTorch's image of NVIDIA, which has TransformerEngine, with Megatron-Core and dsv3-plugin.
#
#   docker build --file docker/megatron-cuda.Dockerfile --tag dsv3-megatron .
#   docker run --gpus all --ipc host dsv3-megatron torchrun --nproc-per-node 8 examples/pretrain_megatron.py ...
FROM nvcr.io/nvidia/pytorch:26.03-py3
WORKDIR /opt/dsv3-plugin
COPY . .
# Of this very tree; what it needs beside is in the image.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir ".[megatron,conformance]" "megatron-core==0.19.2"
