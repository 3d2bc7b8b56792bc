"""Prompts are written as the adapter's rows were, and answers stop where it learned to stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.manifest import load_file
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.chat import prompts
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.prompt_form import stop_tokens, trained_form
from finetune_trainer.errors import ConfigInvalid, DatasetInvalid
from finetune_trainer.model.published import JOB_FILE, job_of, trained_commit
from finetune_trainer.settings import Environment, Ranks, Settings
from support.trainer.process import job

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def spec(**dataset: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://a/b"},
            "dataset": {"train": "file:///x.jsonl", **dataset},
            "output": {"uri": "file:///out"},
        }
    )


def of_rows(rows: list[Any], tokenizer: Any, folder: Path, **dataset: Any) -> list[tuple[str, str | None]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prompts.of_file(path, spec(**dataset), Encoder(tokenizer, 10_000))
    return [(tokenizer.decode(each.ids), each.expected) for each in found]


@pytest.mark.parametrize(
    ("dataset", "template", "form"),
    [
        ({"format": "messages"}, TURNS, "chat"),
        ({"format": "sharegpt"}, None, "chat"),
        ({"format": "text"}, "own", "chat"),
        ({"format": "text"}, TURNS, "text"),
        ({"format": "text"}, None, "text"),
        ({"format": "text"}, "{{ raise_exception('no') }}", "text"),
        ({"format": "auto"}, TURNS, "chat"),
        ({"format": "prompt-completion"}, TURNS, "text"),
        ({"format": "alpaca"}, TURNS, "text"),
        ({"format": "template", "template": "{a}"}, TURNS, "text"),
    ],
)
def test_a_question_takes_the_form_of_the_rows(dataset: Any, template: str | None, form: str, tokenizer: Any) -> None:
    if template != "own":
        tokenizer.chat_template = template
    assert trained_form(spec(**dataset), Encoder(tokenizer, 100)) == form


@pytest.mark.parametrize(
    ("rows", "dataset", "expected"),
    [
        ([{"prompt": "a:"}, {"prompt": "a:", "completion": " b"}], {}, [("<s>a:", None), ("<s>a:", "b")]),
        ([{"q": "a:"}], {"format": "prompt-completion", "columns": {"prompt": "q"}}, [("<s>a:", None)]),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            {"format": "messages"},
            [("<s>[INST] a [/INST]", None)],
        ),
        (
            [{"prompt": [{"role": "user", "content": "a"}]}],
            {"format": "prompt-completion"},
            [("<s>[INST] a [/INST]", None)],
        ),
        (
            [{"a": "x"}, {"a": "x", "output": "y"}],
            {"template": "Q: {a} A:"},
            [("<s>Q: x A:", None), ("<s>Q: x A:", "y")],
        ),
        ([{"text": "<s>[INST] a [/INST] b</s>"}], {"format": "text"}, [("<s>[INST] a [/INST]", "b")]),
    ],
)
def test_rows_need_no_answer(rows: list[Any], dataset: Any, expected: Any, tokenizer: Any, tmp_path: Path) -> None:
    assert of_rows(rows, tokenizer, tmp_path, **dataset) == expected


@pytest.mark.parametrize(
    "row", [[1], {"other": "x"}, {"messages": []}, {"messages": [{"role": "king", "content": "x"}]}]
)
def test_a_row_of_another_kind_is_refused_by_its_line(row: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DatasetInvalid, match=r"rows\.jsonl:1: "):
        of_rows([row], tokenizer, tmp_path)


def test_an_instruction_is_asked_as_alpaca_was_trained(tokenizer: Any) -> None:
    found = prompts.of_text("Say tea", spec(format="alpaca"), Encoder(tokenizer, 10_000))
    assert tokenizer.decode(found.ids).endswith("### Instruction:\nSay tea\n\n### Response:\n")


def test_an_answer_stops_where_the_template_ends_a_turn(tokenizer: Any) -> None:
    end = {tokenizer.eos_token_id}
    assert stop_tokens(Encoder(tokenizer, 100)) == end
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TURNS
    assert stop_tokens(Encoder(tokenizer, 100)) == end | {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    for template in ("{% for m in messages %}{{ m.content }} {% endfor %}", "{{ raise_exception('no') }}", None):
        tokenizer.chat_template = template
        assert stop_tokens(Encoder(tokenizer, 100)) == end


@pytest.mark.parametrize(
    ("source", "commit"), [("hf://org/base", "abc"), ("hf://org/other", None), ("file:///models/base", None)]
)
def test_the_base_is_of_the_commit_that_was_trained_on(source: str, commit: str | None, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base", "revision": "abc"}')
    asked = load_file(job(tmp_path, tmp_path, {"model.source": source}))
    assert trained_commit(tmp_path, Settings(asked, Environment.from_env({}), Ranks())) == commit


def test_a_published_job_cannot_ask_for_code_to_be_run(tmp_path: Path) -> None:
    commit = "a" * 40
    manifest = job(tmp_path, tmp_path, {"model": {"source": "hf://a/b", "revision": commit, "trustRemoteCode": True}})
    (tmp_path / JOB_FILE).parent.mkdir()
    (tmp_path / JOB_FILE).write_text(manifest.read_text())
    assert job_of(tmp_path).spec.model.trust_remote_code is False
    assert job_of(tmp_path, ["model.trustRemoteCode=true"]).spec.model.trust_remote_code is True
    (tmp_path / JOB_FILE).write_text(yaml.safe_dump({"spec": {}}))
    with pytest.raises(ConfigInvalid, match=r"the adapter's training/job.yaml cannot be used: "):
        job_of(tmp_path)
