# make demo         pretrain on handwritten digits and see what it was worth (CPU, minutes)
# make ablations    see how the paper's core ablations fail, on the digits (CPU, minutes)
# make test         run the tests
# make faults       kill runs, damage files, and see that nothing is lost (CPU, minutes)
# make test-classic run a part of them on the original distributions, in VENV .venv-classic;
#                   PYTHON=python3.10 PINS="torch==2.4.1 torchvision==0.19.1 numpy==1.26.4" fits, too
# make test-oldest  run a part of them with the oldest libraries that nepa_mm/compat/stack.py allows, in
#                   VENV .venv-oldest
# make test-pythons a smaller part on each of PYTHONS, in .venv-python3.10 and so on
# make lint         check the style
# JOBS test files run at a time.
# Each first installs what it needs into VENV, once; PYTHON makes VENV when there is none.
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

.PHONY: demo ablations test test-classic test-oldest test-pythons faults lint
demo: $(INSTALLED)
	$(PY) demo/digits.py

ablations: $(INSTALLED)
	$(PY) demo/ablations.py

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile $(TESTS)

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

# torch and torchvision come in one resolution, so that pip finds a pair. opencv-python, which the
# mm packages ask for, needs libGL; where that is missing the headless build takes its place.
$(INSTALLED): setup.py pyproject.toml nepa_mm/compat/stack.py
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	  "nepa_mm needs Python >= 3.10, $(PYTHON) is %s; name another: make PYTHON=python3.11" \
	  % sys.version.split()[0])'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install -e '.[$(EXTRAS)]' $(PINS)
	$(PY) -c 'import cv2' || { $(PY) -m pip uninstall -y opencv-python && \
	  $(PY) -m pip install --force-reinstall --no-deps opencv-python-headless; }
	touch $@
