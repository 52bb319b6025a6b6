"""Write the tables of configuration keys in docs/training.md from the docstrings in pangu/config/schema.py.

    python tools/config_reference.py

Run it after a change of pangu/config/schema.py; tests/test_docs.py fails until then.
"""

from __future__ import annotations

import argparse
import ast
import inspect
from pathlib import Path
from typing import Any

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from pangu import config
from pangu.errors import InputError, exit_code

PAGE = Path(__file__).resolve().parents[1] / "docs/training.md"
BEGIN, END = "<!-- keys: made by tools/config_reference.py -->\n", "<!-- end of keys -->\n"
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}


def reference() -> str:
    """One Markdown table per section, in the order of the code: key, type, default, meaning."""
    lines: list[str] = []
    for name, field in config.Config.model_fields.items():
        if inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel):
            lines += [
                f"### `{name}`",
                "",
                " ".join(inspect.cleandoc(field.annotation.__doc__ or "").split()),
                "",
                *_table(field.annotation),
            ]
        else:
            lines += ["### Outside the sections", "", *_table(config.Config, only=name)]
        lines.append("")
    return "\n".join(lines)


def _table(section: type[BaseModel], only: str | None = None) -> list[str]:
    texts, schema = _attribute_texts(section), section.model_json_schema()["properties"]
    prefix = "" if only else next(f"{name}." for name, field in config.Config.model_fields.items() if field.annotation is section)
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        if only in (None, key):
            cells = (f"`{prefix}{key}`", _type(schema[key], field), _default(field), texts[key])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _attribute_texts(section: type[BaseModel]) -> dict[str, str]:
    """The string under each field of a class, on one line."""
    [tree] = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(value))):
                texts[name] = " ".join(value.split())
    return texts


def _is_derived(field: FieldInfo) -> bool:
    """Whether the value is derived from other keys if it is left out (`DerivedCount`, which is 0 until then)."""
    return field.default == 0 and any(isinstance(entry, BeforeValidator) for entry in field.metadata)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None or _is_derived(field):
        return "`null`"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(schema: dict[str, Any], field: FieldInfo) -> str:
    text = " or ".join(dict.fromkeys(map(_plain_type, schema.get("anyOf", [schema]))))
    return f"{text} or `null`" if _is_derived(field) else text


def _plain_type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "null":
        return "`null`"
    if schema["type"] == "array":
        items = schema.get("prefixItems") or [schema["items"]]
        return f"{'pair' if 'prefixItems' in schema else 'list'}: {_plain_type(items[0])}"
    if schema.get("format") == "path":
        return "path"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema]
    return " ".join([TYPES[schema["type"]], ", ".join(limits)]).strip()


def updated(page: str) -> str:
    """The page with its tables replaced.

    Raises:
        InputError: if the page lacks the two comments that enclose them.
    """
    try:
        before, rest = page.split(BEGIN)
        _, after = rest.split(END)
    except ValueError:
        raise InputError(f"{PAGE}: the lines {BEGIN.strip()} and {END.strip()} are expected in it, once each.") from None
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


@exit_code
def main() -> None:
    """Rewrite the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE}: keys of pangu/config/schema.py written")


if __name__ == "__main__":
    main()
