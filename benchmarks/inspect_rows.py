"""How long `finetune inspect` takes for many rows, and how much memory.

    python benchmarks/inspect_rows.py [--rows 1000000] [--tokens 300] [--model FOLDER]

Writes rows of random words, inspects them in a process of its own, and prints seconds, processor seconds and memory.
Without --model, a byte-level BPE tokenizer of 8,000 tokens is trained on the words first.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--model", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = _words()
        model = asked.model or _model(folder / "model", words)
        data = _rows(folder / "rows.jsonl", words, asked.rows, asked.tokens)
        began = time.monotonic()
        command = [
            str(Path(sys.executable).with_name("finetune")),
            "inspect",
            str(data),
            "--model",
            str(model),
            "-o",
            "json",
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    [split] = json.loads(done.stdout)["splits"]
    print(f"{split['rows']} rows of {split['tokens'] / split['rows']:.0f} tokens")
    print(f"{seconds:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time, {used.ru_maxrss / 2**20:.2f} GiB")


def _words() -> list[str]:
    generator = random.Random(0)
    letters = "etaoinshrdlcumwfgypbvk"
    return ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(6000)]


def _model(folder: Path, words: list[str]) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(words)] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def _rows(path: Path, words: list[str], rows: int, tokens: int) -> Path:
    generator = random.Random(1)
    with path.open("w") as file:
        for _ in range(rows):
            said = " ".join(generator.choices(words, k=round(tokens / 1.94)))
            file.write(json.dumps({"prompt": said[: len(said) // 2], "completion": said[len(said) // 2 :]}) + "\n")
    return path


if __name__ == "__main__":
    main()
