"""`finetune chat` on an adapter that the trainer has published: the answers are PEFT's own, and what lacks is said."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_api.plain_text import plain
from finetune_cli.published import fetch_into, published_at
from finetune_cli.storage import cache_folder
from support.cli.run import finetune, no_traceback
from support.simulation import job_states as states
from support.trainer.process import job, train
from support.trainer.tiny_model import build_model

QUESTION = "Premise: anna has tea, bruno watches. Hypothesis: anna has tea."
TEXT = f"[INST] {QUESTION} [/INST]"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of six steps; without quantization, so that transformers alone computes the same."""
    folder = tmp_path_factory.mktemp("run")
    changes: dict[str, Any] = {
        "quantization.bits": 16,
        "quantization.computeDtype": "float32",
        "training.precision": "fp32",
        "evaluation.generation.maxNewTokens": 12,
    }
    done = train(job(folder, tiny_model, changes), folder / "process")
    assert done.exit_code == 0, done.log
    return folder / "out"


def chat(source: object, *options: str, stdin: str = "", code: int = 0) -> Any:
    result = no_traceback(finetune("chat", str(source), *options, stdin=stdin))
    assert result.returncode == code, result.stderr
    return result


def printed(answer: str) -> str:
    return plain(answer) + "\n"


@pytest.fixture(scope="module")
def answers(adapter: Path, tiny_model: Path) -> dict[str, str]:
    """What transformers and PEFT make of the text, without a line of ours."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(TEXT, return_tensors="pt")
    found = {}
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for name in ("base", "adapter"):
        model = base if name == "base" else PeftModel.from_pretrained(base, adapter)
        output = model.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        found[name] = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["base"] != found["adapter"]
    return found


def test_a_question_is_answered_as_peft_answers_it(adapter: Path, answers: dict[str, str]) -> None:
    """The rows were texts that end where the chat template's prompts do: a question is put into it."""
    assert chat(adapter, "--once", QUESTION).stdout == printed(answers["adapter"])
    both = chat(f"file://{adapter}", "--once", TEXT, "--form", "text", "--base-too").stdout
    assert both == f"[base]\n{printed(answers['base'])}[adapter]\n{printed(answers['adapter'])}"


def test_rows_are_answered_as_lines_of_json(adapter: Path, answers: dict[str, str], tmp_path: Path) -> None:
    rows = [{"text": f"{TEXT} {{}}"}, {"text": f"{TEXT} {{}}</s>"}, {"text": TEXT}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = chat(adapter, "--file", str(tmp_path / "rows.jsonl"), "--base-too").stdout.splitlines()
    same = {"prompt": TEXT, "baseAnswer": answers["base"].strip(), "answer": answers["adapter"].strip()}
    assert [json.loads(line) for line in found] == [same | {"expected": "{}"}, same | {"expected": "{}"}, same]
    (tmp_path / "rows.jsonl").write_text('{"other": 1}\n')
    said = chat(adapter, "--file", str(tmp_path / "rows.jsonl"), code=1).stderr
    assert "rows.jsonl:1: has no column 'text'" in said


def test_a_conversation_goes_on_until_a_new_one(adapter: Path) -> None:
    first, second, again = chat(adapter, stdin=f"{QUESTION}\n\n{QUESTION}\n/new\n{QUESTION}\n").stdout.splitlines()
    assert first == again
    assert first != second
    too_long = chat(adapter, stdin="tea " * 600 + f"\n{QUESTION}\n")
    assert "tokens, and the model reads at most 511" in too_long.stderr
    assert too_long.stdout.strip() == first.strip()


def test_an_adapter_in_a_bucket_answers_and_is_kept(
    adapter: Path, answers: dict[str, str], s3: Any, bucket: str, tiny_model: Path
) -> None:
    for path in adapter.rglob("*"):
        if path.is_file():
            key = f"nli/{path.relative_to(adapter).as_posix()}"
            s3.client().put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    asked = ["chat", f"s3://{bucket}/nli", "--once", QUESTION]
    first = no_traceback(finetune(*asked, env=s3.env))
    assert (first.returncode, first.stdout) == (0, printed(answers["adapter"])), first.stderr
    s3.client().delete_object(Bucket=bucket, Key="nli/adapter_model.safetensors")
    again = no_traceback(finetune(*asked, env=s3.env))
    assert again.stdout == first.stdout, again.stderr
    denied = no_traceback(finetune(*asked, env=s3.env | {"AWS_SECRET_ACCESS_KEY": "wrong"}))
    assert denied.returncode == 3


def test_a_damaged_adapter_never_answers(adapter: Path, tmp_path: Path) -> None:
    """Nor does the whole copy that is kept of it since it answered before."""
    shutil.copytree(adapter, tmp_path / "out")
    published = published_at(f"file://{tmp_path}/out")
    fetch_into(cache_folder(os.environ) / "adapters" / published.digest, published)
    weights = tmp_path / "out/adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "has SHA-256" in chat(tmp_path / "out", "--once", "?", code=5).stderr


def test_a_jobs_adapter_answers_if_it_is_still_the_one(ctl: Any, put: Any, adapter: Path) -> None:
    import hashlib

    digest = hashlib.sha256((adapter / "manifest.json").read_bytes()).hexdigest()
    put(states.job("mine"), states.succeeded(f"file://{adapter}", f"sha256:{digest}"))
    put(states.job("other"), states.succeeded(f"file://{adapter}", f"sha256:{'0' * 64}"))
    assert ctl("chat", "mine", "--once", QUESTION).returncode == 0
    other = ctl("chat", "other", "--once", QUESTION)
    assert other.returncode == 5
    assert "no longer holds what other published" in other.stderr
    assert f"finetune chat file://{adapter}" in other.stderr


def test_a_base_model_that_is_not_here_is_asked_for(
    adapter: Path, tiny_model: Path, answers: dict[str, str], tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    hidden = tiny_model.rename(tmp_path / "hidden")
    try:
        said = chat(adapter, "--once", QUESTION, code=1).stderr
        assert f"the base model of this adapter cannot be fetched: spec.model.source: file://{tiny_model}" in said
        assert "--base takes it from another folder or URI" in said
        assert chat(adapter, "--once", QUESTION, "--base", str(moved)).stdout == printed(answers["adapter"])
        said = chat(adapter, "--once", QUESTION, "--base", "pvc://models/m", code=1).stderr
        assert "is pvc://models/m, a volume of a cluster" in said
    finally:
        hidden.rename(tiny_model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--once", "a", "--file", "b"], "--once and --file exclude each other"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--form", "poem"], "--form"),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[str], sentence: str, tmp_path: Path) -> None:
    assert sentence in chat(tmp_path, *options, code=1).stderr


def test_without_the_trainer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    said = chat(tmp_path, "--once", "?", code=1).stderr
    assert "answering needs the trainer, which is not installed here (torch missing)" in said
    assert "pip install '.[trainer]'" in said
