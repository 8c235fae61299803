"""Tuning: which tile sizes, stages and turns a kernel runs with. It changes speed, never a format or a rank."""
