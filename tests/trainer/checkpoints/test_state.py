"""What a checkpoint keeps of a run, across versions."""

import json
from pathlib import Path

from finetune_trainer.checkpoints.state import TrainingState


def test_a_state_of_another_version_is_read(tmp_path: Path) -> None:
    TrainingState(step=3, fingerprint="f").save(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_a_later_version": 1}))
    assert TrainingState.load(tmp_path) == TrainingState(step=3, fingerprint="f")
