"""The science: data -> batches -> joint loss -> ensemble -> scores -> training -> stacking.

Begin at "Splits" if you trust the data. N examples, M members, K classes. An ensemble maps images (N, C, H, W), or one
batch per member (N, M, C, H, W), to member logits (N, M, K); the ensemble's own logits are their mean over M.

A `run` is one configuration, method and trial: run.settings has its values from presets.yaml, run.lam its lambda (0 for
bagging), run.generator(purpose) a seeded generator. `build(settings, shape, classes, generator)`, in a training script,
returns its untrained ensemble. fast.py has quicker forms of what is plain here, study/ the machinery around it.
"""

import copy
import functools
import gzip
import hashlib
import math
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


# --- Data ----------------------------------------------------------------------------------------


@dataclass
class Data:
    """uint8 images (n, C, H, W), labels (n,); mean and std (C, 1, 1) of pixels in [0, 1]."""
    description: dict     # name, source (real | synthetic), checksum or seed: a setting of every run
    classes: int
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    origin: str = ""      # where it was found, in words: recorded, but it decides no number

    @property
    def device(self):
        return self.train_images.device

    @property
    def shape(self):
        return tuple(self.train_images.shape[1:])       # (C, H, W)

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})

    def normalise(self, images):
        """uint8 images (..., C, H, W) -> float32: to the bit what torchvision's ToTensor and Normalize make."""
        return images.float().div_(255).sub_(self.mean).div_(self.std)


def pixel_statistics(images):
    """Mean and std (C, 1, 1) of uint8 images (n, C, H, W) as pixels in [0, 1], from counts of the 256 values."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]).double()
    values, n = torch.arange(256) / 255, counts.sum(1)
    mean = counts @ values.double() / n
    std = ((counts * (values - mean[:, None]).square()).sum(1) / n).sqrt()
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


@dataclass(frozen=True)
class Dataset:
    """A data set on disk, and the form of its stand-in."""
    description: dict     # name, source "real", perhaps a checksum: a setting of every run on it
    reader: object        # folder -> training images and labels, test images and labels; None if it has none of them
    classes: int
    shape: tuple          # (C, H, W)
    train: int            # images
    test: int
    ways: str             # how to get it, for a message
    statistics: tuple = ()              # mean and std by channel, as published; or else those of the training images
    system: Path | None = None          # the folder of a system package that has it
    torchvision: str | None = None      # the torchvision class that downloads it

    def read(self, folder):
        """The Data in a folder, or None if the folder has none of it. Raises Refused if it cannot be trained on."""
        parts = self.reader(folder)
        if parts is None:
            return None
        for fault in faults(self.shape, self.classes, *parts):
            raise Refused(f"{self.description['name']}: {fault}")
        mean, std = torch.tensor(self.statistics).view(2, -1, 1, 1) if self.statistics else pixel_statistics(parts[0])
        checksum = {}
        if not self.description.keys() & {"sha256", "md5"}:     # runs on other data never mix with these
            content = b"".join(part.contiguous().numpy().tobytes() for part in parts)
            checksum["sha256"] = hashlib.sha256(content).hexdigest()
        return Data(self.description | checksum, self.classes, *parts, mean, std)


def faults(shape, classes, train_images, train_labels, test_images, test_labels):
    """Why images and labels, as a reader of your own may return them, are not those of its Dataset."""
    for part, images, labels in (("training", train_images, train_labels), ("test", test_images, test_labels)):
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            yield (f"{part} images are {images.dtype} {tuple(images.shape)}: expected torch.uint8 (n, "
                   f"{', '.join(map(str, shape))}), channels first, of pixels from 0 to 255")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or len(labels) == 0:
            yield f"{part} labels are {labels.dtype} {tuple(labels.shape)}: expected torch.int64, one for each image"
        if labels.min() < 0 or labels.max() >= classes or (part == "training" and labels.max() < classes - 1):
            yield f"{part} labels run from {labels.min()} to {labels.max()}: expected 0 to {classes - 1}"
    if unseen := set(test_labels.tolist()) - set(train_labels.tolist()):
        yield f"no training image has the labels {sorted(unseen)} of test images: leave them out"
    if same := [i for i, channel in enumerate(train_images.unbind(1)) if channel.min() == channel.max()]:
        yield f"channels {same} have one value in all training images: leave them out"


DATA_DIR = Path(__file__).resolve().parent / "data"
FASHION_MNIST = {  # SHA-256 of the four files, unpacked
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CIFAR_100_BINARY = {  # SHA-256
    "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
    "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
}


def contents(name, folder, checksums):
    """The bytes (n,) of each file of a data set, unpacked. Raises Refused if one is missing or damaged."""
    for file, sha256 in checksums.items():
        try:
            content = (folder / file).read_bytes()
            content = gzip.decompress(content) if file.endswith(".gz") else content
        except (OSError, EOFError, zlib.error):
            content = b""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(f"{folder / file} is missing or damaged (expected SHA-256 {sha256}, unpacked): replace it. "
                          f"To get {name}: {DATASETS[name].ways}")
        yield torch.from_numpy(np.frombuffer(content, np.uint8).copy())


def read_fashion_mnist(folder):
    """The four files *-ubyte.gz lie in the folder itself or where torchvision puts them, in FashionMNIST/raw."""
    for place in (folder, folder / "FashionMNIST" / "raw"):
        if any(place.glob("*-ubyte.gz")):
            x, y, test_x, test_y = contents("Fashion-MNIST", place, FASHION_MNIST)      # with headers of 16 and 8 bytes
            images, test_images = (pixels[16:].view(-1, 1, 28, 28) for pixels in (x, test_x))
            return images, y[8:].long(), test_images, test_y[8:].long()
    return None


def read_cifar(name, folder):
    """CIFAR-10 or -100 in torchvision's form: torchvision unpacks its own archive, and checks the MD5 of each file."""
    dataset, parts = getattr(torchvision.datasets, DATASETS[name].torchvision), []
    archive = folder / dataset.filename
    if not (folder / dataset.base_folder).is_dir() and not archive.is_file():
        return None
    whole = torchvision.datasets.utils.check_integrity(archive, dataset.tgz_md5)    # `download` then only unpacks it
    try:
        for train in (True, False):
            part = dataset(folder, train=train, download=whole)
            parts += [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)]
    except RuntimeError as error:                       # torchvision's "not found or corrupted"
        raise Refused(f"{folder / dataset.base_folder} or {archive.name} is incomplete or damaged (expected the MD5 of "
                      f"torchvision): remove both. To get {name}: {DATASETS[name].ways}") from error
    return parts


