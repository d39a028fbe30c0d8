"""The time column as numbers in the unit of folds.gap: dates become days since 1970, numbers stay as they
are.

    2020-01-31, 2020-01-31T12:00Z …      ISO dates: days
    20200131                             eight digits, all of them dates: days
    2019.5, 17, 2020                     numbers, in their own unit
    202001, 1580428800, 20200131120000   dates or numbers: an error until competition.time_format decides

competition.time_format is `number`, `unix` (seconds since 1970), `unix_ms`, or a format of strptime like
"%d.%m.%Y". What was decided is printed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from comp.engine.config import declaration
from comp.engine.data import targets
from comp.engine.data.tables import Where
from comp.engine.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

KEY = f"{declaration.FILE}: time_format"
PER_SECOND = {"unix": 1.0, "unix_ms": 1000.0}
# Integers that may be dates: number of digits, format, and what they are. Only the first needs no
# declaration.
DIGITS = (
    (8, "%Y%m%d", "dates"),
    (6, "%Y%m", "months"),
    (10, "%Y%m%d%H", "hours"),
    (12, "%Y%m%d%H%M", "minutes"),
    (14, "%Y%m%d%H%M%S", "seconds"),
)
YEARS = (1900, 2100)  # of a date in digits; beyond them it is a number
SECONDS = (10**9, 2 * 10**9)  # 2001 to 2033
IN_DAYS, IN_NUMBERS = "and folds.gap is in days", "and folds.gap is in their unit"


class Times(NamedTuple):
    values: NDArray[np.float64]  # NaN where missing or wrong
    note: str
    expected: str  # of a value that is wrong


def read(text: pd.Series, name: str, declared: str | None, where: Where) -> Times:
    present = text.dropna()
    if declared is not None:
        return _declared(text, name, declared)
    if len(present) and present.map(lambda cell: bool(re.fullmatch(r"[0-9]+", cell))).all():
        dates = _digits(text, present, name, where)
        if dates is not None:
            return dates
    expected = "all numbers, or all dates like 2020-01-31"
    values = targets.to_numbers(text)
    if np.isfinite(values[text.notna().to_numpy()]).any():
        return Times(values, f"time: {name}: numbers, {IN_NUMBERS}", expected)
    return Times(_days(text, "ISO8601"), f"time: {name}: dates, {IN_DAYS}", expected)


def _declared(text: pd.Series, name: str, declared: str) -> Times:
    if declared == "number":
        return Times(targets.to_numbers(text), f"time: {name}: numbers, {IN_NUMBERS}", "a number")
    if declared in PER_SECOND:
        values = np.asarray(targets.to_numbers(text) / (86400 * PER_SECOND[declared]), np.float64)
    else:
        values = _days(text, declared)
    return Times(values, f"time: {name}: {declared}, {IN_DAYS}", f"time_format: {declared}")


def _digits(text: pd.Series, present: pd.Series, name: str, where: Where) -> Times | None:
    """Dates written as one integer. None: they are numbers."""
    numbers = present.map(int)
    lengths = set(present.str.len())
    for digits, form, what in DIGITS:
        if lengths != {digits}:
            continue
        years = present.str[:4].map(int)
        in_range = ((years >= YEARS[0]) & (years <= YEARS[1])).to_numpy()
        dates = np.isfinite(_days(present, form)) & in_range
        if dates.all() and digits == 8:
            note = f"time: {name}: dates like {present.iloc[0]}, {IN_DAYS}"
            return Times(_days(text, form), f"{note}; if they are numbers, set {KEY}: number", form)
        if 2 * dates.sum() > len(dates):
            odd = present.index[~dates]
            at = odd[0] if len(odd) else present.index[0]
            others = f"{dates.sum():,} others are {what}" if len(odd) else f"they may be {what} or numbers"
            raise _ambiguous(where(int(at)), name, f"{present[at]!r}: {others}", f'"{form}"')
    for unit, scale in PER_SECOND.items():
        if numbers.between(SECONDS[0] * scale, SECONDS[1] * scale).all():
            what = f"{present.iloc[0]!r} may be a time since 1970 or a number"
            raise _ambiguous(where(int(present.index[0])), name, what, unit)
    return None


def _ambiguous(where: str, name: str, what: str, form: str) -> UserError:
    remedy = f"{KEY}: {form} makes days of them, {KEY}: number leaves them as they are"
    return UserError("time-ambiguous", where=where, key=name, what=what, remedy=remedy)


def _days(text: pd.Series, form: str) -> NDArray[np.float64]:
    import pandas as pd

    try:
        dates = pd.to_datetime(text, format=form, utc=True, errors="coerce")
    except ValueError as error:
        raise declaration.error(
            "time-format-invalid",
            "time_format",
            f"{form!r} is no format of strptime ({str(error).splitlines()[0]})",
            'use number, unix, unix_ms or a format like "%d.%m.%Y"',
        ) from None
    since = dates.dt.as_unit("us") - pd.Timestamp(0, tz="UTC").as_unit("us")  # nanoseconds end in 2262
    return np.asarray((since / pd.Timedelta(days=1)).to_numpy(np.float64, na_value=np.nan))
