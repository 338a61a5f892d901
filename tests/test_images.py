"""CIFAR's archives, folders of images, the 100-class stand-in, and augmentation on the device."""

import hashlib
import pickle
import tarfile

import common
import train_densenet_cifar

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import functional as tv

# --- CIFAR -------------------------------------------------------------------------------------


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A small archive in CIFAR-100's format, and torchvision's class with its MD5 sums."""
    g = np.random.default_rng(0)
    dataset = torchvision.datasets.CIFAR100
    source = tmp_path / "source" / dataset.base_folder
    source.mkdir(parents=True)
    parts = {name: {"data": g.integers(256, size=(n, 3072), dtype=np.uint8),
                    "fine_labels": g.integers(100, size=n).tolist(),
                    "coarse_labels": [0] * n}
             for name, n in (("train", 40), ("test", 20))}
    meta = {"fine_label_names": [f"class {i}" for i in range(100)], "coarse_label_names": []}
    for name, content in (*parts.items(), ("meta", meta)):
        (source / name).write_bytes(pickle.dumps(content))

    def md5(path):
        return hashlib.md5(path.read_bytes()).hexdigest()
    folder = tmp_path / "archive"
    folder.mkdir()
    with tarfile.open(folder / dataset.filename, "w:gz") as archive:
        archive.add(source, dataset.base_folder)
    monkeypatch.setattr(dataset, "tgz_md5", md5(folder / dataset.filename))
    monkeypatch.setattr(dataset, "train_list", [["train", md5(source / "train")]])
    monkeypatch.setattr(dataset, "test_list", [["test", md5(source / "test")]])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": md5(source / "meta")})
    return folder, source, parts


@pytest.mark.parametrize("unpacked", [False, True])
def test_cifar_100_is_read_as_torchvision_reads_it(cifar100, unpacked):
    folder, source, parts = cifar100
    data = common.find_data("CIFAR-100", "real", source.parent if unpacked else folder)
    assert data.classes == 100 and data.description["source"] == "real"
    for name, images, labels in (("train", data.train_images, data.train_labels),
                                 ("test", data.test_images, data.test_labels)):
        assert labels.tolist() == parts[name]["fine_labels"]
        assert images.dtype == torch.uint8 and images.shape[1:] == (3, 32, 32)
        # A row of the file is 1024 red values, then green, then blue, each row by row.
        assert (images.flatten(1).numpy() == parts[name]["data"]).all()
    assert data.mean.flatten().tolist() == pytest.approx([0.5071, 0.4865, 0.4409])
    assert data.std.flatten().tolist() == pytest.approx([0.2673, 0.2564, 0.2762])
    if not unpacked:
        assert [path.name for path in folder.iterdir()] == ["cifar-100-python.tar.gz"]


@pytest.mark.parametrize("policy", ["real", "auto"])
def test_a_truncated_archive_is_refused_under_every_policy(cifar100, policy):
    folder, _, _ = cifar100
    path = folder / "cifar-100-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(common.Refused, match=r"cifar-100-python.tar.gz has the wrong MD5"):
        common.find_data("CIFAR-100", policy, folder)


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "test").unlink(),
    lambda folder: (folder / "train").write_bytes((folder / "train").read_bytes()[:-1]),
    lambda folder: (folder / "train").write_bytes(b"cos\nsystem\n(S'touch executed'\ntR."),
])
def test_damaged_files_are_refused_and_never_unpickled(cifar100, damage, tmp_path, monkeypatch):
    _, source, _ = cifar100
    monkeypatch.chdir(tmp_path)
    damage(source)
    with pytest.raises(common.Refused, match="incomplete or damaged"):
        common.find_data("CIFAR-100", "real", source.parent)
    assert not (tmp_path / "executed").exists()


def test_cifar_10_is_known_by_torchvisions_own_checksum():
    for name, dataset in (("CIFAR-10", torchvision.datasets.CIFAR10),
                          ("CIFAR-100", torchvision.datasets.CIFAR100)):
        assert common.DATASETS[name].description["md5"] == dataset.tgz_md5
        assert dataset.filename in common.DATASETS[name].ways


# --- Folders of images -------------------------------------------------------------------------

@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """A folder of PNG and JPEG images, 12 by 10, in two classes; data/ is elsewhere."""
    monkeypatch.setattr(common, "DEFAULT_DATA_DIR", tmp_path / "data")
    folder, g = tmp_path / "photographs", np.random.default_rng(0)
    for part, n in (("train", 9), ("test", 4)):
        for level, name in ((40, "cat"), (200, "dog")):
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = g.integers(level - 30, level + 30, size=(10, 12, 3), dtype=np.uint8)
                kind = "png" if i else "jpg"
                Image.fromarray(pixels).save(folder / part / name / f"{i}.{kind}")
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    return folder


def test_a_folder_of_images(photographs, capsys):
    data = common.find_data("CIFAR-100", "folder", photographs)
    assert data.train_images.shape == (18, 3, 10, 12) and len(data.test_labels) == 8
    assert data.classes == 2 and data.description["source"] == "folder"
    bright = data.train_images.float().mean((1, 2, 3)) > 120
    assert torch.equal(bright.long(), data.train_labels)                  # cat 0, dog 1
    assert data.train_labels.tolist() != sorted(data.train_labels.tolist())
    pixels = data.normalise(data.train_images)
    assert pixels.mean((0, 2, 3)).abs().max() < 1e-5
    assert (pixels.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-5
    assert "decoding 26 images" in capsys.readouterr().out

    again = common.find_data("CIFAR-100", "folder", photographs)          # from data/, not decoded
    assert capsys.readouterr().out == "" and len(list(common.DEFAULT_DATA_DIR.iterdir())) == 1
    assert again.description == data.description
    assert torch.equal(again.train_images, data.train_images)

    image = np.asarray(Image.open(photographs / "train" / "dog" / "3.png")).transpose(2, 0, 1)
    assert (data.train_images.numpy() == image).all((1, 2, 3)).sum() == 1
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(photographs / "test" / "cat" / "9.png")
    other = common.find_data("CIFAR-100", "folder", photographs)          # a changed folder is
    assert len(other.test_labels) == 9                                    # another data set
    assert other.description != data.description


def test_decoded_images_that_were_damaged_are_not_believed(photographs):
    common.find_data("CIFAR-100", "folder", photographs)
    (cache,) = common.DEFAULT_DATA_DIR.iterdir()
    cache.write_bytes(cache.read_bytes()[:-200])
    with pytest.raises(common.Refused, match=f"{cache.name}.*remove it"):
        common.find_data("CIFAR-100", "folder", photographs)


def test_a_folder_that_cannot_be_cached_is_read_all_the_same(photographs, monkeypatch, capsys):
    blocked = photographs / "file"
    blocked.write_text("")
    monkeypatch.setattr(common, "DEFAULT_DATA_DIR", blocked)
    assert len(common.find_data("CIFAR-100", "folder", photographs).test_labels) == 8
    assert "not kept for the next time" in capsys.readouterr().out


def save(size, path):
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path)


def remove(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("damage, said", [
    (lambda f: [remove(f / part / "dog") for part in ("train", "test")], "has one class, 'cat'"),
    (lambda f: save((9, 12), f / "test" / "dog" / "odd.png"), "odd.png is 12x9 and others are 12x"),
    (lambda f: (f / "train" / "cat" / "notes.txt").write_text("x"), r"notes.txt is not an image"),
    (lambda f: (f / "test" / "cat" / "5.png").write_text("x"), r"5.png cannot be decoded"),
    (lambda f: (f / "test" / "dog").rename(f / "test" / "wolf"), "class 'dog' is in one of"),
    (lambda f: [remove(f / "test" / name) for name in ("cat", "dog")], "test is no folder of"),
    (lambda f: [path.unlink() for path in (f / "train" / "dog").iterdir()], "train is no folder"),
])
def test_a_folder_of_another_form(photographs, damage, said):
    damage(photographs)
    with pytest.raises(common.Refused, match=said):
        common.find_data("CIFAR-100", "folder", photographs)
    assert not common.DEFAULT_DATA_DIR.exists()


def test_a_colour_that_never_changes_is_refused(photographs):
    for path in sorted((photographs / "train").glob("*/[0-9]*")):
        pixels = np.array(Image.open(path).convert("RGB"))
        pixels[..., 2] = 7
        path.unlink()
        Image.fromarray(pixels).save(path.with_suffix(".png"))
    with pytest.raises(common.Refused, match="a colour is the same in every pixel"):
        common.find_data("CIFAR-100", "folder", photographs)


def test_a_folder_must_be_named_and_be_there(script):
    for arguments, word in (((), "--data-dir FOLDER"), (("--data-dir", "nowhere"), "nowhere")):
        status, _, err = script(train_densenet_cifar, "--preset", "smoke", "--data", "folder",
                                *arguments)
        assert status == 2 and word in err and err.count("\n") == 1


def test_training_on_a_folder_says_so(photographs, script):
    status, out, err = script(
        train_densenet_cifar, "--preset", "smoke", "--data", "folder", "--data-dir", photographs,
        "--only", "DN-Low", "--lambdas", 1, "--trials", 1, "--epochs", 1, "--set", "train=16",
        "test=8", "batch=8")
    assert status == 0, err
    assert "images of folder photographs (folder;" in out


# --- The stand-in ------------------------------------------------------------------------------

def test_capacity_matters_on_the_stand_in():
    data = common.synthetic(100, (3, 32, 32), 6000, 1000)
    assert data.train_labels.unique().numel() == 100
    x, y = data.normalise(data.train_images).flatten(1), data.train_labels
    test = data.normalise(data.test_images).flatten(1)
    errors = {}
    for hidden in (0, 32, 256):
        torch.manual_seed(0)
        network = torch.nn.Linear(3072, 100) if not hidden else torch.nn.Sequential(
            torch.nn.Linear(3072, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 100))
        sgd = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        for _ in range(6):
            for rows in torch.randperm(6000).split(100):
                loss = torch.nn.functional.cross_entropy(network(x[rows]), y[rows])
                sgd.zero_grad()
                loss.backward()
                sgd.step()
        errors[hidden] = (network(test).argmax(1) != data.test_labels).double().mean().item()
    assert errors[0] > errors[32] + 0.05 > errors[256] + 0.2, errors


# --- Augmentation ------------------------------------------------------------------------------

def test_every_crop_and_flip_equals_torchvisions():
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, [4] * 4)
    moves = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    rows = torch.arange(len(moves)) % 5
    out = common.crop_and_flip(padded, rows, moves)
    assert out.shape == (162, 3, 32, 32) and out.dtype == torch.uint8
    for mine, row, (top, left, flip) in zip(out, rows, moves.tolist(), strict=True):
        image = tv.hflip(images[row]) if flip else images[row]
        theirs = tv.crop(tv.pad(image, 4), top, left, 32, 32)
        assert torch.equal(mine, theirs)
    own = common.crop_and_flip(padded, rows.view(81, 2), moves.view(81, 2, 3))      # (N, M)
    assert torch.equal(own.flatten(0, 1), out)


def test_black_means_black_before_normalisation():
    """torchvision pads the image, not the tensor: its border is -mean / std after normalising."""
    data = common.synthetic(10, (3, 32, 32), 20, 5)
    padded = torch.nn.functional.pad(data.train_images, [4] * 4)
    image = data.normalise(common.crop_and_flip(padded, torch.tensor([3]), torch.zeros(
        1, 3, dtype=torch.long)))[0]
    torch.testing.assert_close(image[:, 0, 0], (-data.mean / data.std).flatten())


def test_moves_are_uniform_and_each_images_own():
    moves = common.draw_moves((20_000,), torch.Generator().manual_seed(0))
    for column, values in ((0, 9), (1, 9), (2, 2)):
        counts = moves[:, column].bincount()
        assert len(counts) == values
        assert (counts / 20_000 - 1 / values).abs().max() < 0.01
    assert common.draw_moves((50, 4), torch.Generator()).shape == (50, 4, 3)
