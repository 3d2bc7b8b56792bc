"""Tokenizers in llama.cpp's terms; test_llama_cpp.py asks llama.cpp itself."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers

from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.publishing.gguf import vocabulary
from finetune_trainer.publishing.gguf.vocabulary import check_spaces, sample_prompts, vocabulary_of
from support.trainer import tokenizers
from support.trainer.adapted import adapted_spec


def prompts(tokenizer: Any, **dataset: Any) -> tuple[str, ...]:
    return sample_prompts(adapted_spec(Path("/model"), dataset={"train": "file:///x.jsonl"} | dataset), tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "rule"),
    [
        (lambda: tokenizers.of_bytes(), "gpt-2"),
        (lambda: tokenizers.of_bytes(digits=True), "smollm"),
        (lambda: tokenizers.of_bytes(tokenizers.QWEN2), "qwen2"),
        (lambda: tokenizers.of_bytes(tokenizers.LLAMA3), "smaug-bpe"),
        (lambda: tokenizers.of_bytes(tokenizers.LLAMA3, ignore_merges=True), "llama-bpe"),
    ],
)
def test_a_known_rule_is_named(tokenizer: Any, rule: str) -> None:
    found = vocabulary_of(tokenizer(), 340)
    assert (found.model, found.rule, found.adds_bos) == ("gpt2", rule, False)
    assert len(found.tokens) == len(found.types) == 340
    assert found.types[:2] == (vocabulary.CONTROL, vocabulary.CONTROL)
    assert found.types[-1] == vocabulary.UNUSED
    assert found.merges
    assert not found.scores


@pytest.mark.parametrize("adds_space", [True, False])
def test_pieces_have_scores_in_the_order_of_their_merges(adds_space: bool) -> None:
    tokenizer = tokenizers.of_pieces(adds_space=adds_space)
    found = vocabulary_of(tokenizer, len(tokenizer))
    assert (found.model, found.rule, found.adds_space, found.adds_bos) == ("llama", "", adds_space, True)
    assert found.types[:4] == (vocabulary.UNKNOWN, vocabulary.CONTROL, vocabulary.CONTROL, vocabulary.BYTE)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    scores = [found.scores[found.tokens.index("".join(pair))] for pair in merges]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == 0


def test_what_llama_cpp_would_split_otherwise_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"the rule by which this tokenizer splits text is none that llama\.cpp is"):
        vocabulary_of(tokenizers.of_bytes(r"\p{L}+|\p{N}|\s+"), 400)
    with pytest.raises(ConfigInvalid, match=r"has \d+ tokens, and the model 100 embeddings"):
        vocabulary_of(tokenizers.of_bytes(), 100)
    with pytest.raises(ConfigInvalid, match=r"has no tokenizer\.json"):
        vocabulary_of(object(), 100)


@pytest.mark.parametrize("make", [tokenizers.of_bytes, tokenizers.of_pieces])
@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.Sequence([normalizers.NFKC()])])
def test_a_tokenizer_that_changes_text_is_refused(make: Callable[[], Any], normalizer: Any) -> None:
    tokenizer = make()
    tokenizer.backend_tokenizer.normalizer = normalizer
    with pytest.raises(
        ConfigInvalid, match=r"changes text before it splits it \((Lowercase|NFKC)\): llama\.cpp does not"
    ):
        vocabulary_of(tokenizer, 400)


def test_a_tokenizer_of_bytes_may_compose_characters() -> None:
    tokenizer = tokenizers.of_bytes()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert vocabulary_of(tokenizer, 400).rule == "gpt-2"


@pytest.mark.parametrize("step", [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split(",", "isolated")])
def test_a_tokenizer_of_pieces_that_splits_words_apart_is_refused(step: Any) -> None:
    tokenizer = tokenizers.of_pieces()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), step])
    with pytest.raises(ConfigInvalid, match=r"splits words apart \((Digits|Split)\): llama\.cpp does not"):
        vocabulary_of(tokenizer, 400)


@pytest.mark.parametrize(
    ("normalizer", "step", "adds_space"),
    [  # Llama 2, Mistral, Gemma
        (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
        (normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), False),
    ],
)
def test_the_known_ways_to_mark_spaces_are_taken(normalizer: Any, step: Any, adds_space: bool) -> None:
    tokenizer = tokenizers.of_pieces()
    tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer = normalizer, step
    assert vocabulary_of(tokenizer, 400).adds_space == adds_space


def test_a_tokenizer_of_another_type_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")))
    with pytest.raises(ConfigInvalid, match="a tokenizer of type WordLevel is not converted to GGUF; one of"):
        vocabulary_of(words, 100)


@pytest.mark.parametrize(
    ("flags", "template", "told"),
    [
        ({"rstrip": True}, "<|turn|>\n{{ m.content }}", True),
        ({"rstrip": True}, "<|turn|>{{ m.content }}\n", False),
        ({"lstrip": True}, "{{ m.content }} <|turn|>", True),
        ({"lstrip": True, "rstrip": True}, "<|turn|>{{ m.content }}", False),
        ({}, "<|turn|>\n{{ m.content }}", False),
        ({"rstrip": True}, "{{ raise_exception('no') }}", False),
    ],
)
def test_a_token_that_takes_what_the_template_writes_beside_it_is_refused(
    flags: dict[str, bool], template: str, told: bool
) -> None:
    """llama.cpp leaves it there: it was asked, and made one token more."""
    tokenizer = tokenizers.of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", special=True, **flags)]})
    tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    refused = pytest.raises(ConfigInvalid, match=r"the token '<\|turn\|>' takes the spaces or line breaks beside it")
    with refused if told else nullcontext():
        check_spaces(tokenizer, prompts(tokenizer))


@pytest.mark.parametrize(("scheme", "template", "adds_space"), tokenizers.MISTRALS)
def test_spaces_are_put_where_the_chat_templates_prompts_have_them(
    scheme: str, template: str, adds_space: bool | None
) -> None:
    """test_llama_cpp.py asks llama.cpp itself."""
    tokenizer = tokenizers.of_words(scheme, template)
    assert vocabulary_of(tokenizer, 400).adds_space  # as a text begins
    if adds_space is None:
        with pytest.raises(
            ConfigInvalid, match=r"llama\.cpp would put spaces elsewhere in the chat template's prompts"
        ):
            vocabulary_of(tokenizer, 400, prompts(tokenizer))
    else:
        assert vocabulary_of(tokenizer, 400, prompts(tokenizer)).adds_space == adds_space


def test_spaces_in_texts_are_put_where_rows_with_the_markers_tokens_have_them() -> None:
    tokenizer = tokenizers.of_words("first", None)
    assert prompts(tokenizer, format="text") == ()
    assert vocabulary_of(tokenizer, 400).adds_space
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]", "[/INST]"]})
    [text] = prompts(tokenizer, format="text")
    assert text == "[INST] Is it so? [/INST] Yes"
    assert not vocabulary_of(tokenizer, 400, [text]).adds_space