def read_cifar_100(folder):
    """CIFAR-100 in its binary form, the folder cifar-100-binary, or in torchvision's: the same images and order."""
    if not (folder / "cifar-100-binary").is_dir():
        return read_cifar("CIFAR-100", folder)
    parts = []
    for content in contents("CIFAR-100", folder / "cifar-100-binary", CIFAR_100_BINARY):
        records = content.view(-1, 2 + 3 * 32 * 32)         # coarse label, fine label, image (C, H, W)
        parts += [records[:, 2:].reshape(-1, 3, 32, 32).contiguous(), records[:, 1].long()]
    return parts


CIFAR = "from www.cs.toronto.edu/~kriz/cifar.html into a folder and pass --data-dir FOLDER"
DATASETS = {
    "Fashion-MNIST": Dataset(
        {"name": "Fashion-MNIST", "source": "real", "sha256": FASHION_MNIST["train-images-idx3-ubyte.gz"]},
        read_fashion_mnist, 10, (1, 28, 28), 60_000, 10_000,
        "`apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or put the four files *-ubyte.gz into a folder and "
        "pass --data-dir FOLDER",
        ((0.2860,), (0.3530,)), Path("/usr/share/datasets/fashion-mnist"), "FashionMNIST"),
    "CIFAR-100": Dataset(
        {"name": "CIFAR-100", "source": "real", "md5": "eb9058c3a382ffc7106e4002c42a8d85"},
        read_cifar_100, 100, (3, 32, 32), 50_000, 10_000,
        f"put cifar-100-python.tar.gz, or the folder cifar-100-binary (`tar xf` its archive), {CIFAR}",
        ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)), torchvision="CIFAR100"),
    "CIFAR-10": Dataset(
        {"name": "CIFAR-10", "source": "real", "md5": "c58f30108f718f92721af3b95e74349a"},
        functools.partial(read_cifar, "CIFAR-10"), 10, (3, 32, 32), 50_000, 10_000,
        f"put cifar-10-python.tar.gz {CIFAR}",
        ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)), torchvision="CIFAR10"),
}


