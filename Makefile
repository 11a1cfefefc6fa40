# Two commands do everything: `make demo` and `make test`. They make .venv and install into it what is needed.
# With PYTHON=/path/to/python that interpreter is used as it is, and nothing is installed.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# With it, each of the many processes that tests start would compile its sources again, and those of the installed packages.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help demo test chaos test-full test-lowest test-newest test-interop test-gpu-program check benchmark benchmark-gpu recipes recipes-gpu clean product tools interop engine

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile
	@echo "make … PYTHON=/path/to/python uses an interpreter that has the packages already and installs nothing"

demo: product  ## fine-tune the embedded ViT on the embedded images: offline, about a minute and a half on 2 cores
	$(RUN) main.py --config configs/demo.py
	@echo
	@echo "Next: ViT-B/16 on CIFAR-100 (downloads both, and wants a GPU):"
	@echo "  $(RUN) main.py --config configs/cifar100_b16.py"

PYTEST = -m pytest -n 2 --dist worksteal
# Tests compile without XLA's optimisations, which halves their time; with this they compile as users' programs are.
OPTIMIZED = VIT_JAX_TEST_OPTIMIZED=1
QUICK = "not slow and not full"

test: tools  ## the tests that a change needs: at most 8 minutes on 2 cores
	$(RUN) $(PYTEST) -m $(QUICK)

test-full: tools  ## all tests, optimised, with samples in full size: damaged files, seeds; without PYTHON= also all programs of GPUs
	$(OPTIMIZED) VIT_JAX_FUZZ_SEEDS=20 VIT_JAX_SEEDS=5 VIT_JAX_EPOCHS=3 VIT_JAX_PUBLISHED=all $(RUN) $(PYTEST)
	$(if $(filter command line,$(origin PYTHON)),,$(MAKE) test-gpu-program PROGRAMS=)

LOWEST := .venv-lowest/bin/python
# Where rounding or the version of a library matters most: compiled as users' programs are, and in CI with the newest versions only.
NUMBERS := tests/formats/test_oracles.py tests/training/test_step.py tests/training/test_bfloat16.py tests/training/test_optimizer.py \
	tests/transforms/test_geometry.py tests/transforms/test_colour.py
test-lowest: .venv-lowest/.tools  ## with the lowest versions of the requirements, on Python 3.11: all tests but those marked `full` and the NUMBERS
	@if [ -x $(LOWEST) ]; then $(LOWEST) $(PYTEST) -m "not full" $(addprefix --ignore=,$(NUMBERS)); \
	else echo "test-lowest is skipped: no Python 3.11 here"; fi

NEWEST := .venv-newest/bin/python
test-newest: .venv-newest/.tools  ## with the newest versions, on Python 3.13 (else 3.12): the NUMBERS, optimised, and the first case of each other quick test
	@if [ -x $(NEWEST) ]; then $(OPTIMIZED) $(NEWEST) $(PYTEST) -m "not full" $(NUMBERS) \
		&& $(NEWEST) $(PYTEST) -m $(QUICK) --first-cases $(addprefix --ignore=,$(NUMBERS)); \
	else echo "test-newest is skipped: neither Python 3.13 nor 3.12 here"; fi

test-interop: interop  ## the same weights in timm, Hugging Face and ONNX Runtime: PyTorch for CPUs, about a gigabyte more
	$(RUN) $(PYTEST) tests/peers tests/benchmarks/test_peer_process.py tests/data/test_hub.py

# JAX's plug-in writes to standard error whenever JAX is imported, so it has a separate environment on top of that of test-lowest.
PLUGIN := .venv-gpu-program/bin/python
PROGRAMS = -m "not full"
test-gpu-program: .venv-gpu-program/.tools  ## the training step, compiled for GPUs that are only described: at most 3 minutes on 2 cores
	@if [ -e $< ]; then $(OPTIMIZED) $(PLUGIN) -m pytest -n 0 --durations=5 $(PROGRAMS) tests/gpu_program; \
	else echo "test-gpu-program is skipped: no Python 3.11 here, or jax-cuda12-plugin cannot be installed"; fi

RUNS := 100
chaos: tools  ## small runs, killed or with a full disk or damaged states, and started again; the campaign goes on in runs/chaos if it is ended
	$(RUN) -m tests.training.chaos $(RUNS) runs/chaos

check: tools  ## lint and type-check
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# PARTS=train-256,loop measures only these parts; ORIGINAL=CHECKOUT of google-research/vision_transformer adds the original.
SUITE = failed=0; $(RUN) -m benchmarks $(if $(PARTS),--only $(PARTS)) $(if $(ORIGINAL),--original $(ORIGINAL))
PAGE = $(RUN) -m benchmarks --page; exit $$failed

benchmark: interop  ## speed and memory on this machine's CPU next to timm, for docs/performance.md: about an hour on 2 cores
	JAX_PLATFORMS=cpu $(SUITE) --suite cpu || failed=1; $(PAGE)

benchmark-gpu: engine  ## the same on this machine's GPU, next to timm if it is installed: less than 25 minutes
	$(SUITE) --suite gpu || failed=1; $(PAGE)

recipes: product  ## the studies of docs/recipes.md that a CPU can do: several hours on 2 cores; they go on if they are ended
	for study in changes combinations best batches; do $(RUN) -m benchmarks.recipes $$study; done

recipes-gpu: product  ## those that want a GPU: optimizers and three seeds of CIFAR-100 from scratch, and single changes at ten times the steps
	for study in scratch-optimizers-gpu scratch-gpu changes-gpu; do $(RUN) -m benchmarks.recipes $$study; done

