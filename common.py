"""The science: data -> batches -> joint loss -> ensemble -> scores -> training -> stacking.

Read it from top to bottom; if you only want the science, start at "Splits". study.py has the machinery around it,
fast.py faster forms of a few functions. Shapes: N examples, M members, K classes. An ensemble maps images (N, C, H, W),
or one batch per member (N, M, C, H, W), to member logits (N, M, K); the ensemble's own logits are their mean over M.

A `run` is one configuration, method and trial (study.Run): run.settings has its values from presets.yaml, run.lam its
lambda (0 for bagging), run.generator(purpose) a seeded generator. `build(settings, shape, classes, generator)`, in a
training script, returns its untrained ensemble.
"""

import contextlib
import copy
import gzip
import hashlib
import lzma
import math
import tarfile
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import fast

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F


class Refused(Exception):
    """Bad input, in one line: the value, what was expected, the fix. Scripts exit with status 2."""


class Damaged(Refused):
    """Files of a data set are missing or damaged; folders.find_data adds how to get them."""


# --- Data ----------------------------------------------------------------------------------------


@dataclass
class Data:
    """uint8 images (n, C, H, W), labels (n,); mean and std (C, 1, 1) of pixels in [0, 1]."""
    description: dict     # name, source (real | synthetic), checksum or seed: a setting of every run
    origin: str           # the folder it came from: recorded, but it decides no number
    classes: int
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def device(self):
        return self.train_images.device

    @property
    def shape(self):
        """(C, H, W)"""
        return tuple(self.train_images.shape[1:])

    def to(self, device):
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)

    def normalise(self, images):
        """uint8 images (..., C, H, W) -> float32, mean 0 and standard deviation 1 per channel: to the bit what
        torchvision's ToTensor and Normalize make."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def per_channel(*values):
    return torch.tensor(values).view(-1, 1, 1)


DATA_DIR = Path(__file__).resolve().parent / "data"
FASHION_MNIST = {  # SHA-256 of the four files, unpacked
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_fashion_mnist(folder):
    """Fashion-MNIST from a folder, or None if the folder has none of its files.

    The files are torchvision's, in FashionMNIST/raw, or the data set's four *-ubyte.gz, which are unpacked into data/
    once. Raises Damaged if a file is missing, truncated or another data set's, and Refused if data/ cannot be written.
    """
    raw, packed = folder / "FashionMNIST" / "raw", {name: folder / f"{name}.gz" for name in FASHION_MNIST}
    if not raw.is_dir():
        if not any(path.is_file() for path in packed.values()):
            return None
        raw = DATA_DIR / "FashionMNIST" / "raw"
        if not raw.is_dir():
            for path in packed.values():
                if not path.is_file():
                    raise Damaged(f"{folder} has no {path.name} (expected four files *-ubyte.gz): add it")
            with unpacking(raw) as scratch:
                scratch.mkdir()
                for name, path in packed.items():
                    with reading(path):
                        (scratch / name).write_bytes(gzip.decompress(path.read_bytes()))
                    check_files(scratch, {name: FASHION_MNIST[name]}, path)
    check_files(raw, FASHION_MNIST, raw)
    train, test = (torchvision.datasets.FashionMNIST(raw.parent.parent, train=part) for part in (True, False))
    return Data(DATASETS["Fashion-MNIST"].description, str(folder), 10, train.data[:, None], train.targets,
                test.data[:, None], test.targets, per_channel(0.2860), per_channel(0.3530))


def check_files(folder, files, source):
    """Raises Damaged if a folder lacks one of `files` (name: SHA-256), which came from `source`, or has another one."""
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            raise Damaged(f"{source} has no {name} (expected {', '.join(files)}): remove {source}")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha256:
            raise Damaged(f"{name} in {source} is damaged or another file (expected SHA-256 {sha256}): remove {source}")


@contextlib.contextmanager
def unpacking(target):
    """Yields a path to unpack into, which is then renamed to `target` in one step. Raises Refused if that fails."""
    try:
        DATA_DIR.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DATA_DIR) as scratch:
            yield Path(scratch, target.name)
            target.parent.mkdir(exist_ok=True)
            try:
                Path(scratch, target.name).rename(target)
            except OSError:
                if not target.is_dir():         # another process got there first
                    raise
    except OSError as error:
        raise Refused(f"{target} cannot be unpacked ({error}): make room, or allow access") from error


@contextlib.contextmanager
def reading(archive):
    """Raises Damaged if the archive that is unpacked here is no archive, or half of one."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())   # tarfile's has several lines
        raise Damaged(f"{archive} cannot be unpacked ({reason}): remove it") from error


