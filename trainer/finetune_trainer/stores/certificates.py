"""Files of certificates that settings name."""

import re
import ssl
from pathlib import Path
from typing import Final

#: What ends so is no secret that was put under the wrong name.
_SHOWN: Final = re.compile(r"[\w./~@+-]{1,400}\.(crt|pem|cer|ca)")


def fault_of(path: str) -> str:
    """Return what must be at `path` and is not, '' where certificates are. Shows nothing that may be a secret."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except (OSError, ValueError):  # ssl.SSLError is an OSError
        must = "the path of a file with certificates in PEM"
        if not _SHOWN.fullmatch(path):
            return must
        return f"{must}: {path} {'has none' if Path(path).exists() else 'does not exist'}"
    return ""
