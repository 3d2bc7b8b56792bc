"""Tell which spec an attempt runs.

Kubernetes lets a spec change until an attempt is recorded in the status, and the Job exists a moment before that. A
change in between, or while the operator is down, would leave an attempt that runs the old spec. The image alone may
change for longer, until a pod has run: a typo in it keeps every pod from that.
"""

import hashlib
import json

from finetune_api.spec import IMMUTABLE, FineTuneJobSpec
from finetune_operator.core.objects.observed import Child

#: Kept as the attempt's message, so that later reconciles recognize it.
SPEC_SUPERSEDED = "the spec was changed before this attempt was recorded"
IMAGE_SUPERSEDED = "spec.image was changed before this attempt was known to run"


def revision_of(spec: FineTuneJobSpec) -> str:
    """Return `<hash>-<hash of the image>` of the part of a spec that cannot change once an attempt is recorded."""
    found = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    kept = {section: found.get(section) for section in IMMUTABLE}
    return f"{_hash(json.dumps(kept, sort_keys=True))}-{_hash(spec.image or '')}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def why_superseded(child: Child, spec: FineTuneJobSpec) -> str | None:
    """Return why `child`, a recorded attempt's, runs another spec than the job's; None when it does not.

    Only the images are compared: a later version of this operator may read another spec from the same manifest, and
    earlier ones noted no image.
    """
    image, now = child.revision.partition("-")[2], revision_of(spec).partition("-")[2]
    return IMAGE_SUPERSEDED if image not in ("", now) else None
