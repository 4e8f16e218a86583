"""A server that cannot listen says so before it loads anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.core.errors import ConfigError
from lockstep.server.address import check_address


def test_a_port_that_is_taken_is_told_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    check_address("127.0.0.1", 0)
    (tmp_path / "m.gguf").write_bytes(b"")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            check_address("127.0.0.1", port)
        assert main(["serve", str(tmp_path / "m.gguf"), "--port", str(port)]) == 2
    assert "cannot listen on" in capsys.readouterr().err


def test_a_model_that_does_not_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", f"mine={tmp_path / 'nothing'}"]) == 2
    assert "nothing does not exist" in capsys.readouterr().err
