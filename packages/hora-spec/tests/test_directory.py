"""Replacing an adapter: whatever fails, and whenever, one whole adapter is there; nothing else is ever overwritten."""

import contextlib
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest
from hora_spec import (
    Adapter,
    AdapterLayer,
    AdapterSpec,
    HoraError,
    Layout,
    ProjectionShape,
    Site,
    directory,
    export_lora,
    load_adapter,
    param_shapes,
    save_adapter,
)

CONFIG, TENSORS = directory.CONFIG, directory.TENSORS
SITE = Site("attn.q_proj", "weight", (4, 4), Layout(), ProjectionShape(2, 2, 4))


def adapter(value, alpha=None):
    """An adapter that `value` and `alpha` identify; the shapes are always the same."""
    layer = AdapterLayer(AdapterSpec(2, alpha=alpha), {"q": SITE}, {})
    params = {key: np.full(shape, value, np.float32) for key, shape in param_shapes(layer.spec, layer.shape).items()}
    return Adapter({"attn": AdapterLayer(layer.spec, layer.sites, params)})


def identity(path):
    """`value` and `alpha` of the adapter in a directory."""
    layer = load_adapter(path).layers["attn"]
    (value,) = {float(x) for array in layer.params.values() for x in array.flat}
    return value, layer.spec.alpha


OLD, NEW = (1.0, 2.0), (3.0, 4.0)
CALLS = ("mkdir", "open", "write", "fsync", "close", "replace", "unlink")


class Crash(BaseException):
    """The process ends here."""


