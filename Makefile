# Longstride's front door: `make train` trains, `make test` tests; both build the environment they need first.
#
#   make train [ARGS="train.steps=50"]    environment, then the quickstart
#   make test  [ARGS="-k prefix"]         environment with test tools, then every test
#   make test-full                        with the long ones, but those of `make soak`
#   make soak                             faults at length: thirty kills, lost nodes, cut links, the resume matrix
#   make test-s3                          the store's faults against a real S3 server (Ceph's, from Debian's packages)
#   make test-slurm                       infra's Slurm script on a real Slurm (Debian's packages, as root)
#   make test-gpu | bench-gpu             kernels on a GPU: their tests; their times beside peers
#   make lint | env | bench | constraints | clean
#
# Stamp files inside .venv remember what is installed, so a second call goes straight to work.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
TORCH := 2.13.0
ARGS ?=
# pytest's exit code when ARGS leave it nothing to run
NONE_SELECTED := 5

# One thread per process: the tests and the workers run several processes on a few cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help train env test test-full test-gpu test-s3 test-slurm soak lint constraints bench bench-gpu clean
help:
	@sed -n 's/^#   //p' Makefile

train: $(VENV)/.runtime
	$(BIN)/longstride train configs/quickstart.yaml $(ARGS)

env: $(VENV)/.development

# Most tests two at a time, by file; then those that want the cores for themselves (Ray, real servers, times).
test: $(VENV)/.development
	$(BIN)/python -m pytest -m "not slow and not soak and not alone" -n 2 --dist loadfile $(ARGS) || [ $$? -eq $(NONE_SELECTED) ]
	$(BIN)/python -m pytest -m "not slow and not soak and alone" $(ARGS) || [ $$? -eq $(NONE_SELECTED) ]

test-full: $(VENV)/.development
	$(BIN)/python -m pytest -m "not soak" $(ARGS)

# Every long test of faults, for half an hour or more; they print what they found.
soak: $(VENV)/.development
	$(BIN)/python -m pytest -m soak -s $(ARGS)

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# The pins of everything this environment holds; torch itself is pinned in pyproject.toml and above, because its builds differ.
constraints: $(VENV)/.development
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^torch==' > constraints.txt

bench: $(VENV)/.development
	$(BIN)/python -m benchmarks.kernels_cpu $(ARGS)

# As root on Debian first: apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common radosgw
test-s3: $(VENV)/.development
	LONGSTRIDE_TEST_S3=ceph $(BIN)/python -m pytest -s $(addprefix tests/faults/test_,store.py commit.py shards.py \
		multipart.py outage.py gateway.py) tests/data/test_s3.py $(ARGS)

# As root on Debian first: apt-get install --no-install-recommends slurm-wlm
test-slurm: $(VENV)/.development
	$(BIN)/python -m pytest -s tests/infra/test_slurm_cluster.py $(ARGS)

# The Triton kernels natively, where a GPU is: outputs and gradients in float32 and bfloat16, tensors above 2^31 elements.
# Processes compile side by side; tests that take most of the memory stay in one of them.
test-gpu: $(VENV)/.development
	$(BIN)/python -m pytest tests/kernels -k "triton or native" -m "not slow" -n 4 --dist loadgroup $(ARGS)

bench-gpu: $(VENV)/.development
	$(BIN)/python -m benchmarks.kernels_gpu $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "longstride: no $(PYTHON) here: install Python 3.11 or newer, or name one with 'make PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "longstride: $(PYTHON) is $$($(PYTHON) -V), 3.11 or newer is needed: name one with 'make PYTHON=...'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "longstride: $(PYTHON) cannot make virtual environments: install its venv package (Debian: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without an NVIDIA GPU the small CPU build is enough; where pip cannot find it, the default build serves as well.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@if ! nvidia-smi -L 2>/dev/null | grep -q GPU && $(PIP) install -c constraints.txt 'torch==$(TORCH)+cpu' 2>/dev/null; \
	then echo "torch $(TORCH) (CPU build) installed"; \
	else echo "installing torch $(TORCH) ..." && $(PIP) install -c constraints.txt 'torch==$(TORCH)'; fi
	@touch $@

$(VENV)/.runtime: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing what training needs ..."
	@$(PIP) install -c constraints.txt -e .
	@touch $@

# One call for everything: s3fs and moto agree on a botocore only when solved together.
$(VENV)/.development: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "installing what training and testing need ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.runtime $@
