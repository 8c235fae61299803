"""The driver, the caller's arrays and launches. Knows no kernel."""
