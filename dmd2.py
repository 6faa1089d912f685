"""Distil a teacher into a generator of one or a few steps by distribution matching (DMD2).

    python dmd2.py --teacher runs/teacher/teacher.pt

Two copies of the teacher are trained. One is the generator, which maps noise to an image in one
step. The other is the fake score: as the teacher is a denoiser of the real images, it is kept a
denoiser of the generator's. Where the two denoisers disagree about one of its images, the
generator is moved towards the teacher's estimate (Yin et al., "One-step Diffusion with Distribution
Matching Distillation", 2023: DMD). DMD2 ("Improved Distribution Matching Distillation for Fast
Image Synthesis", 2024) adds a discriminator, which knows real images, the two time-scale rule, and
generators of several steps. In reading order: options, the distribution-matching loss, the GAN,
the generator's steps, DMD's regression loss, pictures, what happens between steps, training.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from sample import (BATCH, EVALUATE_AT_LEAST, TITLES, few_step, generator_sampler, guided,
                    load_images, load_reference, measure, name_of, open_checkpoint, steps_of,
                    summary, teacher_sampler)
from teacher import (GENERATOR, PREDICTIONS, SIGMA_MAX, SIGMA_MIN, TRAINED_STEP, Descent, Draw, Log,
                     TrainingOptions, arg, batch_at, build, check_batch, check_out, check_resumed,
                     codec_of, due, encoded, filled, flag, frozen, group_norm, load, load_folder,
                     lowest_quantile, make_run_folder, not_finite, older, parse, parts_of,
                     pick_device, prepare, progress, quantile_of, rank_0_first, rate_at, read,
                     restore, run_script, save, save_grid, seeded, shape_of, sigma_at, tell,
                     to_uint8, training_batches, training_steps, unit_error, unit_noise, update_ema)

# What of dmd2.py depends on the data: it fills the options that were not given.
RECIPES = {
    "digits": dict(batch=128, steps=1000, lr=4e-4, decay_after=300, fake_lr=1e-3, fake_steps=2,
                   ema=0.99, dm_range="0.02,0.6"),
    "mnist": dict(batch=256, steps=20000, lr=2e-4, fake_lr=4e-4, fake_steps=2, ema=0.999),
    "cifar10": dict(batch=256, steps=100000, lr=5e-5, fake_lr=1e-4, fake_steps=5, ema=0.999),
    "folder": dict(batch=64, steps=20000, lr=5e-5, fake_lr=1e-4, fake_steps=5, ema=0.999),
}
RECIPES["fashion"] = RECIPES["mnist"]
RECIPES["latents"] = RECIPES["digits"]  # whatever the data

# What depends on the teacher's prediction, where the data don't say otherwise: the level at which
# generators begin, and those of distribution matching. An eps network's error counts sigma-fold in
# x0_hat, so at 80 it is no use in one step.
RANGES = dict.fromkeys(PREDICTIONS, dict(conditioning_sigma=SIGMA_MAX, dm_range="0.02,0.98"))
RANGES["eps"] = dict(conditioning_sigma=2.0, dm_range="0.02,0.6")

# Other noise than `sample.py --evaluate` takes: to choose the best by, and for the pairs.
EVALUATION_SEED, PAIRS_SEED = 1_000_000, 2_000_000
RECALL_SHARE = 0.97  # of the teacher's recall: below it a generator is not the best of a run
INHERITED = ("network", "prediction", "schedule", "autoencoder", "data")  # from a teacher


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions):
    """Options of dmd2.py; those left at None take their values from RECIPES."""

    teacher: str = arg(None, "checkpoint to distil, of teacher.py or of NVlabs/edm (.pkl)",
                       free=True)
    data: str = arg(None, "what images an EDM checkpoint was trained on, such as cifar10 or a "
                          "folder; or where a folder is now, if it was moved")
    out: str = arg("runs/dmd2", "folder of the run", free=True)
    fake_steps: int = arg(None, "updates of the fake score per update of the generator: the two "
                                "time-scale rule (default: by data)", at_least=1)
    lr: float = arg(None, "learning rate of the generator (default: by data)", at_least=0, below=1)
    fake_lr: float = arg(None, "learning rate of the fake score (default: by data)", at_least=0,
                         below=1)
    conditioning_sigma: float = arg(None, "noise level at which the generator begins (default: "
                                          "by the teacher's prediction)",
                                    at_least=SIGMA_MIN, at_most=SIGMA_MAX)
    student_steps: int = arg(1, "steps in which the generator makes an image", (1, 2, 4))
    backward_simulation: bool = arg(True, "with several steps: train each on what the steps before "
                                          "it make of noise, not on real images with noise")
    dm_weight: float = arg(1.0, "weight of the distribution-matching loss; 0 for the GAN only",
                           at_least=0)
    dm_range: str = arg(None, "noise levels of the distribution-matching loss, as quantiles of the "
                              "karras schedule (default: by data and the teacher's prediction)")
    fake_weight: float = arg(1.0, "weight of the fake score's loss", at_least=0)
    fake_range: str = arg("0,1", "noise levels of the fake score's loss, likewise")
    guidance: float = arg(1.0, "classifier-free guidance of the teacher; 1 is none", at_least=0)
    gan_weight: float = arg(0.001, "weight of the generator's GAN loss; 0 turns the GAN off",
                            at_least=0)
    gan_features: str = arg("fake", "whose encoder the discriminator sees by: the fake score's, "
                                    "which it then trains too, or the frozen teacher's",
                            ("fake", "teacher"))
    gan_noise: bool = arg(True, "show the discriminator images with noise (diffusion GAN)")
    gan_range: str = arg("0,1", "noise levels of the discriminator's images, likewise")
    discriminator_weight: float = arg(0.01, "weight of the discriminator's loss beside the fake "
                                            "score's, with which it shares an encoder",
                                      at_least=0)
    regression_weight: float = arg(0.0, "weight of DMD's regression loss, on pairs of noise and "
                                        "the teacher's image (of one step only); 0 turns it off",
                                   at_least=0)
    regression_distance: str = arg("mse", "distance of the regression loss; lpips needs its "
                                          "package, which downloads VGG's weights",
                                   ("mse", "lpips"))
    pairs: int = arg(10000, "pairs for the regression loss, made before training and kept in the "
                            "run's folder", at_least=1)
    init_from: str = arg(None, "generator.pt whose generator and fake score to start from, in "
                               "place of the teacher: a second stage")
    evaluate_every: int = arg(200, "steps between evaluations, the best of which is kept; 0 for "
                                   "none", at_least=0)
    evaluate_n: int = arg(2000, "images per evaluation", at_least=EVALUATE_AT_LEAST)

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None:
            raise ValueError("--teacher is missing: give a checkpoint of teacher.py, such as "
                             "runs/teacher/teacher.pt")
        if not (self.dm_weight or self.gan_weight or self.regression_weight):
            raise ValueError("--dm-weight 0: nothing is left to train the generator by; give a "
                             "--gan-weight or a --regression-weight")
        if self.dm_weight and not self.fake_weight:
            raise ValueError("--fake-weight 0: the distribution-matching loss needs a fake score "
                             "that learns; give --dm-weight 0 too")
        if self.gan_weight and not self.discriminator_weight:
            raise ValueError("--discriminator-weight 0: the GAN needs a discriminator that learns; "
                             "give --gan-weight 0 too")
        if self.student_steps == 1 and not self.backward_simulation:
            raise ValueError("--no-backward-simulation: is for generators of several steps; give "
                             "--student-steps 2 or 4")
        if self.regression_weight and self.student_steps > 1:
            raise ValueError(f"--student-steps {self.student_steps}: the regression loss is for "
                             "generators of one step; leave out --regression-weight")
        if self.regression_weight and self.batch is not None and self.pairs < self.batch:
            raise ValueError(f"--pairs {self.pairs}: must be at least --batch, {self.batch}")
        for name in ("dm_range", "fake_range", "gan_range"):
            text = getattr(self, name)
            try:
                low, high = interval(text or "0,1")
                valid = 0 <= low <= high <= 1
            except ValueError:
                valid = False
            if not valid:
                raise ValueError(f"{flag(name)} {text}: needs two numbers from 0 to 1, the smaller "
                                 "one first, such as 0.02,0.98")


def interval(text):
    """The two numbers of an option such as 0.02,0.98."""
    low, high = map(float, text.split(","))
    return low, high


# ---- distribution matching ----------------------------------------------------------------------

@torch.no_grad()
def dmd_gradient(teacher, fake_score, x0, sigma, label, noise):
    """Direction that lowers KL(generator || teacher) when subtracted from x0 (DMD's gradient).

        gradient = (fake_score(x) - teacher(x)) / mean|x0 - teacher(x)|,   x = x0 + sigma * noise

    x0, noise  [B, C, H, W]  the generator's images, whose graph is not used; standard normal
    sigma      [B]           one level per image, in [SIGMA_MIN, SIGMA_MAX]
    label      [B]           the classes x0 was generated for, int64
    returns [B, C, H, W], of order 1 per image; exactly 0 where fake_score equals teacher

    A value that is not finite is left so: Log stops the run at it.
    """
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    real, fake = teacher(x, sigma, label), fake_score(x, sigma, label)
    scale = (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (fake - real) / scale.clamp(min=1e-6)  # 0 if the teacher leaves x0 as it is


def dmd_loss(teacher, fake_score, x0, sigma, label, noise):
    """Loss whose gradient in x0 is dmd_gradient / x0.numel(); its value says nothing of quality."""
    gradient = dmd_gradient(teacher, fake_score, x0, sigma, label, noise)
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


# ---- GAN: a discriminator tells the generator about real images ----------------------------------

class Discriminator(nn.Module):
    """Tells real images from generated ones by what a denoiser's encoder makes of them (DMD2).

    denoiser  the fake score, whose encoder this loss then trains too, or the frozen teacher

    The head halves the side of the features until it is 4 at most, and then takes in all of it.
    """

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, (channels, side) = denoiser, denoiser.net.bottleneck

        def layer(size, **options):
            return [nn.Conv2d(channels, channels, size, **options), group_norm(channels), nn.SiLU()]

        layers = []
        while side > 4:
            layers += layer(4, stride=2, padding=1)
            side //= 2
        self.head = nn.Sequential(*layers, *layer(side), nn.Conv2d(channels, 1, 1), nn.Flatten(0))

    def forward(self, x, sigma, label):
        """x [B, C, H, W], sigma [B], label [B] int64 -> logits [B], positive for real"""
        return self.head(self.denoiser.features(x, sigma, label))


def diffused(x0, draw, quantiles):
    """Images with noise, drawn anew, as fake score and discriminator see them (diffusion GAN).

    x0         [B, C, H, W]
    quantiles  the range of the levels, of the karras schedule; None for images without noise
    returns x [B, C, H, W] and its noise level sigma [B]
    """
    if quantiles is None:
        return x0, x0.new_full(x0.shape[:1], SIGMA_MIN)
    sigma = sigma_at(draw.uniform(*quantiles), "karras")
    return x0 + sigma.view(-1, 1, 1, 1) * draw.normal(), sigma


def generator_loss(fake_logits):
    """Non-saturating GAN loss of the generator, of the logits [B] of its images.

    As in the official code a mean over images, where dmd_loss is a mean over values. So weighted,
    the published weights lie near each other, from 1e-3 (FastGen, 3,072 values an image) to 5e-3
    (DMD2, 65,536), and not far from the best for the digits' 64 values; a weight per value would
    have to change a hundredfold and more.
    """
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits):
    """GAN loss of the discriminator, of its logits [B]; 2 ln 2 if it can't tell real from fake."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


# ---- the steps of a generator --------------------------------------------------------------------

def generator_sigmas(steps, highest=SIGMA_MAX):
    """Noise levels at evenly spread quantiles of the karras schedule up to `highest`.

    Of 4 up to 80: 80, 17.5, 2.52, 0.170, as DMD2 spreads its timesteps, 999, 749, 499, 249.
    """
    u = quantile_of(highest) * torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return sigma_at(u, "karras").tolist()


def trained_step(count, seed, step):
    """Which of a generator's `count` steps a training step is about, from 0.

    One for the whole batch and on every GPU (DMD2's backward simulation, with and without).
    """
    return torch.randint(count, (), generator=seeded(TRAINED_STEP, seed, step)).item()


def step_input(generator, sigmas, k, label, draw, real=None):
    """What to train step k of a generator on, counted from 0.

    The first step is trained on noise. Any other on what it will see when images are sampled: the
    result of the steps before it, with fresh noise (DMD2's backward simulation; no gradient reaches
    those steps). Given real images [B, C, H, W] in [-1, 1], on these with noise.

    returns x [B, C, H, W] and its noise level [B], sigmas[k]
    """
    first, *noises = (draw.normal() for _ in range(k + 1))
    x = sigmas[0] * first
    if k > 0:
        with torch.no_grad():
            x0 = few_step(generator, x, sigmas[:k], label, noises[:-1]) if real is None else real
        x = x0 + sigmas[k] * noises[-1]
    return x, x.new_full(x.shape[:1], sigmas[k])


# ---- regression: DMD's loss, on pairs of noise and the teacher's image of it --------------------

class Pairs(NamedTuple):
    """Noise, and the images (or latents) that a teacher's deterministic sampler makes of it."""

    noise: torch.Tensor   # [N, C, H, W] standard normal
    label: torch.Tensor   # [N] int64
    images: torch.Tensor  # [N, C, H, W] float32

    def batch(self, update, size, seed, part=slice(None)):
        """Noise, labels and images of an update: `part` of a batch of `size`."""
        index = batch_at(update, len(self.label), size, seed, self.label.device)[part]
        return tuple(tensor[index] for tensor in self)


def load_pairs(sampler, teacher_sha256, count, path):
    """The pairs of a teacher's sampler: from the file at path if they are its, else made and kept.

    Raises OSError if the file can't be written, FloatingPointError if an image is not finite.
    """
    data, device = sampler.data, sampler.device
    origin = dict(teacher_sha256=teacher_sha256, sampler=sampler.name, count=count)
    noise = unit_noise(count, sampler.shape, PAIRS_SEED)
    label = torch.arange(count) % len(data["classes"])

    def accepts(stored):
        images = stored["images"]
        return (stored["origin"] == origin and images.shape == noise.shape
                and images.dtype == noise.dtype and not not_finite(images))

    stored = None
    if path.exists():
        try:
            stored = read(path, accepts)
        except ValueError:
            tell(f"{path}: of another teacher or setting, or damaged; making the pairs anew",
                 error=True)
    if stored is None:
        parts = list(zip(noise.split(BATCH), label.split(BATCH)))
        images = [sampler.x0(iter([z.to(device)]), c.to(device)).cpu()
                  for z, c in progress(parts, "pairs")]
        stored = dict(origin=origin, images=torch.cat(images))
        if not_finite(stored):
            raise FloatingPointError("the teacher's images for the regression loss are not finite")
        save(stored, path)
    return Pairs(*(part.to(device) for part in (noise, label, stored["images"])))


def regression_loss(generator, sigma, noise, label, images, distance=F.mse_loss):
    """Distance of one-step images from those a teacher's sampler made of the same noise (DMD).

    noise, images [B, C, H, W], label [B] int64; sigma, a float, the generator's noise level
    """
    return distance(few_step(generator, sigma * noise, [sigma], label), images)


def distance_function(name, device):
    """mse or lpips of two batches of x0 [B, C, H, W]; ValueError if it is not to be had.

    LPIPS (Zhang et al. 2018) is of images in [-1, 1], by VGG, at 224 x 224, as DMD has it.
    """
    if name == "mse":
        return F.mse_loss
    try:
        import lpips
        net = lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    except ImportError as error:
        raise ValueError("--regression-distance lpips: the lpips package is not installed; pip "
                         "install lpips, or use mse") from error
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--regression-distance lpips: its weights can't be had ({error}); "
                         "use mse") from error

    def distance(a, b):
        a, b = (F.interpolate(x.expand(-1, 3, -1, -1), size=(224, 224), mode="bilinear")
                for x in (a, b))
        return net(a, b).mean()
    return distance