CIFAR_MEAN_AND_STD = {"CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
                      "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}


def read_cifar(name, folder):
    """CIFAR-10 or -100 in torchvision's form from a folder, or None if the folder has none of its files.

    The files are torchvision's folder, or its archive, which is unpacked into data/ once; torchvision checks the MD5 of
    each file. Raises Damaged if one is missing or damaged, and Refused if data/ cannot be written.
    """
    dataset = getattr(torchvision.datasets, name.replace("-", ""))
    archive = folder / dataset.filename
    if not (folder / dataset.base_folder).is_dir():
        if not archive.is_file():
            return None
        if not torchvision.datasets.utils.check_integrity(archive, dataset.tgz_md5):
            raise Damaged(f"{archive} is damaged or another file (expected MD5 {dataset.tgz_md5}): remove it")
        if not (DATA_DIR / dataset.base_folder).is_dir():
            with unpacking(DATA_DIR / dataset.base_folder) as scratch, reading(archive):
                torchvision.datasets.utils.extract_archive(str(archive), str(scratch.parent))
        folder = DATA_DIR
    try:
        train, test = (dataset(folder, train=part) for part in (True, False))
    except RuntimeError as error:                       # torchvision's "not found or corrupted"
        raise Damaged(f"{folder / dataset.base_folder} is incomplete or damaged: remove it") from error
    images, labels, test_images, test_labels = (value for part in (train, test) for value in (
        torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)))
    mean, std = CIFAR_MEAN_AND_STD[name]
    return Data(DATASETS[name].description, str(folder / dataset.base_folder), len(train.classes), images, labels,
                test_images, test_labels, per_channel(*mean), per_channel(*std))


CIFAR_100_BINARY = {  # SHA-256
    "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
    "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
}


def read_cifar_100_binary(folder):
    """CIFAR-100 in its binary form from a folder, or None if the folder has none of its files.

    The files are cifar-100-binary/*.bin, or the archive of that folder, which is unpacked into data/ once. A record
    is a coarse label, a fine label and an image (C, H, W). Images, labels and order are those of read_cifar. Raises
    Damaged if a file is missing or has another SHA-256, and Refused if data/ cannot be written.
    """
    place = folder / "cifar-100-binary"
    archives = [path for end in ("gz", "xz") if (path := folder / f"{place.name}.tar.{end}").is_file()]
    if not place.is_dir():
        if not archives:
            return None
        place = DATA_DIR / place.name
        if not place.is_dir():
            with unpacking(place) as scratch, reading(archives[0]), tarfile.open(archives[0]) as archive:
                scratch.mkdir()
                for member in archive:              # two files by their names: no path of an archive is followed
                    path = Path(member.name)
                    if member.isfile() and path.parent == Path(place.name) and path.name in CIFAR_100_BINARY:
                        (scratch / path.name).write_bytes(archive.extractfile(member).read())
                check_files(scratch, CIFAR_100_BINARY, archives[0])
    check_files(place, CIFAR_100_BINARY, place)
    parts = []
    for name in CIFAR_100_BINARY:
        records = torch.from_numpy(np.fromfile(place / name, np.uint8)).view(-1, 2 + 3 * 32 * 32)
        parts += [records[:, 2:].reshape(-1, 3, 32, 32).contiguous(), records[:, 1].long()]
    mean, std = CIFAR_MEAN_AND_STD["CIFAR-100"]
    return Data(DATASETS["CIFAR-100"].description, str(place), 100, *parts, per_channel(*mean), per_channel(*std))


def first_classes(data, classes):
    """The images of the first classes of a data set, in both of its parts; the statistics stay those of all."""
    train, test = data.train_labels < classes, data.test_labels < classes
    return replace(data, classes=classes, train_images=data.train_images[train], train_labels=data.train_labels[train],
                   test_images=data.test_images[test], test_labels=data.test_labels[test])