class Faults:
    """Counts the system calls that change a disk, and lets one of them fail, or all from one on.

    A failing write has written half of its bytes.
    """

    def __init__(self, monkeypatch, at=None, error=Crash, forever=True):
        self.at, self.error, self.forever, self.log = at, error, forever, []
        self.paths = {}
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, call):
        def wrapped(target, *args, **kwargs):
            number = len(self.log)
            path = self.paths.get(target, target)
            self.log.append((name, os.path.basename(path)))
            if self.at is not None and (number == self.at or (self.forever and number > self.at)):
                if name == "write" and number == self.at:
                    call(target, args[0][: len(args[0]) // 2])
                raise self.error(28, "no space left on device")
            result = call(target, *args, **kwargs)
            if name == "open":
                self.paths[result] = path
            return result

        return wrapped


def calls_of_a_save(path, monkeypatch, one=None):
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        save_adapter(path, one or adapter(*NEW))
    return faults.log


@pytest.mark.parametrize("earlier", [True, False])
def test_f3_a_crash_at_any_call_leaves_one_whole_adapter(tmp_path, monkeypatch, earlier):
    if earlier:
        save_adapter(tmp_path / "count", adapter(*OLD))
    calls = len(calls_of_a_save(tmp_path / "count", monkeypatch))
    found = []
    for at in range(calls):
        path = tmp_path / str(at)
        if earlier:
            save_adapter(path, adapter(*OLD))
        with monkeypatch.context() as patch:
            Faults(patch, at)
            with pytest.raises(Crash):
                save_adapter(path, adapter(*NEW))
        if not earlier and not (path / TENSORS).exists():
            found.append(None)
            with pytest.raises(HoraError):
                load_adapter(path)
        else:
            found.append(identity(path))
        save_adapter(path, adapter(5.0))
        assert identity(path) == (5.0, None)
        assert sorted(os.listdir(path)) == [CONFIG, TENSORS]
    before = OLD if earlier else None
    assert set(found) == {before, NEW}
    assert found == sorted(found, key=lambda one: one == NEW)  # the old one up to a moment, then the new one


@pytest.mark.parametrize("earlier", [True, False])
def test_f3_a_failing_call_is_reported_and_cleaned_up(tmp_path, monkeypatch, earlier):
    if earlier:
        save_adapter(tmp_path / "count", adapter(*OLD))
    calls = calls_of_a_save(tmp_path / "count", monkeypatch)
    for at in range(len(calls)):
        path = tmp_path / str(at)
        if earlier:
            save_adapter(path, adapter(*OLD))
        before = sorted(os.listdir(path)) if earlier else []
        with monkeypatch.context() as patch:
            Faults(patch, at, OSError, forever=False)
            needless = earlier and calls[at][0] == "mkdir"
            with contextlib.nullcontext() if needless else pytest.raises(OSError, match="no space left"):
                save_adapter(path, adapter(*NEW))
        if (path / TENSORS).exists() and identity(path) != OLD:
            assert identity(path) == NEW
        else:
            assert (sorted(os.listdir(path)) if path.exists() else []) == before


def test_f3_every_file_is_durable_before_it_gets_its_name(tmp_path, monkeypatch):
    log = [call for call in calls_of_a_save(tmp_path / "a", monkeypatch) if call[0] in ("write", "fsync", "replace")]
    (pending,) = {name for call, name in log if call == "write" and name.startswith(CONFIG)}
    new = pending.replace(CONFIG, TENSORS)
    assert log == [
        ("write", new),
        ("fsync", new),
        ("write", pending),
        ("fsync", pending),
        ("fsync", "a"),
        ("replace", new),
        ("fsync", "a"),
        ("replace", pending),
        ("fsync", "a"),
    ]


def test_f3_a_short_write_is_continued(tmp_path, monkeypatch):
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
        save_adapter(tmp_path, adapter(*NEW))
    assert identity(tmp_path) == NEW


def test_f3_a_reader_gets_one_adapter_while_another_is_written(tmp_path, monkeypatch):
    save_adapter(tmp_path, adapter(*OLD))
    pending, saves = directory._pending, iter([adapter(*NEW), adapter(*OLD), adapter(*NEW)])

    def interrupted(data):  # called between reading tensors and config, and by the writer itself
        with monkeypatch.context() as patch:
            patch.setattr(directory, "_pending", pending)
            for other in saves:
                save_adapter(tmp_path, other)
                break
        return pending(data)

    monkeypatch.setattr(directory, "_pending", interrupted)
    assert identity(tmp_path) == NEW
    assert next(saves, None) is None


def test_f3_leftovers_of_a_crash_do_not_outlive_another_writer(tmp_path, monkeypatch):
    path, peft = tmp_path / "a", tmp_path / "peft"
    for earlier in (path, peft):
        save_adapter(earlier, adapter(*OLD))
    first = [call for call, _ in calls_of_a_save(peft, monkeypatch)].index("replace")
    with monkeypatch.context() as patch:
        Faults(patch, first + 1)  # tensors in place, config pending
        with pytest.raises(Crash):
            save_adapter(path, adapter(*NEW))
    assert len(os.listdir(path)) == 3
    assert identity(path) == NEW
    save_adapter(peft, adapter(7.0, 8.0))
    for name in (TENSORS, CONFIG):  # PEFT writes both files in place
        (path / name).write_bytes((peft / name).read_bytes())
    assert identity(path) == (7.0, 8.0)


@pytest.mark.skipif(directory.fcntl is None, reason="Windows cannot lock a directory")
@pytest.mark.parametrize("at", range(3))
def test_f3_writers_exclude_each_other(tmp_path, monkeypatch, at):
    """A second writer starts while the first is between two of its steps, and waits."""
    save_adapter(tmp_path, adapter(*OLD))
    sync, other, calls = directory._sync, threading.Thread(target=save_adapter, args=(tmp_path, adapter(*NEW))), []

    def interrupted(path):
        calls.append(path)
        if len(calls) == at + 1:
            other.start()
            other.join(0.2)
            assert other.is_alive()
        sync(path)

    monkeypatch.setattr(directory, "_sync", interrupted)
    save_adapter(tmp_path, adapter(5.0))
    other.join(10)
    assert identity(tmp_path) == NEW
    assert sorted(os.listdir(tmp_path)) == [CONFIG, TENSORS]


def test_f3_temporary_files_of_different_adapters_have_different_names(tmp_path, monkeypatch):
    names = []
    for i, one in enumerate((OLD, NEW)):
        log = calls_of_a_save(tmp_path / str(i), monkeypatch, adapter(*one))
        names += {name for call, name in log if call == "write"}
    assert len(set(names)) == 4


def test_f3_an_export_that_was_killed_can_be_repeated(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        export_lora(adapter(*NEW), tmp_path / "count")
    for at in range(len(faults.log)):
        path = tmp_path / str(at)
        with monkeypatch.context() as patch:
            Faults(patch, at)
            with pytest.raises(Crash):
                export_lora(adapter(*OLD), path)
        if (path / CONFIG).exists():  # whole, so never overwritten
            with pytest.raises(HoraError, match="nothing is overwritten"):
                export_lora(adapter(*NEW), path)
            continue
        export_lora(adapter(*NEW), path)
        assert sorted(os.listdir(path)) == [CONFIG, TENSORS]


@pytest.mark.parametrize("pending", [None, '{"peft_type": "HORA"}', "no JSON"])
def test_f3_tensors_without_a_pending_lora_config_are_no_interrupted_export(tmp_path, pending):
    (tmp_path / TENSORS).write_bytes(directory_of(adapter(*OLD), tmp_path / "other"))
    shutil.rmtree(tmp_path / "other")
    if pending:
        (tmp_path / directory._pending((tmp_path / TENSORS).read_bytes())).write_text(pending)
    with pytest.raises(HoraError, match="nothing is overwritten"):
        export_lora(adapter(*NEW), tmp_path)


def directory_of(one, path):
    """Bytes of the tensors of an adapter."""
    save_adapter(path, one)
    return (path / TENSORS).read_bytes()


def test_f3_an_earlier_adapter_is_replaced_and_other_files_stay(tmp_path):
    save_adapter(tmp_path, adapter(*OLD))
    (tmp_path / "README.md").write_text("mine")
    save_adapter(tmp_path, adapter(*NEW))
    assert identity(tmp_path) == NEW
    assert (tmp_path / "README.md").read_text() == "mine"


def test_f3_a_damaged_earlier_adapter_is_replaced(tmp_path):
    save_adapter(tmp_path, adapter(*OLD))
    (tmp_path / TENSORS).write_bytes(b"")
    save_adapter(tmp_path, adapter(*NEW))
    assert identity(tmp_path) == NEW


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": "mine"},
        {CONFIG: '{"peft_type": "LORA"}', TENSORS: ""},
        {CONFIG: '{"peft_type": ["HORA"]}'},
        {CONFIG: "no JSON"},
        {TENSORS: ""},
        {".git": ""},
        {f"{CONFIG}.bak": '{"peft_type": "HORA"}'},
    ],
)
def test_f3_a_directory_that_holds_something_else_is_refused(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(HoraError, match="nothing is overwritten silently"):
        save_adapter(tmp_path, adapter(*NEW))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_f3_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HoraError, match="got the file"):
        save_adapter(tmp_path / "file", adapter(*NEW))
    assert (tmp_path / "file").read_text() == "mine"


def fifo(path):
    os.mkfifo(path)


def listening(path):
    """A socket; its address is relative, since such addresses are short."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def loop(path):
    path.symlink_to(path)


def device(path):
    path.symlink_to("/dev/zero")


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


def sparse_with_a_header(path):
    text = b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}'
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(2**40)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("make", [fifo, listening, os.mkdir, loop, device, sparse, sparse_with_a_header])
def test_f5_only_regular_files_of_a_true_size_are_read(tmp_path, make):
    for name in (CONFIG, TENSORS, "pending"):
        save_adapter(tmp_path / name, adapter(*OLD))
        tensors = (tmp_path / name / TENSORS).read_bytes()
        path = tmp_path / name / (directory._pending(tensors) if name == "pending" else name)
        path.unlink(missing_ok=True)
        make(path)
    code = """
import sys, hora_spec
for path in sys.argv[1:]:
    try:
        hora_spec.load_adapter(path)
    except hora_spec.HoraError as error:
        print(error)
"""
    command = [sys.executable, "-c", code, *sorted(tmp_path.iterdir())]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stderr) == (0, "")
    assert len(found.stdout.splitlines()) == found.stdout.count("(spec F") == 3


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
@pytest.mark.parametrize("name", [CONFIG, TENSORS, "."])
def test_f5_a_file_without_permission_is_refused(tmp_path, name):
    save_adapter(tmp_path, adapter(*OLD))
    path = tmp_path / name
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    try:
        with pytest.raises(HoraError, match="permission"):
            load_adapter(tmp_path)
    finally:
        path.chmod(mode)


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "input/output error"), MemoryError()])
@pytest.mark.parametrize("call", ["stat", "open", "fstat"])
def test_f5_whatever_the_disk_says_is_a_hora_error(tmp_path, monkeypatch, call, error):
    save_adapter(tmp_path, adapter(*OLD))

    def failing(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(HoraError, match="spec F5"):
            load_adapter(tmp_path)


@pytest.mark.parametrize("path", ["a" * 5000, "a/" * 3000, "a\0b", "file/below"])
def test_f1_a_path_that_cannot_be_is_refused(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HoraError):
        load_adapter(f"{tmp_path}/{path}")


def test_f5_a_file_that_keeps_changing_is_refused(tmp_path, monkeypatch):
    save_adapter(tmp_path, adapter(*OLD))
    read = directory._read_config

    def rewritten(path):
        shutil.copyfile(tmp_path / TENSORS, tmp_path / "copy")
        os.replace(tmp_path / "copy", tmp_path / TENSORS)
        return read(path)

    monkeypatch.setattr(directory, "_read_config", rewritten)
    with pytest.raises(HoraError, match="keeps changing"):
        load_adapter(tmp_path)
