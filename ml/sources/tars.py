"""Tar shards as WebDataset writes them. Nothing is unpacked: a listing knows where each member's bytes begin.

A member's key is its name. Its class stands in a member `.cls` beside it (`0001.jpg`, `0001.cls`: a name, or a number that
`classes.txt` beside the shards explains), else it is its first folder. Members of one sample stand together.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import IO, NamedTuple

from ml.errors import DataError
from ml.manifest import Kind
from ml.sources.listing import Entry, Notes, check_name, class_of_folder, is_hidden, name_class, read_class_names
from ml.sources.roots import Root

_BLOCK = 512
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK")
_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
_FIELDS = ("cls", "json", "txt")
_LONGEST_CLASS = 1000
# What the standard library raises on headers made to hurt it.
_HEADER_ERRORS = (tarfile.TarError, ValueError, EOFError, OverflowError, LookupError)


class _Member(NamedTuple):
    key: str
    offset: int
    size: int
    text: bytes = b""
    """What a class beside an image says; read in passing, because going back to it would cost a request each."""

    def sample(self) -> str:
        """The name up to the first dot of its last part."""
        folder, slash, name = self.key.rpartition("/")
        return f"{folder}{slash}{name.partition('.')[0]}"

    def suffix(self) -> str:
        """What comes after its last dot."""
        return self.key.rpartition("/")[2].rpartition(".")[2].lower()


class TarSource:
    """Some tar files below `root`."""

    has_unique_keys = False
    no_classes = "gives no image a class: put the members of each class into a folder, or a .cls member beside each image"

    def __init__(self, root: Root, names: tuple[str, ...]) -> None:
        self.root = root
        self.names = names

    def entries(self, kind: Kind, notes: Notes) -> Iterator[Entry]:
        """As they lie. DataError for a file that is no tar, compressed, or cut short."""
        class_names = None if kind == "unlabeled" else read_class_names(self.root)
        for name in self.names:
            with self.root.open(name) as file:
                for _, members in groupby(_members(file, name, kind, notes), _Member.sample):
                    sample = list(members)
                    named = None if kind == "unlabeled" else _class_beside(name, sample, class_names)
                    yield from _images(name, sample, named=named, kind=kind, class_names=class_names, notes=notes)


def _fields(sample: list[_Member]) -> set[str]:
    """Keys of the members that say something of the image beside them."""
    has_image = any(member.suffix() in _IMAGES for member in sample)
    return {member.key for member in sample if has_image and member.suffix() in _FIELDS}


def _class_beside(name: str, sample: list[_Member], class_names: tuple[str, ...] | None) -> str | None:
    fields = _fields(sample)
    found = (member for member in sample if member.key in fields and member.suffix() == "cls")
    return next((_read_class(name, member, class_names) for member in found), None)


def _images(
    name: str, sample: list[_Member], *, named: str | None, kind: Kind, class_names: tuple[str, ...] | None, notes: Notes
) -> Iterator[Entry]:
    """The images of one sample, and whatever else is not one of its fields."""
    fields = _fields(sample)
    for member in sample:
        if member.key in fields:
            if member.suffix() != "cls":
                notes.leave_out("they describe the image beside them", member.key)
            continue
        class_name, folder = named, class_of_folder(member.key)
        if kind == "unlabeled":
            class_name = None
        elif named is None and folder is not None:
            class_name = name_class(folder, class_names, where=f"{name}, member {member.key}")
        if notes.admits(kind, member.key, class_name):
            yield Entry(member.key, class_name, name, member.offset, member.size)


def _read_class(name: str, member: _Member, class_names: tuple[str, ...] | None) -> str | None:
    where = f"{name}, member {member.key}"
    if member.size > _LONGEST_CLASS:
        raise DataError(f"{where} has {member.size} bytes; a class is a name or a number", path=name)
    try:
        text = member.text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is no class: it is not UTF-8", path=name) from error
    return name_class(text, class_names, where=where)


def _members(file: IO[bytes], name: str, kind: Kind, notes: Notes) -> Iterator[_Member]:
    """The regular files of a whole tar; everything else is noted and never followed."""
    if _read_at(file, 0, 6).startswith(_COMPRESSED):
        raise DataError(f"{name} is compressed, so its images cannot be read one by one; unpack it to a plain .tar", path=name)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    last, end = "none", 0
    try:
        with tarfile.open(fileobj=file, mode="r:", errorlevel=1) as tar:
            # The list that it keeps of all members is what makes it large, and `next` does not need it. Not in the stubs.
            while (info := tar.next()) is not None:
                vars(tar)["members"].clear()
                if info.size < 0 or tar.offset <= end:
                    raise DataError(
                        f"{name} is damaged at byte {info.offset}; the last whole member is {last}", path=name, offset=info.offset
                    )
                if info.isreg() and not info.issparse() and info.offset_data + info.size > size:
                    raise _cut_short(name, info.offset, last)
                end, last = tar.offset, ascii(info.name)[1:-1]
                member = _admitted(info, kind, notes)
                if member is not None and kind != "unlabeled" and member.suffix() == "cls" and member.size <= _LONGEST_CLASS:
                    member = member._replace(text=_read_at(file, member.offset, member.size))
                if member is not None:
                    yield member
            end = tar.offset
    except _HEADER_ERRORS as error:
        if end == 0:
            raise DataError(f"{name} is no tar file: {error}", path=name, offset=0) from error
        raise _cut_short(name, end, last) from error
    # Reading just stops at a damaged header, and where the file ends.
    if _read_at(file, end, _BLOCK) != bytes(_BLOCK):
        raise _cut_short(name, end, last)


def _read_at(file: IO[bytes], offset: int, length: int) -> bytes:
    """Without moving on in it."""
    place = file.tell()
    file.seek(offset)
    data = file.read(length)
    file.seek(place)
    return data


def _cut_short(name: str, offset: int, last: str) -> DataError:
    return DataError(
        f"{name} is cut short or damaged at byte {offset}; the last whole member is {last}; write it again",
        path=name,
        offset=offset,
        last=last,
    )


def _admitted(info: tarfile.TarInfo, kind: Kind, notes: Notes) -> _Member | None:
    key, reason = check_name(info.name)
    if info.isdir():
        if reason is None and "/" not in key and kind != "unlabeled" and not is_hidden(key):
            notes.classes.add(key)
        return None
    if reason is None and is_hidden(key):
        return None
    if info.issym() or info.islnk():
        reason = "they are links"
    elif info.issparse():
        reason = "they are sparse files"
    elif not info.isreg():
        reason = "they are devices, pipes or the like"
    if reason is not None:
        notes.leave_out(reason, key)
        return None
    return _Member(key, info.offset_data, info.size)
