"""Tuning: which tile sizes and stages a kernel runs with; never a format or a rank."""
