"""Train a class-conditional diffusion model on images: the teacher that dmd2.py distils.

    python teacher.py                       # 1,797 real 8x8 digits, no download
    python teacher.py --data mnist          # or fashion, cifar10, a folder of images
    python teacher.py --autoencoder --data mnist                     # latent diffusion: first this,
    python teacher.py --latent runs/autoencoder/autoencoder.pt       # then a teacher of its latents

After this file a diffusion model, of whatever dialect, is a function and no more:

    x = x0 + sigma * noise                  x0 in [-1, 1], noise standard normal
    denoiser(x, sigma, label) -> x0_hat     the mean of all the x0 that x may have come from

In reading order: noise levels, denoiser and loss, sampling, training (EDM, Karras et al. 2022),
networks, an autoencoder; then what any script here needs, from options to pictures.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

__version__ = "1.2"  # of checkpoints, too
SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5  # EDM, Table 1
HEUN_STEPS = 18  # of a teacher's sampler, as EDM has for CIFAR-10
KNOWN_DATA = dict(digits=None, mnist="MNIST", fashion="FashionMNIST", cifar10="CIFAR10")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")  # PIL would run a program in PostScript

# What depends on the data, and on a CPU on "...-cpu": it fills the options that were not given.
RECIPES = {
    "digits": dict(width=32, mults="1,2", blocks=1, batch=128, steps=1200, lr=2e-3, ema=0.99),
    "mnist": dict(width=64, mults="1,2", blocks=1, patch=2, batch=256, steps=3600, lr=2e-3,
                  decay_after=2000, ema=0.998, schedule="cosine", save_every=1200,
                  sample_every=1200),
    "mnist-cpu": dict(width=32, mults="1,2", blocks=1, patch=2, batch=64, steps=7000, lr=2e-3,
                      decay_after=4200, ema=0.995, schedule="cosine", sample_every=1200),
    "cifar10": dict(width=96, mults="1,2,2", blocks=3, batch=256, steps=100000, lr=5e-4, ema=0.999,
                    save_every=5000, sample_every=5000),
    "folder": dict(width=64, mults="1,2,2", blocks=2, batch=64, steps=20000, lr=5e-4, ema=0.999,
                   save_every=1000, sample_every=1000),
    # Of any data: an autoencoder, and a teacher of its latents.
    "autoencoder": dict(width=16, mults="1,2,4", blocks=1, batch=128, steps=1500, lr=2e-3, ema=0.99,
                        decay_after=900, out="runs/autoencoder"),
    "latents": dict(width=64, blocks=2, batch=128, steps=5000, lr=1e-3, ema=0.999,
                    decay_after=3000, schedule="cosine"),
}
RECIPES.update({"fashion": RECIPES["mnist"], "fashion-cpu": RECIPES["mnist-cpu"]})


# ---- noise levels -------------------------------------------------------------------------------

LOW, HIGH = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)

# Quantile functions: the noise level below which a share u, a tensor in [0, 1], of training draws
# lies. It rises with u.
SCHEDULES = {
    "lognormal": lambda u: torch.exp(  # EDM Table 1; at both ends infinite, but for clamp()
        -1.2 + 1.2 * 2**0.5 * torch.erfinv(2 * u - 1)).clamp(SIGMA_MIN, SIGMA_MAX),
    "karras": lambda u: ((LOW + u * (HIGH - LOW)) ** RHO).clamp(SIGMA_MIN, SIGMA_MAX),  # EDM Eq. 5
    "linear": lambda u: timestep_sigma(u, "linear"),        # DDPM, Ho et al. 2020
    "scaled_linear": lambda u: timestep_sigma(u, "scaled_linear"),  # Rombach et al. 2022
    "cosine": lambda u: timestep_sigma(u, "cosine"),        # Nichol and Dhariwal 2021
    "sigmoid": lambda u: timestep_sigma(u, "sigmoid"),      # Jabri et al. 2022
    "flow": lambda u: (0.001 + 0.998 * u) / (0.999 - 0.998 * u),  # t / (1 - t), 0.001 <= t <= 0.999
}

# Rows (c_skip, c_out, c_in) that make of a network F a denoiser c_skip x + c_out F(c_in x).
PREDICTIONS = {
    "edm": lambda s: (SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2),
                      s * SIGMA_DATA / (s**2 + SIGMA_DATA**2).sqrt(),
                      1 / (s**2 + SIGMA_DATA**2).sqrt()),
    "eps": lambda s: (torch.ones_like(s), -s, 1 / (1 + s**2).sqrt()),
    "x0": lambda s: (torch.zeros_like(s), torch.ones_like(s), 1 / (1 + s**2).sqrt()),
    "v": lambda s: (1 / (1 + s**2), -s / (1 + s**2).sqrt(), 1 / (1 + s**2).sqrt()),
    "flow": lambda s: (1 / (1 + s), -s / (1 + s), 1 / (1 + s)),
}


@functools.cache
def timestep_sigmas(schedule, device="cpu", dtype=torch.float64):
    """The noise levels [1000] of DDPM's timesteps: sqrt(1 / alpha_bar - 1)."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    elif schedule == "scaled_linear":  # Stable Diffusion's, in float32 as diffusers has it
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    else:  # given by alpha_bar, but for a factor
        signal = {"cosine": torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
                  "sigmoid": torch.sigmoid(torch.full_like(t, 3)) - torch.sigmoid(6 * t - 3)}
        betas = (1 - signal[schedule][1:] / signal[schedule][:-1]).clamp(max=0.999)
    return (1 / (1 - betas).cumprod(0).double() - 1).sqrt().to(device, dtype)


def timestep_sigma(u, schedule):
    """The noise level at u of the way from the first timestep to the last; ln sigma is linear."""
    log_sigmas, timestep = timestep_sigmas(schedule, u.device, u.dtype).log(), 999 * u
    below = timestep.long().clamp(max=998)
    return torch.lerp(log_sigmas[below], log_sigmas[below + 1], timestep - below).exp()


def start_scale(schedule, sigma):
    """What unit noise is multiplied by to be a sampler's first input, at noise level sigma, a
    float: Stable Diffusion's networks, which see x / sqrt(1 + sigma^2), are given it as it is."""
    return (1 + sigma**2) ** 0.5 if schedule == "scaled_linear" else sigma


def quantile_of(sigma):
    """The quantile of karras, in [0, 1], at which a noise level, a float, lies."""
    return min(max((sigma ** (1 / RHO) - LOW) / (HIGH - LOW), 0.0), 1.0)


# ---- denoiser and loss --------------------------------------------------------------------------

class Denoiser(nn.Module):
    """A network F, preconditioned (EDM Eq. 7): c_skip x + c_out F(c_in x, ln(sigma) / 4, label)."""

    def __init__(self, net, prediction="edm"):
        super().__init__()
        self.net, self.prediction = net, prediction

    def forward(self, x, sigma, label):
        """x [B, C, H, W], sigma [B], label [B] int64 -> x0_hat [B, C, H, W] float32"""
        return self.estimate(x, sigma, label)[0]

    def estimate(self, x, sigma, label, decode=True):
        """The same -> x0_hat, None without decode; the encoder's output [B, c, h, w] float32"""
        x, sigma_ = x.float(), sigma.float().view(-1, 1, 1, 1)
        c_skip, c_out, c_in = PREDICTIONS[self.prediction](sigma_)
        f, features = self.net(c_in * x, sigma.float().log() / 4, label, decode)
        return c_skip * x + c_out * f.float() if decode else None, features.float()


def denoising_loss(denoiser, x0, sigma, label, noise, min_snr_gamma=None):
    """unit_error of the estimate of x0 from x0 + sigma * noise (EDM Eq. 8).

    x0, noise  [B, C, H, W]
    sigma      [B]           one level per image
    label      [B]           int64
    """
    x0_hat = denoiser(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, label)
    return unit_error(denoiser.prediction, x0_hat, x0, sigma, min_snr_gamma)


def unit_error(prediction, x0_hat, x0, sigma, min_snr_gamma=None):
    """Squared error of an estimate x0_hat [B, C, H, W] in the network's units: of F, not of x0.

        mean(((x0_hat - x0) / c_out)^2)         1 / c_out^2 is EDM's weight lambda(sigma)
        mean(min(SNR, gamma) (x0_hat - x0)^2)   min_snr_gamma, Hang et al. 2023; SNR = 1 / sigma^2

    returns a scalar, 1 for an edm network that has learnt nothing
    """
    sigma = sigma.view(-1, 1, 1, 1)
    _, c_out, _ = PREDICTIONS[prediction](sigma)
    error = ((x0_hat - x0) / c_out).square()
    if min_snr_gamma is not None:
        error = error * c_out**2 * (1 / sigma**2).clamp(max=min_snr_gamma)
    return error.mean()


