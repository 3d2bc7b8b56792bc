"""How long a merge of a 7B model takes on this machine's processors, and how much memory.

    python benchmarks/merge.py FOLDER [--layers 32] [--bits 16] [--threads 1] [--gguf q8_0]

Writes a checkpoint of Mistral-7B-v0.3's shape with random weights to FOLDER (14.5 GB, kept if it is there), and an
adapter of the recipe; merges them in a process of its own into FOLDER/merged (14.5 GB), or into a GGUF file there,
which is then compared with the merged weights; prints seconds and memory.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

SHARD_LAYERS = 4


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--bits", type=int, default=16, choices=(4, 8, 16))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gguf", choices=("f16", "q8_0", "q4_0"))
    parser.add_argument("--merge", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.merge:
        merge(asked.folder, asked.bits, asked.gguf)
        return
    if not (asked.folder / "config.json").exists():
        build(asked.folder, asked.layers)
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(asked.threads)}
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--merge"], env=environment, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{asked.bits} bits, {asked.threads} threads: {time.monotonic() - began:.0f} s with the imports,", end=" ")
    print(f"{used.ru_utime + used.ru_stime:.0f} s of processor time; peak of memory {used.ru_maxrss / 2**20:.2f} GiB")


def spec(folder: Path, bits: int) -> "object":
    from finetune_api.spec import FineTuneJobSpec

    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{folder.absolute()}"},
            "dataset": {"train": "file:///rows.jsonl"},
            "output": {"uri": "file:///out", "artifacts": ["merged"]},
            "quantization": {"bits": bits},
        }
    )


def merge(folder: Path, bits: int, quantization: str | None) -> None:
    import torch

    from finetune_trainer.inputs import ModelFiles
    from finetune_trainer.model.base import inspect_base_model
    from finetune_trainer.publishing.merging import Merger, write_shards

    wanted = spec(folder, bits)
    base = inspect_base_model(ModelFiles(folder, None), wanted)
    target = folder / "merged"
    target.mkdir(exist_ok=True)
    began = time.monotonic()
    if not quantization:
        size = write_shards(Merger(folder, folder / "adapter", base, wanted), target)
        print(f"merged {size / 1e9:.1f} GB in {time.monotonic() - began:.0f} s")
        return
    from finetune_trainer.publishing.gguf.convert import compare_gguf, write_gguf
    from finetune_trainer.publishing.gguf.vocabulary import vocabulary_of

    file, exact = target / "model.gguf", torch.float32
    merger = Merger(folder, folder / "adapter", base, wanted, dtype=exact)
    size = write_gguf(merger, base, vocabulary_of(base.tokenizer, base.config.vocab_size), "7b", quantization, file)
    print(f"{quantization}: {size / 1e9:.1f} GB in {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    compare_gguf(Merger(folder, folder / "adapter", base, wanted, dtype=exact), base, file, "hand")
    print(f"compared with the merged weights in {time.monotonic() - began:.0f} s")


def build(folder: Path, layers: int) -> None:
    """Write the checkpoint a few layers at a time, so that building takes little memory."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast

    from finetune_trainer.inputs import ModelFiles
    from finetune_trainer.model.base import inspect_base_model

    folder.mkdir(parents=True, exist_ok=True)
    config = MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_key_value_heads=8,
        num_attention_heads=32, head_dim=128, sliding_window=None, rope_theta=1e6,
    )  # fmt: skip
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(each.shape) for name, each in skeleton.state_dict().items()}
    torch.manual_seed(0)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        number = name.split(".")[2] if name.startswith("model.layers.") else ""
        groups.setdefault(f"{int(number) // SHARD_LAYERS:02}" if number else "rest", []).append(name)
    for group, names in groups.items():
        weights = {name: (torch.randn(shapes[name]) * 0.02).to(torch.bfloat16) for name in names}
        save_file(weights, folder / f"model-{group}.safetensors", {"format": "pt"})
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a tokenizer of bytes, and hardly more"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    config.save_pretrained(folder)
    base = inspect_base_model(ModelFiles(folder, None), spec(folder, 16))
    (folder / "adapter").mkdir(exist_ok=True)
    adapter = {name: torch.randn(shape) * 0.01 for name, shape in base.tensors.items()}
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
