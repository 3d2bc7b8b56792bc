"""The original QLoRA recipe on TRL, measured: the baseline that every speed figure is a ratio to. And on Unsloth.

reference.py build DIR [SHAPE]    random weights of a SHAPE below and a stand-in tokenizer, saved to DIR
reference.py run DIR '{json}'     train 16 steps; options and their defaults are the .get() calls below
reference.py unsloth DIR '{json}' the same rows and steps on Unsloth, which must be installed (with its own older TRL)
"""

import json
import os
import random
import sys
import time

MODEL = sys.argv[2]
SHAPES = {
    "mistral-7b": {"vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1e6},
    "llama-3-8b": {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5},
    "llama-3.1-8b": {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 5e5},
    # Stored in 4 bits; all its layers have the same weights.
    "llama-3-70b": {
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # Twelve layers of Qwen3-30B-A3B: 8.1 billion weights, 0.9 billion of which compute a token.
    "qwen3-moe": {
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 12,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}
#: With DRY_RUN in the environment, what is built has this instead: enough to try commands out on a CPU.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FEW_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
IN_4_BITS = ("llama-3-70b",)
LORA = {"r": 16, "lora_alpha": 32, "bias": "none", "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def build():
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

    t = time.time()
    name = sys.argv[3] if len(sys.argv) > 3 else "mistral-7b"
    shape = SHAPES[name]
    dense = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
    kind = Qwen3MoeConfig if "num_experts" in shape else MistralConfig
    heads = {"num_attention_heads": 32, "head_dim": 128, "sliding_window": None}
    shape = dense | heads | shape
    if os.environ.get("DRY_RUN"):
        shape |= TINY | (FEW_EXPERTS if "num_experts" in shape else {}) | {"vocab_size": 32768}
    layers, repeated = shape["num_hidden_layers"], name in IN_4_BITS
    cfg = kind(**shape | ({"num_hidden_layers": 1} if repeated else {}))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        m = AutoModelForCausalLM.from_config(cfg)
    m.save_pretrained(MODEL)
    if repeated:
        repeat_in_4_bits(layers)
    vocab = {f"t{i}": i for i in range(32768)}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tok, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3"
    ).save_pretrained(MODEL)
    print("built", round(time.time() - t, 1), "s", sum(p.numel() for p in m.parameters()) / 1e9, "B")


def repeat_in_4_bits(layers):
    """Make of the model with one layer, in MODEL, one with so many, each a copy of it, with weights in 4 bits."""
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    folder = Path(MODEL)
    device = 0 if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.float32)  # as which the codes of 4 bits are stored
    one = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4(), device_map={"": device})
    for file in folder.glob("model*"):
        file.unlink()
    one.save_pretrained(folder)
    single = folder / "model.safetensors"
    tensors, at = load_file(single), "model.layers.0."
    single.unlink()
    shards = {"model-rest.safetensors": {name: each for name, each in tensors.items() if at not in name}}
    for number in range(layers):
        shard = shards.setdefault(f"model-{number // 8}.safetensors", {})
        shard |= {name.replace(at, f"model.layers.{number}."): each for name, each in tensors.items() if at in name}

    def write(file):
        name, shard = file
        save_file({key: each.clone() for key, each in shard.items()}, folder / name, {"format": "pt"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, shards.items()))
    index = {"metadata": {}, "weight_map": {name: file for file, shard in shards.items() for name in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))


def nf4():
    """Return the recipe's settings of 4-bit weights."""
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )


def trl(v):
    """Return the model and its tokenizer, and what else SFTTrainer and SFTConfig take for the recipe."""
    import torch
    from peft import LoraConfig, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, AutoTokenizer

    q = nf4() if v.get("quant", True) else None
    m = AutoModelForCausalLM.from_pretrained(
        MODEL,
        quantization_config=q,
        device_map={"": 0},
        attn_implementation=v.get("attn", "sdpa"),
        dtype=torch.bfloat16,
    )
    if v.get("prep", True) and q:
        m = prepare_model_for_kbit_training(m, use_gradient_checkpointing=v.get("gc", True))
    lora = LoraConfig(**LORA, lora_dropout=v.get("dropout", 0.05), task_type="CAUSAL_LM")
    args = {
        "optim": v.get("optim", "paged_adamw_8bit"),
        "gradient_checkpointing": v.get("gc", True),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_liger_kernel": v.get("liger", False),
        "torch_compile": v.get("compile", False),
    }
    return m, AutoTokenizer.from_pretrained(MODEL), {"peft_config": lora}, args


def unsloth(v):
    """Return the same from Unsloth, with the optimizer that its own notebooks use."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    from unsloth import FastLanguageModel

    m, tok = FastLanguageModel.from_pretrained(
        MODEL,
        max_seq_length=v.get("maxlen", 512),
        dtype=torch.bfloat16,
        load_in_4bit=v.get("quant", True),
        local_files_only=True,
    )
    m = FastLanguageModel.get_peft_model(
        m,
        **LORA,
        lora_dropout=v.get("dropout", 0.05),
        use_gradient_checkpointing=v.get("gc", "unsloth"),
        random_state=0,
    )
    return m, tok, {}, {"optim": v.get("optim", "adamw_8bit")}


def run(made_by, v):
    m, tok, more, options = made_by(v)  # first, for Unsloth changes TRL when imported

    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    rnd = random.Random(0)
    g = torch.Generator().manual_seed(0)
    rows = []
    longest = v.get("maxlen", 512)
    for _ in range(v.get("rows", 1200)):
        n = min(longest, max(longest * 200 // 512, int(rnd.gauss(325, 45) * longest / 512)))
        rows.append({"input_ids": torch.randint(10, 32768, (n,), generator=g).tolist()})
    ds = datasets.Dataset.from_list(rows)
    args = SFTConfig(
        output_dir="/tmp/out",
        max_steps=v.get("steps", 16),
        per_device_train_batch_size=v.get("bs", 4),
        gradient_accumulation_steps=v.get("ga", 4),
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.01,
        max_length=longest,
        bf16=True,
        logging_steps=4,
        report_to="none",
        save_strategy="no",
        packing=v.get("packing", False),
        dataloader_num_workers=v.get("workers", 0),
        remove_unused_columns=True,
        **options,
    )
    tr = SFTTrainer(model=m, processing_class=tok, args=args, train_dataset=ds, **more)
    st = {"tok": 0, "slots": 0, "t": [], "n": []}
    cl = tr.compute_loss

    def compute_loss(model, inputs, *a, **k):
        ids = inputs["input_ids"]
        st["slots"] += ids.numel()
        am = inputs.get("attention_mask")
        st["tok"] += int(am.sum()) if am is not None else ids.numel()
        return cl(model, inputs, *a, **k)

    tr.compute_loss = compute_loss

    class CB(TrainerCallback):
        def on_step_end(self, *a, **k):
            torch.cuda.synchronize()
            st["t"].append(time.time())
            st["n"].append((st["tok"], st["slots"]))

    tr.add_callback(CB())
    torch.cuda.reset_peak_memory_stats()
    tr.train()
    w = v.get("warm", 6)
    dt = st["t"][-1] - st["t"][w - 1]
    tk = st["n"][-1][0] - st["n"][w - 1][0]
    sl = st["n"][-1][1] - st["n"][w - 1][1]
    loss = [h.get("loss") for h in tr.state.log_history if "loss" in h]
    print(
        "RESULT",
        json.dumps(
            {
                "on": made_by.__name__,
                "v": v,
                "tok_s": round(tk / dt),
                "slots_s": round(sl / dt),
                "step_s": round(dt / (len(st["t"]) - w), 3),
                "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
                "loss": loss,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build()
    else:
        run(unsloth if sys.argv[1] == "unsloth" else trl, json.loads(sys.argv[3]))