# ---- sampling, as far as training needs it; the rest is in sample.py ----------------------------

def sampling_sigmas(steps, schedule, own=False):
    """Levels for a sampler, falling, and then 0: karras's, which are good for any denoiser, within
    the schedule's range, or the schedule's own, all of its range (lognormal has karras's)."""
    u = torch.linspace(1, 0, steps, dtype=torch.float64)
    if not own or schedule == "lognormal":
        low, high = map(quantile_of, SCHEDULES[schedule](torch.tensor([0, 1]).double()).tolist())
        schedule, u = "karras", torch.linspace(high, low, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":  # of timesteps 999, 899, ..., of 10 ("trailing")
        u = (torch.arange(1000, 0, -1000 / steps, dtype=torch.float64)[:steps].round() - 1) / 999
    return [*SCHEDULES[schedule](u).tolist(), 0.0]


@torch.no_grad()
def heun(denoiser, x, sigmas, label, noises=()):
    """EDM's sampler (Algorithm 1): 2 steps - 1 evaluations, and no fresh noise.

    x       [B, C, H, W]  noise of level sigmas[0], float32 or float64, which is kept
    sigmas  falling noise levels, floats, the last of them 0
    label   [B]           int64
    noises  not used: as of ddim(), for one call to serve all samplers
    returns x0 [B, C, H, W]
    """
    for sigma, sigma_next in itertools.pairwise(sigmas):
        slope = (x - denoiser(x, x.new_full(x.shape[:1], sigma), label)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            x0_hat = denoiser(x_next, x.new_full(x.shape[:1], sigma_next), label)
            x_next = x + (sigma_next - sigma) * (slope + (x_next - x0_hat) / sigma_next) / 2
        x = x_next
    return x


# ---- training -----------------------------------------------------------------------------------

class DiffusionTask:
    """Training a denoiser of images or, by a codec, of their latents: what train() needs of it."""

    def __init__(self, cfg, data, codec):
        self.cfg, self.codec, self.classes, self.shape = cfg, codec, data.classes, data.shape
        self.stream, mults, side = TEACHER, tuple(map(int, cfg.mults.split(","))), data.shape[-1]
        network = dict(img_resolution=side, img_channels=data.shape[0], label_dim=len(data.classes),
                       model_channels=cfg.width, channel_mult=mults, num_blocks=cfg.blocks,
                       attn_resolutions=(halved(side, mults, cfg.patch),), patch=cfg.patch)
        autoencoder = None if isinstance(codec, Pixels) else dict(
            kind="autoencoder", network=codec.network, model=codec.state_dict())
        self.facts = dict(kind="teacher", network=network, prediction=cfg.prediction, model=None,
                          schedule=cfg.schedule, autoencoder=autoencoder)

    def losses(self, denoiser, x0, label, draw):
        """Losses, scalars, of which `loss` is descended; x0 [B, C, H, W], label [B] int64"""
        label = torch.where(draw.uniform() < self.cfg.label_dropout, len(self.classes), label)
        sigma = SCHEDULES[self.cfg.schedule](draw.uniform())
        return dict(loss=denoising_loss(denoiser, x0, sigma, label, draw.normal(),
                                        self.cfg.min_snr_gamma))

    def validate(self, denoiser, x0, label):
        """Figures: the loss at fixed noise and evenly spread quantiles of sigma."""
        u = (torch.arange(len(x0), device=x0.device) + 0.5) / len(x0)
        noise, sigma = next(fresh_noise(len(x0), self.shape, 0)), SCHEDULES[self.cfg.schedule](u)
        return dict(validation_loss=denoising_loss(denoiser, x0, sigma, label, noise.to(x0.device),
                                                   self.cfg.min_snr_gamma))

    def picture(self, denoiser, x0, label, path):
        """Samples, a row per class (the first 10), of the same noise each time."""
        label = torch.arange(min(len(self.classes), 10), device=x0.device).repeat_interleave(8)
        noise = next(fresh_noise(len(label), self.shape, 0)).to(x0.device)
        sigmas = sampling_sigmas(HEUN_STEPS, self.cfg.schedule)
        start = start_scale(self.cfg.schedule, sigmas[0])
        images = to_uint8(self.codec.decode(heun(denoiser, start * noise, sigmas, label)))
        save_grid(images.unflatten(0, (-1, 8)), self.classes[:10], path)


def train(cfg):
    """Train a teacher, or by AutoencoderTask an autoencoder; returns its checkpoint's path."""
    device, parts = pick_device(cfg.device), parts_of(cfg)
    codec = build(load(cfg.resume).get("autoencoder") if cfg.resume else
                  cfg.latent and load(cfg.latent, "autoencoder"), device)
    data, test = (load_data(cfg.data, split, cfg.data_dir, cfg.size) for split in ("train", "test"))
    facts = dict(name=cfg.data, data_dir=cfg.data_dir, size=cfg.size, shape=data.shape,
                 classes=data.classes, flip=cfg.flip, count=len(data.labels))
    some = min(512, 2**24 // math.prod(data.shape))  # images that a network takes at once
    if cfg.latent and not cfg.resume:
        index = permutation(len(data.labels), 0, 0, "cpu")[:some]
        codec.calibrate(to_float(data.images[index]).to(device))
    held_out = codec.encode(to_float(test.images[:some]).to(device)), test.labels[:some].to(device)
    data = encoded(data._replace(flip=cfg.flip), codec, device)

    task = (AutoencoderTask if cfg.autoencoder else DiffusionTask)(cfg, data, codec)
    torch.manual_seed(cfg.seed)
    ema = build(task.facts, device)
    model = copy.deepcopy(ema).train().requires_grad_(True)
    descent = Descent(torch.optim.Adam(model.parameters(), fused=device.type != "mps"), cfg, device)
    run = Run(cfg, f"{task.facts['kind']}.pt", dict(model=model, ema=ema, descent=descent), facts)
    prepare(cfg, device, model)  # not ema: samples and validation are always float32
    tell(f"{cfg.data}: {facts['count']} training images of {len(facts['classes'])} classes, "
         f"{', '.join(facts['classes'][:10])}; {sum(p.numel() for p in model.parameters()):,} "
         f"parameters; on {device}; recipe {cfg.recipe}; {cfg.steps} steps", sys.stderr)
    batches = training_batches(data, run.start, cfg, parts, device)

    for step in run.steps(lambda: dict(task.facts, model=ema.state_dict())):
        for part in parts:
            x0, label = next(batches)
            draw = Draw(task.stream, cfg.seed, step, cfg.batch, task.shape, device, part)
            losses = task.losses(model, x0, label, draw)
            descent.add(losses["loss"])
            run.note(**losses)
        run.note(**descent.step(rate_at(step, cfg.lr, cfg.warmup, cfg.decay_after)))
        update_ema(ema, model, cfg.ema, step)

        if due(step, cfg.sample_every, cfg.steps):
            with torch.no_grad():
                run.measure(step, lambda: task.validate(ema, *held_out))
                run.draw(step, lambda path: task.picture(ema, *held_out, path))
    return run.path


# ---- networks: EDM's DDPM++ and ADM, with the names of its published checkpoints ----------------

class Block(nn.Module):
    """Residual block with optional resampling and self-attention, of DDPM++ or of ADM, in which the
    embedding also scales channels and heads have 64 channels."""

    def __init__(self, adm, c_emb, c_in, c_out, resample=None, attention=False):
        super().__init__()
        self.adm, self.heads = adm, c_out // 64 if adm else 1
        self.resized = {None: nn.Identity(), "down": nn.AvgPool2d(2),
                        "up": nn.Upsample(scale_factor=2)}[resample]
        self.skip_scale, eps = (1, 1e-5) if adm else (0.5**0.5, 1e-6)
        has_skip = c_in != c_out or resample and not adm
        self.norm0 = group_norm(c_in, eps)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(c_emb, 2 * c_out if adm else c_out)
        self.norm1 = group_norm(c_out, eps)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if has_skip else nn.Identity()
        self.norm2 = group_norm(c_out, eps) if attention else None
        self.qkv = nn.Conv2d(c_out, 3 * c_out, 1) if attention else None
        self.proj = nn.Conv2d(c_out, c_out, 1) if attention else None

    def forward(self, x, emb):
        """x [B, c_in, H, W], emb [B, c_emb] -> [B, c_out, H', W'], H' = H, H / 2 or 2 H"""
        h = self.conv0(self.resized(F.silu(self.norm0(x))))
        emb = self.affine(emb)[:, :, None, None]
        if self.adm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + emb)
        x = (self.conv1(F.silu(h)) + self.skip(self.resized(x))) * self.skip_scale
        if self.norm2 is not None:
            # EDM's qkv channels run as (head, channel, q|k|v); here as blocks q, k, v.
            weight, bias = (p.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
                            for p in (self.qkv.weight, self.qkv.bias))
            qkv = F.conv2d(self.norm2(x), weight, bias).unflatten(1, (3, self.heads, -1)).flatten(4)
            q, k, v = (part.mT for part in qkv.unbind(1))
            attended = F.scaled_dot_product_attention(q, k, v).mT
            x = (self.proj(attended.reshape(x.shape)) + x) * self.skip_scale
        return x


def group_norm(channels, eps=1e-6):
    """GroupNorm as in EDM: up to 32 groups, of at least 4 channels, for fewer mean little."""
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps)


class UNet(nn.Module):
    """EDM's network F. Argument and parameter names are those of NVlabs/edm.

    model_type  SongUNet is DDPM++ (Song et al. 2021), which teacher.py trains, DhariwalUNet is ADM
                (Dhariwal and Nichol 2021), for checkpoints that are loaded
    patch       side of the squares of pixels that become the channels of one place, for speed;
                attn_resolutions, the names of layers and all inside are of the smaller image

    Raises ValueError if a level's resolution can't be halved.
    """

    def __init__(self, img_resolution, img_channels, label_dim, model_channels, channel_mult,
                 num_blocks, attn_resolutions, model_type="SongUNet", patch=1):
        super().__init__()
        halved(img_resolution, channel_mult, patch)
        img_resolution, img_channels = img_resolution // patch, img_channels * patch**2
        self.label_dim, self.patch, self.adm = label_dim, patch, model_type == "DhariwalUNet"
        c_emb, eps = 4 * model_channels, 1e-5 if self.adm else 1e-6
        half, c_label = model_channels // 2, c_emb if self.adm else model_channels
        octaves = torch.linspace(0, 1 - self.adm / half, half)
        self.register_buffer("freqs", 10000 ** -octaves, persistent=False)
        self.map_label = nn.Linear(label_dim, c_label, bias=not self.adm) if label_dim else None
        self.map_layer0 = nn.Linear(model_channels, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        block = functools.partial(Block, self.adm, c_emb)
        channels = model_channels * (channel_mult[0] if self.adm else 1)
        skips, res = [], img_resolution
        self.enc[f"{res}x{res}_conv"] = nn.Conv2d(img_channels, channels, 3, padding=1)
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level > 0:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, "down")
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(
                    channels, mult * model_channels, attention=res in attn_resolutions)
                channels = mult * model_channels
                skips.append(channels)
        self.bottleneck = channels, res  # channels and side of the encoder's output

        self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True)
        self.dec[f"{res}x{res}_in1"] = block(channels, channels)
        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level < len(channel_mult) - 1:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, "up")
            for i in range(num_blocks + 1):
                attends = res in attn_resolutions and (self.adm or i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = block(
                    channels + skips.pop(), mult * model_channels, attention=attends)
                channels = mult * model_channels
        last = group_norm(channels, eps), nn.Conv2d(channels, img_channels, 3, padding=1)
        if self.adm:
            self.out_norm, self.out_conv = last
        else:
            self.dec[f"{res}x{res}_aux_norm"], self.dec[f"{res}x{res}_aux_conv"] = last
        # EDM's initialisation of DDPM++: Xavier uniform, residual branches ending near zero.
        for name, layer in self.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                ends = name.endswith(("conv1", "proj", "aux_conv", "out_conv"))
                gain = 1e-5 if ends else 0.2**0.5 if name.endswith("qkv") else 1
                nn.init.xavier_uniform_(layer.weight, gain)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x, c_noise, label, decode=True):
        """x [B, C, H, W], c_noise [B], label [B] int64, label_dim for "no label" -> F [B, C, H, W],
        None without decode; and the output of the encoder's last block [B, c, h, w]"""
        emb, skips = self.embedding(c_noise, label, x.dtype), []
        x = F.pixel_unshuffle(x, self.patch)
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        features = x
        if not decode:
            return None, features
        *blocks, norm, conv = ((*self.dec.values(), self.out_norm, self.out_conv) if self.adm else
                               self.dec.values())
        for block in blocks:
            if x.shape[1] != block.conv0.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return F.pixel_shuffle(conv(F.silu(norm(x))), self.patch), features

    def embedding(self, c_noise, label, dtype):
        """What blocks are told of noise level and label: [B, 4 * model_channels]"""
        phase = c_noise[:, None] * self.freqs
        waves = [phase.cos(), phase.sin()] if self.adm else [phase.sin(), phase.cos()]
        emb, of_label = torch.cat(waves, dim=1), 0
        if self.map_label is not None:  # EDM has one-hot vectors; no label is the zero vector
            of_label = F.embedding(label, F.pad(self.map_label.weight, (0, 1)).T)
        if self.adm:
            emb = self.map_layer1(F.silu(self.map_layer0(emb.to(dtype))))
            return F.silu(emb + of_label)
        if self.map_label is not None:  # here these are of length sqrt(label_dim)
            emb = emb + of_label * self.label_dim**0.5 + self.map_label.bias
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb.to(dtype)))))


