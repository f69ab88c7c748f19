"""Replacing an adapter: whatever fails, and whenever, one whole adapter is there; nothing else is ever overwritten."""

import contextlib
import os

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


def calls_of_a_save(path, monkeypatch):
    with monkeypatch.context() as patch:
        faults = Faults(patch)
        save_adapter(path, adapter(*NEW))
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
    log = [call for call in calls_of_a_save(tmp_path / "a", monkeypatch) if call[0] not in ("open", "close", "mkdir")]
    (pending,) = {name for call, name in log if call == "write" and name.startswith(CONFIG)}
    assert log == [
        ("write", f"{TENSORS}.tmp"),
        ("fsync", f"{TENSORS}.tmp"),
        ("write", pending),
        ("fsync", pending),
        ("fsync", "a"),
        ("replace", f"{TENSORS}.tmp"),
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
    save_adapter(path, adapter(*OLD))
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
