"""Fixtures of the trainer's tests."""

import os
from pathlib import Path

import pytest

# One thread per process: bit-equal results, no contention between workers, safe forks.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported, which transformers and bitsandbytes do too


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of two layers and its tokenizer."""
    from support.trainer.tiny_model import build_model

    return build_model(tmp_path_factory.mktemp("model"))
