import json
from pathlib import Path
import shutil
import tracemalloc
from types import SimpleNamespace

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tokjax.errors import UserError
from tokjax.pretrained import files
from tokjax.pretrained.stored import to_float32

TORCH = Path(__file__).parent / "files"  # written by tests/oracles/torch_files.py
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}


def test_a_folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 8}')
    found = files.find(tmp_path)
    assert (found.config, found.processor) == ({"model_type": "vit"}, {"size": 8})
    assert set(found.tensors) == {"a", "b"}
    assert found.tensors.shape("a") == (2, 3)
    np.testing.assert_array_equal(found.tensors["a"], TENSORS["a"])


def test_a_single_file_with_and_without_a_configuration_beside_it(tmp_path):
    path = tmp_path / "deit.safetensors"
    save_file(TENSORS, path)
    found = files.find(path)
    assert (found.config, found.processor, found.path) == ({}, None, path)
    (tmp_path / "config.json").write_text('{"architecture": "x"}')
    assert files.find(str(path)).config == {"architecture": "x"}
    assert set(files.find(tmp_path).tensors) == {"a", "b"}  # the only weights of the folder


DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
]


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_of_safetensors(tmp_path, name):
    value = TENSORS["a"].astype(name)
    save_file({"a": value, "b": value[:, 0].copy(), "empty": value[:0]}, tmp_path / "model.safetensors")
    tensors = files.find(tmp_path).tensors
    assert tensors.dtype("a") == tensors["a"].dtype == value.dtype
    for key, wanted in {"a": value, "b": value[:, 0], "empty": value[:0]}.items():
        np.testing.assert_array_equal(tensors[key], wanted)


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_floats_become_float32(name):
    array = to_float32("w", TENSORS["a"].astype(name))
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, TENSORS["a"])


@pytest.mark.parametrize("name", ["int8", "int64", "bool", "float8_e4m3fn", "complex64"])
def test_other_dtypes_are_no_weights(name):
    with pytest.raises(UserError, match=f"blocks.0.weight has the wrong dtype: {name}; .*bfloat16"):
        to_float32("blocks.0.weight", TENSORS["a"].astype(name))


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_one_tensor_is_read_at_a_time_and_copied_once(tmp_path, kind):
    tensors, path = {f"w{i}": np.ones(10**6, np.float32) for i in range(8)}, tmp_path / f"a.{kind}"
    save_file(tensors, path) if kind == "safetensors" else np.savez(path, **tensors)
    tracemalloc.start()
    try:
        found = files.find(path).tensors
        assert found.shape("w5") == (10**6,)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        array = found["w5"]
        assert tracemalloc.get_traced_memory()[1] < 5e6
        array[0] = 2  # a copy: the file is not written to
    finally:
        tracemalloc.stop()
    assert found["w5"][0] == 1


