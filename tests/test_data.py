"""Fashion-MNIST from disk, the stand-in, and the policy between them."""

import gzip
import shutil
import subprocess

import common

import pytest
import torch

IMAGES = "train-images-idx3-ubyte"


def test_real_fashion_mnist(fashion_mnist):
    data = fashion_mnist
    assert data.train_images.shape == (60_000, 1, 28, 28) and data.train_images.dtype == torch.uint8
    assert data.test_images.shape == (10_000, 1, 28, 28)
    assert data.train_labels.bincount().tolist() == [6_000] * 10
    assert data.test_labels.bincount().tolist() == [1_000] * 10
    assert data.train_labels[:5].tolist() == [9, 0, 0, 3, 0]
    pixels = data.normalise(data.train_images)
    assert abs(pixels.mean().item()) < 1e-3 and abs(pixels.std().item() - 1) < 1e-3


@pytest.fixture
def folder(fashion_mnist, tmp_path):
    """A copy of the real files, one of them decompressed, that a test may damage."""
    for name in common.FASHION_MNIST:
        shutil.copy(f"{fashion_mnist.origin}/{name}.gz", tmp_path)
    name = "t10k-labels-idx1-ubyte"
    (tmp_path / name).write_bytes(gzip.decompress((tmp_path / f"{name}.gz").read_bytes()))
    (tmp_path / f"{name}.gz").unlink()
    return tmp_path


def test_files_may_be_plain_or_compressed_and_lie_where_torchvision_puts_them(folder, tmp_path):
    raw = tmp_path / "other" / "FashionMNIST" / "raw"
    raw.parent.mkdir(parents=True)
    assert common.read_fashion_mnist(folder).test_labels[:3].tolist() == [9, 2, 1]
    folder.joinpath("x").mkdir()
    assert common.read_fashion_mnist(folder / "x") is None
    shutil.copytree(folder, raw, ignore=shutil.ignore_patterns("other", "x"))
    assert len(common.read_fashion_mnist(tmp_path / "other").train_labels) == 60_000


@pytest.mark.parametrize("damage, said", [
    (lambda path: path.write_bytes(path.read_bytes()[:100_000]), "truncated"),
    (lambda path: path.write_bytes(gzip.compress(b"\0" * 1000)), "wrong SHA-256"),
    (lambda path: path.write_bytes(b"not gzip"), "cannot be read"),
    (lambda path: path.write_bytes(path.read_bytes()[:200_000] + b"\xff" * 4096
                                   + path.read_bytes()[204_096:]), "damaged|wrong SHA-256"),
    (lambda path: path.unlink(), f"without {IMAGES}"),
])
@pytest.mark.parametrize("policy", ["real", "auto"])
def test_damaged_files_are_refused_under_every_policy(folder, damage, said, policy):
    damage(folder / f"{IMAGES}.gz")
    with pytest.raises(common.Refused, match=said):
        common.find_data("Fashion-MNIST", policy, folder)


@pytest.fixture
def nothing_on_disk(monkeypatch, tmp_path):
    entry = common.DATASETS["Fashion-MNIST"]
    monkeypatch.setitem(common.DATASETS, "Fashion-MNIST",
                        common.replace(entry, system=tmp_path / "no package"))
    monkeypatch.setattr(common, "DEFAULT_DATA_DIR", tmp_path / "data")
    return tmp_path / "data"


def test_auto_takes_the_stand_in_and_says_so_where_real_fails(nothing_on_disk, monkeypatch, capsys):
    monkeypatch.setattr(common, "_download", lambda name, minutes: f"no network, {minutes} minutes")
    assert common.find_data("Fashion-MNIST", "auto") is None
    out = capsys.readouterr().out
    assert "SYNTHETIC STAND-IN" in out and "no network, 5 minutes" in out
    with pytest.raises(common.Refused, match=r"Three ways.*online.*apt-get install.*--data-dir"):
        common.find_data("Fashion-MNIST", "real")
    assert common.find_data("Fashion-MNIST", "synthetic") is None


def test_a_download_that_hangs_is_given_up_and_leaves_nothing(nothing_on_disk, monkeypatch):
    def hang(command, timeout, **_):
        (next(nothing_on_disk.iterdir()) / "FashionMNIST").mkdir()        # half of it
        raise subprocess.TimeoutExpired(command, timeout)
    monkeypatch.setattr(subprocess, "run", hang)
    assert common._download("Fashion-MNIST", 5) == "not there after 5 minutes"
    assert list(nothing_on_disk.iterdir()) == []


def test_a_download_is_read_from_data(nothing_on_disk, fashion_mnist, monkeypatch):
    """torchvision is replaced by a copy of the real files in its own layout."""
    real = subprocess.run

    def copy(command, **options):
        scratch = command[-1].split("'")[1]
        code = (f"import shutil; shutil.copytree({fashion_mnist.origin!r}, "
                f"{scratch + '/FashionMNIST/raw'!r})")
        return real([*command[:-1], code], **options)
    monkeypatch.setattr(subprocess, "run", copy)
    data = common.find_data("Fashion-MNIST", "real")
    assert data.origin == str(nothing_on_disk) and data.description["source"] == "real"
    assert [path.name for path in nothing_on_disk.iterdir()] == ["FashionMNIST"]


def test_torchvisions_class_is_the_one_that_is_named():
    for dataset in common.DATASETS.values():
        assert hasattr(common.torchvision.datasets, dataset.torchvision)


def test_the_stand_in_is_made_from_its_seed():
    one, same = (common.synthetic(10, (1, 28, 28), 300, 100) for _ in range(2))
    other = common.synthetic(10, (1, 28, 28), 300, 100, seed=1)
    assert torch.equal(one.train_images, same.train_images)
    assert not torch.equal(one.train_images, other.train_images)
    assert one.train_labels.unique().tolist() == list(range(10)) and len(one.test_labels) == 100
    assert one.description["source"] == "synthetic"
    pixels = one.normalise(one.train_images)
    assert abs(pixels.mean().item()) < 1e-3 and abs(pixels.std().item() - 1) < 1e-3