# ---- pictures -----------------------------------------------------------------------------------

@torch.no_grad()
def save_estimates(teacher, fake_score, sampler, sigmas, path, pairs=None, columns=10):
    """The generator's images, the same with noise, and what teacher and fake score make of that.

    With pairs also the generator's images of their noise, and the teacher's. Latents are decoded.
    """
    generator, device = sampler.denoiser, sampler.device
    columns = min(columns, len(pairs.label)) if pairs else columns
    *noise, last = unit_noise(columns, (len(sigmas) + 1, *sampler.shape), 0).to(device).unbind(1)
    label = torch.arange(columns, device=device) % len(sampler.data["classes"])
    sigma = sigma_at(torch.linspace(0.15, 0.75, columns, device=device), "karras")
    x0 = few_step(generator, sigmas[0] * noise[0], sigmas, label, noise[1:])
    x = x0 + sigma.view(-1, 1, 1, 1) * last
    rows = {"generated x0": x0, "x0 + sigma noise = x": x, "teacher(x)": teacher(x, sigma, label),
            "fake score(x)": fake_score(x, sigma, label)}
    if pairs:
        ref, label, y_ref = (part[:columns] for part in pairs)
        rows["G(z_ref)"] = few_step(generator, sigmas[0] * ref, sigmas, label)
        rows["y_ref, teacher's"] = y_ref
    titles = [f"{s:.2g}" for s in sigma.tolist()]
    images = torch.stack([sampler.decode(row) for row in rows.values()])
    save_grid(to_uint8(images), list(rows), path, titles)


