"""Storages: shared between processes, intact after a crash, and without passwords in any output."""

import multiprocessing
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from contextlib import closing
from math import isfinite
from pathlib import Path

import optuna
import pytest

from gpt2.errors import UserError, without_password
from gpt2.search.storage import exclusive, file_of, open_storage, validate_storage
from tests.test_scripts import wait_for
from tests.warm import Process

SECRET = "s3/cr:et@x"  # not escaped in the URL


@pytest.mark.parametrize(
    "url", ["sqlite:///a/b.db", "journal:///a.log", "postgresql://me@host/db", "mysql+pymysql://me:pw@host/db", None]
)
def test_valid_urls(url):
    assert validate_storage(url) is None


@pytest.mark.parametrize(
    "url",
    [
        *("study.db", "sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:/// ", "sqlite:///a.db?mode=ro"),
        *("journal:///:memory:", "redis://me:pw@host", "postgresql:/x", ""),
    ],
)
def test_invalid_urls(url):
    assert "is none of sqlite:///FILE" in validate_storage(url)


def test_file_of_a_url():
    assert file_of("sqlite:///a/b.db") == Path("a/b.db")
    assert file_of("journal:////abs/c.log") == Path("/abs/c.log")
    assert file_of("postgresql://host/db") is None


@pytest.mark.parametrize("password", ["simple", SECRET, "ä%20b"])
def test_password_is_removed_from_text(password):
    url = f"postgresql://me:{password}@host:5432/db"
    for text in (f"cannot reach {url}.", f"password is {password}", f"('{url}', {password!r})"):
        hidden = without_password(text, url)
        assert password not in hidden
        assert "***" in hidden
    assert without_password(url, url).endswith("@host:5432/db")
    assert password not in without_password(f"begin {url} end")


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
def test_storage_is_shared_between_processes(tmp_path, scheme):
    url = f"{scheme}:///{tmp_path}/deep/er/study"
    study = optuna.create_study(study_name="a", storage=open_storage(url))
    study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), 1.0)
    child = multiprocessing.get_context("spawn").Process(target=_add_a_trial, args=(url,))
    child.start()
    child.join()
    assert [trial.value for trial in study.get_trials()] == [1.0, 2.0]


def _add_a_trial(url: str) -> None:
    study = optuna.load_study(study_name="a", storage=open_storage(url))
    study.tell(study.ask(), 2.0)


def test_incomplete_last_line_of_a_journal_is_removed(tmp_path, caplog):
    url, file = f"journal:///{tmp_path}/study", tmp_path / "study"
    optuna.create_study(study_name="a", storage=open_storage(url)).enqueue_trial({"x": 1})
    for n, is_another_process in ((2, False), (3, True)):
        file.write_bytes(file.read_bytes() + b'{"op_code": 4, "worker_')
        if is_another_process:
            open_storage.__globals__["_open"].cache_clear()
        study = optuna.load_study(study_name="a", storage=open_storage(url))
        study.enqueue_trial({"x": n})
        assert len(study.trials) == n
    assert "incomplete" in caplog.text


def test_lock_is_exclusive_and_released_by_a_killed_process(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def hold() -> None:
        with exclusive(url):
            ready.set()
            time.sleep(60)

    child = context.Process(target=hold)
    child.start()
    ready.wait(30)
    began = time.monotonic()
    killer = context.Process(target=lambda: (time.sleep(0.5), os.kill(child.pid, signal.SIGKILL)))
    killer.start()
    with exclusive(url):
        assert time.monotonic() - began > 0.4
    for process in (child, killer):
        process.join()


def test_unwritable_folder_is_a_one_line_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"storage: journal:.* cannot be opened: ") as error:
        open_storage(f"journal:///{tmp_path}/file/study")
    assert len(error.value.problems) == 1


