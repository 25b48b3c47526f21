"""GateLoop language models in NumPy alone, one token at a time: copy this file anywhere.

    python numpy_runtime.py DIR --prompt "Once upon" --tokens 100

DIR holds config.json and model.safetensors, as `gateloop train` or transformers' `save_pretrained` write them. A token
goes through x = embedding[token]; in each layer x = x + mixer(norm(x)) and x = x + feed_forward(norm(x)); then logits =
W norm(x). A layer's memory is S = a S + k ⊗ v, read as y = Re(q S). All is float32. D width, H heads, K size of a head.
"""

import argparse
import codecs
import hashlib
import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

Array = Any
# The fields that a model is computed by, with the values for files that lack them; the weights tell the rest.
FIELDS = {
    "use_gate_looped_attn": True, "layer_pattern": None, "gate": "polar", "conv_silu": False, "gate_loop_heads": None,
    "ablate_complex": False, "ablate_state_transition": False, "heads": 8, "dim_head": 64, "rotary_emb": False,
    "attn_window": None, "attn_softmax_normalize": None, "data_dependent_rel_pos": "none",
}  # fmt: skip
OTHERS = {
    "dim", "depth", "ff_mult", "attn_add_swish_gating", "dim_gate_looped_attn", "frac_gradient_state_transition",
    "post_ln_norm", "sub_ln", "head_norm", "qk_norm", "conv_size", "qkv_bias", "max_memory", "min_memory",
    "phase_spread", "spread_start", "gate_rank", "fixed_gates", "dropout",
}  # fmt: skip
FORMAT = 5
# The exceptions that damaged files raise.
UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    struct.error,
)


