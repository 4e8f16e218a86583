"""What a framework computed, beside its file."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a `.npz` file, which is closed."""
    with np.load(path) as file:
        return dict(file)
