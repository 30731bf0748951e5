"""``serve.launch`` with short limits for silence, for tests that cannot wait a minute."""

from __future__ import annotations

from serve.launch import main
from serve.runtime import liveness

liveness.SILENCE_LIMIT_S = 3.0
liveness.SILENCE_CHECK_S = 0.5

if __name__ == "__main__":
    main()
