"""The plain torch backend on devices that have no complex numbers and no float64, such as Apple's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gateloop_transformer import Transformer
from gateloop_transformer.ops import dispatch


class Watch(TorchDispatchMode):
    """Says which dtypes go through torch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        return result


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate_loop_heads": 4},
        {"gate": "ring", "gate_loop_heads": 4, "max_memory": 16},
        {"gate": "ring", "max_memory": 16, "conv_size": 4},
        {"use_gate_looped_attn": False, "attn_window": 8},
    ],
    ids=["channels", "heads", "ring heads", "ring channels", "attention"],
)
def test_chunkwise_models_have_no_complex_and_no_double_tensors(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"chunkwise": dispatch.TABLE["chunkwise"]}
    monkeypatch.setattr(dispatch, "TABLE", alone)
    model = Transformer(num_tokens=16, dim=32, depth=1, **options)
    ids = torch.randint(16, (2, 40))
    with Watch() as watch:
        model(ids, return_loss=True).backward()
        _, state = model(ids[:, :10], return_state=True)
        model(ids[:, 10:], state)
        model.generate(ids[:, :5], 4, temperature=0)
    assert watch.seen <= {torch.float32, torch.int64, torch.int32, torch.bool, torch.uint8}
