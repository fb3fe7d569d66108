"""Logits and labels of a few rows, for tests of losses and of their reference."""

import pytest
import torch
from torch import Tensor

from tests.mutual.references import B, C, K


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(K, B, C, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, C, (B,), generator=torch.Generator().manual_seed(1))
