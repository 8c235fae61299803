"""Hostile calls for any backend: problems and calls drawn to break it, and the laws to hold.

`problems` draws arrays and masks, `calls` draws plans, policies and budgets, `definition` says
what attention is (in extended precision, sharing no code with the library), `laws` compares.
"""
