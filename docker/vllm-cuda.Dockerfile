# vLLM's own image with dsv3-plugin: plain `vllm serve` then serves DeepSeek-V3 with its arithmetic.
#
#   docker build --file docker/vllm-cuda.Dockerfile --tag dsv3-vllm .
#   docker run --gpus all --ipc host --publish 8000:8000 dsv3-vllm CHECKPOINT
FROM vllm/vllm-openai:v0.26.0
WORKDIR /opt/dsv3-plugin
COPY . .
# Of this very tree; what it needs beside is in the image.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir ".[conformance]" "cuda-bindings==13.0.3"
