"""Tasks, metrics and per-item scores. Import the submodules: this package imports nothing by itself."""
