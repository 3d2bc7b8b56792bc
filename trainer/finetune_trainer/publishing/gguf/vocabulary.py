"""A tokenizer as llama.cpp takes it: its tokens, how they are merged, and by which rule text is split before that.

llama.cpp has the rules by name. They are told here by the tokenizer's own expressions, so that a vocabulary of one's
own under a known rule is fine, and a rule that is not known is refused: text would be split otherwise than in training.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.jinja import TemplateError
from finetune_trainer.data.prompt_form import trained_form
from finetune_trainer.data.row_format import ChatExample, Message
from finetune_trainer.errors import ConfigInvalid

#: llama.cpp's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
#: Names of rules, by the expression that a tokenizer.json splits with.
_EXPRESSIONS: Final = {
    _CONTRACTIONS + _WORDS % "{1,3}": "llama-bpe",
    _CONTRACTIONS + _WORDS % "": "qwen2",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer.

    Attributes:
        model: llama for pieces that begin with a mark for the space, gpt2 for bytes.
        rule: The name of the rule that splits text, for bytes.
        tokens: Every token, by its id; as many as the model has embeddings.
        types: Of each token.
        scores: Of each piece: what is merged first has the highest.
        merges: In order, for bytes.
        adds_space: Whether a space is put before a text.
        adds_bos: Whether a text begins with the token for that.
    """

    model: str
    rule: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    adds_space: bool
    adds_bos: bool


def vocabulary_of(tokenizer: Any, size: int, prompts: Sequence[str] = ()) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        tokenizer: The model's.
        size: How many embeddings the model has.
        prompts: Some that must come out alike (sample_prompts).

    Raises:
        ConfigInvalid: llama.cpp would tokenize otherwise.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigInvalid("this tokenizer has no tokenizer.json, and is not converted to GGUF")
    read = json.loads(backend.to_str())
    model = read["model"]
    if model["type"] != "BPE":
        raise ConfigInvalid(f"a tokenizer of type {model['type']} is not converted to GGUF; one of type BPE is")
    pieces = bool(model.get("byte_fallback"))
    rule = "" if pieces else _rule(read)
    _check_steps(read, pieces)
    names = {index: token for token, index in model["vocab"].items()}
    added = {each["id"]: each for each in read["added_tokens"]}
    names |= {index: each["content"] for index, each in added.items()}
    if max(names) >= size:
        raise ConfigInvalid(f"the tokenizer has {max(names) + 1} tokens, and the model {size} embeddings")
    tokens = tuple(names.get(index, f"[PAD{index}]") for index in range(size))
    types = tuple(_type(index, names, added, tokenizer, pieces) for index in range(size))
    merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model["merges"]]
    rank: dict[str, int] = {}
    for index, pair in enumerate(merges):
        rank.setdefault("".join(pair), index)
    scores = tuple(-float(rank.get(token, len(merges))) for token in tokens) if pieces else ()
    ids = tokenizer("a")["input_ids"]
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        rule=rule,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=() if pieces else tuple(" ".join(pair) for pair in merges),
        adds_space=pieces and _adds_space(read, prompts),
        adds_bos=bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
    )


def sample_prompts(spec: FineTuneJobSpec, tokenizer: Any) -> tuple[str, ...]:
    """Return what the adapter is asked and answers: as the chat template writes it, or around the marker of answers.

    Of texts without tokens of their own around a question there is none: nothing is known of them.
    """
    encoder = Encoder(tokenizer, max_length=1)
    messages: list[Message] = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes"}]
    if trained_form(spec, encoder) == "chat":
        try:
            return encoder.template.prompt(ChatExample(messages[:1])), encoder.template.whole(ChatExample(messages))
        except TemplateError:
            return ()
    marker = spec.evaluation.generation.answer_marker
    opening = marker.replace("/", "", 1)
    is_known = {opening, marker} <= tokenizer.get_added_vocab().keys()
    return (f"{opening} Is it so? {marker} Yes",) if is_known else ()


