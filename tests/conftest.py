"""Fixtures every test may use; each lives in the support module named here."""

import os
from pathlib import Path

# One thread per process: bit-equal results, no contention between workers, safe forks.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported, which transformers and bitsandbytes do too

pytest_plugins = [
    "support.common.levels",
    "support.common.logs",
    "support.stores.hub",
    "support.server.fixtures",
    "support.stores.s3",
]