def halved(side, channel_mult, patch=1):
    """The last level's side: side / patch, halved for each level but the first; or ValueError."""
    factor = patch * 2 ** (len(channel_mult) - 1)
    if side % factor:
        raise ValueError(f"images of side {side}: {len(channel_mult)} levels of --patch {patch} "
                         f"need a multiple of {factor}: give fewer --mults or, of a folder, "
                         f"--size {side + -side % factor}")
    return side // factor


# ---- latents: x0 is an image, or what an autoencoder makes of it -------------------------------

class Pixels:
    """The codec of models whose x0 is the image."""

    encode = decode = staticmethod(lambda images: images)


class Autoencoder(nn.Module):
    """The codec of latent diffusion (Rombach et al. 2022): an AutoencoderKL of the arguments
    `network`, or where that names a `pipeline`, a folder of diffusers or name on the Hub, its."""

    def __init__(self, **network):
        from diffusers import AutoencoderKL
        super().__init__()
        self.network, pipeline = network, network.get("pipeline")
        if pipeline:  # in float32, because SDXL's overflows in float16
            options = dict(subfolder="vae", use_safetensors=True)
            self.vae = AutoencoderKL.from_pretrained(pipeline, **options).float()
            self.vae.enable_slicing()  # images one by one, for less memory
        else:
            self.vae = AutoencoderKL(**network)
        # Of the latents of training images; so x0 has EDM's standard deviation, SIGMA_DATA.
        shape, scale = (1, self.vae.config.latent_channels, 1, 1), self.vae.config.scaling_factor
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.full(shape, SIGMA_DATA / scale))

    def posterior(self, images):
        """images [B, C, H, W] in [-1, 1] -> distribution of z [B, c, h, w], in float32"""
        found = self.vae.encode(images).latent_dist
        return type(found)(found.parameters.float())

    @torch.no_grad()
    def calibrate(self, images):
        """Set mean and standard deviation, per channel, of the latents that encode() scales."""
        self.std, self.mean = torch.std_mean(self.posterior(images).mean, (0, 2, 3), keepdim=True)

    def encode(self, images):
        """images [B, C, H, W] in [-1, 1] -> x0 [B, c, h, w]: the means, of deviation SIGMA_DATA"""
        return (self.posterior(images).mean - self.mean) / self.std * SIGMA_DATA

    def decode(self, x0):
        """x0 [B, c, h, w] -> images [B, C, H, W] in about [-1, 1]"""
        return self.vae.decode(x0 / SIGMA_DATA * self.std + self.mean).sample.float()


