"""Laws of locks: one process at a time, freed however it ends, also where the file system has no locks."""

import errno
import subprocess
import sys

import filelock
import pytest
from filelock import Timeout

from khanhllm import files
from khanhllm.errors import UserError
from khanhllm.files import foreign, locked
from khanhllm.training.run import _locked

HOLD = "import sys; from pathlib import Path; from khanhllm.files import locked; held = locked(Path(sys.argv[1])); "
HOLD += "held.__enter__(); print('held', flush=True); sys.stdin.read()"


def test_one_folder_may_lie_elsewhere_if_it_is_the_users_own(tmp_path, monkeypatch):
    run, disk = tmp_path / "run", tmp_path / "disk"
    (run / "inside").mkdir(parents=True), disk.mkdir()
    for place in (run / "far", run / "inside" / "far"):
        place.symlink_to(disk)
    assert "inside/far is a link" in foreign(run, "far")
    (run / "inside" / "far").unlink()
    assert not foreign(run, "far")
    assert "far is a link" in foreign(run) and "far is a link" in foreign(run, "inside")
    (disk / "stray").symlink_to("/etc")
    assert "stray is a link" in foreign(run, "far")
    (disk / "stray").unlink()
    monkeypatch.setattr(files, "_user", lambda: run.stat().st_uid + 1)
    assert "far is a link" in foreign(run, "far")
    disk.rmdir()
    assert "far is a link" in foreign(run, "far")


def test_a_lock_is_held_by_one_and_free_after_its_process_was_killed(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    with pytest.raises(Timeout), locked(tmp_path / "lock"):
        pass
    with locked(tmp_path / "lock", waiting=other.kill):
        pass
    other.communicate()


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_and_what_stays_behind_is_named(tmp_path, monkeypatch, answer):
    def refuses(self):
        raise OSError(answer, "no locks here")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuses)
    for _ in range(2):
        with _locked(tmp_path / "run"):
            assert (tmp_path / "run" / ".lock.held").exists()
        assert not (tmp_path / "run" / ".lock.held").exists()
    (tmp_path / "run" / ".lock.held").write_text("1\nanother-machine\n", "utf-8")
    with pytest.raises(UserError, match=r"\.lock\.held says; .* remove that file$"), _locked(tmp_path / "run"):
        pass


def test_other_faults_of_a_lock_are_not_taken_for_a_lack_of_locks(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(OSError, match=r"file"), locked(tmp_path / "file" / "lock"):
        pass
