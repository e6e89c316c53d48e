# The commands that people run. `just` without an argument lists them; see https://just.systems.

_list:
    @just --list

# Install adam_jax, editable, with what tests and checks need
setup:
    pip install -e ".[test,dev]"

# Run the tests: `just test`, or e.g. `just test tests/storage -k int8`
test *args:
    pytest {{ args }}

# Check style, types, and spelling
lint:
    ruff check .
    ruff format --check .
    pyright
    codespell

# Rewrite what is generated: formatting, exports, the catalogue's table, pictures
write:
    ruff check --fix .
    ruff format .
    python tools/exports.py
    python tools/house.py
    python -m benchmarks.picture

# Build the documentation site in build/site; `just docs serve` shows it while you write
docs command="build":
    NO_MKDOCS_2_WARNING=1 mkdocs {{ command }} --strict

# Check kernels on this machine's GPU, and measure them: under twenty minutes
gpu:
    pytest -m gpu tests/backends
    python -m benchmarks.gpu

# Run all of CI in fresh virtual environments
ci *runs:
    bash .ci/run {{ runs }}
