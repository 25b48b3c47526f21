"""Write the default corpus of `gateloop train` as two texts, split as it splits them, for train_one.py and plan.py.

python benchmarks/language/library.py FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gateloop_transformer.data.corpus import load_corpus
from gateloop_transformer.data.tokenizer import ByteTokenizer
from gateloop_transformer.runs.config import TrainingConfig


def main() -> None:
    """FOLDER/library-train.txt and FOLDER/library-valid.txt: this Python's standard library, without its tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; made where there is none")
    folder = parser.parse_args().folder
    options, tokenizer = TrainingConfig(), ByteTokenizer()
    corpus = load_corpus(None, valid_fraction=options.valid_fraction, context=options.context, tokenizer=tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tokens in (("train", corpus.train), ("valid", corpus.valid)):
        path = folder / f"library-{name}.txt"
        path.write_bytes(tokenizer.decode(tokens.read(0, len(tokens))))
        print(f"{path}: {len(tokens):,} bytes")


if __name__ == "__main__":
    main()
