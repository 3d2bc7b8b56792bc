"""Measure the trainer on one GPU, and on two, beside TRL's own loop, and its memory prediction beside the peak.

    python benchmarks/gpu/reference.py build /tmp/mistral7b     # random weights of Mistral-7B-v0.3's shape, 14.5 GB
    python benchmarks/gpu/reference.py build /tmp/llama3 llama-3-8b    # another shape
    python benchmarks/gpu/trainer.py /tmp/mistral7b engine      # what the trainer chooses for GPUs of several sizes
    python benchmarks/gpu/trainer.py /tmp/mistral7b losses      # 100 steps of the fast path beside the plain one
    python benchmarks/gpu/trainer.py /tmp/mistral7b fp8         # training.precision: fp8 beside bf16
    python benchmarks/gpu/trainer.py /tmp/mistral7b peers       # beside TRL and Unsloth, each at its fastest
    python benchmarks/gpu/trainer.py /tmp/mistral7b long        # the same with rows of up to 2,048 tokens
    python benchmarks/gpu/trainer.py /tmp/mistral7b speed       # the recipe, and TRL's best setting, each beside TRL
    python benchmarks/gpu/trainer.py /tmp/mistral7b memory      # predicted and measured peak of many settings
    python benchmarks/gpu/trainer.py /tmp/qwen3-moe moe         # a mixture of experts, built first where it is missing
    python benchmarks/gpu/trainer.py /tmp/mistral7b answers     # an evaluation with 200 answers of 256 tokens
    python benchmarks/gpu/trainer.py /tmp/mistral7b two-gpus    # two GPUs beside one, with whole and shared-out weights

Speed is in real tokens per second after warm-up; compare figures of one run only. Each line printed is `RESULT {json}`.
Words after the table's name pick settings whose name begins with one of them: `engine whole 24`.
Unsloth wants an older TRL than ours: install it in an environment of its own, and name its interpreter in
UNSLOTH_PYTHON; without, `peers` and `long` pass over it.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = Path(sys.argv[1]).resolve()
GIB = 2**30
#: Without the engine: rows padded, layers as transformers runs them, 4-bit weights dequantized in every pass.
PLAIN = [
    "training.packing=disabled",
    "training.compile=disabled",
    "quantization.cachedLayers=0",
    "model.attention=sdpa",
]
RECIPE = [*PLAIN, "training.microBatchSize=4", "training.gradientCheckpointing=enabled"]
#: GiB the trainer may believe the GPU to have; 0: what it has. The engine's choices do the rest.
ENGINE = (0, 80, 40, 24, 8)
#: What TRL and Unsloth are fastest with: all rows at once, nothing recomputed.
FASTEST = {"bs": 16, "ga": 1, "gc": False}
SPEED = {
    "recipe": (RECIPE, {}),
    "batch 16, no checkpointing": (
        [*PLAIN, "training.microBatchSize=16", "training.gradientCheckpointing=disabled"],
        FASTEST,
    ),
}
#: By length of rows; those of 2,048 tokens would take TRL more memory than there is.
TRL = {512: FASTEST, 2048: FASTEST | {"gc": True}}
UNSLOTH = (FASTEST, FASTEST | {"dropout": 0})
MEMORY = {
    "micro-batch 4, checkpointing": RECIPE,
    "micro-batch 16, checkpointing": [*PLAIN, "training.microBatchSize=16", "training.gradientCheckpointing=enabled"],
    "micro-batch 1": [*PLAIN, "training.microBatchSize=1", "training.gradientCheckpointing=disabled"],
    "micro-batch 4": [*PLAIN, "training.microBatchSize=4", "training.gradientCheckpointing=disabled"],
    "micro-batch 8": [*PLAIN, "training.microBatchSize=8", "training.gradientCheckpointing=disabled"],
    "packed, all cached": ["training.microBatchSize=16"],
    "packed, half cached, a quarter recomputed": [
        "training.microBatchSize=8",
        "quantization.cachedLayers=16",
        "training.gradientCheckpointing=8",
    ],
    "packed, nothing cached, checkpointing": [
        "training.microBatchSize=16",
        "quantization.cachedLayers=0",
        "training.gradientCheckpointing=enabled",
    ],
    "packed, selective": ["training.microBatchSize=16", "training.gradientCheckpointing=selective"],
    "packed, every layer": ["training.microBatchSize=8", "lora.targetModules=[all-linear]"],
    "packed, no dropout": ["training.microBatchSize=8", "lora.dropout=0"],
    "packed, not compiled": ["training.microBatchSize=8", "training.compile=disabled"],
    "micro-batch 8, 256 tokens": [
        *PLAIN,
        "training.microBatchSize=8",
        "training.maxLength=256",
        "training.gradientCheckpointing=disabled",
    ],
    "batch 32, checkpointing": [
        *PLAIN,
        "training.batchSize=32",
        "training.microBatchSize=32",
        "training.gradientCheckpointing=enabled",
    ],
    "16 bits, checkpointing": ["quantization.bits=16", *RECIPE],
    "8 bits, checkpointing": ["quantization.bits=8", *RECIPE],
    "single quantization": ["quantization.doubleQuant=false", *RECIPE],
    "rank 64, all linear, checkpointing": ["lora.rank=64", "lora.targetModules=[all-linear]", *RECIPE],
    "all linear, micro-batch 2": [
        *PLAIN,
        "lora.targetModules=[all-linear]",
        "training.microBatchSize=2",
        "training.gradientCheckpointing=disabled",
    ],
    "fp32 step, checkpointing": ["training.precision=fp32", *RECIPE],
    "torch AdamW, checkpointing": ["training.optimizer=adamw_torch_fused", *RECIPE],
}
TWO_GPUS = ["training.batchSize=32", "training.microBatchSize=16"]
#: The trainer, made to believe that no GPU can hold a whole copy of the weights.
SHARDED = """
from finetune_trainer.planning import layout_search
fitting = layout_search.LayoutSearch._fitting
layout_search.LayoutSearch._fitting = lambda case, shape, sharded: fitting(case, shape, sharded) if sharded else []
from finetune_trainer.cli import cli
cli()
"""
#: The trainer with answers from transformers' own `generate`.
GENERATE = """
from finetune_trainer.evaluation import generation
init = generation.AnswerGenerator.__init__
def plainly(self, *args, **options):
    init(self, *args, **options)
    self._plain = True
