"""``python -m adaattn_core.cli``, for environments without the installed script."""

from adaattn_core.cli.app import main

main()
