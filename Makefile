# Every target makes what it needs first: on a fresh Debian or Ubuntu machine `make run` and `make test` are the only commands.
# Products are in build/out (and .venv); build itself holds sources.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

OUT := build/out
CMAKE_DIR := $(OUT)/cmake
BIN := .venv/bin
JOBS ?= $(shell nproc)
# Of pytest: more would hold up tests that watch the clock.
TEST_WORKERS ?= 2
CPP_FILES := $(shell find build/cli -name '*.cpp' -o -name '*.h')

CHECKPOINT ?= $(OUT)/demo-checkpoint
TORCH := torch==2.13.0
TORCH_VENV := $(OUT)/venv-torch
INFRA_VENV := $(OUT)/venv-infra
SBOM_VENV := $(OUT)/venv-sbom
SAM_VENV := $(OUT)/venv-sam
INFRA_TEMPLATES := $(OUT)/template.json $(wildcard infra/*.yaml)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: cli ## serve the demo model (or MODEL_PATH) at http://localhost:8080 (or PORT)
	@exec $(BIN)/python -m function.local

.PHONY: chat
chat: setup-chat ## talk to the local server, or to URL, in the terminal
	@exec $(BIN)/python -m function.chat $(URL)

.PHONY: cli
cli: setup-run ## build the engine: build/out/bitnet
	@cmake -S build/cli -B $(CMAKE_DIR) -DBUILD_TESTING=OFF >/dev/null
	@cmake --build $(CMAKE_DIR) --parallel $(JOBS)

.PHONY: test
test: setup-test ## all tests: the engine's (ctest), then the function's and the whole path's (pytest)
	@cmake -S build/cli -B $(CMAKE_DIR) -DBUILD_TESTING=ON >/dev/null
	@cmake --build $(CMAKE_DIR) --parallel $(JOBS)
	@ctest --test-dir $(CMAKE_DIR) --output-on-failure --no-tests=error
	@$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadscope $(PYTEST_ARGS)

.PHONY: check
check: setup-test ## formats, lint, types, and no warning from the compiler; changes nothing
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/python docs/infra.py --check
	@cmake -S build/cli -B $(CMAKE_DIR) -DBUILD_TESTING=ON -DCMAKE_COMPILE_WARNING_AS_ERROR=ON >/dev/null
	@cmake --build $(CMAKE_DIR) --parallel $(JOBS)

.PHONY: fmt
fmt: setup-test ## format and mend what `make check` looks at
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

IMAGE ?= bitnet-lambda
NAME ?= bitnet
PORT ?= 8080
MODELS ?= $(wildcard models)
MODELS_AT = $(if $(filter /%,$(MODELS)),$(MODELS),$(CURDIR)/$(MODELS))
CONTAINER_RUN := build/image/container

.PHONY: image
image: ## build the container image IMAGE with docker or podman
	@$(CONTAINER_RUN) build --file build/Dockerfile --tag $(IMAGE) $(BUILD_ARGS) \
	    --label org.opencontainers.image.version="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
	    --label org.opencontainers.image.revision="$$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
	    --label org.opencontainers.image.created="$$(git show -s --format=%cI HEAD 2>/dev/null || date -u +%FT%TZ)" .

.PHONY: serve-image
serve-image: ## serve with the image at http://localhost:8080 (or PORT), with the model in MODELS (./models) if there is one
	@$(CONTAINER_RUN) image inspect $(IMAGE) >/dev/null 2>&1 || $(MAKE) image
	@$(CONTAINER_RUN) rm --force $(NAME) >/dev/null 2>&1 || true
	@$(CONTAINER_RUN) run --detach --name $(NAME) --publish 127.0.0.1:$(PORT):8080 --read-only --tmpfs /tmp \
	    --cap-drop ALL --security-opt no-new-privileges $(if $(MODELS),--volume "$(MODELS_AT):/models:ro") \
	    $(if $(MODEL_PATH),--env MODEL_PATH) $(IMAGE) serve >/dev/null
	@echo "$(NAME): http://127.0.0.1:$(PORT) (make logs, make stats, make stop)"

.PHONY: stop
stop: ## end what `make serve-image` has started
	@$(CONTAINER_RUN) stop --time 10 $(NAME) >/dev/null
	@echo "$(NAME) has stopped with exit code $$($(CONTAINER_RUN) wait $(NAME))"
	@$(CONTAINER_RUN) rm $(NAME) >/dev/null

.PHONY: logs
logs: ## what the image that serves has logged
	@$(CONTAINER_RUN) logs $(NAME)

.PHONY: stats
stats: ## what the image that serves takes of processor and memory
	@$(CONTAINER_RUN) stats --no-stream $(NAME)

.PHONY: pin
pin: ## write the digests of the bases into build/Dockerfile, as their registry tells them
	@python3 build/image/pin.py

.PHONY: sbom
sbom: setup-sbom ## what IMAGE consists of: build/out/sbom.cdx.json (CycloneDX)
	@$(CONTAINER_RUN) image inspect $(IMAGE) >/dev/null 2>&1 || $(MAKE) image
	@$(SBOM_VENV)/bin/python build/image/sbom.py $(IMAGE) $(OUT)/sbom.cdx.json

.PHONY: test-image
test-image: setup-image setup-sbom ## build the image and try it in containers (docker or podman; minutes, the first time more)
	@args=$$(tests/image/bases.sh); base=$${args##*=}; \
	  $(MAKE) image IMAGE=bitnet-lambda-test BUILD_ARGS="$$args"; \
	  SBOM_PYTHON=$(SBOM_VENV)/bin/python IMAGE=bitnet-lambda-test BASE="$${base:-$$(sed -n 's/^ARG PYTHON_IMAGE=//p' build/Dockerfile)}" \
	    $(BIN)/python -m pytest tests/image $(PYTEST_ARGS)

.PHONY: test-sam
test-sam: setup-image setup-sam ## `sam build` and `sam local invoke` with events/*.json (docker or podman)
	@args=$$(tests/image/bases.sh); \
	  SAM=$(SAM_VENV)/bin/sam STANDIN=$${args##*=} $(BIN)/python -m pytest tests/image/test_sam.py $(PYTEST_ARGS)

# The model, from the Hugging Face hub (REPOSITORY, HUB_FILE, REVISION, SHA256) or a file of your own (GGUF), to ./models and S3.
FROM_HUB = $(if $(REPOSITORY),--repository '$(REPOSITORY)') $(if $(HUB_FILE),--file '$(HUB_FILE)') \
    $(if $(REVISION),--revision '$(REVISION)') $(if $(SHA256),--sha256 '$(SHA256)')
MODEL_FILE ?= $(or $(GGUF),models/$(notdir $(or $(HUB_FILE),ggml-model-i2_s.gguf)))

.PHONY: download
download: setup-hub ## download the model to ./models (1.19 GB; no AWS account needed)
	@$(BIN)/python build/model/download.py $(FROM_HUB)

.PHONY: verify-model
verify-model: cli ## is MODEL_FILE (default: what `make download` gives) what it should be? Size, tensors, perplexity, answers, speed
	@$(BIN)/python build/model/verify.py "$(MODEL_FILE)" $(if $(EXPECTATIONS),--expectations "$(EXPECTATIONS)")

.PHONY: model
model: setup-hub cli ## download, verify and pack the model and upload it to BUCKET (default: that of infra/model-bucket.yaml)
	@bucket=$(or $(BUCKET),$$($(DEPLOY) bucket)); \
	  $(BIN)/python build/model/publish.py --bucket "$$bucket" $(if $(KEY),--key '$(KEY)') \
	    $(if $(OUTPUT_BITS),--output-bits $(OUTPUT_BITS)) $(if $(GGUF),--gguf '$(GGUF)',$(FROM_HUB))

# Stacks, registry, image and function, in the account and region that boto3 finds.
STACKS ?= bitnet
PARAMETERS ?=
DEPLOY = $(BIN)/python infra/deploy.py --prefix $(STACKS)

.PHONY: deploy
deploy: image ## bucket, model, registry, image and function (PARAMETERS="MemorySize=5120 …"); does what differs, prints a line for curl
	@model=$$($(MAKE) model | tail -n 1); \
	  $(DEPLOY) function --model "$$model" --image $(IMAGE) $(PARAMETERS)

.PHONY: destroy
destroy: setup-run ## delete the function's stack, after asking; ALL=1: those of registry and bucket too, which stay themselves
	@$(DEPLOY) destroy $(if $(ALL),--all) $(if $(YES),--yes)

.PHONY: smoke
smoke: setup-run ## is the API at URL right? One line an example; BITNET_API_KEY in the environment, or AWS credentials, as the URL wants
	@$(BIN)/python -m function.smoke $(or $(URL),http://127.0.0.1:$(PORT)) $(SMOKE_ARGS)

.PHONY: check-infra
check-infra: setup-test setup-infra cli ## the workflows, and the templates: expanded, linted, scanned, tested, made into stacks in moto
	@$(INFRA_VENV)/bin/actionlint
	@$(INFRA_VENV)/bin/zizmor --offline --quiet .github/workflows
	@AWS_DEFAULT_REGION=us-east-1 $(INFRA_VENV)/bin/python tests/infra/expand.py template.yaml $(OUT)/template.json
	@$(INFRA_VENV)/bin/cfn-lint --regions us-east-1 eu-west-1 -- $(INFRA_TEMPLATES)
	@$(INFRA_VENV)/bin/checkov --framework cloudformation --skip-download --quiet --compact --file $(INFRA_TEMPLATES)
	@EXPANDED=$(OUT)/template.json INFRA_BIN=$(INFRA_VENV)/bin $(BIN)/python -m pytest tests/infra $(PYTEST_ARGS)

# The rates are those of docs/performance.md (packed, AVX2), of two processors and not of Lambda: read your own off the dashboard.
TOKENS_PER_S ?= 70
PROMPT_TOKENS_PER_S ?= 276
.PHONY: batch-estimate
batch-estimate: cli ## what computing FILE, a JSONL of prompts, will cost (MODEL_PATH, TOKENS_PER_S, PROMPT_TOKENS_PER_S, MEMORY, …)
	@[ -n "$(FILE)" ] || { echo "batch-estimate: FILE=prompts.jsonl is needed" >&2; exit 2; }
	@$(BIN)/python -m infra.batch_estimate "$(FILE)" --tokens-per-s "$(TOKENS_PER_S)" --prompt-tokens-per-s "$(PROMPT_TOKENS_PER_S)" \
	    $(if $(MEMORY),--memory "$(MEMORY)") $(if $(ITEMS),--items "$(ITEMS)") $(if $(CONCURRENCY),--concurrency "$(CONCURRENCY)") \
	    $(if $(COLD_START_S),--cold-start-s "$(COLD_START_S)")

.PHONY: bench
bench: cli setup-bench ## measure the engine with a full-size random model (or MODEL): tables, and a plot in build/out/bench (half an hour)
	@$(OUT)/venv-bench/bin/python build/bench/bench.py $(if $(MODEL),--model "$(MODEL)") --threads $(JOBS) --rounds $(or $(ROUNDS),3)

.PHONY: clean
clean: ## remove build/out, .venv and caches
	rm -rf $(OUT) .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: picture
picture: ## draw docs/infra.svg from docs/infra.py
	python3 docs/infra.py

.PHONY: lock
lock: setup-test ## resolve requirements/*.in again into hash-locked requirements/*.txt
	@compile() { $(BIN)/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.11 \
	    --custom-compile-command 'make lock' "requirements/$$1.in" --output-file "requirements/$$1.txt" "$${@:2}"; }; \
	  compile dev; \
	  for group in chat function hub model torch; do compile $$group --constraint requirements/dev.txt; done; \
	  for group in bench infra sam sbom; do compile $$group; done; \
	  compile test-files --no-deps

.PHONY: demo-model
demo-model: setup-test ## convert CHECKPOINT (default: what train_demo.py writes) to build/model/demo/model.gguf
	$(BIN)/python build/model/convert.py $(CHECKPOINT) build/model/demo/model.gguf

.PHONY: golden
golden: setup-torch ## compute the golden logits of tests/golden with transformers (minutes; installs torch)
	PYTHONPATH=.:build/model $(TORCH_VENV)/bin/python tests/golden/write_golden.py

.PHONY: train-smoke
train-smoke: setup-torch ## train the demo model's script for a minute on a small text (installs torch)
	$(TORCH_VENV)/bin/python build/model/train_demo.py --smoke

.PHONY: setup-run setup-hub setup-test setup-image setup-chat setup-torch setup-bench setup-infra setup-sbom setup-sam
setup-run:
	@build/setup/setup.sh run
setup-hub:
	@build/setup/setup.sh hub
setup-test:
	@build/setup/setup.sh test
setup-chat:
	@build/setup/setup.sh chat
setup-image:
	@build/setup/setup.sh image
# Tools with dependencies that would disagree with the function's, each in a virtual environment of its own.
setup-bench setup-infra setup-sbom setup-sam: setup-%: setup-test
	@[ -x $(OUT)/venv-$*/bin/python ] || $(BIN)/python -m venv --without-pip $(OUT)/venv-$*
	@cmp -s requirements/$*.txt $(OUT)/venv-$*/$*.txt || { \
	    $(BIN)/uv pip install --quiet --python $(OUT)/venv-$* --require-hashes --only-binary :all: -r requirements/$*.txt; \
	    cp requirements/$*.txt $(OUT)/venv-$*/; }
setup-torch: setup-run
	@[ -x $(TORCH_VENV)/bin/pip ] || $(BIN)/python -m venv $(TORCH_VENV)
	@$(TORCH_VENV)/bin/pip install --quiet --require-hashes --no-deps -r requirements/torch.txt
	@$(TORCH_VENV)/bin/pip install --quiet $(TORCH)
