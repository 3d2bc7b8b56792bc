"""Which files a model's tokenizer is read from. Torch-free."""

import json
import re
from pathlib import Path
from typing import Any, Final

import structlog

log = structlog.get_logger(__name__)
#: Settings by which tokenizers' classes take files, or their content, or anything (init_inputs).
_FILE_SETTINGS: Final = re.compile(r"(?!name_or_path).*_(file|files|path|dir|spm)|vocab|merges|init_inputs")
_LONGEST_PATH: Final = 4096


def drop_file_names(folder: Path) -> None:
    """Take out of tokenizer_config.json in `folder`, a copy of ours, what names files or is passed to a class as it is.

    transformers finds a tokenizer's files by their usual names. Classes open others that the author of a model names
    there, wherever they lie, and what is read from them would be published with the tokenizer.
    """
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):  # told when the tokenizer is loaded
        return
    if not isinstance(config, dict):
        return
    dropped = sorted(key for key, value in config.items() if _names_file(key, value))
    if dropped:
        log.info("Settings of the tokenizer that name files are ignored", settings=dropped)
        path.write_text(json.dumps({key: value for key, value in config.items() if key not in dropped}))


def _names_file(key: str, value: Any) -> bool:
    if _FILE_SETTINGS.fullmatch(key):
        return value is not None
    return isinstance(value, str) and len(value) < _LONGEST_PATH and Path(value).is_absolute() and Path(value).exists()
