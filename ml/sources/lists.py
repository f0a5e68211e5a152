"""CSV and JSON-lines files that list images by path, below the folder in which the list lies.

path (or file_name)            of the image file; a key without a path is its own path
key                            optional; default: the path
class (or class_name, label)   optional; default: the first folder of the key. A number counts into `classes.txt`
split                          optional; where a list has several, one has to be chosen
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import IO, Any, Literal

from ml.errors import DataError
from ml.manifest import Kind
from ml.sources.listing import Entry, Notes, check_name, class_of_folder, name_class, read_class_names
from ml.sources.roots import Root

_PATHS = ("path", "file_name", "key")
_CLASSES = ("class", "class_name", "label")
_NEEDED = "a column `path` (or `key`) is needed, and `class` for labeled images"
_LONGEST_LINE = 1_000_000

_Row = tuple[int, dict[str, Any]]


class ListSource:
    """One list."""

    has_unique_keys = False
    no_classes = "gives no image a class: a column `class` is needed, or a folder per class in the paths"

    def __init__(self, root: Root, name: str, form: Literal["csv", "jsonl"], split: str | None) -> None:
        self.root = root
        self.name = name
        self.path = f"{root}/{name}"
        self.form = form
        self.split = split
        # Most images share a folder with others.
        self._folder_leads_out = lru_cache(maxsize=4096)(partial(root.leads_out, is_folder=True))

    def entries(self, kind: Kind, notes: Notes) -> Iterator[Entry]:
        """As they are listed. DataError, with the line, for what cannot be a row."""
        class_names = None if kind == "unlabeled" else read_class_names(self.root)
        splits: set[str] = set()
        for line, row in _read(self.root, self.name, self.form):
            where = f"{self.name}, line {line}"
            split = _text(row, ("split",), where)
            if split is not None:
                splits.add(split)
            if self.split is not None and split != self.split:
                continue
            yield from self._entry(row, kind, class_names, notes, where)
        self._check_splits(splits)

    def _entry(self, row: dict[str, Any], kind: Kind, class_names: tuple[str, ...] | None, notes: Notes, where: str) -> Iterator[Entry]:
        path = self._key_of(row, _PATHS, where)
        key = path if _text(row, ("key",), where) is None else self._key_of(row, ("key",), where)
        class_name = None
        if kind != "unlabeled":
            given = _text(row, _CLASSES, where)
            # A list that has the column means what it says; an empty cell is no class.
            given = class_of_folder(key) if given is None and not any(name in row for name in _CLASSES) else given
            class_name = None if given is None else name_class(given, class_names, where=where)
        if self._folder_leads_out(os.path.dirname(path)) or self.root.leads_out(path):
            notes.escaping.append(path)
        elif notes.admits(kind, key, class_name):
            yield Entry(key, class_name, None if path == key else path)

    def _key_of(self, row: dict[str, Any], names: tuple[str, ...], where: str) -> str:
        text = _text(row, names, where)
        if text is None:
            raise DataError(f"{where} names no image; {_NEEDED}", path=self.path)
        key, reason = check_name(text)
        if reason is None and "://" in text:
            reason = "addresses are not fetched"
        if reason is not None:
            raise DataError(f"{where}: {key[:200]!r} cannot be listed: {reason}; paths are relative to {self.root}", path=self.path)
        return key

    def _check_splits(self, splits: set[str]) -> None:
        named = ", ".join(sorted(splits)[:20])
        if self.split is None and len(splits) > 1:
            raise DataError(f"{self.path} lists the splits {named}; say which one is meant", path=self.path, splits=sorted(splits)[:100])
        if self.split is not None and self.split not in splits:
            raise DataError(f"{self.path} has no split {self.split!r}, only {named or 'none at all'}", path=self.path)


def _text(row: dict[str, Any], names: tuple[str, ...], where: str) -> str | None:
    """The first of these fields that is there and not empty."""
    for name in names:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, str | int | None):
            raise DataError(f"{where}: {name} is {type(value).__name__}; it must be text or a whole number")
        if value is not None and str(value).strip():
            return str(value)
    return None


def _read(root: Root, name: str, form: str) -> Iterator[_Row]:
    """Line number and fields of every row; DataError, with the line, for a file that is not what its name says."""
    line = 1
    try:
        # utf-8-sig: spreadsheets write a mark in front.
        with io.TextIOWrapper(root.open(name), encoding="utf-8-sig", newline="") as file:
            for line, row in _read_csv(name, file) if form == "csv" else _read_lines(name, file):
                yield line, row
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 somewhere after line {line}", path=name, line=line) from error


def _read_csv(name: str, file: IO[str]) -> Iterator[_Row]:
    reader = csv.reader(file, strict=True)
    header: list[str] = []
    try:
        for fields in reader:
            if not header:
                header = [field.strip() for field in fields]
                if not set(header) & set(_PATHS) or len(set(header)) < len(header):
                    found = ", ".join(header)[:500]
                    raise DataError(f"{name} has no header that names columns, each once: it begins with {found!r}; {_NEEDED}", line=1)
            elif fields and len(fields) != len(header):
                message = f"{name}, line {reader.line_num} has {len(fields)} fields, the header has {len(header)}"
                raise DataError(message, path=name, line=reader.line_num)
            elif fields:
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num} is no CSV: {error}", path=name, line=reader.line_num) from error
    if not header:
        raise DataError(f"{name} is empty: the first line must name the columns; {_NEEDED}", path=name, line=1)


def _read_lines(name: str, file: IO[str]) -> Iterator[_Row]:
    number = 0
    while line := file.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise DataError(f"{name}, line {number} is longer than {_LONGEST_LINE} characters", path=name, line=number)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}, line {number} is no JSON: {error}", path=name, line=number) from error
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {number} is no JSON object; {_NEEDED}", path=name, line=number)
        yield number, row