class AutoencoderTask:
    """Training an autoencoder, likewise: without perceptual and adversarial losses."""

    def __init__(self, cfg, data, codec):
        widths = [cfg.width * int(mult) for mult in cfg.mults.split(",")]
        channels, side = data.shape[0], halved(data.shape[-1], widths)
        self.cfg, self.stream, self.shape = cfg, AUTOENCODER, (cfg.latent_channels, side, side)
        self.facts = dict(kind="autoencoder", model=None, network=dict(
            in_channels=channels, out_channels=channels, latent_channels=cfg.latent_channels,
            block_out_channels=widths, layers_per_block=cfg.blocks, norm_num_groups=cfg.width // 4,
            down_block_types=["DownEncoderBlock2D"] * len(widths), scaling_factor=1.0,
            up_block_types=["UpDecoderBlock2D"] * len(widths), mid_block_add_attention=False))

    def losses(self, autoencoder, x0, label, draw):
        """The loss and its two terms: squared error per pixel, divergence per latent value."""
        posterior, noise = autoencoder.posterior(x0), draw.normal()
        decoded = autoencoder.decode(posterior.mean + posterior.std * noise)  # x0 is z as yet
        error = (clamped(decoded) - x0).square().mean()
        kl = posterior.kl().mean() / noise[0].numel()
        return dict(loss=error + self.cfg.kl_weight * kl, reconstruction_loss=error, kl=kl)

    def validate(self, autoencoder, x0, label):
        """Figures: the peak signal-to-noise ratio of reconstructions, in dB."""
        error = (clamped(autoencoder.decode(autoencoder.encode(x0))) - x0).square().mean()
        return dict(psnr=-10 * torch.log10(error.clamp(min=1e-10) / 4))

    def picture(self, autoencoder, x0, label, path):
        """Images above their reconstructions."""
        pair = torch.stack([x0[:10], autoencoder.decode(autoencoder.encode(x0[:10]))])
        save_grid(to_uint8(pair), ("real", "decoded"), path)


# =================================================================================================
# From here on: what any training script needs.

# ---- options: one frozen dataclass per script, whose fields are its flags -----------------------

def arg(default, help, choices=None, low=-math.inf, high=math.inf, free=False, positional=False):
    """A dataclass field that is also a flag: one of choices, or a number from low to high; a `free`
    one may change when a run is resumed: configs that differ in such only are equal."""
    return dataclasses.field(default=default, compare=not free, metadata=dict(
        help=help, choices=choices, low=low, high=high, positional=positional))


def flag(name):
    """The command-line form of a field's name: fake_steps -> --fake-steps."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Options:
    """What every script has. Raises ValueError naming the option, the value and what would work."""

    device: str = arg("auto", "where to compute; auto is cuda, or else mps, or else cpu",
                      ("auto", "cuda", "mps", "cpu"), free=True)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            if isinstance(value, (int, float)) and not low <= value <= high:
                raise ValueError(f"{flag(f.name)} {value}: must be from {low} to {high}")


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Options):
    """What both training scripts have; recipe() gives those that are left at None."""

    data_dir: str = arg(None, "for data sets and decoded folders (default: data)", free=True)
    seed: int = arg(0, "of every random draw", low=0)
    steps: int = arg(None, "training steps (default: by data)", low=1, free=True)
    batch: int = arg(None, "images per step, of all GPUs together (default: by data)", low=1)
    accumulate: int = arg(1, "parts to compute a batch in, for less memory", low=1, free=True)
    checkpointing: bool = arg(False, "recompute activations, for less memory", free=True)
    warmup: int = arg(100, "updates over which a learning rate rises to its value", low=0)
    clip: float = arg(10.0, "gradients longer than this are scaled down to it", low=1e-9)
    decay_after: float = arg(None, "updates after which the (generator's) learning rate halves in "
                                   "every fifth of as many (default: by data)", low=1, free=True)
    ema: float = arg(None, "decay of the averaged weights (default: by data)", low=0, high=1)
    dtype: str = arg("auto", "of arithmetic; auto: float32, or bfloat16 where that saves time",
                     ("auto", "float32", "bfloat16", "float16"))
    compile: bool = arg(False, "torch.compile the networks, which takes minutes: for long runs")
    profile: bool = arg(False, "time some steps, tell where they go, and stop", free=True)
    log_every: int = arg(50, "steps between lines of log.jsonl", low=1, free=True)
    save_every: int = arg(200, "steps between checkpoints; more by data", low=1, free=True)
    sample_every: int = arg(500, "steps between pictures; more by data", low=0, free=True)
    wandb: bool = arg(False, "log to Weights & Biases, too", free=True)
    resume: str = arg(None, "a run's checkpoint to go on from, with its options", free=True)


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions):
    """Options of teacher.py."""

    out: str = arg("runs/teacher", "folder of the run; of --autoencoder runs/autoencoder")
    recipe: str = arg(None, "row of RECIPES (default: by data and device)",
                      sorted(RECIPES.keys() - {"autoencoder", "latents"}))  # which have flags
    data: str = arg(None, f"{', '.join(KNOWN_DATA)} (default: digits) or a folder that holds a "
                          "folder of images for each class, or a .zip of EDM's", free=True)
    size: int = arg(32, "side of a folder's images, scaled and cropped", low=4)
    flip: bool = arg(None, "show images mirrored, half of the time (default: only for cifar10)")
    autoencoder: bool = arg(False, "train no teacher but an autoencoder, for --latent")
    latent_channels: int = arg(4, "of --autoencoder: channels of its latents", low=1)
    kl_weight: float = arg(1e-3, "of --autoencoder: weight of the KL term", low=0)
    latent: str = arg(None, "autoencoder.pt, on whose latents to train the teacher")
    width: int = arg(None, "channels of the network's first level (default: by data)", low=4)
    mults: str = arg(None, "channels of each level as multiples of --width (default: by data)")
    blocks: int = arg(None, "residual blocks per level (default: by data)", low=1)
    patch: int = arg(1, "side of the squares of pixels that become one place's channels", low=1)
    prediction: str = arg("edm", "what the network learns", tuple(PREDICTIONS))
    schedule: str = arg("lognormal", "which noise levels it is trained on", tuple(SCHEDULES))
    lr: float = arg(None, "learning rate (default: by data)", low=0, high=1)
    min_snr_gamma: float = arg(None, "weigh errors of x0 by min(SNR, this), such as 5", low=1e-9)
    label_dropout: float = arg(0.1, "share of images without label, for guidance", low=0, high=1)

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.mults) or self.width % 4:
            raise ValueError(f"--width {self.width} --mults {self.mults}: needs a multiple of 4, "
                             "and positive integers")


def recipe(given):
    """Options that were not given: by data and device, or --autoencoder or --latent."""
    kind, found = "autoencoder" if given.get("autoencoder") else None, {}
    if "latent" in given:
        source = load(given["latent"], "autoencoder")
        facts = source["data"]
        side = halved(facts["shape"][-1], source["network"]["block_out_channels"])
        levels = next(n for n in itertools.count(1) if side % 2**n or side >> n < 4)
        kind, found = "latents", dict(mults="1" + ",2" * (levels - 1), data=facts["name"],
                                      size=facts["size"], data_dir=facts["data_dir"])
    data = given.get("data", found.get("data", "digits"))
    chosen = given.get("recipe") or recipe_of(kind or data, given, RECIPES)
    return {"data_dir": str(Path("data").resolve()), "flip": data == "cifar10", **RECIPES[chosen],
            "recipe": chosen, **found, "data": data}


def recipe_of(data, given, recipes):
    """The name of the row for data: its name or "folder", on a CPU with "-cpu" if there is one."""
    name = data if data in recipes else "folder"
    on_cpu = pick_device(given.get("device", "auto")).type == "cpu"
    return f"{name}-cpu" if on_cpu and f"{name}-cpu" in recipes else name


def parse(config_class, argv=None, doc="", recipe=lambda given: {}):
    """A config of the command line; every field is a flag, and of training runs --config.

    What is given goes before what --resume or --config has, that before recipe(), and that before
    the fields' defaults. Raises ValueError if a given option does not fit.
    """
    def config_json(path):  # a file of which argparse tells that it is none
        return dict(json.loads(Path(path).read_text()), out=None, resume=None)

    parser = argparse.ArgumentParser(  # without usage, so that its errors are one line
        description=doc, usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    for f in sorted(fields.values(), key=lambda f: f.name not in config_class.__annotations__):
        told = "" if f.default is None or f.type is bool else f" (default: {f.default})"
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(
            type=f.type, choices=f.metadata["choices"])
        parser.add_argument(f.name if f.metadata["positional"] else flag(f.name),
                            help=f.metadata["help"] + told, **kind)
    if trains := issubclass(config_class, TrainingOptions):
        parser.add_argument("--config", type=config_json, help="a run's config.json, to start by")
    given = vars(parser.parse_args(argv))
    saved = given.pop("config", {})
    for name in given.keys() & {"data", "data_dir", "latent", "teacher", "init_from", "resume",
                               "prompts", "features", "features_weights", "reference"}:
        if given[name] not in KNOWN_DATA and (name == "data_dir" or Path(given[name]).exists()):
            given[name] = str(Path(given[name]).resolve())  # a path, which is kept
    if source := given.get("resume"):
        saved = dict(load(source)["config"], out=str(Path(source).parent))
        for name in given.keys() & saved.keys():
            value = str(Path(given[name]).resolve()) if name == "out" else given[name]
            if value != saved[name] and fields[name].compare:
                raise ValueError(f"{flag(name)} {given[name]}: the run to resume has {saved[name]}")
    if saved.keys() - fields.keys():
        raise ValueError(f"{source or '--config'}: has options of another script or version")
    if given.get("profile"):
        off = {"sample_every", "evaluate_every", "regression_steps"} & fields.keys()
        given.update(dict.fromkeys(off, 0))
    known = {name: value for name, value in {**saved, **given}.items() if value is not None}
    cfg = config_class(**{**({} if "resume" in given else recipe(known)), **known})
    for name in ("autoencoder.pt", "teacher.pt", "last.pt", "generator.pt"):
        if trains and not cfg.resume and not cfg.profile and (path := Path(cfg.out, name)).exists():
            # torchrun starts the same command again when ranks are lost, or are back.
            again = dist.is_torchelastic_launched() and parse(config_class, ["--resume", str(path)])
            if again and dataclasses.replace(cfg, out=again.out) == again:
                return cfg if name == "generator.pt" else again  # which holds no optimizers
            raise ValueError(f"--out {cfg.out}: holds a run, {name}; go on with it by --resume, or "
                             "name another folder")
    return cfg


# What the user can mend: the error, a pattern in it, the exit status and what is told.
MISTAKES = (
    (ModuleNotFoundError, "", 2, "the package {0.name} is not installed; pip install {0.name}"),
    ((ValueError, OSError), "", 2, "{0}"),
    (FloatingPointError, "", 1, "diverged: {0}"),
    (KeyboardInterrupt, "", 130, "interrupted; --resume goes on from a checkpoint if there is one"),
    (RuntimeError, "out of memory|can't allocate", 2,
     "out of memory; a smaller --batch, --width or --n takes less, or --accumulate 4"),
    (RuntimeError, "loading state_dict", 2, "the weights don't fit: {0}"),
    (RuntimeError, r"C(\+\+)? compiler", 2,
     "--compile: PyTorch finds no C compiler; install one, such as gcc"),
)


def run_script(main):
    """Call main; what the user can mend is one line and the exit status of MISTAKES."""
    if dist.is_torchelastic_launched():  # rank 0 may have to download for long
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(hours=3))
    try:
        main()
    except BaseException as error:
        for kind, pattern, status, words in MISTAKES:
            if isinstance(error, kind) and re.search(pattern, str(error)):
                words = " ".join(words.format(error).split())
                print(f"{Path(sys.argv[0]).name}: {words}", file=sys.stderr)
                sys.exit(status)
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- several GPUs: torchrun starts a process for each, a rank, and one alone is rank 0 of 1 -----

def rank():
    """This process's number among those of torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def tell(message, file=None):
    """Print a line, on one rank, above a progress bar."""
    if rank() == 0:
        tqdm.write(message, file)