def first_classes(data, classes):
    """The images of the first classes of a data set, in both of its parts; the statistics stay those of all."""
    train, test = data.train_labels < classes, data.test_labels < classes
    return replace(data, classes=classes, train_images=data.train_images[train], train_labels=data.train_labels[train],
                   test_images=data.test_images[test], test_labels=data.test_labels[test])


def test_on_the_rest(data, used):
    """The first `used` training images stay; the others, which no trial trains on, are test images, too."""
    return replace(data, train_images=data.train_images[:used], train_labels=data.train_labels[:used],
                   test_images=torch.cat([data.test_images, data.train_images[used:]]),
                   test_labels=torch.cat([data.test_labels, data.train_labels[used:]]))


def synthetic(classes, shape, train, test, seed=0):
    """A stand-in made from a seed, with the form of the real data and some of its difficulty.

    Every class has a smooth prototype. An image is the sum of its class's, scaled by 0.5 to 1 and negated with
    probability 1/2, of another class's, scaled by 0 to 0.9, both moved by up to two pixels, and of noise. A linear
    network learns next to nothing from them, a larger network more than a small one.
    """
    n, size, g = train + test, shape[1], torch.Generator().manual_seed(seed)
    coarse = torch.randn(classes, shape[0], 4, 4, generator=g)
    prototypes = F.interpolate(coarse, size=(size + 4, size + 4), mode="bicubic")
    labels = torch.randint(classes, (n,), generator=g)
    other = (labels + torch.randint(1, classes, (n,), generator=g)) % classes
    shift = torch.randint(5, (2, n), generator=g)
    fade = torch.rand(2, n, 1, 1, 1, generator=g)
    sign = 2 * torch.randint(2, (n, 1, 1, 1), generator=g) - 1
    images = torch.empty(n, *shape, dtype=torch.uint8)
    for dy, dx in np.ndindex(5, 5):
        here = ((shift[0] == dy) & (shift[1] == dx)).nonzero().squeeze(1)
        view = prototypes[:, :, dy:dy + size, dx:dx + size]
        mixed = (0.5 + 0.5 * fade[0, here]) * sign[here] * view[labels[here]] + 0.9 * fade[1, here] * view[other[here]]
        mixed += 0.6 * torch.randn(mixed.shape, generator=g)
        images[here] = (128 + 40 * mixed).clamp_(0, 255).to(torch.uint8)
    description = {"name": "synthetic stand-in", "source": "synthetic", "version": 2, "seed": seed}
    return Data(description, classes, images[:train], labels[:train], images[train:], labels[train:],
                *pixel_statistics(images[:train]), "made from a seed")


# --- Splits, augmentation, batches ---------------------------------------------------------------

PADDING = 4     # black pixels on each side of an image that is cropped


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


def crop_and_flip(padded, rows, moves):
    """Augmented images (..., C, H, W), one for each entry of rows (...), equal to torchvision's hflip, pad(4) and crop.

    padded (n, C, H + 8, W + 8) uint8; moves (..., 3): top and left of the crop, each 0 to 8, and 1 to flip.
    """
    height, width = (size - 2 * PADDING for size in padded.shape[2:])
    top, left, flip = (move.unsqueeze(-1) for move in moves.unbind(-1))
    y = top + torch.arange(height, device=padded.device)                    # (..., H)
    x = left + torch.arange(width, device=padded.device)                    # (..., W)
    x = torch.where(flip == 1, padded.shape[3] - 1 - x, x)
    return padded[rows[..., None, None], :, y.unsqueeze(-1), x.unsqueeze(-2)].movedim(-1, -3)     # from (..., H, W, C)


