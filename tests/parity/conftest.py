"""What every comparison with PyTorch and transformers needs."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def torch():
    """torch, with transformers beside it; the tests are skipped where either is missing."""
    torch = pytest.importorskip("torch", reason="parity needs torch: pip install 'polygpt[parity]'")
    pytest.importorskip("transformers", reason="parity needs transformers: pip install 'polygpt[parity]'")
    torch.set_num_threads(1)
    return torch