def progress(items, title):
    """The items of a sequence, with a bar where a terminal waits for them."""
    return tqdm(items, title, leave=False, delay=0.5, dynamic_ncols=True,
                disable=True if rank() else None)


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block before the others, which find what it downloaded or made."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and ranks() > 1:
        dist.barrier()


def average(tensors):
    """Replace tensors of one dtype by their means over the ranks, in one message."""
    if ranks() > 1:
        means = nn.utils.parameters_to_vector(tensors) / ranks()
        dist.all_reduce(means)
        nn.utils.vector_to_parameters(means, tensors)


def sharded_like(shard, tensor):
    """This rank's part of a tensor, split by FSDP as `shard` is; all, if that is not, or unlike."""
    if not hasattr(shard, "full_tensor") or tensor.shape != shard.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor, shard.device_mesh, shard.placements, src_data_rank=None)


def parts_of(cfg):
    """Slices of a step's batch: what this rank computes, in --accumulate parts one by one, so that
    a run is the same on any number of GPUs. Raises ValueError if it can't be split evenly."""
    count = ranks() * cfg.accumulate
    if cfg.batch % count:
        raise ValueError(f"--batch {cfg.batch}: must be a multiple of {count}, parts x processes")
    size, first = cfg.batch // count, rank() * cfg.accumulate
    return [slice(i * size, (i + 1) * size) for i in range(first, first + cfg.accumulate)]


# ---- data: uint8 images in memory, or mapped from a file ----------------------------------------

class Data(NamedTuple):
    """A data set."""

    images: torch.Tensor  # [N, C, H, W] uint8; of latents float32
    labels: torch.Tensor  # [N] int64
    classes: tuple        # names of the classes
    flip: bool = False    # whether batches have images mirrored at random

    @property
    def shape(self):
        return tuple(self.images.shape[1:])


def load_data(name, split, data_dir="data", size=32):
    """The training images ("train") of a data set as Data, or those held out ("test").

    name  one of KNOWN_DATA, or a folder or .zip of images (see folder_files), then of side `size`

    Held out are the official test set, the folder's own, or every sixth of the first 60,000 in a
    fixed random order.
    Raises ValueError for an unknown name or an unfit folder, OSError where files can't be had.
    """
    if name == "digits":
        from sklearn.datasets import load_digits
        images, labels = load_digits(return_X_y=True)
        order = np.random.RandomState(0).permutation(len(labels))
        order = order[(np.arange(len(order)) % 6 == 0) == (split == "test")]
        images = np.rint(images[order] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
        return Data(*map(torch.from_numpy, (images, labels[order])), tuple("0123456789"))
    if name in KNOWN_DATA:
        import torchvision
        source = getattr(torchvision.datasets, KNOWN_DATA[name])
        with rank_0_first():
            try:  # which downloads what is not there
                found = source(data_dir, split == "train", download=True)
            except (RuntimeError, OSError) as error:
                raise OSError(f"--data {name}: is not in {data_dir}, or damaged, and can't be "
                              f"downloaded ({error}); --data-dir tells where it is") from error
        images = torch.as_tensor(found.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        classes = tuple("0123456789") if name == "mnist" else tuple(found.classes)
        return Data(images, torch.as_tensor(found.targets).long(), classes)
    if not Path(name).is_dir() and not zipfile.is_zipfile(name):
        raise ValueError(f"--data {name}: no such folder, and none of {', '.join(KNOWN_DATA)}")
    return load_folder(Path(name), split, size, Path(data_dir))


def load_folder(folder, split, size, data_dir):
    """The Data of a folder or .zip, decoded once into a file in data_dir, which is then mapped; RGB
    unless all are grey. ValueError if a class has no image to train on, or none is held out."""
    files, classes = folder_files(folder)
    stamp = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime, *rest)
             for path, *rest in (files if folder.is_dir() else [(folder,)])]
    key = hashlib.sha256(json.dumps([stamp, size]).encode()).hexdigest()[:16]
    pixels, index = (data_dir / f"{folder.name}-{size}-{key}.{end}" for end in ("uint8", "labels"))
    with rank_0_first():
        if not index.exists():
            labels, count, colour, damaged = [], 0, False, []
            with ThreadPool() as pool, replacing(pixels) as file:
                images = pool.imap(lambda entry: decoded(entry[0], size), files)
                for (path, label, held_out), image in zip(progress(files, "images"), images):
                    if isinstance(image, Exception):
                        damaged.append(f"{path} ({image})")
                        continue
                    file.write(image.tobytes())
                    labels.append(label)
                    count += not held_out
                    colour = colour or bool((image != image[:1]).any())
            with replacing(index) as file:
                file.write(json.dumps([labels, count, colour]).encode())
            tell(f"{folder}: {len(labels)} images, kept decoded as {pixels} "
                 f"({pixels.stat().st_size / 1e6:.1f} MB); {len(damaged)} left out that can't be "
                 f"read{': ' * bool(damaged)}{'; '.join(damaged[:3])}", sys.stderr)
    labels, count, colour = json.loads(index.read_text())
    if (found := len({*labels[:count]})) < len(classes) or count == len(labels):
        raise ValueError(f"--data {folder}: has images to train on of {found} of its "
                         f"{len(classes)} classes, and {len(labels) - count} to hold out; put "
                         "some of each into folders named train and test")
    images = torch.from_numpy(np.memmap(pixels, mode="c").reshape(-1, 3, size, size))
    chosen = slice(count) if split == "train" else slice(count, None)  # views: nothing is read yet
    return Data(images[chosen, :3 if colour else 1], torch.tensor(labels[chosen]), classes)


