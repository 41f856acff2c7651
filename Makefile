# make demo: the main job end to end on real text.  make minipuzzle: a compression end to end.  make vision: a RADIO on real photographs.
# make test: every default test, in two processes of one thread each.
# All make their own environment in .venv from setup.py's pins; PYTHON chooses the interpreter (3.10 to 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo minipuzzle vision test test-slow lint clean

demo: $(VENV)/installed
	$(BIN)/python examples/quickstart/demo.py

minipuzzle: $(VENV)/installed
	$(BIN)/python -m examples.minipuzzle.demo

vision: $(VENV)/installed
	$(BIN)/python examples/radio/demo.py

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -m slow

$(VENV)/installed: setup.py
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[cpu,logging,huggingface,serve,evaluate,minipuzzle,vision,test]"
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
