# make setup    install everything into .venv
# make test     run all tests
# make lint     check style, format and types
# make figures  draw the pictures of README.md and docs/ again, and write their numbers and the lists in runs/audit
# make tour     execute docs/tour.ipynb again
python = .venv/bin/python

.PHONY: setup test lint figures tour

setup:
	python3 -m venv .venv
	.venv/bin/pip install -r requirements-dev.txt

test:
	$(python) -m pytest

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

figures:
	$(python) analyze_errors.py --figures-dir docs/figures --export runs/audit
	$(python) compare.py runs --json docs/figures/frontier.json
	cp figures/frontier.png docs/figures
	$(python) evaluate.py checkpoints/best_*_fmnist.pt checkpoints/*/best_*_fmnist.pt --tta \
	    --json docs/figures/evaluate.json
	$(python) -m analysis.fashion_c

tour: export IPYTHONDIR = .cache/ipython
tour: export JUPYTER_RUNTIME_DIR = .cache/jupyter
tour:
	.venv/bin/jupyter execute --inplace docs/tour.ipynb
