"""What a run computes with is started when it is needed, once."""

import random
import subprocess
import sys

import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.runtime.device import RuntimeDevice
from finetune_trainer.runtime.start import start_runtime
from finetune_trainer.settings import Ranks


def test_importing_it_does_not_import_torch() -> None:
    modules = "finetune_trainer.runtime.start, finetune_trainer.runtime.distributed, finetune_trainer.run"
    script = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_it_may_be_called_again() -> None:
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base"},
            "dataset": {"train": "s3://data/x"},
            "output": {"uri": "s3://data/out"},
            "resources": {"gpusPerNode": 0},
        }
    )
    drawn = []
    for _ in range(2):
        assert start_runtime(spec, Ranks()) == RuntimeDevice("cpu", torch_name="cpu")
        drawn.append((random.random(), float(torch.rand(()))))
    assert drawn[0] == drawn[1]
