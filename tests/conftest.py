"""Fixtures every test may use; each lives in the support module named here."""

import os
import runpy
from pathlib import Path

# One thread per process: bit-equal results, no contention between workers, safe forks.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported, which transformers and bitsandbytes do too

# Set before anything imports the Kubernetes client; processes that tests begin inherit it.
_AS_INSTALLED = str(Path(__file__).parent / "support" / "as_installed")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_AS_INSTALLED, os.environ.get("PYTHONPATH")]))
runpy.run_path(f"{_AS_INSTALLED}/sitecustomize.py")

pytest_plugins = [
    "support.common.garbage",
    "support.common.hypothesis_profile",
    "support.common.levels",
    "support.common.logs",
    "support.operator.failure_report",
    "support.stores.hub",
    "support.server.fixtures",
    "support.stores.s3",
]