generation.AnswerGenerator.__init__ = plainly
from finetune_trainer.cli import cli
cli()
"""
#: The trainer with transformers' own experts, over weights that are dequantized once.
PLAIN_EXPERTS = """
from finetune_trainer.model import weights
weights.multiply_grouped = lambda model: None
from finetune_trainer.cli import cli
cli()
"""
ON_EXPERTS = ["lora.targetModules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]", "lora.dropout=0"]
LOSSES = ["lora.dropout=0", "training.compile=disabled"]
#: By name: settings, steps, between log lines, the GiB that the trainer may believe the GPU to have, another script.
MOE: dict[str, tuple[list[str], int, int, int, str]] = {
    "whole GPU": ([], 60, 10, 0, ""),
    "24 GiB": ([], 60, 10, 24, ""),
    "12 GiB": ([], 60, 10, 12, ""),
    "nothing cached": (["quantization.cachedLayers=0"], 60, 10, 0, ""),
    "not compiled": (["training.compile=disabled"], 60, 10, 0, ""),
    "adapters on experts": (ON_EXPERTS, 60, 10, 0, ""),
    "losses": ([*LOSSES, "quantization.cachedLayers=0"], 100, 1, 0, ""),
    "losses of transformers' experts": ([*LOSSES, "quantization.cachedLayers=12"], 100, 1, 0, PLAIN_EXPERTS),
}
ANSWERS = [
    "evaluation.metrics=[loss,nli]",
    "evaluation.everySteps=5",
    "training.compile=disabled",
    "evaluation.generation.maxNewTokens=256",
    "evaluation.generation.answerMarker=t99",
]


def limited(gib: int) -> str:
    """Return the trainer, made to believe that the GPU has `gib` GiB; the whole of it when 0."""
    if not gib:
        return ""
    return f"""
