"""The quickstart's data: right labels, an honest split, a base model that was not shown the answers, and a tokenizer
that marks begin and end once."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from math import log
from pathlib import Path

import nli
import prepare
import prose
import pytest
import world

from support.examples.possible_worlds import Taxonomies, follows

QUICKSTART = Path(prepare.__file__).parent
TABLES = Taxonomies(world.KINDS.parent, world.PLACES.parent, world.COLORS.parent)
ENTITIES = {
    *world.NAMES,
    *world.NUMBERS,
    *world.OPPOSITES,
    *(entry for taxonomy in world.TAXONOMIES for entry in taxonomy.entries),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """The rows as prepare.py writes them, read back."""
    folder = tmp_path_factory.mktemp("rows")
    prepare.write_rows(folder / "train", prepare.TRAIN_ROWS, held_out=False)
    prepare.write_rows(folder / "eval", prepare.EVAL_ROWS, held_out=True)
    return {name: [json.loads(line) for line in (folder / name).open()] for name in ("train", "eval")}


@pytest.fixture(params=["train", "eval"])
def rows(request: pytest.FixtureRequest, built: dict[str, list[dict]]) -> list[dict]:
    return built[request.param]


def answer(row: dict) -> dict:
    return json.loads(row["text"].split("[/INST]")[1].removesuffix("</s>"))


def subject(*sentences: str) -> frozenset[str]:
    """What sentences are about: their entities, people left out where there is anything else."""
    found = {word for sentence in sentences for word in re.findall(r"\w+", sentence) if word in ENTITIES}
    if found & set(world.OPPOSITES):
        return frozenset(found | {world.OPPOSITES[word] for word in found & set(world.OPPOSITES)})
    return frozenset(found - set(world.NAMES))


def test_there_are_enough_rows_and_no_two_are_the_same(built):
    assert len(built["train"]) >= 600
    assert len(built["eval"]) >= 100
    pairs = [(row["premise"], row["hypothesis"]) for part in built.values() for row in part]
    assert len(set(pairs)) == len(pairs)


def test_every_row_is_in_instruct_form_and_its_answer_is_json(rows):
    for row in rows:
        assert re.fullmatch(r"<s>\[INST\] [^<\[]* \[/INST\] \{.*\}</s>", row["text"], re.DOTALL)
        assert f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']} [/INST]" in row["text"]
        found = answer(row)
        assert set(found) == {"thought_process", "predicted_label"}
        assert found["predicted_label"] in (0, 1)
        ending = "so the hypothesis follows." if found["predicted_label"] else "so the hypothesis does not follow."
        assert found["thought_process"].endswith(ending)


def test_labels_are_what_brute_force_over_possible_worlds_says(rows):
    for row in rows:
        right = follows(row["premise"], row["hypothesis"], TABLES)
        assert answer(row)["predicted_label"] == int(right), row["text"]


def test_every_fact_in_a_thought_is_true(rows):
    checked = Counter()
    for row in rows:
        thought = answer(row)["thought_process"]
        for low, high in re.findall(r"(?:an?|and) (\w+) is an? (?!shade)(\w+)", thought):
            assert high in world.KINDS.ancestors(low), thought
            checked["kinds"] += 1
        for low, high in re.findall(r"(\w+) is in (\w+)", thought):
            assert high in world.PLACES.ancestors(low), thought
            checked["places"] += 1
        for low, high in re.findall(r"(\w+) is a shade of (\w+)", thought):
            assert high in world.COLORS.ancestors(low), thought
            checked["colors"] += 1
        for left, word, right in re.findall(r"(\w+) is (more|fewer) than (\w+)", thought):
            assert (world.NUMBERS.index(left) > world.NUMBERS.index(right)) == (word == "more"), thought
            checked["numbers"] += 1
        for one, other, verdict in re.findall(r"(\w+) and (\w+) (agree|differ)\b", thought):
            assert (one == other) == (verdict == "agree"), thought
            checked["words"] += 1
    assert min(checked.values()) >= 20
    assert len(checked) == 5


def test_labels_are_balanced_in_all_and_in_each_rule(rows):
    counts = Counter((row["rule"], answer(row)["predicted_label"]) for row in rows)
    assert sum(count for (_, label), count in counts.items() if label) == len(rows) / 2
    for rule in {rule for rule, _ in counts}:
        assert 0.25 <= counts[rule, 1] / (counts[rule, 0] + counts[rule, 1]) <= 0.75, rule


@pytest.mark.parametrize("column", ["premise", "hypothesis"])
def test_one_sentence_alone_does_not_give_the_label_away(built, column):
    """A naive Bayes classifier that sees only one of the two does hardly better than a coin."""
    words = {0: Counter(), 1: Counter()}
    for row in built["train"]:
        words[answer(row)["predicted_label"]].update(row[column].split())
    vocabulary = set(words[0]) | set(words[1])
    total = {label: sum(words[label].values()) + len(vocabulary) for label in words}

    def guess(row: dict) -> int:
        score = {k: sum(log((words[k][word] + 1) / total[k]) for word in row[column].split()) for k in words}
        return max(score, key=score.__getitem__)

    right = sum(guess(row) == answer(row)["predicted_label"] for row in built["eval"])
    assert right / len(built["eval"]) <= 0.65


def test_held_out_rows_are_about_things_no_training_row_is_about(built):
    about = {part: {subject(row["premise"], row["hypothesis"]) for row in built[part]} for part in built}
    assert len(about["eval"]) >= 60
    assert not about["train"] & about["eval"]


def test_the_base_model_reads_no_argument_about_a_held_out_matter_and_never_the_task(built):
    held_out = {subject(row["premise"], row["hypothesis"]) for row in built["eval"]}
    discussions = 0
    for document in islice(prose.documents(prepare.SEED), prepare.DOCUMENTS):
        text = "".join(document)
        assert nli.QUESTION not in text
        assert not ("thought_process" in text and "predicted_label" in text)
        if " Is it true? " in text or " says: " in text:
            discussions += 1
            premise, hypothesis = re.split(r" (?:Is it true\?|\w+ says:) ", document[0])
            assert subject(premise, hypothesis) not in held_out, text
    assert discussions > prepare.DOCUMENTS / 5


def test_the_same_rows_and_documents_come_out_whatever_the_hash_seed():
    program = (
        "import hashlib, nli, prose; from itertools import islice;"
        "rows = [nli.row(a)['text'] for held_out in (0, 1) for a in nli.arguments(60, bool(held_out), 3)];"
        "docs = [p for d in islice(prose.documents(3), 300) for p in d];"
        "print(hashlib.sha256('\\0'.join(rows + docs).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=QUICKSTART,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64


@pytest.fixture(scope="module")
def tokenizer():
    import base_model

    return base_model.train_tokenizer(list(islice(prose.documents(prepare.SEED), prepare.TOKENIZER_DOCUMENTS)))


def test_the_tokenizer_gives_every_row_back_and_marks_begin_and_end_once(rows, tokenizer):
    from finetune_api.manifest import load_file
    from finetune_trainer.data import formats
    from finetune_trainer.data.encoding import Encoder

    spec = load_file(QUICKSTART / "finetunejob.yaml").spec
    encoder = Encoder(tokenizer, spec.training.max_length)
    encoded = list(encoder.encode([formats.named("text").to_example(row) for row in rows]))
    for row, found in zip(rows, encoded, strict=True):
        ids = found.input_ids
        assert not found.truncated
        assert tokenizer.decode(ids) == row["text"]
        assert ids == tokenizer(row["text"])["input_ids"]
        assert [ids[0], ids[-1]] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
        assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
        assert found.labels[-1] == tokenizer.eos_token_id
        reply = row["text"].split("[/INST]")[1]
        assert len(tokenizer(reply)["input_ids"]) <= spec.evaluation.generation.max_new_tokens


def test_the_chat_template_writes_the_same_tokens_as_the_rows(built, tokenizer):
    for row in built["eval"][:20]:
        asked, said = row["text"].removeprefix("<s>[INST] ").removesuffix("</s>").split(" [/INST] ")
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert ids == tokenizer(row["text"])["input_ids"]


def test_text_the_tokenizer_was_not_trained_on_survives_a_round_trip(tokenizer):
    text = "Ünïcode, 12345 and {'odd': \"quotes\"}\n\ttabs – 漢字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_build_counts_only_while_it_is_whole_and_of_this_recipe(tmp_path, monkeypatch):
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "build"
    assert not prepare.is_current(folder)
    prepare.build(folder, Console(quiet=True), documents=64)
    assert prepare.is_current(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.model_type == "mistral"
    assert len(AutoTokenizer.from_pretrained(folder / "model")) <= model.config.vocab_size

    rows = folder / "train.jsonl"
    before = rows.read_text()
    rows.write_text(before[:-10])
    assert not prepare.is_current(folder)
    rows.write_text(before)
    assert prepare.is_current(folder)
    monkeypatch.setattr(prepare, "recipe", lambda: "another recipe")
    assert not prepare.is_current(folder)
