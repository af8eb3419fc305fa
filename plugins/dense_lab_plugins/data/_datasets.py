"""Documents read through Hugging Face `datasets`, which is imported only when it is needed (it takes a second)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dense_lab.errors import InputError, Problem, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping


def read_files(table: str, files: list[Path], field: str) -> list[bytes]:
    """Every row's `field` of local files in a format that `datasets` knows (`json`, `parquet`)."""
    import datasets

    datasets.disable_progress_bars()
    names = ", ".join(str(file) for file in files)
    try:
        rows = datasets.load_dataset(table, data_files=[str(file.resolve()) for file in files], split="train")
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise InputError(Problem(f"{names} cannot be read as {table}: {root_cause(error)}", "data.path")) from error
    return texts(rows.select_columns(check_field(rows.features, field, names)), field, names)


def check_field(features: Mapping[str, Any] | None, field: str, source: str) -> str:
    """`field`; raises InputError naming the fields there are when it is not among them."""
    if features is not None and field not in features:
        known = list(features)
        raise InputError(
            Problem(
                f"{source} has no field {field!r}.{did_you_mean(field, known)} It has: {', '.join(known)}", "data.field"
            )
        )
    return field


def texts(rows: Iterable[Mapping[str, Any]], field: str, source: str) -> list[bytes]:
    """The rows' texts in UTF-8; raises InputError for a value that is no text. Missing values are passed over."""
    documents = []
    for index, row in enumerate(rows):
        text = row[check_field(row, field, source)]
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(
                Problem(f"{source}: field {field!r} of row {index} is {type(text).__name__}, not text", "data.field")
            )
        documents.append(text.encode(errors="surrogatepass"))
    return documents


def root_cause(error: BaseException) -> str:
    """What lies at the bottom of a chain of exceptions, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split()) or type(error).__name__