# ---- what happens between the steps -------------------------------------------------------------

class Keeper:
    """Evaluates, pictures, saves and resumes a run; generator.pt is the best of its EMA generators.

    networks  what a resumed run needs besides the EMA: networks and optimizers by name
    images    how many real ones it is trained on; None where no option needs them
    """

    def __init__(self, cfg, parent, teacher, ema, sigmas, networks, images):
        self.cfg, self.teacher, self.ema, self.images = cfg, teacher, ema, images
        self.sigmas, self.networks, self.out = sigmas, networks, Path(cfg.out)
        self.device = next(teacher.parameters()).device
        self.inherited = dict({name: parent[name] for name in INHERITED}, sigmas=sigmas)
        self.sampler = generator_sampler(ema, self.inherited, self.device)
        self.teacher_sha256 = hashlib.sha256(Path(cfg.teacher).read_bytes()).hexdigest()
        self.figures = self.best = self.teacher_figures = self.reference = None
        self.start = self.resume() if cfg.resume else 0
        sampler = teacher_sampler(teacher, parent, self.device)
        if cfg.evaluate_every:
            self.reference = load_reference(parent["data"], cfg.data_dir, self.device, cfg.stream)
            self.teacher_figures = self.measure(sampler)
        self.pairs = None
        if cfg.regression_weight:
            with rank_0_first():
                self.pairs = load_pairs(sampler, self.teacher_sha256, cfg.pairs,
                                        self.out / "pairs.pt")

    def measure(self, sampler):
        """evaluate() at this run's number of samples, and what they were compared with."""
        n = self.cfg.evaluate_n
        return dict(measure(sampler, self.reference, n, EVALUATION_SEED),
                    protocol=f"{n} samples, {self.reference.protocol}")

    def resume(self):
        """Restore networks and optimizers from --resume; returns the step to go on at."""
        checkpoint = load(self.cfg.resume, resume=True)
        if checkpoint.get("teacher_sha256") != self.teacher_sha256:
            raise ValueError(f"--teacher {self.cfg.teacher}: not the one that the run in "
                             f"{self.cfg.resume} began with, for it has been trained further; give "
                             f"that one, such as {older(self.cfg.teacher, 1)}, if it was kept")
        data = self.inherited["data"]
        if tuple(checkpoint["data"]["classes"]) != tuple(data["classes"]):
            raise ValueError(f"--data {data['name']}: has other classes than {self.cfg.resume} "
                             "began with; restore them, or start a new run")
        restore(dict(self.networks, ema=self.ema),
                dict(checkpoint["training"], ema=checkpoint["model"]), self.cfg.resume)
        check_resumed(checkpoint, self.cfg, self.images, data["name"])
        self.best = self.best_there()
        return checkpoint["step"]

    def best_there(self):
        """The figures of the generator.pt in the run's folder; None if it is none, or unmeasured.

        It may be of a later step than the checkpoint to go on from, and is not to be lost then.
        """
        path = self.out / "generator.pt"
        try:
            figures = (load(path)["figures"] or {}) if path.exists() else {}
        except ValueError as error:
            tell(f"{error}; the next one evaluated replaces it", error=True)
            return None
        kinds = dict(dict.fromkeys(TITLES, float), step=int)
        fit = all(type(figures.get(k)) is kinds[k] and math.isfinite(figures[k]) for k in kinds)
        return figures if fit else None

    def begin(self, log):
        """Tell what is distilled; and the teacher's figures, to compare the generator's with."""
        name, images = self.inherited["data"]["name"], self.images or "no"
        log.say(f"{name}: {images} real images to train on; on {self.device}; {self.cfg.steps} "
                f"steps, written to {self.out}")
        if self.reference and self.start == 0:
            log.write(0, **{f"teacher_{name}": self.teacher_figures[name] for name in TITLES})
            log.say(f"teacher: {summary(self.teacher_figures)}")

    def after(self, step, log):
        """Do whatever is due after a step, counted from 0."""
        cfg = self.cfg
        if due(step, cfg.evaluate_every, cfg.steps):
            log.check()
            self.figures = dict(self.measure(self.sampler), step=step + 1)
            log.write(step + 1, **{name: self.figures[name] for name in TITLES})
            log.say(f"step {step + 1}: {summary(self.figures)}")
            if not self.best or self.merit(self.figures) > self.merit(self.best):
                self.best = self.figures
                self.save_generator(step + 1)
        if due(step, cfg.sample_every, cfg.steps):
            with torch.compiler.set_stance("force_eager"):  # its batch is of another size
                save_estimates(self.teacher, self.networks["fake_score"], self.sampler, self.sigmas,
                               self.out / f"samples_{step + 1:06d}.png", self.pairs)

    def write_checkpoint(self, step):
        """Write last.pt, of so many steps done, and without evaluations generator.pt, too."""
        if not self.cfg.evaluate_every:
            self.save_generator(step)
        training = {name: network.state_dict() for name, network in self.networks.items()}
        path = self.out / "last.pt"
        save(dict(self.checkpoint(step), training=dict(training, images=self.images)), path,
             self.cfg.keep)
        return path

    def merit(self, figures):
        """Sorts generators: those of about the teacher's recall first, by Fréchet distance.

        By the distance alone a generator would be preferred that makes fewer kinds of images well.
        """
        recall = min(figures["recall"], RECALL_SHARE * self.teacher_figures["recall"])
        return recall, -figures["frechet_distance"]

    def save_generator(self, step):
        """Write generator.pt; the fake score goes along, for a second stage to begin with."""
        fake_score = self.networks["fake_score"].state_dict()
        save(dict(self.checkpoint(step), fake_score=fake_score), self.out / "generator.pt")

    def checkpoint(self, step):
        """The EMA generator, its figures if this step was evaluated, and where it comes from."""
        evaluated = self.figures is not None and self.figures["step"] == step
        return dict(self.inherited, kind="generator", config=dataclasses.asdict(self.cfg),
                    step=step, figures=self.figures if evaluated else None, best=self.best,
                    teacher_figures=self.teacher_figures,
                    teacher_sha256=self.teacher_sha256, model=self.ema.state_dict())

    def end(self):
        """Say which file holds what, and which step its figures are of."""
        if self.best:
            for name, title, figures in (("generator.pt", "best", self.best),
                                         ("last.pt", "last", self.figures)):
                tell(f"{self.out / name}: the {title}, step {figures['step']}: {summary(figures)}")
        else:
            tell(f"{self.out / 'generator.pt'}: the last, not measured")


