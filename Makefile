# Two commands for a stranger (quickstart, test), one for a contributor (check). Each is complete on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Bytecode is kept also where the environment says not to: the tests start hundreds of processes, each of which would
# compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart quickstart-control test test-slow test-envpool test-edge test-emulated check format clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: a resolver that met it through a dependency could choose a build with gigabytes of CUDA.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0 numpy setuptools wheel
	@touch $@

NATIVE := $(wildcard csrc/*.cpp csrc/*.h)

$(VENV)/.base: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(PIP) --no-build-isolation -e '.[quickstart]'
	@touch $@

# An editable install builds the kernels of this machine; the tests judge those of every instruction set that it runs.
# They compile while pip fetches, and of what pip brings only what is imported.
$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(NATIVE)
	$(BIN)/python setup.py --quiet build_ext --inplace & \
	  $(PIP) --no-compile --no-build-isolation -e '.[quickstart,dev]' && wait $$!
	@touch $(VENV)/.base $@

quickstart: $(VENV)/.base
	$(BIN)/lockstep quickstart

quickstart-control: $(VENV)/.base
	$(BIN)/lockstep quickstart control

# Two processes, a file of tests to each in turn.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --durations=30

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"
	@touch $(VENV)/.tested

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow --timeout=900

# Apart, for EnvPool brings 700 MB of scenes.
test-envpool: $(VENV)/.dev
	$(PIP) --no-build-isolation -e '.[envpool]'
	$(BIN)/python -m pytest tests/envs/control -k envpool

# Apart, for the converters to LiteRT and ExecuTorch pin other versions than ours: an environment for each.
.venv-%/.installed: constraints.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0 numpy
	.venv-$*/bin/python -m pip install --quiet -c constraints.txt $(if $(filter litert,$*),litert-torch ai-edge-litert,executorch)
	@touch $@

test-edge: $(VENV)/.dev .venv-litert/.installed .venv-executorch/.installed
	LOCKSTEP_LITERT_PYTHON=$(CURDIR)/.venv-litert/bin/python LOCKSTEP_EXECUTORCH_PYTHON=$(CURDIR)/.venv-executorch/bin/python \
	  $(BIN)/python -m pytest tests/interop/export --timeout=900

# For a processor without AVX-512: the kernels of those levels in SIMDe's functions, and what judges kernels and the language
# models on them. A copy of the package, for its portable level claims that the processor has everything.
test-emulated: $(VENV)/.dev
	$(PIP) simde-py
	mkdir -p build/emulated/package
	cp -r lockstep build/emulated/package/
	rm -f build/emulated/package/lockstep/kernels/_native/*.so
	$(BIN)/python setup.py --quiet build_ext --build-lib build/emulated/package \
	  --simde "$$($(BIN)/python -c 'import simde_py; print(simde_py.get_include())')"
	cd build/emulated/package && $(CURDIR)/$(BIN)/python -c 'from lockstep import kernels; assert kernels.describe()["bf16"]'
	cd build/emulated/package && PYTHONPATH=$(CURDIR) $(CURDIR)/$(BIN)/python -m pytest -c $(CURDIR)/pyproject.toml \
	  -o pythonpath=$(CURDIR)/build/emulated/package -m "not slow" \
	  $(addprefix $(CURDIR)/tests/,kernels layers models engine parity learn)

# Fast tests that passed are not run again while no file of the sources, the tests or the documents has changed since.
SOURCES := $(shell find lockstep csrc tests docs README.md pyproject.toml -type f -not -name '*.pyc' -not -name '*.so')

$(VENV)/.tested: $(SOURCES) | $(VENV)/.dev
	$(MAKE) test

check: $(VENV)/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy lockstep
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-litert .venv-executorch build dist *.egg-info lockstep/kernels/_native/*.so
