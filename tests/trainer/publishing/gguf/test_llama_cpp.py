"""llama.cpp itself reads our files, tokenizes as the model's tokenizer does, and computes what the adapter does.

Not among the packages of `make test`: `pip install xllamacpp` (llama.cpp in a wheel) lets these tests run.
"""

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.trainer import tokenizers
from support.trainer.adapted import GGUF_FAMILIES, exported_to_gguf, logits

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": tokenizers.of_bytes,
    "smollm": lambda: tokenizers.of_bytes(digits=True),
    "qwen2": lambda: tokenizers.of_bytes(tokenizers.QWEN2),
    "llama-bpe": lambda: tokenizers.of_bytes(tokenizers.LLAMA3, ignore_merges=True),
    "smaug-bpe": lambda: tokenizers.of_bytes(tokenizers.LLAMA3),
    "pieces": tokenizers.of_pieces,
    "pieces, no space": lambda: tokenizers.of_pieces(adds_space=False),
}


class LlamaCpp:
    """A server of llama.cpp in this process."""

    def __init__(self, file: Path) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 128, 1, 0, False
        self._server = xllamacpp.Server(settings)

    def ask(self, path: str, question: dict[str, Any]) -> Any:
        url = f"{self._server.listening_address}{path}"
        request = urllib.request.Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@pytest.mark.parametrize("name", GGUF_FAMILIES)
def test_it_computes_what_the_adapter_does(name: str, tiny_model: Path, tmp_path: Path) -> None:
    made, folder = exported_to_gguf(name, "f16", tiny_model, tmp_path)
    server = LlamaCpp(folder / "model.gguf")
    differences = []
    for end in range(30, 45):  # it tells no probabilities where its answer is half a character
        ids = list(range(5, end))
        question = {"prompt": ids, "n_predict": 1, "n_probs": 300, "temperature": 0, "samplers": []}
        for choice in server.ask("/completion", question).get("completion_probabilities", ()):
            expected = torch.log_softmax(logits(made.model, ids)[0, -1], -1)
            top = choice["top_logprobs"]
            assert len(top) == 300
            differences += [abs(token["logprob"] - float(expected[token["id"]])) for token in top]
    assert differences
    assert max(differences) < 0.005  # the logits' own standard deviation is 0.15


@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_tokenizes_as_in_training(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(tmp_path / "words")
    _, folder = exported_to_gguf("llama", "f16", tmp_path / "words", tmp_path)
    server = LlamaCpp(folder / "model.gguf")
    for text in (tokenizers.TEXT, "Bread", " anna  has\tbread\n", "1234567 don't", "</s>anna"):
        found = server.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert found == tokenizer(text)["input_ids"], text


@pytest.mark.parametrize(("scheme", "template", "adds_space"), tokenizers.MISTRALS[:-1])
def test_it_puts_spaces_where_the_chat_templates_prompts_have_them(
    scheme: str, template: str, adds_space: bool, tmp_path: Path
) -> None:
    tokenizer = tokenizers.of_words(scheme, template)
    tokenizer.save_pretrained(tmp_path / "words")
    _, folder = exported_to_gguf("llama", "f16", tmp_path / "words", tmp_path)
    messages = [{"role": "user", "content": "anna has"}, {"role": "assistant", "content": "bread, and"}]
    server = LlamaCpp(folder / "model.gguf")
    for count in (1, 2):
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False).removeprefix("<s>")
        found = server.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
        assert found == tokenizer(text)["input_ids"], text


def test_it_puts_spaces_where_texts_with_the_markers_tokens_have_them(tmp_path: Path) -> None:
    tokenizer = tokenizers.of_words("first", None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    tokenizer.save_pretrained(tmp_path / "words")
    _, folder = exported_to_gguf("llama", "f16", tmp_path / "words", tmp_path)
    text = "[INST] anna has bread, and? [/INST] anna"
    question = {"content": text, "add_special": True, "parse_special": True}
    assert LlamaCpp(folder / "model.gguf").ask("/tokenize", question)["tokens"] == tokenizer(text)["input_ids"]
