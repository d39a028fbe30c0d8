"""comp config: the resolved config of an experiment, with the origin of each value."""

from __future__ import annotations

import json
from typing import Any

from comp.engine import text_table
from comp.engine.config import experiments, resolve


def config(experiment: str, overrides: list[str], debug: bool = False, against: str | None = None) -> None:
    """key=value with file and line of each value; with `against`, only what differs from another
    experiment."""
    loaded = experiments.load(experiment, overrides, debug)
    if against is None:
        values = resolve.flatten(loaded.config.model_dump())
        lines = [
            [f"{key}={format_value(value)}", loaded.origins.get(key, "default")]
            for key, value in values.items()
        ]
        print(text_table.render(["key=value", "from"], lines))
        return
    other = experiments.load(against, (), debug).config
    changed = resolve.diff(other, loaded.config, everything=True)
    if not changed:
        print(f"{experiment} and {against} are the same")
        return
    lines = [[key, *map(format_value, pair)] for key, pair in changed.items()]
    print(text_table.render(["key", against, experiment], lines))


def format_value(value: Any) -> str:
    """As it would be written after key=."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