def make_storage(folder: Path, scheme: str) -> Path:
    file = folder / f"study.{scheme}"
    optuna.create_study(study_name="a", storage=open_storage(f"{scheme}:///{file}")).enqueue_trial({"x": 1})
    open_storage.__globals__["_open"].cache_clear()
    return file


@pytest.mark.parametrize(
    ("scheme", "damage", "reason"),
    [
        ("sqlite", lambda content: b"import os\n" * 200, "file is not a database"),
        ("sqlite", lambda content: content[: len(content) // 2], "database disk image is malformed"),
        ("sqlite", lambda content: content[:100], "database disk image is malformed"),
        ("journal", lambda content: b"import os\nimport re", "line 1 is no entry of Optuna's journal"),
        ("journal", lambda content: b"import os", "line 1 is no entry of Optuna's journal"),
        ("journal", lambda content: content[40:], "line 1 is no entry of Optuna's journal"),
        ("journal", lambda content: content.replace(b"\n", b"", 1), "line 1 is no entry of Optuna's journal"),
        ("journal", lambda content: content + b"7\n[1]\n", " is no entry of Optuna's journal"),
        ("journal", lambda content: content + b"\xff\x00", " is no entry of Optuna's journal"),
    ],
)
def test_invalid_storage_file_is_refused_and_unchanged(tmp_path, scheme, damage, reason):
    file = make_storage(tmp_path, scheme)
    for lock in tmp_path.glob("*lock"):
        lock.unlink()
    file.write_bytes(damage(file.read_bytes()))
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"storage: .* cannot be opened: ") as error:
        open_storage(f"{scheme}:///{file}")
    assert reason in str(error.value)
    assert len(error.value.problems) == 1
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before


def test_database_of_another_program_is_refused(tmp_path):
    with closing(sqlite3.connect(tmp_path / "mail.db")) as database:
        database.execute("CREATE TABLE mails (text)")
    problem = validate_storage(f"sqlite:///{tmp_path}/mail.db")
    assert problem == f"sqlite:///{tmp_path}/mail.db cannot be opened: it is the database of another program"


@pytest.mark.parametrize("scheme", ["sqlite", "journal"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("{folder}", "it is a folder"),
        ("/dev/null", "it is no file"),
        ("/proc/here/study", "No such file or directory"),
        ("{folder}/file/study", "Not a directory"),
        ("{folder}/" + "n" * 300, "File name too long"),
        ("{folder}/" + "n" * 250, "File name too long"),
    ],
)
def test_unusable_path_of_a_storage_is_refused_at_once(tmp_path, scheme, name, reason):
    (tmp_path / "file").touch()
    url = f"{scheme}:///{name.format(folder=tmp_path)}"
    assert validate_storage(url) == f"{url} cannot be opened: {reason}"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_refused(tmp_path):
    file = make_storage(tmp_path, "sqlite")
    file.chmod(0)
    assert str(validate_storage(f"sqlite:///{file}")).endswith("cannot be opened: Permission denied")


def test_intact_and_empty_files_are_storages(tmp_path):
    for scheme in ("sqlite", "journal"):
        file = make_storage(tmp_path, scheme)
        assert validate_storage(f"{scheme}:///{file}") is None
        file.write_bytes(b"")
        assert validate_storage(f"{scheme}:///{file}") is None


@pytest.fixture(scope="module")
def postgresql():
    """The URL of a PostgreSQL server that the tests start, with a password."""
    psycopg = pytest.importorskip("psycopg")
    binaries = [shutil.which("initdb"), *map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    initdb = next(filter(None, binaries), None)
    if initdb is None or (os.geteuid() == 0 and shutil.which("runuser") is None):
        pytest.skip("there is no PostgreSQL here")
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # other users cannot read pytest's folder
    as_user = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        as_user = ["runuser", "-u", "nobody", "--"]
        shutil.chown(folder, "nobody")
    (folder / "password").write_text("secret")
    (folder / "password").chmod(0o644)
    options = ["-D", f"{folder}/data", "-U", "me", "-A", "scram-sha-256", f"--pwfile={folder}/password"]
    subprocess.run([*as_user, initdb, *options], check=True, capture_output=True, cwd=folder)
    command = [
        *as_user,
        str(Path(initdb).with_name("postgres")),
        "-D",
        f"{folder}/data",
        "-p",
        "54329",
        "-k",
        str(folder),
    ]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=folder)
    for _ in range(100):
        try:
            psycopg.connect("postgresql://me:secret@127.0.0.1:54329/postgres").close()
            break
        except psycopg.OperationalError:
            time.sleep(0.1)
    yield "postgresql://me:secret@127.0.0.1:54329/postgres"
    server.terminate()
    server.wait()
    shutil.rmtree(folder)


def wait_for_study(name: str, storage: str) -> optuna.Study:
    def has_begun() -> bool:
        try:
            return name in optuna.get_all_study_names(storage)
        except Exception:  # noqa: BLE001  # its tables are being made
            return False

    wait_for(has_begun)
    return optuna.load_study(study_name=name, storage=storage)


def kill_in_the_middle_of_a_trial(study: optuna.Study, processes: list[Process], most: int) -> dict[int, int]:
    """Kill `most` processes, each during another trial. Returns the trials by process id."""
    killed: dict[int, int] = {}

    def are_killed() -> bool:
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            pid = trial.user_attrs.get("worker", {}).get("pid")
            is_new = pid not in killed and trial.number not in killed.values()  # another worker may have resumed it
            if trial.intermediate_values and is_new and len(killed) < most:
                next(process for process in processes if process.pid == pid).kill()
                killed[pid] = trial.number
        return len(killed) == most

    wait_for(are_killed)
    return killed


@pytest.mark.slow
def test_four_workers_share_postgresql_and_two_are_killed(postgresql, workspace):
    """The workers share only the server: each has its own sweep folder. The password is in no file."""
    from tests.cli.test_sweeper import STUDY

    workspace.environment |= {"STUDIES": postgresql, "GPT2_FAULT": "slow@1-99"}
    line = [*STUDY, "train.max_steps=12", "train.eval_every=3", "hydra/sweeper/pruner=none", "hydra.sweeper.n_trials=6"]
    processes = []
    for number in range(4):
        storage = "${oc.env:STUDIES}" if number % 2 else postgresql
        own = [f"hydra.sweep.dir=machine_{number}", f"hydra.sweeper.storage='{storage}'"]
        processes.append(workspace.start("train.py", *line, *own, errors_in_output=True))
    study = wait_for_study("mine", postgresql)
    killed = kill_in_the_middle_of_a_trial(study, processes, most=2)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    codes = {process.pid: process.returncode for process in processes}
    assert codes == {pid: -signal.SIGKILL if pid in killed else 0 for pid in codes}, outputs

    trials = study.get_trials()
    assert [trial.number for trial in trials] == list(range(6))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert all(isfinite(trial.value) for trial in trials)
    assert len({tuple(trial.params.values()) for trial in trials}) == 6
    for number in killed.values():
        assert trials[number].user_attrs["deaths"][0] == 1
        assert trials[number].user_attrs["worker"]["pid"] not in killed
    rows = [line for output in outputs for line in output.splitlines() if line.startswith("trial ")]
    assert sorted(int(row.split()[1]) for row in rows if " complete " in row) == sorted(
        trial.number for trial in trials if trial.user_attrs["worker"]["pid"] not in killed
    )
    for process, output in zip(processes, outputs, strict=True):
        if process.pid not in killed:
            assert ("the best trial's checkpoints in" in output) != ("the best trial was run elsewhere" in output)
    files = [path for path in workspace.folder.rglob("*") if path.is_file()]
    assert len({path.relative_to(workspace.folder).parts[0] for path in files if path.name == "train.log"}) >= 3
    assert not [path for path in files if b"secret" in path.read_bytes()]
    assert "secret" not in "".join(outputs)
