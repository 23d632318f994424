# Everything runs in .venv, which is built once and again whenever the requirements change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup train test lint format notebooks bench fashion-mnist

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

train: setup  ## make train ARGS="--config configs/images/digits.yaml"
	$(BIN)/python train.py $(ARGS)

test: setup  ## the whole suite, notebooks included
	WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: setup
	$(BIN)/python -m pytest notebooks $(ARGS)

bench: setup  ## make bench ARGS="--threads 1"; with a GPU: .venv/bin/python -m benchmarks.gpu
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.orthogonal $(ARGS)
	$(BIN)/python -m benchmarks.per_sample $(ARGS)

fashion-mnist:  ## real Fashion-MNIST from Debian's archive, into data/FashionMNIST/raw
	mkdir -p data/FashionMNIST/raw
	cd data && apt-get download dataset-fashion-mnist
	dpkg-deb --fsys-tarfile data/dataset-fashion-mnist_*.deb | tar -x --strip-components=5 \
		-C data/FashionMNIST/raw --wildcards '*-ubyte.gz'
	rm data/dataset-fashion-mnist_*.deb