def folder_files(folder):
    """The images of a folder that holds a folder for each class, or a train and a test folder of
    such folders. Or those that a dataset.json of NVlabs/edm's dataset_tool.py lists, in a folder or
    .zip; ValueError for a .zip without one.

    returns path, class number and whether it is held out of each, in a fixed random order, those to
    train on first; and the classes' names
    """
    root = folder if folder.is_dir() else zipfile.Path(folder)
    tests, listed = [], root / "dataset.json"
    if listed.exists():
        labels = json.loads(listed.read_text())["labels"]
        if labels is None:  # no classes
            names = ([str(path.relative_to(root)) for path in root.rglob("*")] if folder.is_dir()
                     else root.root.namelist())
            labels = [(name, 0) for name in names if name.endswith(ENDINGS)]
        files = [(root / name, label, False) for name, label in sorted(labels)]
        count = 1 + max(label for _, label in labels)
        classes = [str(label) for label in range(count) if count > 1]
    elif folder.is_dir():
        inner = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
        tests = [inner[name] for name in ("test", "testing", "val", "valid", "validation")
                 if name in inner][:1]
        train = next((inner[name] for name in ("train", "training") if name in inner and (
            tests or any(map(Path.is_dir, inner[name].iterdir())))), folder)  # else it is a class
        tests = tests if train != folder else []
        classes = sorted(p.name for p in train.iterdir() if p.is_dir() and p.name[0] != ".")
        files = [(path, label, part != train) for part in (train, *tests)
                 for label, name in enumerate(classes or [""])  # without classes: all are one
                 for path in sorted(Path(part, name).rglob("*")) if path.suffix.lower() in ENDINGS
                 and not any(name[0] == "." for name in path.relative_to(folder).parts)]
    else:
        raise ValueError(f"--data {folder}: a .zip needs EDM's dataset.json; unpack it")
    files = [files[i] for i in np.random.RandomState(0).permutation(len(files))]
    if not tests:
        files = [(*file[:2], i % 6 == 0 and i < 60000) for i, file in enumerate(files)]
    return sorted(files, key=lambda entry: entry[2]), tuple(classes) or ("all",)


def decoded(path, size):
    """An image file -> uint8 [3, size, size], turned as EXIF says, transparency on white, scaled,
    and the middle cropped; or the exception that tells why it can't be read."""
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip to the lower 8
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return np.array(ImageOps.fit(image.convert("RGB"), (size, size))).transpose(2, 0, 1)
    except Exception as error:  # PIL's many decoders have no base in common for theirs
        return error


