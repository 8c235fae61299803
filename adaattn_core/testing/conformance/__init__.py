"""Laws that every backend keeps; run them through `adaattn_core.testing.pytest_plugin`."""
