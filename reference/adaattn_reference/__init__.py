"""The NumPy/SciPy backend: the oracle for every other backend, and the embedded default."""
