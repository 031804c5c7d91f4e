"""JSON schemas (draft 2020-12), without what makes importing their library slow."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jsonschema

_GRAMMARS = "rfc3987_syntax"


def validator(schema: dict[str, Any]) -> jsonschema.protocols.Validator:
    """A validator of `schema`. No format (uri, date) is checked.

    Where rfc3987_syntax is installed, jsonschema compiles its grammars of URIs as it is imported: a second of every
    start of Snakemake, and of every job on a cluster, for formats that are not checked. It is imported as if that were
    absent.
    """
    hidden = "jsonschema" not in sys.modules and _GRAMMARS not in sys.modules
    if hidden:
        sys.modules[_GRAMMARS] = None  # type: ignore[assignment]
    try:
        import jsonschema
    finally:
        if hidden:
            del sys.modules[_GRAMMARS]
    return jsonschema.Draft202012Validator(schema)
