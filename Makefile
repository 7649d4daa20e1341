# make demo         pretrain on handwritten digits and measure the benefit (CPU, minutes)
# make study        pretrain NEPA and MAE on Fashion-MNIST and repeat the paper's ablations (CPU, hours;
#                   continues where it stopped); QUICK=1 takes minutes
# make ablations    run the paper's core ablations on the digits (CPU, minutes)
# make test         run the tests
# make faults       kill runs, damage files, and check that nothing is lost (CPU, minutes)
# make test-classic run some tests on the original distributions, in VENV .venv-classic; also
#                   supports PYTHON=python3.10 PINS="torch==2.4.1 torchvision==0.19.1 numpy==1.26.4"
# make test-oldest  run some tests with the oldest libraries that nepa_mm/compat/stack.py allows, in
#                   VENV .venv-oldest
# make test-pythons run fewer tests on each of PYTHONS, in .venv-python3.10 and so on
# make lint         check the style
# JOBS is the number of tests that run in parallel.
# Every target first creates VENV with PYTHON if it is missing, and installs requirements once.
VENV ?= .venv
PYTHON ?= python3
EXTRAS ?= mm,test,export
PINS ?=
JOBS ?= 2
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
OLDEST = parity augment recipes classification segmentation tools stack
CLASSIC = parity nepa optim ema checkpoint reliability guard classification segmentation stack
PY = $(VENV)/bin/python
INSTALLED = $(VENV)/.nepa_mm

.PHONY: demo study ablations test test-classic test-oldest test-pythons faults lint
demo: $(INSTALLED)
	$(PY) demo/digits.py

study: $(INSTALLED)
	$(PY) demo/study.py $(if $(QUICK),--quick)

ablations: $(INSTALLED)
	$(PY) demo/ablations.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(TESTS)

test-classic:
	$(MAKE) test VENV=.venv-classic EXTRAS=openmmlab,test TESTS='$(CLASSIC:%=tests/test_%.py)'

test-oldest:
	$(MAKE) test VENV=.venv-oldest EXTRAS=mm,test PINS="$$($(PYTHON) nepa_mm/compat/stack.py)" \
	  TESTS='$(OLDEST:%=tests/test_%.py)'

test-pythons:
	for python in $(PYTHONS); do $(MAKE) test PYTHON=$$python VENV=.venv-$${python##*/} \
	  TESTS='tests/test_parity.py tests/test_stack.py tests/test_tools.py' || exit 1; done

faults: $(INSTALLED)
	$(PY) -m tests.faults

lint: $(INSTALLED)
	$(PY) -m ruff check .

# One pip call resolves torch and torchvision to a matching pair. The mm packages require
# opencv-python, which needs libGL; without libGL the headless build replaces it.
$(INSTALLED): setup.py pyproject.toml nepa_mm/compat/stack.py
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	  "nepa_mm needs Python >= 3.10, $(PYTHON) is %s; choose one: make PYTHON=python3.11" \
	  % sys.version.split()[0])'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install -e '.[$(EXTRAS)]' $(PINS)
	$(PY) -c 'import cv2' || { $(PY) -m pip uninstall -y opencv-python && \
	  $(PY) -m pip install --force-reinstall --no-deps opencv-python-headless; }
	touch $@
