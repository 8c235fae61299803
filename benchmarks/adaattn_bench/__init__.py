"""Measuring, for ``adaattn bench``, ``adaattn eval`` and the scripts beside this package.

Clocks, statistics, problems and peers in one place, so that a figure means the same wherever it
is printed: contenders take turns in random order, figures are medians with their quartiles,
errors stand beside times, and what could not run says why.
"""