clean:  ## remove .venv, caches and what a build left; runs/ stays
	rm -rf .venv .venv-lowest .venv-newest .venv-gpu-program build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,VENV,ARGUMENTS of pip install): with uv, which takes a fifth of pip's time; with pip where uv cannot be had or does
# not find the packages, and where pip's settings, which uv does not read, name an index in the place of PyPI. grep reads to
# the end, because pip would fail at a closed pipe, and so would the pipeline.
QUIET := --quiet --disable-pip-version-check
install = { { ! $(1)/bin/python -m pip config list | grep -E '[.](index-url|no-index)=' >/dev/null && $(1)/bin/python -m pip install $(QUIET) uv \
	&& $(1)/bin/python -m uv pip install --quiet --python $(1)/bin/python $(2); } 2>/dev/null || $(1)/bin/python -m pip install $(QUIET) $(2); }
# $(call extra,NAME[,PYTHON]): prints the requirements of an extra of pyproject.toml, a line each.
extra = $(or $(2),$(RUN)) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['$(1)'], sep='\n')"

# Shell code that sets `found` to a Python of one of these versions, from PATH or pyenv; to nothing if there is none that starts.
find_python = found=; for version in $(1); do for python in python$$version $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python; do \
	if [ -z "$$found" ] && "$$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null; then found=$$python; fi; \
	done; done
# Shell code that turns the requirements `name>=X,<Y` on its input into `name==X`, and fails at a line that is none.
lowest = sed -nE '/^(\#|$$)/d; s/^([[:alnum:]_-]+)>=([0-9.]+).*/\1==\2/p; t; q1'

.venv-lowest/.tools: requirements.txt pyproject.toml
	@rm -rf .venv-lowest; mkdir .venv-lowest; $(call find_python,3.11); if [ -n "$$found" ]; then \
		$$found -m venv .venv-lowest && { cat requirements.txt; $(call extra,test,$(LOWEST)); } | $(lowest) >.venv-lowest/all.txt \
			&& $(call install,.venv-lowest,-r .venv-lowest/all.txt); fi
	@touch $@

.venv-newest/.tools: requirements.txt pyproject.toml
	@rm -rf .venv-newest; mkdir .venv-newest; $(call find_python,3.13 3.12); if [ -n "$$found" ]; then \
		$$found -m venv .venv-newest && { cat requirements.txt; $(call extra,test,$(NEWEST)); } >.venv-newest/all.txt \
			&& $(call install,.venv-newest,-r .venv-newest/all.txt); fi
	@touch $@

.venv-gpu-program/.tools: .venv-lowest/.tools
	@rm -rf .venv-gpu-program; if [ -x $(LOWEST) ]; then \
		jax=$$($(LOWEST) -c "import jax; print(jax.__version__)"); packages=$$(ls -d $$PWD/.venv-lowest/lib/python*/site-packages); \
		$(LOWEST) -m venv .venv-gpu-program && echo "$$packages" >$$(ls -d .venv-gpu-program/lib/python*/site-packages)/lowest.pth && \
		$(call install,.venv-gpu-program,--no-deps jax-cuda12-plugin==$$jax jax-cuda12-pjrt==$$jax) && \
		touch $@; \
	fi || true

ifeq ($(origin PYTHON), command line)

RUN := $(PYTHON)
# $(call require,command): fails with one error if the interpreter has no package of a name that the command prints.
require = @{ $(1); } | $(RUN) -c "import importlib.metadata as m, re, sys; key = lambda s: re.sub('[-_.]+', '-', s or '').lower(); \
	lacking = {key(s) for s in re.findall(r'(?m)^\w[\w.-]*', sys.stdin.read())} - {key(d.metadata['Name']) for d in m.distributions()}; \
	sys.exit('$(PYTHON) does not have ' + ', '.join(sorted(lacking)) + ': install them there, or leave out PYTHON= to make a .venv.' if lacking else 0)"

product:
	$(call require,cat requirements.txt)
engine:  # without the packages that read data, the parts that need them are skipped
	$(call require,grep -E '^(jax|flax|optax|numpy)>' requirements.txt)
tools: product
	$(call require,$(call extra,test))
interop: tools
	$(call require,$(call extra,export); $(call extra,hub); $(call extra,interop); $(call extra,peers))

else

RUN := .venv/bin/python
REQUIREMENTS := $(shell nvidia-smi >/dev/null 2>&1 && echo requirements-cuda12.txt || echo requirements.txt)

product engine: .venv/.product
tools: .venv/.tools
interop: .venv/.interop

# The stamps are written last, so an installation that was cut off goes on next time.
.venv/.product: requirements.txt $(REQUIREMENTS)
	@for python in python3 python3.13 python3.12 python3.11 python; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then echo "Python 3.11 or newer is needed, and none was found." >&2; exit 1; fi; \
	$$found -m venv .venv || { echo "$$found could not make .venv (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "Installing $(REQUIREMENTS) into .venv: a minute or two the first time."
	@$(call install,.venv,-r $(REQUIREMENTS))
	@touch $@

.venv/.tools: .venv/.product pyproject.toml
	@$(call extra,test) >.venv/test.txt; $(call install,.venv,-r .venv/test.txt)
	@touch $@

# By pip, because uv does not look where a PyTorch for CPUs may be (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL) and takes the one with CUDA,
# several gigabytes, which torchvision's own dependencies ask for, too.
.venv/.interop: .venv/.tools
	@echo "Installing PyTorch for CPUs, timm, transformers, datasets and ONNX Runtime into .venv: a few minutes the first time."
	@{ $(call extra,export); $(call extra,hub); $(call extra,interop); } | $(RUN) -m pip install $(QUIET) -r /dev/stdin
	@$(call extra,peers) | $(RUN) -m pip install $(QUIET) --no-deps -r /dev/stdin
	@touch $@

endif
