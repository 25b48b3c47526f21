"""transformers' generate and pipeline on GateLoop models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import VOCABULARY, build
from torch import Tensor
from transformers import DynamicCache, TextStreamer

from gateloop_transformer.huggingface.cache import CACHE_NAME

MASK = torch.ones(3, 12, dtype=torch.long)
MASK[0, :5] = 0


def tokens(B: int = 3, T: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (B, T))


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "prefill in chunks": {"do_sample": False, "prefill_chunk_size": 5},
}


@pytest.mark.parametrize("mode", MODES)
def test_cached_equals_uncached(model: Any, mode: str) -> None:
    ids, found = tokens(), []
    for use_cache in (True, False):
        torch.manual_seed(1)
        options = {name: value for name, value in MODES[mode].items() if use_cache or name != "prefill_chunk_size"}
        found.append(model.generate(ids, attention_mask=MASK, max_new_tokens=7, use_cache=use_cache, **options))
    assert torch.equal(*found)


def test_a_batch_equals_its_rows(model: Any) -> None:
    ids = tokens()
    together = model.generate(ids, attention_mask=MASK, max_new_tokens=6, do_sample=False)
    alone = model.generate(ids[:1, 5:], max_new_tokens=6, do_sample=False)
    assert torch.equal(together[0, 5:], alone[0])


def test_generation_goes_on_from_a_cache(model: Any) -> None:
    ids = tokens()
    whole = model.generate(ids, max_new_tokens=9, do_sample=False)
    first = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    cache = getattr(first, CACHE_NAME)
    assert cache.get_seq_length() == 16
    again = model.generate(first.sequences, **{CACHE_NAME: cache}, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, whole)
    cache = DynamicCache(config=model.config)
    assert torch.equal(model.generate(ids, **{CACHE_NAME: cache}, max_new_tokens=9, do_sample=False), whole)


def test_embeddings_instead_of_ids(model: Any) -> None:
    ids = tokens()
    embeddings = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embeddings, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=5, do_sample=False)[:, 12:])


def test_a_static_cache() -> None:
    model, ids = build("recipe"), tokens()
    options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False}
    static = model.generate(ids, cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids, **options))


def test_the_cache_of_gate_loop_layers_stays_small() -> None:
    model = build("recipe")
    with torch.no_grad():
        cache = getattr(model(tokens(1, 500)), CACHE_NAME)
    layer = cache.layers[0]
    assert layer.keys.shape[2] == 500
    assert layer.keys.untyped_storage().nbytes() == 4
    assert layer.recurrent_states[0].shape == (1, 2, 16, 1, 1)


def test_assistants_are_refused_by_transformers() -> None:
    model = build("polar")
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(tokens(1), assistant_model=build("attention"), max_new_tokens=3)


def test_pipeline_and_streamer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer, pipeline

    from gateloop_transformer.data.tokenizer import ByteTokenizer

    model = build("recipe", vocab_size=256)
    model.save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), batch_size=2)
    texts = ["café <|endoftext|>", "a"]
    outputs = generator(texts, max_new_tokens=5, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text, (output,) in zip(texts, outputs, strict=True):
        prompt = torch.tensor([list(text.encode())])
        assert tokenizer(text)["input_ids"] == prompt[0].tolist()
        expected = bytes(model.generate(prompt, max_new_tokens=5, do_sample=False)[0].tolist())
        assert output["generated_text"] == expected.decode(errors="replace").replace("\0", "")
    model.generate(**tokenizer("ab", return_tensors="pt"), max_new_tokens=4, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.startswith("ab")
