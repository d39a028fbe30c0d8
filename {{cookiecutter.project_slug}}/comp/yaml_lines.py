"""YAML as people mean it, with the line of every key.

PyYAML reads `1e-3` as text, `no` as False, `010` as 8 and `1:30` as 90, and lets a duplicate key win silently.
Here numbers are numbers, only true and false are booleans, ids keep their zeros, and a duplicate key is a mistake.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class Unreadable(Exception):
    def __init__(self, message: str, line: int):
        super().__init__(message)
        self.line = line


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Writer(yaml.SafeDumper):
    # Must mirror the reader: a text that the reader would take for a number needs quotes, and only that.
    yaml_implicit_resolvers: dict[str, Any] = {}


_PLAIN = [
    ("tag:yaml.org,2002:bool", r"true|false", "tf"),
    ("tag:yaml.org,2002:null", r"null|~|", ["n", "~", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:0|[1-9][0-9]*)?(?:\.[0-9]+|\.)?(?:[eE][-+]?[0-9]+)?(?<=[0-9.])(?<![-+]\.)(?<!^\.)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:float", r"[-+]?\.inf|\.nan", "-+."),
]
for _tag, _pattern, _first in _PLAIN:
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse(data: bytes) -> tuple[Any, dict[str, int]]:
    """The value, and for every dotted key the line it stands on (from 1)."""
    try:
        text = data.decode("utf-8-sig")
        node = yaml.compose(text, Loader=_Reader)
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"is not UTF-8 text ({error.reason})", 1 + data[: error.start].count(b"\n")
        ) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Unreadable(f"is not YAML: {error.problem or error.context}", line) from None
    except yaml.reader.ReaderError as error:
        raise Unreadable(f"is not YAML: {error.reason}", 1 + text[: error.position].count("\n")) from None
    if node is None:
        return {}, {}
    lines: dict[str, int] = {}
    return _value(node, "", lines), lines


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)


def inline(value: Any) -> str:
    """On one line, as it stands behind a key."""
    text = yaml.dump(value, Dumper=_Writer, default_flow_style=True, allow_unicode=True, width=10**6)
    return str(text).removesuffix("...\n").strip()


def _value(node: yaml.Node, prefix: str, lines: dict[str, int]) -> Any:
    here = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise Unreadable("a key must be a word", line)
            if key in out:
                raise Unreadable(
                    f"{prefix}{key} stands here for the second time, first on line {lines[prefix + key]}",
                    line,
                )
            lines[prefix + key] = line
            out[key] = _value(value_node, f"{prefix}{key}.", lines)
        return out
    if isinstance(node, yaml.SequenceNode):
        lines |= {f"{prefix}{i}": child.start_mark.line + 1 for i, child in enumerate(node.value)}
        return [_value(child, f"{prefix}{i}.", lines) for i, child in enumerate(node.value)]
    return _scalar(node, here)


def _scalar(node: yaml.Node, line: int) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text == "true"
    if kind == "int":
        return int(text)
    if kind == "float":
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    raise Unreadable(f"the tag {node.tag} is not understood; plain values only", line)
