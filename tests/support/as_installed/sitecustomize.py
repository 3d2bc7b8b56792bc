"""Python runs this as it starts, in the tests' processes and in every process they begin.

The Kubernetes client imports kubernetes-validate wherever it is installed, which takes longer than the operator and the
CLI take to start. It is a tool of these tests alone: as on a user's machine, it is not there to be found.
"""

import sys

sys.modules["kubernetes_validate"] = None  # type: ignore[assignment] -- makes `import` raise ImportError
