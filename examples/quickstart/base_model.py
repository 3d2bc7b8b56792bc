"""A tokenizer and a small Mistral-architecture base model, trained from nothing in about a minute."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from nli import BOS, EOS
from prose import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

SPECIAL: Final = ("<unk>", BOS, EOS, "<pad>", "[INST]", "[/INST]")
IGNORE: Final = -100
#: Mistral's instruct form; a conversation of user and assistant turns.
CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
_VOCABULARY: Final = 1104
_BATCH: Final = 32
_LEARNING_RATE: Final = 1.5e-3
_WARMUP, _DECAY = 0.05, 0.6  # parts of all steps
_FULL: Final = 0.2  # part of the documents that are learned whole, what is given too

#: A tokenized document: ids, and labels that are IGNORE where nothing is to be learned.
Example = tuple[list[int], list[int]]
#: Called after each step with tokens seen so far, tokens in all, and the step's loss in nats per token.
Progress = Callable[[int, int, float], None]


def train_tokenizer(documents: Iterable[Document]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. It adds no BOS of its own: rows and the chat template write it, so it is never doubled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map("".join, documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token=BOS,
        eos_token=EOS,
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> MistralForCausalLM:
    """Mistral's architecture, two layers deep: about half a million parameters."""
    torch.manual_seed(seed)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            sliding_window=None,
            # Small models learn little from the usual 0.02.
            initializer_range=0.08,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[Example]:
    """Token ids and labels. Loss is taken on what is told, and on some documents whole."""
    pieces = iter(tokenizer([piece for document in documents for piece in document])["input_ids"])
    examples = []
    for document in documents:
        ids: list[int] = []
        labels: list[int] = []
        whole = rng.random() < _FULL
        for index, piece in enumerate(islice(pieces, len(document))):
            ids += piece
            labels += piece if whole or index % 2 else [IGNORE] * len(piece)
        examples.append((ids, labels))
    return examples


@dataclass(frozen=True)
class Batch:
    """Right-padded token ids and labels, each [documents, tokens]."""

    ids: torch.Tensor
    labels: torch.Tensor


def batches(examples: Sequence[Example], pad: int, rng: random.Random) -> Iterator[Batch]:
    """Batches of documents of like length, in random order."""
    window = _BATCH * 40
    for start in range(0, len(examples), window):
        near = sorted(examples[start : start + window], key=lambda example: len(example[0]))
        groups = [near[at : at + _BATCH] for at in range(0, len(near), _BATCH)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield Batch(
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in group]),
            )


def pretrain(model: MistralForCausalLM, examples: Sequence[Example], seed: int, progress: Progress) -> None:
    """Train every weight of `model` once over `examples`: AdamW, warm-up, then linear decay by tokens seen."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    total = sum(len(ids) for ids, _ in examples)
    seen = 0
    model.train()
    for batch in batches(examples, model.config.pad_token_id, random.Random(seed)):
        part = seen / total
        rate = _LEARNING_RATE * min(1, part / _WARMUP + 0.01, (1 - part) / _DECAY)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Padding is on the right and attention looks left, so no mask is needed.
        loss = model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += int((batch.ids != model.config.pad_token_id).sum())
        progress(seen, total, loss.item())
    model.eval()