class Batches:
    """The training images of one run, as bytes on the device; batches are gathered by index.

    An epoch takes the images `training` of the data in one random order, cropped and flipped if the run says so; rows
    are positions among them. Bagging has two forms. `weights`: the members share their batches, and a member's loss on
    an image is multiplied by how often the image is in its bootstrap. `resample`: each member has its own draws, with
    crops and flips of their own, as batch norm must not see other images; rows are positions among the draws.
    """

    def __init__(self, run, data, training):
        s, n = run.settings, len(training)
        self.data, self.size = data, s["batch"]
        self.images, self.labels = data.train_images[training], data.train_labels[training]
        self.order, self.augmentation = run.generator("order"), run.generator("augmentation")
        self.draws = self.counts = self.moves = None
        if s.get("bagging"):        # a setting of bagging runs alone
            draws = torch.randint(n, (n, s["members"]), generator=run.generator("bootstrap")).to(data.device)   # (n, M)
            if s["bagging"] == "resample":
                self.draws = draws
            else:
                self.counts = torch.stack([own.bincount(minlength=n) for own in draws.unbind(1)], 1).to(torch.uint8)
        if s["augment"]:
            shape = (n,) if self.draws is None else self.draws.shape
            self.images = F.pad(self.images, [PADDING] * 4)
            self.moves = torch.zeros(*shape, 3, dtype=torch.int64, device=data.device)

    def epoch(self):
        """A new order and new moves, uniform crops, flips of one in two; returns the rows (N,) of each batch."""
        if self.moves is not None:
            crops, flips = self.moves[..., :2], self.moves[..., 2]
            crops.copy_(torch.randint(2 * PADDING + 1, crops.shape, generator=self.augmentation))
            flips.copy_(torch.randint(2, flips.shape, generator=self.augmentation))
        return torch.randperm(len(self.labels), generator=self.order).to(self.labels.device).split(self.size)

    def take(self, rows):
        """Images (N, C, H, W), targets (N,), and weights (N, M) or None; (N, M, C, H, W) and (N, M) in `resample`."""
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
    that of the mean logits, y the one-hot label. fast.joint_loss stands in while both agree:
    edit this one, and it trains.
    """
    members = member_logits.shape[1]
    ensemble_loss = F.cross_entropy(member_logits.mean(1), targets)
    mean_member_loss = F.cross_entropy(member_logits.flatten(0, 1), targets.repeat_interleave(members, 0))
    return lam * ensemble_loss + (1 - lam) * mean_member_loss


def losses(member_logits, targets, lam, weights=None, own=None):
    """The loss of a training step and, for the scores, the cross entropies (N,) and (N, M) of ensemble and members.

    The loss is joint_loss, or an Experiment's `own` in its place. In bagging it is Eq. 4 at lambda 0, where each member
    has targets (N, M) of its own, or weights (N, M): how often an example stands in its bootstrap, 1 on average.
    """
    ensemble_loss, member_loss = fast.cross_entropies(member_logits, targets)
    if weights is not None:
        loss = (member_loss * weights).mean()           # over N M: not over the weights
    elif targets.dim() == 2:
        loss = member_loss.mean()
    else:
        loss = (own or joint_loss)(member_logits, targets, lam)
    return loss, ensemble_loss.detach(), member_loss.detach()


def losses_that_run(own=None):
    """What trains: fast.joint_loss if it gives what `losses` give, sooner; otherwise, or for an own loss, `losses`."""
    if own is None and fast.agrees_with(losses):
        return fast.joint_loss
    return functools.partial(losses, own=own)


# --- Ensembles -----------------------------------------------------------------------------------


class Ensemble(nn.Module):
    """M networks of any kind: images (N, C, H, W), or (N, M, C, H, W) -> member logits (N, M, K).

    make() builds one network; the generator's seed decides its initial weights, the global state does not. Images and
    filters are laid out channels last, which convolutions prefer. In bf16 the networks run under autocast, with batch
    norm's statistics and the logits in fp32. at_once(members, bf16), if given, computes all member logits on CUDA.
    """

    def __init__(self, make, members, generator, precision="fp32", at_once=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            self.members = nn.ModuleList(make() for _ in range(members))
        for part in self.members.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.momentum is not None:
                part.num_batches_tracked = None         # nobody reads it, and a GPU spends a kernel a layer on it
        self.bf16, self.at_once, self.joined = precision == "bf16", at_once, None
        self.to(memory_format=torch.channels_last)

    def _apply(self, fn, recurse=True):
        moved = super()._apply(fn, recurse)         # to another device, whose weights it joins
        on_cuda = next(self.parameters()).is_cuda
        self.joined = self.at_once(self.members, self.bf16) if self.at_once and on_cuda else None
        return moved

    def forward(self, images):
        if self.joined:
            return self.joined(images)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.bf16:       # once: autocast would keep a copy of the shared images for each member
            images = images.to(torch.bfloat16)

        def logits_of(m):                                   # (N, K)
            own = images if images.dim() == 4 else images[:, m].contiguous(memory_format=torch.channels_last)
            if not self.bf16:
                return self.members[m](own)
            with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False):
                return self.members[m](own).float()         # (each weight is used once: no cache)

        return torch.stack(fast.side_by_side(logits_of, len(self.members), images.device), 1)


# --- Scores --------------------------------------------------------------------------------------

EVALUATION_BATCH = 500      # they stay in a CPU's cache, and bound what all streams take of a GPU's memory


class Scores:
    """Losses, and errors as exact counts, of the ensemble and of every member, summed over batches on the device."""

    def __init__(self, members, device):
        self.n = torch.zeros((), dtype=torch.float64, device=device)
        self.ensemble = torch.zeros(2, dtype=torch.float64, device=device)          # loss, wrong
        self.members = torch.zeros(2, members, dtype=torch.float64, device=device)

    def reset(self):
        for total in vars(self).values():
            total.zero_()

    def add(self, member_logits, targets, ensemble_loss, member_loss):
        """One batch: member_logits (N, M, K), targets (N,) or (N, M), cross entropies (N,) and (N, M)."""
        self.n += len(targets)      # in bagging every image counts once, in `resample` every draw
        own = targets if targets.dim() == 2 else targets[:, None]
        wrong = fast.argmax(member_logits) != own
        self.members += torch.stack([member_loss.sum(0), wrong.sum(0)])
        wrong = fast.argmax(member_logits.mean(1, keepdim=True)) != own[:, :1]
        self.ensemble += torch.stack([ensemble_loss.sum(), wrong.sum()])

    def summary(self):
        """Means over the examples. Diversity, the last term of Eq. 7, is the mean member loss minus the ensemble's."""
        ensemble_loss, ensemble_error = (self.ensemble / self.n).tolist()
        member_loss, member_error = (self.members / self.n).cpu()
        mean_loss, mean_error = (float(one.numpy().mean()) for one in (member_loss, member_error))
        if math.isnan(ensemble_loss):       # in `resample` members have no example in common
            ensemble_error = math.nan
        return {"ensemble_loss": ensemble_loss, "ensemble_error": ensemble_error,
                "mean_member_loss": mean_loss, "mean_member_error": mean_error,
                "member_loss": member_loss, "member_error": member_error, "diversity": mean_loss - ensemble_loss}


