"""Finds a metric that configs/competition.yaml names; mistakes get the line of the key."""

from __future__ import annotations

from comp import metrics
from comp.engine.bank.metric import Metric
from comp.engine.config import declaration
from comp.engine.errors import UserError
from comp.engine.tasks.kinds import TASKS


def find(name: str, task: str) -> Metric:
    try:
        metric = metrics.find(name)
    except UserError as found:
        if found.where:  # in comp/competition.py
            raise
        raise error(found.code, f"{name}: {found.what}", found.remedy) from None
    if metric.tasks and task not in metric.tasks:
        usable = [other.name for other in metrics.METRICS.values() if task in other.tasks]
        remedy = f"use {TASKS[task].metric} (the default), or one of {', '.join(usable)}"
        raise error("metric-task", f"{name} is not defined for the task {task}", remedy)
    return metric


def error(code: str, what: str, remedy: str) -> UserError:
    return declaration.error(code, "metric", what, remedy)
