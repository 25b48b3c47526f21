"""Records with a text in a field: lines of JSON, rows of Parquet files and of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gateloop_transformer.stored import parse_json

# A line of JSON is parsed in memory, so its length is bounded; a file without line breaks is not JSON lines.
LONGEST_LINE = 1 << 28
_ROWS = 256


def json_lines(file: BinaryIO, where: str, field: str) -> Iterator[bytes]:
    """Yield the texts of JSON lines as UTF-8; null gives an empty text, and blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object, or has no text in the field; the message says which line.
    """
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        place = f"{where}, line {number}"
        if len(line) > LONGEST_LINE:
            raise ValueError(f"{place} is longer than {LONGEST_LINE >> 20} MiB; JSON lines hold one document a line")
        if line.isspace():
            continue
        record = parse_json(line, place)
        if not isinstance(record, dict):
            raise ValueError(f"{place} must be a JSON object with the field {field!r}, not {_kind(record)}")
        if field not in record:
            raise ValueError(_missing(place, field, record))
        yield _text(record[field], place, field)


def parquet_rows(path: Path, field: str) -> Iterator[bytes]:
    """Yield the texts of a Parquet file's rows as UTF-8; null gives an empty text. It holds one row group in memory.

    Raises:
        ValueError: the file is damaged or has no text column of that name, or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("Parquet files need the package pyarrow: `pip install gateloop-transformer[data]`") from error
    where = repr(str(path))
    try:
        # The file is opened here, because pyarrow takes only names that are UTF-8.
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            if field not in file.schema_arrow.names:
                raise ValueError(_missing(where, field, file.schema_arrow.names))
            row = 0
            for batch in file.iter_batches(_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _text(value, f"{where}, row {row}", field)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {where}: {str(error).splitlines()[0]}") from error


def dataset_rows(dataset: Any, where: str, field: str) -> Iterator[bytes]:
    """Yield the texts of a Hugging Face dataset's rows as UTF-8; null gives an empty text.

    Raises:
        ValueError: the dataset has no text column of that name, or cannot be read.
    """
    import datasets

    names = dataset.column_names
    if names is not None and field not in names:
        raise ValueError(_missing(where, field, names))
    row = 0
    try:
        for batch in dataset.select_columns([field]).iter(batch_size=_ROWS):
            for value in batch[field]:
                row += 1
                yield _text(value, f"{where}, row {row}", field)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"cannot read {where}: {str(error).splitlines()[0]}") from error


def _text(value: Any, place: str, field: str) -> bytes:
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise ValueError(f"{place}: the field {field!r} must be a text, not {_kind(value)}")
    # JSON can hold half of a surrogate pair, for which UTF-8 has no bytes.
    return value.encode("utf-8", "surrogatepass")


def _missing(place: str, field: str, names: Iterable[str]) -> str:
    others = ", ".join(map(repr, list(names)[:8]))
    return f"{place} has no field {field!r} (--field names another: {others or 'there is none'})"


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
