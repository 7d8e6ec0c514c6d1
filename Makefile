# make demo   set up what it needs, then train a small model end to end with the fused embedding (CPU or GPU)
# make test   set up, then run the tests          (HYPOTHESIS_PROFILE=deep for longer runs)
# make ptx    set up, then the tests that launch kernels, on what Triton compiles for ARCH, interpreted
# make lanes  the tests in two environments of their own: lane-newest (torch 2.15, Triton 3.9,
#             Python 3.13) and lane-gpu (torch 2.11, Triton 3.6, Python 3.12; with the PTX)
# make real   set up another environment, then the tests on Megatron-Bridge's and NeMo Automodel's
#             own classes (Python 3.11 and later)
# make real-main  the same on checkouts: BRIDGE=folder MEGATRON=folder AUTOMODEL=folder, any of them
# make fuzz   set up, then random inputs against oracles, for FUZZ_S seconds; findings are printed
# make lint   set up, then ruff, mypy, import-linter
# make docs   set up, then the site of docs/ into out/site, strict
# make pictures    set up, then the pictures of docs/ drawn anew
# make package     set up, then sdist and wheel into dist/, checked
# make kernel-hub  set up, then the folder that the `kernels` package loads, into out/kernel-hub
# make bench  set up, then the benchmarks         (GPU subjects need a CUDA device)
# make gpu    all that wants a GPU, in one call of ten minutes at most: smoke, tests, benchmarks, tiles
#             (no set-up: any Python with torch and Triton)
# make resources  set up, then what the compiled kernels need, by architecture

PYTHON ?= python3
RUN := .venv/bin/python
JOBS ?= auto
ARCH ?= sm_90
FUZZ_S ?= 180

# Python is to keep the byte code that it compiles, whatever the caller's environment says: pip
# compiles none here, and importing torch from source takes a process twice as long.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup-demo demo test ptx lanes lane-newest lane-gpu real real-main fuzz lint docs pictures package kernel-hub bench gpu resources setup clean

setup:
	@$(PYTHON) tools/bootstrap.py

setup-demo:
	@$(PYTHON) tools/bootstrap.py demo

demo: setup-demo
	@$(RUN) -m examples.demo

test: setup
	@$(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow"

ptx: setup
	@STEP37_TEST_PTX=$(ARCH) $(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not slow" tests/kernels

lanes: lane-newest lane-gpu

lane-newest lane-gpu: lane-%:
	@JOBS=$(JOBS) $(PYTHON) -m tools.lanes $*

real:
	@JOBS=$(JOBS) $(PYTHON) -m tools.real

real-main:
	@JOBS=$(JOBS) $(PYTHON) -m tools.real --bridge "$(BRIDGE)" --megatron "$(MEGATRON)" \
		--automodel "$(AUTOMODEL)"

fuzz: setup
	@$(RUN) -m tests.fuzz --seconds $(FUZZ_S)

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) -c "from importlinter.cli import lint_imports_command as lint; lint()"

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "out/site/index.html"

pictures: setup
	@$(RUN) -m tools.pictures

package: setup
	@rm -rf dist
	@$(RUN) -m build --no-isolation --outdir dist . >/dev/null
	@$(RUN) -m twine check --strict dist/*

kernel-hub: setup
	@$(RUN) -m tools.kernel_hub

resources: setup
	@for arch in sm_80 sm_90 sm_100 gfx942; do $(RUN) -m bench.resources --arch $$arch; done

bench: setup
	@$(RUN) -m bench

gpu:
	@PYTHONPATH=. $(PYTHON) tools/gpu.py

clean:
	rm -rf .venv .venv-real .venv-newest .venv-gpu build dist out .hypothesis .mypy_cache .ruff_cache .import_linter_cache
