"""Close an offline job while its other rank is stopped, and print the error of ``close``."""

from __future__ import annotations

import os
import sys

import psutil

from serve.llm import LLM
from serve.runtime.failure import JobFailed
from serve.runtime.shutdown import exit_now


def main() -> None:
    """Run as rank 0 of the job; the other ranks never return from ``LLM``."""
    llm = LLM(sys.argv[1:])
    llm.generate([[1, 2, 3]], max_tokens=2, progress=False)
    parent = psutil.Process().parent()
    assert parent is not None
    others = [child for child in parent.children() if child.pid != os.getpid()]
    for other in others:
        other.suspend()
    try:
        llm.close()
    except JobFailed as error:
        print(f"closed: {error}", flush=True)
    for other in others:
        other.resume()
    exit_now(0)


if __name__ == "__main__":
    main()
