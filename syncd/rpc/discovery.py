"""The OpenRPC document, generated from the structs that decode and encode the messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from syncd import errors
from syncd.errors import InvalidParams, RequestError
from syncd.rpc.protocol import CODES, INTERNAL_ERROR_KIND, SERVER_ERROR, Method

OPENRPC_VERSION = "1.3.2"
REFERENCE = "#/components/schemas/{name}"


def openrpc_document(methods: Mapping[str, Method[Any, Any]], *, version: str) -> dict[str, Any]:
    """The OpenRPC document (https://spec.open-rpc.org).

    It has every method with the schemas of its parameters and its result, and every error.
    """
    types = [kind for method in methods.values() for kind in (method.params, method.result)]
    schemas, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    results = dict(zip(methods, schemas[1::2], strict=True))
    return {
        "openrpc": OPENRPC_VERSION,
        "info": {"title": "syncd", "version": version},
        "methods": [
            _method(name, methods[name], results[name], components) for name in sorted(methods)
        ],
        "components": {"schemas": components, "errors": _errors()},
    }


def _method(
    name: str, method: Method[Any, Any], result: Any, components: Mapping[str, Any]
) -> dict[str, Any]:
    schema = components[method.params.__name__]
    required = schema.get("required", ())
    return {
        "name": name,
        "summary": method.summary,
        "paramStructure": "by-name",
        "params": [
            {"name": field, "required": field in required, "schema": field_schema}
            for field, field_schema in schema["properties"].items()
        ],
        "result": {"name": "result", "schema": result},
        "errors": [{"$ref": f"#/components/errors/{kind}"} for kind in _errors()],
    }


def _errors() -> dict[str, Any]:
    """Every error by its kind; ``data.kind`` tells apart the errors that share the code -32000."""
    classes = [
        cls
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, RequestError)
    ]
    documents = {cls.kind: (CODES[cls], cls.__doc__) for cls in CODES}
    documents |= {
        cls.kind: (SERVER_ERROR, cls.__doc__)
        for cls in classes
        if cls not in (RequestError, InvalidParams)
    }
    documents[INTERNAL_ERROR_KIND] = (SERVER_ERROR, "syncd failed; its log has the traceback.")
    return {
        kind: {"code": code, "message": (text or "").strip(), "data": {"kind": kind}}
        for kind, (code, text) in documents.items()
    }
