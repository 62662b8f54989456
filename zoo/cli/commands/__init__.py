"""One file a command of `zoo`; each has `main(argv) -> status`."""
