"""What of a conversation is learned: the assistant's turns, whatever the template, and all that a row gives it."""

import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from trl import chat_template_utils

from finetune_trainer.data import formats, jinja
from finetune_trainer.data.chat_template import ChatTemplate
from finetune_trainer.data.dataset import encode
from finetune_trainer.data.encoding import Encoder, RowProblem
from finetune_trainer.data.jinja import TemplateError
from finetune_trainer.data.row_format import ChatExample
from finetune_trainer.data.rows import Row
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.errors import DatasetInvalid

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather in a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TWO_TURNS = [
    {"role": "user", "content": "anna has tea"},
    {"role": "assistant", "content": "bruno has none"},
    {"role": "user", "content": "and clara?"},
    {"role": "assistant", "content": "clara has two"},
]
#: Templates of which TRL knows the family, in a form that it does not know: only growth tells the turns then.
UNKNOWN = {
    name: "{# changed #}" + getattr(chat_template_utils, f"{name}_chat_template")
    for name in ("qwen2_5", "llama3", "gemma", "phi3", "qwen3_instruct_2507")
}


def _calls(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model, "file://model")


def _learned(tokenizer: Any, row: dict[str, Any], name: str = "messages") -> str:
    [encoded] = Encoder(tokenizer, 4096).encode([formats.named(name).to_example(row)])
    assert not isinstance(encoded, RowProblem), encoded
    return "|".join(_parts(tokenizer, encoded))


def _parts(tokenizer: Any, encoded: Any) -> list[str]:
    """Each stretch of learned tokens as text."""
    stretches: list[list[int]] = [[]]
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        if label == token:
            stretches[-1].append(token)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(each) for each in stretches if each]


@pytest.mark.parametrize(("name", "template"), UNKNOWN.items(), ids=UNKNOWN)
def test_any_template_learns_the_assistants_turns_only(name: str, template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    assert ChatTemplate(tokenizer)._training_template is None
    whole = _learned(tokenizer, {"messages": TWO_TURNS})
    assert whole.startswith("bruno has none"), whole
    assert "clara has two" in whole
    assert not {"anna", "and clara?", "user"} & set(whole.split())


def test_a_template_of_one_line_learns_them_too(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert _learned(tokenizer, {"messages": TWO_TURNS}) == " bruno has none</s>| clara has two</s>"


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "gemma3", "phi3", "deepseekv3"])
def test_of_a_known_family_the_labels_are_trls(name: str, tokenizer: Any, tiny_model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer.chat_template = getattr(chat_template_utils, f"{name}_chat_template")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", assistant_only_loss=True,
            max_length=4096,
        ),
        train_dataset=Dataset.from_list([{"messages": TWO_TURNS}]),
        processing_class=tokenizer,
    )  # fmt: skip
    [ours] = Encoder(tokenizer, 4096).encode([ChatExample(TWO_TURNS)])
    assert trainer.train_dataset[0]["input_ids"] == ours.input_ids
    assert trainer.train_dataset[0]["labels"] == ours.labels


def test_turns_that_a_template_writes_anew_are_left_out_and_said(tokenizer: Any) -> None:
    """Templates of reasoning models drop the thoughts of earlier turns: those texts are no answers of theirs."""
    tokenizer.chat_template = "{# changed #}" + chat_template_utils.qwen3_chat_template
    with structlog.testing.capture_logs() as logs:
        encoded = encode(
            [Row("f", 1, {"messages": TWO_TURNS})], formats.named("messages"), Encoder(tokenizer, 4096), "training"
        )
    assert encoded.missed_turns == 1
    assert any("1 turns of the assistant in training rows are not learned" in entry["event"] for entry in logs)
    learned = [token for token in encoded.labels[0] if token != -100]
    assert tokenizer.decode(learned).startswith("<think>\n\n</think>\n\nclara has two")


@pytest.mark.parametrize("marked", [True, False])
def test_turns_of_weight_0_are_not_learned(marked: bool, tokenizer: Any) -> None:
    name = "qwen2_5_training" if marked else "qwen2_5"
    tokenizer.chat_template = "{# changed #}" + getattr(chat_template_utils, f"{name}_chat_template")
    for weights, kept in (((0, 1), "clara has two"), ((1.0, 0), "bruno has none"), ((None, 0), "bruno has none")):
        turns = [dict(turn) for turn in TWO_TURNS]
        turns[1]["weight"], turns[3]["weight"] = weights
        assert _learned(tokenizer, {"messages": turns}).strip() == f"{kept}<|im_end|>"
    problem = formats.named("messages").checked(Row("f", 1, {"messages": [turn | {"weight": 0} for turn in TWO_TURNS]}))
    assert str(problem) == "f:1: 'messages' has only turns of weight 0"


