"""Tokenise long texts for gpu_capture.py, on a machine that has transformers.

    python benchmarks/gpu_tokens.py --out prose.npy --tokens 131072 FILE ...

Files are joined in the order given; of .html files, the text between the tags. See smollm2.py
for the tokenizer.
"""

from __future__ import annotations

import argparse
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

import smollm2


class _Text(HTMLParser):
    """Collects what a reader of a page sees."""

    hidden = ("head", "script", "style")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.depth += tag in self.hidden

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self.hidden

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.pieces.append(data)


def text_of(path: Path) -> str:
    """Return a file's text; blank lines of a page are joined."""
    content = path.read_text(errors="ignore")
    if path.suffix not in (".html", ".htm"):
        return content
    parser = _Text()
    parser.feed(content)
    return re.sub(r"\s*\n\s*", "\n", "".join(parser.pieces))


def main() -> None:
    """Tokenise and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    text = "\n".join(text_of(path) for path in options.files)
    ids = smollm2.tokenizer()(text)["input_ids"]
    if len(ids) < options.tokens:
        parser.error(f"{len(ids)} tokens in these files, {options.tokens} asked for")
    np.save(options.out, np.array(ids[: options.tokens], np.int32))
    print(options.out, options.tokens, "of", len(ids), "tokens")


if __name__ == "__main__":
    main()