def read_config(folder: Path) -> tuple[dict[str, Any], bool]:
    """Read `FIELDS` of config.json, of a run or of transformers, and whether tokens are bytes."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values.get("model_type") == "gateloop" and "model" not in values:
        fields, is_bytes = values, values["vocab_size"] == 256
    elif "model" in values and values.get("format") == FORMAT:
        fields, is_bytes = values["model"], values["tokenizer"] == {"kind": "bytes"}
        if unknown := sorted(fields.keys() - FIELDS.keys() - OTHERS):
            raise ValueError(f"config.json has fields that this file does not know: {', '.join(unknown)}")
    else:
        raise ValueError("config.json is not a GateLoop model's, or is of another format")
    if fields.get("data_dependent_rel_pos", "none") not in ("none", False):
        raise ValueError("attention with data_dependent_rel_pos is not implemented here")
    return {name: fields.get(name, default) for name, default in FIELDS.items()}, is_bytes


def read_safetensors(path: Path) -> dict[str, Array]:
    """Read tensors by name, as float32. A file is 8 bytes with the header's length, the header in JSON, the numbers."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, numbers = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
    if (place := content.find(b'"sha256":"', 8, 8 + length) + 10) >= 10:  # of the file with zeros in this place
        digest = hashlib.sha256(content[:place] + b"0" * 64 + content[place + 64 :]).hexdigest().encode()
        if content[place : place + 64] != digest:
            raise ValueError(f"{path.name} does not have the checksum it was written with")
    types, tensors = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}, {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            array = np.frombuffer(numbers[start:end], types[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                array = (array.astype(np.uint32) << 16).view(np.float32)
            tensors[name.removeprefix("model.")] = array.astype(np.float32)
    return tensors


def read_weights(folder: Path) -> dict[str, Array]:
    """Read the weights in model.safetensors, or in all files that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_safetensors(folder / "model.safetensors")
    files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if not all(Path(file).name == file for file in files):
        raise ValueError(f"{index.name} names files elsewhere")
    return {name: array for file in files for name, array in read_safetensors(folder / file).items()}


class Model:
    """A language model and what it remembers.

    Args:
        folder: holds config.json and the weights.

    Raises:
        ValueError: a file is missing or damaged, or the model has an option that is not implemented here.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            self.config, self.is_bytes = read_config(Path(folder))
            self.weights = read_weights(Path(folder))
            self.layers: list[dict[str, Array]] = []
            while head := f"layers.{len(self.layers)}.":
                layer = {name.removeprefix(head): w for name, w in self.weights.items() if name.startswith(head)}
                if not layer:
                    break
                self.layers.append(layer)
            self.reset()
            self.step(0)  # Weights that do not fit together fail here.
        except UNREADABLE as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{str(folder)!r} holds no model that can be read: {what}") from error
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.states: list[dict[str, Array]] = [{} for _ in self.layers]
        self.position = 0

    def step(self, token: int) -> Array:
        """Read a token; returns the logits of the next one."""
        if not 0 <= token < len(self.weights["token_emb.weight"]):
            raise ValueError(f"tokens must be in [0, {len(self.weights['token_emb.weight'])}), not {token}")
        default = "gate" if self.config["use_gate_looped_attn"] else "attention"
        pattern = (self.config["layer_pattern"] or default).split()
        x = self.weights["token_emb.weight"][token]
        for n, (w, state) in enumerate(zip(self.layers, self.states, strict=True)):
            mixer = {"gate": self.gate_loop, "attention": self.attention}[pattern[n % len(pattern)]]
            x = residual(w, "0.", x, partial(mixer, w, state))
            x = residual(w, "1.", x, partial(feed_forward, w)) if "1.fn.0.weight" in w else x
        self.position += 1
        if "to_logits.weight" in self.weights:
            return self.weights["to_logits.weight"] @ x
        return self.weights["to_logits.1.weight"] @ rms_norm(x, self.weights["to_logits.0.gamma"])

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Generate `count` tokens after a prompt, the likeliest at each step."""
        return list(self.stream(prompt, count))

    def stream(self, prompt: list[int], count: int) -> Iterator[int]:
        """Yield the tokens of `generate` as they are found."""
        if not prompt or count < 0:
            raise ValueError("a prompt needs at least one token, and count must be 0 or more")
        return self._tokens(prompt, count)

    def _tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        self.reset()
        *_, logits = (self.step(token) for token in prompt)
        for _ in range(count):
            token = int(logits.argmax())
            yield token
            logits = self.step(token)

    def gate_loop(self, w: dict[str, Array], state: dict[str, Array], x: Array) -> Array:
        """S = a S + k ⊗ v and y = Re(q S) in each head, S being K × K; then norms, SiLU gate and output projection."""
        mixed = short_convolution(w, state, x, self.config["conv_silu"]) if "0.fn.conv.weight" in w else x
        qkv = linear(w, "0.fn.to_qkv", mixed)
        q, k, v = qkv.reshape(3, self.config["gate_loop_heads"] or len(qkv) // 3, -1)
        if "0.fn.q_norm.gamma" in w:
            q, k = rms_norm(q, w["0.fn.q_norm.gamma"]), rms_norm(k, w["0.fn.k_norm.gamma"])
        a, scale = self.gates(w, mixed, len(q))
        S = a[:, None, None] * state.get("S", 0) + (k * scale[:, None])[:, :, None] * v[:, None, :]
        state["S"] = S
        y = np.einsum("hk,hkv->hv", q, S.real)
        y = (rms_norm(y, w["0.fn.head_norm.gamma"]) if "0.fn.head_norm.gamma" in w else y).flatten()
        if "0.fn.maybe_sub_ln.weight" in w:
            y = layer_norm(y, w["0.fn.maybe_sub_ln.weight"], w["0.fn.maybe_sub_ln.bias"])
        y = silu(linear(w, "0.fn.to_gates.0", x)) * y if "0.fn.to_gates.0.weight" in w else y
        return linear(w, "0.fn.to_out", y) if "0.fn.to_out.weight" in w else y

    def gates(self, w: dict[str, Array], x: Array, heads: int) -> tuple[Array, Array]:
        """A complex gate a for each head, and what its keys are multiplied by.

        From pairs (z₁, z₂) of projections: polar: a = σ(|z|) e^{i arg z} with z = z₁ + i z₂; paper: a = σ(z₁) e^{i z₂};
        ring: the same after learned numbers are added to z₁ and z₂, its keys times √(1 - |a|²).
        """
        one = np.ones(heads, np.float32)
        if self.config["ablate_state_transition"]:
            return one, one
        z = linear(w, "0.fn.to_a.0", x) if "0.fn.to_a.0.weight" in w else np.zeros(2 * heads, np.float32)
        z = linear(w, "0.fn.to_a.1", z) if "0.fn.to_a.1.weight" in w else z
        first, second = z[0::2], z[1::2]
        if self.config["gate"] == "ring":
            first, second = first + w["0.fn.ring_logit"], second + w["0.fn.ring_phase"]
        second = second * 0 if self.config["ablate_complex"] else second
        if self.config["gate"] == "polar":
            return sigmoid(np.hypot(first, second)) * np.exp(1j * np.arctan2(second, first)), one
        # 1 - σ(z) is σ(-z), with all its digits.
        scale = np.sqrt(sigmoid(-first) * (1 + sigmoid(first))) if self.config["gate"] == "ring" else one
        return sigmoid(first) * np.exp(1j * second), scale

    def attention(self, w: dict[str, Array], state: dict[str, Array], x: Array) -> Array:
        """softmax(q·k / √K) over the keys so far, or the last ones of a window, times their values."""
        size, window = self.config["dim_head"], self.config["attn_window"] or 0
        q, k, v = linear(w, "0.fn.to_qkv.0", x).reshape(3, self.config["heads"], size)
        if "0.fn.q_norm.gamma" in w:
            q, k = rms_norm(q, w["0.fn.q_norm.gamma"]), rms_norm(k, w["0.fn.k_norm.gamma"])
        if self.config["rotary_emb"]:
            q, k = rotate(q, self.position), rotate(k, self.position)
        state["keys"] = np.stack([*state.get("keys", ()), k][-window:])
        state["values"] = np.stack([*state.get("values", ()), v][-window:])
        weights = np.einsum("hk,thk->ht", q * size**-0.5, state["keys"])
        if self.config["attn_softmax_normalize"] is not False:
            weights = np.exp(weights - weights.max(-1, keepdims=True))
            weights = weights / weights.sum(-1, keepdims=True)
        y = np.einsum("ht,thv->hv", weights, state["values"]).flatten()
        y = y * silu(linear(w, "0.fn.to_gates.0", x)) if "0.fn.to_gates.0.weight" in w else y
        return linear(w, "0.fn.to_out.1", y)


def residual(w: dict[str, Array], place: str, x: Array, function: Any) -> Array:
    """x + f(RMS norm(x)), or LayerNorm(x + f(x)) in models of post_ln_norm."""
    if place + "norm.gamma" in w:
        return x + function(rms_norm(x, w[place + "norm.gamma"]))
    return layer_norm(x + function(x), w[place + "norm.weight"], w[place + "norm.bias"])


def linear(w: dict[str, Array], name: str, x: Array) -> Array:
    """W x + b."""
    y = w[name + ".weight"] @ x
    return y + w[name + ".bias"] if name + ".bias" in w else y


def feed_forward(w: dict[str, Array], x: Array) -> Array:
    """W₂ GELU(W₁ x), where GELU(h) = h (1 + erf(h / √2)) / 2."""
    h = linear(w, "1.fn.0", x)
    erf = np.array([math.erf(value / math.sqrt(2)) for value in h.tolist()], np.float32)
    return linear(w, "1.fn.2", h * (1 + erf) / 2)


def short_convolution(w: dict[str, Array], state: dict[str, Array], x: Array, with_silu: bool) -> Array:
    """Σ_i w[i] x[t - taps + 1 + i] in each channel, of this and earlier inputs."""
    taps = w["0.fn.conv.weight"][:, 0].T
    inputs = np.concatenate([state.get("inputs", np.zeros_like(taps[1:])), x[None]])
    state["inputs"] = inputs[1:]
    y = (taps * inputs).sum(0)
    return silu(y) if with_silu else y


def rotate(x: Array, position: int) -> Array:
    """The pair of channels (2i, 2i + 1) turned by position · 10000^(-2i/K) radians."""
    angles = np.float32(position) * (10000 ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])).astype(np.float32)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def rms_norm(x: Array, gamma: Array) -> Array:
    """√D x / ‖x‖ · gamma over the last axis."""
    return x / np.maximum(np.sqrt((x * x).sum(-1, keepdims=True)), 1e-12) * x.shape[-1] ** 0.5 * gamma


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    """(x - mean) / √(variance + 1e-5) · weight + bias."""
    return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * weight + bias


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^{-x}), by an exponential that does not overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def silu(x: Array) -> Array:
    """x σ(x)."""
    return x * sigmoid(x)


def write(parts: Iterable[str]) -> None:
    """Write a line of text on standard output, each part as it comes."""
    for part in chain(parts, ["\n"]):
        sys.stdout.buffer.write(part.encode())
        sys.stdout.buffer.flush()


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Continue a text by the likeliest tokens, in NumPy alone.")
    parser.add_argument("dir", metavar="DIR", help="holds config.json and model.safetensors")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="text to continue, of a model of bytes")
    given.add_argument("--ids", metavar="N,N,...", help="tokens to continue; what follows is printed as numbers")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="to add (default: 100)")
    arguments = parser.parse_args()
    try:
        model = Model(arguments.dir)
        if arguments.ids is not None:
            tokens = model.stream([int(n) for n in arguments.ids.split(",")], arguments.tokens)
            write(f"{',' if n else ''}{token}" for n, token in enumerate(tokens))
            return 0
        if not model.is_bytes:
            raise ValueError("the model's tokens are not bytes: encode the text by its tokenizer and give --ids")
        prompt = list(arguments.prompt.encode("utf-8", "surrogateescape"))
        tokens = model.stream(prompt, arguments.tokens)
        pieces = chain([bytes(prompt)], (bytes([token]) for token in tokens))
        write(codecs.iterdecode(pieces, "utf-8", "replace"))
        return 0
    except ValueError as error:
        sys.stderr.write(f"numpy_runtime: error: {error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
