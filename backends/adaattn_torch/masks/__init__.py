"""Masks that travel as patterns."""
