"""A run that adds tokens: published with its tokenizer, it loads as it is, and one that was stopped ends the same."""

import signal
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api import constants
from finetune_api.exit_codes import ExitCode
from finetune_trainer.model.published import job_of, load_published
from finetune_trainer.settings import Environment, Ranks, Settings
from support.trainer.process import TrainerProcess, job, train

RUN = {
    "dataset.addTokens": ["<yes>", "[/INST]"],
    "lora.embeddings": True,
    "training.maxSteps": 6,
    "training.batchSize": 2,
    "evaluation.onStart": False,
    "evaluation.everySteps": 6,
    "checkpoint.everySteps": 1000,
}


def test_new_tokens_are_published_verified_and_resumed(tiny_model: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    finished = train(job(whole, tiny_model, RUN), whole)
    assert finished.exit_code == 0, finished.log
    assert "2 embeddings are new; each begins as the mean of the" in finished.log
    assert "loaded back with PEFT and computes the same" in finished.log
    config = job(parts, tiny_model, RUN)
    process = TrainerProcess(config, parts)
    process.wait_for('"event": "Step ')
    process.send(signal.SIGTERM)
    assert process.finish().exit_code == ExitCode.PREEMPTED
    finished = train(config, parts)
    assert finished.exit_code == 0, finished.log
    name = "out/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(whole / "out")
    assert len(tokenizer("[/INST]", add_special_tokens=False)["input_ids"]) == 1
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    base.resize_token_embeddings(len(tokenizer))  # as the card says
    adapted = PeftModel.from_pretrained(base, str(whole / "out"))
    table = adapted.get_input_embeddings().weight
    assert table.shape[0] == len(tokenizer)
    first, second = (table[tokenizer.convert_tokens_to_ids(token)] for token in RUN["dataset.addTokens"])
    assert (first - second).abs().max() > 0, "one is in the rows and was trained, both began as the mean"
    card = (whole / "out/README.md").read_text()
    assert "base.resize_token_embeddings(len(tokenizer))" in card
    assert "vllm serve" not in card

    settings = Settings(
        job_of(whole / "out"), Environment.from_env({constants.ENV_SCRATCH_DIR: str(tmp_path)}), Ranks()
    )
    asked = load_published(whole / "out", settings, tmp_path / "chat", "cpu")
    torch.testing.assert_close(asked.model.get_input_embeddings().weight, table, rtol=0, atol=1e-2)
