"""The conformance kit, shipped for every backend author: strategies, oracles, laws, sabotage.

Run ``pytest -p adaattn_core.testing.pytest_plugin --pyargs adaattn_core.testing.conformance
--adaattn-backend NAME`` from anywhere.
"""
