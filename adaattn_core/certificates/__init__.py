"""Certificates: their data, by theorem, by sample, and who decides which.

Import from the modules: `data` needs nothing of a backend, `certifier` needs all of it.
"""
