# Each environment is built once and reused: .envs/NAME from requirements/NAME.txt and the packages requirements/NAME-*/;
# NAME is an engine or ENGINE-VERSION, and every version gets requirements/ENGINE-cpu/.
# PyTorch's CPU build: from PIP_FIND_LINKS where that is set, else from PyTorch's own index.

PYTHON ?= python3
DTYPES ?= bf16 fp32 fp8
TESTEES ?= reference vllm sglang
WORK := .work
UV := .envs/tools/bin/uv
CORE := .envs/core/bin
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
else
TORCH_BACKEND := --torch-backend cpu
endif
# Set, every process of an engine would compile every module anew.
export PYTHONDONTWRITEBYTECODE :=
# Sums depend on the number of threads.
export OMP_NUM_THREADS := 1

.PHONY: conformance conformance-layouts rl test check mutants lint docs docs-serve bench environments release clean
.DELETE_ON_ERROR:
.SECONDARY:

conformance: $(DTYPES:%=$(WORK)/small-%) $(TESTEES:%=.envs/%/.ready) .envs/core/.ready
	set -e; for dtype in $(DTYPES); do \
		$(CORE)/dsv3 conformance run $(TESTEES:%=--testee %) --checkpoint $(WORK)/small-$$dtype; \
	done

LAYOUTS ?= tp=2 dp=2,ep=2 pp=2 tp=2,pp=2 tp=4
LAYOUT_DTYPES ?= bf16 fp8
LAYOUT_TESTEES ?= vllm sglang

# Each engine on several ranks of this machine, and a trainer beside a server that shares nothing with its layout.
conformance-layouts: export DSV3_REDUCTION_SLICES := 4
conformance-layouts: $(LAYOUT_DTYPES:%=$(WORK)/sliceable-%) $(LAYOUT_TESTEES:%=.envs/%/.ready) .envs/megatron/.ready
	set -e; for dtype in $(LAYOUT_DTYPES); do \
		for layout in $(LAYOUTS); do \
			$(CORE)/dsv3 conformance run --testee reference $(LAYOUT_TESTEES:%=--testee %) \
				--layout $$layout --checkpoint $(WORK)/sliceable-$$dtype; \
		done; \
		$(CORE)/dsv3 conformance run --testee reference --testee megatron@tp=2 --testee vllm@dp=2,ep=2 \
			--checkpoint $(WORK)/sliceable-$$dtype; \
	done

# GRPO with a trainer and both servers: every step asserts that they agree in every bit.
rl: .envs/megatron/.ready .envs/vllm/.ready .envs/sglang/.ready $(WORK)/rl-model
	rm -rf $(WORK)/rl
	.envs/megatron/bin/python -W ignore examples/rl/grpo.py $(WORK)/rl-model $(WORK)/rl --kv-tokens 320 \
		--plot $(WORK)/rl.svg

$(WORK)/rl-model: | .envs/core/.ready
	$(CORE)/dsv3 checkpoint make examples/rl $@ --seed 1

PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal

test: lint docs environments
	$(CORE)/python -m pytest $(PARALLEL) --durations 40
	.envs/kernels/bin/python -m pytest $(PARALLEL) tests/kernels/test_aot.py tests/kernels/test_bad_input.py tests/kernels/test_bench.py \
		tests/gpu/test_tensor_core_gpu.py tests/kernels/test_tune.py tests/kernels/test_compiled_ahead.py

# What changed since main: lint, types and the nearest tests, in under two minutes; it says what it did not run.
check: lint
	$(CORE)/python tests/support/affected.py $(WORK)/wheel

SAMPLE ?= 300
JOBS ?= $(shell nproc)

# How many of a sample of small changes to the arithmetic the tests notice: docs/mutants.md. Hours, over JOBS.
mutants: lint .envs/mutants/.ready
	.envs/mutants/bin/python tests/support/mutants.py $(WORK)/wheel --sample $(SAMPLE) --jobs $(JOBS) \
		--record $(WORK)/mutants.jsonl

lint: .envs/core/.ready
	$(CORE)/ruff check .
	$(CORE)/ruff format --check .
	rm -rf $(WORK)/wheel build && $(UV) pip install --quiet --python $(CORE)/python --no-deps --target $(WORK)/wheel .
	cd $(WORK)/wheel && $(CURDIR)/$(CORE)/lint-imports --no-logo --no-cache $(CURDIR)/pyproject.toml
	cd $(WORK)/wheel && MYPYPATH=. $(CURDIR)/$(CORE)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p dsv3_plugin

# A broken link fails.
docs: .envs/core/.ready
	NO_MKDOCS_2_WARNING=1 $(CORE)/mkdocs build --strict

docs-serve: .envs/core/.ready
	$(CORE)/mkdocs serve

release: .envs/tools/.ready
	TORCH_BACKEND="$(TORCH_BACKEND)" PYTHON=$(PYTHON) .ci/release $(VERSION)

bench: .envs/core/.ready
	$(CORE)/dsv3 bench linear

ENVIRONMENTS := core kernels vllm vllm-0.27.1 sglang sglang-0.5.17 sglang-0.5.23 megatron

environments: $(ENVIRONMENTS:%=.envs/%/.ready)

$(WORK)/small-%: | .envs/core/.ready
	$(CORE)/dsv3 checkpoint make small $@ --seed 0 --dtype $*

$(WORK)/sliceable-%: | .envs/core/.ready
	$(CORE)/dsv3 checkpoint make sliceable $@ --seed 0 --dtype $*

.envs/tools/.ready:
	$(PYTHON) -m venv .envs/tools
	.envs/tools/bin/python -m pip install --quiet uv==0.13.9
	touch $@

PACKAGES := $(shell find requirements -mindepth 2 -name '*.py' -o -name pyproject.toml)

# The reference needs nothing beyond the core.
.envs/reference/.ready: .envs/core/.ready
	mkdir -p .envs/reference && touch $@

.envs/%/.ready: requirements/%.txt pyproject.toml $(PACKAGES) .envs/tools/.ready
	$(UV) venv --quiet --clear --python $(PYTHON) .envs/$*
	$(UV) pip install --quiet --python .envs/$*/bin/python --no-deps $(TORCH_BACKEND) --requirement $<
	for file in $(wildcard requirements/$*.any-python.txt); do \
		.envs/tools/bin/python -m pip --python .envs/$*/bin/python install --quiet --no-deps --ignore-requires-python \
			--requirement $$file || exit 1; \
	done
	$(UV) pip install --quiet --python .envs/$*/bin/python --no-deps --editable .
	for package in $(sort $(dir $(wildcard $(addsuffix /pyproject.toml, \
			requirements/$*-* requirements/$(firstword $(subst -, ,$*))-cpu)))); do \
		$(UV) pip install --quiet --python .envs/$*/bin/python --no-deps ./$$package || exit 1; \
	done
	touch $@

clean:
	rm -rf .envs $(WORK)
