"""`python -m vlcache_jax`: the command line."""

import sys

from vlcache_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
