"""Datasets of Hugging Face, by name or in a local folder, as documents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gateloop_transformer.data.documents import Document, Source, stamp
from gateloop_transformer.data.files import walk
from gateloop_transformer.data.records import dataset_rows


class HuggingFace(Source):
    """Rows of a Hugging Face dataset, by name or in a local folder."""

    def __init__(self, source: str, field: str) -> None:
        super().__init__(repr(source))
        self.field = field
        self.name, self.config, self.split = parse_hugging_face(source)
        self._dataset: Any = None
        self._version: list[Any] = []

    def documents(self, binary: bool = False) -> Iterator[Document]:
        self._start()
        self._load()
        found = False
        for document in self._texts(dataset_rows(self._dataset, self.label, self.field), "."):
            found = True
            yield document
        self._check_some(found)

    def identity(self) -> list[Any]:
        self._load()
        return ["hf", self.name, self.config, self.split, self._version]

    def _load(self) -> None:
        """Load the dataset, and find what identifies its version."""
        if self._dataset is not None:
            return
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"{self.label} needs the package datasets: `pip install gateloop-transformer[data]`"
            ) from error
        path = Path(self.name)
        try:
            if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
                loaded = datasets.load_from_disk(self.name)
            else:
                builder = datasets.load_dataset_builder(self.name, self.config)
                self._version = [builder.hash, str(builder.config.version)]
                # A part of a split needs the whole split downloaded; a whole split is read as a stream.
                part = self.split is not None and "[" in self.split
                loaded = datasets.load_dataset(
                    self.name, self.config, split=self.split if part else None, streaming=not part
                )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(f"cannot load {self.label}: {str(error).splitlines()[0]}") from error
        if not isinstance(loaded, dict) and self.split is not None and "[" not in self.split:
            own = getattr(loaded, "split", None)
            loaded = {"" if own is None else str(own): loaded}
        self._dataset = self._pick(loaded) if isinstance(loaded, dict) else loaded
        if path.is_dir():
            self._version = [stamp(file) for file in walk(path)]

    def _pick(self, splits: dict[str, Any]) -> Any:
        wanted = self.split or (next(iter(splits)) if len(splits) == 1 else "train")
        if wanted not in splits:
            names = ", ".join(filter(None, splits)) or "no splits"
            raise ValueError(f"{self.label} has no split {wanted!r}; it has {names} (name one as hf:NAME:SPLIT)")
        return splits[wanted]


def parse_hugging_face(source: str) -> tuple[str, str | None, str | None]:
    """Parse "hf:NAME[,CONFIG][:SPLIT]" to name, configuration and split; if the rest exists as a path, it is the name.

    Raises:
        ValueError: there is no name.

    >>> parse_hugging_face("hf:allenai/c4,en:train"), parse_hugging_face("hf:imdb")
    (('allenai/c4', 'en', 'train'), ('imdb', None, None))
    """
    rest = source.removeprefix("hf:")
    if os.path.exists(rest):
        return rest, None, None
    name, _, split = rest.partition(":")
    name, _, config = name.partition(",")
    if not name:
        raise ValueError(f"{source!r} names no dataset: hf:NAME[,CONFIG][:SPLIT], or hf:FOLDER[:SPLIT]")
    return name, config or None, split or None
