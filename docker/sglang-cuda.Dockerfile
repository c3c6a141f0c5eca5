# SGLang's own image with dsv3-plugin: `sglang.launch_server` then serves DeepSeek-V3 with its arithmetic.
#
#   docker build --file docker/sglang-cuda.Dockerfile --tag dsv3-sglang .
#   docker run --gpus all --ipc host --publish 30000:30000 dsv3-sglang --model-path CHECKPOINT --host 0.0.0.0
FROM lmsysorg/sglang:v0.5.17
WORKDIR /opt/dsv3-plugin
COPY . .
# Of this very tree; what it needs beside is in the image.
# hadolint ignore=DL3013
RUN python3 -m pip install --no-cache-dir ".[conformance]" "cuda-bindings==13.0.3"
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--attention-backend", "dsv3"]
