"""A bundle on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_networks import tiny_info, tiny_model

from xception.weights.bundle import save_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle, always with the same bytes."""
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_bundle(path, tiny_model(), tiny_info())
    return path
