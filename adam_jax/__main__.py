"""Run the command line: `python -m adam_jax`."""

import sys

from adam_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
