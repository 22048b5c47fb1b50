"""A worker's end of the line: one job a line on stdin, one answer a line on stdout. Between them it sleeps."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Jobs = dict[str, Callable[..., dict[str, Any]]]  # by their names; arguments by name, and an answer that is JSON


def serve(load: Callable[[], Jobs]) -> None:
    """Answer jobs {"do": NAME, ARGUMENT: ...} until stdin ends.

    Every answer says beside its own the seconds of processor time that were used while waiting for the job.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    jobs = load()
    used = time.process_time()
    for line in sys.stdin:
        waiting = time.process_time() - used
        job = json.loads(line)
        answer = jobs[job.pop("do")](**job)
        print(json.dumps(answer | {"waiting": waiting}), file=answers, flush=True)
        used = time.process_time()
