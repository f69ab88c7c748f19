"""Damaged adapter directories: each raises HoraError, or loads as the adapter that it was."""

import json
import os
import random
import signal
import struct
from pathlib import Path

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
    Window,
    load_adapter,
    param_shapes,
    save_adapter,
)
from hypothesis import settings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
DIGESTS = ("hora_layers_sha256", "hora_tensors_sha256")
JUNK = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, float("nan"), float("-inf")),
    *("", "x", "\0", "..", "/etc/passwd", "\ud800", "é", "weight", "q", "HORA", "LORA", "__class__", "a" * 9999),
    *([], {}, [[]], [1, 2, 3], {"a": 1}, [8, 8], [0, 8], [-1, 8], [2**40, 2**40], [0] * 999),
    *("(h k) d", "d (h k)", "h k d", "d h k", "l (h k) d", "(k h) d", "(h k) d 1"),
]
DTYPES = ["F16", "BF16", "F64", "I32", "U32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "no", 5, None]
TEXTS = [b"[]", b"{}", b"null", b"{", b'{"a": NaN}', b"\xff\xfe", b" " * 999, b"[" * 99_999, b'{"a":' * 99_999]


def with_params(spec, sites, seed):
    layer, draw = AdapterLayer(spec, sites, {}), np.random.default_rng(seed)
    shapes = param_shapes(spec, layer.shape)
    return AdapterLayer(spec, sites, {key: np.float32(draw.normal(size=shape)) for key, shape in shapes.items()})


def separate():
    """Two layers of square and of grouped projections."""
    layers = {}
    for i in range(2):
        name = f"model.layers.{i}.attn"
        sites = {
            "q": Site(f"{name}.q_proj", "weight", (8, 8), Layout(), ProjectionShape(4, 2, 8)),
            "v": Site(f"{name}.v_proj", "weight", (4, 8), Layout(), ProjectionShape(2, 2, 8)),
        }
        layers[name] = with_params(AdapterSpec(2, hidden_dim=3, head_embed_dim=3, alpha=3.0), sites, i)
    return Adapter(layers, {"task_type": "CAUSAL_LM"})


def fused():
    """One fused weight, and a module trained whole."""
    shape, windows = ProjectionShape(2, 4, 8), {"q": Window(1, 0, 8), "v": Window(1, 16, 24)}
    sites = {p: Site("h.0.c_attn", "weight", (8, 24), Layout("d (h k)", w), shape) for p, w in windows.items()}
    layer = with_params(AdapterSpec(2, hidden_dim=3, head_embed_dim=3, residual=True), sites, 2)
    return Adapter({"h.0": layer}, {}, {"score.weight": np.ones((2, 8), np.float16)})


ADAPTERS = {"separate": separate(), "fused": fused()}


def places(node, prefix=()):
    """Every place below the root of a JSON document."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*prefix, key)
        yield from places(value, (*prefix, key))


def at(node, path):
    for key in path:
        node = node[key]
    return node


def damage_json(draw, directory):
    """One value of the config replaced, removed, renamed, doubled, changed a little, or exchanged with another."""
    config = json.loads((directory / CONFIG).read_text())
    paths = [path for path in places(config) if path[0] not in DIGESTS]
    important = [path for path in paths if path[0] == "hora_layers"]
    *parents, last = draw.choice(important if draw.random() < 0.8 else paths)
    node = at(config, parents)
    match draw.choice(["replace", "remove", "rename", "double", "nudge", "exchange"]):
        case "replace":
            node[last] = draw.choice(JUNK)
        case "remove":
            del node[last]
        case "rename" if isinstance(node, dict):
            node[draw.choice([last.upper(), "", "\0", "é"])] = node.pop(last)
        case "double" if isinstance(node, list):
            node.append(node[last])
        case "nudge" if type(node[last]) in (int, float):
            node[last] = draw.choice([-node[last], node[last] + 1, node[last] * 2, node[last] + 2**32])
        case _:
            *others, other = draw.choice(important)
            twin = at(config, others)
            if parents[: len(others) + 1] != [*others, other] and others[: len(parents) + 1] != [*parents, last]:
                node[last], twin[other] = twin[other], node[last]
    (directory / CONFIG).write_text(json.dumps(config))


def damage_header(draw, directory):
    """One entry of the header of the tensor file made to lie."""
    data = (directory / TENSORS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = draw.choice([key for key in header if key != "__metadata__"])
    entry, (start, stop) = header[name], header[name]["data_offsets"]
    other = draw.choice([key for key in header if key != "__metadata__"])
    match draw.choice(["dtype", "shape", "offsets", "name", "exchange", "remove", "add", "text", "metadata", "length"]):
        case "dtype":
            entry["dtype"] = draw.choice(DTYPES)
        case "shape":
            shape = entry["shape"]
            entry["shape"] = draw.choice([shape[::-1], [*shape, 1], [], [2**62, 4], [2**63, 2], [0], [-1], "x", None])
        case "offsets":
            lies = [[start + 4, stop], [stop, start], [0, 2**63], [start, stop + 4], [-4, 0], [start], None, ["a", "b"]]
            entry["data_offsets"] = draw.choice([*lies, header[other]["data_offsets"]])
        case "name":
            names = [
                f"{name}x",
                name.upper(),
                "",
                name.removeprefix("base_model.model."),
                f"{name}\0",
                "base_model.x y",
            ]
            header[draw.choice(names)] = header.pop(name)
        case "exchange":
            header[name], header[other] = header[other], header[name]
        case "remove":
            del header[name]
        case "add":
            more = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
            header[draw.choice(["base_model.model.x.weight", "base_model.model.a.hora_hyper.b_in", "y"])] = more
            body += b"\0\0\x80?"
        case "metadata":
            header["__metadata__"] = draw.choice([{"a": "b"}, {"a": 1}, 5, None, {"format": "pt", "x": "y" * 9999}])
        case "text":
            write_tensors(directory, draw.choice(TEXTS), body)
            return
        case "length":
            lie = draw.choice([0, 1, 2**63, 2**64 - 1, 10**8 + 1, 10**8 - 1, len(data), draw.randrange(5000)])
            (directory / TENSORS).write_bytes(struct.pack("<Q", lie) + data[8:])
            return
    write_tensors(directory, json.dumps(header).encode(), body)


def write_tensors(directory, header, body):
    (directory / TENSORS).write_bytes(struct.pack("<Q", len(header)) + header + body)


def damage_bytes(draw, directory):
    """Bits flipped, bytes cut off, put in or added, in either file."""
    path = directory / draw.choice([CONFIG, TENSORS])
    data = bytearray(path.read_bytes())
    i = draw.randrange(len(data))
    match draw.choice(["flip", "cut", "insert", "append", "zero", "mark", "array"]):
        case "flip":
            data[i] ^= 1 << draw.randrange(8)
        case "cut":
            del data[i:]
        case "insert":
            data[i:i] = draw.randbytes(draw.randrange(1, 9))
        case "append":
            data += draw.randbytes(draw.randrange(1, 99))
        case "zero":
            data[i:] = bytes(len(data) - i)
        case "mark":
            data[:0] = "\ufeff".encode()
        case "array":
            data = bytearray(b"[" + data + b"]")
    path.write_bytes(data)


def damage_values(draw, directory):
    """One number of one tensor."""
    data = bytearray((directory / TENSORS).read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    i = draw.randrange(start, len(data) - 3, 2)
    data[i : i + 4] = draw.choice([draw.randbytes(4), struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))])
    (directory / TENSORS).write_bytes(data)


def damage_kind(draw, directory):
    """A file replaced by something that is none, or of another adapter."""
    path = directory / draw.choice([CONFIG, TENSORS])
    match draw.choice(["absent", "directory", "fifo", "loop", "dangling", "null", "torn", "other", "bin"]):
        case "absent":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
        case "fifo":
            path.unlink()
            os.mkfifo(path)
        case "loop" | "dangling" | "null" as link:
            path.unlink()
            path.symlink_to({"loop": path, "dangling": directory / "no", "null": "/dev/null"}[link])
        case "torn":
            name = "separate" if (b"c_attn" not in (directory / CONFIG).read_bytes()) else "fused"
            save_adapter(directory / "new", scaled(ADAPTERS[name]))
            os.replace(directory / "new" / path.name, path)
        case "other":
            (directory / f"{CONFIG}.0123456789abcdef.tmp").write_text("{}")
        case "bin":
            (directory / TENSORS).rename(directory / "adapter_model.bin")


def scaled(adapter):
    """Another adapter of the same shapes."""
    layers = {
        name: AdapterLayer(
            layer.spec.replace(alpha=9.0), layer.sites, {key: 2 * value for key, value in layer.params.items()}
        )
        for name, layer in adapter.layers.items()
    }
    return Adapter(layers, adapter.config, adapter.modules)


DAMAGES = [damage_json, damage_json, damage_header, damage_header, damage_bytes, damage_values, damage_kind]


def assert_unchanged(adapter, original):
    """Everything that takes part in the computation is what it was."""
    assert list(adapter.layers) == list(original.layers)
    for name, layer in original.layers.items():
        got = adapter.layers[name]
        assert (got.spec, dict(got.sites)) == (layer.spec, dict(layer.sites))
        for key, value in layer.params.items():
            np.testing.assert_array_equal(got.params[key], value, strict=True)
    assert adapter.modules.keys() == original.modules.keys()
    for key, value in original.modules.items():
        np.testing.assert_array_equal(adapter.modules[key], value, strict=True)


class Hang(BaseException):
    """Reading takes too long."""


@pytest.fixture
def no_hang():
    """Raises `Hang` ten seconds after `signal.alarm(10)`."""

    def hang(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, hang)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="alarms and FIFOs are POSIX")
@pytest.mark.parametrize("digests", [True, False], ids=["digests", "no-digests"])
def test_f5_a_damaged_directory_raises_hora_error_or_loads_as_it_was(tmp_path, no_hang, digests):
    originals = {name: (adapter, files(tmp_path / name, adapter, digests)) for name, adapter in ADAPTERS.items()}
    loaded = 0
    for i in range(10 * settings.default.max_examples):  # 250; 5000 under the profile nightly
        draw = random.Random(i)
        original, content = originals[draw.choice(sorted(originals))]
        directory = tmp_path / str(i)
        directory.mkdir()
        for name, data in content.items():
            (directory / name).write_bytes(data)
        damage = draw.choice(DAMAGES)
        damage(draw, directory)
        try:
            adapter = read(directory)
        except BaseException as error:
            pytest.fail(f"draw {i}, {damage.__name__}: {error!r}")
        loaded += adapter is not None
        if adapter is not None and digests:
            assert_unchanged(adapter, original)
    assert loaded


def read(directory):
    """The adapter in a directory, or None if it is refused in time."""
    signal.alarm(10)
    try:
        return load_adapter(directory)
    except HoraError:
        return None
    finally:
        signal.alarm(0)


def files(directory: Path, adapter: Adapter, digests: bool) -> dict[str, bytes]:
    """Content of a saved adapter."""
    save_adapter(directory, adapter)
    if not digests:
        config = json.loads((directory / CONFIG).read_text())
        text = json.dumps({key: value for key, value in config.items() if key not in DIGESTS}, indent=2)
        (directory / CONFIG).write_text(text)
    return {path.name: path.read_bytes() for path in directory.iterdir()}
