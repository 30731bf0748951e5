"""``serve.launch`` where rank 1 behaves in another way than rank 0.

``--on-rank-1 "OPTIONS"`` adds options on rank 1 alone. In a step on rank 1, a token ``SLOW`` makes
each module of the model take ``SLOW_S``, and a token ``STUCK`` blocks the GPU thread for ever.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading

import torch

from serve.engine.runner import Runner
from serve.launch import main
from serve.protocol.plan import Step

SLOW, STUCK = 126, 127
SLOW_S = 0.2  # the model has more than a dozen modules

_run = Runner.run
_never = threading.Event()


def run_oddly(runner: Runner, step: Step) -> torch.Tensor | None:
    """Run a step, as its first new token asks."""
    tokens = {token for sequence in step.sequences for token in sequence.token_ids}
    if STUCK in tokens:
        _never.wait()
    hooks = []
    if SLOW in tokens:
        model = runner._model
        hooks = [m.register_forward_hook(lambda *_: _wait()) for m in model.modules()]
    try:
        return _run(runner, step)
    finally:
        for hook in hooks:
            hook.remove()


def _wait() -> None:
    _never.wait(SLOW_S)


def take_options(argv: list[str], rank: str) -> list[str]:
    """Return ``argv`` with the options of this rank."""
    if "--on-rank-1" not in argv:
        return argv
    index = argv.index("--on-rank-1")
    added = shlex.split(argv[index + 1]) if rank == "1" else []
    return argv[:index] + argv[index + 2 :] + added


if __name__ == "__main__":
    sys.argv = take_options(sys.argv, os.environ["RANK"])
    if os.environ["RANK"] == "1":
        Runner.run = run_oddly  # type: ignore[assignment,method-assign]
    main()
