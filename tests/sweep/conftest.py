"""Makes ``toy`` importable: here, and in the processes that a sweep starts, which inherit the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
