# Two commands do all the set-up: `make demo` and `make test`. Each makes its virtual environment if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= vrwkv
KERNELS := $(wildcard kernels/*.h kernels/*.cuh kernels/*/*) setup.py pyproject.toml
# Without a GPU in sight, CUDA code is only compiled to see that it compiles, for one architecture.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
install demo-detection demo-segmentation test test-demos test-slow test-kills attack sanitize lint docs bench: export TORCH_CUDA_ARCH_LIST ?= 9.0
install-classification demo: export VISION_RWKV_CUDA ?= 0
endif
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: install install-classification demo demo-detection demo-segmentation test test-demos test-slow test-kills attack sanitize lint docs bench zoo wheel clean

## What each task needs -------------------------------------------------------------------------------------------

$(VENV)/.torch: requirements/torch.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -q -r requirements/torch.txt
	touch $@

# A build with CUDA code serves as well where one without would do.
$(VENV)/.native-demo: $(VENV)/.torch $(KERNELS)
	$(PIP) -q --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/.native: $(VENV)/.torch $(KERNELS)
	$(PIP) -q --no-build-isolation --no-deps -e .
	touch $@ $(VENV)/.native-demo

$(VENV)/.classification: $(VENV)/.torch requirements/classification.txt tools/install_mmcv.sh
	$(PIP) -q -r requirements/classification.txt
	tools/install_mmcv.sh $(BIN)/python without-ops
	touch $@

$(VENV)/.all: $(VENV)/.torch requirements/all.txt requirements/classification.txt requirements/docs.txt tools/install_mmcv.sh
	$(PIP) -q -r requirements/all.txt
	tools/install_mmcv.sh $(BIN)/python with-ops
	touch $@ $(VENV)/.classification

install: $(VENV)/.all $(VENV)/.native  ## everything: all tasks, the tests, native operators

install-classification: $(VENV)/.classification $(VENV)/.native-demo  ## classification alone: nothing to compile but our CPU code

## What people run ------------------------------------------------------------------------------------------------

demo: install-classification  ## train and test a small classifier on handwritten digits; MODEL=vrwkv6 for the other one
	tools/demo.sh $(BIN)/python $(MODEL)

demo-detection: install  ## find digits in cluttered scenes, minutes
	tools/demo_dense.sh $(BIN)/python detection

demo-segmentation: install  ## label their pixels, a quarter of an hour at most
	tools/demo_dense.sh $(BIN)/python segmentation

test: install  ## the test suite, two files of it at a time
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile

test-demos: install  ## the smallest versions of the demos of detection and segmentation, minutes
	$(BIN)/python -m pytest -m slow tests/tools/test_dense_readmes.py -k smallest_demo

test-slow: install  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

attack: install  ## 20,000 random cases for Bi-WKV and WKV6, 4,000 for the others; on a GPU as many again
	$(BIN)/python -m pytest tests/ops/test_attack.py tests/ops/test_attack_fused.py --attack 20000

sanitize: install  ## tests of native code on a build that checks every address and every undefined operation, minutes
	tools/sanitize.sh $(BIN)/python cpu

test-kills: install  ## training killed twenty times at random moments, resumed, and compared with a run left alone; 20 minutes
	$(BIN)/python tests/tools/killing.py --kills 20

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard kernels/*.h kernels/*.cuh kernels/*/*.h kernels/*/*.cpp kernels/*/*.cu kernels/*/*.cuh)

docs: install  ## the site, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict  # says at length that MkDocs 2 will differ; 1.6 is pinned

bench: install
	$(BIN)/python tools/benchmark_ops.py

zoo: install  ## the published models: params and FLOPs counted anew, the tables made anew
	$(BIN)/python tools/get_flops.py --zoo
	$(BIN)/python tools/zoo.py

wheel: $(VENV)/.torch  ## a wheel with native code for every supported GPU, where nvcc is found
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0;8.6;8.9;9.0;12.0+PTX}" $(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

clean:
	rm -rf build dist *.egg-info vision_rwkv/_native*.so
