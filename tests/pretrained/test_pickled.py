from pathlib import Path
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest

from tokjax.errors import UserError
from tokjax.pretrained import pickled

FILES = Path(__file__).parent / "files"  # written by tests/oracles/torch_files.py
TORCH = ["legacy.pth", "protocol4.pth", "pytorch_model.bin", "scripted.pt", "traced.pt", "training.pth"]
TORCH += ["training_legacy.pth", "zip.pth"]


@pytest.fixture(scope="module")
def expected():
    with np.load(FILES / "expected.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", TORCH)
def test_files_of_torch(name, expected):
    wanted = {key.removeprefix(name + "/"): value for key, value in expected.items() if key.startswith(name + "/")}
    tensors = pickled.read_pickled(FILES / name)
    assert tensors.keys() == wanted.keys()
    for key, value in wanted.items():
        array = tensors[key].read()
        assert array.shape == tensors[key].shape == value.shape, key
        assert array.dtype == tensors[key].dtype
        assert array.dtype.name == ("bfloat16" if key == "dtype.bfloat16" else value.dtype.name)
        assert array.flags.c_contiguous and array.flags.writeable
        np.testing.assert_array_equal(array.astype(value.dtype), value)


def test_names_of_a_script_are_nested_attributes():
    names = pickled.read_pickled(FILES / "scripted.pt")
    assert {"visual.conv1.weight", "blocks.1.proj.bias", "blocks.0.counts", "logit_scale"} < names.keys()
    assert not any("heads" in name or "sizes" in name for name in names)


@pytest.mark.parametrize("name", ["training.pth", "training_legacy.pth"])
def test_harmless_objects_become_plain_values(name):
    content = pickled.load(FILES / name)
    assert content["args"] == {
        "lr": 0.1,
        "device": "cuda:0",
        "output_dir": "runs/one",
        "dtype": np.float16,
        "names": {"a", "b"},
    }
    assert content["lr_scheduler"] == {"best": 0.5, "milestones": {3: 2, 5: 1}}
    assert type(content["best"]) is float and content["best"] == 0.25
    assert (content["epoch"], content["shape"], content["seen"]) == (7, (2, 3), {"x": [1]})
    assert content["optimizer"]["state"][0]["exp_avg"].shape == ()
    np.testing.assert_array_equal(content["rng"].value, np.arange(4, dtype=np.uint32))


# Files as torch lays them out, around any pickle. Opcodes are put together by hand: Python's pickler only names what it
# can import.

PROTO, STOP = b"\x80\x02", b"."


def value(content):
    return pickletools.optimize(pickle.dumps(content, 2))[2:-1]


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


def storage(key="0", length=6, dtype="FloatStorage", tag="storage", legacy=False):
    items = value(tag) + glob("torch", dtype) + value(key) + value("cpu") + value(length)
    return b"(" + items + (b"N" if legacy else b"") + b"tQ"


def tensor(offset=0, shape=(2, 3), strides=(3, 1), legacy=False, **kwargs):
    hooks = glob("collections", "OrderedDict") + b")R"
    args = storage(legacy=legacy, **kwargs) + value(offset) + value(shape) + value(strides) + b"\x89" + hooks
    return glob("torch._utils", "_rebuild_tensor_v2") + b"(" + args + b"tR"


def named(**items):
    return b"}(" + b"".join(value(name) + item for name, item in items.items()) + b"u"


SIX = np.arange(6, dtype=np.float32)


