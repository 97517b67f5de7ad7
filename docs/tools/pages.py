"""The pages that are printed from the code: configuration.md from its dataclasses, api.md from docstrings of public names.

`python -m docs.tools.pages` in the repository's root writes both; a test compares them with what this prints.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import moesaic
import moesaic.optim
import moesaic.transformers
from moesaic.launch.config import Config
from moesaic.runtime.wrap.model_weights import ModelWeights
from moesaic.runtime.wrap.recorder import Recorder
from moesaic.runtime.wrap.telemetry import Telemetry

DOCS = Path(__file__).resolve().parents[1]
_MODULES = (moesaic, moesaic.optim, moesaic.transformers)
# Members without an underscore that only moesaic itself uses.
_INTERNAL = {
    "MoELayer": ("runtime",),
    "ShardedExperts": ("begin", "source", "share", "follow_bank"),
    "Telemetry": ("close_step",),
    "Recorder": ("write_plan",),
}
# Classes of what a member holds, whose members stand below it.
_PARTS = {"weights": ModelWeights, "telemetry": Telemetry, "record": Recorder}

_GENERATED = "<!-- Printed by docs/tools/pages.py: change the code's docstrings, then run `make docs`. -->"

_CONFIGURATION = f"""\
{_GENERATED}

# Configuration

Every option of a training run: its default, the values it takes and what it does. `[router]`, `[runtime]`,
`[runtime.migration]` and `[runtime.debug]` are `RouterConfig`, `RuntimeConfig`, `MigrationConfig` and `DebugConfig` of the
Python API as well; the other sections belong to `moesaic train`.

- In a file: `moesaic train --config run.toml`, with sections and keys as below.
- On the command line: `--set section.key=value`, as often as needed, over the file; `--set migration.every=50` is short for
  `--set runtime.migration.every=50`. A value is read as TOML (`0.1`, `true`,
  `"text"`), else taken as text.
- In Python: `shard_experts(model, mesh=mesh, config=RuntimeConfig(slots=4, debug=DebugConfig(overlap=False)))`,
  `MoELayer(..., router=RouterConfig(z_loss_coef=1e-3))`.

A wrong key, type or bound is one line that names the key, where it was given and the cure. The resolved configuration of a run is
`config.toml` in its folder. The defaults are those of `make demo`.
"""

_API = f"""\
{_GENERATED}

# Python API

The public names of `moesaic` and `moesaic.optim`, with their docstrings. The configuration classes have a
[page of their own](configuration.md).
Shape letters: T tokens, D model dimension, F an expert's hidden dimension, K experts per token, E experts, L layers, R ranks.
"""


def configuration_page() -> str:
    """configuration.md: a section for each table of the TOML file, those inside a table after it; a row for each key."""
    defaults = Config()
    sections = [_section(name, getattr(defaults, name)) for name in typing.get_type_hints(Config)]
    return "\n".join([_CONFIGURATION, *sections])


def _section(name: str, default: Any) -> str:
    kind = type(default)
    hints = typing.get_type_hints(kind, include_extras=True)
    meanings = field_docstrings(kind)
    title = inspect.cleandoc(kind.__doc__ or "").splitlines()[0].removeprefix(f"[{name}]: ")
    lines = [f"## [{name}]", "", _sentence(title), "", "| key | default | values | meaning |", "|---|---|---|---|"]
    nested = []
    for field in dataclasses.fields(kind):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            nested.append(_section(f"{name}.{field.name}", value))
            continue
        cells = (f"`{field.name}`", f"`{_toml(value)}`", values_of(hints[field.name]), meanings[field.name])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", *nested])


def field_docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a class, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for above, below in zip(definition.body, definition.body[1:], strict=False):
        is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and is_text:
            found[above.target.id] = " ".join(below.value.value.split())  # type: ignore[attr-defined]
    return found


def values_of(hint: Any) -> str:
    """What an option takes, in words, from its annotation.

    Example: `Annotated[int, Field(ge=1)]` is "whole number, 1 or more".
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Sequence:
        return f"list of {values_of(args[0])}s"
    if origin is Literal:
        return " ".join(f"`{_toml(arg)}`" for arg in args)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(values_of(arg) for arg in args)
    if origin is typing.Annotated:
        bounds = {key: value for part in args[1:] for bound in part.metadata for key, value in vars_of(bound).items()}
        return f"{values_of(args[0])}{_range(bounds)}"
    return {int: "whole number", float: "number", bool: "`true` `false`", str: "text"}[hint]


