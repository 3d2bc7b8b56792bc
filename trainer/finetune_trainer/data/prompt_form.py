"""How a model that was trained on some rows is asked, and where its answers end."""

from collections.abc import Sequence
from typing import Final, Literal

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.jinja import TemplateError
from finetune_trainer.data.row_format import ChatExample, Message

Form = Literal["chat", "text"]
_CHATS: Final = ("messages", "sharegpt")


def trained_form(spec: FineTuneJobSpec, encoder: Encoder) -> Form:
    """Return how the adapter knows a question: in its chat template, or as a text to go on with.

    Texts that end in the answer marker where the chat template's prompts do are conversations written out before.
    """
    if spec.dataset.format in _CHATS:
        return "chat"
    if spec.dataset.format not in ("auto", "text") or not encoder.tokenizer.chat_template:
        return "text"
    try:
        asked = encoder.template.prompt(ChatExample([{"role": "user", "content": "?"}]))
    except TemplateError:
        return "text"
    marked = asked.rstrip().endswith(spec.evaluation.generation.answer_marker.strip())
    return "chat" if spec.dataset.format == "auto" or marked else "text"


def stop_tokens(encoder: Encoder) -> set[int]:
    """Return the tokens that end an answer: end of sequence, and what the chat template writes after an answer."""
    tokenizer = encoder.tokenizer
    ends = {int(tokenizer.eos_token_id)}
    if not tokenizer.chat_template:
        return ends
    said = "Yes"
    messages: Sequence[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        whole = encoder.template.whole(ChatExample(messages))
    except TemplateError:
        return ends
    _, _, rest = whole.rpartition(said)
    after = tokenizer(rest, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return ends | {int(each) for each in after[:1] if each in special}
