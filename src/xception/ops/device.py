"""Where networks run."""

from __future__ import annotations

import torch

from xception.errors import ConfigError


def usable_device(choice: torch.device | str | None = None) -> torch.device:
    """The device that was asked for; None: CUDA where there is one, else the CPU.

    Raises `ConfigError` for a name that is none, and for a device that this machine (or this PyTorch) lacks.
    """
    if choice is None:
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(choice)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {str(choice)!r} cannot be used: expected one such as cpu, cuda or cuda:1") from error
    try:
        torch.ones(1, device=device).cpu()  # there and back: the meta device takes everything and gives nothing
    except (AssertionError, ImportError, NotImplementedError, RuntimeError) as error:
        problem = str(error).partition("\n")[0][:160]
        raise ConfigError(f"device {str(choice)!r} cannot be used: {problem}") from error
    return device
