"""Distil a teacher into a generator of one or a few steps by distribution matching (DMD2).

    python dmd2.py --teacher runs/teacher/teacher.pt
    python dmd2.py --teacher stable-diffusion-v1-5 --prompts prompts.txt --lora 64

Two copies of the teacher are trained. One is the generator, which maps noise to an image in one
step. The other is the fake score: as the teacher is a denoiser of the real images, it is kept a
denoiser of the generator's. Where the two denoisers disagree about one of its images, the
generator is moved along the difference, teacher's minus fake score's (Yin et al., "One-step
Diffusion with Distribution Matching Distillation", 2023: DMD). DMD2 ("Improved Distribution
Matching Distillation for Fast Image Synthesis", 2024) adds a discriminator, which knows real
images, the two time-scale rule, and generators of several steps. Before all this a generator may
learn some of the teacher's own images (DMD's regression loss), for distribution matching is slow
to find kinds of images that it does not make at first.
"""

import copy
import dataclasses
import functools
import itertools
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sample import (FIRST, TITLES, EvaluationOptions, batch_of, build_any, digest_of, few_step,
                    generator_sigmas, generator_timesteps, guided, is_xl, load_captioned,
                    load_images, load_reference, make_sampler, measure, open_checkpoint, shard,
                    with_adapter, write_student)
from teacher import (GENERATOR, HEUN_STEPS, SCHEDULES, SIGMA_MAX, SIGMA_MIN, TRAINED_STEP, Descent,
                     Draw, Run, TrainingOptions, __version__, arg, batch_at, build, clamped, due,
                     encoded, fresh_noise, group_norm, heun, load, parse, parts_of, pick_device,
                     prepare, progress, quantile_of, rank, rank_0_first, ranks, rate_at, recipe_of,
                     run_script, sampling_sigmas, save, save_grid, seeded, shape_of, start_scale,
                     tell, to_uint8, training_batches, unit_error, update_ema)

# What of dmd2.py depends on the data: it fills the options that were not given.
RECIPES = {
    "digits": dict(batch=64, pairs=5000, regression_steps=1000, regression_weight=1.0, steps=2000,
                   lr=2e-4, decay_after=150, fake_lr=4e-3, fake_steps=4, ema=0.99, gan_weight=0.0,
                   noise_std=0.95, dm_range="0.02,0.6", evaluate_every=1000),
    "cifar10": dict(batch=256, steps=100000, lr=5e-5, fake_lr=1e-4, fake_steps=5, ema=0.999,
                    save_every=5000, sample_every=5000, evaluate_every=5000),
    "folder": dict(batch=64, steps=20000, lr=5e-5, fake_lr=1e-4, fake_steps=5, ema=0.999,
                   save_every=1000, sample_every=1000, evaluate_every=1000),
}
RECIPES["digits-best"] = dict(RECIPES["digits"], batch=32, pairs=8000, regression_steps=3600,
                              steps=9000, lr=4e-4, decay_after=810, fake_lr=3e-3,
                              evaluate_every=3000)
RECIPES["mnist"] = dict(RECIPES["digits"], batch=256, pairs=24000, regression_steps=1600,
                        regression_weight=0.1, steps=7200, lr=4e-4, decay_after=840, fake_lr=1.5e-3,
                        ema=0.995, save_every=1600, sample_every=1600, evaluate_every=1600)
RECIPES["mnist-cpu"] = dict(RECIPES["digits-best"], pairs=4000, regression_steps=2000,
                            regression_weight=0.25, decay_after=1200, late_range="0.4,0.9",
                            guidance=1.12, guidance_below=4.0)
# The official settings of Stable Diffusion, of whole networks; without EMA.
RECIPES["sd15"] = dict(batch=2048, steps=40000, lr=1e-5, fake_lr=1e-5, fake_steps=10, guidance=1.75,
                       ema=0.0, save_every=500, sample_every=500, evaluate_every=0)
RECIPES["sdxl"] = dict(RECIPES["sd15"], batch=128, steps=20000, lr=5e-7, fake_lr=5e-7, fake_steps=5,
                       guidance=8.0, gan_weight=5e-3)
