"""What is said of optional packages that are missing."""

from __future__ import annotations

import pytest

from lockstep.core.errors import MissingExtraError
from lockstep.core.extras import check_installed, require


def test_a_missing_package_names_its_extra() -> None:
    check_installed("json", extra="serve")
    with pytest.raises(MissingExtraError) as checked:
        check_installed("json", "no_such_package", extra="serve")
    with pytest.raises(MissingExtraError) as required:
        require("no_such_package", extra="serve")
    assert str(checked.value) == str(required.value)
    assert "pip install 'lockstep-rl[serve]'" in str(checked.value)