def pixel_statistics(images):
    """Mean and std (C, 1, 1) of uint8 images (n, C, H, W) as pixels in [0, 1], from counts of the 256 values."""
    counts = torch.stack([images[:, c].flatten().bincount(minlength=256)
                          for c in range(images.shape[1])]).double()
    values, n = torch.arange(256) / 255, counts.sum(1)
    mean = counts @ values.double() / n
    std = ((counts * (values - mean[:, None]).square()).sum(1) / n).sqrt()
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def synthetic(classes, shape, train, test, seed=0):
    """A stand-in made from a seed, with the form of the real data and some of its difficulty.

    Every class has a smooth prototype. An image is the sum of its class's, scaled by 0.5 to 1 and negated with
    probability 1/2, of another class's, scaled by 0 to 0.9, both moved by up to two pixels, and of noise. A linear
    network learns next to nothing from them, and a larger network more than a small one.
    """
    channels, size, _ = shape
    g = torch.Generator().manual_seed(seed)
    n = train + test
    coarse = torch.randn(classes, channels, 4, 4, generator=g)
    prototypes = F.interpolate(coarse, size=(size + 4, size + 4), mode="bicubic")
    labels = torch.randint(classes, (n,), generator=g)
    other = (labels + torch.randint(1, classes, (n,), generator=g)) % classes
    shift = torch.randint(5, (2, n), generator=g)
    fade = torch.rand(2, n, 1, 1, 1, generator=g)
    sign = 2 * torch.randint(2, (n, 1, 1, 1), generator=g) - 1
    images = torch.empty(n, channels, size, size, dtype=torch.uint8)
    for dy in range(5):
        for dx in range(5):
            here = ((shift[0] == dy) & (shift[1] == dx)).nonzero().squeeze(1)
            view = prototypes[:, :, dy:dy + size, dx:dx + size]
            mixed = (0.5 + 0.5 * fade[0, here]) * sign[here] * view[labels[here]]
            mixed += 0.9 * fade[1, here] * view[other[here]]
            mixed += 0.6 * torch.randn(mixed.shape, generator=g)
            images[here] = (128 + 40 * mixed).clamp_(0, 255).to(torch.uint8)
    description = {"name": "synthetic stand-in", "source": "synthetic", "version": 2, "seed": seed}
    return Data(description, "made from a seed", classes, images[:train], labels[:train], images[train:],
                labels[train:], *pixel_statistics(images[:train]))


@dataclass(frozen=True)
class Dataset:
    """Where a data set comes from, and the form of its stand-in."""
    description: dict     # of the real data: a setting of every run on it
    read: object          # folder -> Data, or None if the folder has none of it
    system: Path | None   # the folder of a system package that has it
    torchvision: str | None     # the torchvision class that downloads it
    classes: int
    shape: tuple          # (C, H, W)
    train: int
    test: int
    ways: str             # other ways to get it, for a message


def _cifar(name, classes, md5, read, archives):
    return Dataset({"name": name, "source": "real", "md5": md5}, read, None, name.replace("-", ""), classes,
                   (3, 32, 32), 50_000, 10_000,
                   f"put {archives} from www.cs.toronto.edu/~kriz/cifar.html into a folder and pass --data-dir FOLDER")


DATASETS = {
    "Fashion-MNIST": Dataset(
        {"name": "Fashion-MNIST", "source": "real", "sha256": FASHION_MNIST["train-images-idx3-ubyte"]},
        read_fashion_mnist, Path("/usr/share/datasets/fashion-mnist"), "FashionMNIST", 10, (1, 28, 28), 60_000, 10_000,
        "`apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or put the four files *-ubyte.gz into a folder and "
        "pass --data-dir FOLDER"),
    "CIFAR-100": _cifar("CIFAR-100", 100, "eb9058c3a382ffc7106e4002c42a8d85",
                        lambda folder: read_cifar("CIFAR-100", folder) or read_cifar_100_binary(folder),
                        "cifar-100-python.tar.gz or cifar-100-binary.tar.gz"),
    "CIFAR-10": _cifar("CIFAR-10", 10, "c58f30108f718f92721af3b95e74349a",
                       lambda folder: read_cifar("CIFAR-10", folder), "cifar-10-python.tar.gz"),
}

# --- Splits, augmentation, batches ---------------------------------------------------------------


def split(n, trial, validation, train=None):
    """Indices of the training and the validation images of one trial, as the authors' code draws them.

    All methods and lambdas of a trial share them. `train`, if given, keeps a random subset of that size.
    """
    generator = np.random.RandomState(trial)
    held_out = generator.choice(n, validation, replace=False)
    rest = np.setdiff1d(np.arange(n), held_out)
    if train is not None:
        rest = np.sort(generator.choice(rest, train, replace=False))
    return torch.from_numpy(rest), torch.from_numpy(held_out)