# ---- training -----------------------------------------------------------------------------------

def read_teacher(cfg):
    """The checkpoint of --teacher and the config that its data fill; ValueError if it is unfit."""
    if cfg.resume and not Path(cfg.teacher).exists():
        raise ValueError(f"--teacher {cfg.teacher}: from which {cfg.resume} was distilled, is not "
                         "there; give its new place")
    parent = open_checkpoint(cfg.teacher, cfg.data, cfg.data_dir)
    if parent["kind"] != "teacher":
        raise ValueError(f"--teacher {cfg.teacher}: holds a {parent['kind']}; give a checkpoint of "
                         "teacher.py")
    name = name_of(parent["data"], cfg.teacher)
    check_out(cfg, cfg.teacher, cfg.init_from)
    if parent["autoencoder"] and cfg.regression_weight and cfg.regression_distance == "lpips":
        raise ValueError("--regression-distance lpips: is of images, and this teacher makes "
                         "latents; use mse")
    kind = "latents" if parent["autoencoder"] else name if name in RECIPES else "folder"
    return parent, filled(cfg, RANGES[parent["prediction"]], RECIPES[kind])


def initial(cfg, parent, device):
    """Generator and fake score to begin with: two copies of the teacher, or --init-from's.

    Of these the generator is the EMA. Raises ValueError if they are not of this teacher's kind.
    """
    source, names = parent, ("model", "model")
    if cfg.init_from and not cfg.resume:
        source = open_checkpoint(cfg.init_from, cfg.data, cfg.data_dir)
        names = "model", "fake_score"
        if "fake_score" not in source:
            raise ValueError(f"--init-from {cfg.init_from}: holds no fake score to start from; "
                             "give a generator.pt of dmd2.py (last.pt is for --resume)")
        a, b = (dict(c, data=dict(c["data"], data_dir=None)) for c in (source, parent))
        for part in ("network", "prediction", "data"):
            if a[part] != b[part]:
                raise ValueError(f"--init-from {cfg.init_from}: has another {part} than --teacher "
                                 f"{cfg.teacher}; give a generator distilled from its kind")
        a, b = ((c["autoencoder"] or dict(model={}))["model"] for c in (source, parent))
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            raise ValueError(f"--init-from {cfg.init_from}: is of another autoencoder's latents "
                             f"than --teacher {cfg.teacher}; give a generator distilled from a "
                             "teacher of the same autoencoder.pt")
        if len(source["sigmas"]) != cfg.student_steps:
            raise ValueError(f"--init-from {cfg.init_from}: is a generator of "
                             f"{steps_of(len(source['sigmas']))}; give --student-steps "
                             f"{len(source['sigmas'])}")
        if abs(source["sigmas"][0] / cfg.conditioning_sigma - 1) > 1e-6:
            raise ValueError(f"--init-from {cfg.init_from}: begins at another noise level; give "
                             f"--conditioning-sigma {source['sigmas'][0]:g}")
    try:
        return tuple(build(dict(source, model=source[name]), device).requires_grad_(True)
                     for name in names)
    except ValueError as error:  # of the fake score, which no other script reads
        raise ValueError(f"--init-from {cfg.init_from}: {error}") from error