def test_tools_and_options_of_a_row_are_given_to_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = chat_template_utils.qwen3_chat_template
    row = {"messages": _calls({"city": "Rome"}), "tools": TOOLS}
    for tools in (TOOLS, json.dumps(TOOLS)):
        example = formats.named("messages").to_example(row | {"tools": tools})
        [encoded] = Encoder(tokenizer, 4096).encode([example])
        assert '"name": "get_weather", "description": "the weather in a city"' in tokenizer.decode(encoded.input_ids)
        assert '{"name": "get_weather", "arguments": {"city": "Rome"}}' in "".join(_parts(tokenizer, encoded))
    tokenizer.chat_template = "{{ mood }}" + UNKNOWN["qwen2_5"]
    text = ChatTemplate(tokenizer).whole(
        formats.named("messages").to_example({"messages": TWO_TURNS, "chat_template_kwargs": {"mood": "glad"}})
    )
    assert text.startswith("glad<|im_start|>system")


def test_a_template_that_ignores_tools_is_said(tokenizer: Any) -> None:
    row = Row("f", 1, {"messages": TWO_TURNS, "tools": TOOLS})
    with structlog.testing.capture_logs() as logs:
        encode([row, row], formats.named("messages"), Encoder(tokenizer, 4096), "training")
    [warning] = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert warning == "Chat template does not write the tools of a row: the model learns without them"


@pytest.mark.parametrize(("key", "name", "is_said"), [
    ("reasoning_content", "qwen3", False), ("thinking", "qwen2_5", True), ("reasoning_content", "qwen2_5", True),
])  # fmt: skip
def test_thoughts_that_a_template_does_not_write_are_said(key: str, name: str, is_said: bool, tokenizer: Any) -> None:
    tokenizer.chat_template = getattr(chat_template_utils, f"{name}_chat_template")
    template = ChatTemplate(tokenizer)
    text = template.whole(ChatExample([TWO_TURNS[0], {"role": "assistant", "content": "ok", key: "because"}]))
    assert ("because" in text) is not is_said
    assert (
        list(template.notes)
        == [f"Chat template does not write {key} of a message: the model learns without it"] * is_said
    )


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "deepseekv3"])
@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_arguments_of_tool_calls_have_the_form_that_the_template_takes(
    name: str, arguments: Any, tokenizer: Any
) -> None:
    tokenizer.chat_template = getattr(chat_template_utils, f"{name}_chat_template")
    text = ChatTemplate(tokenizer).whole(ChatExample(_calls(arguments), tools=TOOLS))
    assert '{"city": "Rome"}' in text
    assert r"\"" not in text


def test_tool_calls_that_the_template_does_not_write_are_refused(tokenizer: Any) -> None:
    """They would be learned as an empty answer, or as the word None."""
    [problem] = Encoder(tokenizer, 128).encode([ChatExample(_calls('{"city": "Rome"}')[:2])])
    assert problem == "has tool calls, and the chat template writes none"
    tokenizer.chat_template = chat_template_utils.qwen2_5_chat_template
    [problem] = Encoder(tokenizer, 128).encode([ChatExample(_calls("Rome"))])
    assert problem == "'messages[1].tool_calls[0]'.arguments must be an object, or its JSON text"


def test_content_is_given_in_parts_to_templates_that_lose_it_otherwise(tokenizer: Any) -> None:
    tokenizer.chat_template = chat_template_utils.idefics3_chat_template
    assert "bruno has none" in _learned(tokenizer, {"messages": TWO_TURNS})


