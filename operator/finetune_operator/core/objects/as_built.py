"""Tell a Service or NetworkPolicy that we built from one that only carries its name and our owner reference."""

from finetune_operator.core.objects import raw
from finetune_operator.core.objects.raw import Raw


def changed_fields(built: Raw, found: Raw) -> list[str]:
    """Return the fields of its spec that are not as built.

    We set each field that matters, so what the API server adds is not compared.
    """
    spec = raw.mapping(found, "spec")
    return [f"spec.{field}" for field, value in raw.mapping(built, "spec").items() if spec.get(field) != value]
