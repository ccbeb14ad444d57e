"""`python -m vlcache_jax`: the command line."""

import sys

if __name__ == "__main__":
    try:
        from vlcache_jax.cli.main import main
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(main())
