"""``python -m zoo``."""

from __future__ import annotations

from zoo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
