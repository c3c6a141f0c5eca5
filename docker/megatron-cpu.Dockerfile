# megatron on a CPU with dsv3-plugin, in the exact versions that the tests run.
#
#   docker build --file docker/megatron-cpu.Dockerfile --tag dsv3-megatron-cpu .
#   docker run --rm dsv3-megatron-cpu conformance run --testee reference --testee megatron --checkpoint .work/small-bf16
FROM python:3.11-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes build-essential git libnuma1 make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/dsv3-plugin
COPY . .
RUN make .envs/core/.ready .envs/megatron/.ready .work/small-bf16
ENTRYPOINT [".envs/core/bin/dsv3"]
CMD ["--help"]
