"""The kinds of artifacts, one module each. Code behind them sees an Artifact, never its kind."""

from typing import Final

from finetune_trainer.publishing.artifact import Artifact
from finetune_trainer.publishing.artifacts.adapter import AdapterArtifact
from finetune_trainer.publishing.artifacts.gguf import GgufArtifact
from finetune_trainer.publishing.artifacts.merged import MergedArtifact

#: Every artifact by its kind in manifest.json.
ARTIFACTS: Final[dict[str, Artifact]] = {
    each.kind: each for each in (AdapterArtifact(), MergedArtifact(), GgufArtifact())
}
