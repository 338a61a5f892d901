"""The data sets from disk, their stand-in, the policy between them, and augmentation."""

import gzip
import hashlib
import pickle
import struct
import subprocess
import tarfile
from dataclasses import replace

import common
import folders
from common import Refused

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as tv

IMAGES = "train-images-idx3-ubyte"


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    """data/ is an absent folder, and no system package has Fashion-MNIST."""
    entry = common.DATASETS["Fashion-MNIST"]
    monkeypatch.setattr(common, "DATA_DIR", tmp_path / "data")
    monkeypatch.setitem(common.DATASETS, "Fashion-MNIST", replace(entry, system=tmp_path / "no package"))
    return tmp_path / "data"


# --- Fashion-MNIST -------------------------------------------------------------------------------


def test_real_fashion_mnist(fashion_mnist):
    data = fashion_mnist
    assert data.train_images.shape == (60_000, 1, 28, 28) and data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [6_000] * 10
    assert data.test_labels.bincount().tolist() == [1_000] * 10
    assert data.train_labels[:5].tolist() == [9, 0, 0, 3, 0] and data.test_labels[:3].tolist() == [9, 2, 1]
    pixels = data.normalise(data.train_images)
    assert abs(pixels.mean().item()) < 1e-3 and abs(pixels.std().item() - 1) < 1e-3


@pytest.fixture
def files(monkeypatch):
    """{name: content} of small files in Fashion-MNIST's format, which have the expected SHA-256."""
    g, content = np.random.default_rng(0), {}
    for part, n in (("train", 300), ("t10k", 20)):
        content[f"{part}-images-idx3-ubyte"] = struct.pack(">IIII", 0x803, n, 28, 28) + g.bytes(n * 28 * 28)
        content[f"{part}-labels-idx1-ubyte"] = struct.pack(">II", 0x801, n) + bytes(i % 10 for i in range(n))
    monkeypatch.setattr(common, "FASHION_MNIST", {n: hashlib.sha256(c).hexdigest() for n, c in content.items()})
    return content


@pytest.fixture
def packed(files, tmp_path):
    """A folder with the four files compressed, as the data set's authors and Debian have them."""
    folder = tmp_path / "packed"
    folder.mkdir()
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def test_compressed_files_are_unpacked_once_into_data(files, packed, data_dir, monkeypatch):
    data = folders.find_data("Fashion-MNIST", "real", packed)
    assert data.train_images.flatten().numpy().tobytes() == files[IMAGES][16:]
    assert data.test_labels.tolist() == list(range(10)) * 2 and data.description["source"] == "real"
    raw = data_dir / "FashionMNIST" / "raw"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == files
    assert {path.stat().st_mode & 0o777 for path in raw.iterdir()} == {0o644}
    monkeypatch.setattr(gzip, "decompress", lambda content: pytest.fail("unpacked twice"))
    for folder in (packed, None):
        assert torch.equal(folders.find_data("Fashion-MNIST", "real", folder).train_images, data.train_images)


@pytest.mark.parametrize("content, said", [
    (gzip.compress(b"\0" * 1000)[:-9], r"-ubyte\.gz cannot be unpacked \(.*\): remove it; to get.*apt-get"),
    (b"not gzip", r"-ubyte\.gz cannot be unpacked"),
    (gzip.compress(b"\0" * 1000), rf"{IMAGES} in .*/{IMAGES}\.gz is damaged or another file .*: remove .*\.gz; to get"),
    (None, rf"has no {IMAGES}\.gz \(expected four files \*-ubyte\.gz\): add it")],
    ids=["truncated", "not gzip", "another data set's", "absent"])
@pytest.mark.parametrize("policy", ["real", "auto"])
def test_damaged_files_are_refused_under_every_policy(packed, content, said, policy):
    path = packed / f"{IMAGES}.gz"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(Refused, match=said):
        folders.find_data("Fashion-MNIST", policy, packed)