def write_zip(path, program, storages=None, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", PROTO + program + STOP)
        for key, array in ({"0": SIX} if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        for name, content in members.items():
            archive.writestr(f"archive/{name}", content)


def write_script(path, program, storages=None):
    write_zip(path, program, storages, version=b"3\n", code=b"", constants=b"\x80\x02).")


def write_legacy(path, program, storages=None):
    storages = {"0": SIX} if storages is None else storages
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    data = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in storages.values())
    pickles = b"".join(pickle.dumps(part, 2) for part in head) + PROTO + program + STOP
    path.write_bytes(pickles + pickle.dumps(list(storages), 2) + data)


WRITERS = {"zip": write_zip, "legacy": write_legacy, "script": write_script}


@pytest.mark.parametrize("kind", WRITERS)
def test_files_put_together_here_are_read(tmp_path, kind):
    WRITERS[kind](tmp_path / "a.pth", named(w=tensor(legacy=kind == "legacy")))
    np.testing.assert_array_equal(pickled.read_pickled(tmp_path / "a.pth")["w"].read(), SIX.reshape(2, 3))


class Evil:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


def attacks(marker):
    """name -> (program, what the error must name)."""
    code = f"open({str(marker)!r}, 'w').close()"
    text = value(code)
    evil = {f"eval, protocol {n}": (pickle.dumps(Evil(eval, code), n)[:-1], r"builtin(s|__)\.eval") for n in range(6)}
    call = b"\x85R"  # of one argument
    namespace = glob("argparse", "Namespace") + b")\x81"
    return evil | {
        "os.system": (glob("os", "system") + value(f"touch {marker}") + call, r"os\.system"),
        "posix.system": (glob("posix", "system") + value(f"touch {marker}") + call, r"posix\.system"),
        "exec": (glob("builtins", "exec") + text + call, r"builtins\.exec"),
        "subprocess": (glob("subprocess", "Popen") + value(["touch", str(marker)]) + call, r"subprocess\.Popen"),
        "torch.load": (glob("torch", "load") + text + call, r"torch\.load"),
        "bytes that torch loads": (glob("torch.storage", "_load_from_bytes") + text + call, "_load_from_bytes"),
        "hub": (glob("torch.hub", "load") + text + call, r"torch\.hub\.load"),
        "numpy's files": (glob("numpy", "load") + text + call, r"numpy\.load"),
        "getattr": (glob("builtins", "getattr") + text + call, r"builtins\.getattr"),
        "import": (glob("importlib", "import_module") + value("os") + call, r"importlib\.import_module"),
        "partial": (glob("functools", "partial") + text + call, r"functools\.partial"),
        "attribute of a global": (
            value("collections") + value("OrderedDict.__init__.__globals__") + b"\x93",
            r"collections\.OrderedDict\.__init__",
        ),
        "global by the stack": (value("os") + value("system") + b"\x93" + text + call, r"os\.system"),
        "like a script's": (glob("__torch__evil", "x") + text + call, r"__torch__evil\.x"),
        "nested in a state": (named(a=namespace + named(__setstate__=glob("os", "system")) + b"b"), r"os\.system"),
        "in a persistent id": (b"(" + value("storage") + glob("os", "system") + text + b"tQ", r"os\.system"),
        "INST": (b"(" + text + b"ios\nsystem\n", r"os\.system is refused \(INST\)"),
        "INST of a container": (b"(icollections\nOrderedDict\n", r"collections\.OrderedDict is refused \(INST\)"),
        "OBJ": (b"(" + glob("os", "system") + text + b"o", r"os\.system"),
        "OBJ of a container": (b"(" + glob("collections", "OrderedDict") + b"o", "OBJ"),
        "NEWOBJ": (glob("os", "system") + text + b"\x85\x81", r"os\.system"),
        "NEWOBJ_EX": (glob("collections", "OrderedDict") + b")}\x92", "NEWOBJ_EX"),
        "extension": (b"\x82\x01", "EXT1"),
        "text id": (b"Pos.system\n", "PERSID"),
        "module": (b"(" + value("module") + text + text + text + text + b"tQ", "storage"),
        "call of a dict": (b"}" + text + call, "Calling a dict"),
        "call of a name": (glob("torch", "FloatStorage") + text + call, "Calling a"),
        "state of a global": (
            glob("collections", "OrderedDict") + named(__call__=text) + b"b",
            r"collections\.OrderedDict",
        ),
        "state of a list": (b"]" + named(append=text) + b"b", "BUILD of a list"),
        "state of a tensor": (storage() + named(fetch=text) + b"b", "BUILD"),
        "objects in numpy": (glob("numpy", "dtype") + b"(" + value("O8") + b"\x89\x88tR", "dtype 'O8'"),
        "other codecs": (glob("_codecs", "encode") + text + value("rot13") + b"\x86R", "_codecs"),
        "wrapped tensor": (
            glob("torch._tensor", "_rebuild_from_type_v2")
            + (b"(" + glob("collections", "OrderedDict") + glob("torch", "Tensor") + b")" + b"}tR"),
            "subclass",
        ),
    }


def test_the_attacks_are_live(tmp_path):
    for name in ("eval, protocol 2", "os.system", "INST"):
        marker = tmp_path / name.replace(" ", "")
        program = attacks(marker)[name][0]
        if name == "INST":
            program = b"(" + value(f"touch {marker}") + b"ios\nsystem\n"
        pickle.loads(program + STOP)
        assert marker.exists()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("attack", attacks("x"))
def test_nothing_runs(tmp_path, kind, attack):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    program, message = attacks(marker)[attack]
    for inside in (program, named(model=tensor(legacy=kind == "legacy"), x=program)):
        WRITERS[kind](path, inside)
        with pytest.raises(UserError, match=message) as caught:
            pickled.read_pickled(path)
        assert str(path) in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("position", range(4))
def test_nothing_runs_from_the_other_pickles_of_an_old_file(tmp_path, position):
    """Magic number, protocol, system, keys."""
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, ["0"]]
    parts = [pickle.dumps(part, 2) for part in head]
    parts[position] = pickle.dumps(Evil(eval, f"open({str(marker)!r}, 'w')"), 2)
    path.write_bytes(b"".join(parts[:3]) + PROTO + named(w=tensor(legacy=True)) + STOP + parts[3] + bytes(32))
    with pytest.raises(UserError, match=r"__builtin__\.eval"):
        pickled.read_pickled(path)
    assert not marker.exists()