PADDING = 4     # black pixels on each side of an image that is cropped


def crop_and_flip(padded, rows, moves):
    """Augmented images (..., C, H, W), one for each entry of rows (...), as torchvision makes them.

    padded (n, C, H + 8, W + 8) uint8; moves (..., 3): top and left of the crop, each 0 to 8, and 1 where the image is
    flipped first. Equal to hflip, pad(4) and crop(top, left, H, W).
    """
    height, width = (size - 2 * PADDING for size in padded.shape[2:])
    top, left, flip = (move.unsqueeze(-1) for move in moves.unbind(-1))
    y = top + torch.arange(height, device=padded.device)                    # (..., H)
    x = left + torch.arange(width, device=padded.device)                    # (..., W)
    x = torch.where(flip == 1, padded.shape[3] - 1 - x, x)
    images = padded[rows[..., None, None], :, y.unsqueeze(-1), x.unsqueeze(-2)]
    return images.movedim(-1, -3)                                           # from (..., H, W, C)


def draw_moves(shape, generator):
    """The moves (*shape, 3) of `crop_and_flip`: uniform crops, flips with probability 1/2."""
    return torch.cat([torch.randint(2 * PADDING + 1, (*shape, 2), generator=generator),
                      torch.randint(2, (*shape, 1), generator=generator)], -1)


def bootstraps(n, members, generator):
    """(n, M): column m holds the n draws with replacement from range(n) that member m trains on."""
    return torch.randint(n, (n, members), generator=generator)


def multiplicities(draws):
    """(n, M) uint8: how often each example stands in each member's bootstrap."""
    n, members = draws.shape
    return torch.stack([torch.bincount(draws[:, m], minlength=n).to(torch.uint8)
                        for m in range(members)], 1)


class Batches:
    """The training images of one run, as bytes on the device; batches are gathered by index.

    An epoch takes the images `training` of the data in one random order, cropped and flipped if the run says so; rows
    are positions among them. Bagging has two forms. `weights`: the members share their batches, and a member's loss on
    an image is multiplied by how often the image is in its bootstrap. `resample`: each member has the images of its own
    bootstrap, with crops and flips of its own, because batch norm must not see images outside the bootstrap; rows are
    positions among each member's draws.
    """

    def __init__(self, run, data, training):
        s, n, device = run.settings, len(training), data.device
        self.data, self.size = data, s["batch"]
        self.images, self.labels = data.train_images[training], data.train_labels[training]
        self.order, self.augmentation = run.generator("order"), run.generator("augmentation")
        self.draws = self.counts = self.moves = None
        if s.get("bagging"):        # a setting of bagging runs alone
            draws = bootstraps(n, s["members"], run.generator("bootstrap")).to(device)      # (n, M)
            if s["bagging"] == "resample":
                self.draws = draws
            else:
                self.counts = multiplicities(draws)
        if s["augment"]:
            shape = (n,) if self.draws is None else self.draws.shape
            self.images = F.pad(self.images, [PADDING] * 4)
            self.moves = torch.zeros(*shape, 3, dtype=torch.int64, device=device)

    def epoch(self):
        """A new order and new moves; returns the rows (N,) of each batch."""
        if self.moves is not None:
            self.moves.copy_(draw_moves(self.moves.shape[:-1], self.augmentation))
        return torch.randperm(len(self.labels), generator=self.order).to(self.labels.device).split(self.size)

    def take(self, rows):
        """Images (N, C, H, W), targets (N,) and weights (N, M), or None, of the rows (N,).

        In bagging `resample` images are (N, M, C, H, W) and targets (N, M).
        """
        batch = rows if self.draws is None else self.draws[rows]
        images = self.images[batch] if self.moves is None else crop_and_flip(self.images, batch, self.moves[rows])
        weights = None if self.counts is None else self.counts[rows].float()
        return self.data.normalise(images), self.labels[batch], weights

    def state_dict(self):
        return {"order": self.order.get_state(), "augmentation": self.augmentation.get_state()}

    def load_state_dict(self, state):
        self.order.set_state(state["order"])
        self.augmentation.set_state(state["augmentation"])


# --- The joint loss ------------------------------------------------------------------------------


