"""The ``adaattn`` command: one file per command, shared parts beside them."""
