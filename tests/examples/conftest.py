"""The quickstart's modules import one another as a script's do: from their own folder."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