def joint_loss(member_logits, targets, lam):
    """Eq. 4: lambda CE(softmax of the mean logits) + (1 - lambda) mean of the members' CE.

    member_logits (N, M, K); targets (N,), or probabilities (N, K). Eq. 9, its gradient with respect to the logits of
    member j for one example: ((1 - lambda) q_j + lambda q-bar - y) / (N M), with q_j the softmax of member j, q-bar
    that of the mean logits, y the one-hot label. Eq. 5, the same loss through the diversity, is in identities.py. This
    form is for reading; training computes the same in fast.joint_loss.
    """
    members = member_logits.shape[1]
    ensemble_loss = F.cross_entropy(member_logits.mean(1), targets)
    mean_member_loss = F.cross_entropy(member_logits.flatten(0, 1), targets.repeat_interleave(members, 0))
    return lam * ensemble_loss + (1 - lam) * mean_member_loss


def bagging_loss(member_logits, targets, weights=None):
    """Eq. 4 at lambda 0 where each member has a bootstrap of its own.

    `resample`: targets (N, M). `weights`: targets (N,), and weights (N, M), how often each example stands in each
    member's bootstrap, 1 on average: the sum is divided by N M, not by the weights. For reading, as joint_loss is.
    """
    if targets.dim() == 1:
        targets = targets[:, None].expand(-1, member_logits.shape[1])
    losses = F.cross_entropy(member_logits.transpose(1, 2), targets, reduction="none")      # (N, M)
    return (losses if weights is None else losses * weights).mean()


def cross_entropies(member_logits, targets):
    """The cross entropy (N,) of the combined prediction, Eq. 3, and the members' (N, M); targets (N,)."""
    return (F.cross_entropy(member_logits.mean(1), targets, reduction="none"),
            F.cross_entropy(member_logits.transpose(1, 2), targets[:, None].expand(
                -1, member_logits.shape[1]), reduction="none"))


# What runs: faster forms, which tests/test_fast.py holds equal to what the comments name. The first one, of
# (member_logits, targets, lam, weights), gives the joint loss, or the bagging loss if there are weights or targets
# (N, M), and both cross entropies, detached; its backward pass is Eq. 9.
loss_and_cross_entropies = fast.joint_loss          # joint_loss or bagging_loss, and cross_entropies
evaluation_cross_entropies = fast.cross_entropies   # cross_entropies
predicted = fast.argmax                             # member_logits.argmax(-1)
for_each_member = fast.side_by_side                 # (work, count, device): [work(m) for m in range(count)]

# --- Ensembles -----------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """M networks of any kind: images (N, C, H, W), or (N, M, C, H, W) -> member logits (N, M, K).

    DenseNets, ConvNets and networks of your own; the MLPs are one vectorised module of the same form. make() builds one
    network; the generator's seed decides its initial weights, the global state does not. Images and filters are laid
    out channels last, which convolutions prefer on a CPU and on a GPU. At precision bf16 the networks run under
    autocast, with batch norm's statistics in fp32, and the logits come back as fp32. at_once(members, bf16), if given,
    returns what computes all member logits together on CUDA, from the members' own weights.
    """

    def __init__(self, make, members, generator, precision="fp32", at_once=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            self.members = nn.ModuleList(make() for _ in range(members))
        for part in self.members.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.momentum is not None:
                part.num_batches_tracked = None         # nobody reads it, and a GPU spends a kernel a layer on it
        self.register_load_state_dict_pre_hook(self.without_counters)
        self.to(memory_format=torch.channels_last)
        self.bf16, self.at_once, self.joined = precision == "bf16", at_once, None

    def _apply(self, fn, recurse=True):
        self.joined = None              # on another device, or in another type, it would be of other weights
        return super()._apply(fn, recurse)

    @staticmethod
    def without_counters(ensemble, state, prefix, *_):
        """Drops batch norm's counters of batches from weights that are loaded, if this ensemble has none."""
        counters = {key for key in state if key.startswith(prefix) and key.endswith("num_batches_tracked")}
        for key in counters - ensemble.state_dict(prefix=prefix).keys():
            del state[key]

    def forward(self, images):
        if self.at_once and images.is_cuda:
            self.joined = self.joined or self.at_once(self.members, self.bf16)
            return self.joined(images)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.bf16:       # once: autocast would keep a copy of the shared images for each member
            images = images.to(torch.bfloat16)
        return torch.stack(for_each_member(lambda m: self.one(m, images), len(self.members), images.device), 1)

    def one(self, m, images):
        """The logits (N, K) of member m."""
        if images.dim() == 5:
            images = images[:, m].contiguous(memory_format=torch.channels_last)
        if not self.bf16:
            return self.members[m](images)
        with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
            return self.members[m](images).float()          # (each weight is used once: no cache)