def test_a_tokenizer_without_offsets_finds_the_same_tokens(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BatchEncoding

    expected = list(Encoder(tokenizer, 4096).encode([ChatExample(TWO_TURNS)]))
    monkeypatch.setattr(BatchEncoding, "is_fast", False)
    assert list(Encoder(tokenizer, 4096).encode([ChatExample(TWO_TURNS)])) == expected


def test_a_model_without_a_chat_template_is_said(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match="the model's tokenizer has no chat template"):
        ChatTemplate(tokenizer).assistant_turns(ChatExample(TWO_TURNS))


def test_keys_without_a_value_are_no_keys(tokenizer: Any) -> None:
    nothing = {"tool_calls": None, "name": None, "refusal": None}
    row = {"messages": [turn | nothing for turn in TWO_TURNS]}
    assert not formats.named("messages").checked(Row("f", 1, row)).problem
    assert _learned(tokenizer, row) == _learned(tokenizer, {"messages": TWO_TURNS})


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("{{ messages[0].content }}{{ tools|tojson }}", {"tools": r'[{"name": "\ud800"}]'}),
        ("{{ messages[0].content }}{{ word }}", {"chat_template_kwargs": r'{"word": "\ud800"}'}),
        (r'{{ messages[0].content }}{{ "\ud800" }}', {}),
    ],
    ids=["JSON text of tools", "JSON text of options", "the template itself"],
)
def test_half_a_character_in_what_a_template_writes_is_a_bad_row(
    tokenizer: Any, template: str, row: dict[str, Any]
) -> None:
    tokenizer.chat_template = template
    example = formats.named("messages").to_example({"messages": TWO_TURNS} | row)
    [found] = Encoder(tokenizer, 4096, learns_all=True).encode([example])
    assert isinstance(found, RowProblem)
    assert str(found).startswith(r"holds \ud800, half of a surrogate pair, which is no character, once")


def test_templates_without_a_default_one_are_explained(tokenizer: Any) -> None:
    tokenizer.chat_template = {"one": "{{ messages }}", "other": "{{ messages }}"}
    [found] = Encoder(tokenizer, 4096).encode([formats.named("messages").to_example({"messages": TWO_TURNS})])
    assert isinstance(found, RowProblem)
    assert "multiple chat templates with no default" in str(found)


_TURN = "{% for m in messages %}{{ m.content }}{% endfor %}"
_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
_ENDS = "{% endfor %}{% endfor %}{% endfor %}"
ENDLESS = {
    "time": (f"{_LOOP}{_ENDS}{_TURN}", "ran for 0.2 seconds without an end"),
    "time, in one row": (f"{{% if messages[0].content == 'late' %}}{_LOOP}{_ENDS}{{% endif %}}{_TURN}", "ran for"),
    "time, caught as a part": ("{% generation %}x{% endgeneration %}" + f"{_LOOP}{_ENDS}{_TURN}", "ran for"),
    "time, in a macro": (f"{{% macro x() %}}{_LOOP}{_ENDS}{{% endmacro %}}{{{{ x() }}}}{_TURN}", "ran for"),
    "size": ("{% for a in range(9999) %}{{ messages[0].content * 999 }}{% endfor %}", "more than 1 million characters"),
    "size, kept in a block": (
        "{% set x %}{% for a in range(9999) %}{{ messages[0].content * 999 }}{% endfor %}{% endset %}" + _TURN,
        "writes more than 1 million characters",
    ),
    "size, at once": ("{{ messages[0].content * 2000000 }}", "writes more than 1 million characters"),
    "size, in tool calls": ("{% if tools %}{{ 'x' * 2000000 }}{% endif %}" + _TURN, ""),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_an_end_is_told_at_the_first_row_that_meets_it(
    kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jinja, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(jinja, "MAX_CHARACTERS", 1_000_000)
    tokenizer.chat_template, says = ENDLESS[kind]
    chats = formats.named("messages")
    early = [Row("a.jsonl", line, {"messages": TWO_TURNS}) for line in range(1, 4)]
    late = [{"role": "user", "content": "late"}, *TWO_TURNS[1:]]
    rows = [*early, *(Row("a.jsonl", line, {"messages": late, "tools": TOOLS}) for line in range(4, 3000))]
    if not says:
        says = "more than 1 million"
    with pytest.raises(DatasetInvalid) as refused:
        encode(rows, chats, Encoder(tokenizer, 64), "training")
    told = str(refused.value)
    assert says in told and "\n" not in told and "the model's chat template" in told
    assert told.startswith("a.jsonl:4: " if "row" in kind or "tool" in kind else "a.jsonl:1: ")