@torch.no_grad()
def evaluate(ensemble, data, images, labels):
    """`Scores.summary` of an ensemble on images (n, C, H, W) with labels (n,)."""
    ensemble.eval()
    scores = None
    for part, targets in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        member_logits = ensemble(data.normalise(part))
        scores = scores or Scores(member_logits.shape[1], labels.device)
        scores.add(member_logits, targets, *fast.cross_entropies(member_logits, targets))
    return scores.summary()


@torch.no_grad()
def predict(ensemble, data, images):
    """All member logits (n, M, K) of images (n, C, H, W)."""
    ensemble.eval()
    return torch.cat([ensemble(data.normalise(part)) for part in images.split(EVALUATION_BATCH)])


# --- Training (appendix B) -----------------------------------------------------------------------


def train(build, run, data, report=lambda epoch, history: None, eager=False, checkpoint=None, loss=None):
    """Trains one run by the paper's protocol. Returns the ensemble, its history, the reported epoch, test scores there.

    The history has two `Scores.summary` per epoch: of the training steps, while the weights change; and of the
    validation split, or without one of the test set, of nan where the setting `evaluate` skips it. The reported epoch,
    from 1 on, is the first with the lowest validation error of the ensemble, or without that split the last one; the
    ensemble has its weights. If the run diverged (a mean member loss is not finite), the ensemble has the last weights,
    epoch and test scores are None.
    `report(epoch, history)` is called after each epoch; `checkpoint` (folders.Checkpoint) keeps the state.
    """
    s, test = run.settings, (data.test_images, data.test_labels)
    ensemble, optimizer = new_ensemble(build, run, data)
    schedule = torch.optim.lr_scheduler.MultiStepLR(        # to a tenth after each share of the epochs
        optimizer, [math.ceil(share * s["epochs"]) for share in s["decay"]], 0.1)
    training, validation = split(len(data.train_images), run.trial, s["validation"], s["train"])
    held_out = (data.train_images[validation], data.train_labels[validation]) if s["validation"] else test
    batches, scores = Batches(run, data, training), Scores(s["members"], data.device)
    parts = {"ensemble": ensemble, "optimizer": optimizer, "schedule": schedule, "batches": batches}
    history, best = checkpoint.resume(parts) if checkpoint else ([], None)
    lay_out_momenta(optimizer)
    step = stepper(run, ensemble, optimizer, scores, batches, eager, loss)

    for epoch in range(len(history) + 1, s["epochs"] + 1):
        ensemble.train()
        scores.reset()
        for rows in batches.epoch():
            step(rows)
        schedule.step()
        due = bool(s["validation"]) or epoch <= 10 or epoch % s.get("evaluate", 1) == 0 or epoch == s["epochs"]
        there = (evaluate(ensemble, data, *held_out) if due else
                 {name: math.nan * value for name, value in history[-1][1].items()})
        history.append((scores.summary(), there))
        report(epoch, history)
        if not all(math.isfinite(part["mean_member_loss"]) for part in history[-1][:1 + due]):
            return ensemble, history, None, None
        errors = [there["ensemble_error"] for _, there in history]
        if s["validation"] and errors.index(min(errors)) == epoch - 1:      # a new first minimum
            best = copy.deepcopy(ensemble.state_dict())         # with its layers' versions, which batch norm needs
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
        raise Refused(f"{run.label}: batch norm would see images outside a bootstrap: use --set bagging=resample")
    rate = s["lr"] if data.device.type == "cpu" else torch.tensor(float(s["lr"]), device=data.device)
    return ensemble, torch.optim.SGD(ensemble.parameters(), lr=rate, momentum=s["momentum"], nesterov=s["nesterov"],
                                     weight_decay=s["weight_decay"], fused=True)


