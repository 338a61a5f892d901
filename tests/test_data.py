"""The data sets from disk, data of one's own, the stand-in, the policy between them, and augmentation."""

import gzip
import hashlib
import os
import pickle
import struct
import tarfile
from dataclasses import replace

import common
from study import folders
from common import Refused

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional as F
from torchvision.transforms import functional as tv

IMAGES = "train-images-idx3-ubyte.gz"
PLACES = {name: (common.DATA_DIR, dataset.system) for name, dataset in common.DATASETS.items()}     # outside the tests


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    """data/ is an absent folder, and no system package has Fashion-MNIST."""
    monkeypatch.setattr(common, "DATA_DIR", tmp_path / "data")
    monkeypatch.setitem(common.DATASETS, "Fashion-MNIST", replace(common.DATASETS["Fashion-MNIST"], system=None))
    return tmp_path / "data"


@pytest.mark.parametrize("name, labels, test_labels", [
    ("Fashion-MNIST", [9, 0, 0, 3, 0], [9, 2, 1]), ("CIFAR-100", [19, 29, 0, 11, 1], [49, 33, 72])])
def test_the_real_data(name, labels, test_labels):
    """Where it is on disk. In CI Fashion-MNIST must be."""
    dataset = common.DATASETS[name]
    data = next(filter(None, (dataset.read(place) for place in PLACES[name] if place)), None)
    if data is None:
        needed = os.environ.get("CI") and name == "Fashion-MNIST"
        (pytest.fail if needed else pytest.skip)(f"{name} is not on disk: {dataset.ways}")
    assert data.train_images.shape == (dataset.train, *dataset.shape) and data.train_images.dtype == torch.uint8
    assert data.train_labels.bincount().tolist() == [dataset.train // dataset.classes] * dataset.classes
    assert data.train_labels[:5].tolist() == labels and data.test_labels[:3].tolist() == test_labels
    assert (common.pixel_statistics(data.train_images)[0] - data.mean).abs().max() < 1e-4


# --- Fashion-MNIST -------------------------------------------------------------------------------


@pytest.fixture
def fashion(monkeypatch, tmp_path):
    """A folder with small files in Fashion-MNIST's format, which have the expected SHA-256."""
    (tmp_path / "files").mkdir()
    for part, n in (("train", 300), ("t10k", 20)):
        images = struct.pack(">IIII", 0x803, n, 28, 28) + np.random.default_rng(n).bytes(n * 784)
        labels = struct.pack(">II", 0x801, n) + bytes(range(10)) * (n // 10)
        for name, content in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
            (tmp_path / "files" / name).write_bytes(gzip.compress(content))
            monkeypatch.setitem(common.FASHION_MNIST, name, hashlib.sha256(content).hexdigest())
    return tmp_path / "files"


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_where_it_lies(fashion, data_dir, tmp_path, place):
    """In the form of the data set's authors and Debian, or as torchvision leaves it; nothing is written."""
    folder = tmp_path / "folder"
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    fashion.rename(folder / place)
    data = folders.find_data("Fashion-MNIST", "real", folder)
    assert data.train_images.numpy().tobytes() == gzip.decompress((folder / place / IMAGES).read_bytes())[16:]
    assert data.test_labels.tolist() == list(range(10)) * 2 and data.description["source"] == "real"
    assert data.origin == "--data-dir" and len([path for path in folder.rglob("*") if path.is_file()]) == 4
    folder.rename(data_dir)
    assert folders.find_data("Fashion-MNIST", "auto").origin == "data/"


# --- CIFAR ---------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small CIFAR-100 as torchvision's archive, its folder, and in the binary form, each with its check sums.

    Returns {form: the folder to read} and {part: (pixels (n, 3072), labels)}.
    """
    dataset, content = torchvision.datasets.CIFAR100, {}
    roots = {form: tmp_path / form for form in ("archive", "folder", "binary")}
    folder, binary = roots["folder"] / dataset.base_folder, roots["binary"] / "cifar-100-binary"
    archive = roots["archive"] / dataset.filename
    for place in (folder, binary, archive.parent):
        place.mkdir(parents=True)
    for name, n in (("train", 40), ("test", 20)):
        pixels = np.random.default_rng(n).integers(256, size=(n, 3072), dtype=np.uint8)
        labels = (99 - 7 * np.arange(n)) % 100
        content[name] = pixels, labels.tolist()
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": labels.tolist()}))
        records = np.hstack([labels[:, None] // 5, labels[:, None], pixels]).astype(np.uint8).tobytes()
        (binary / f"{name}.bin").write_bytes(records)           # coarse label, fine label, image
        monkeypatch.setitem(common.CIFAR_100_BINARY, f"{name}.bin", hashlib.sha256(records).hexdigest())
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]}))
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, dataset.base_folder)
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (*folder.iterdir(), archive)}
    for key, value in (("tgz_md5", md5[archive.name]), ("train_list", [["train", md5["train"]]]),
                       ("test_list", [["test", md5["test"]]]), ("meta", {**dataset.meta, "md5": md5["meta"]})):
        monkeypatch.setattr(dataset, key, value)
    return roots, content


@pytest.mark.parametrize("form", ["archive", "folder", "binary"])
def test_cifar_100_is_the_same_in_every_form(cifar, form):
    data = folders.find_data("CIFAR-100", "real", cifar[0][form])
    for images, labels, (pixels, fine) in ((data.train_images, data.train_labels, cifar[1]["train"]),
                                           (data.test_images, data.test_labels, cifar[1]["test"])):
        assert labels.tolist() == fine and images.shape[1:] == (3, 32, 32) and images.is_contiguous()
        assert (images.flatten(1).numpy() == pixels).all()      # 1024 red values, then green, then blue, row by row
    assert data.classes == 100 and data.description == common.DATASETS["CIFAR-100"].description


ZIPPED = gzip.compress(b"\0" * 1000)


@pytest.mark.parametrize("form, name, content", [
    ("fashion", IMAGES, ZIPPED[:-9]), ("fashion", IMAGES, ZIPPED[:12] + b"\xff" * 40), ("fashion", IMAGES, b"not gzip"),
    ("fashion", IMAGES, ZIPPED), ("fashion", IMAGES, None), ("folder", "cifar-100-python/test", None),
    ("folder", "cifar-100-python/train", b"\x80"), ("archive", "cifar-100-python.tar.gz", b"\x1f\x8b"),
    ("binary", "cifar-100-binary/train.bin", b""), ("binary", "cifar-100-binary/test.bin", None)])
def test_damaged_files_are_refused_in_one_line(fashion, cifar, form, name, content):
    dataset, folder = ("Fashion-MNIST", fashion) if form == "fashion" else ("CIFAR-100", cifar[0][form])
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(Refused, match=rf"^[^\n]*(incomplete|missing) or damaged [^\n]*To get {dataset}: [^\n]*$"):
        folders.find_data(dataset, "auto", folder)


def test_the_first_classes_of_a_data_set(cifar):
    settings = {"classes": 30, "train": None, "validation": 0, "test": None, "batch": 2}
    whole = folders.find_data("CIFAR-100", "real", cifar[0]["binary"])
    data = folders.cut_data(whole, "CIFAR-100", "real", settings)
    kept = [i for i, label in enumerate(whole.train_labels.tolist()) if label < 30]
    assert data.train_labels.tolist() == whole.train_labels[kept].tolist() and len(kept) > 2
    assert torch.equal(data.train_images, whole.train_images[kept]) and torch.equal(data.mean, whole.mean)
    assert data.classes == 30 and data.test_labels.max() < 30 <= whole.test_labels.max()
    more = folders.cut_data(whole, "CIFAR-100", "real", settings | {"train": 5, "validation": 2, "test": "unused"})
    assert torch.equal(more.train_images, data.train_images[:7])        # the same images for every trial
    assert torch.equal(more.test_images, torch.cat([data.test_images, data.train_images[7:]]))
    assert torch.equal(more.test_labels, torch.cat([data.test_labels, data.train_labels[7:]]))


# --- Data of one's own ---------------------------------------------------------------------------


def own(**changes):
    """A good data set of two classes, with changes."""
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    parts = {"x": images[:8], "y": torch.arange(8) % 2, "test_x": images[8:], "test_y": torch.arange(4) % 2} | changes
    return common.Dataset({"name": "own", "source": "real"}, lambda folder: [*parts.values()], 2, (3, 8, 8), 8, 4, "")


@pytest.mark.parametrize("part, change, said", [
    ("x", lambda x: x / 255, r"torch\.float32 .*expected torch\.uint8.* 0 to 255"), ("y", lambda y: y.int(), "int32"),
    ("x", lambda x: x[:, 0], r"\(8, 8, 8\)"), ("test_x", lambda x: x[..., :7], r"\(4, 3, 8, 7\).*\(n, 3, 8, 8\)"),
    ("x", lambda x: x.movedim(1, 3), r"\(8, 8, 8, 3\).*channels first"), ("y", lambda y: y * 0, "from 0 to 0"),
    ("y", lambda y: F.one_hot(y), r"\(8, 2\)"), ("test_y", lambda y: y[:3], "one for each image"),
    ("test_y", lambda y: y - 1, "run from -1 to 0"), ("y", lambda y: y + 1, "from 1 to 2: expected 0 to 1"),
    ("y", lambda y: y * 0 + 1, r"labels \[0\] of test images"),
    ("x", lambda x: x * torch.tensor([1, 0, 1], dtype=torch.uint8).view(3, 1, 1), r"channels \[1\] have one value")])
def test_what_cannot_be_trained_on_is_refused_in_one_line(tmp_path, part, change, said):
    good = dict(zip(("x", "y", "test_x", "test_y"), own().reader(tmp_path), strict=True))
    with pytest.raises(Refused, match=rf"^own: [^\n]*{said}[^\n]*$"):
        own(**{part: change(good[part])}).read(tmp_path)


def test_own_data_has_a_checksum_of_its_content(tmp_path):
    one, same, other = (own(**changes).read(tmp_path).description["sha256"]
                        for changes in ({}, {}, {"test_y": torch.tensor([1, 0, 0, 1])}))
    assert one == same != other


def test_auto_takes_the_stand_in_and_says_so_where_real_fails(monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError("no route to host")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    assert folders.find_data("Fashion-MNIST", "auto") is None
    out = capsys.readouterr().out
    assert "SYNTHETIC STAND-IN" in out and "no route to host" in out
    with pytest.raises(Refused, match=r"^[^\n]*no route to host[^\n]*apt-get install[^\n]*--data-dir[^\n]*$"):
        folders.find_data("Fashion-MNIST", "real")


def test_every_crop_flip_and_normalised_image_equals_torchvisions():
    data = common.synthetic(10, (3, 32, 32), 5, 5)
    moves = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    padded, rows = F.pad(data.train_images, [4] * 4), torch.arange(len(moves)) % 5
    out = common.crop_and_flip(padded, rows, moves)
    for mine, row, (top, left, flip) in zip(out, rows, moves.tolist(), strict=True):
        image = tv.hflip(data.train_images[row]) if flip else data.train_images[row]
        assert torch.equal(mine, tv.crop(tv.pad(image, 4), top, left, 32, 32))
    own_moves = common.crop_and_flip(padded, rows.view(81, 2), moves.view(81, 2, 3))        # (N, M)
    assert torch.equal(own_moves.flatten(0, 1), out)
    theirs = tv.normalize(tv.convert_image_dtype(out), data.mean.flatten(), data.std.flatten())
    assert torch.equal(data.normalise(out), theirs)
