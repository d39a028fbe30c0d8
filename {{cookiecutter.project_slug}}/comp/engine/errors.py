"""The user's mistakes: one line and exit code 2. Imports nothing, so that `comp --help` is fast.

    raise UserError("fold-unknown", where="--fold 7", what="no such fold; there are folds 0 to 4, and full")

prints `--fold 7: no such fold; there are folds 0 to 4, and full`, and

    raise UserError(
        "knob-unknown",
        where="configs/exp001.yaml:3",
        key="optim.lrr",
        what="no such knob",
        remedy="did you mean optim.lr?",
    )

prints `configs/exp001.yaml:3: optim.lrr: no such knob; did you mean optim.lr?`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake of the user, or a file that must not be read. The printed line is made of the fields."""

    def __init__(
        self,
        code: str,  # short and stable, for programs: "knob-unknown"
        *,
        what: str,  # the fact
        where: str = "",  # the file with its line, the option or the artefact that is wrong
        key: str = "",  # the knob or the column there
        remedy: str = "",  # what to change or to type
        others: Sequence[UserError] = (),  # further mistakes, a line each
    ):
        self.code, self.where, self.key, self.what, self.remedy = code, where, key, what, remedy
        self.errors: list[UserError] = [self, *(each for other in others for each in other.errors)]
        super().__init__("\n".join(self.lines))

    @property
    def line(self) -> str:
        where = "" if self.where.startswith(f"'{self.key}=") else self.where  # key=value repeats the key
        fact = ": ".join(part for part in (where, self.key, self.what) if part)
        return f"{fact}; {self.remedy}" if self.remedy else fact

    @property
    def lines(self) -> list[str]:
        """One per mistake."""
        return [each.line for each in self.errors]

    def locate(self, where: Callable[[str], str]) -> None:
        """Sets the place of each mistake that has a key and no place yet. `where`: key -> place."""
        for each in self.errors:
            if each.key and not each.where:
                each.where = where(each.key)
        self.args = ("\n".join(self.lines),)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled with keyword arguments, which Exception would lose between processes."""
        return _rebuilt, (self.code, self.what, self.where, self.key, self.remedy, self.errors[1:])


def _rebuilt(
    code: str, what: str, where: str, key: str, remedy: str, others: Sequence[UserError]
) -> UserError:
    return UserError(code, what=what, where=where, key=key, remedy=remedy, others=others)


def joined(errors: Sequence[UserError]) -> UserError:
    """Several mistakes as one exception, a line each."""
    first, *others = errors
    return UserError(
        first.code,
        what=first.what,
        where=first.where,
        key=first.key,
        remedy=first.remedy,
        others=[*first.errors[1:], *others],
    )
