"""YAML without its surprises, and the line number of every key.

PyYAML reads `1e-3` as text, `no` as False, `010` as 8 and `1:30` as 90, and a duplicate key silently
overrides the first. Here `1e-3` is a number, only true and false are booleans, `010` and `1:30` stay text,
and a duplicate key is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class YamlError(Exception):
    def __init__(self, message: str, line: int):
        super().__init__(message)
        self.line = line


MAX_DEPTH = 30  # levels of nesting; PyYAML recurses, and Python's stack ends at about 300
# Values of a file after expanding aliases, against the "billion laughs" attack: nine lines of aliases of
# aliases expand to a billion values.
MAX_VALUES = 100_000
MAX_DIGITS = 100  # of an integer; Python converts up to 4,300


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            line = self.peek_event().start_mark.line + 1
            raise YamlError(f"is nested more than {MAX_DEPTH} levels deep", line)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Writer(yaml.SafeDumper):
    # The resolvers of the reader, so that a string is quoted if and only if it would be read as another
    # type.
    yaml_implicit_resolvers: dict[str, Any] = {}


# (tag, pattern of the whole scalar, its possible first characters). Anything else is text.
SCALAR_PATTERNS = [
    ("tag:yaml.org,2002:bool", r"true|false", "tf"),
    ("tag:yaml.org,2002:null", r"null|~|", ["n", "~", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        # 1.5, .5, 1. and 1e-3, but no leading zero (010). Every part is optional, so three lookbehinds at the end
        # exclude what has no digit: an empty text or a sign alone, `+.`, and `.`
        r"[-+]?(?:0|[1-9][0-9]*)?(?:\.[0-9]+|\.)?(?:[eE][-+]?[0-9]+)?(?<=[0-9.])(?<![-+]\.)(?<!^\.)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:float", r"[-+]?\.inf|\.nan", "-+."),
]
for _tag, _pattern, _first in SCALAR_PATTERNS:
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


def parse(data: bytes) -> tuple[Any, dict[str, int]]:
    """The value, and dotted key -> line number (from 1)."""
    try:
        text = data.decode("utf-8-sig")
        node = yaml.compose(text, Loader=_Reader)
    except UnicodeDecodeError as error:
        raise YamlError(f"is not UTF-8 text ({error.reason})", 1 + data[: error.start].count(b"\n")) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise YamlError(f"is not YAML: {error.problem or error.context}", line) from None
    except yaml.reader.ReaderError as error:
        raise YamlError(f"is not YAML: {error.reason}", 1 + text[: error.position].count("\n")) from None
    if node is None:
        return {}, {}
    return _Values().read(node)


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)


def inline(value: Any) -> str:
    """One line of flow style, to be written after a key."""
    text = yaml.dump(value, Dumper=_Writer, default_flow_style=True, allow_unicode=True, width=10**6)
    return str(text).removesuffix("...\n").strip()


class _Values:
    """Converts the nodes of one file to Python values; aliases are expanded."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.parents: set[int] = set()  # ids of the nodes that contain the current one
        self.count = 0

    def read(self, node: yaml.Node) -> tuple[Any, dict[str, int]]:
        return self._value(node, ""), self.lines

    def _value(self, node: yaml.Node, prefix: str) -> Any:
        line, key = node.start_mark.line + 1, prefix.rstrip(".")
        self.count += 1
        if self.count > MAX_VALUES:
            raise YamlError(
                f"{key}: with its aliases expanded the file has more than {MAX_VALUES:,} values", line
            )
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node, line)
        if id(node) in self.parents:
            raise YamlError(f"{key}: is an alias of a section that contains it", line)
        self.parents.add(id(node))
        out = (
            self._mapping(node, prefix)
            if isinstance(node, yaml.MappingNode)
            else self._sequence(node, prefix)
        )
        self.parents.remove(id(node))
        return out

    def _mapping(self, node: yaml.Node, prefix: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError("a key must be plain text", line)
            if key in out:
                first = self.lines[prefix + key]
                raise YamlError(f"{prefix}{key} is set for the second time, first on line {first}", line)
            self.lines[prefix + key] = line
            out[key] = self._value(value_node, f"{prefix}{key}.")
        return out

    def _sequence(self, node: yaml.Node, prefix: str) -> list[Any]:
        self.lines |= {f"{prefix}{i}": child.start_mark.line + 1 for i, child in enumerate(node.value)}
        return [self._value(child, f"{prefix}{i}.") for i, child in enumerate(node.value)]


def _scalar(node: yaml.Node, line: int) -> Any:
    kind, text = node.tag.rpartition(":")[2], node.value
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return text == "true"
    if kind == "int":
        if len(text) > MAX_DIGITS:
            raise YamlError(f"a number of {len(text):,} digits; at most {MAX_DIGITS} are allowed", line)
        return int(text)
    if kind == "float":
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    raise YamlError(f"the tag {node.tag} is not supported; use plain values", line)
