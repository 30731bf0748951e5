"""``python -m bench.sweep`` runs ``bench.sweep.run``."""

from __future__ import annotations

from bench.sweep.run import main

if __name__ == "__main__":
    raise SystemExit(main())
