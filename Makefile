# Everything runs in .venv, which is built once and again whenever the requirements change.
PYTHON ?= python3
BIN := .venv/bin
VISION := .venv-vision

.PHONY: setup train test vision-test lint format notebooks docs bench stress fashion-mnist

setup: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

train: setup  ## make train ARGS="--config configs/images/digits.yaml"
	$(BIN)/python train.py $(ARGS)

test: setup  ## the whole suite, notebooks included
	WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# torchvision beside .venv's packages: merely installed among them it would break Lightning
# wherever its wheel does not match torch.
$(VISION)/.stamp: .venv/.stamp tests/datasets/vision_shim.py
	test -x $(VISION)/bin/python || $(BIN)/python -m venv $(VISION)
	$(VISION)/bin/python -m pip install --quiet --no-deps -c constraints.txt torchvision
	where='import site; print(site.getsitepackages()[0])' && \
	packages=$$($(VISION)/bin/python -c "$$where") && \
	cp tests/datasets/vision_shim.py "$$packages" && \
	{ $(BIN)/python -c "$$where"; echo 'import vision_shim'; } > "$$packages/vision.pth"
	touch $@

vision-test: setup $(VISION)/.stamp  ## our image sets against torchvision itself
	WANDB_MODE=offline OMP_NUM_THREADS=1 $(VISION)/bin/python -m pytest \
		tests/datasets/test_torchvision.py $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: setup
	$(BIN)/python -m pytest notebooks $(ARGS)

docs: setup  ## the documentation as a site, without network
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

bench: setup  ## make bench ARGS="--threads 1"; with a GPU: .venv/bin/python -m benchmarks.gpu
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.orthogonal $(ARGS)
	$(BIN)/python -m benchmarks.per_sample $(ARGS)
	$(BIN)/python -m benchmarks.spline $(ARGS)
	$(BIN)/python -m benchmarks.steps $(ARGS)
	$(BIN)/python -m benchmarks.memory $(ARGS)

stress: setup  ## what the README promises, tried at length: kills, processes, files, numbers
	WANDB_MODE=offline OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.stress $(ARGS)

fashion-mnist:  ## real Fashion-MNIST from Debian's archive, into data/FashionMNIST/raw
	mkdir -p data/FashionMNIST/raw
	cd data && apt-get download dataset-fashion-mnist
	dpkg-deb --fsys-tarfile data/dataset-fashion-mnist_*.deb | tar -x --strip-components=5 \
		-C data/FashionMNIST/raw --wildcards '*-ubyte.gz'
	rm data/dataset-fashion-mnist_*.deb
