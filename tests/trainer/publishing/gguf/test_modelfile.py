"""The Modelfile says of a chat template what Go's templates can, and nothing that would be written otherwise."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.row_format import ChatExample
from finetune_trainer.publishing.gguf.modelfile import go_template, modelfile
from support.trainer import tokenizers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}[SYS] {{ m.content }} [/SYS]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
#: Writes the system message into the first question.
FOLDED = (
    "{% for m in messages %}{% if m.role == 'system' %}{% elif m.role == 'user' %}[INST] {% if loop.index0 == 1 and"
    " messages[0].role == 'system' %}<<{{ messages[0].content }}>> {% endif %}{{ m.content }} [/INST]{% else %}"
    "{{ m.content }}{% endif %}{% endfor %}"
)


def encoder(template: str | None) -> Encoder:
    tokenizer = tokenizers.of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return Encoder(tokenizer, 100)


def as_go_writes(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Go's text/template makes of `template`: only what go_template uses of that language."""
    opening, turns, asks = re.fullmatch(
        r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*?)", template, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    branches = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else |\Z)', turns, re.DOTALL))
    said = [branches[each["role"]].replace("{{ .Content }}", each["content"]) for each in messages]
    return opening + "".join(said) + asks


@pytest.mark.parametrize(("template", "adds_bos"), [(CHATML, False), (INST, False), (INST, True)])
@pytest.mark.parametrize("roles", ["user", "system user", "user assistant user", "system user assistant user"])
def test_prompts_are_written_as_the_model_knows_them(template: str, adds_bos: bool, roles: str) -> None:
    known = encoder(template)
    messages = [{"role": role, "content": f"Is it {index}?"} for index, role in enumerate(roles.split())]
    expected = known.template.prompt(ChatExample(messages))
    found = as_go_writes(go_template(known, adds_bos), messages)
    assert found == (expected.removeprefix("<s>") if adds_bos else expected)


@pytest.mark.parametrize(
    "template", [FOLDED, "{{ raise_exception('no') }}", "{% for m in messages %}{{ '{{' }}{{ m.content }}{% endfor %}"]
)
def test_a_template_that_does_more_is_left_to_llama_cpp(template: str) -> None:
    assert go_template(encoder(template), adds_bos=False) == ""
    text = modelfile(encoder(template).tokenizer, "model.gguf", chat=True, adds_bos=False)
    assert "TEMPLATE" not in text
    assert "# Go's templates cannot say what the model's chat template does" in text


def ending_with(token: str) -> str:
    """The Modelfile of a chat template that ends each message with `token`."""
    tokenizer = tokenizers.of_bytes()
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ ENDS }}{% endfor %}".replace(
        "ENDS", json.dumps(token)
    )
    return modelfile(tokenizer, "model.gguf", chat=True, adds_bos=False)


#: What Ollama's parser (parser/parser.go, ParseFile and unquote) was told and what it reads, worked out by hand.
@pytest.mark.parametrize(
    ("token", "written"),
    [
        ("<｜end▁of▁turn｜>", '"<｜end▁of▁turn｜>"'),
        ("<|end\\turn|>", '"<|end\\turn|>"'),
        ('<|"end"|>', '"<|"end"|>"'),
        ('"end', '""end"'),
        ('end"', '"end""'),
        ('"', '"""""""'),
        ('""', '""""""""'),
        ('""end', '"""""end"""'),
        ("</s>#", '"</s>#"'),
        ("end\nof turn", '"end\nof turn"'),
        ('"\nend', '""""\nend"""'),
        ('"""\nend', ""),
        ("end\u200b", ""),
        ("\u00a0end", ""),
    ],
)
def test_a_token_that_ends_answers_is_written_as_ollama_reads_it_or_not_at_all(token: str, written: str) -> None:
    text = ending_with(token)
    assert ("PARAMETER stop " + written + "\n" in text) == bool(written)
    assert ("# A Modelfile cannot name one token that ends an answer." in text) == (not written)
    assert not written or re.fullmatch(r'("""|")(.*)\1', written, re.DOTALL)[2] == token  # type: ignore[index]


@pytest.mark.parametrize("token", ['a"""\nb', "end\u200b"])
def test_a_template_that_ollama_would_read_otherwise_is_left_out(token: str) -> None:
    assert "TEMPLATE" not in ending_with(token)


@pytest.mark.parametrize("token", ['"', '"""', "\\"])
def test_a_template_with_quotes_is_written_as_it_is(token: str) -> None:
    template = re.search(r'^TEMPLATE """(.*)"""\n\Z', ending_with(token), re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]
    messages = [{"role": role, "content": f"Is it {role}?"} for role in ("system", "user", "assistant", "user")]
    assert as_go_writes(template, messages) == "".join(each["content"] + token for each in messages)


def test_a_template_that_refuses_system_messages_gets_no_branch_for_them() -> None:
    without = INST.replace("{% elif m.role == 'system' %}[SYS] {{ m.content }} [/SYS]", "").replace(
        "{% else %}", "{% elif m.role == 'system' %}{{ raise_exception('no') }}{% else %}"
    )
    template = go_template(encoder(without), adds_bos=True)
    assert "system" not in template
    assert as_go_writes(template, [{"role": "user", "content": "?"}]) == "[INST] ? [/INST]"


def test_it_names_the_file_and_where_answers_end() -> None:
    text = modelfile(encoder(CHATML).tokenizer, "model.gguf", chat=True, adds_bos=False)
    assert text.startswith('FROM ./model.gguf\nPARAMETER stop "</s>"\nPARAMETER stop "<|im_end|>"\nTEMPLATE """')
    plain: Any = encoder(None).tokenizer
    assert modelfile(plain, "model.gguf", chat=False, adds_bos=True).endswith('TEMPLATE """{{ .Prompt }}"""\n')
