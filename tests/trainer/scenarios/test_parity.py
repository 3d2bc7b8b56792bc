"""A run has the losses of TRL's own loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_trainer.data.batching import Steps
from finetune_trainer.model.adapter import load_adapter_weights, save_adapter
from finetune_trainer.model.weights import keep_weights_trainable
from support.trainer.process import job, metrics_lines, train


def test_a_run_has_the_losses_of_trl(tiny_model: Path, tmp_path: Path) -> None:
    """The same rows in the same order through TRL's own loop: padded, its own loss, transformers' own batches."""
    steps = 24
    changes = {
        "training.maxSteps": steps,
        "training.precision": "fp32",
        "training.optimizer": "adamw_torch",
        "lora.dropout": 0.0,
        "quantization": {"computeDtype": "float32"},
        "dataset.eval": None,
        "checkpoint.everySteps": 1000,
    }
    changes |= {"lora.initFrom": f"file://{_first_adapter(tmp_path / 'first', tiny_model)}"}
    found = {}
    for packing in ("enabled", "disabled"):
        config = job(tmp_path / packing, tiny_model, changes | {"training.packing": packing})
        finished = train(config, tmp_path / packing)
        assert finished.exit_code == 0, finished.log
        found[packing] = [line["loss"] for line in metrics_lines(tmp_path / packing / "out") if "loss" in line]
    expected = _losses_of_trl(tmp_path / "enabled", tiny_model, tmp_path / "first", steps)
    assert len(expected) == steps and expected[-1] < 0.97 * expected[0]
    for losses in found.values():
        assert losses == pytest.approx(expected, rel=2e-4)


LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "task_type": "CAUSAL_LM",
}


def _first_adapter(folder: Path, tiny_model: Path) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), LoraConfig(**LORA))
    save_adapter(model, folder)
    return folder


def _order(ids: list[list[int]], epoch: int) -> list[int]:
    """The rows in the order in which they are trained on: of steps of one row each, those of an epoch."""
    steps = Steps([len(row) for row in ids], batch_size=1, world=1, micro_batch=1, seed=42, packed=False)
    return [row for micro_batches in steps.epoch(epoch) for ranks in micro_batches for rows in ranks for row in rows]


def _losses_of_trl(folder: Path, tiny_model: Path, adapter: Path, steps: int) -> list[float]:
    import datasets
    from peft import prepare_model_for_kbit_training
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), cache_dir=folder / "hf")["train"]
    ids = tokenizer(list(rows["text"]))["input_ids"]
    order = [row for epoch in range(steps) for row in _order(ids, epoch)]
    ordered = datasets.Dataset.from_list([{"input_ids": [*ids[row], tokenizer.eos_token_id]} for row in order])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization, dtype=torch.float32)
    keep_weights_trainable(base)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.01,
        lr_scheduler_type="cosine", warmup_steps=0.03, weight_decay=0.01, max_length=128, logging_steps=1,
        optim="adamw_torch", use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip

    class InOrder(SFTTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(ordered)

    tokenizer.pad_token = tokenizer.unk_token
    trainer = InOrder(
        model=prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), args=arguments,
        train_dataset=ordered, processing_class=tokenizer, peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL rounds them to bfloat16
            parameter.data = parameter.data.float()
    load_adapter_weights(trainer.model, adapter)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]