def check_spaces(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Check that no token takes spaces that stand beside it in a prompt: llama.cpp would leave them there.

    Raises:
        ConfigInvalid: One does.
    """
    from tokenizers import Tokenizer

    backend = tokenizer.backend_tokenizer
    read = json.loads(backend.to_str())
    taking = [each["content"] for each in read["added_tokens"] if each["lstrip"] or each["rstrip"]]
    if not taking:
        return
    read["added_tokens"] = [each | {"lstrip": False, "rstrip": False} for each in read["added_tokens"]]
    leaving = Tokenizer.from_str(json.dumps(read))
    for text in prompts:
        if leaving.encode(text, add_special_tokens=False).ids != backend.encode(text, add_special_tokens=False).ids:
            token = next((each for each in taking if each in text), taking[0])
            raise ConfigInvalid(
                f"the token {token!r:.80} takes the spaces or line breaks beside it in a prompt, and llama.cpp leaves"
                " them there"
            )


def _type(index: int, names: dict[int, str], added: dict[int, Any], tokenizer: Any, pieces: bool) -> int:
    if index not in names:
        return UNUSED
    if pieces and index == tokenizer.unk_token_id:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index]["special"] else USER_DEFINED
    is_byte = pieces and len(names[index]) == 6 and names[index].startswith("<0x")
    return BYTE if is_byte else NORMAL


def _rule(read: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule by which this tokenizer of bytes splits text. Raises ConfigInvalid."""
    steps = _steps(read["pre_tokenizer"])
    *first, last = steps or [{}]
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    if plain and last.get("use_regex", True):
        if not first:
            return "gpt-2"
        if len(first) == 1 and first[0].get("type") == "Digits" and first[0].get("individual_digits"):
            return "smollm"
    if plain and len(first) == 1 and first[0].get("behavior") == "Isolated" and not first[0].get("invert"):
        name = _EXPRESSIONS.get(first[0]["pattern"].get("Regex", ""), "")
        if name == "llama-bpe" and not read["model"].get("ignore_merges"):
            return "smaug-bpe"  # the same expression, without whole words
        if name:
            return name
    raise ConfigInvalid("the rule by which this tokenizer splits text is none that llama.cpp is known to have")


def _check_steps(read: dict[str, Any], pieces: bool) -> None:
    """Raise ConfigInvalid if the tokenizer changes text, or splits it into words, as llama.cpp does not."""
    space = {"String": " "}
    for step in _steps(read["normalizer"]):
        marks = pieces and (step["type"] == "Prepend" or (step["type"], step.get("pattern")) == ("Replace", space))
        if not marks and (pieces or step["type"] != "NFC"):
            raise ConfigInvalid(f"this tokenizer changes text before it splits it ({step['type']}): llama.cpp does not")
    for step in _steps(read["pre_tokenizer"]) if pieces else ():
        if step["type"] != "Metaspace" and (step["type"], step.get("pattern")) != ("Split", space):
            raise ConfigInvalid(f"this tokenizer of pieces splits words apart ({step['type']}): llama.cpp does not")


def _steps(node: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer, which may be sequences of sequences."""
    if node is None:
        return []
    parts = node.get("pretokenizers") or node.get("normalizers") or ()
    return [node] if node["type"] != "Sequence" else [each for part in parts for each in _steps(part)]


def _adds_space(read: dict[str, Any], prompts: Sequence[str]) -> bool:
    """Return whether llama.cpp is to put a space before a text, and after each token that stands for no text.

    It does both or neither. Tokenizers that split words at spaces (Metaspace) do it where no space is yet, or before
    the text alone: what fits the prompts is taken.

    Raises:
        ConfigInvalid: Neither does.
    """
    from tokenizers import Tokenizer

    steps = _steps(read["pre_tokenizer"])
    if not any(each["type"] == "Metaspace" for each in steps):
        return any(each["type"] == "Prepend" for each in _steps(read["normalizer"]))
    adds = any(each.get("prepend_scheme") in ("first", "always") for each in steps)
    own = Tokenizer.from_str(json.dumps(read))
    for way in (adds, not adds):
        marks: list[dict[str, Any]] = [{"type": "Prepend", "prepend": "▁"}] if way else []
        marks += [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        theirs = Tokenizer.from_str(
            json.dumps(read | {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": marks}})
        )
        if all(
            own.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False).ids
            for text in prompts
        ):
            return way
    raise ConfigInvalid("llama.cpp would put spaces elsewhere in the chat template's prompts than this tokenizer does")
