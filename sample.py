"""Images out of any checkpoint, and how good they are.

    python sample.py runs/dmd2/generator.pt                    # a grid of every class
    python sample.py runs/teacher/teacher.pt --labels 3,3,7 --out threes.png
    python sample.py runs/dmd2/generator.onnx --n 1000 --out samples.npz
    python sample.py runs/dmd2/generator.pt --evaluate         # Fréchet distance, precision, recall

A checkpoint of teacher.py or dmd2.py or a file of export.py; the path is all that is needed. In
reading order: options, samplers, any checkpoint as one function, features, quality, output.
"""

import dataclasses
import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from teacher import (KNOWN_DATA, Data, Options, arg, build, heun, load, load_data, parse, pick_device,
                     run_script, save, save_grid, seeded, to_float, to_uint8, unit_noise)

ASSETS = Path(__file__).resolve().parent / "assets"
FEATURES = 64  # dimensions of the feature space in which quality is measured
NEIGHBOURS = 3  # k of precision and recall


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of sample.py."""

    checkpoint: str = arg(None, "teacher.pt, generator.pt or generator.onnx", positional=True)
    n: int = arg(None, "number of images (default: 10 per class; 10000 with --evaluate)", at_least=1)
    labels: str = arg(None, "the classes to sample, such as 3,3,7 (default: all, evenly)")
    steps: int = arg(None, "Heun steps of a teacher (default: 18)", at_least=1)
    out: str = arg(None, "a .png (grid), a .npz (images uint8 [N, H, W, C], labels), or a folder of "
                         "PNG files (default: samples.png)")
    evaluate: bool = arg(False, "measure quality instead of writing images")
    seeds: int = arg(3, "with --evaluate: the number of seeds, from --seed on", at_least=1)
    data_dir: str = arg(None, "with --evaluate: where the data are (default: as in training)")
    batch: int = arg(256, "images at a time; changes the speed only", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.evaluate and (self.labels or self.out):
            raise ValueError("--evaluate measures all classes and writes no images: leave out "
                             "--labels and --out")


# ---- samplers: from noise to images, by a denoiser ----------------------------------------------

def few_step(generator, x, sigmas, label, noises=()):
    """Sample by a generator in len(sigmas) steps: estimate x0, add noise of the next level, repeat.

    x       [B, C, H, W]  noise of level sigmas[0]
    sigmas  falling noise levels, floats
    label   [B]           int64
    noises  standard normal [B, C, H, W], one for each step after the first
    returns x0 [B, C, H, W], the last estimate
    """
    x0 = generator(x, x.new_full(x.shape[:1], sigmas[0]), label)
    for sigma, noise in zip(sigmas[1:], noises, strict=True):
        x0 = generator(x0 + sigma * noise, x.new_full(x.shape[:1], sigma), label)
    return x0


# ---- any checkpoint as one function -------------------------------------------------------------

class Sampler(NamedTuple):
    """What a checkpoint of any kind becomes: a function of unit noise and label, and its facts."""

    images: Callable  # (noise [B, C, H, W], label [B] int64) -> [B, C, H, W] in about [-1, 1]
    name: str         # "Heun, 18 steps"
    evaluations: int  # of the network per image
    data: dict        # name, data_dir, size, shape, classes
    device: torch.device


def load_sampler(path, steps=None, device="cpu"):
    """Make a Sampler of a .pt or .onnx file; ValueError if it is neither, or if `steps` does not apply."""
    if Path(path).suffix == ".onnx":
        sampler = onnx_sampler(path)
    else:
        checkpoint = load(path)
        denoiser = build(checkpoint, device)
        if checkpoint["kind"] == "teacher":
            return teacher_sampler(denoiser, checkpoint["data"], device, steps or 18)
        sampler = generator_sampler(denoiser, checkpoint["sigmas"], checkpoint["data"], device)
    if steps not in (None, sampler.evaluations):
        raise ValueError(f"--steps {steps}: {path} is a generator of {sampler.evaluations} step(s); "
                         "--steps is for teachers")
    return sampler


def teacher_sampler(denoiser, data, device, steps=18):
    return Sampler(lambda noise, label: heun(denoiser, noise, label, steps), f"Heun, {steps} steps",
                   2 * steps - 1, data, device)


def generator_sampler(generator, sigmas, data, device):
    @torch.no_grad()
    def images(noise, label):
        return few_step(generator, sigmas[0] * noise, sigmas, label)
    return Sampler(images, f"generator, {len(sigmas)} step(s)", len(sigmas), data, device)


def onnx_sampler(path):
    session, facts = onnx_session(path, "cpu")

    def images(noise, label):
        image, = session.run(["image"], {"noise": noise.numpy(), "label": label.numpy()})
        if image.dtype == np.uint8:
            return to_float(torch.from_numpy(image).permute(0, 3, 1, 2))
        return torch.from_numpy(image)
    return Sampler(images, "ONNX generator", facts["steps"], facts["data"], torch.device("cpu"))


def onnx_session(path, device, provider_options={}):
    """An onnxruntime session for a file of export.py on "cpu" or "cuda", and the facts in its metadata.

    Raises ValueError if the file is missing or foreign, or onnxruntime did not load the provider.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; export.py writes it")
    provider = dict(cpu="CPUExecutionProvider", cuda="CUDAExecutionProvider")[device]
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(provider, provider_options)])
    except Exception as error:  # its exceptions have no common base but Exception; all mean the file
        raise ValueError(f"{path}: onnxruntime can't read it: {error}") from error
    if provider not in session.get_providers():  # what was loaded; get_available_providers() is what was built
        raise ValueError(f"--device {device}: onnxruntime did not load {provider}, it has {session.get_providers()}")
    facts = session.get_modelmeta().custom_metadata_map
    if "dmd2" not in facts:
        raise ValueError(f"{path}: an ONNX file, but not one of export.py")
    return session, json.loads(facts["dmd2"])


