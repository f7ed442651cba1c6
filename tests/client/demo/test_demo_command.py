"""What `farfault demo` leaves behind, and what it says of that; the move itself is played elsewhere."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from farfault_cli.errors import VerificationError
from farfault_client.demo import command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "scene"
    folder.mkdir()
    (folder / "serve.log").write_text("a line")
    monkeypatch.setattr(command, "scene_folder", lambda prefix: folder)
    return folder


def demo(monkeypatch: pytest.MonkeyPatch, *flags: str, errors: int = 0) -> Result:
    figures: dict[str, Any] = {"verification_errors": errors}
    monkeypatch.setattr(command, "_play", lambda config, folder, quiet: figures)
    return CliRunner().invoke(command.demo, ["--vmm", "simulated", *flags])


def test_nothing_is_left_of_a_good_move(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo(monkeypatch).exit_code == 0
    assert not folder.exists()


def test_what_is_kept_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(folder) in demo(monkeypatch, "--keep").output
    assert (folder / "serve.log").exists()


def test_json_names_it_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(demo(monkeypatch, "--keep", "--json").output)["folder"] == str(folder)


def test_logs_of_a_guest_with_errors_are_where_the_message_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = demo(monkeypatch, errors=3).exception
    assert isinstance(error, VerificationError)
    assert str(folder) in error.remedy
    assert (folder / "serve.log").exists()