def lay_out_momenta(optimizer):
    """Lays each momentum out in memory as its weight, as fused SGD takes it: a checkpoint may be of another device."""
    for weight, state in optimizer.state.items():
        if state.get("momentum_buffer") is not None:
            state["momentum_buffer"] = torch.empty_like(weight).copy_(state["momentum_buffer"])


def stepper(run, ensemble, optimizer, scores, batches, eager=False, own_loss=None):
    """A function of rows (N,) that takes a training step, on joint_loss or on an Experiment's own loss.

    On CUDA it replays a captured step, unless `eager`. Such a step reads and writes fixed addresses: moves, rate and
    scores change in place, and a shorter last batch is taken eagerly. Raises fast.CannotCapture.
    """
    losses_of, device = losses_that_run(own_loss), batches.labels.device

    def step(rows):
        images, targets, weights = batches.take(rows)
        member_logits = ensemble(images)                                    # (N, M, K)
        loss, ensemble_loss, member_loss = losses_of(member_logits, targets, run.lam, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scores.add(member_logits.detach(), targets, ensemble_loss, member_loss)

    if device.type != "cuda" or eager:
        return step
    for group in optimizer.param_groups:        # a checkpoint's rate is on the CPU: a captured step cannot read it
        group["lr"] = group["lr"].to(device)
    return fast.captured(step, ensemble, optimizer, scores, torch.arange(batches.size, device=device))


# --- Stacking (Wolpert 1992) ---------------------------------------------------------------------


def stack(ensemble, run, data):
    """Stacking: a linear combiner (K, M*K) with a bias (K,) on the logits of frozen members, which had lambda 0.

    It starts at plain averaging and is penalised, by squared distance, for leaving it; the bias is free. The penalty
    with the lowest cross-validated cross entropy is taken. Returns the test scores, as of an ensemble of one; the
    penalties with their losses; and the penalty taken, whether the grid ends there, and how many fits did not converge.
    """
    s = run.settings
    training, validation = split(len(data.train_images), run.trial, s["validation"], s["train"])
    fitted_on = validation if s["stacking"] == "validation" else training
    x = predict(ensemble, data, data.train_images[fitted_on]).flatten(1).double()       # (n, M*K)
    y = data.train_labels[fitted_on]
    averaging = torch.eye(data.classes).to(x).repeat(1, s["members"]) / s["members"]    # (K, M*K)
    p = F.linear(x, averaging).softmax(1)
    curvature = (x * (1 - p.square().sum(1, keepdim=True))).T @ x / (len(x) * data.classes)     # (M*K, M*K)
    identity, unconverged = torch.eye(len(curvature)).to(x), []

    def objective(offset, bias, mask, penalty):
        """The penalised cross entropy of averaging + offset, and bias, over the examples (n,) where mask is 1."""
        loss = F.cross_entropy(F.linear(x, averaging + offset, bias), y, reduction="none")
        return (loss * mask).sum() / mask.sum() + penalty * offset.square().sum()

    def fit(start, mask, penalty):
        """(offset, bias) at the minimum: no slope is above 0.002 of the steepest at averaging.

        The objective is flat: L-BFGS works in float64, on offset @ factor, for which the Hessian is near the identity.
        """
        factor = torch.linalg.cholesky(curvature + max(2 * penalty, 1e-9 * curvature.trace().item()) * identity)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)

        def steepest(at):
            loss = objective(at[0] @ inverse, at[1], mask, penalty)
            return max(slope.abs().max().item() for slope in torch.autograd.grad(loss, at))

        def closure():
            optimizer.zero_grad()
            loss = objective(at[0] @ inverse, at[1], mask, penalty)
            loss.backward()
            return loss

        at = [(start[0] @ factor).requires_grad_(), start[1].clone().requires_grad_()]
        tolerance = 0.002 * steepest([torch.zeros_like(each, requires_grad=True) for each in at])
        optimizer = torch.optim.LBFGS(at, max_iter=1000, tolerance_grad=tolerance, tolerance_change=0,
                                      line_search_fn="strong_wolfe")
        optimizer.step(closure)
        unconverged.append(not steepest(at) <= tolerance)           # nan does not converge either
        return at[0].detach() @ inverse, at[1].detach()

    plain = torch.zeros_like(averaging), torch.zeros_like(averaging[:, 0])
    penalties = sorted(s["penalties"], reverse=True)        # from the strongest, each a warm start
    fold = torch.randperm(len(y), generator=run.generator("folds")).to(data.device) % s["folds"]
    losses = np.zeros(len(penalties))
    for k in range(s["folds"]):
        combiner, held_out = plain, (fold == k).to(x.dtype)
        for i, penalty in enumerate(penalties):
            combiner = fit(combiner, 1 - held_out, penalty)
            losses[i] += objective(*combiner, held_out, 0).item() / s["folds"]
    chosen = penalties[losses.argmin()]
    offset, bias = fit(plain, torch.ones_like(x[:, 0]), chosen)

    test_x = predict(ensemble, data, data.test_images).flatten(1).double()
    logits, test = F.linear(test_x, averaging + offset, bias).unsqueeze(1), Scores(1, data.device)      # (N, 1, K)
    test.add(logits, data.test_labels, *fast.cross_entropies(logits, data.test_labels))
    return (test.summary(), {"penalty": penalties, "cross_validated_loss": losses},
            {"penalty": chosen, "diverged_at_epoch": None, "fits_not_converged": sum(unconverged),
             "penalty_is_outermost": len(penalties) > 1 and chosen in (penalties[0], penalties[-1])})