def test_attributes_of_objects_are_only_data(tmp_path):
    state = named(__class__=value("x"), __setstate__=value("y"), update=value("z"))
    write_zip(tmp_path / "a.pth", named(args=glob("argparse", "Namespace") + b")\x81" + state + b"b"))
    assert pickled.load(tmp_path / "a.pth") == {"args": {"__class__": "x", "__setstate__": "y", "update": "z"}}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**70},
        {"shape": (2, 4), "strides": (4, 1)},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"strides": (3,)},
        {"shape": (2, -3)},
        {"shape": (2.0, 3)},
        {"shape": (2**62, 2**62), "strides": (0, 0)},
        {"shape": (1,) * 100, "strides": (1,) * 100},
        {"shape": (10**8,), "strides": (0,)},
        {"length": 7},
        {"length": -6},
        {"length": "6"},
        {"key": "1"},
        {"key": ("0",)},
        {"dtype": "DoubleStorage"},
    ],
)
def test_no_view_leaves_its_storage(tmp_path, kind, wrong):
    WRITERS[kind](tmp_path / "a.pth", named(w=tensor(legacy=kind == "legacy", **wrong)))
    with pytest.raises(UserError, match=r"a\.pth"):
        pickled.read_pickled(tmp_path / "a.pth")


def test_views_of_old_files(tmp_path):
    def view(first, count):
        items = value("storage") + glob("torch", "FloatStorage") + value("0") + value("cpu") + value(6)
        pid = b"(" + items + value(("v", first, count)) + b"tQ"
        args = pid + value(0) + value((2,)) + value((1,))
        return glob("torch._utils", "_rebuild_tensor") + b"(" + args + b"tR"

    write_legacy(tmp_path / "a.pth", named(w=view(3, 2)))
    np.testing.assert_array_equal(pickled.read_pickled(tmp_path / "a.pth")["w"].read(), [3, 4])
    write_legacy(tmp_path / "a.pth", named(w=view(5, 2)))
    with pytest.raises(UserError, match="does not fit"):
        pickled.read_pickled(tmp_path / "a.pth")


