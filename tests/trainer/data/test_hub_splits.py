"""Of a data set on the hub only the wanted split is read: test rows are never trained on."""

from contextlib import suppress
from pathlib import Path

import pytest

from finetune_trainer.data import hub_splits

URI = "hf://datasets/org/rows"
TRAIN, EVAL = ("train",), ("validation", "test")

#: Files, and those that are for training and for evaluation.
LAYOUTS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "names": (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    "validation before test": (["dev.csv", "test.csv", "train.csv"], ["train.csv"], ["dev.csv"]),
    "folders": (["test/0.jsonl", "train/a/0.jsonl", "train/b/0.jsonl"], ["train/a/0.jsonl", "train/b/0.jsonl"],
                ["test/0.jsonl"]),
    "shards": (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
                "data/val-00000-of-00001.parquet"],
               ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
               ["data/val-00000-of-00001.parquet"]),
    "words around": (["nli_train_v2.jsonl", "nli-eval.jsonl", "extra.jsonl"], ["nli_train_v2.jsonl"],
                     ["nli-eval.jsonl"]),
    "no split": (["a.jsonl", "latest.jsonl", "contest/b.jsonl"], ["a.jsonl", "latest.jsonl", "contest/b.jsonl"],
                 ["a.jsonl", "latest.jsonl", "contest/b.jsonl"]),
    "shards that are no splits": (["train/data-00000-of-00001.jsonl", "test/data-00000-of-00001.jsonl"],
                                  ["train/data-00000-of-00001.jsonl"], ["test/data-00000-of-00001.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_told_by_the_names_of_files_and_folders(layout: str) -> None:
    paths, train, held_out = LAYOUTS[layout]
    assert hub_splits.choose(paths, TRAIN, URI) == train
    assert hub_splits.choose(paths, EVAL, URI) == held_out


@pytest.mark.parametrize("layout", ["names", "validation before test", "folders", "shards"])
def test_the_datasets_library_makes_the_same_splits(layout: str, tmp_path: Path) -> None:
    from datasets.data_files import get_data_patterns, resolve_pattern

    paths, train, _ = LAYOUTS[layout]
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found: set[str] = set()
    for pattern in get_data_patterns(str(tmp_path))["train"]:
        with suppress(FileNotFoundError):
            found |= set(resolve_pattern(pattern, str(tmp_path)))
    assert {Path(file).relative_to(tmp_path).as_posix() for file in found} == set(train)


SFT = [f"data/{name}-00000-of-00001.parquet" for name in ("train_sft", "train_gen", "test_sft")]
UNCLEAR: list[tuple[list[str], tuple[str, ...], str]] = [
    (["test.jsonl", "rows.jsonl"], TRAIN, f"{URI} has no train split; it has test: name one, as in {URI}/test"),
    (["train.jsonl"], EVAL, f"{URI} has no validation or test split; it has train: name one, as in {URI}/train"),
    (["main/train.jsonl", "socratic/train.jsonl"], TRAIN,
     f"{URI} has a train split in several folders (main, socratic): name one, as in {URI}/socratic"),
    (["train.jsonl", "de/train.jsonl"], TRAIN, "in several folders (/, de): name one"),
    (SFT, TRAIN, "has no train split; it has test_sft, train_gen, train_sft"),
]  # fmt: skip


@pytest.mark.parametrize(("paths", "wanted", "sentence"), UNCLEAR)
def test_what_is_not_clear_is_for_the_user_to_say(paths: list[str], wanted: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        hub_splits.choose(paths, wanted, URI)
    assert sentence in str(caught.value)


def test_a_split_can_be_named() -> None:
    assert hub_splits.named(SFT, "train_sft", URI) == SFT[:1]
    assert hub_splits.named(["dev.csv", "train.csv"], "validation", URI) == ["dev.csv"]
    with pytest.raises(ValueError, match=rf"{URI} has neither a path nor a split 'trian'; its splits are: test, train"):
        hub_splits.named(["test.csv", "train.csv"], "trian", URI)