def load_real(cfg, parent, device):
    """The teacher's training data, as its x0; None where no option needs them.

    Raises ValueError if they are fewer than a batch or others now, OSError if they are missing.
    """
    if not cfg.gan_weight and cfg.backward_simulation:
        return None
    facts = parent["data"]
    real = load_images(facts, "train", cfg.data_dir, cfg.stream)._replace(flip=facts["flip"])
    check_batch(cfg.batch, real, facts["name"])
    return encoded(real, codec_of(parent["autoencoder"], device), device)


def weighted(losses, weights):
    """The sum of losses, each times the weight of its name."""
    return sum(weights[name] * loss for name, loss in losses.items())


def train(cfg):
    """Distil; returns the path of the generator's checkpoint."""
    device, (parent, cfg) = pick_device(cfg.device), read_teacher(cfg)
    parts, sigmas = parts_of(cfg), generator_sigmas(cfg.student_steps, cfg.conditioning_sigma)
    num_classes, shape = len(parent["data"]["classes"]), shape_of(parent["network"])
    distance = distance_function(cfg.regression_distance, device) if cfg.regression_weight else None
    lowest = lowest_quantile(parent["schedule"])
    dm_range, fake_range, gan_range = ([max(lowest, u) for u in interval(text)] for text in
                                       (cfg.dm_range, cfg.fake_range, cfg.gan_range))
    gan_range = gan_range if cfg.gan_noise else None
    # The discriminator may see the generator's images in the pass by which the fake score learns.
    shares_pass = cfg.gan_features == "fake" and gan_range == fake_range
    weights = dict(dmd_loss=cfg.dm_weight, gan_loss=cfg.gan_weight, fake_loss=cfg.fake_weight,
                   discriminator_loss=cfg.discriminator_weight,
                   regression_loss=cfg.regression_weight)

    teacher, (generator, fake_score) = build(parent, device), initial(cfg, parent, device)
    ema = frozen(generator)
    torch.manual_seed(cfg.seed)
    discriminator = Discriminator(teacher if cfg.gan_features == "teacher" else fake_score)
    discriminator.to(device)
    adamw = functools.partial(torch.optim.AdamW, weight_decay=0.01, fused=device.type != "mps")
    generator_descent = Descent(adamw(generator.parameters()), cfg, device, "generator_")
    fake_descent = Descent(adamw([*fake_score.parameters(), *discriminator.head.parameters()]), cfg,
                           device, "fake_")
    guide = guided(teacher, cfg.guidance, parent, cfg.teacher)
    real_data = load_real(cfg, parent, device)
    networks = dict(generator=generator, fake_score=fake_score, head=discriminator.head,
                    generator_descent=generator_descent, fake_descent=fake_descent)
    keeper = Keeper(cfg, parent, guide, ema, sigmas, networks,
                    len(real_data.labels) if real_data else None)
    # Only now: the keeper has measured the teacher and made its pairs in float32. ema stays so.
    prepare(cfg, device, teacher, generator, fake_score)
    log = Log(cfg, keeper.start, make_run_folder(cfg))
    keeper.begin(log)
    real_batches = (training_batches(real_data, keeper.start, cfg, parts, device) if real_data else
                    itertools.repeat((None, None)))
    load_folder.cache_clear()  # what is left of it is in `real_data`
    roles = dict(teacher=teacher, generator=generator, fake_score=fake_score,
                 discriminator=discriminator)

    for step in training_steps(keeper.start, cfg, device, roles, log, keeper.write_checkpoint):
        update_generator = step % cfg.fake_steps == 0  # DMD2's two time-scale update rule
        update, k = step // cfg.fake_steps, trained_step(len(sigmas), cfg.seed, step)
        for part in parts:
            draw = Draw(GENERATOR, cfg.seed, step, cfg.batch, shape, device, part)
            real, real_label = next(real_batches)
            label = draw.label(num_classes)
            given, label = (None, label) if cfg.backward_simulation else (real, real_label)
            x, sigma = step_input(generator, sigmas, k, label, draw, given)
            with torch.set_grad_enabled(update_generator):
                x0 = generator(x, sigma, label)

            # Generator: move its samples along the distribution-matching gradient, and to where
            # the discriminator takes them for real ones.
            if update_generator:
                losses = {}
                if cfg.dm_weight:
                    sigma, noise = sigma_at(draw.uniform(*dm_range), "karras"), draw.normal()
                    losses["dmd_loss"] = dmd_loss(guide, fake_score, x0, sigma, label, noise)
                if cfg.gan_weight:
                    logits = discriminator(*diffused(x0, draw, gan_range), label)
                    losses["gan_loss"] = generator_loss(logits)
                if cfg.regression_weight:
                    pairs = keeper.pairs.batch(update, cfg.batch, cfg.seed, part)
                    losses["regression_loss"] = regression_loss(generator, sigmas[0], *pairs,
                                                                distance)
                generator_descent.add(weighted(losses, weights))
                log.note(**losses)

            # Fake score: a teacher's loss, on the generator's samples, at every step.
            # Discriminator: real images from generated ones.
            x0 = x0.detach()
            x, sigma = diffused(x0, draw, fake_range)
            x0_hat, features = fake_score.estimate(x, sigma, label)
            losses = dict(fake_loss=unit_error(fake_score.prediction, x0_hat, x0, sigma))
            if cfg.gan_weight:
                real_logits = discriminator(*diffused(real, draw, gan_range), real_label)
                fake_logits = (discriminator.head(features) if shares_pass else
                               discriminator(*diffused(x0, draw, gan_range), label))
                losses["discriminator_loss"] = discriminator_loss(real_logits, fake_logits)
            fake_descent.add(weighted(losses, weights))
            log.note(**losses)

        if update_generator:
            rate = rate_at(update, cfg.lr, cfg.warmup, cfg.decay_after)
            log.note(**generator_descent.step(rate))
            update_ema(ema, generator, cfg.ema, update)
        rate = rate_at(step, cfg.fake_lr, cfg.warmup)
        log.note(**fake_descent.step(rate))
        log.step()
        keeper.after(step, log)
    log.close()
    if not cfg.profile:
        keeper.end()
    return keeper.out / "generator.pt"


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    path = train(cfg)
    if not cfg.profile:
        tell(f"next: python sample.py {path}   or   python export.py {path}")


if __name__ == "__main__":
    run_script(main)
