"""The prefix results of any associative operator over time, in plain differentiable torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gateloop_transformer.ops.context_parallel import refuse

Elements = tuple[Tensor, ...]


def associative_scan(operator: Callable[[Elements, Elements], Elements], elems: Elements) -> Elements:
    """result[t] = elems[0] • elems[1] • … • elems[t] along axis 1.

    O(T) applications of the operator in O(log T) vectorised rounds; gradients come from autograd.

    Args:
        operator: takes two tuples of tensors (an earlier and a later stretch, any length along axis 1) and returns
            one tuple of the same shapes; must be associative.
        elems: a tuple (or list) of tensors that share the length T ≥ 0 of axis 1.

    Returns:
        A tuple of tensors in the shapes of `elems`.

    Raises:
        ValueError: elems is empty, a tensor has no axis 1, the lengths differ, or the operator returns another
            number of tensors.

    >>> (total,) = associative_scan(lambda a, b: (a[0] + b[0],), (torch.ones(1, 4),))
    >>> total.tolist()
    [[1.0, 2.0, 3.0, 4.0]]
    """
    refuse("associative_scan", "linear_scan and gate_loop do")
    if isinstance(elems, Tensor):
        raise ValueError("associative_scan: elems must be a tuple or list of tensors, not one tensor")
    elems = tuple(elems)
    if not elems or any(elem.ndim < 2 for elem in elems):
        raise ValueError("associative_scan: elems must be one or more tensors of shape (B, T, ...)")
    lengths = {elem.shape[1] for elem in elems}
    if len(lengths) > 1:
        shapes = [tuple(elem.shape) for elem in elems]
        raise ValueError(f"associative_scan: elems must share the length of axis 1, got shapes {shapes}")
    return _scan(operator, elems)


def _scan(operator: Callable[[Elements, Elements], Elements], elems: Elements) -> Elements:
    T = elems[0].shape[1]
    if T < 2:
        return elems
    pairs = _apply(operator, tuple(x[:, 0 : T - 1 : 2] for x in elems), tuple(x[:, 1::2] for x in elems))
    odd = _scan(operator, pairs)
    later = tuple(x[:, 2::2] for x in elems)
    earlier = tuple(x[:, : (T - 1) // 2] for x in odd)
    even = _apply(operator, earlier, later) if T > 2 else later
    return tuple(
        _interleave(torch.cat([x[:, :1].to(e.dtype), e], 1), o) for x, e, o in zip(elems, even, odd, strict=True)
    )


def _apply(operator: Callable[[Elements, Elements], Elements], left: Elements, right: Elements) -> Elements:
    result = tuple(operator(left, right))
    if len(result) != len(left):
        raise ValueError(f"associative_scan: operator returned {len(result)} tensors for {len(left)}")
    return result


def _interleave(even: Tensor, odd: Tensor) -> Tensor:
    """even[0], odd[0], even[1], … along axis 1; `even` is as long as `odd` or one longer."""
    n = odd.shape[1]
    woven = torch.stack([even[:, :n], odd], 2).flatten(1, 2)
    return torch.cat([woven, even[:, n:]], 1)
