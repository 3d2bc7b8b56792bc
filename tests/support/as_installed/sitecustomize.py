"""Python runs this as it starts, in the tests' processes and in every process they begin.

The Kubernetes client imports kubernetes-validate wherever it is installed, which takes longer than the operator and the
CLI take to start. It is a tool of these tests alone: as on a user's machine, it is not there to be found. Neither is
what jsonschema would build a grammar of addresses with, for a second and a half, to check a format that no schema here
asks for.
"""

import sys

for name in ("kubernetes_validate", "rfc3987_syntax"):
    sys.modules[name] = None  # type: ignore[assignment] -- makes `import` raise ImportError
