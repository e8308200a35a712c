"""``python -m coldforge``: the command line."""

from coldforge.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
