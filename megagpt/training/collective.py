"""Errors that all ranks agree on: one rank's problem ends every rank at once, with one message instead of a hang."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megagpt.errors import AgreedError, UserError

T = TypeVar("T")


def together(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `function` on every rank; if it raises a UserError on any rank, every rank raises it as an AgreedError.

    `group`: of all ranks; one with a longer timeout than the default group's is for work that may take longer.
    """
    value: T | None = None
    problem: tuple[str, int] | None = None
    try:
        value = function()
    except UserError as error:
        problem = (str(error), error.exit_code)
    problems: list[tuple[str, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem, group=group)
    failed = [rank for rank, found in enumerate(problems) if found]
    if failed:
        message, exit_code = next(found for found in problems if found)
        where = "" if len(failed) == len(problems) else f" (on rank {', '.join(map(str, failed))} only)"
        raise AgreedError(message + where, exit_code)
    return value  # type: ignore[return-value]


def on_rank_0(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Call `function` on rank 0 and give its value to every rank; its UserError is raised on every rank."""
    value = together(lambda: function() if dist.get_rank() == 0 else None, group)
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]  # type: ignore[return-value]


def first_answer(answer: T | None, group: dist.ProcessGroup | None = None) -> T | None:
    """The answer of the lowest rank that has one, on every rank; None if none has."""
    answers: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, answer, group=group)
    return next((found for found in answers if found is not None), None)
