"""What a job can make of its adapter, by the names that spec and status give it."""

from typing import Final, Literal

ArtifactName = Literal["merged", "gguf", "oci", "hf"]
#: `kind` of the manifest.json of each.
MANIFEST_KINDS: Final[dict[str, str]] = {"merged": "Merged", "gguf": "Gguf", "oci": "Adapter", "hf": "Adapter"}
#: The adapter itself, in another place (output.<name>.uri).
COPIES: Final = ("oci", "hf")
