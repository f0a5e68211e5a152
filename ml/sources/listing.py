"""What a source lists: one entry per image, and notes on what it leaves out."""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from ml.errors import DataError
from ml.locations import Location
from ml.manifest import Kind
from ml.sources.roots import Root

CLASSES_FILE = "classes.txt"
"""Beside tar shards or a list: the names of the classes, one a line; their numbers count from 0."""
EXAMPLES = 100
_LONGEST_KEY = 4096


class Entry(NamedTuple):
    """One image as a source names it; nothing of it has been read."""

    key: str
    class_name: str | None
    container: str | None = None
    offset: int | None = None
    length: int | None = None
    """Bytes in the container; None where only reading tells."""

    def location(self, root: str) -> Location:
        """Where its bytes lie."""
        return Location(f"{root}/{self.container or self.key}", self.offset, self.length)


@dataclass(slots=True)
class LeftOut:
    """What was left out for one reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Notes:
    """What listing a source finds besides the entries."""

    left_out: dict[str, LeftOut] = field(default_factory=dict)
    classes: set[str] = field(default_factory=set)
    """Every class that the source names, with or without images."""
    escaping: list[str] = field(default_factory=list)
    """Symbolic links out of the source."""

    def leave_out(self, reason: str, key: str) -> None:
        """Count it; the first ones are examples."""
        found = self.left_out.setdefault(reason, LeftOut())
        found.count += 1
        if len(found.examples) < EXAMPLES:
            found.examples.append(key)

    def admits(self, kind: Kind, key: str, class_name: str | None) -> bool:
        """Whether the image can be a row; a labeled one needs a class."""
        if kind == "unlabeled":
            return True
        if class_name is None:
            self.leave_out("they have no class", key)
            return False
        self.classes.add(class_name)
        return True


class Source(Protocol):
    """Somewhere that images are listed. Listing it twice gives the same entries."""

    @property
    def root(self) -> Root:
        """Keys or containers are paths below it."""

    has_unique_keys: bool
    """By its nature; else whoever lists it has to look."""
    no_classes: str
    """What to say after its path when labels are wanted and it has none."""

    def entries(self, kind: Kind, notes: Notes) -> Iterator[Entry]:
        """In the order in which they are read fastest. DataError for a source that cannot be trusted to be whole."""


class ListedOnce:
    """A source whose entries are kept in a file when they are listed first: a bucket takes long to list, and may change meanwhile."""

    def __init__(self, source: Source, path: Path) -> None:
        self.root, self.has_unique_keys, self.no_classes = source.root, source.has_unique_keys, source.no_classes
        self._source, self._path = source, path

    def entries(self, kind: Kind, notes: Notes) -> Iterator[Entry]:
        """Those of the source, then always the same."""
        if self._path.exists():
            with self._path.open(encoding="utf-8") as lines:
                yield from (Entry(*json.loads(line)) for line in lines)
            return
        aside = self._path.with_suffix(".part")
        with aside.open("w", encoding="utf-8") as file:
            for entry in self._source.entries(kind, notes):
                file.write(f"{json.dumps(entry)}\n")
                yield entry
        aside.replace(self._path)


def check_name(name: str) -> tuple[str, str | None]:
    """A path as a key, and why it cannot be one: (key, None) or (name to show, reason)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return ascii(name), "their names are not UTF-8"
    if name.startswith("/"):
        return name, "their names are absolute paths"
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        return name, "their names lead out by `..`"
    if not parts or "\0" in name or len(name) > _LONGEST_KEY:
        return name[:200].replace("\0", ""), "their names are empty, too long, or hold a zero character"
    return "/".join(parts), None


def is_hidden(key: str) -> bool:
    """Like `.DS_Store` and what lies in `.cache/`."""
    return key.startswith(".") or "/." in key


def class_of_folder(key: str) -> str | None:
    """The first folder of the key."""
    name, slash, _ = key.partition("/")
    return name if slash else None


def read_class_names(root: Root) -> tuple[str, ...] | None:
    """Those of CLASSES_FILE; None without one."""
    path = f"{root}/{CLASSES_FILE}"
    if not root.has_file(CLASSES_FILE):
        return None
    try:
        with root.open(CLASSES_FILE) as file:
            names = tuple(line.strip() for line in file.read().decode().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", path=path) from error
    if not names or len(set(names)) < len(names):
        raise DataError(f"{path} must have one class name a line, each once", path=path)
    return names


def name_class(value: str, class_names: tuple[str, ...] | None, *, where: str) -> str | None:
    """The class that a name, or a number where names are listed, stands for; None for an empty one. DataError when it is unknown."""
    value = value.strip()
    if check_name(value.replace("/", "-") or "-")[1] is not None:
        raise DataError(f"{where}: {value[:200]!a} is no class name: it is too long, or holds characters that are no text")
    if not value or class_names is None or value in class_names:
        return value or None
    if value.isdecimal() and int(value) < len(class_names):
        return class_names[int(value)]
    raise DataError(
        f"{where}: the class {value[:200]!r} is none of the {len(class_names)} of {CLASSES_FILE}: {', '.join(class_names[:10])}",
        unknown=[value[:200]],
        known=list(class_names[:100]),
    )


class Fingerprints:
    """Eight bytes of each of many keys: enough to tell in little memory that none stands twice."""

    def __init__(self) -> None:
        self._prints = array.array("Q")

    @staticmethod
    def of(key: str) -> int:
        """Equal for equal keys."""
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")

    def add(self, key: str) -> None:
        self._prints.append(self.of(key))

    def repeated(self) -> set[int]:
        """Those that came more than once."""
        import numpy as np

        prints = np.sort(np.frombuffer(self._prints, np.uint64)) if self._prints else np.zeros(0, np.uint64)
        return set(prints[1:][prints[1:] == prints[:-1]].tolist())
