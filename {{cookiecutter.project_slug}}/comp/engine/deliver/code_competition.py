"""comp kernel: a notebook that predicts without internet is fitted to the time limit, built, and then
rehearsed here or pushed."""

from __future__ import annotations

from comp.engine.deliver import budget as time_budget
from comp.engine.deliver import kernel as bundle
from comp.engine.deliver import push as upload
from comp.engine.deliver import rehearse as rehearsal


def kernel(
    name: str,
    *,
    rehearse: bool = False,
    budget: str | None = None,
    push: bool = False,
    message: str | None = None,
    anyway: str | None = None,
    wait: bool = True,
) -> None:
    if budget:
        name = time_budget.fit(name, budget)
    if push:
        upload.push(name, message, wait=wait, anyway=anyway)
        return
    bundle.build(name)
    if rehearse:
        rehearsal.rehearse(name)
    else:
        print(f"next: comp kernel {name} --rehearse")
