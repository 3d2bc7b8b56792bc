"""The model card shows what data and users gave as text: no HTML, link, table cell or front matter comes of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.manifest import load_file
from finetune_trainer.evaluation.nli import read_answer, score
from finetune_trainer.publishing.model_card import Facts, render
from support.trainer.process import job

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[free](https://evil.example)",
    "https://evil.example",
    "www.evil.example",
    "a | b | c",
    "x\n---\nlicense: evil\n---\n# Title",
    "`code` **bold** _it_ ~~no~~",
    "![x](http://evil/x.png)",
    "&lt;b&gt;",
    "\x1b[31mred\u202e",
    "a.b.c",
]


def _card(folder: Path, metrics: dict[str, float], **changes: Any) -> str:
    return render(
        load_file(job(folder, folder / "model", {"model.source": "hf://org/base"} | changes)),
        metrics,
        Facts("org/base", pad_token="<pad>"),
    )


@pytest.mark.parametrize("label", HOSTILE)
def test_a_label_is_text(label: str, tmp_path: Path) -> None:
    metrics = score([label, "1", label], [read_answer("{}", "label")] * 3)
    assert f"confusion.{label}.none" in metrics
    plain = _card(tmp_path, score(["0", "1", "0"], [read_answer("{}", "label")] * 3))
    card = _card(tmp_path, metrics)
    assert card.count("\n") == plain.count("\n"), "no line more"
    [row] = [line for line in card.splitlines() if line.startswith("| ") and line.endswith("| 0 | 0 | 2 |")]
    shown = row.removeprefix("| ").removesuffix(" | 0 | 0 | 2 |")
    assert not set(shown) - set("&#;") & set("<>[]()|`*_~!:/.\\\n\x1b\u202e")
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "org/base"


def test_a_pattern_of_modules_is_text(tmp_path: Path) -> None:
    card = _card(tmp_path, {}, **{"lora.targetPattern": "<b>x</b>\n# y"})
    assert "target modules: &#60;b&#62;x&#60;&#47;b&#62; &#35; y" in card


def test_ordinary_labels_read_as_they_are(tmp_path: Path) -> None:
    answers = [read_answer(f'{{"label": "{label}"}}', "label") for label in ("yes", "no", "no")]
    card = _card(tmp_path, score(["yes", "no", "yes"], answers))
    assert "| right label | answered no | answered yes | answered none |" in card
    assert "| yes | 1 | 1 | 0 |" in card


def test_a_long_label_has_no_matrix() -> None:
    assert not [key for key in score(["x" * 100, "y"], [read_answer("{}", "l")] * 2) if key.startswith("confusion")]


def test_the_card_names_the_padding_token(tmp_path: Path) -> None:
    assert "- padding token: &#60;pad&#62;, masked by its position: never learned\n" in _card(tmp_path, {})


def test_a_base_that_is_no_hubs_is_loaded_from_a_folder(tmp_path: Path) -> None:
    card = _card(tmp_path, {}, **{"model.source": "s3://models/base 7b"})
    assert "Fetch the base model from `org/base` to `./base` first." in card
    assert '"./base", dtype="auto"' in card and "vllm serve ./base" in card
    card = _card(tmp_path, {}, **{"model.source": "file:///my models/7b"})
    assert '"/my models/7b", dtype="auto"' in card and "vllm serve '/my models/7b' " in card


@pytest.mark.parametrize(("row_format", "asked"), [("messages", "apply_chat_template"), ("text", "Your prompt")])
def test_the_example_asks_as_the_rows_did(row_format: str, asked: str, tmp_path: Path) -> None:
    found = load_file(job(tmp_path, tmp_path / "model", {}))
    assert asked in render(found, {}, Facts("org/base", row_format=row_format))


def test_the_card_tells_hardware_hours_versions_and_license(tmp_path: Path) -> None:
    found = load_file(job(tmp_path, tmp_path / "model", {"model.source": "hf://org/base"}))
    environment = {"gpus": ["NVIDIA <H100>"] * 2, "packages": {"torch": "2.9.1"}}
    card = render(found, {"evalLoss": 0.5}, Facts("org/base", "c" * 40, None, "text", environment, 5400.0, 2))
    assert "- hardware: 2 × NVIDIA &#60;H100&#62;\n- GPU-hours: 3.00 in training steps\n- versions: torch 2" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"]) == ("org/base", "other")
    assert front["license_link"] == "https://huggingface.co/org/base"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert f" --revision {'c' * 40} " in card
