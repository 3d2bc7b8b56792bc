"""Tell which spec an attempt runs.

Kubernetes lets a spec change until an attempt is recorded in the status, and the Job exists a moment before that. A
change in between, or while the operator is down, would leave an attempt that runs the old spec.
"""

import hashlib
import json

from finetune_api.spec import IMMUTABLE, FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus
from finetune_operator.core.objects.observed import Child

#: Kept as the attempt's message, so that later reconciles recognize it.
SUPERSEDED = "the spec was changed before this attempt was recorded"


def revision_of(spec: FineTuneJobSpec) -> str:
    """Return a hash of the part of a spec that cannot change once an attempt is recorded."""
    found = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    kept = {section: found.get(section) for section in IMMUTABLE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def is_superseded(child: Child, status: FineTuneJobStatus, spec: FineTuneJobSpec) -> bool:
    """Return whether `child` runs another spec; False for recorded attempts.

    A later version of this operator may read another spec from the same manifest.
    """
    return not status.attempts and child.revision not in ("", revision_of(spec))