def bomb_of_shared_objects():
    made = glob("__torch__.a", "B") + b")\x81q\x00"
    for level in range(40):
        inner = b"h" + bytes([level])
        made += b"0" + glob("__torch__.a", "B") + b")\x81" + named(a=inner, b=inner) + b"bq" + bytes([level + 1])
    return made


BOMBS = {
    "deep tuple as key": (b"})" + b"\x85" * 10**5 + b"K\x01s", "as a key"),
    "deep tuple in a set": (b"\x8f()" + b"\x85" * 10**5 + b"\x90", "as a key"),
    "deep tuple as key of a namespace": (
        glob("argparse", "Namespace") + b"])" + b"\x85" * 10**6 + b"K\x01\x86a\x85R",
        "damaged",
    ),
    "long tuple as key, again and again": (
        b"}(" + b"K\x01" * 30_000 + b"tq\x01K\x01s" + b"h\x01Ns" * 10**5,
        "as a key",
    ),
    "long number as key": (b"}" + b"\x8b\x10\x27\x00\x00" + b"\x01" * 10_000 + b"K\x01s", "digits"),
    "deep list": (b"]" * 10**5 + b"a" * (10**5 - 1), "no tensors"),
    "shared objects": (bomb_of_shared_objects(), "nested too"),
    "cycle": (glob("__torch__.a", "B") + b")\x81q\x00" + named(a=b"h\x00") + b"b", "nested too"),
    "copies": (
        b"("
        + value("x" * 10**6)
        + b"q\x050"
        + (glob("_codecs", "encode") + b"h\x05" + value("latin1") + b"\x86R") * 500
        + b"l",
        "copies",
    ),
    "long name": (b"X\xff\xff\xff\xff", "damaged"),
    "longer name": (b"\x8d" + b"\xff" * 7 + b"\x0f", "damaged"),
    "long number": (b"I" + b"9" * 10**5 + b"\n", "damaged"),
    "key of shared tuples": (
        b"(" + value("storage") + glob("torch", "FloatStorage") + b")" + b"2\x86" * 60 + b"NK\x01tQ",
        "key",
    ),
    "device of shared tuples": (glob("torch", "device") + b")" + b"2\x86" * 60 + b"\x85R", "damaged|no tensors"),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_work_stays_in_proportion_to_the_file(tmp_path, kind, bomb):
    program, message = BOMBS[bomb]
    WRITERS[kind](tmp_path / "a.pth", program, {})
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            pickled.read_pickled(tmp_path / "a.pth")
        assert tracemalloc.get_traced_memory()[1] < 400e6
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("kind", WRITERS)
def test_one_tensor_is_read_at_a_time(tmp_path, kind):
    big = np.ones(10**6, np.float32)
    items = {
        f"w{i}": tensor(key=str(i), length=10**6, shape=(10**6,), strides=(1,), legacy=kind == "legacy")
        for i in range(8)
    }
    WRITERS[kind](tmp_path / "a.pth", named(**items), {str(i): big for i in range(8)})
    tracemalloc.start()
    try:
        tensors = pickled.read_pickled(tmp_path / "a.pth")
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tensors["w3"].read()
        assert tracemalloc.get_traced_memory()[1] < big.nbytes + 1e6
    finally:
        tracemalloc.stop()


def test_compressed_archives(tmp_path):
    write_zip(tmp_path / "a.pth", named(w=tensor()), compression=zipfile.ZIP_DEFLATED)
    np.testing.assert_array_equal(pickled.read_pickled(tmp_path / "a.pth")["w"].read(), SIX.reshape(2, 3))


def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path):
    zeros = {"0": np.zeros(1 << 20, np.float32)}
    write_zip(tmp_path / "a.pth", named(w=tensor()), storages=zeros, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="no file of weights"):
        pickled.read_pickled(tmp_path / "a.pth")["w"].read()