import os
from dataclasses import replace
# As the trainer, which is too late here.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch
from finetune_trainer.runtime import device
inspect = device.inspect_device
device.inspect_device = lambda *args: replace(inspect(*args), memory_bytes={gib} << 30)
torch.cuda.set_per_process_memory_fraction(({gib} << 30) / torch.cuda.get_device_properties(0).total_memory)
from finetune_trainer.cli import cli
cli()
"""


def write_rows(path: Path, rows: int = 1200, longest: int = 512, answer: str = "") -> None:
    """Write text rows as long as reference.py's: 200 to 512 tokens, 325 on average, or in proportion to `longest`."""
    rnd = random.Random(0)
    # t1, t2 and t3 are special tokens, which the tokenizer would find at the start of t123.
    words = [f"t{number}" for number in range(10, 32768) if str(number)[0] not in "123"]
    with path.open("w") as file:
        for _ in range(rows):
            count = min(longest, max(longest * 200 // 512, int(rnd.gauss(325, 45) * longest / 512)))
            file.write(json.dumps({"text": " ".join(rnd.choices(words, k=count)) + answer}) + "\n")


def reference(options: dict[str, Any], command: str = "run", python: str = sys.executable) -> None:
    """Let reference.py measure the same rows on TRL (`run`) or on Unsloth, and print what it found."""
    subprocess.run([python, HERE / "reference.py", command, MODEL, json.dumps(options)], check=False)


def train(
    folder: Path, name: str, settings: list[str], steps: int, log_every: int, gpus: int = 1, script: str = ""
) -> dict[str, Any]:
    """Run the trainer's own command, or `script`, under torchrun for several GPUs; its metrics and its plan."""
    work = folder / "".join(c if c.isalnum() else "-" for c in name)
    work.mkdir()
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "benchmark"},
        "spec": {
            "model": {"source": f"file://{MODEL}"},
            "dataset": {"train": f"file://{folder}/train.jsonl"},
            "output": {"uri": f"file://{work}/out"},
        },
    }
    (work / "job.yaml").write_text(json.dumps(manifest))
    (work / "script.py").write_text(script)
    layout = [f"training.maxSteps={steps}", f"logging.everySteps={log_every}", f"resources.gpusPerNode={gpus}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    command = [sys.executable, *torchrun, *([work / "script.py"] if script else ["-m", "finetune_trainer"])]
    words = [word for setting in (*layout, *settings) for word in ("--set", setting)]
    started = datetime.now(UTC)
    answer = subprocess.run(
        [*command, "--config", work / "job.yaml", *words],
        env=os.environ
        | {
            "FINETUNE_SCRATCH_DIR": str(work / "scratch"),
            "FINETUNE_TERMINATION_LOG": str(work / "report.json"),
            "FINETUNE_LISTEN": "127.0.0.1:0",
            "FINETUNE_CACHE_DIR": str(folder / "cache"),  # what one setting compiles the next one finds
        },
        capture_output=True,
        text=True,
    )
    if answer.returncode:
        return {"setting": name, "exit": answer.returncode, "why": (answer.stdout + answer.stderr)[-1500:]}
    report = json.loads((work / "report.json").read_text())
    lines = [json.loads(line) for line in (work / "out/training/metrics.jsonl").read_text().splitlines()]
    speeds = [line["tokensPerSecond"] for line in lines if line.get("tokensPerSecond")]
    plan = report["executionPlan"]
    measured = plan["measuredPeakMemoryBytes"]
    predicted = plan.get("predictedPeakMemoryBytes", 0)
    ready = [line["timestamp"] for line in map(_as_json, answer.stderr.splitlines()) if _is_ready(line)]
    waited = datetime.fromisoformat(ready[-1]) - started if ready else None
    return {
        "setting": name,
        "seconds_to_first_step": round(waited.total_seconds(), 1) if waited else None,
        "tok_s": round(sum(speeds[2:]) / max(1, len(speeds[2:]))),
        "loss": [line["loss"] for line in lines if "loss" in line],
        "peak_gib": round(measured / GIB, 2),
        "predicted_gib": round(predicted / GIB, 2),
        "prediction_error": round(predicted / measured - 1, 3),
        "evaluation_seconds": _evaluation_seconds(list(map(_as_json, answer.stderr.splitlines()))),
        "metrics": report.get("metrics"),
        "warnings": [
            line["event"] for line in map(_as_json, answer.stderr.splitlines()) if line.get("level") == "warning"
        ],
        "plan": plan,
    }


def _evaluation_seconds(lines: list[dict[str, Any]]) -> list[float]:
    """Return how long each evaluation took, the base model's first: from the line before it to the line after it."""
    stamped = [line for line in lines if line.get("timestamp")]
    times = [datetime.fromisoformat(line["timestamp"]) for line in stamped]
    return [
        round((after - before).total_seconds(), 2)
        for before, after, line, following in zip(times, times[1:], stamped, stamped[1:], strict=False)
        if line.get("stage") == "Evaluating" or "evalLoss" in following
    ]


def _is_ready(line: dict[str, Any]) -> bool:
    """Whether training begins after this line of the log."""
    return line.get("stage") == "Training" or "decoder layers are compiled" in line.get("event", "")


def _as_json(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line)) if line.startswith("{") else {}
    except ValueError:  # two processes wrote at once
        return {}


