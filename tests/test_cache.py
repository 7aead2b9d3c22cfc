"""The cache: one holder at a time, and none that outlives its process."""

import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from graftwork.cache import file_stamp, locked
from graftwork.errors import DataError

HOLDER = """
import sys, time
from pathlib import Path
from graftwork.cache import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    entered = threading.Event()

    def enter() -> None:
        with locked(tmp_path / "x"):
            entered.set()

    waiting = threading.Thread(target=enter, daemon=True)
    waiting.start()
    assert not entered.wait(0.3)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert entered.wait(10)
    waiting.join()


def test_the_holder_s_own_error_passes(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), locked(tmp_path / "x"):
        (tmp_path / "nothing").read_text()
    with locked(tmp_path / "x"):  # and frees the lock
        pass


def test_who_asks_says_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refusal = locked(tmp_path / "file" / "x", lambda directory, error: DataError(f"{directory}: {error.strerror}"))
    with pytest.raises(DataError, match="file: Not a directory|file: File exists"), refusal:
        pass


def test_a_stamp_follows_every_touch(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("a")
    before = file_stamp(file)
    assert file_stamp(file) == before
    file.write_text("ab")
    assert file_stamp(file) != before


def test_what_the_cache_makes_is_private_and_what_was_there_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with locked(tmp_path / "home" / "cache" / "x"):
        pass
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path, tmp_path / "home", tmp_path / "home" / "cache")]
    assert modes == [0o755, 0o700, 0o700]
