"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of two layers and its tokenizer."""
    from support.trainer.tiny_model import build_model

    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-MoE of two layers with eight experts, and its tokenizer."""
    from support.trainer.tiny_model import build_model

    return build_model(tmp_path_factory.mktemp("experts"), experts=8)