def test_a_file_replaced_after_it_was_found_does_not_mix(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    tensors = files.find(path).tensors
    save_file({"other": np.zeros(1)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    np.testing.assert_array_equal(tensors["a"], TENSORS["a"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training.pth", "legacy.pth", "scripted.pt"])
def test_the_content_tells_the_kind_not_the_suffix(tmp_path, name):
    wanted = files.Tensors(TORCH / name)
    for other in ("model.safetensors", "weights.npz", "weights"):
        shutil.copy(TORCH / name, tmp_path / other)
        tensors = files.find(tmp_path / other).tensors
        assert set(tensors) == set(wanted)
        for key in wanted:
            np.testing.assert_array_equal(tensors[key], wanted[key])
    save_file(TENSORS, tmp_path / "a.pth")
    assert set(files.find(tmp_path / "a.pth").tensors) == {"a", "b"}


def shards(folder, weight_map):
    save_file({"a": TENSORS["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path):
    shards(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    tensors = files.find(tmp_path).tensors
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-00003-of-00002.safetensors"}, r"model-00003-of-00002\.safetensors does not exist"),
        ({"b": "model-00001-of-00002.safetensors"}, r"b \(model-00001-of-00002\.safetensors\)"),
        ({"a": "../elsewhere.safetensors"}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_a_wrong_index(tmp_path, weight_map, message):
    shards(tmp_path, weight_map)
    with pytest.raises(UserError, match=message):
        files.find(tmp_path)


def test_shards_of_pickles(tmp_path):
    shutil.copy(TORCH / "pytorch_model.bin", tmp_path / "pytorch_model-00001-of-00002.bin")
    shutil.copy(TORCH / "legacy.pth", tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"logit_scale": "pytorch_model-00001-of-00002.bin", "base": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tensors = files.find(tmp_path).tensors
    assert (set(tensors), tensors.shape("base")) == ({"logit_scale", "base"}, (4, 6))


@pytest.mark.parametrize("content", ['{"weight_map": ', "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_corrupt_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        files.find(tmp_path)


def test_truncated_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
            files.find(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "a.pth", "a.pt", "a.npz"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "web page"),
        (b"<HTML><body>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "git-lfs pointer"),
        (b"Entry not found", "whole safetensors file|neither safetensors"),
        (bytes(1000), "whole safetensors file|neither safetensors"),
        (b"PK\x03\x04" * 30, "not a whole zip archive"),
        (b"PK\x05\x06" + bytes(18), "whole safetensors file|neither safetensors"),
        (b"\x80\x02}q\x00X", "damaged or cut off"),
    ],
)
def test_files_of_another_kind(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=message) as caught:
            files.find(place)
        assert name in str(caught.value)


def test_npz(tmp_path):
    arrays = {
        "embedding/kernel": np.arange(12.0).reshape(3, 4),
        "Transformer/encoderblock_0/k": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "scalar": np.float32(3),
        "half": np.ones(2, ml_dtypes.bfloat16),
        "empty": np.zeros((0, 2)),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        tensors = files.find(tmp_path).tensors
        assert tensors.keys() == arrays.keys()
        for name, value in arrays.items():
            assert tensors.shape(name) == value.shape
            assert tensors[name].dtype == value.dtype
            np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize("others", [{}, {"opt/mu/w": np.zeros(2), "step": np.int64(3)}])
def test_parameters_of_a_training_state(tmp_path, others):
    np.savez(tmp_path / "a.npz", **{"params/img/head/kernel": np.ones(2)}, **others)
    assert set(files.find(tmp_path).tensors) == {"img/head/kernel"}


def test_npz_with_objects_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (eval, (f"open({str(tmp_path / 'marker')!r}, 'w')",))

    np.savez(tmp_path / "a.npz", a=np.array([Evil()], object))
    with pytest.raises(UserError, match=r"a\.npz: a\.npy holds Python objects"):
        files.find(tmp_path)
    np.savez(tmp_path / "a.npz", a=np.array(["text"]))
    with pytest.raises(UserError, match=r"a\.npy holds str"):
        files.find(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_damaged_npz(tmp_path):
    path = tmp_path / "a.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, a=np.arange(1000.0), b=np.ones(3))
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(100):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[rng.integers(4, len(whole), 4)] = rng.integers(0, 256, 4)
            path.write_bytes(damaged.tobytes())
            try:
                list(files.find(path).tensors.values())
            except UserError as error:
                assert str(path) in str(error)
        for length in range(4, len(whole), 499):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"a\.npz is not a whole zip archive"):
                files.find(path)


def test_a_header_that_promises_too_much(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.ones((2, 3)))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content.replace(b"(2, 3), }", b"(2, 300)}"))
    with pytest.raises(UserError, match="does not fit"):
        files.find(tmp_path)


def test_unreadable_json_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for content in ('{"model_type": ', "[1]", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=r"config\.json"):
            files.find(tmp_path)


def put(folder, *names):
    for name in names:
        if name.endswith(".safetensors"):
            save_file({name: TENSORS["a"]}, folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps({"is": name}))
        elif name.endswith(".npz"):
            np.savez(folder / name, **{name: TENSORS["a"]})
        else:
            shutil.copy(TORCH / "pytorch_model.bin", folder / name)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["pytorch_model.bin", "open_clip_model.safetensors", "model.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "open_clip_model.safetensors", "x.safetensors"], "open_clip_model.safetensors"),
        (["pytorch_model.bin", "x.safetensors"], "x.safetensors"),
        (["open_clip_pytorch_model.bin", "x.pth", "pytorch_model.bin", "x.npz"], "logit_scale"),
        (
            ["x.pth", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"],
            "logit_scale",
        ),
        (["x.npz", "config.json"], "x.npz"),
    ],
)
def test_which_weights_of_a_folder(tmp_path, names, chosen):
    put(tmp_path, *names)
    assert chosen in files.find(tmp_path).tensors


def test_no_or_several_weights(tmp_path):
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        files.find(tmp_path)
    put(tmp_path, "config.json", "training_args.bin")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        files.find(tmp_path)
    put(tmp_path, "a.pth", "b.pt")
    with pytest.raises(UserError, match=r"several weights, name one: a\.pth, b\.pt"):
        files.find(tmp_path)
    put(tmp_path, "one.safetensors", "two.safetensors")
    with pytest.raises(UserError, match=r"one\.safetensors, two\.safetensors"):
        files.find(tmp_path)


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (["model.safetensors", "config.json", "open_clip_config.json"], "config.json"),
        (["open_clip_model.safetensors", "config.json", "open_clip_config.json"], "open_clip_config.json"),
        (["open_clip_pytorch_model.bin", "open_clip_config.json"], "open_clip_config.json"),
        (["open_clip_model.safetensors", "config.json"], "config.json"),
        (["model.safetensors", "open_clip_config.json"], "open_clip_config.json"),
    ],
)
def test_the_configuration_is_that_of_the_weights(tmp_path, names, config):
    put(tmp_path, *names)
    assert files.find(tmp_path).config == {"is": config}
    assert files.find(tmp_path / names[0]).config == {"is": config}


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["tokenizer.json"], True),
        (["vocab.json", "merges.txt"], True),
        (["bpe_simple_vocab_16e6.txt.gz"], True),
        (["spiece.model"], True),
        (["vocab.json"], False),
        (["tokenizer_config.json"], False),
    ],
)
def test_the_folder_of_a_tokenizer(tmp_path, names, found):
    put(tmp_path, "model.safetensors", *names)
    assert files.find(tmp_path).tokenizer == (tmp_path if found else None)
    assert files.find(tmp_path / "model.safetensors").tokenizer == (tmp_path if found else None)


def test_paths_that_do_not_exist(tmp_path):
    for name in (tmp_path / "nothing", "model.safetensors", "ViT-B-32.pt", "B_16.npz"):
        with pytest.raises(UserError, match="neither an existing file or folder nor an id"):
            files.find(name)


class Hub:
    """A repository as the hub's library shows it; downloads copy into a folder of its own."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.asked = folder, []
        (folder / "hub").mkdir()
        monkeypatch.setattr(files, "HfApi", lambda: self)
        monkeypatch.setattr(files, "snapshot_download", self.download)

    def model_info(self, repo, revision):
        names = [path.name for path in (self.folder / "hub").iterdir()]
        return SimpleNamespace(
            siblings=[SimpleNamespace(rfilename=name) for name in [*names, "onnx/model.safetensors"]]
        )

    def download(self, repo, revision, allow_patterns):
        self.asked.append((repo, revision))
        copy = self.folder / "copy"
        copy.mkdir(exist_ok=True)
        for path in (self.folder / "hub").iterdir():
            if path.name in allow_patterns:
                shutil.copy(path, copy)
        return str(copy)


SMALL = ["config.json", "preprocessor_config.json", "tokenizer.json", "merges.txt", "open_clip_config.json"]
SMALL += ["generation_config.json", "chat_template.jinja"]


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (
            ["model.safetensors", "pytorch_model.bin", "tf_model.h5", "open_clip_model.safetensors"],
            ["model.safetensors"],
        ),
        (["pytorch_model.bin", "flax_model.msgpack", "training_args.bin"], ["pytorch_model.bin"]),
        (["open_clip_pytorch_model.bin", "open_clip_model.safetensors"], ["open_clip_model.safetensors"]),
        (["only.npz"], ["only.npz"]),
    ],
)
def test_the_hub_is_asked_for_the_files_needed(tmp_path, monkeypatch, there, wanted):
    hub = Hub(monkeypatch, tmp_path)
    put(tmp_path / "hub", *there, *SMALL, "README.md", "LICENSE")
    assert len(files.find("user/name").tensors) > 0
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {*wanted, *SMALL}
    files.find("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k")
    files.find("a/b@v1.0")
    assert hub.asked == [("user/name", None), ("timm/vit_tiny_patch16_224.augreg_in21k", None), ("a/b", "v1.0")]


def test_shards_on_the_hub(tmp_path, monkeypatch):
    Hub(monkeypatch, tmp_path)
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards(tmp_path / "hub", {"a": names[0], "b": names[1]})
    put(tmp_path / "hub", "model.fp16-00001-of-00002.safetensors", "pytorch_model.bin")
    assert set(files.find("user/name").tensors) == {"a", "b"}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {*names, "model.safetensors.index.json"}


def test_a_repository_without_weights(tmp_path, monkeypatch):
    Hub(monkeypatch, tmp_path)
    put(tmp_path / "hub", "config.json")
    with pytest.raises(UserError, match=r"user/name on the hub holds no model\.safetensors"):
        files.find("user/name")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_without_a_connection_the_cache_is_used(tmp_path, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)user/name.*Without a connection"):
        files.find("user/name")
    commit = "0" * 40
    snapshot = tmp_path / "models--user--name" / "snapshots" / commit
    (tmp_path / "models--user--name" / "refs").mkdir(parents=True)
    (tmp_path / "models--user--name" / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    put(snapshot, name, "config.json")
    found = files.find("user/name")
    assert (found.config, found.path) == ({"is": "config.json"}, snapshot)
    assert len(found.tensors) > 0


@pytest.mark.parametrize("name", ["a/b/c", "nobody/..", "a--b/c"])
def test_impossible_ids(name):
    with pytest.raises(UserError, match=r"neither an existing|did not give it"):
        files.find(name)
