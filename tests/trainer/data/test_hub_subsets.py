"""README.md of a data set is what its author writes, whatever that is."""

import pytest

from finetune_trainer.data import hub_subsets

GOOD = "configs: [{config_name: s, data_files: a.jsonl}]\n"
BOMB = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


def _files(front: str) -> list[str] | None:
    return hub_subsets.files_of(f"---\n{front}---\n", "s", ["a.jsonl"], ("train",), "hf://datasets/o/n")


@pytest.mark.parametrize("files", ["[]", "5", "[{a: b}]"])
def test_a_split_of_no_files_is_explained(files: str) -> None:
    with pytest.raises(ValueError, match="names files of s that are not there: none"):
        _files(f"configs: [{{config_name: s, data_files: [{{split: train, path: {files}}}]}}]\n")


@pytest.mark.parametrize(
    "more", [BOMB, "b: !!bool x\n", "b: !!int ''\n", "b: !!timestamp x\n", "b: 0x" + "f" * 5000 + "\n"]
)
def test_what_is_no_yaml_declares_nothing(more: str) -> None:
    assert _files(GOOD) == ["a.jsonl"]
    assert _files(GOOD + more) is None