RECIPES["sdxl-lora"] = dict(RECIPES["sdxl"], lr=5e-5, fake_lr=5e-5)
RECIPES["sd15-lora"] = dict(RECIPES["sd15"], lr=5e-5, fake_lr=5e-5)  # which is not official
PLAIN = dict(late_range=None, guidance=1.0, guidance_below=None)  # without what only MNIST has
RECIPES.update({"fashion": RECIPES["mnist"], "fashion-cpu": RECIPES["mnist-cpu"],
                "latents": dict(RECIPES["mnist-cpu"], **PLAIN)})  # of whatever data

# Of eps teachers, whatever the data: their error counts sigma-fold in x0_hat, so 80 is no use.
EPS = dict(conditioning_sigma=2.0, dm_range="0.02,0.6", **PLAIN)

# Other noise than `sample.py --evaluate` takes: to choose the best by, and for the pairs.
EVALUATION_SEED, PAIRS_SEED = 1_000_000, 2_000_000
INHERITED = ("network", "prediction", "schedule", "autoencoder", "data")  # from a teacher


@dataclasses.dataclass(frozen=True)
class Config(EvaluationOptions, TrainingOptions):
    """Options of dmd2.py; recipe() gives those that are left at None."""

    teacher: str = arg(None, "checkpoint to distil, of teacher.py or NVlabs/edm (.pkl), or Stable "
                             "Diffusion: a folder of diffusers or name on the Hub", free=True)
    data: str = arg(None, "what an EDM .pkl was trained on, or where a folder is now; of Stable "
                          "Diffusion: images with captions, for the GAN", free=True)
    prompts: str = arg(None, "file of prompts, one a line; for Stable Diffusion", free=True)
    lora: int = arg(0, "rank of adapters, for one UNet in all three roles; 0: three", low=0)
    lora_alpha: int = arg(8, "the adapters' weight, times their rank", low=1)
    fake_lora: int = arg(None, "0 for a whole fake score beside a LoRA generator", (0,))
    shard: bool = arg(False, "split generator and fake score over torchrun's GPUs, by FSDP")
    first_timestep: int = arg(None, FIRST, low=249, high=999)
    half: bool = arg(False, "write the files for diffusers in float16", free=True)
    out: str = arg("runs/dmd2", "folder of the run")
    recipe: str = arg(None, "row of RECIPES (default: by data and device)", tuple(RECIPES))
    fake_steps: int = arg(None, "fake score's updates per generator's (default: by data)", low=1)
    lr: float = arg(None, "learning rate of the generator (default: by data)", low=0)
    fake_lr: float = arg(None, "of fake score and regression steps (default: by data)", low=0)
    conditioning_sigma: float = arg(SIGMA_MAX, "noise level that the generator begins at",
                                    low=SIGMA_MIN, high=SIGMA_MAX)
    noise_std: float = arg(1.0, "standard deviation of the generator's noise in training, by "
                                "some recipes 0.95; in sampling 1, to vary more", low=0.5, high=1)
    student_steps: int = arg(1, "steps in which the generator makes an image", (1, 2, 4))
    backward_simulation: bool = arg(True, "train later steps on earlier ones' images, not on real")
    dm_weight: float = arg(1.0, "of the distribution-matching loss; 0 for the GAN only", low=0)
    dm_range: str = arg("0.02,0.98", "its noise levels, as quantiles; by some recipes to 0.6")
    late_range: str = arg(None, "the same, from --decay-after on (default: by data, or no other)")
    fake_range: str = arg("0,1", "noise levels of the fake score's loss, likewise")
    gan_weight: float = arg(0.001, "of the generator's GAN loss; 0 (some recipes) is off", low=0)
    gan_features: str = arg("fake", "whose encoder the discriminator sees by", ("fake", "teacher"))
    gan_noise: bool = arg(True, "show the discriminator images with noise (diffusion GAN)")
    gan_range: str = arg("0,1", "noise levels of the discriminator's images, likewise")
    discriminator_weight: float = arg(0.01, "of its loss beside the fake score's", low=0)
    regression_steps: int = arg(0, "first steps, by regression alone; more by data", low=0)
    regression_weight: float = arg(0.0, "of this loss in later steps; more by data", low=0)
    regression_distance: str = arg("mse", "of this; lpips: a package, of pixels", ("mse", "lpips"))
    pairs: int = arg(10000, "noise and teacher's image, for it; or by data", low=1)
    init_from: str = arg(None, "generator.pt to start from, with its fake score: for a second "
                               "stage, or for more --student-steps")
    evaluate_every: int = arg(200, "steps between evaluations, 0: none; or by data", low=0)
    evaluate_n: int = arg(2000, "images per evaluation", low=100)

    def __post_init__(self):
        super().__post_init__()
        regresses = self.regression_steps or self.regression_weight
        if not (self.dm_weight or self.gan_weight or regresses):
            raise ValueError("--dm-weight 0: nothing is left to train the generator by")
        if regresses and self.pairs < self.batch:
            raise ValueError(f"--pairs {self.pairs}: must be --batch, {self.batch}, or more")