# --- Scores --------------------------------------------------------------------------------------


class Scores:
    """Losses and errors of the ensemble and of every member, summed over batches on the device.

    Errors are exact counts over examples; in bagging every image counts once, or, in `resample`, every draw. Nothing
    reaches the host before `summary`.
    """

    def __init__(self, members, device):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.ensemble = torch.zeros(2, dtype=torch.float64, device=device)          # loss, wrong
        self.members = torch.zeros(2, members, dtype=torch.float64, device=device)

    def reset(self):
        for total in vars(self).values():
            total.zero_()

    def add(self, member_logits, targets, ensemble_loss, member_loss):
        """One batch: member_logits (N, M, K), targets (N,) or (N, M), losses (N,) and (N, M)."""
        self.n += len(targets)
        own = targets if targets.dim() == 2 else targets[:, None]
        wrong = predicted(member_logits) != own
        self.members += torch.stack([member_loss.sum(0), wrong.sum(0)])
        wrong = predicted(member_logits.mean(1, keepdim=True)) != own[:, :1]
        self.ensemble += torch.stack([ensemble_loss.sum(), wrong.sum()])

    def summary(self):
        """Means over the examples. Diversity, the last term of Eq. 7, is the mean member loss minus the ensemble's."""
        ensemble_loss, ensemble_error = (self.ensemble / self.n).tolist()
        member_loss, member_error = (self.members / self.n).cpu()
        mean_loss, mean_error = (float(one.numpy().mean()) for one in (member_loss, member_error))
        if math.isnan(ensemble_loss):       # in `resample` members have no example in common: fast.joint_loss
            ensemble_error = math.nan
        return {"ensemble_loss": ensemble_loss, "ensemble_error": ensemble_error,
                "mean_member_loss": mean_loss, "mean_member_error": mean_error,
                "member_loss": member_loss, "member_error": member_error,
                "diversity": mean_loss - ensemble_loss}


AT_ONCE = 500      # images evaluated: they stay in a CPU's cache, and bound what all streams take of a GPU's memory


@torch.no_grad()
def evaluate(ensemble, data, images, labels):
    """`Scores.summary` of an ensemble on images (n, C, H, W) with labels (n,)."""
    ensemble.eval()
    scores = None
    for part, targets in zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
        member_logits = ensemble(data.normalise(part))
        scores = scores or Scores(member_logits.shape[1], labels.device)
        scores.add(member_logits, targets, *evaluation_cross_entropies(member_logits, targets))
    return scores.summary()


@torch.no_grad()
def predict(ensemble, data, images):
    """All member logits (n, M, K) of images (n, C, H, W)."""
    ensemble.eval()
    logits = None
    for rows in torch.arange(len(images), device=images.device).split(AT_ONCE):
        part = ensemble(data.normalise(images[rows]))
        if logits is None:      # one block: half a gigabyte for 256x4H on the training split
            logits = part.new_empty(len(images), *part.shape[1:])
        logits[rows] = part
    return logits


# --- Training (appendix B) -----------------------------------------------------------------------