def _wanted(name: str) -> bool:
    return not sys.argv[3:] or name.startswith(tuple(sys.argv[3:]))


def main() -> None:
    """Run one of the tables."""
    if sys.argv[2] == "moe" and not (MODEL / "config.json").exists():
        subprocess.run([sys.executable, HERE / "reference.py", "build", MODEL, "qwen3-moe"], check=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "train.jsonl")
        if sys.argv[2] == "speed":
            for setting, (ours, theirs) in SPEED.items():
                reference(theirs)
                print("RESULT", json.dumps(train(folder, setting, ours, 16, 4)), flush=True)
        elif sys.argv[2] == "engine":
            reference({})
            write_rows(folder / "eval.jsonl", 32)
            evaluated = [f"dataset.eval=file://{folder}/eval.jsonl", "evaluation.everySteps=20"]
            for gib in ENGINE:
                name = f"{gib} GiB" if gib else "whole GPU"
                if _wanted(name):
                    print("RESULT", json.dumps(train(folder, name, evaluated, 60, 10, script=limited(gib))), flush=True)
        elif sys.argv[2] in ("peers", "long"):
            longest = 512 if sys.argv[2] == "peers" else 2048
            write_rows(folder / "train.jsonl", longest=longest)
            ours = train(folder, f"{longest} tokens", [f"training.maxLength={longest}"], 40, 5)
            print("RESULT", json.dumps(ours), flush=True)
            reference({"maxlen": longest} | TRL[longest])
            if python := os.environ.get("UNSLOTH_PYTHON"):
                for options in UNSLOTH:
                    reference({"maxlen": longest} | options, "unsloth", python)
        elif sys.argv[2] == "fp8":
            reference({})
            for precision in ("bf16", "fp8"):
                result = train(folder, precision, [f"training.precision={precision}"], 60, 10)
                print("RESULT", json.dumps(result), flush=True)
        elif sys.argv[2] == "answers":
            write_rows(folder / "eval.jsonl", 200, 400, answer=' t99 {"predicted_label": 1}')
            wanted = [f"dataset.eval=file://{folder}/eval.jsonl", *ANSWERS]
            for name, script in (("decode", ""), ("decode, 24 GiB", limited(24)), ("generate", GENERATE)):
                if _wanted(name):
                    print("RESULT", json.dumps(train(folder, name, wanted, 10, 5, script=script)), flush=True)
        elif sys.argv[2] == "moe":
            for name, (settings, steps, log_every, gib, script) in MOE.items():
                if _wanted(name):
                    result = train(folder, name, settings, steps, log_every, script=script or limited(gib))
                    print("RESULT", json.dumps(result), flush=True)
            if _wanted("TRL"):
                for options in (FASTEST, FASTEST | {"gc": True, "prep": False}):
                    reference(options)
        elif sys.argv[2] == "losses":
            for name, settings in (("plain", PLAIN), ("engine", [])):
                once = [*settings, "lora.dropout=0"]
                print("RESULT", json.dumps(train(folder, name, once, 100, 1)), flush=True)
        elif sys.argv[2] == "two-gpus":
            runs = (("one GPU", 1, ""), ("two GPUs", 2, ""), ("two GPUs, weights shared out", 2, SHARDED))
            results = [train(folder, setting, TWO_GPUS, 16, 4, gpus, script) for setting, gpus, script in runs]
            for result in results:
                result["times_one_gpu"] = round(result.get("tok_s", 0) / results[0].get("tok_s", 1), 2)
                print("RESULT", json.dumps(result), flush=True)
        else:
            wanted = {name: settings for name, settings in MEMORY.items() if _wanted(name)}
            with ThreadPoolExecutor(int(os.environ.get("PARALLEL", "1"))) as pool:
                for result in pool.map(lambda item: train(folder, item[0], item[1], 3, 1), wanted.items()):
                    print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
