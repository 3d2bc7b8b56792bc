"""Data files of every kind, and the rows that the trainer reads from them."""

import csv
import json
from pathlib import Path
from typing import Any

from finetune_api.spec_data import Dataset
from finetune_trainer.data.row_files import DataFile, Rows, read_rows

ROWS = [{"text": "one"}, {"text": 'two\nlines, "quoted"'}, {"text": "drei · 三"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(files: list[DataFile], **dataset: Any) -> Rows:
    return read_rows(files, [], Dataset(train="file:///data", **dataset)).train


def load(path: Path, **dataset: Any) -> tuple[list[Any], str]:
    rows = read([DataFile(path, path.name)], **dataset)
    return [row.data for row in rows], rows.format.name