def train(build, run, data, report=lambda epoch, history: None, eager=False, checkpoint=None):
    """Trains one run by the paper's protocol.

    With a validation split the reported epoch is the first with the lowest validation error of the ensemble; without
    one it is the last. Returns four things. The ensemble, with the weights of that epoch, or the last ones if the run
    diverged: a mean member loss is not finite. The history, two `Scores.summary` per epoch: of the training steps,
    while the weights change; and of the validation split, or without one of the test set. The reported epoch, counted
    from 1, and the test scores there: both None if the run diverged. `report(epoch, history)` is called after each
    epoch; `checkpoint` (folders.Checkpoint) keeps the state; `eager` launches each step on CUDA instead of replaying a
    captured one. Raises fast.CannotCapture.
    """
    s = run.settings
    ensemble, optimizer = new_ensemble(build, run, data)
    schedule = torch.optim.lr_scheduler.MultiStepLR(        # to a tenth after each share of the epochs
        optimizer, [math.ceil(share * s["epochs"]) for share in s["decay"]], 0.1)
    training, validation = (rows.to(data.device) for rows in split(
        len(data.train_images), run.trial, s["validation"], s["train"]))
    test = data.test_images, data.test_labels
    held_out = (data.train_images[validation], data.train_labels[validation]) if s["validation"] else test
    batches, scores = Batches(run, data, training), Scores(s["members"], data.device)
    parts = {"ensemble": ensemble, "optimizer": optimizer, "schedule": schedule, "batches": batches}
    history, best = checkpoint.resume(parts) if checkpoint else ([], None)
    for group in optimizer.param_groups:        # a checkpoint's rate is on the CPU: a captured step cannot read it
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = group["lr"].to(data.device)
    step = stepper(run, ensemble, optimizer, scores, batches, eager)

    for epoch in range(len(history) + 1, s["epochs"] + 1):
        ensemble.train()
        scores.reset()
        for rows in batches.epoch():
            step(rows)
        schedule.step()
        history.append((scores.summary(), evaluate(ensemble, data, *held_out)))
        report(epoch, history)
        if not all(math.isfinite(part["mean_member_loss"]) for part in history[-1]):
            return ensemble, history, None, None
        errors = [there["ensemble_error"] for _, there in history]
        if s["validation"] and errors.index(min(errors)) == epoch - 1:      # a new first minimum
            best = copy.deepcopy(ensemble.state_dict())
        if checkpoint:
            checkpoint.save(parts, history, best)

    if not s["validation"]:
        return ensemble, history, s["epochs"], history[-1][1]
    ensemble.load_state_dict(best)
    errors = [there["ensemble_error"] for _, there in history]
    return ensemble, history, 1 + errors.index(min(errors)), evaluate(ensemble, data, *test)


def new_ensemble(build, run, data):
    """The untrained ensemble of a run, on the device of its data, and its optimizer."""
    s = run.settings
    ensemble = build(s, data.shape, data.classes, run.generator("initialisation")).to(data.device)
    if s.get("bagging") == "weights" and any(hasattr(part, "running_mean") for part in ensemble.modules()):
        raise Refused(f"{run.label}: weighted bagging does not work with batch norm, whose statistics would include "
                      "images outside a member's bootstrap: use --set bagging=resample")
    rate = s["lr"] if data.device.type == "cpu" else torch.tensor(float(s["lr"]), device=data.device)
    return ensemble, torch.optim.SGD(ensemble.parameters(), lr=rate, momentum=s["momentum"], nesterov=s["nesterov"],
                                     weight_decay=s["weight_decay"], fused=True)


