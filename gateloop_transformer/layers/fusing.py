"""When a fused operator may stand for modules."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def may_stand_for(kind: type[nn.Module], module: nn.Module | None) -> bool:
    """Whether calling `module` does what calling any module of that kind does, and nobody watches or changes it.

    A subclass, a hook or a `forward` of its own asks to be called. This is on the path of every step of a decoder.
    """
    if type(module) is not kind or _has_any_global_hook():
        return False
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not (hooks or "forward" in own)