def vars_of(bound: Any) -> dict[str, Any]:
    """The fields of an annotated bound, such as ge=1."""
    return (
        {field.name: getattr(bound, field.name) for field in dataclasses.fields(bound)} if dataclasses.is_dataclass(bound) else {}
    )


def _range(bounds: Mapping[str, Any]) -> str:
    texts = {"ge": "{} or more", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}
    parts = [text.format(_number(bounds[key])) for key, text in texts.items() if key in bounds]
    return ", " + ", ".join(parts) if parts else ""


def _number(value: float) -> str:
    return "2^64" if value == 2**64 else f"{value:,.0f}" if value >= 1e4 else f"{value:g}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def api_page() -> str:
    """api.md: signature and docstring of every public name, and of the public methods of classes."""
    return "\n".join([_API, *(part for module in _MODULES for part in _module(module))]).rstrip() + "\n"


def _module(module: types.ModuleType) -> Iterator[str]:
    functions = [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]
    classes = [name for name in module.__all__ if name not in functions and not name.endswith("Config")]
    prefix = module.__name__.removeprefix("moesaic").removeprefix(".")
    for name in [*functions, *classes]:
        yield from _entry(f"{prefix}.{name}".removeprefix("."), getattr(module, name), level=2)
        if name in classes:
            for member, value in _members(getattr(module, name)):
                yield from _entry(member, value, level=3)
                for inner, inner_value in _members(_PARTS[member]) if member in _PARTS else ():
                    yield from _entry(f"{member}.{inner}", inner_value, level=4)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that have a docstring of their own, in the order of the source."""
    left_out = _INTERNAL.get(kind.__name__, ())
    for name, value in vars(kind).items():
        if name.startswith("_") or name in left_out or not isinstance(value, types.FunctionType | property):
            continue
        if value.__doc__ and not value.__doc__.startswith(("See `nn.Module.", "See `torch.")):
            yield name, value


def _entry(name: str, value: Any, *, level: int) -> list[str]:
    signature = [] if _has_no_arguments_of_its_own(value) else [f"```python\n{name}{_signature(value)}\n```\n"]
    return [f"{'#' * level} {name}\n", *signature, _docstring(value) + "\n"]


def _has_no_arguments_of_its_own(value: Any) -> bool:
    """Properties, protocols, and classes that others' constructors make."""
    return isinstance(value, property) or (
        inspect.isclass(value) and ("__init__" not in vars(value) or getattr(value, "_is_protocol", False))
    )


def _signature(value: Any) -> str:
    """Arguments and defaults, one a line where they do not fit; annotations only of results."""
    signature = inspect.signature(value)
    arguments = [p for p in signature.parameters.values() if p.name != "self"]
    texts, starred = [], False
    for argument in arguments:
        if argument.kind is argument.KEYWORD_ONLY and not starred:
            texts.append("*")
        starred = starred or argument.kind in (argument.KEYWORD_ONLY, argument.VAR_POSITIONAL)
        texts.append(str(argument.replace(annotation=argument.empty)).replace(" = ", "="))
    line = f"({', '.join(texts)})"
    return line if len(line) < 90 else "(\n    " + ",\n    ".join(texts) + ",\n)"


def _docstring(value: Any) -> str:
    """A docstring as Markdown: its Args and Raises as lists, aligned lists of keys as code."""
    paragraphs = inspect.cleandoc(value.__doc__ or "").split("\n\n")
    return "\n\n".join(_named_list(paragraph) or _as_is(paragraph) for paragraph in paragraphs)


def _as_is(paragraph: str) -> str:
    is_table = re.search(r"^\S+ {3,}\S", paragraph, re.MULTILINE)
    return f"```\n{paragraph}\n```" if is_table else paragraph


def _named_list(paragraph: str) -> str:
    """A paragraph such as "Args:" with indented names below; empty for any other."""
    title, _, body = paragraph.partition("\n")
    if title not in ("Args:", "Raises:", "Returns:") or not body.startswith("    "):
        return ""
    items = re.split(r"\n(?=\S)", textwrap.dedent(body))
    parted = [" ".join(item.split()).partition(": ") for item in items]
    return "\n".join([f"**{title}**", "", *(f"- `{names}`: {meaning}" for names, _, meaning in parted)])


PAGES: Mapping[str, Callable[[], str]] = types.MappingProxyType({"configuration.md": configuration_page, "api.md": api_page})


if __name__ == "__main__":
    for page, render in PAGES.items():
        (DOCS / page).write_text(render(), encoding="utf-8")
