"""A conversation whose state is carried: each turn reads only what is new, however long the conversation is.

python examples/talk_in_a_pipeline.py RUN    (a folder of `gateloop train`; turns are lines of standard input)
"""

import sys
from collections.abc import Callable

import torch
from transformers import DynamicCache, pipeline

from gateloop_transformer.huggingface.cache import CACHE_NAME  # transformers learns of the models


def talker(run: str, tokens: int = 80) -> Callable[[str], str]:
    """A function from what one says to what the model answers."""
    generator = pipeline("text-generation", model=run)
    model, tokenizer = generator.model, generator.tokenizer
    cache, said = DynamicCache(config=model.config), torch.empty(1, 0, dtype=torch.long)

    def answer(text: str) -> str:
        nonlocal said
        said = torch.cat([said, tokenizer(f"{text}\n", return_tensors="pt")["input_ids"]], 1)
        before = said.shape[1]
        said = model.generate(said, **{CACHE_NAME: cache}, max_new_tokens=tokens, do_sample=False)
        return str(tokenizer.decode(said[0, before:]))

    return answer


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(print(__doc__))
    answer = talker(sys.argv[1])
    for line in sys.stdin:
        print(answer(line.rstrip("\n")))