def test_big_endian_files_are_refused(tmp_path):
    write_zip(tmp_path / "a.pth", named(w=tensor()), byteorder=b"big")
    with pytest.raises(UserError, match="big-endian"):
        pickled.read_pickled(tmp_path / "a.pth")


W, V = tensor(shape=(6,), strides=(1,)), tensor(shape=(2,), strides=(1,))


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (named(w=W), {"w": 6}),
        (named(state_dict=named(w=V), model=named(w=W)), {"w": 6}),
        (named(model=value({"name": "vit"}), state_dict=named(w=W)), {"w": 6}),  # a configuration called "model"
        (named(model_ema=named(w=V), model=named(w=W)), {"w": 6}),
        (named(student=named(w=V), teacher=named(w=W)), {"w": 6}),
        (named(state_dict=named(module=named(w=W))), {"w": 6}),
        (named(state_dict=named(w=W), rng=V), {"w": 6}),
        (b"}(" + value("module.a") + W + value("module.b") + V + b"u", {"a": 6, "b": 2}),
        (b"}(" + value("module._orig_mod.a") + W + b"u", {"a": 6}),
        (b"}(" + value("module.a") + W + value("b") + V + b"u", {"module.a": 6, "b": 2}),
        (named(w=W, epoch=value(3), names=value(["x"])), {"w": 6}),
    ],
)
def test_where_the_state_dict_is(tmp_path, program, names):
    write_zip(tmp_path / "a.pth", program)
    assert {name: tensor.size for name, tensor in pickled.read_pickled(tmp_path / "a.pth").items()} == names


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (named(epoch=value(3), weights=named(w=W)), "a dict of epoch, weights, and no tensors"),
        (W, "holds a tensor"),
        (b"]", "holds a list"),
    ],
)
def test_no_state_dict(tmp_path, program, message):
    write_zip(tmp_path / "a.pth", program)
    with pytest.raises(UserError, match=message):
        pickled.read_pickled(tmp_path / "a.pth")


def test_whole_objects_are_refused_by_name():
    with pytest.raises(UserError, match=r"module\.pth: torch\.nn\.modules\.conv\.Conv2d is refused.*state dict"):
        pickled.read_pickled(FILES / "module.pth")


def test_a_file_without_bytes(tmp_path):
    (tmp_path / "a.pth").touch()
    with pytest.raises(UserError, match=r"a\.pth"):
        pickled.load(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [pickle.dumps({"a": 1}, 2), pickle.dumps([1], 4)])
def test_pickles_of_something_else(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="not one of torch"):
        pickled.read_pickled(tmp_path / "a.pth")


def read_all(path):
    return [tensor.read() for tensor in pickled.read_pickled(path).values()]


@pytest.mark.parametrize("name", ["zip.pth", "training_legacy.pth", "scripted.pt"])
def test_truncated_files(tmp_path, name):
    whole, path = (FILES / name).read_bytes(), tmp_path / name
    for length in [*range(5, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=name):
            read_all(path)


@pytest.mark.parametrize("name", ["zip.pth", "training.pth", "training_legacy.pth", "scripted.pt"])
def test_damaged_bytes_give_no_other_error(tmp_path, name):
    """Or none: most of the bytes are numbers of tensors."""
    whole, path = np.frombuffer((FILES / name).read_bytes(), np.uint8), tmp_path / name
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(250):
        damaged = whole.copy()
        at = rng.integers(4, len(whole), size=rng.integers(1, 6))
        damaged[at] = rng.integers(0, 256, size=len(at))
        path.write_bytes(damaged.tobytes())
        try:
            read_all(path)
        except UserError as error:
            assert str(path) in str(error)
            failed += 1
    assert failed > 20
