"""Which columns of a Parquet file hold images, their names and their classes: the layout of Hugging Face's datasets.

image   struct {bytes: binary, path: string}, or binary
label   integers whose names stand in the schema's `huggingface` metadata (ClassLabel), plain integers, or strings
key     string; optional, unique over all files
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ml.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_NAMES = ("image", "img")
LABEL_NAMES = ("label", "labels", "class", "class_name")
KEY_NAMES = ("key", "__key__", "file_name")
_ADVICE = "an `image` column (struct of bytes and path, or binary) is needed, and `label` (integers or strings) for labeled images"


@dataclass(frozen=True, slots=True)
class ImageColumns:
    """Names of the columns of one file."""

    image: str
    is_struct: bool
    """Of bytes and perhaps path; else the column itself is binary."""
    has_path: bool
    key: str | None
    label: str | None
    class_names: tuple[str, ...] | None
    """What the label's integers mean; None where the labels are their own names."""

    def bytes_path(self) -> str:
        """What to ask a reader for."""
        return f"{self.image}.bytes" if self.is_struct else self.image


def find_columns(schema: pa.Schema, *, of: str) -> ImageColumns:
    """The columns of the file `of`; DataError, with the columns that are there, when none holds images or several could."""
    import pyarrow as pa

    fields = {field.name: field.type for field in schema}
    found = [name for name, kind in fields.items() if _holds_images(kind)]
    found += [name for name in IMAGE_NAMES if name in fields and _is_binary(fields[name])]
    named = [name for name in IMAGE_NAMES if name in found] or found
    if len(named) != 1:
        there = ", ".join(f"{field.name} ({field.type})" for field in schema)[:2000]
        which = "no column holds images" if not named else f"{', '.join(named)} could all be the images"
        raise DataError(f"{of}: {which} among {there or 'no columns'}; {_ADVICE}", path=of, columns=list(fields))
    image, kind = named[0], fields[named[0]]
    keys = [name for name in KEY_NAMES if name in fields and _is_text(fields[name])]
    label, class_names = _find_label(schema, fields, of)
    is_struct = pa.types.is_struct(kind)
    has_path = is_struct and any(kind.field(place).name == "path" for place in range(kind.num_fields))
    return ImageColumns(image, is_struct, has_path, keys[0] if keys else None, label, class_names)


def _find_label(schema: pa.Schema, fields: dict[str, Any], of: str) -> tuple[str | None, tuple[str, ...] | None]:
    named = {name: feature["names"] for name, feature in _features(schema).items() if feature.get("names") and name in fields}
    label = next((name for name in (*LABEL_NAMES, *(named if len(named) == 1 else ())) if name in fields), None)
    if label is None:
        if len(named) > 1:
            raise DataError(
                f"{of}: {', '.join(named)} are all labels; rename the one that is meant to `label`", path=of, columns=list(fields)
            )
        return None, None
    if not (_is_integer(fields[label]) or _is_text(fields[label])):
        raise DataError(f"{of}: the column {label!r} is {fields[label]}; {_ADVICE}", path=of, columns=list(fields))
    names = named.get(label)
    return label, None if names is None or not _is_integer(fields[label]) else tuple(str(name) for name in names)


def _features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    """What Hugging Face's library says of the columns; empty when it did not write the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)} if isinstance(features, dict) else {}


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind) and any(
        kind.field(place).name == "bytes" and _is_binary(kind.field(place).type) for place in range(kind.num_fields)
    )


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_integer(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind))
