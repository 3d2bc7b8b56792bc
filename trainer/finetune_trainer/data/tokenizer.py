"""Load the tokenizer and check it against the base model."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import structlog

from finetune_trainer.errors import ConfigInvalid, whole_text

log = structlog.get_logger(__name__)
_SAMPLE: Final = "Hello world, these are 12 plain words: naïve, 你好!"
#: How a file begins that Git has put in the place of a large one.
LFS_POINTER: Final = b"version https://git-lfs"
#: What the files of tokenizers are called.
_TOKENIZER_FILES: Final = ("tokenizer*", "vocab*", "merges*", "tekken*", "*.model", "*.tiktoken", "*.py")
_TEXT_FILES: Final = (".json", ".jinja", ".model", ".txt", ".tiktoken")
#: Whole names of tokens that models reserve for padding, then for anything; best first.
_PAD_TOKENS: Final = (
    r"<\|finetune_right_pad_id\|>",  # Llama 3
    r"<pad>|<PAD>|\[PAD\]|<\|pad\|>|<\|padding\|>|<\|pad_token\|>",
    r"<\|(vision|image|video|fim)_pad\|>|<fim_pad>",  # Qwen, StarCoder
    r"<\|reserved_(special_)?token_\d+\|>|<\|placeholder\d+\|>|<SPECIAL_\d+>",  # Llama 3, Phi 3, Mistral's newer ones
    r"\[control_\d+\]|<unused_?\d+>|\[unused\d+\]",  # Mistral 7B, Gemma
)


def load_tokenizer(folder: Path, source: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in `folder` for training: right padding, a pad token that is EOS only for want of another.

    Args:
        folder: The base model's files.
        source: The model's URI, for messages.
        trust_remote_code: Whether code of the model may run.

    Raises:
        ConfigInvalid: There is no usable tokenizer, or it makes no tokens.
    """
    from transformers import AutoTokenizer

    if pointer := next(filter(_is_lfs_pointer, _text_files(folder)), None):
        raise ConfigInvalid(
            f"spec.model.source: {pointer.name} of {source} is a Git LFS pointer, not the file it stands for: fetch it"
            " with git lfs pull"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, use_fast=True
        )
        _check_tokens(tokenizer, folder, source)
    except ConfigInvalid:
        raise
    except Exception as error:  # transformers checks little of what it reads, so anything can go wrong
        why = _unusable_file(folder) or _nothing_there(folder) or whole_text(error)
        raise ConfigInvalid(f"spec.model.source: {source} has no usable tokenizer: {why}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigInvalid(f"spec.model.source: the tokenizer of {source} has no end-of-sequence token")
    tokenizer.padding_side = "right"
    pad = choose_pad_token(tokenizer)
    if pad != tokenizer.pad_token:
        tokenizer.pad_token = pad
    log.info(
        f"Tokenizer of {len(tokenizer):,} tokens loaded", pad_token=tokenizer.pad_token, eos_token=tokenizer.eos_token
    )
    return tokenizer


def _nothing_there(folder: Path) -> str:
    """Return what is missing where there is no file of any tokenizer; '' where there is one."""
    if any(path.match(pattern) for path in folder.iterdir() for pattern in _TOKENIZER_FILES):
        return ""
    return "it has no file of one, such as tokenizer.json or tokenizer.model"


def _text_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _TEXT_FILES and path.is_file())


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _unusable_file(folder: Path) -> str | None:
    """Return which JSON file of the tokenizer cannot be read, and why; None if it is none of them."""
    for file in sorted(folder.glob("*token*.json")):
        try:
            json.loads(file.read_bytes().decode("utf-8"))
        except (ValueError, RecursionError) as error:
            return f"{file.name} is no JSON: {whole_text(error)}"
    return None


def choose_pad_token(tokenizer: Any) -> str:
    """Choose a pad token: the tokenizer's own, else unk, else a reserved one, and EOS if there is nothing to spare.

    Labels never depend on it (padding is masked by position), but other tools mask by id: with pad = EOS they would
    teach the model never to stop, with a word as pad never to say that word, and decoding drops what is special.
    So only an added token whose whole name says that it stands in no text is taken before EOS.
    """
    never = {None, tokenizer.eos_token, tokenizer.bos_token}
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    spare = (token for pattern in _PAD_TOKENS for token in added if re.fullmatch(pattern, token))
    candidates = (tokenizer.pad_token, tokenizer.unk_token, *spare)
    return str(next((token for token in candidates if token not in never), tokenizer.eos_token))


def _check_tokens(tokenizer: Any, folder: Path, source: str) -> None:
    """Refuse a tokenizer that makes nothing of text, and warn of one that makes something else than its own file.

    transformers rebuilds the tokenizers of some families from their class, whatever tokenizer.json holds.
    """
    made = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if not made:
        raise ConfigInvalid(
            f"spec.model.source: the tokenizer of {source} makes no token of any text: its class,"
            f" {type(tokenizer).__name__}, does not fit its vocabulary: set tokenizer_class in tokenizer_config.json"
        )
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    try:
        expected = Tokenizer.from_file(str(file)).encode(_SAMPLE, add_special_tokens=False).ids
    except Exception as error:  # tokenizers raises nothing more exact
        log.debug("tokenizer.json cannot be read alone", error=whole_text(error))
        return
    if expected != made:
        log.warning(
            f"The tokenizer of {source} makes other tokens of text than its tokenizer.json: its class,"
            f" {type(tokenizer).__name__}, may not fit"
        )


def add_tokens(tokenizer: Any, wanted: Iterable[str]) -> list[int]:
    """Add the tokens of spec.dataset.addTokens, and return the ids of those that `tokenizer` did not have.

    Raises:
        ConfigInvalid: When one of them does not become one token of a text.
    """
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(wanted) if token not in known]
    tokenizer.add_tokens(new)
    ids: list[int] = tokenizer.convert_tokens_to_ids(new) if new else []
    for token, made in zip(new, ids, strict=True):
        if made not in tokenizer(f"a {token} b", add_special_tokens=False)["input_ids"]:
            raise ConfigInvalid(f"spec.dataset.addTokens: the tokenizer does not make one token of {token!r}")
    return ids


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise ConfigInvalid if the tokenizer has more tokens than the model has embeddings; call it before add_tokens."""
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= max(vocab_size, len(tokenizer)):
        raise ConfigInvalid(
            f"spec.model.source: the tokenizer has a token of the id {last}, the model's embeddings end at"
            f" {vocab_size - 1}: take the model's own tokenizer"
        )
    if len(tokenizer) > vocab_size:
        raise ConfigInvalid(
            f"spec.model.source: the tokenizer has {len(tokenizer)} tokens, the model's embeddings {vocab_size}: "
            "take the model's own tokenizer, and add tokens with spec.dataset.addTokens"
        )