def generate(sampler, label, seed, batch=256):
    """Images uint8 [N, C, H, W] for label [N]; image i depends on seed, i and label[i], not on batch."""
    parts = []
    for i in range(0, len(label), batch):
        noise = unit_noise(len(label[i:i + batch]), sampler.data["shape"], seed, start=i)
        image = sampler.images(noise.to(sampler.device), label[i:i + batch].to(sampler.device))
        parts.append(to_uint8(image).cpu())
    return torch.cat(parts)


# ---- features: a small classifier, its weights part of the protocol -----------------------------

# SHA-256 of the networks in assets/, made by `python sample.py --train-features digits` (and mnist).
SHA256 = {
    "digits": "051cc1265fab4a89f1ad62a77a803b561c008f7c6a4c18f906d54d68c722689c",
    "mnist": "832fe8c1521bbae580c7b01eb5cdb02c5f5f64da376ec2f4e8af15d1efdc3a96",
}


class FeatureNet(nn.Module):
    """Classifier of images of any size; what enters its last layer are the features."""

    def __init__(self, channels, num_classes):
        super().__init__()
        def conv(c_in, c_out, stride):
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.BatchNorm2d(c_out), nn.ReLU())
        self.body = nn.Sequential(conv(channels, 32, 1), conv(32, 64, 2), conv(64, 64, 2),
                                  nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x):
        """x [B, C, H, W] in [-1, 1] -> features [B, FEATURES], logits [B, num_classes]"""
        features = self.body(x)
        return features, self.head(features)