@torch.no_grad()
def encoded(data, codec, device):
    """Data of a codec's x0: images (from 4 GB on they stay mapped), or latents on a device, with
    --flip those of the mirror images too."""
    labels = data.labels.to(device)
    if isinstance(codec, Pixels):
        return data._replace(labels=labels, images=data.images.to(device) if
                             data.images.nbytes < 2**32 else data.images)
    parts = data.images.chunk(len(labels) // 256 + 1)
    views = [codec.encode(to_float((part.flip(-1) if flip else part).to(device)))
             for flip in (False, True)[:1 + data.flip] for part in progress(parts, "latents")]
    return Data(torch.cat(views), labels.repeat(1 + data.flip), data.classes)


def batch_at(step, count, batch, seed, device="cpu"):
    """Indices [batch] of a step's images: each image at most once in count // batch steps."""
    epoch, position = divmod(step, count // batch)
    return permutation(count, seed, epoch, device)[position * batch:(position + 1) * batch]


@functools.lru_cache(maxsize=8)  # copied to a GPU once
def permutation(count, seed, epoch, device):
    """An order of `count` images: [count] int64"""
    return torch.randperm(count, generator=seeded(ORDER, seed, epoch)).to(device)


def training_batches(data, start, cfg, parts, device):
    """Yield x0 [B, C, H, W] in [-1, 1] and labels [B] for each part of each step from `start`."""
    for step in itertools.count(start):
        index = batch_at(step, len(data.labels), cfg.batch, cfg.seed, data.images.device)
        for part in parts:
            x0 = to_float(data.images[index[part]].to(device))
            if data.flip:
                draw = Draw(FLIP, cfg.seed, step, cfg.batch, (), device, part)
                x0 = torch.where(draw.uniform().view(-1, 1, 1, 1) < 0.5, x0.flip(-1), x0)
            yield x0, data.labels[index[part]]


def to_float(images):
    """uint8 -> float32 in [-1, 1]; latents, which are float32, as they are."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images


def clamped(images):
    """Images as they are shown, in [-1, 1]; their gradient is as if they were not clamped, for one
    beyond the range must be able to return (straight-through, Bengio et al. 2013)."""
    return images + (images.clamp(-1, 1) - images).detach()


def to_uint8(images):
    """[-1, 1] -> uint8, rounded as EDM does."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


# ---- random numbers: no state to save, for every draw is made of its place in the run -----------

# The independent streams of random numbers: whatever draws has its own.
TEACHER, GENERATOR, ORDER, NOISE, FEATURES, SUBSET, TRAINED_STEP, FLIP, AUTOENCODER = range(9)


def seeded(stream, *key, device="cpu"):
    """A torch.Generator for the place in a stream that `key`, non-negative integers, names."""
    seed = np.random.SeedSequence((stream, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) % 2**63)  # what a signed integer holds


class Draw:
    """The random numbers of one training step, in the order they are asked for, drawn for the whole
    batch; every answer gives the `part`: B of them."""

    def __init__(self, stream, seed, step, batch, shape, device, part=slice(None)):
        self.options = dict(generator=seeded(stream, seed, step, device=device), device=device)
        self.batch, self.shape, self.part = batch, shape, part

    def uniform(self, low=0.0, high=1.0):
        """[B] in [low, high)"""
        return low + (high - low) * torch.rand(self.batch, **self.options)[self.part]

    def normal(self):
        """[B, *shape] standard normal"""
        return torch.randn(self.batch, *self.shape, **self.options)[self.part]

    def label(self, num_classes):
        """[B] int64 in [0, num_classes)"""
        return torch.randint(num_classes, (self.batch,), **self.options)[self.part]


def fresh_noise(count, shape, seed, start=0):
    """Yield standard normal noise [count, *shape] without end, one for each step of a sampler; that
    of image i is made of seed and start + i only."""
    rngs = [seeded(NOISE, seed, i) for i in range(start, start + count)]
    while True:
        yield torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


# ---- optimisation -------------------------------------------------------------------------------

class Descent:
    """Steps of an optimizer, each down the mean of the losses whose gradients were added before;
    several processes average theirs."""

    def __init__(self, optimizer, cfg, device, prefix=""):
        self.optimizer, self.clip, self.parts = optimizer, cfg.clip, cfg.accumulate
        self.prefix = prefix  # of the names of what is logged
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.sharded = hasattr(self.parameters[0], "full_tensor")
        self.scaler = torch.amp.GradScaler(  # of small gradients, which would vanish in float16
            device.type, init_scale=2.0**10, enabled=dtype_of(cfg, device) == torch.float16)

    def add(self, loss):
        """Add the gradient of the loss of a part of the batch, of --accumulate such parts."""
        self.scaler.scale(loss / self.parts).backward()

    def step(self, lr):
        """Step at learning rate `lr` with a gradient of norm at most --clip; returns gradient_norm,
        of before, to be logged: 0 where a float16 step is left out."""
        if not self.sharded:  # FSDP does it by itself
            average([p.grad for p in self.parameters if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        norm = norm.full_tensor() if self.sharded else norm
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        left_out = ~norm.isfinite() & (self.scaler.scale(torch.ones_like(norm)) > 1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {f"{self.prefix}gradient_norm": torch.where(left_out, 0, norm)}

    def state_dict(self):
        return dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())

    def load_state_dict(self, state):
        moments = {i: {name: sharded_like(self.parameters[i], value) for name, value in own.items()}
                   for i, own in state["optimizer"]["state"].items()}
        self.optimizer.load_state_dict(dict(state["optimizer"], state=moments))
        self.scaler.load_state_dict(state["scaler"])


def rate_at(update, lr, warmup, decay_after=None):
    """Learning rate of an update, counted from 0: it rises to lr for `warmup` updates; from
    decay_after on (None: never) it halves every decay_after / 5 updates."""
    rise = (update + 1) / max(warmup, 1)
    fall = 5 * (1 - update / decay_after) if decay_after else 0
    return lr * min(1, rise, 2.0**fall)


@torch.no_grad()
def update_ema(ema, model, decay, update):
    """ema <- decay ema + (1 - decay) model, for all parameters; in update k, from 0, the memory is
    shorter: it fades by at least 9 / (k + 10)."""
    decay = min(decay, (update + 1) / (update + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def pick_device(name):
    """The torch.device of --device, this rank's own; ValueError if it is not to be had."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in here if here[n]) if name == "auto" else name
    if not here[name]:
        raise ValueError(f"--device {name}: PyTorch finds only {[n for n in here if here[n]]}")
    if name == "cuda" and ranks() > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def dtype_of(cfg, device):
    """The torch.dtype of arithmetic. auto is bfloat16 where it saves time: on CUDA by --compile or
    --lora, for else autocast costs as much; on a CPU that has it by recipes for a CPU."""
    on_cuda = device.type == "cuda"
    has_bfloat16 = (torch.cuda.is_bf16_supported(including_emulation=False) if on_cuda else
                    torch.cpu.get_capabilities().get("avx512_bf16"))
    saves = cfg.compile or getattr(cfg, "lora", 0) if on_cuda else cfg.recipe.endswith("-cpu")
    auto = "bfloat16" if has_bfloat16 and saves else "float32"
    return getattr(torch, auto if cfg.dtype == "auto" else cfg.dtype)


def prepare(cfg, device, *denoisers):
    """Set how networks compute, as --dtype, --compile and --checkpointing say."""
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # with and without gradients, encoder only...
    dtype = dtype_of(cfg, device)
    for denoiser in denoisers:
        if isinstance(denoiser, Autoencoder) and cfg.checkpointing:
            denoiser.vae.enable_gradient_checkpointing()
        of_text = hasattr(getattr(denoiser, "net", None), "prompts")  # whose weights are in Linear
        kinds = (nn.Conv2d, nn.Linear) if of_text else nn.Conv2d
        for layer in denoiser.modules():
            if isinstance(layer, kinds) and not layer.weight.requires_grad:
                layer.to(dtype)  # once, not in every pass as by autocast; for roles by LoRA, too
            if isinstance(layer, nn.GroupNorm):  # in float32, as autocast has it on cuda
                layer.register_forward_pre_hook(lambda _, inputs: inputs[0].float())
            if isinstance(layer, Block) and cfg.checkpointing:
                layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False,
                                                  preserve_rng_state=False)
        for part in getattr(denoiser, "vae", denoiser).children():  # an autoencoder has four
            if dtype != torch.float32:
                part.forward = torch.autocast(device.type, dtype)(part.forward)
            if cfg.compile:
                part.compile(dynamic=False)


# ---- checkpoints --------------------------------------------------------------------------------

@contextlib.contextmanager
def replacing(path, keep=False):
    """A file to write to, named `path` when it is whole and on the disk; with `keep` what was there
    is then named last.1.pt, or the like. OSError if it can't be written."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, path.with_suffix(f".1{path.suffix}"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the latter of the former
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise OSError(f"{path}: can't be written ({reason.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def save(state, path, keep=False):
    """torch.save() by replacing(), on rank 0; shards, of which all ranks call it, are gathered."""
    where = "meta" if rank() else "cpu"  # "meta": the other ranks drop it
    state = tree_map(lambda part: part.full_tensor().to(where)
                     if hasattr(part, "full_tensor") else part, state)
    if rank() == 0:
        with replacing(path, keep) as file:
            torch.save(state, file)


def load(path, kind=None):
    """Read a checkpoint of this project, executing nothing from it.

    returns a dictionary: kind, version, config, step; data (name, data_dir, size, shape, classes,
    flip, count); network (arguments of UNet or Autoencoder), model (the EMA weights); unless of an
    autoencoder prediction, schedule, autoencoder; of a generator sigmas, figures, teacher_figures,
    in generator.pt fake_score; in the others training (what --resume restores)
    Raises ValueError if the file is missing, foreign, damaged or of another kind.
    """
    before = Path(path).with_suffix(".1.pt")
    instead = f"; the one before it is {before}" if before.is_file() else ""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint file{instead}")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # PyTorch looks at no checksum
        checkpoint = None if damaged else torch.load(path, "cpu", weights_only=True, mmap=True)
        found, version = checkpoint["kind"], checkpoint["version"]
    except Exception as error:  # zipfile and torch.load raise a dozen kinds
        raise ValueError(f"{path}: no checkpoint of this project, or damaged{instead}") from error
    if version != __version__ or kind not in (None, found):
        raise ValueError(f"{path}: holds a {found} of version {version}, needed is "
                         f"{kind or 'one'} of {__version__}")
    return checkpoint


def build(checkpoint, device="cpu"):
    """The denoiser or autoencoder of a checkpoint, in eval mode, without gradients; a new one where
    `model` is None; and where an autoencoder would be but None is, Pixels."""
    if checkpoint is None:
        return Pixels()
    model = (Autoencoder(**checkpoint["network"]) if checkpoint["kind"] == "autoencoder" else
             Denoiser(UNet(**checkpoint["network"]), checkpoint["prediction"]))
    if checkpoint["model"]:
        model.load_state_dict(checkpoint["model"])
    return model.to(device).eval().requires_grad_(False)


def shape_of(network):
    """The shape [C, H, W] of what a network of these arguments takes."""
    return network["img_channels"], network["img_resolution"], network["img_resolution"]


# ---- a run: its folder, log, checkpoints and signals --------------------------------------------

class Run:
    """What goes on around the steps of training, in the folder --out.

    parts  networks and optimizers by name: what the checkpoint `name` keeps, and --resume restores
    facts  what it tells of the data; must be the same when the run is resumed
    """

    def __init__(self, cfg, name, parts, facts):
        self.cfg, self.parts, self.facts, self.start = cfg, parts, facts, 0
        self.path = Path(cfg.out, "profile" * cfg.profile, name)
        self.log, self.wandb = self.path.with_name("log.jsonl"), None
        self.pending, self.signal = [], 0
        self.began = self.said = time.perf_counter()
        if cfg.batch > (facts["count"] or cfg.batch):  # which is None if none are needed
            raise ValueError(f"--batch {cfg.batch}: exceeds the {facts['count']} training images")
        if cfg.resume:
            self.restore(load(cfg.resume))
        self.bar = tqdm(total=cfg.steps, initial=self.start, dynamic_ncols=True,
                        disable=True if rank() else None)
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.with_name("config.json").write_text(json.dumps(vars(cfg), indent=1) + "\n")
            lines = [line for line in read_log(self.log) if line["step"] <= self.start]
            self.log.write_text("".join(json.dumps(line) + "\n" for line in lines if cfg.resume))
            if cfg.wandb:
                import wandb
                ids = [path.name.split("-")[-1] for path in Path(cfg.out).glob("wandb/*run-*-*")]
                self.wandb = wandb.init(  # offline where nobody is logged in: it must not ask
                    project="dmd2", dir=cfg.out, config=vars(cfg), id=ids[0] if cfg.resume and ids
                    else None, resume="allow", mode=None if wandb.api.api_key else "offline")

    def restore(self, checkpoint):
        """Begin where a checkpoint ends; ValueError if it is not of this run, or can't be."""
        path, self.start = self.cfg.resume, checkpoint["step"]
        if "training" not in checkpoint:
            raise ValueError(f"--resume {path}: holds no optimizers; last.pt does")
        if self.start >= self.cfg.steps and not self.cfg.profile:
            raise ValueError(f"--steps {self.cfg.steps}: {path} has done {self.start} already")
        for name in self.facts.keys() - {"name", "data_dir"}:  # which may have moved
            before, now = checkpoint["data"][name], self.facts[name]
            if before != now:
                raise ValueError(f"--resume {path}: the data's {name} was {before!s:.200}, "
                                 f"and is {now!s:.200}")
        for name, part in self.parts.items():
            own, state = part.state_dict(), checkpoint["training"][name]
            part.load_state_dict({key: sharded_like(own[key], state[key]) for key in state})

    def steps(self, checkpoint):
        """Yield the numbers of the steps to do, from 0; log and save between them. SIGINT and
        SIGTERM end the process when the step under way is done and saved.

        checkpoint  () -> what a checkpoint holds besides version, config, step, data and parts
        """
        cfg = self.cfg
        steps = profiled(self) if cfg.profile else range(self.start, cfg.steps)
        handlers = {n: signal.signal(n, self.stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in steps:
                self.step, self.began = step, self.began if self.pending else time.perf_counter()
                yield step
                self.bar.update()
                number = torch.tensor(self.signal)
                if ranks() > 1:
                    dist.all_reduce(number, dist.ReduceOp.MAX)
                saves = (number or due(step, cfg.save_every, cfg.steps)) and not cfg.profile
                if saves or due(step, cfg.log_every, cfg.steps):
                    self.write(step)  # which raises if the run diverged
                if saves:
                    training = {name: part.state_dict() for name, part in self.parts.items()}
                    save(dict(checkpoint(), version=__version__, config=vars(cfg), step=step + 1,
                              data=self.facts, training=training), self.path, True)
                if number and step + 1 < cfg.steps and not cfg.profile:
                    tell(f"step {step + 1} is saved; go on with --resume {self.path}", sys.stderr)
                    sys.exit(128 + number.item())
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.bar.close()
            if self.wandb:
                self.wandb.finish()

    def stop(self, number, frame):
        if self.signal == number == signal.SIGINT:  # again
            raise KeyboardInterrupt
        self.signal = number

    def note(self, **values):
        """Take in scalars of the step under way: tensors, which the loop must not wait for."""
        self.pending += [(self.step + 1, name, value.detach()) for name, value in values.items()]

    def write(self, step, **figures):
        """Write a line of the log: the means of what was noted since the last one, and figures;
        FloatingPointError naming step and quantity if a value is not finite."""
        values = [(step + 1, name, float(value)) for name, value in figures.items()]
        if self.pending:
            steps, names, noted = zip(*self.pending)
            noted, self.pending = torch.stack(noted), []
            average([noted])
            values += zip(steps, names, noted.tolist())
            images = (steps[-1] - steps[0] + 1) * self.cfg.batch
            values.append((step, "images_per_second", images / (time.perf_counter() - self.began)))
        collected = {}
        for at, name, value in values:
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {at}")
            collected.setdefault(name, []).append(value)
        if not values or rank():
            return
        line = {name: float(f"{sum(found) / len(found):.6g}") for name, found in collected.items()}
        with open(self.log, "a") as file:
            file.write(json.dumps(dict(step=step + 1, **line)) + "\n")
        if self.wandb:
            self.wandb.log(line, step=step + 1)
        shown = {name: f"{line[name]:.3g}" for name in line if "loss" in name or "per_" in name}
        self.bar.set_postfix(shown)
        if self.bar.disable and shown and time.perf_counter() > self.said + 60:  # a line a minute
            self.said = time.perf_counter()
            tell(f"step {step + 1} of {self.cfg.steps}: "
                 + ", ".join(f"{name} {value}" for name, value in shown.items()), sys.stderr)

    def measure(self, step, figures):
        """Measure by figures() -> a dictionary of scalars, log and print them, and return them."""
        self.write(step)  # before that takes long; it raises if the run diverged
        values = figures()
        self.write(step, **values)
        tell(f"step {step + 1}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}"
                                             for name, value in values.items()), sys.stderr)
        return values

    def draw(self, step, picture):
        """Write samples_<step>.png by picture(path), and loss.png."""
        self.write(step)
        with torch.compiler.set_stance("force_eager"):  # its batch is of another size
            picture(self.path.with_name(f"samples_{step + 1:06d}.png"))  # by all ranks, in shards
        if rank() == 0:
            plot_log(self.log)


def due(step, every, steps):
    """Whether what is done every so many steps (0: never) and at the last is due after a step."""
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


def profiled(run):
    """Yield some steps of a run, meanwhile time them, count operations and trace some; report."""
    cfg, device = run.cfg, next(next(iter(run.parts.values())).parameters()).device
    cycle = getattr(cfg, "fake_steps", 1)  # the steps in which each kind of update happens
    steps, times = itertools.count(run.start), []
    yield from itertools.islice(steps, 4 * cycle)
    for _ in range(21):
        yield from itertools.islice(steps, cycle)
        getattr(torch, device.type).synchronize()  # for all that it was asked for
        times.append(time.perf_counter())
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        yield from itertools.islice(steps, cycle)
    with torch.profiler.profile() as profiler:
        yield from itertools.islice(steps, cycle)
    trace, seconds = run.path.with_name("trace.json"), np.median(np.diff(times)) / cycle
    if rank() == 0:
        profiler.export_chrome_trace(str(trace))
    by = "cpu_time_total" if device.type == "cpu" else "device_time_total"
    tell(profiler.key_averages().table(by, row_limit=25, max_name_column_width=40))
    tell(f"{device_name(device)}, torch {torch.__version__}, {dtype_of(cfg, device)}"
         f"{', compiled' * cfg.compile}, batch {cfg.batch}: a step takes {1000 * seconds:.2f} ms "
         f"(median of 20), {cfg.batch / seconds:.0f} images/s, "
         f"{counter.get_total_flops() / cycle / 1e9:.2f} GFLOP"
         + (f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" * (device.type == "cuda"))
         + f"; trace: {trace}")


def device_name(device):
    """What a measured time is of."""
    threads = f"{torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {threads}"


def read_log(path):
    """The lines of a log.jsonl as dictionaries, but for one that a killed process did not finish"""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


# ---- pictures -----------------------------------------------------------------------------------

def plot_log(path):
    """Draw a log.jsonl as loss.png beside it: a panel per quantity, the teacher's dashed."""
    from matplotlib.figure import Figure
    lines = read_log(path)
    curves = {name: [(line["step"], line[name]) for line in lines if name in line]
              for name in {*itertools.chain(*lines)} - {"step"}}
    names = sorted(name for name in curves if not name.startswith(("teacher_", "validation_")))
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(12, 2.6 * rows), layout="constrained")
    for i, name in enumerate(names):
        panel = figure.add_subplot(rows, 3, i + 1, title=name, xlabel="step")
        panel.plot(*zip(*curves[name]))
        if f"validation_{name}" in curves:
            panel.plot(*zip(*curves[f"validation_{name}"]))
            panel.legend(["training", "validation"])
        for _, value in curves.get(f"teacher_{name}", []):
            panel.axhline(value, ls="--", color="gray")
    figure.savefig(path.with_name("loss.png"), dpi=90)


def save_grid(rows, names, path, titles=()):
    """Write rows of images, uint8 [R, K, C, H, W], as one picture, small ones enlarged, with names
    at the left and titles above."""
    zoom, font = max(1, round(56 / rows.shape[-1])), ImageFont.load_default(14)
    left = 8 + max([round(font.getlength(name)) for name in names], default=0)
    top, step = 22 if titles else 4, rows.shape[-1] * zoom + 4
    tiles = rows.cpu().repeat_interleave(zoom, 3).repeat_interleave(zoom, 4)
    tiles = F.pad(tiles, (0, 4, 0, 4), value=255).permute(0, 3, 1, 4, 2)  # rows, y, columns, x, C
    pixels = F.pad(tiles.flatten(2, 3).flatten(0, 1), (0, 0, left, 0, top, 0), value=255)
    sheet = Image.fromarray(pixels.expand(-1, -1, 3).numpy())
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((left + (column + 0.5) * step, 3), title, "black", font, anchor="ma")
    for row, name in enumerate(names):
        draw.text((left - 6, top + (row + 0.5) * step - 2), name, "black", font, anchor="rm")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        sheet.save(path)


def main(argv=None):
    cfg = parse(Config, argv, __doc__.split("\n\nAfter this file")[0], recipe)
    path = train(cfg)
    if not cfg.profile:
        then = "teacher.py --latent" if cfg.autoencoder else "dmd2.py --teacher"
        tell(f"{path}; next: python {then} {path}")


if __name__ == "__main__":
    run_script(main)
