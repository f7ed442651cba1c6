"""Lets these tests use the small receiver of the attach tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "attach"))
