"""The compiling child process: requests on stdin, answers on stdout, one JSON line each.

It is a process of its own because ptxas runs inside NVRTC's library and can die by a signal;
the parent then loses this child and nothing else. Run as ``python -m adaattn_cuda.jit.worker``.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from cuda.core import Program, ProgramOptions
from cuda.pathfinder import find_nvidia_header_directory

__all__ = ["compile_request", "main"]


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """Compile one unit; the cubin goes to the file that the request names.

    Parameters
    ----------
    request : dict
        ``source_path``, ``cubin_path``, ``arch``, ``include_path`` (str) and ``options``
        (list of str, for ptxas).

    Returns
    -------
    dict
        ``ok``, ``log`` and ``seconds``.
    """
    started = time.perf_counter()
    log = io.StringIO()
    runtime = find_nvidia_header_directory("cudart")
    try:
        program = Program(
            Path(request["source_path"]).read_text(encoding="utf-8"),
            "c++",
            ProgramOptions(
                std="c++17",
                device_as_default_execution_space=True,  # lambdas need no annotation
                no_cache=True,  # a hit in NVRTC's own cache would leave out ptxas' report
                arch=request["arch"],
                include_path=[request["include_path"], *([runtime] if runtime else [])],
                ptxas_options=["-v", *request["options"]],
            ),
        )
        cubin = bytes(program.compile("cubin", logs=log).code)
        Path(request["cubin_path"]).write_bytes(cubin)
        ok = True
    except Exception as error:  # everything goes back to the parent, which raises
        print(f"{type(error).__name__}: {error}", file=log)
        ok = False
    return {"ok": ok, "log": log.getvalue(), "seconds": time.perf_counter() - started}


def main() -> None:
    """Answer requests until stdin closes."""
    # The answers keep the real stdout; whatever a library prints goes to stderr instead.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(compile_request(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
