import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tokjax.errors import UserError
from tokjax.pretrained import files

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


def test_bfloat16(tmp_path):
    save_file({"a": TENSORS["a"].astype(ml_dtypes.bfloat16)}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(files.find(tmp_path).tensors["a"].astype(np.float32), TENSORS["a"])


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


@pytest.mark.parametrize("damage", ["cut data", "cut header", "empty", "pickle"])
def test_damaged_files_are_named(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(
        {"cut data": whole[:-5], "cut header": whole[:20], "empty": b"", "pickle": b"PK\x03\x04" * 30}[damage]
    )
    with pytest.raises(UserError, match=r"model\.safetensors is not a whole safetensors file"):
        files.find(tmp_path)


def test_unreadable_json_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    for content in ('{"model_type": ', "[1]", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=r"config\.json"):
            files.find(tmp_path)


def test_no_or_several_weights(tmp_path):
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        files.find(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        files.find(tmp_path)
    save_file(TENSORS, tmp_path / "one.safetensors")
    save_file(TENSORS, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"one\.safetensors, two\.safetensors"):
        files.find(tmp_path)


def test_paths_that_do_not_exist(tmp_path):
    with pytest.raises(UserError, match="neither an existing file or folder nor an id"):
        files.find(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither an existing file or folder nor an id"):
        files.find("model.safetensors")


def test_the_hub_is_asked_for_the_files_needed(tmp_path, monkeypatch):
    save_file(TENSORS, tmp_path / "model.safetensors")
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append((repo, revision))
        assert set(allow_patterns) >= {"config.json", "preprocessor_config.json", "model.safetensors"}
        assert not any(pattern.endswith((".bin", ".msgpack", ".h5")) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", download)
    for name in ("facebook/deit-tiny-patch16-224", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", "a/b@v1.0"):
        assert set(files.find(name).tensors) == {"a", "b"}
    assert asked == [
        ("facebook/deit-tiny-patch16-224", None),
        ("timm/vit_tiny_patch16_224.augreg_in21k", None),
        ("a/b", "v1.0"),
    ]


def test_without_a_connection_the_error_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"(?s)nobody/no-such-model.*Without a connection"):
        files.find("nobody/no-such-model")