def training_step(ensemble, optimizer, scores, lam, images, targets, weights=None):
    """One step of SGD on the joint loss; its losses and errors are added to `scores`."""
    member_logits = ensemble(images)
    loss, ensemble_loss, member_loss = loss_and_cross_entropies(member_logits, targets, lam, weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scores.add(member_logits.detach(), targets, ensemble_loss, member_loss)


def stepper(run, ensemble, optimizer, scores, batches, eager=False):
    """A function of rows (N,) that takes a training step; on CUDA it replays a captured one.

    A captured step reads and writes fixed addresses. Therefore moves, rate and scores change in place; a shorter last
    batch is taken eagerly. The capture takes a few trial steps and puts back what they change. Raises
    fast.CannotCapture.
    """
    def step(rows):
        training_step(ensemble, optimizer, scores, run.lam, *batches.take(rows))

    if batches.labels.device.type != "cuda" or eager:
        return step
    return fast.captured(step, ensemble, optimizer, scores, torch.arange(batches.size, device=batches.labels.device))


DIAGNOSIS = (3, 5)      # an epoch, the paper's; a gap in points of error, ours, fixed before any run


def diagnose(label, errors):
    """The paper's early sign that members are over capacity for end-to-end training (Sec. 4), as a line.

    errors (M,) are the members' training errors over epoch 3: does one lead the others by far?
    """
    (epoch, least), (first, second) = DIAGNOSIS, 100 * np.sort(errors)[:2]
    verdict = "OVER CAPACITY" if second - first >= least else "not over capacity"
    return (f"{label}: over epoch {epoch} the two best members have {first:.1f} and {second:.1f} % training error, "
            f"{second - first:.1f} points apart (threshold {least}): {verdict} for end-to-end training")


# --- Stacking (Wolpert 1992) ---------------------------------------------------------------------


def stack(ensemble, run, data):
    """Stacking: a linear combiner (K, M*K) with a bias (K,) on the logits of frozen members, which had lambda 0.

    settings["stacking"] says on which images it is fitted, those of the validation or of the training split. It starts
    at plain averaging and is penalised, by squared distance, for leaving it; the bias is free. The penalty with the
    lowest cross-validated cross entropy is taken. The fits are in float64: the objective is so flat that rounding ends
    a line search in float32 too early. Returns the test scores of the combination, as an ensemble of one; the penalties
    with their cross-validated losses; and the chosen penalty, whether it lies at an end of the grid, and the number of
    fits that did not converge.
    """
    s = run.settings
    training, validation = split(len(data.train_images), run.trial, s["validation"], s["train"])
    fitted_on = (validation if s["stacking"] == "validation" else training).to(data.device)
    x = predict(ensemble, data, data.train_images[fitted_on]).flatten(1).double()  # (n, M*K)
    y = data.train_labels[fitted_on]
    averaging = torch.eye(data.classes, device=data.device, dtype=x.dtype).repeat(1, s["members"]) / s["members"]
    not_converged = 0

    def objective(offset, bias, mask, penalty):
        """The penalised cross entropy of averaging + offset and bias over the examples (n,) where mask is 1."""
        loss = F.cross_entropy(F.linear(x, averaging + offset, bias), y, reduction="none")
        return (loss * mask).sum() / mask.sum() + penalty * offset.square().sum()

    # The members' logits are so alike that the objective curves far more in some directions than in others. L-BFGS
    # works on offset @ factor, for which the Hessian is near the identity. gram (M*K, M*K) is the mean over examples
    # and classes of p (1 - p) x x^T at averaging.
    p = F.linear(x, averaging).softmax(1)
    gram = (x * (1 - p.square().sum(1, keepdim=True))).T @ x / (len(x) * data.classes)
    identity = torch.eye(len(gram), dtype=x.dtype, device=x.device)

    def fit(start, mask, penalty):
        """(offset, bias) at the minimum: no entry of the whitened gradient is above 0.002 of the largest at averaging.

        For 256x4H at the paper's protocol the objective is then within 1e-4 of its minimum, measured for trial 0.
        """
        nonlocal not_converged
        factor = torch.linalg.cholesky(gram + max(2 * penalty, 1e-9 * gram.trace().item()) * identity)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        whitened = [(start[0] @ factor).requires_grad_(), start[1].clone().requires_grad_()]

        def loss(at):
            return objective(at[0] @ inverse, at[1], mask, penalty)

        def steepest(at):
            return max(slope.abs().max().item() for slope in torch.autograd.grad(loss(at), at))

        def closure():
            optimizer.zero_grad()
            value = loss(whitened)
            value.backward()
            return value

        tolerance = 0.002 * steepest([torch.zeros_like(value, requires_grad=True) for value in whitened])
        optimizer = torch.optim.LBFGS(whitened, max_iter=1000, tolerance_grad=tolerance, tolerance_change=0,
                                      line_search_fn="strong_wolfe")
        optimizer.step(closure)
        not_converged += not steepest(whitened) <= tolerance        # nan does not converge either
        return whitened[0].detach() @ inverse, whitened[1].detach()

    plain = torch.zeros_like(averaging), torch.zeros_like(averaging[:, 0])
    penalties = sorted(s["penalties"], reverse=True)        # from the strongest, each a warm start
    fold = torch.randperm(len(y), generator=run.generator("folds")).to(data.device) % s["folds"]
    losses = np.zeros(len(penalties))
    for k in range(s["folds"]):
        combiner = plain
        for i, penalty in enumerate(penalties):
            combiner = fit(combiner, (fold != k).to(x.dtype), penalty)
            losses[i] += objective(*combiner, (fold == k).to(x.dtype), 0).item() / s["folds"]
    chosen = penalties[losses.argmin()]
    offset, bias = fit(plain, torch.ones_like(x[:, 0]), chosen)

    test, targets = Scores(1, data.device), data.test_labels
    with torch.no_grad():
        test_x = predict(ensemble, data, data.test_images).flatten(1).double()
        logits = F.linear(test_x, averaging + offset, bias).unsqueeze(1)           # (N, 1, K)
        test.add(logits, targets, *evaluation_cross_entropies(logits, targets))
    return (test.summary(), {"penalty": penalties, "cross_validated_loss": losses},
            {"penalty": chosen, "diverged_at_epoch": None, "fits_not_converged": not_converged,
             "penalty_is_outermost": len(penalties) > 1 and chosen in (penalties[0], penalties[-1])})
