"""``/docs``: the OpenAPI document as one HTML page, which loads nothing else and needs no script."""

import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

Json = Mapping[str, Any]

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: 0 auto; padding: 1rem }
code, .path { font-family: ui-monospace, monospace; overflow-wrap: anywhere }
section { border-top: 1px solid #8886; margin-top: 1.5rem }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #8883 }
nav ul { columns: 18rem; padding-left: 1rem }
"""


def docs_page(document: Json, openapi_path: str) -> str:
    """A page of an OpenAPI document: each route with the fields of its request and its answer, and its errors.

    openapi_path: where the document itself is, for a link.
    """
    routes = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = document["components"]["schemas"]
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    links = "".join(f'<li><a href="#{_anchor(*route)}">{_named(*route)}</a></li>' for route in routes)
    sections = "".join("".join(_section(*route, schemas)) for route in routes)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f'<h1>{title}</h1><p>Tools read the same as <a href="{escape(openapi_path)}">openapi.json</a>.</p>'
        f"<nav><ul>{links}</ul></nav>{sections}</body></html>"
    )


def _anchor(method: str, path: str, _operation: Json) -> str:
    return escape(f"{method.lower()}{path.replace('/', '-').replace('{', '').replace('}', '')}")


def _named(method: str, path: str, _operation: Json) -> str:
    return f'<span class="path">{escape(method)} {escape(path)}</span>'


def _section(method: str, path: str, operation: Json, schemas: Json) -> Iterator[str]:
    route = (method, path, operation)
    yield f'<section id="{_anchor(*route)}"><h2>{_named(*route)}</h2>'
    if "requestBody" in operation:
        yield f"<h3>Request</h3>{_content(operation['requestBody'], schemas)}"
    for status, response in operation["responses"].items():
        if status == "200":
            yield f"<h3>Answer</h3>{_content(response, schemas)}"
    errors = {status: each["description"] for status, each in operation["responses"].items() if status != "200"}
    if errors:
        rows = "".join(f"<tr><td>{escape(status)}</td><td>{escape(text)}</td></tr>" for status, text in errors.items())
        yield f"<h3>Errors</h3><table>{rows}</table>"
    yield "</section>"


def _content(described: Json, schemas: Json) -> str:
    """The fields of a body in JSON, one a row; a sentence where it has another form."""
    schema = described.get("content", {}).get("application/json", {}).get("schema", {})
    if "$ref" not in schema:
        return f"<p>{escape(described.get('description', 'JSON.'))}</p>"
    model = schemas[_name(schema)]
    needed = model.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(field))}</td>"
        f"<td>{'required' if name in needed else ''}</td></tr>"
        for name, field in model.get("properties", {}).items()
    )
    about = re.sub("``(.+?)``", r"<code>\1</code>", escape(model.get("description", "")))
    return f"<p>{about}</p><table><tr><th>Field</th><th>Type</th><th></th></tr>{rows}</table>"


def _type(schema: Json) -> str:
    """A field's type in words, as "list of string or null"."""
    if "$ref" in schema:
        return _name(schema)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))


def _name(reference: Json) -> str:
    return str(reference["$ref"]).rpartition("/")[2]
