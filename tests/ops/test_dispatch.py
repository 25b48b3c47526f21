"""The policy that chooses a backend, and the bridge to JAX."""

from __future__ import annotations

from functools import partial

import jax
import processes
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gateloop_transformer.ops import available_backends, checks, gate_loop, linear_scan
from gateloop_transformer.ops.backends import jax_xla
from gateloop_transformer.ops.dispatch import TABLE, Backend, choose, direct

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", TABLE)
def test_every_backend_has_every_function(name: str) -> None:
    wanted = [function for function in vars(Backend) if not function.startswith("_")]
    assert len(wanted) == 5
    assert all(callable(getattr(TABLE[name], function)) for function in wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_every_backend_is_available_on_the_cpu(dtype: torch.dtype) -> None:
    assert available_backends(torch.ones(1, dtype=dtype)) == list(TABLE)


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("auto", CPU, torch.float32) == next(iter(TABLE))
    monkeypatch.setattr(TABLE["numba"], "unsupported", lambda device, dtype: "away today")
    assert choose("auto", CPU, torch.float32) == "triton"
    assert available_backends(torch.ones(1)) == ["triton", "chunkwise", "jax", "eager"]


def test_nobody_can_says_why_each_cannot() -> None:
    with pytest.raises(NotImplementedError, match=r"torch.int32 on cpu: numba: .*; chunkwise: .*; jax: .*; eager: "):
        choose("auto", CPU, torch.int32)


@pytest.mark.parametrize("operator", ["gate_loop", "linear_scan"])
def test_an_unknown_backend_is_an_error_that_lists_the_known(operator: str) -> None:
    x = torch.ones(1, 2, 1, 1)
    calls = {
        "gate_loop": partial(gate_loop, x, x, x, x[..., 0]),
        "linear_scan": partial(linear_scan, x[0], x[0]),
    }
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'.*'auto', 'numba', 'triton', 'chunkwise', "):
        calls[operator](backend="cuda")


def test_a_backend_asked_for_that_cannot_is_an_error_that_says_why() -> None:
    x = torch.ones(1, 2, 3, device="meta")
    with pytest.raises(NotImplementedError, match=r"'jax' cannot run torch.float32 on meta: .*CPU"):
        linear_scan(x, x, backend="jax")


def test_without_jax_the_reason_is_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_xla, "installed", lambda: False)
    assert "jax" not in available_backends(torch.ones(1))
    x = torch.ones(1, 2, 3)
    with pytest.raises(NotImplementedError, match=r"pip install gateloop-transformer\[jax\]"):
        linear_scan(x, x, backend="jax")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contiguous_tensors_share_their_memory_with_jax(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, dtype=dtype)
    with jax_xla._in_64_bits():
        array = jax_xla._to_jax(x)
        assert array.dtype == str(dtype).removeprefix("torch.")
        assert array.unsafe_buffer_pointer() == x.data_ptr()
        assert jax_xla._to_torch(array).data_ptr() == x.data_ptr()


def test_other_tensors_reach_jax_by_value() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    odd = torch.randn(13, dtype=torch.float64)[1:].view(4, 3)
    with jax_xla._in_64_bits():
        for tensor in (x.T, odd, x[:, ::2], x[:1].expand(4, 3), x.clone().requires_grad_()):
            assert torch.equal(torch.from_numpy(jax.device_get(jax_xla._to_jax(tensor)).copy()), tensor.detach())


def test_jax_results_belong_to_torch() -> None:
    x = torch.ones(1, 4, 2)
    first = linear_scan(x, x, backend="jax")
    second = linear_scan(x, x, backend="jax")
    first.zero_()
    assert second[0, :, 0].tolist() == linear_scan(x, x, backend="jax")[0, :, 0].tolist() == [1, 2, 3, 4]


def test_jax_settings_of_the_user_stay_as_they_were() -> None:
    before = jax.config.jax_enable_x64
    x = torch.ones(1, 4, 2, dtype=torch.float64)
    assert linear_scan(x, x, backend="jax").dtype == torch.float64
    assert jax.config.jax_enable_x64 == before
    assert jax.numpy.ones(1).dtype == ("float64" if before else "float32")


LAZY = """
import sys
import gateloop_transformer
assert "torch" not in sys.modules, "torch"
import gateloop_transformer.ops, gateloop_transformer.model
assert "jax" not in sys.modules, "jax"
assert "safetensors" not in sys.modules, "safetensors"
"""
NO_TORCH = """
import sys
import gateloop_transformer.jax
assert "jax" in sys.modules and "torch" not in sys.modules
"""


@pytest.mark.parametrize("code", [LAZY, NO_TORCH], ids=["package", "jax side"])
def test_nothing_heavy_is_imported_before_it_is_used(code: str) -> None:
    processes.python("-c", code)


def test_parameters_pass_the_dispatcher_by_where_no_gradient_can_be_asked_for() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    assert not direct(parameter)
    with torch.no_grad():
        assert direct(parameter, torch.ones(2))
        assert not direct(torch.nn.Buffer(torch.complex(parameter, parameter).conj().imag))
    with torch.inference_mode():
        assert direct(parameter)
    with torch.no_grad(), FakeTensorMode():
        assert not direct(torch.ones(2))
        assert not direct(parameter)


def test_devices_that_differ_are_named() -> None:
    with pytest.raises(ValueError, match=r"on one device, not \{'x': 'cpu', 'y': 'meta'\}"):
        checks.same_device("scan", x=torch.ones(1), y=torch.ones(1, device="meta"), z=None)


@pytest.mark.parametrize("outside", [False, True])
def test_bodies_of_operators_run_without_autocast(outside: bool) -> None:
    @checks.full_precision
    def body(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        assert body(torch.ones(2, 2)).dtype == torch.float32
