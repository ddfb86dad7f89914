# The commands of a day's work. `just` without a recipe lists them; `pip install -r requirements.txt` brings `just`.

_list:
    @just --list --unsorted

# Linter, format, types and import order
check:
    ruff check .
    ruff format --check .
    mypy
    lint-imports

# The quick tests, or some of them: just test tests/data -k sampling
test *arguments:
    python -m pytest {{ arguments }}

# The tests that take minutes, and more examples of those that draw theirs
slow *arguments:
    HYPOTHESIS_PROFILE=thorough python -m pytest -m "slow or hypothesis" -n 2 --timeout=1200 {{ arguments }}

# The share of lines that the quick tests run, in the processes that they start too
coverage:
    coverage erase
    coverage run -m pytest
    coverage combine --quiet
    coverage report

# The documentation, into site/
docs:
    mkdocs build --strict

# A small CLIP trained from random weights on drawn actions, in a minute on two cores
demo:
    python scripts/train.py --config=configs/demo.py --workdir=runs/demo

# All that CI does, in a fresh environment
ci:
    .ci/run
