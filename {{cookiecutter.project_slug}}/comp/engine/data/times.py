"""The time column as numbers whose differences folds.gap can count: days since 1970 for dates, numbers as they are.

    2020-01-31, 2020-01-31T12:00Z …      ISO dates: days
    20200131                             eight digits, all of them dates: days
    2019.5, 17, 2020                     numbers, in whatever unit they are
    202001, 1580428800, 20200131120000   a month, a second, a moment or a plain number: refused until competition.time_format says

competition.time_format is `number`, `unix` (seconds since 1970), `unix_ms`, or a format of strptime like "%d.%m.%Y". What was decided
is printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.data import targets
from comp.engine.errors import Refused

if TYPE_CHECKING:
    import pandas as pd

KEY = "configs/competition.yaml: time_format"
UNIX = {"unix": 1.0, "unix_ms": 1000.0}  # of a second
# Integers that may be dates: digits, the format they then have, and what a person calls them. The first needs no declaration.
PACKED = (
    (8, "%Y%m%d", "dates"),
    (6, "%Y%m", "months"),
    (10, "%Y%m%d%H", "hours"),
    (12, "%Y%m%d%H%M", "minutes"),
    (14, "%Y%m%d%H%M%S", "seconds"),
)
YEARS = (1900, 2100)  # of a date in digits: beyond them it is a number
SECONDS = (10**9, 2 * 10**9)  # 2001 to 2033


class Times(NamedTuple):
    values: NDArray[np.float64]  # NaN where missing or wrong
    note: str
    wanted: str  # of a value that is wrong


def read(text: pd.Series, name: str, declared: str | None, where: Callable[[int], str]) -> Times:
    present = text.dropna()
    if declared is not None:
        return _declared(text, name, declared)
    if len(present) and present.map(lambda cell: bool(re.fullmatch(r"[0-9]+", cell))).all():
        packed = _packed(text, present, name, where)
        if packed is not None:
            return packed
    values = targets.to_numbers(text)
    if np.isfinite(values[text.notna().to_numpy()]).any():
        return Times(values, f"time: {name}: numbers, and folds.gap is in their unit", "all numbers, or all dates like 2020-01-31")  # fmt: skip
    return Times(
        _days(text, "ISO8601"), f"time: {name}: dates, and folds.gap is in days", "all numbers, or all dates like 2020-01-31"
    )  # fmt: skip


def _declared(text: pd.Series, name: str, declared: str) -> Times:
    if declared == "number":
        return Times(
            targets.to_numbers(text), f"time: {name}: numbers, and folds.gap is in their unit", "a number"
        )
    if declared in UNIX:
        values = np.asarray(targets.to_numbers(text) / (86400 * UNIX[declared]), np.float64)
    else:
        values = _days(text, declared)
    return Times(values, f"time: {name}: {declared}, and folds.gap is in days", f"time_format: {declared}")


def _packed(text: pd.Series, present: pd.Series, name: str, where: Callable[[int], str]) -> Times | None:
    """Dates written as one integer. None: they are numbers."""
    numbers = present.map(int)
    lengths = set(present.str.len())
    for digits, form, what in PACKED:
        if lengths != {digits}:
            continue
        years = present.str[:4].map(int)
        dated = np.isfinite(_days(present, form)) & ((years >= YEARS[0]) & (years <= YEARS[1])).to_numpy()
        if dated.all() and digits == 8:
            days = _days(text, form)
            return Times(days, f"time: {name}: dates like {present.iloc[0]}, and folds.gap is in days; if they are numbers, {KEY}: number", form)  # fmt: skip
        if 2 * dated.sum() > len(dated):
            odd = present.index[~dated]
            at = odd[0] if len(odd) else present.index[0]
            more = f", while {dated.sum():,} others are {what}" if len(odd) else f", one of the {what}, or a number"  # fmt: skip
            raise Refused(
                f'{where(int(at))}: {name} is {present[at]!r}{more}; {KEY}: "{form}" makes days of them, {KEY}: number leaves them as they are'
            )
    for unit, scale in UNIX.items():
        if numbers.between(SECONDS[0] * scale, SECONDS[1] * scale).all():
            raise Refused(
                f"{where(int(present.index[0]))}: {name} is {present.iloc[0]!r}, a moment since 1970, or a number; "
                f"{KEY}: {unit} makes days of them, {KEY}: number leaves them as they are"
            )
    return None


def _days(text: pd.Series, form: str) -> NDArray[np.float64]:
    import pandas as pd

    try:
        dates = pd.to_datetime(text, format=form, utc=True, errors="coerce")
    except ValueError as error:
        raise Refused(
            f'{KEY}: {form!r} is neither number, unix, unix_ms nor a format like "%d.%m.%Y" ({str(error).splitlines()[0]})'
        ) from None
    since = dates.dt.as_unit("us") - pd.Timestamp(0, tz="UTC").as_unit("us")  # nanoseconds end in 2262
    return np.asarray((since / pd.Timedelta(days=1)).to_numpy(np.float64, na_value=np.nan))