def train_features(data, steps=1500, batch=128, device="cpu"):
    """Train the feature network on the training images, shifted by up to a ninth of their side."""
    rng = seeded(0, 3)
    torch.manual_seed(0)
    images, labels = to_float(data.images), data.labels
    net = FeatureNet(images.shape[1], len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    reach = max(1, images.shape[-1] // 9)
    for _ in range(steps):
        index = torch.randint(len(images), (batch,), generator=rng)
        dy, dx = torch.randint(-reach, reach + 1, (2,), generator=rng).tolist()
        x = F.pad(images[index], (reach,) * 4, mode="replicate")
        x = x[:, :, reach + dy:reach + dy + images.shape[2], reach + dx:reach + dx + images.shape[3]]
        loss = F.cross_entropy(net(x.to(device))[1], labels[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def load_features(data, name, device="cpu"):
    """The feature network for a data set, and 12 hex digits of its SHA-256 to tell figures apart by.

    digits and mnist have theirs in assets/; for other data it is trained once, which takes a
    minute or so, and kept in ~/.cache/dmd2. Raises ValueError if the file in assets/ was changed.
    """
    path = ASSETS / f"features_{name}.pt"
    if name not in SHA256:
        content = hashlib.sha256(data.images.numpy().tobytes() + data.labels.numpy().tobytes())
        path = Path.home() / ".cache" / "dmd2" / f"features_{content.hexdigest()[:16]}.pt"
        if not path.exists():
            print(f"training a feature network for {name}, kept in {path}: figures compare only with "
                  "others of this file", file=sys.stderr)
            write_features(data, path, device)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256.get(name, digest):
        raise ValueError(f"{path}: SHA-256 {digest[:12]} is not {SHA256[name][:12]}; restore the file")
    net = FeatureNet(data.images.shape[1], len(data.classes))
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.to(device).eval().requires_grad_(False), digest[:12]


def write_features(data, path, device="cpu"):
    net = train_features(data, device=device)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(net.cpu().state_dict(), path)
    print(f"wrote {path}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}", file=sys.stderr)


# ---- quality ------------------------------------------------------------------------------------

class Reference(NamedTuple):
    """What images are measured against."""

    net: FeatureNet
    features: torch.Tensor  # [N, FEATURES] of the real training images
    labels: torch.Tensor    # [N] int64, in the same order
    floor: dict             # evaluate() of the held-out real images
    protocol: str


def load_reference(name, data_dir="data", size=32, device="cpu"):
    """Read a data set and its feature network and make the Reference to evaluate against."""
    data, held_out = (load_data(name, split, data_dir, size) for split in ("train", "test"))
    net, digest = load_features(data, name, device)
    order = torch.randperm(len(data.images), generator=seeded(0, 4))  # so that a prefix is a fair sample
    features, _ = extract(net, data.images[order])
    protocol = f"reference {len(features)} training images of {name}, feature network {digest}"
    reference = Reference(net, features, data.labels[order], {}, protocol)
    return reference._replace(floor=dict(evaluate(held_out.images, held_out.labels, reference),
                                         n=len(held_out.images)))


@torch.no_grad()
def extract(net, images, batch=1000):
    """Features [N, FEATURES] and predicted classes [N], on the CPU, of uint8 images [N, C, H, W]."""
    device = next(net.parameters()).device
    outputs = [net(to_float(part.to(device))) for part in images.split(batch)]
    return (torch.cat([f for f, _ in outputs]).cpu(), torch.cat([c.argmax(1) for _, c in outputs]).cpu())


def evaluate(images, label, reference):
    """Quality of images uint8 [N, C, H, W] that were asked to be of the classes label [N].

    returns frechet_distance to the training images, accuracy (share classified as label), precision
    and recall (Kynkäänniemi et al. 2019, k = 3, on equally many real and given images, at most 10000)
    """
    features, predicted = extract(reference.net, images)
    count = min(len(features), len(reference.features), 10000)
    precision, recall = precision_recall(reference.features[:count], features[:count])
    return dict(frechet_distance=frechet_distance(features, reference.features),
                accuracy=(predicted == label.cpu()).double().mean().item(),
                precision=precision, recall=recall)


def frechet_distance(a, b):
    """Fréchet distance of two Gaussians fitted to features a [N, D], b [M, D] (Heusel et al. 2017, Eq. 6).

        |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    in float64; the trace of the root is that of the symmetric C_a^(1/2) C_b C_a^(1/2). Not an FID,
    for the features are not Inception's.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root_trace = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root_trace
    return distance.item()


def precision_recall(real, fake, k=NEIGHBOURS):
    """Share of fake inside the real images' manifold, and of real inside the fake ones'.

    The manifold of features [N, D] is the union of balls, each reaching to the k-th nearest
    neighbour of its centre (Kynkäänniemi et al. 2019, Eqs. 1 and 2).
    """
    def radii(points):  # the nearest is the point itself
        return torch.cat([torch.cdist(part, points).kthvalue(k + 1).values for part in points.split(1000)])

    def share_inside(points, centres):
        reach = radii(centres)
        return torch.cat([(torch.cdist(part, centres) <= reach).any(1)
                          for part in points.split(1000)]).double().mean().item()
    return share_inside(fake, real), share_inside(real, fake)


def measure(sampler, reference, n, seed, batch=256):
    """evaluate() n images of a sampler, of classes in the proportions of the training images."""
    label = reference.labels.repeat(-(-n // len(reference.labels)))[:n]
    return evaluate(generate(sampler, label, seed, batch), label, reference)


def report(sampler, reference, n, seeds, batch=256):
    """Measure a sampler at several seeds; returns figures, floor, their ratio and the protocol as one dict."""
    runs = [measure(sampler, reference, n, seed, batch) for seed in seeds]
    mean = {name: statistics.mean(run[name] for run in runs) for name in runs[0]}
    spread = {name: statistics.stdev(run[name] for run in runs) if len(runs) > 1 else 0.0 for name in runs[0]}
    protocol = (f"{n} samples, {reference.protocol}, {sampler.name}, EMA weights, "
                f"{sampler.evaluations} function evaluations, seeds {min(seeds)} to {max(seeds)}")
    return dict(mean=mean, spread=spread, floor=reference.floor, protocol=protocol,
                ratio_to_floor=mean["frechet_distance"] / reference.floor["frechet_distance"])


def table(result):
    """The text that shows a report() to a person."""
    names = dict(frechet_distance="Fréchet distance", accuracy="classified as asked",
                 precision="precision", recall="recall")
    lines = [f"{'':20} {'samples':>9} {'spread':>8}   real, held out ({result['floor']['n']})"]
    for name, title in names.items():
        lines.append(f"{title:20} {result['mean'][name]:9.4f} {result['spread'][name]:8.4f}   {result['floor'][name]:9.4f}")
    lines.append(f"{'ratio to the floor':20} {result['ratio_to_floor']:9.2f}")
    return "\n".join(lines)


# ---- output -------------------------------------------------------------------------------------

def read_labels(text, classes):
    """Class numbers of "3,3,7", or of class names; ValueError naming the one that is neither."""
    numbers = []
    for word in text.split(","):
        word = word.strip()
        number = classes.index(word) if word in classes else int(word) if word.isdecimal() else -1
        if not 0 <= number < len(classes):
            raise ValueError(f"--labels {text}: {word!r} is no class; there are 0 to {len(classes) - 1} "
                             f"({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''})")
        numbers.append(number)
    return torch.tensor(numbers)


def write_images(images, label, classes, out):
    """Write uint8 images [N, C, H, W] as a grid (.png), arrays (.npz), or one PNG each in a folder."""
    out = Path(out)
    if out.suffix == ".png":
        groups = [(classes[c], images[label == c]) for c in label.unique().tolist()]
        width = max(len(group) for _, group in groups)
        rows = [F.pad(group, (0, 0) * 3 + (0, width - len(group)), value=255) for _, group in groups]
        save_grid(torch.stack(rows), [name for name, _ in groups], out)
        return
    pixels = images.permute(0, 2, 3, 1).numpy()
    if out.suffix == ".npz":
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out, images=pixels, labels=label.numpy())
        return
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, c) in enumerate(zip(pixels, label.tolist())):
        Image.fromarray(image.squeeze()).save(out / f"{i:05d}_{c}.png")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--train-features"]:  # makes assets/; not for users, so not an option
        name, data_dir = (argv[1:] + ["data"])[:2]
        return write_features(load_data(name, "train", data_dir), ASSETS / f"features_{name}.pt")
    cfg = parse(Config, argv, __doc__)
    sampler = load_sampler(cfg.checkpoint, cfg.steps, pick_device(cfg.device))
    classes = tuple(sampler.data["classes"])
    if cfg.evaluate:
        reference = load_reference(sampler.data["name"], cfg.data_dir or sampler.data["data_dir"],
                                   sampler.data["size"], sampler.device)
        result = report(sampler, reference, cfg.n or 10000, range(cfg.seed, cfg.seed + cfg.seeds), cfg.batch)
        print(table(result), json.dumps(result), sep="\n")
        return
    label = read_labels(cfg.labels, classes) if cfg.labels else torch.arange(cfg.n or 10 * len(classes))
    label = label[torch.arange(cfg.n or len(label)) % len(label)] % len(classes)
    out = cfg.out or "samples.png"
    write_images(generate(sampler, label, cfg.seed, cfg.batch), label, classes, out)
    print(f"wrote {len(label)} images to {out}")


if __name__ == "__main__":
    run_script(main)
