"""What a start waits for while the interpreter is idle, begun in threads before it is needed.

Nothing is decided here, and nothing that fails here counts: whoever needs it does it again, and tells what is wrong.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

#: What kernels that were compiled before are found by, and where: torch's sources, and Triton's with its 460 MB of
#: LLVM. Without torch's wrapper around Triton's, for our own kernels ask Triton.
_KEYS: Final = {"torch._inductor.codecache": "torch_key", "torch._inductor.runtime.triton_compat": "triton_key"}


def begin(work: Callable[[], object]) -> threading.Thread:
    """Do `work` in a thread, for which a process that ends does not wait."""

    def quietly() -> None:
        with suppress(Exception):
            work()

    thread = threading.Thread(target=quietly, name="early", daemon=True)
    with suppress(RuntimeError):  # a pod has a limit of threads, too
        thread.start()
    return thread


def hash_compilers() -> list[threading.Thread]:
    """Begin to hash torch and Triton, once they are imported: which both do before they look for a compiled kernel."""
    modules = ((sys.modules.get(module), name) for module, name in _KEYS.items())
    return [begin(key) for module, name in modules if (key := getattr(module, name, None))]
