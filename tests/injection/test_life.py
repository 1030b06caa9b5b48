"""An adapter in a model that others touch: it says what a stock model with the change in its
weights would, whatever was done, before and after the adapter came, before and after a forward.
"""

import pytest
import torch
from life import NEW_BASE, OPERATIONS, ROUGH, adapt, base, call, quiet, right

from dreamtune import METHODS

operations = pytest.mark.parametrize("name", list(OPERATIONS))


@pytest.fixture(autouse=True)
def _quiet():
    with quiet():
        yield


def same(got, method, name, first=None):
    want = right(method, name, name in NEW_BASE if first is None else first)
    change = (want - right(None, name)).abs().max()
    assert change > 1e-2, "the adapter does something"
    error = (got - want).abs().max()
    assert error < ROUGH.get(name, 1e-5) * change, f"{error / change:.1e} of the change"


@operations
@pytest.mark.parametrize(
    "method,ran", [*((m, True) for m in METHODS), ("lora", False), ("ether", False)]
)
def test_after_the_adapter(name, method, ran):
    """`ran`: what the forward before computed must not be what the one after uses."""
    unet = base()
    adapt(unet, method)
    if ran:
        call(unet)
    unet = OPERATIONS[name](unet)
    same(call(unet), method, name)


@operations
@pytest.mark.parametrize("method", ["lora", "ether"])
def test_before_the_adapter(name, method):
    """An adapter comes to a model that something was done to."""
    if name == "average":
        pytest.skip("its copy is the model")
    unet = OPERATIONS[name](base())
    adapter = adapt(unet, method)
    same(call(unet), method, name)
    adapter.eject()
    if name not in ROUGH:
        torch.testing.assert_close(call(unet), right(None, name), rtol=0, atol=1e-12)