def test_a_data_folder_that_cannot_be_written_is_no_damage(packed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(common, "DATA_DIR", tmp_path / "file" / "data")
    with pytest.raises(Refused, match=r"raw cannot be unpacked \(.*Not a directory: .*\): make room, or allow access$"):
        folders.find_data("Fashion-MNIST", "real", packed)


def test_an_archive_that_cannot_be_read_is_named(packed, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(Refused, match=rf"Permission denied: '{packed}/.*-ubyte\.gz'\): make room, or allow access$"):
        folders.find_data("Fashion-MNIST", "real", packed)


# --- CIFAR ---------------------------------------------------------------------------------------


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A small archive in CIFAR-100's format, its files, their content; and torchvision's class with their MD5."""
    g, dataset = np.random.default_rng(0), torchvision.datasets.CIFAR100
    source, archive = tmp_path / "source" / dataset.base_folder, tmp_path / "archive" / dataset.filename
    source.mkdir(parents=True)
    archive.parent.mkdir()
    content = {name: {"data": g.integers(256, size=(n, 3072), dtype=np.uint8),
                      "fine_labels": g.integers(100, size=n).tolist()} for name, n in (("train", 40), ("test", 20))}
    content["meta"] = {"fine_label_names": [f"class {i}" for i in range(100)]}
    for name, values in content.items():
        (source / name).write_bytes(pickle.dumps(values))
    with tarfile.open(archive, "w:gz") as file:
        file.add(source, dataset.base_folder)
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (*source.iterdir(), archive)}
    for key, value in (("tgz_md5", md5[archive.name]), ("train_list", [["train", md5["train"]]]),
                       ("test_list", [["test", md5["test"]]]), ("meta", {**dataset.meta, "md5": md5["meta"]})):
        monkeypatch.setattr(dataset, key, value)
    return archive, source, content


@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar_100_is_read_as_torchvision_reads_it(cifar100, data_dir, monkeypatch, unpacked):
    archive, source, content = cifar100
    data = folders.find_data("CIFAR-100", "real", (source if unpacked else archive).parent)
    assert data.classes == 100 and data.description["source"] == "real"
    for name, images, labels in (("train", data.train_images, data.train_labels),
                                 ("test", data.test_images, data.test_labels)):
        assert labels.tolist() == content[name]["fine_labels"]
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        # A row of the file is 1024 red values, then green, then blue, each row by row.
        assert (images.flatten(1).numpy() == content[name]["data"]).all()
    assert data.mean.flatten().tolist() == pytest.approx([0.5071, 0.4865, 0.4409])
    assert data.std.flatten().tolist() == pytest.approx([0.2673, 0.2564, 0.2762])
    if not unpacked:                                            # the archive is unpacked into data/, once
        assert list(archive.parent.iterdir()) == [archive]
        assert [path.name for path in data_dir.iterdir()] == ["cifar-100-python"]
        monkeypatch.setattr(torchvision.datasets.utils, "extract_archive", lambda *_: pytest.fail("unpacked twice"))
        assert folders.find_data("CIFAR-100", "real", archive.parent).origin == str(data_dir / "cifar-100-python")


@pytest.mark.parametrize("name, content, said", [
    ("test", None, "incomplete or damaged"), ("train", b"\x80", "incomplete or damaged"),
    ("train", b"cos\nsystem\n(S'touch executed'\ntR.", "incomplete or damaged"),
    ("cifar-100-python.tar.gz", b"\x1f\x8b", r"cifar-100-python\.tar\.gz is damaged .*expected MD5 \w{32}\)")],
    ids=["absent", "truncated", "malicious", "a truncated archive"])
@pytest.mark.parametrize("policy", ["real", "auto"])
def test_damaged_files_of_cifar_are_refused_and_never_unpickled(cifar100, tmp_path, monkeypatch, name, content, said,
                                                                policy):
    archive, source, _ = cifar100
    monkeypatch.chdir(tmp_path)
    path = archive if name == archive.name else source / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(Refused, match=said):
        folders.find_data("CIFAR-100", policy, archive.parent if path == archive else source.parent)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def binary(cifar100, tmp_path, monkeypatch):
    """The content of `cifar100` in the binary form: a folder with cifar-100-binary, whose files have the expected
    SHA-256."""
    place, sha256 = tmp_path / "binary" / "cifar-100-binary", {}
    place.mkdir(parents=True)
    for name in ("train", "test"):
        pixels, fine = cifar100[2][name]["data"], np.array(cifar100[2][name]["fine_labels"], np.uint8)[:, None]
        (place / f"{name}.bin").write_bytes(np.hstack([fine // 5, fine, pixels]).tobytes())     # coarse, fine, image
        sha256[f"{name}.bin"] = hashlib.sha256((place / f"{name}.bin").read_bytes()).hexdigest()
    monkeypatch.setattr(common, "CIFAR_100_BINARY", sha256)
    return place.parent


@pytest.mark.parametrize("form", ["", "gz", "xz"])
def test_both_forms_of_cifar_100_are_the_same_data(cifar100, binary, data_dir, tmp_path, monkeypatch, form):
    theirs = folders.find_data("CIFAR-100", "real", cifar100[0].parent)
    folder = tmp_path / "form" if form else binary
    if form:                                                    # unpacked into data/, once
        folder.mkdir()
        with tarfile.open(folder / f"cifar-100-binary.tar.{form}", f"w:{form}") as archive:
            archive.add(binary / "cifar-100-binary", "cifar-100-binary")
    mine = folders.find_data("CIFAR-100", "real", folder)
    for key in ("train_images", "train_labels", "test_images", "test_labels", "mean", "std"):
        one, other = getattr(mine, key), getattr(theirs, key)
        assert torch.equal(one, other) and one.dtype == other.dtype and one.is_contiguous(), key
    assert mine.description == theirs.description and mine.classes == 100
    assert mine.origin == str((data_dir if form else binary) / "cifar-100-binary")
    if form:
        monkeypatch.setattr(tarfile, "open", lambda *_: pytest.fail("unpacked twice"))
        folders.find_data("CIFAR-100", "real", folder)
    source = cifar100[1]
    (binary / source.name).symlink_to(source)                   # both are there: the origin says which was taken
    assert folders.find_data("CIFAR-100", "real", binary).origin == str(binary / "cifar-100-python")


@pytest.mark.parametrize("damage, said", [
    ({"train.bin": lambda content: content["train.bin"][:-1]}, "train"),
    ({"train.bin": lambda content: content["test.bin"], "test.bin": lambda content: content["train.bin"]}, "train"),
    ({"test.bin": lambda content: b""}, "test"), ({"train.bin": lambda content: b"another file"}, "train")],
    ids=["truncated", "swapped", "empty", "foreign"])
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_binary_files_are_refused(binary, data_dir, tmp_path, damage, said, packed):
    place, expected = binary / "cifar-100-binary", common.CIFAR_100_BINARY[f"{said}.bin"]
    content = {path.name: path.read_bytes() for path in place.iterdir()}
    for name, damaged in damage.items():
        (place / name).write_bytes(damaged(content))
    if packed:
        folder, named = tmp_path / "packed", "cifar-100-binary.tar.xz"
        folder.mkdir()
        with tarfile.open(folder / named, "w:xz") as archive:
            archive.add(place, place.name)
    else:
        folder, named = binary, "cifar-100-binary"
    with pytest.raises(Refused, match=rf"{said}\.bin in .*{named} is damaged or another file \(expected SHA-256 "
                                      rf"{expected}\): remove .*{named}; to get CIFAR-100 again, put .*cifar\.html"):
        folders.find_data("CIFAR-100", "auto", folder)
    assert not data_dir.exists() or not list(data_dir.iterdir())        # no damaged file stays in data/


def test_an_absent_binary_file_is_named(binary):
    (binary / "cifar-100-binary" / "test.bin").unlink()
    with pytest.raises(Refused, match=r"cifar-100-binary has no test\.bin \(expected train\.bin, test\.bin\): remove"):
        folders.find_data("CIFAR-100", "auto", binary)


def test_an_archive_that_is_none_is_named_in_one_line(tmp_path):
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(b"a page that says 404")
    with pytest.raises(Refused, match=r"cifar-100-binary\.tar\.gz cannot be unpacked \(.*\): remove it") as refused:
        folders.find_data("CIFAR-100", "auto", tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("member", ["../outside", "/tmp/outside", "another folder/train.bin",
                                    "cifar-100-binary/../outside", "cifar-100-binary/sub/train.bin"])
def test_nothing_of_an_archive_but_its_two_files_is_unpacked(tmp_path, data_dir, member):
    (tmp_path / "file").write_text("x")
    with tarfile.open(tmp_path / "cifar-100-binary.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "file", member)
        archive.add(tmp_path / "file", "cifar-100-binary/test.bin")
    with pytest.raises(Refused, match=r"cifar-100-binary\.tar\.gz has no train\.bin"):
        folders.find_data("CIFAR-100", "real", tmp_path)
    assert not list(tmp_path.rglob("outside*")) and not list(data_dir.iterdir())


def test_real_cifar_100():
    """Where data/ holds it, in either form."""
    data = common.DATASETS["CIFAR-100"].read(folders.HERE / "data")
    if data is None:
        pytest.skip("data/ does not hold CIFAR-100")
    assert data.train_images.shape == (50_000, 3, 32, 32) and data.test_images.shape == (10_000, 3, 32, 32)
    assert data.train_labels.bincount().tolist() == [500] * 100 and data.test_labels.bincount().tolist() == [100] * 100
    assert data.train_labels[:5].tolist() == [19, 29, 0, 11, 1]
    for mine, theirs in zip(common.pixel_statistics(data.train_images), (data.mean, data.std), strict=True):
        assert (mine - theirs).abs().max() < 1e-4
    for images in (data.train_images[:2000], data.test_images[:2000]):
        theirs = tv.normalize(tv.convert_image_dtype(images), data.mean.flatten(), data.std.flatten())
        assert torch.equal(data.normalise(images), theirs)
    moves = common.draw_moves((2000,), torch.Generator().manual_seed(0))
    padded, crops = F.pad(data.train_images[:2000], [4] * 4), []
    for image, (top, left, flip) in zip(padded, moves.tolist(), strict=True):
        crops.append(tv.crop(tv.hflip(image) if flip else image, top, left, 32, 32))
    assert torch.equal(common.crop_and_flip(padded, torch.arange(2000), moves), torch.stack(crops))


def test_the_first_classes_of_a_data_set(cifar100, monkeypatch):
    folder, block = cifar100[0].parent, {"train": None, "validation": 0, "test": None, "batch": 2}
    whole = folders.find_data("CIFAR-100", "real", folder)
    data = folders.load_data("CIFAR-100", "real", block | {"classes": 30}, folder)
    assert data.classes == 30 and data.shape == (3, 32, 32)
    for images, labels, all_images, all_labels in (
            (data.train_images, data.train_labels, whole.train_images, whole.train_labels),
            (data.test_images, data.test_labels, whole.test_images, whole.test_labels)):
        kept = [i for i, label in enumerate(all_labels.tolist()) if label < 30]
        assert labels.tolist() == all_labels[kept].tolist() and torch.equal(images, all_images[kept]) and len(kept) > 2
    assert torch.equal(data.mean, whole.mean)
    for all_of_them in ({"classes": None}, {}):                 # {}: the settings of a run of an earlier version
        assert folders.load_data("CIFAR-100", "real", block | all_of_them, folder).classes == 100
    monkeypatch.setitem(common.DATASETS, "CIFAR-100", replace(common.DATASETS["CIFAR-100"], classes=99))
    with pytest.raises(Refused, match=r"100 classes were read, .* CIFAR-100 has 99: mend the entry"):
        folders.load_data("CIFAR-100", "real", block | {"classes": None}, folder)
    stand_in = folders.load_data("CIFAR-100", "synthetic", block | {"classes": 7})
    assert stand_in.classes == 7 and stand_in.train_labels.unique().tolist() == list(range(7))


def test_the_data_sets_are_those_of_torchvision():
    """torchvision's classes download them; its checksum is that of the archive that run.json names."""
    for dataset in common.DATASETS.values():
        theirs = getattr(torchvision.datasets, dataset.torchvision)
        assert len(getattr(theirs, "classes", [0] * dataset.classes)) == dataset.classes
        if "md5" in dataset.description:
            assert dataset.description["md5"] == theirs.tgz_md5 and theirs.filename in dataset.ways


# --- Downloads and the stand-in ------------------------------------------------------------------


def test_auto_takes_the_stand_in_and_says_so_where_real_fails(monkeypatch, capsys):
    monkeypatch.setattr(folders, "download", lambda name, minutes: f"no network, {minutes} minutes")
    assert folders.find_data("Fashion-MNIST", "auto") is None
    out = capsys.readouterr().out
    assert "SYNTHETIC STAND-IN" in out and "no network, 5 minutes" in out
    with pytest.raises(Refused, match=r"no network, None.*To get it, be online.*apt-get install.*--data-dir"):
        folders.find_data("Fashion-MNIST", "real")
    assert folders.find_data("Fashion-MNIST", "synthetic") is None


def test_a_download_that_hangs_is_given_up_and_leaves_nothing(data_dir, monkeypatch):
    def hang(command, timeout, **_):
        assert timeout == 300
        (next(data_dir.iterdir()) / "FashionMNIST").mkdir()                 # half of it
        raise subprocess.TimeoutExpired(command, timeout)
    monkeypatch.setattr(subprocess, "run", hang)
    assert folders.download("Fashion-MNIST", 5) == "not finished after 5 minutes"
    assert list(data_dir.iterdir()) == []


def test_a_download_is_read_from_data(files, packed, data_dir, monkeypatch):
    """The process of a download runs; in it, torchvision is replaced by a copy of files, or fails."""
    run = subprocess.run

    def replaced(code):
        monkeypatch.setattr(subprocess, "run", lambda command, **options: run([*command[:-1], code(
            command[-1].split("'")[1])], **options))
    replaced(lambda scratch: "import sys; print('Traceback', file=sys.stderr); sys.exit('OSError: no route to host')")
    with pytest.raises(Refused, match=r"download failed \(OSError: no route to host\)"):
        folders.find_data("Fashion-MNIST", "real")
    assert list(data_dir.iterdir()) == []

    common.read_fashion_mnist(packed)
    done = (data_dir / "FashionMNIST").rename(data_dir.parent / "done")
    replaced(lambda scratch: f"import shutil; shutil.copytree({str(done)!r}, {scratch + '/FashionMNIST'!r})")
    data = folders.find_data("Fashion-MNIST", "real")
    assert data.origin == str(data_dir) and data.description["source"] == "real"
    assert [path.name for path in data_dir.iterdir()] == ["FashionMNIST"]


def test_the_stand_in_is_made_from_its_seed():
    one, same = (common.synthetic(10, (1, 28, 28), 300, 100) for _ in range(2))
    other = common.synthetic(10, (1, 28, 28), 300, 100, seed=1)
    assert torch.equal(one.train_images, same.train_images) and not torch.equal(one.train_images, other.train_images)
    assert one.train_labels.unique().tolist() == list(range(10)) and len(one.test_labels) == 100
    assert one.description["source"] == "synthetic"
    pixels = one.normalise(one.train_images)
    assert abs(pixels.mean().item()) < 1e-5 and abs(pixels.std().item() - 1) < 1e-4


def test_capacity_matters_on_the_stand_in():
    data = common.synthetic(100, (3, 32, 32), 6000, 1000)
    assert data.train_labels.unique().numel() == 100
    (x, y), (test, targets) = ((data.normalise(images).flatten(1), labels) for images, labels in (
        (data.train_images, data.train_labels), (data.test_images, data.test_labels)))
    errors = []
    for hidden in (0, 32, 256):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3072, hidden), nn.ReLU(), nn.Linear(hidden, 100)) if hidden else nn.Linear(
            3072, 100)
        sgd = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        for _ in range(6):
            for rows in torch.randperm(6000).split(100):
                sgd.zero_grad()
                F.cross_entropy(network(x[rows]), y[rows]).backward()
                sgd.step()
        errors.append((network(test).argmax(1) != targets).double().mean().item())
    assert errors[0] > errors[1] + 0.05 > errors[2] + 0.2, errors


# --- Augmentation --------------------------------------------------------------------------------


def test_every_crop_and_flip_equals_torchvisions():
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = F.pad(images, [4] * 4)
    moves = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    rows = torch.arange(len(moves)) % 5
    out = common.crop_and_flip(padded, rows, moves)
    assert out.shape == (162, 3, 32, 32) and out.dtype == torch.uint8
    for mine, row, (top, left, flip) in zip(out, rows, moves.tolist(), strict=True):
        image = tv.hflip(images[row]) if flip else images[row]
        assert torch.equal(mine, tv.crop(tv.pad(image, 4), top, left, 32, 32))
    own = common.crop_and_flip(padded, rows.view(81, 2), moves.view(81, 2, 3))      # (N, M)
    assert torch.equal(own.flatten(0, 1), out)


def test_moves_are_uniform_and_each_images_own():
    moves = common.draw_moves((20_000,), torch.Generator().manual_seed(0))
    for column, values in ((0, 9), (1, 9), (2, 2)):
        counts = moves[:, column].bincount()
        assert len(counts) == values and (counts / 20_000 - 1 / values).abs().max() < 0.01
    assert common.draw_moves((50, 4), torch.Generator()).shape == (50, 4, 3)