def interval(cfg, name, lowest):
    """Numbers of --dm-range ("dm"), or of another if given, raised to `lowest`; or ValueError."""
    given = getattr(cfg, f"{name}_range") or cfg.dm_range
    found = re.fullmatch(r"([\d.]+),([\d.]+)", given)
    if not found or not float(found[1]) <= float(found[2]) <= 1:
        raise ValueError(f"--{name}-range {given}: needs two numbers from 0 to 1, the smaller one "
                         "first, such as 0.02,0.98")
    return [max(lowest, float(u)) for u in found.groups()]


# ---- distribution matching ----------------------------------------------------------------------

@torch.no_grad()
def dmd_gradient(teacher, fake_score, x0, sigma, label, noise):
    """Direction that lowers KL(generator || teacher) when subtracted from x0 (DMD's gradient).

        gradient = (fake_score(x) - teacher(x)) / mean|x0 - teacher(x)|,   x = x0 + sigma * noise

    x0, noise  [B, C, H, W]  the generator's images, whose graph is not used; standard normal
    sigma      [B]           one level per image, in [SIGMA_MIN, SIGMA_MAX]
    label      [B]           the classes x0 was generated for, int64
    returns [B, C, H, W], of order 1 per image; exactly 0 where fake_score equals teacher
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
        return self.head(self.denoiser.estimate(x, sigma, label, decode=False)[1])


def diffused(x0, draw, quantiles, schedule="karras"):
    """Images with noise, drawn anew, as fake score and discriminator see them (diffusion GAN).

    x0         [B, C, H, W]
    quantiles  the range of the levels, of a schedule; None for images without noise
    returns x [B, C, H, W] and its noise level sigma [B]
    """
    if quantiles is None:
        return x0, x0.new_full(x0.shape[:1], SIGMA_MIN)
    sigma = SCHEDULES[schedule](draw.uniform(*quantiles))
    return x0 + sigma.view(-1, 1, 1, 1) * draw.normal(), sigma


def generator_loss(fake_logits):
    """Non-saturating GAN loss of the generator, of the logits [B] of its images: a mean over
    images, where dmd_loss is one over values, as in the official code."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits, fake_logits):
    """GAN loss of the discriminator, of its logits [B]; 2 ln 2 if it can't tell real from fake."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


# ---- the steps of a generator --------------------------------------------------------------------

def step_input(generator, sigmas, start, noise_std, k, label, draw, real=None):
    """What to train step k of a generator on, counted from 0.

    The first step is trained on noise. Any other as in sampling, but for noise_std: on the
    result of the steps before it, with fresh noise (DMD2's backward simulation; no gradient reaches
    those steps). Given real images [B, C, H, W] in [-1, 1], on these with noise.

    start      the start_scale() of the first noise
    noise_std  standard deviation of all this noise; sampling has 1. Not in the papers: distribution
               matching makes images too alike, and with less in training the sampled ones vary more
    returns x [B, C, H, W] and its noise level [B], sigmas[k]
    """
    first, *noises = (noise_std * draw.normal() for _ in range(k + 1))
    x = start * first
    if k > 0:
        with torch.no_grad():
            x0 = few_step(generator, x, sigmas[:k], label, noises[:-1]) if real is None else real
        x = x0 + sigmas[k] * noises[-1]
    return x, x.new_full(x.shape[:1], sigmas[k])


# ---- regression: DMD's loss, on pairs of a step's input and the teacher's image -----------------

def load_pairs(sampler, schedule, sigmas, start, noise_std, digest, count, path):
    """Pairs to train each step of a generator on: x, where a teacher of some schedule was at the
    step's level, on Heun's way from noise, and the image at its end (DMD has the first step's).
    From the file at path, or made and kept.

    sigmas     the generator's levels, falling
    start      the first step's x is noise_std * start * noise
    noise_std  what is left of the noise in x, as in step_input()
    returns k, index [B] -> x [B, C, H, W] of level sigmas[k], label [B], images (or latents)
    """
    classes, device = tuple(sampler.data["classes"]), sampler.device  # which may be prompts
    origin = dict(teacher=digest, sampler=sampler.name, count=count, classes=classes, sigmas=sigmas)
    noise = next(fresh_noise(count, sampler.shape, PAIRS_SEED))
    label = torch.arange(count) % len(classes)
    levels = sorted({*sampling_sigmas(HEUN_STEPS, schedule), *sigmas[1:]}, reverse=True)
    with rank_0_first():
        stored = torch.load(path, weights_only=True) if path.exists() else {}
        if stored.get("origin") != origin:
            size, ways = batch_of(sampler), []
            for z, c in progress(list(zip(noise.split(size), label.split(size))), "pairs"):
                x, way = start_scale(schedule, levels[0]) * z.to(device), []
                for high, low in itertools.pairwise([levels[0], *sigmas[1:], 0.0]):
                    passed = [sigma for sigma in levels if low <= sigma <= high]
                    x = heun(sampler.denoiser, x, passed, c.to(device))
                    way.append(x.cpu())
                ways.append(torch.stack(way))
            stored = dict(origin=origin, ways=torch.cat(ways, dim=1))
            save(stored, path)
    label, (*later, images) = label.to(device), stored["ways"].to(device)
    x = [noise_std * start * noise.to(device), *(images.lerp(part, noise_std) for part in later)]
    return lambda k, index: (x[k][index], label[index], images[index])


def lpips_distance(device):
    """LPIPS (Zhang et al. 2018) of images in [-1, 1], by VGG, at 224 x 224, as DMD has it."""
    import lpips
    net = lpips.LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False)
    return lambda a, b: net(*(F.interpolate(x.expand(-1, 3, -1, -1), (224, 224), mode="bilinear")
                              for x in (a, b))).mean()


# ---- pictures, and the best generator of a run --------------------------------------------------

@torch.no_grad()
def save_estimates(teacher, fake_score, sampler, schedule, shown, path, count=10):
    """The generator's images, a row each; with noise; what teacher and fake score make of that."""
    noises, device = fresh_noise(count, sampler.shape, seed=0), sampler.device
    label = torch.arange(count, device=device) % len(sampler.data["classes"])
    sigma = SCHEDULES[schedule](torch.linspace(0.15, 0.75, count, device=device))
    x0 = shown(sampler.x0(noises, label))
    x = x0 + sigma.view(-1, 1, 1, 1) * next(noises).to(device)
    columns = dict(x0=x0, x=x, teacher=teacher(x, sigma, label), fake=fake_score(x, sigma, label))
    images = torch.stack([sampler.decode(column) for column in columns.values()], dim=1)
    names = [f"{sampler.data['classes'][c]:.24}, sigma {s:.2g}"
             for c, s in zip(label, sigma.tolist())]
    save_grid(to_uint8(images), names, path, list(columns))


class Best:
    """Measures generators as the teacher was measured, and keeps the best in generator.pt: the one
    with the lowest first figure. The others decide nothing. On resume it tells the teacher's
    figures and the best so far, which are not measured again.

    facts  what a generator's checkpoint tells besides its step, weights and figures
    """

    def __init__(self, cfg, facts, sampler, teacher):
        self.facts, self.sampler, self.path = facts, sampler, Path(cfg.out, "generator.pt")
        before = load(self.path, "generator") if cfg.resume and self.path.exists() else {}
        self.best = before.get("figures")  # it may be of a later step, and is not to be lost
        self.measure, self.half = None, cfg.half
        if cfg.evaluate_every:
            reference = load_reference(facts["data"], sampler.device, cfg)
            self.measure = functools.partial(measure, reference=reference, n=cfg.evaluate_n,
                                             seed=EVALUATION_SEED)
            facts["teacher_figures"] = before.get("teacher_figures") or self.measure(teacher)

    def consider(self, step, run, fake_score):
        """Keep the generator after a step, and the fake score for a second stage, if it is best; if
        nothing is measured, it is."""
        run.write(step)  # which raises if the run diverged
        figures = self.measure and dict(run.measure(step, lambda: self.measure(self.sampler)),
                                        step=step + 1)
        if not self.best or [*figures.values()][0] < [*self.best.values()][0]:
            self.best = figures
            save(dict(self.facts, step=step + 1, figures=figures,
                      model=self.sampler.denoiser.state_dict(),
                      fake_score=fake_score.state_dict()), self.path)
            if "pipeline" in self.facts["network"] and rank() == 0:
                write_student(self.sampler.denoiser, self.path, self.half)


# ---- training -----------------------------------------------------------------------------------

def recipe(given):
    """Options that were not given: by the teacher's data and prediction."""
    if "teacher" not in given:
        raise ValueError("--teacher is missing: give one, such as runs/teacher/teacher.pt")
    parent = open_checkpoint(given["teacher"], given.get("data"), given.get("data_dir"), "teacher")
    kind = "latents" if parent["autoencoder"] else parent["data"]["name"]
    pipeline = parent["network"].get("pipeline")
    if pipeline:
        kind = ("sdxl" if is_xl(pipeline) else "sd15") + "-lora" * bool(given.get("lora"))
    chosen = given.get("recipe") or recipe_of(kind, given, RECIPES)
    found = {**RECIPES[chosen], "data_dir": parent["data"]["data_dir"], "recipe": chosen,
             **(EPS if parent["prediction"] == "eps" and not pipeline else {}),
             **({"late_range": None} if "dm_range" in given else {}),  # for the recipe's own
             **({"guidance_below": None} if "guidance" in given else {})}
    if pipeline and "data" not in given:
        found["gan_weight"] = 0.0  # which is what real images are for
    if not pipeline and "init_from" in given:
        # Only a start by regression makes the GAN dispensable, and a faster fake score any good.
        found.update(regression_steps=0, regression_weight=0.0, gan_weight=Config.gan_weight,
                     fake_lr=min(found["fake_lr"], 1e-3), **PLAIN)
    found["regression_steps"] = min(found.get("regression_steps", 0),
                                    given.get("steps", found["steps"]) // 2)
    return found


def initial(cfg, parent, sigmas, device):
    """Teacher, generator and fake score to begin with: the two are copies of the teacher, or by
    --lora adapters of it; or by --init-from that file's, of the generator the EMA. ValueError if
    they are not of this teacher's kind."""
    teacher = build_any(parent, device)
    torch.manual_seed(cfg.seed)  # of adapters, the same on every rank
    if cfg.checkpointing and "pipeline" in parent["network"]:
        teacher.net.unet.enable_gradient_checkpointing()
    count = 0 if not cfg.lora else 1 if cfg.fake_lora == 0 else 2  # of adapters
    adapted = [with_adapter(teacher, cfg.lora, cfg.lora_alpha) for _ in range(count)]
    whole = [copy.deepcopy(teacher) for _ in range(2 - count)]
    generator, fake_score = students = adapted + whole
    if cfg.init_from and not cfg.resume:
        source = load(cfg.init_from, "generator")
        found, wanted = dict(source, sigmas=source["sigmas"][:1]), dict(parent, sigmas=sigmas[:1])
        for name in ("network", "prediction", "sigmas"):  # of these the first: steps may differ
            if found[name] != wanted[name]:
                raise ValueError(f"--init-from {cfg.init_from}: its {name} is {found[name]}, not "
                                 f"{wanted[name]}; give a generator.pt of this teacher's kind")
        generator.load_state_dict(source["model"])
        fake_score.load_state_dict(source.get("fake_score") or source["training"]["fake_score"])
    return teacher, *(student.to(device).requires_grad_(True) for student in students)


def train(cfg):
    """Distil a teacher into a generator, kept as generator.pt in the run's folder."""
    device, parts = pick_device(cfg.device), parts_of(cfg)
    parent = open_checkpoint(cfg.teacher, cfg.data, cfg.data_dir, prompts=cfg.prompts)
    pipeline = parent["network"].get("pipeline")
    if pipeline and not parent["data"]["classes"]:
        raise ValueError("--prompts is missing: give a file of prompts, one a line")
    if (cfg.lora or cfg.shard) and not pipeline or cfg.shard and (cfg.lora or ranks() == 1):
        raise ValueError("--lora: is for Stable Diffusion; --shard for its whole networks, under "
                         "torchrun")
    if cfg.lora:
        parent["network"].update(lora=cfg.lora, lora_alpha=cfg.lora_alpha)
    # --dm-range and the like are quantiles of karras, of which the teacher knows nothing below its
    # own lowest noise level; or of Stable Diffusion's own levels.
    own = parent["schedule"] == "scaled_linear"
    schedule, lowest = ("scaled_linear", 0.0) if own else (
        "karras", quantile_of(SCHEDULES[parent["schedule"]](torch.zeros(()).double()).item()))
    sigmas = (generator_timesteps(pipeline, cfg.student_steps, cfg.first_timestep) if pipeline else
              generator_sigmas(cfg.student_steps, cfg.conditioning_sigma))
    start = start_scale(parent["schedule"], sigmas[0])
    num_classes, shape = len(parent["data"]["classes"]), shape_of(parent["network"])
    dm_range, late_range, fake_range, gan_range = (
        interval(cfg, name, lowest) for name in ("dm", "late", "fake", "gan"))
    gan_range = gan_range if cfg.gan_noise else None
    # But for regression, pixels are trained as they are shown, clamped: else those that should be
    # black scatter about -1, and many show as dark grey.
    shown = nn.Identity() if parent["autoencoder"] else clamped
    # The discriminator may see the generator's images in the pass by which the fake score learns.
    shares_pass = cfg.gan_features == "fake" and gan_range == fake_range
    weights = dict(dmd_loss=cfg.dm_weight, regression_loss=cfg.regression_weight, fake_loss=1.0,
                   gan_loss=cfg.gan_weight, discriminator_loss=cfg.discriminator_weight)

    teacher, generator, fake_score = initial(cfg, parent, sigmas, device)
    # A pipeline's generator has no average: a second UNet would cost more than it gives.
    ema = generator if pipeline else copy.deepcopy(generator).eval().requires_grad_(False)
    guide = guided(teacher, cfg, parent)
    torch.manual_seed(cfg.seed)
    discriminator = Discriminator(teacher if cfg.gan_features == "teacher" else fake_score)
    judges = nn.ModuleList([fake_score, discriminator.head]).to(device)  # of the generator's images
    if cfg.shard:
        shard(generator.net)
        shard(fake_score.net, discriminator.head)
    adamw = functools.partial(torch.optim.AdamW, weight_decay=0.01, fused=device.type != "mps")
    descent = Descent(adamw(generator.parameters()), cfg, device, "generator_")
    fake_descent = Descent(adamw(judges.parameters()), cfg, device, "fake_")

    real_data, batches = None, itertools.repeat((None, None))
    if cfg.gan_weight or not cfg.backward_simulation:
        codec = build(parent["autoencoder"], device)
        if pipeline:
            real_data = load_captioned(parent["data"], codec, teacher.net.prompts, device)
        else:
            real_data = encoded(load_images(parent["data"], "train"), codec, device)
    digest = digest_of(cfg.teacher)
    run = Run(cfg, "last.pt", dict(generator=generator, fake_score=fake_score,
                                   head=discriminator.head, descent=descent,
                                   fake_descent=fake_descent,
                                   **dict(ema=ema) if ema is not generator else {}),
              dict(parent["data"], teacher=digest, count=real_data and len(real_data.labels)))
    facts = dict({name: parent[name] for name in INHERITED}, kind="generator", sigmas=sigmas,
                 version=__version__, config=vars(cfg), teacher_figures=None)
    teacher_sampler = make_sampler(guide, parent, device)
    tell(f"distilling on {device}: recipe {cfg.recipe}, {cfg.steps} steps; {teacher_sampler.name}",
         sys.stderr)
    best = Best(cfg, facts, make_sampler(ema, facts, device), teacher_sampler)
    if cfg.regression_steps or cfg.regression_weight:
        pairs_at = load_pairs(teacher_sampler, parent["schedule"], sigmas, start, cfg.noise_std,
                              digest, cfg.pairs, run.path.with_name("pairs.pt"))
        distance = F.mse_loss if cfg.regression_distance == "mse" else lpips_distance(device)

        def regression(update, k, part):
            index = batch_at(update, cfg.pairs, cfg.batch, cfg.seed, device)[part]
            x, label, images = pairs_at(k, index)
            return distance(few_step(generator, x, sigmas[k:k + 1], label), images)
    prepare(cfg, device, teacher, generator, fake_score)  # only now: so far all was in float32
    if real_data:
        first = max(run.start, cfg.regression_steps)
        batches = training_batches(real_data, first, cfg, parts, device)
    if best.measure and not cfg.resume:
        run.measure(-1, lambda: {f"teacher_{name}": figure
                                 for name, figure in facts["teacher_figures"].items()})

    for step in run.steps(lambda: dict(facts, figures=None, model=ema.state_dict())):
        regresses = step < cfg.regression_steps  # at first, so that no kind of image is missing
        distilled = step - cfg.regression_steps
        update, rest = (step, 0) if regresses else divmod(distilled, cfg.fake_steps)
        update_generator = rest == 0  # DMD2's two time-scale update rule
        # Which of the generator's steps is trained: one for the whole batch and on every GPU, drawn
        # anew after each update of the generator, for the fake score to learn what it judges next.
        rng = seeded(TRAINED_STEP, cfg.seed, update + (rest > 0))
        k = torch.randint(len(sigmas), (), generator=rng).item()
        for part in parts:
            if regresses:
                losses = dict(regression_loss=regression(update, k, part))
                descent.add(losses["regression_loss"])
                run.note(**losses)
                continue
            draw = Draw(GENERATOR, cfg.seed, step, cfg.batch, shape, device, part)
            real, real_label = next(batches)
            label = draw.label(num_classes)
            given, label = (None, label) if cfg.backward_simulation else (real, real_label)
            x, sigma = step_input(generator, sigmas, start, cfg.noise_std, k, label, draw, given)
            with torch.set_grad_enabled(update_generator):
                x0 = shown(generator(x, sigma, label))

            # Generator: move its samples along the distribution-matching gradient, and to where
            # the discriminator takes them for real ones. Gradients go through fake score and head,
            # which stay as they are.
            if update_generator:
                judges.requires_grad_(False)
                losses = {}
                if cfg.dm_weight:
                    quantiles = late_range if update >= (cfg.decay_after or cfg.steps) else dm_range
                    sigma, noise = SCHEDULES[schedule](draw.uniform(*quantiles)), draw.normal()
                    losses["dmd_loss"] = dmd_loss(guide, fake_score, x0, sigma, label, noise)
                if cfg.gan_weight:
                    logits = discriminator(*diffused(x0, draw, gan_range, schedule), label)
                    losses["gan_loss"] = generator_loss(logits)
                if cfg.regression_weight:
                    losses["regression_loss"] = regression(update, k, part)
                descent.add(sum(weights[name] * loss for name, loss in losses.items()))
                run.note(**losses)
                judges.requires_grad_(True)

            # Fake score: a teacher's loss, on the generator's samples, at every step.
            # Discriminator: real images from generated ones.
            x0 = x0.detach()
            x, sigma = diffused(x0, draw, fake_range, schedule)
            x0_hat, features = fake_score.estimate(x, sigma, label)
            losses = dict(fake_loss=unit_error(fake_score.prediction, x0_hat, x0, sigma))
            if cfg.gan_weight:
                real_logits = discriminator(*diffused(real, draw, gan_range, schedule), real_label)
                fake_logits = (discriminator.head(features) if shares_pass else
                               discriminator(*diffused(x0, draw, gan_range, schedule), label))
                losses["discriminator_loss"] = discriminator_loss(real_logits, fake_logits)
            fake_descent.add(sum(weights[name] * loss for name, loss in losses.items()))
            run.note(**losses)

        if update_generator:
            lr = (rate_at(update, cfg.fake_lr, cfg.warmup, cfg.regression_steps / 2) if regresses
                  else rate_at(update, cfg.lr, cfg.warmup, cfg.decay_after))
            run.note(**descent.step(lr))
            update_ema(ema, generator, cfg.ema, update)
        if not regresses:
            run.note(**fake_descent.step(rate_at(distilled, cfg.fake_lr, cfg.warmup)))

        if due(step, cfg.evaluate_every or cfg.save_every, cfg.steps) and not cfg.profile:
            best.consider(step, run, fake_score)
        if due(step, cfg.sample_every, cfg.steps):
            run.draw(step, lambda path: save_estimates(guide, fake_score, best.sampler, schedule,
                                                       shown, path))
    if best.best:
        figures = ", ".join(f"{title} {best.best[name]:.3f}" for name, title in TITLES.items()
                            if name in best.best)
        tell(f"{best.path}: the best, of step {best.best['step']}: {figures}")
    if not cfg.profile:
        tell(f"next: python sample.py {best.path}   or   python export.py {best.path}")


def main(argv=None):
    train(parse(Config, argv, __doc__.split("\n\nTwo copies")[0], recipe))


if __name__ == "__main__":
    run_script(main)
