"""Renders chat templates, as a program of its own: a template comes from elsewhere and may take any time and memory.

`data.templates` starts it with the seconds and the bytes that a chat may take. The first line on stdin is the module
path; then each line is a request, each line on stdout its answer, in JSON:

    {"template": "...", ...}   ->   {"variables": [...]}, {"text": "..."}, {"error": "..."}, {"memory": true}
"""

import contextlib
import datetime
import json
import math
import os
import resource
import signal
import sys
from typing import Any

MOST_CHARACTERS = 2**26  # of what a template writes


def main() -> None:
    seconds, most = int(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that waits; its end closes stdin
    sys.path[:] = json.loads(sys.stdin.buffer.readline())
    from transformers.utils import chat_template_utils

    limit(resource.RLIMIT_AS, memory() + most)
    answers.write(b"{}\n")
    answers.flush()
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + seconds)
        try:
            found = answer(chat_template_utils, json.loads(line))
        except MemoryError:
            found = {"memory": True}
        except Exception as error:  # whatever a template can make its engine raise
            found = {"error": " ".join(f"{error}".split() or [type(error).__name__])[:300]}
        answers.write(json.dumps(found).encode() + b"\n")
        answers.flush()


def memory() -> int:
    """Bytes of address space in use; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def limit(which: int, value: int) -> None:
    """Lower a limit of the process, where the system has it."""
    most = resource.getrlimit(which)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(which, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def answer(utils: Any, request: dict[str, Any]) -> dict[str, Any]:
    """What the template reads, or what it writes if there are messages."""
    import jinja2.meta

    environment = utils._compile_jinja_template(request["template"]).environment
    if "messages" not in request:
        found = jinja2.meta.find_undeclared_variables(environment.parse(request["template"]))
        return {"variables": sorted(found - set(environment.globals))}
    now = datetime.datetime.fromisoformat(request["now"])
    environment.globals["strftime_now"] = now.strftime
    rendered, _ = utils.render_jinja_template(
        conversations=[request["messages"]], tools=request["tools"], documents=request["documents"],
        chat_template=request["template"], add_generation_prompt=True, **request["arguments"],
    )  # fmt: skip
    if len(rendered[0]) > MOST_CHARACTERS:
        return {"memory": True}
    return {"text": rendered[0]}


if __name__ == "__main__":
    main()
