"""The host side of every kernel, under the stem of its source."""
