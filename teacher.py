"""Train a class-conditional diffusion model on images: the teacher that dmd2.py distils.

    python teacher.py                       # 1,797 real 8x8 digits, no download
    python teacher.py --data mnist          # or fashion, cifar10, a folder of images
    python teacher.py --autoencoder --data mnist                     # latent diffusion: first this,
    python teacher.py --latent runs/autoencoder/autoencoder.pt       # then a teacher of its latents

After this file a diffusion model, of whatever dialect, is a function and no more:

    x = x0 + sigma * noise                  x0 in [-1, 1], noise standard normal
    denoiser(x, sigma, label) -> x0_hat     the mean of all the x0 that x may have come from

The first 560 lines are diffusion, in the terms of EDM (Karras et al. 2022, "Elucidating the Design
Space of Diffusion-Based Generative Models"): noise levels, denoiser and loss, sampling, the
training loop, the networks. The others are what any training script needs, and the other scripts
import from here: options, several GPUs, data, latents (an autoencoder, for x0 may be what it makes
of an image), random numbers, optimisation, checkpoints, logging, --profile, pictures.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pickle
import pickletools
import re
import reprlib
import shutil
import signal
import stat
import statistics
import struct
import sys
import threading
import time
import timeit
import warnings
import weakref
import zipfile
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_digits
from torch import nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

SIGMA_MIN, SIGMA_MAX, RHO, SIGMA_DATA = 0.002, 80.0, 7.0, 0.5  # EDM, Table 1
HEUN_STEPS = 18  # of a teacher's sampler, as EDM has for CIFAR-10
KNOWN_DATA = ("digits", "mnist", "fashion", "cifar10")
ANY_CLASS = ("any/",)  # the classes of a model without labels; no folder has this name
DATA_DIR, FOLDER_SIZE = "data", 32
OUT, AUTOENCODER_OUT = "runs/teacher", "runs/autoencoder"
MEMORY = 4 * 2**30  # bytes: a folder with more pixels stays on the disk
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM")  # PIL would run a program in PostScript
GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B"}  # PIL's modes of images without colour

# What of teacher.py depends on the data: it fills the options that were not given.
RECIPES = {
    "digits": dict(width=32, mults="1,2", blocks=1, batch=128, steps=1200, lr=2e-3, ema=0.99),
    "mnist": dict(width=32, mults="1,2,2", blocks=2, batch=256, steps=20000, lr=1e-3, ema=0.999),
    "cifar10": dict(width=96, mults="1,2,2", blocks=3, batch=256, steps=100000, lr=5e-4, ema=0.999,
                    flip=True),
    "folder": dict(width=64, mults="1,2,2", blocks=2, batch=64, steps=20000, lr=5e-4, ema=0.999),
    # Of any data: an autoencoder, and a teacher of its latents.
    "autoencoder": dict(width=16, mults="1,2,4", blocks=1, batch=128, steps=1500, lr=2e-3, ema=0.99,
                        decay_after=900),
    "latents": dict(width=64, blocks=2, batch=128, steps=5000, lr=1e-3, ema=0.999,
                    decay_after=3000),
}
RECIPES["fashion"] = RECIPES["mnist"]


# ---- noise levels -------------------------------------------------------------------------------

LOW, HIGH = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)

# Quantile functions: the noise level below which a share u of the training draws lies.
SCHEDULES = {
    "lognormal": lambda u: torch.exp(-1.2 + 1.2 * 2**0.5 * torch.erfinv(2 * u - 1)),  # EDM Table 1
    "karras": lambda u: (LOW + u * (HIGH - LOW)) ** RHO,                              # EDM Eq. 5
    "linear": lambda u: timestep_sigma(u, "linear"),        # DDPM, Ho et al. 2020
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


def sigma_at(u, schedule):
    """Noise level at quantile u of a schedule.

    u  any shape, in [0, 1]
    returns sigma of that shape, rising with u, in the schedule's range: of lognormal and karras
    [SIGMA_MIN, SIGMA_MAX]
    """
    sigma = SCHEDULES[schedule](u)
    return sigma.clamp(SIGMA_MIN, SIGMA_MAX) if schedule in ("lognormal", "karras") else sigma


@functools.cache
def timestep_sigmas(schedule, device="cpu", dtype=torch.float64):
    """The noise levels [1000] of DDPM's timesteps: sqrt(1 / alpha_bar - 1)."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    else:  # given by alpha_bar, but for a factor
        signal = {"cosine": torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
                  "sigmoid": torch.sigmoid(torch.full_like(t, 3)) - torch.sigmoid(6 * t - 3)}
        betas = (1 - signal[schedule][1:] / signal[schedule][:-1]).clamp(max=0.999)
    return (1 / (1 - betas).cumprod(0) - 1).sqrt().to(device, dtype)


def timestep_sigma(u, schedule):
    """The noise level at u of the way from the first timestep to the last; ln sigma is linear."""
    log_sigmas, timestep = timestep_sigmas(schedule, u.device, u.dtype).log(), 999 * u
    below = timestep.long().clamp(max=998)
    return torch.lerp(log_sigmas[below], log_sigmas[below + 1], timestep - below).exp()


def quantile_of(sigma):
    """The quantile of karras, in [0, 1], at which a noise level, a float, lies."""
    return min(max((sigma ** (1 / RHO) - LOW) / (HIGH - LOW), 0.0), 1.0)


def lowest_quantile(schedule):
    """The quantile of karras where a schedule's range of noise levels begins."""
    return quantile_of(sigma_at(torch.zeros((), dtype=torch.float64), schedule).item())


def precondition(prediction, sigma):
    """The coefficients c_skip, c_out, c_in of a prediction, each of sigma's shape."""
    return PREDICTIONS[prediction](sigma)


# ---- denoiser and loss --------------------------------------------------------------------------

class Denoiser(nn.Module):
    """A network F, preconditioned (EDM Eq. 7): c_skip x + c_out F(c_in x, ln(sigma) / 4, label)."""

    def __init__(self, net, prediction="edm"):
        super().__init__()
        self.net, self.prediction, self.dtype = net, prediction, torch.float32

    def forward(self, x, sigma, label):
        """x [B, C, H, W], sigma [B], label [B] int64 -> x0_hat [B, C, H, W] float32"""
        return self.estimate(x, sigma, label)[0]

    def features(self, x, sigma, label):
        """The same inputs -> [B, c, h, w] float32, the output of the network's encoder"""
        return self.estimate(x, sigma, label, decode=False)[1]

    def estimate(self, x, sigma, label, decode=True):
        """Both in one pass, x0_hat and features; x0_hat None without decode."""
        x, sigma_ = x.float(), sigma.float().view(-1, 1, 1, 1)
        c_skip, c_out, c_in = precondition(self.prediction, sigma_)
        with autocast(x.device, self.dtype):
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
        mean(min(SNR, gamma) (x0_hat - x0)^2)   with min_snr_gamma; SNR = 1 / sigma^2

    returns a scalar; the first is 1 for an edm network that has learnt nothing. The second, of Hang
    et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", is the same for
    every prediction.
    """
    sigma = sigma.view(-1, 1, 1, 1)
    _, c_out, _ = precondition(prediction, sigma)
    error = ((x0_hat - x0) / c_out).square()
    if min_snr_gamma is not None:
        error = error * c_out**2 * (1 / sigma**2).clamp(max=min_snr_gamma)
    return error.mean()


# ---- sampling, as far as training needs it; the rest is in sample.py ----------------------------

def sampling_sigmas(steps, schedule, own=False):
    """Levels for a sampler, falling, and then 0: of the schedule's range, SIGMA_MAX at most.

    They are karras's, which are good for any denoiser, or the schedule's own, all of its range;
    lognormal, which is not meant for this, has karras's for its own.
    """
    if own and schedule != "lognormal":
        sigmas = sigma_at(torch.linspace(1, 0, steps, dtype=torch.float64), schedule)
    else:
        u = torch.linspace(1, lowest_quantile(schedule), steps, dtype=torch.float64)
        sigmas = sigma_at(u, "karras")
    return [*sigmas.tolist(), 0.0]


@torch.no_grad()
def heun(denoiser, x, sigmas, label, noises=(), churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0):
    """EDM's sampler (Algorithm 2, without churn Algorithm 1): 2 steps - 1 evaluations.

    x       [B, C, H, W]  noise of level sigmas[0], float32 or float64, which is kept
    sigmas  falling noise levels, floats, the last of them 0
    label   [B]           int64
    noises  standard normal [B, C, H, W], one for each step, if there is churn
    churn, s_min, s_max, s_noise  S_churn and so on: how much noise is added before a step, at which
                                  levels, and its standard deviation
    returns x0 [B, C, H, W]
    """
    steps, noises = len(sigmas) - 1, iter(noises)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        if churn > 0 and s_min <= sigma <= s_max:
            sigma_hat = sigma * (1 + min(churn / steps, 2**0.5 - 1))
            x = x + (sigma_hat**2 - sigma**2) ** 0.5 * s_noise * next(noises)
            sigma = sigma_hat
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

    kind = "teacher"

    def __init__(self, cfg, data, codec):
        self.cfg, self.codec, self.classes, self.shape = cfg, codec, data.classes, data.shape
        self.stream, mults, side = TEACHER, mults_of(cfg), data.shape[-1]
        self.network = dict(img_resolution=side, img_channels=data.shape[0],
                            label_dim=len(data.classes), model_channels=cfg.width,
                            channel_mult=mults, num_blocks=cfg.blocks,
                            attn_resolutions=(side >> len(mults) - 1,))

    def facts(self):
        """What the checkpoint holds besides network and weights."""
        return dict(prediction=self.cfg.prediction, schedule=self.cfg.schedule,
                    autoencoder=self.codec.checkpoint())

    def losses(self, denoiser, x0, label, draw):
        """Losses by name, all to be logged, `loss` to be descended: scalars.

        x0 [B, C, H, W], label [B] int64
        """
        label = torch.where(draw.uniform() < self.cfg.label_dropout, len(self.classes), label)
        sigma = sigma_at(draw.uniform(), self.cfg.schedule)
        return dict(loss=denoising_loss(denoiser, x0, sigma, label, draw.normal(),
                                        self.cfg.min_snr_gamma))

    @torch.no_grad()
    def validate(self, denoiser, x0, label):
        """Figures: the loss at fixed noise and evenly spread quantiles of sigma."""
        u = (torch.arange(len(x0), device=x0.device) + 0.5) / len(x0)
        noise, sigma = unit_noise(len(x0), self.shape, 0), sigma_at(u, self.cfg.schedule)
        return dict(validation_loss=denoising_loss(denoiser, x0, sigma, label, noise.to(x0.device),
                                                   self.cfg.min_snr_gamma).item())

    def picture(self, denoiser, x0, label, path, columns=8):
        """Samples, a row per class (the first 10), of the same noise each time."""
        label = torch.arange(min(len(self.classes), 10)).repeat_interleave(columns)
        noise = unit_noise(len(label), self.shape, 0).to(x0.device)
        sigmas = sampling_sigmas(HEUN_STEPS, self.cfg.schedule)
        x0_hat = heun(denoiser, sigmas[0] * noise, sigmas, label.to(x0.device))
        images = to_uint8(self.codec.decode(x0_hat))
        save_grid(images.unflatten(0, (-1, columns)), self.classes[:10], path)


def train(cfg):
    """Train a teacher, or by AutoencoderTask an autoencoder; returns its checkpoint's path."""
    device, source = pick_device(cfg.device), None
    if cfg.resume or cfg.latent:  # the run to go on with, or the autoencoder
        source = load(cfg.resume or cfg.latent, resume=bool(cfg.resume),
                      kind=None if cfg.resume else "autoencoder")
    cfg, autoencoder = completed(cfg, source)
    parts, codec = parts_of(cfg), codec_of(autoencoder, device)
    data, held_out, facts = load_to_train(cfg, source, codec, device)
    count = len(data.labels)
    task = (AutoencoderTask if cfg.autoencoder else DiffusionTask)(cfg, data, codec)
    torch.manual_seed(cfg.seed)
    model = place(network_of(dict(kind=task.kind, network=task.network, **task.facts())), device)
    ema, path = frozen(model), Path(cfg.out) / f"{task.kind}.pt"
    optimizer = torch.optim.Adam(model.parameters(), fused=device.type != "mps")
    descent = Descent(optimizer, cfg, device)
    start = 0
    if cfg.resume:
        start = source["step"]
        restore(dict(ema=ema, model=model, descent=descent),
                dict(source["training"], ema=source["model"]), cfg.resume)
        check_resumed(source, cfg, count, cfg.data)
    del source  # which may be large
    prepare(cfg, device, model)  # not ema: samples and validation are always float32
    log = Log(cfg, start, make_run_folder(cfg))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    mirrored = " (half of them mirrored)" * bool(cfg.latent and cfg.flip)
    log.say(f"{cfg.data}: {count} training images{mirrored}; {millions:.2f} M parameters; on "
            f"{device}; {cfg.steps} steps")
    batches = training_batches(data, start, cfg, parts, device)
    load_folder.cache_clear()  # what is left of it is in `data`

    def write_checkpoint(step):
        save(dict(kind=task.kind, config=dataclasses.asdict(cfg), step=step, network=task.network,
                  **task.facts(), data=facts, model=ema.state_dict(),
                  training=dict(model=model.state_dict(), descent=descent.state_dict(),
                                images=count)), path, cfg.keep)
        return path

    for step in training_steps(start, cfg, device, {task.kind: model}, log, write_checkpoint):
        for part in parts:
            x0, label = next(batches)
            draw = Draw(task.stream, cfg.seed, step, cfg.batch, task.shape, device, part)
            losses = task.losses(model, x0, label, draw)
            descent.add(losses["loss"])
            log.note(**losses)
        log.note(**descent.step(rate_at(step, cfg.lr, cfg.warmup, cfg.decay_after)))
        update_ema(ema, model, cfg.ema, step)

        log.step()
        if due(step, cfg.sample_every, cfg.steps):
            log.check()
            figures = task.validate(ema, *held_out)
            log.write(step + 1, **figures)
            told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
            log.say(f"step {step + 1}: {told.replace('_', ' ')}")
            task.picture(ema, *held_out, path.with_name(f"samples_{step + 1:06d}.png"))
    log.close()
    return path


def due(step, every, steps):
    """Whether what is done every so many steps, and at the last, is due after `step`, from 0.

    every  0 for never
    """
    return every > 0 and ((step + 1) % every == 0 or step + 1 == steps)


# ---- networks: EDM's DDPM++ and ADM, with the names of its published checkpoints ----------------

class Architecture(NamedTuple):
    """The constants in which EDM's two networks differ."""

    skip_scale: float   # of the sums that end a residual block and its attention
    eps: float          # of group norms
    head_channels: int  # of an attention head; 0 for one head of all
    adm: bool           # the embedding scales channels, too, and what else is otherwise in ADM


ARCHITECTURES = {
    "SongUNet": Architecture(0.5**0.5, 1e-6, 0, adm=False),   # DDPM++, Song et al. 2021
    "DhariwalUNet": Architecture(1, 1e-5, 64, adm=True),      # ADM, Dhariwal and Nichol 2021
}


class Block(nn.Module):
    """Residual block with optional resampling and self-attention."""

    def __init__(self, kind, c_emb, c_in, c_out, resample=None, attention=False):
        super().__init__()
        self.kind, self.resample = kind, resample
        self.heads = c_out // kind.head_channels if kind.head_channels else 1
        has_skip = c_in != c_out or resample and not kind.adm
        self.norm0 = group_norm(c_in, kind.eps)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = nn.Linear(c_emb, 2 * c_out if kind.adm else c_out)
        self.norm1 = group_norm(c_out, kind.eps)
        self.conv1 = scaled(nn.Conv2d(c_out, c_out, 3, padding=1), 1e-5)
        self.skip = nn.Conv2d(c_in, c_out, 1) if has_skip else nn.Identity()
        self.norm2 = group_norm(c_out, kind.eps) if attention else None
        self.qkv = scaled(nn.Conv2d(c_out, 3 * c_out, 1), 0.2**0.5) if attention else None
        self.proj = scaled(nn.Conv2d(c_out, c_out, 1), 1e-5) if attention else None

    def forward(self, x, emb):
        """x [B, c_in, H, W], emb [B, c_emb] -> [B, c_out, H', W'], H' = H, H / 2 or 2 H"""
        h = self.conv0(self.resized(F.silu(self.norm0(x))))
        emb = self.affine(emb)[:, :, None, None]
        if self.kind.adm:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + emb)
        x = (self.conv1(F.silu(h)) + self.skip(self.resized(x))) * self.kind.skip_scale
        if self.norm2 is not None:
            # EDM's qkv channels run as (head, channel, q|k|v); here as blocks q, k, v.
            weight, bias = (p.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
                            for p in (self.qkv.weight, self.qkv.bias))
            qkv = F.conv2d(self.norm2(x), weight, bias).unflatten(1, (3, self.heads, -1)).flatten(4)
            q, k, v = (part.mT for part in qkv.unbind(1))
            attended = F.scaled_dot_product_attention(q, k, v).mT
            x = (self.proj(attended.reshape(x.shape)) + x) * self.kind.skip_scale
        return x

    def resized(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x


def group_norm(channels, eps=1e-6):
    """GroupNorm as in EDM: up to 32 groups, of at least 4 channels, for fewer mean little."""
    groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps)


def scaled(layer, scale):
    layer.init_scale = scale
    return layer


class UNet(nn.Module):
    """EDM's network F. Argument and parameter names are those of NVlabs/edm.

    model_type  of ARCHITECTURES: teacher.py trains DDPM++, ADM is for checkpoints that are loaded

    Raises ValueError if a level's resolution can't be halved or the channels can't be grouped.
    """

    def __init__(self, img_resolution, img_channels, label_dim, model_channels, channel_mult,
                 num_blocks, attn_resolutions, model_type="SongUNet"):
        super().__init__()
        check_sizes(img_resolution, model_channels, channel_mult)
        kind = ARCHITECTURES[model_type]
        self.label_dim, self.adm, c_emb = label_dim, kind.adm, 4 * model_channels
        half, c_label = model_channels // 2, c_emb if self.adm else model_channels
        octaves = torch.linspace(0, 1 - self.adm / half, half, device="cpu")  # build() has meta
        self.register_buffer("freqs", 10000 ** -octaves, persistent=False)
        self.map_label = nn.Linear(label_dim, c_label, bias=not self.adm) if label_dim else None
        self.map_layer0 = nn.Linear(model_channels, c_emb)
        self.map_layer1 = nn.Linear(c_emb, c_emb)

        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        block = functools.partial(Block, kind, c_emb)
        channels, skips = model_channels * (channel_mult[0] if self.adm else 1), []
        for level, mult in enumerate(channel_mult):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = nn.Conv2d(img_channels, channels, 3, padding=1)
            else:
                self.enc[f"{res}x{res}_down"] = block(channels, channels, "down")
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = block(
                    channels, mult * model_channels, attention=res in attn_resolutions)
                channels = mult * model_channels
                skips.append(channels)
        self.bottleneck = channels, res  # channels and side of the encoder's output

        for level, mult in reversed(list(enumerate(channel_mult))):
            res = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{res}x{res}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(channels, channels)
            else:
                self.dec[f"{res}x{res}_up"] = block(channels, channels, "up")
            for i in range(num_blocks + 1):
                attends = res in attn_resolutions and (self.adm or i == num_blocks)
                self.dec[f"{res}x{res}_block{i}"] = block(
                    channels + skips.pop(), mult * model_channels, attention=attends)
                channels = mult * model_channels
        norm = group_norm(channels, kind.eps)
        conv = scaled(nn.Conv2d(channels, img_channels, 3, padding=1), 1e-5)
        if self.adm:
            self.out_norm, self.out_conv = norm, conv
        else:
            self.dec[f"{res}x{res}_aux_norm"], self.dec[f"{res}x{res}_aux_conv"] = norm, conv
        self.apply(initialise)

    def forward(self, x, c_noise, label, decode=True):
        """x [B, C, H, W], c_noise [B], label [B] int64, label_dim for "no label"

        returns F [B, C, H, W], or without decode None; and the output of the encoder's last block
        [B, c, h, w], the bottleneck
        """
        emb, skips = self.embedding(c_noise, label, x.dtype), []
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
        return conv(F.silu(norm(x))), features

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


def halved(side, channel_mult):
    """The side of a network's last level, each half the one before; ValueError if it can't be."""
    factor = 2 ** (len(channel_mult) - 1)
    if side % factor:
        near = max(side - side % factor, factor)
        levels = next(n for n in itertools.count(1) if side % 2**n)
        raise ValueError(f"images of side {side}: the network's {len(channel_mult)} levels need a "
                         f"multiple of {factor}, such as {near} or {near + factor}; or give "
                         f"--mults 1{',2' * (levels - 1)}")
    return side // factor


def check_sizes(img_resolution, model_channels, channel_mult):
    """Raises ValueError if a level can't be halved, or its channels can't be grouped."""
    halved(img_resolution, channel_mult)
    if model_channels % 4:
        raise ValueError(f"--width {model_channels}: must be a multiple of 4")


def initialise(layer):
    """EDM's initialisation of DDPM++: Xavier uniform, residual branches ending near zero."""
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(layer.weight, gain=getattr(layer, "init_scale", 1))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# =================================================================================================
# From here on: what any training script needs, and the autoencoder of latent diffusion.

# ---- options: one frozen dataclass per script, whose fields are its flags -----------------------

def arg(default, help, choices=None, at_least=None, at_most=None, below=None, free=False,
        positional=False):
    """A dataclass field that is also a flag. A `free` one may change when a run is resumed.

    at_least, at_most, below  the range of a number; None for no bound
    """
    metadata = dict(help=help, choices=choices, at_least=at_least, at_most=at_most, below=below,
                    free=free, positional=positional)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name):
    """The command-line form of a field's name: fake_steps -> --fake-steps."""
    return "--" + name.replace("_", "-")


@dataclasses.dataclass(frozen=True)
class Options:
    """What every script has. Raises ValueError naming the option, the value and what would work."""

    device: str = arg("auto", "where to compute; auto is cuda, or else mps, or else cpu",
                      ("auto", "cuda", "mps", "cpu"), free=True)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            low, high, below = (field.metadata[name] for name in ("at_least", "at_most", "below"))
            if value is None and field.default is None:
                continue
            whole = field.type is float and type(value) is int and abs(value) < 2**63
            if type(value) is not field.type and not whole:
                raise ValueError(f"{flag(field.name)} {reprlib.repr(value)}: must be of type "
                                 f"{field.type.__name__}")
            if value == "":
                raise ValueError(f"{flag(field.name)}: is empty; leave it out or give a value")
            if below is None:
                below = {int: 2**31, float: math.inf}.get(field.type)
            if choices and value not in choices:
                raise ValueError(f"{flag(field.name)} {value}: choose from "
                                 f"{', '.join(map(str, choices))}")
            if low is not None and not value >= low:
                raise ValueError(f"{flag(field.name)} {value}: must be at least {low}")
            if high is not None and not value <= high:
                raise ValueError(f"{flag(field.name)} {value}: must be at most {high}")
            if below is not None and not value < below:
                raise ValueError(f"{flag(field.name)} {value}: must be below {below}")


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Options):
    """What both training scripts have."""

    data_dir: str = arg(None, "where mnist, fashion and cifar10 are, or are downloaded to "
                              f"(default: {DATA_DIR}, or where the teacher found them)", free=True)
    stream: bool = arg(None, "leave a folder's images on the disk and read them when they are "
                             f"needed (default: if their pixels take more than {MEMORY >> 30} GB)",
                       free=True)
    seed: int = arg(0, "seed of every random draw", at_least=0, below=2**63)
    steps: int = arg(None, "training steps (default: by data)", at_least=1, free=True)
    batch: int = arg(None, "images per step, of all GPUs together (default: by data)", at_least=1)
    accumulate: int = arg(1, "parts that a GPU computes its images in, for less memory",
                          at_least=1, free=True)
    checkpointing: bool = arg(False, "compute activations anew in backward passes, for less memory",
                              free=True)
    warmup: int = arg(100, "updates over which a learning rate rises to its value", at_least=0)
    clip: float = arg(10.0, "gradients longer than this are scaled down to it", at_least=1e-9)
    decay_after: float = arg(None, "updates (dmd2.py: of the generator) after which the learning "
                                   "rate halves in every fifth of as many (default: by data, or "
                                   "never)", at_least=1, free=True)
    ema: float = arg(None, "decay per update of the averaged weights, which are what is kept "
                           "(default: by data)", at_least=0, below=1)
    dtype: str = arg("auto", "of the networks' arithmetic; auto is bfloat16 on cuda (float16 where "
                             "it lacks that), else float32",
                     ("auto", "float32", "bfloat16", "float16"))
    compile: str = arg("auto", "torch.compile the networks, with graphs as CUDA graphs; auto is "
                               "graphs on cuda, else off",
                       ("auto", "graphs", "on", "off"))
    profile: bool = arg(False, "time some steps, tell where they go, and stop; the trace and all "
                               "else goes to the folder profile in --out", free=True)
    log_every: int = arg(50, "steps between lines of log.jsonl", at_least=1, free=True)
    save_every: int = arg(200, "steps between checkpoints", at_least=1, free=True)
    keep: int = arg(2, "how many checkpoints before the last one to keep, such as last.1.pt and "
                       "last.2.pt", at_least=2, at_most=9, free=True)
    sample_every: int = arg(500, "steps between pictures (and validation losses); 0 for none",
                            at_least=0, free=True)
    wandb: bool = arg(False, "log to Weights & Biases too", free=True)
    resume: str = arg(None, "a run's checkpoint to go on from, with its options, in its folder",
                      free=True)

    def __post_init__(self):
        super().__post_init__()
        if self.wandb and not importlib.util.find_spec("wandb"):
            raise ValueError("--wandb: wandb is not installed; pip install wandb")


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions):
    """Options of teacher.py; those left at None take their values from RECIPES."""

    out: str = arg(None, f"folder of the run (default: {OUT}, or {AUTOENCODER_OUT})", free=True)
    data: str = arg(None, f"{', '.join(KNOWN_DATA)}, or a folder that holds a folder of images for "
                          "each class (default: digits, or what --latent was trained on)")
    size: int = arg(None, "side of a folder's images, scaled and cropped (default: "
                          f"{FOLDER_SIZE})", at_least=4, below=2**12)
    flip: bool = arg(None, "show images mirrored left to right, half of the time (default: by "
                           "data: for cifar10 on, else off)")
    autoencoder: bool = arg(False, "train no teacher but an autoencoder, for --latent")
    latent_channels: int = arg(4, "of --autoencoder: channels of its latents", at_least=1,
                               below=2**16)
    kl_weight: float = arg(1e-3, "of --autoencoder: weight of the KL term", at_least=0)
    latent: str = arg(None, "autoencoder.pt, on whose latents to train the teacher")
    width: int = arg(None, "channels of the network's first level (default: by data)", at_least=4,
                     below=2**16)
    mults: str = arg(None, "channels of each level as multiples of --width (default: by data)")
    blocks: int = arg(None, "residual blocks per level (default: by data)", at_least=1, below=1000)
    prediction: str = arg("edm", "what the network learns", tuple(PREDICTIONS))
    schedule: str = arg("lognormal", "which noise levels it is trained on", tuple(SCHEDULES))
    lr: float = arg(None, "learning rate (default: by data)", at_least=0, below=1)
    min_snr_gamma: float = arg(None, "weigh squared errors of x0 by min(SNR, gamma), such as 5 "
                                     "(default: by 1 / c_out^2, the prediction's own weight)",
                               at_least=1e-9, at_most=1e9)
    label_dropout: float = arg(0.1, "share of images shown without label, for guidance",
                               at_least=0, below=1)

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch("[1-9][0-9]{0,2}(,[1-9][0-9]{0,2})*", self.mults or "1"):
            raise ValueError(f"--mults {self.mults}: needs positive integers below 1000, such as "
                             "1,2,2")
        if self.autoencoder and self.latent:
            raise ValueError(f"--latent {self.latent}: is to train a teacher; leave out "
                             "--autoencoder")
        owners = {name: "--autoencoder" for name in ("latent_channels", "kl_weight")}
        if self.autoencoder:
            owners = {name: "teachers" for name in ("prediction", "schedule", "min_snr_gamma",
                                                    "label_dropout")}
        if not self.latent and self.data in (None, *KNOWN_DATA):
            owners["size"] = "folders of images"
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in owners and value != field.default:
                raise ValueError(f"{flag(field.name)} {value}: is for {owners[field.name]}; leave "
                                 "it out")


def mults_of(cfg):
    """The numbers of --mults."""
    return tuple(map(int, cfg.mults.split(",")))


def filled(cfg, *recipes):
    """The config, options not given taken from recipes, later ones first; its paths are whole."""
    missing = {name: value for recipe in recipes for name, value in recipe.items()
               if getattr(cfg, name) is None}
    if cfg.profile:
        off = {name: 0 for name in ("sample_every", "evaluate_every") if hasattr(cfg, name)}
        out = cfg.out or missing["out"]
        missing.update(off, out=f"{out}/profile", steps=10**6, save_every=10**6, resume=None)
    cfg = dataclasses.replace(cfg, **missing)
    return dataclasses.replace(cfg, **{name: str(Path(path).resolve()) for name in
                                       ("data_dir", "latent", "teacher", "init_from")
                                       if (path := getattr(cfg, name, None)) is not None})


def parse(config_class, argv=None, description=""):
    """Make a config of the command line; every field is a flag, and of training runs --config.

    Flags override what --config has. With --resume the checkpoint's own options apply; ValueError
    if a given one contradicts them.
    """
    parser = argparse.ArgumentParser(description="\n\n".join(description.split("\n\n")[:2]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    inherited = [field.name for field in dataclasses.fields(config_class.__base__)]  # told last
    for field in sorted(dataclasses.fields(config_class), key=lambda f: f.name in inherited):
        help = field.metadata["help"].replace("%", "%%")
        if field.metadata["choices"]:
            help += f": {', '.join(map(str, field.metadata['choices']))}"
        if field.default is not None:
            default = ("off", "on")[field.default] if field.type is bool else field.default
            help += f" (default: {default})"
        if field.metadata["positional"]:
            parser.add_argument(field.name, help=help, nargs="?")
        elif field.type is bool:
            parser.add_argument(flag(field.name), help=help, action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag(field.name), help=help, type=field.type, metavar="X")

    if issubclass(config_class, TrainingOptions):
        parser.add_argument("--config", help="the config.json of a run, whose options to take but "
                                             "for those given", metavar="X")

    def error(message):
        raise ValueError(f"{message} (--help lists the options)")
    parser.error = error
    given = vars(parser.parse_args(argv))
    if [] in given.values():  # what argparse makes of --data=--
        error("argument --: expected a value")
    if given.get("data", "digits") not in ("", *KNOWN_DATA):
        given["data"] = str(Path(given["data"]).resolve())
    if "config" not in given:
        return resumed(config_class, given) if "resume" in given else config_class(**given)
    path = given.pop("config")
    if "resume" in given:
        raise ValueError(f"--resume {given['resume']}: has its own options; leave out --config")
    try:
        saved = config_class(**vars(parser.parse_args(words_of(path, config_class))))
    except ValueError as error:
        raise ValueError(f"--config {path}: {error}") from error
    cfg, own = dataclasses.replace(saved, **given), Path(path).resolve().parent
    if ("out" not in given or Path(cfg.out).resolve() == own) and not cfg.profile:
        raise ValueError(f"--config {path}: is for a new run; give it a folder of its own by --out")
    return cfg


def words_of(path, config_class):
    """The options in a run's config.json as a command line; ValueError if it is none.

    Not where that run wrote, and not that it was resumed.
    """
    try:
        if not Path(path).is_file():
            raise ValueError("No such file")
        saved = json.loads(Path(path).read_text())
        words = [flag(name) if value is True else flag(f"no_{name}") if value is False else
                 f"{flag(name)}={value}" for name, value in saved.items()
                 if value is not None and name not in ("out", "resume", "profile")]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"can't be read, or not a run's config.json: {error}") from error
    unknown = saved.keys() - {field.name for field in dataclasses.fields(config_class)}
    if unknown or saved.get("profile"):
        raise ValueError(f"has {', '.join(sorted(unknown)[:3])}, no option of this script; it is "
                         "of another one, or another version" if unknown else
                         "of a --profile, not of a run")
    return words


def resumed(config_class, given):
    """The config of the run to resume; ValueError if a given option contradicts it."""
    path = given["resume"]
    if Path(path).is_symlink():  # the run's folder is that of the file
        path = given["resume"] = str(Path(path).resolve())
    checkpoint = load(path, resume=True)
    saved, fields = checkpoint["config"], dataclasses.fields(config_class)
    if other := saved.keys() ^ {field.name for field in fields}:
        raise ValueError(f"--resume {path}: holds a {checkpoint['kind']} of another script or "
                         f"version, which differs in {', '.join(sorted(map(str, other))[:3])}; "
                         "last.pt is dmd2.py's to resume, the others are teacher.py's")
    if "out" in given:
        raise ValueError(f"--out {given['out']}: a resumed run goes on in its own folder, "
                         f"{Path(path).parent}")
    try:
        config_class(**saved)
    except ValueError as error:
        raise ValueError(f"--resume {path}: holds options that are none: {error}") from error
    for field in fields:
        name, free = field.name, field.metadata["free"]
        if name == "data":
            free = may_be_moved(given.get(name), saved[name])
        if name in given and not free and given[name] != saved[name]:
            before = "none" if saved[name] is None else saved[name]
            raise ValueError(f"{flag(name)} {given[name]}: the run to resume has {before}; leave "
                             "the flag out, or start a new run")
    cfg = config_class(**{**saved, **given, "out": str(Path(path).parent)})
    if (cfg.steps or 0) <= checkpoint["step"] and not cfg.profile:
        raise ValueError(f"--steps {cfg.steps}: {path} has done {checkpoint['step']} already; give "
                         "more")
    return cfg


AGAIN = "--resume goes on from the last checkpoint, if there is one"


def run_script(main):
    """Call `main`; what the user can mend (ValueError, OSError) is one line and exit status 2.

    The status is 1 if it diverges or another process of several ended, 128 + N after signal N.
    SIGTERM is an exception from here on.
    """
    name, status, words = Path(sys.argv[0]).name, 0, None
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:  # or temporary files would be left
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.stderr = sys.stderr or open(os.devnull, "w")  # which `2>&-` closes
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # where it is closed, or no terminal's
            stream.reconfigure(errors="backslashreplace")  # of names that its encoding has not
    if dist.is_torchelastic_launched():
        dist.init_process_group(timeout=datetime.timedelta(hours=1))  # rank 0 may have to download
        name += f", rank {rank()}"
    try:
        main()
        if sys.stdout:  # which `>&-` closes
            sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as stop:
        status = stop.code
    except BrokenPipeError:  # such as that of `| head`
        status = 141
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        status, words = 2, " ".join(str(error).split())
    except FloatingPointError as error:
        status, words = 1, f"diverged: {error}"
    except KeyboardInterrupt as error:
        status, words = 130, f"interrupted{'; ' * bool(error.args)}{error}"
    except (RuntimeError, MemoryError) as error:
        if ranks() > 1 and "peer" in str(error):
            status, words = 1, None if rank() else f"another process has ended; {AGAIN}"
        elif "DataLoader worker" in str(error):
            status, words = 2, ("a process that reads images was killed, for want of memory "
                                f"perhaps; a smaller --batch or --size needs less; {AGAIN}")
        elif isinstance(error, MemoryError) or re.search("(of|enough|allocate) memory", str(error)):
            status, words = 2, ("out of memory; try a smaller --batch, --width or --n, or to train "
                                "--accumulate 4 or --checkpointing")
        elif "CxxCompiler" in str(error):
            status, words = 2, ("--compile: PyTorch finds no working C++ compiler; install one, or "
                                "give a new run --compile off")
        else:
            raise
    if status and in_main:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends now
    if words:
        words = "".join(c if c.isprintable() else "?" for c in words)  # as a file's may not be
        print(f"{name}: {words}", file=sys.stderr)
    for reader in list(READERS):
        reader.close()
    for child in multiprocessing.active_children():  # a reader would wait for this process
        child.kill()
    if status:
        sys.exit(status)


def completed(cfg, source):
    """The config, filled by its data and recipes, and the autoencoder of --latent, or None.

    Raises ValueError if they don't fit each other.
    """
    autoencoder, side = None, None
    found = dict(out=AUTOENCODER_OUT if cfg.autoencoder else OUT)
    kind = "latents" if cfg.latent else "autoencoder" if cfg.autoencoder else None
    if cfg.latent:
        autoencoder = source.get("autoencoder") if cfg.resume else source
        if autoencoder is None:
            raise ValueError(f"--resume {cfg.resume}: has --latent, but no autoencoder")
        side = latent_shape(autoencoder["network"])[-1]
    if cfg.latent and not cfg.resume:  # which has all options
        facts = source["data"]
        found.update(data=facts["name"], size=facts["size"], data_dir=facts["data_dir"])
        for name in ("data", "size"):
            value, kept = getattr(cfg, name), found[name]
            moved = name == "data" and may_be_moved(value, kept)
            if value not in (None, kept) and not moved:
                raise ValueError(f"{flag(name)} {value}: the autoencoder's images are those of "
                                 f"{facts['name']}; leave it out")
        levels = next(n for n in itertools.count(1) if side % 2**n or side >> n < 4)
        found["mults"] = "1" + ",2" * (levels - 1)  # halved while it stays whole and 4 or more
    data = cfg.data or found.get("data", "digits")
    known = data in KNOWN_DATA
    base = dict(data=data, data_dir=DATA_DIR, flip=False, size=None if known else FOLDER_SIZE)
    recipe = RECIPES[data if known else "folder"]
    cfg = filled(cfg, base, recipe, RECIPES.get(kind, {}), found)
    side = side or cfg.size
    if side:  # told before any image is read
        check_sizes(side, cfg.width, mults_of(cfg))
    check_out(cfg, cfg.latent)
    return cfg, autoencoder


def check_out(cfg, *inputs):
    """Raises ValueError if a new run would move a file that it is made of."""
    for path in filter(None, inputs):
        same = Path(path).resolve().parent == Path(cfg.out).resolve()
        if same and not (cfg.resume or cfg.profile):
            raise ValueError(f"--out {cfg.out}: a new run there would move {path}; name another "
                             "folder")


# ---- several GPUs: torchrun starts a process for each, a rank, and one alone is rank 0 of 1 -----

def rank():
    """This process's number among those of torchrun, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_rank_0(function):
    """Make a function do nothing on other ranks, for there is one writer."""
    @functools.wraps(function)
    def wrapped(*args, **options):
        return function(*args, **options) if rank() == 0 else None
    return wrapped


@on_rank_0
def tell(message, error=False):
    """Print a line, or on stderr, without which a run goes on if nobody listens there any more."""
    with contextlib.suppress(OSError if error else ()):
        print(message, file=sys.stderr if error else None)


def progress(items, title, total=None):
    """The items of an iterable, `total` of them, with a bar where a terminal waits for them."""
    return tqdm(items, title, total, leave=False, delay=0.5, dynamic_ncols=True,
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
    """Replace tensors of one dtype by their means over the ranks, in place and in one message."""
    if ranks() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors]) / ranks()
        dist.all_reduce(flat)
        means = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [mean.view_as(t) for mean, t in zip(means, tensors)])


def parts_of(cfg):
    """Slices of a step's batch: what this rank computes, in --accumulate parts one by one.

    So a run is the same one on any number of GPUs, but for the order in which sums are taken.
    Raises ValueError if the batch can't be split evenly.
    """
    count = ranks() * cfg.accumulate
    if cfg.batch % count:
        raise ValueError(f"--batch {cfg.batch}: can't be split evenly into --accumulate "
                         f"{cfg.accumulate} x {ranks()} processes; give a multiple of {count}")
    size, first = cfg.batch // count, rank() * cfg.accumulate
    return [slice(i * size, (i + 1) * size) for i in range(first, first + cfg.accumulate)]


# ---- data: uint8 images in memory, or in a folder -----------------------------------------------

class Data(NamedTuple):
    """A data set."""

    images: torch.Tensor  # [N, C, H, W] uint8, or FolderImages; of latents float32
    labels: torch.Tensor  # [N] int64
    classes: tuple        # names of the classes
    flip: bool = False    # whether batches have images mirrored at random

    @property
    def shape(self):
        return tuple(self.images.shape[1:])

    @property
    def streams(self):
        return isinstance(self.images, FolderImages)

    def in_memory(self):
        """Itself or, of a folder that is streamed, as many random images as MEMORY holds."""
        if not self.streams:
            return self
        count = MEMORY // math.prod(self.shape)
        index = permutation(len(self.labels), 0, 0, "cpu")[:count].sort().values
        return self._replace(images=self.images.read(index), labels=self.labels[index])

    def batches(self, indices):
        """Yield the images [B, C, H, W] at each of indices, an iterable of int64 [B]."""
        if self.streams:
            return read_ahead(self.images, indices)
        return map(self.images.__getitem__, indices)


class FolderImages:
    """Image files that look like a tensor uint8 [N, C, H, W], and are read when they are indexed.

    Scaled, and the middle cropped to a square. ValueError if one turns out to be damaged.
    """

    def __init__(self, paths, size, mode):
        self.paths, self.size, self.mode = paths, size, mode
        self.shape = len(paths), len(mode), size, size

    def __getitem__(self, index):
        """index [B] int64 -> uint8 [B, C, H, W]"""
        return torch.stack([square(decoded(path)[0].convert(self.mode), self.size)
                            for path in self.paths[index.numpy()]])

    def subset(self, index):
        """The images at index [N] as FolderImages, which stay on the disk."""
        return FolderImages(self.paths[index.numpy()], self.size, self.mode)

    def read(self, index):
        """The images at index [N], read by several processes -> uint8 [N, C, H, W]"""
        images = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8)
        for part, found in zip(images.split(64), read_ahead(self, index.split(64))):
            part.copy_(found)
        return images


class Survey:
    """Image files, each decoded to see whether it can be, and what of it a user should know."""

    def __init__(self, paths, size, in_memory):
        self.paths, self.size, self.in_memory = paths, size, in_memory

    def __getitem__(self, index):
        """index [B] int64 -> uint8 [B, 3, H, W], or None if they stay on the disk; of each image
        why it can't be read or None, whether it is grey, and notes"""
        pixels, found = torch.zeros(len(index) if self.in_memory else 0, 3, self.size, self.size,
                                    dtype=torch.uint8), []
        for row, i in enumerate(index.tolist()):
            try:
                image, notes = decoded(self.paths[i])
            except ValueError as error:
                found.append((str(error), True, []))
                continue
            notes += ["smaller than --size and enlarged"] * (min(image.size) < self.size)
            found.append((None, image.mode == "L", notes))
            if self.in_memory:
                pixels[row] = square(image.convert("RGB"), self.size)
        return pixels if self.in_memory else None, found


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                if hasattr(signal, name)]  # Windows has no SIGHUP
READERS = weakref.WeakSet()  # generators of read_ahead(), which are to be closed if a run fails


def read_ahead(files, indices):
    """Yield files[index] for each of indices, read ahead by other processes, 8 at most.

    Raises ValueError as files[index] does. If one of the processes is killed, PyTorch raises
    RuntimeError wherever this one is. run_script() ends them.
    """
    reader = read_by_workers(files, indices)
    READERS.add(reader)
    return reader


def read_by_workers(files, indices):
    """The generator behind read_ahead(): a DataLoader, its ValueErrors without tracebacks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = 0 if len(files.paths) < 100 else max(1, min(8, cores // ranks()))
    loader = DataLoader(files, batch_size=None, sampler=indices, num_workers=workers,
                        worker_init_fn=outlast_signals)
    try:
        with signals_later():  # they would get lost among processes that are being started
            loaded = iter(loader)
        yield from loaded
        return
    except ValueError as error:  # to which a worker adds its traceback
        reason = str(error).strip().split("ValueError: ")[-1]
        error.__traceback__ = None  # which would hold the processes
    raise ValueError(reason)


@contextlib.contextmanager
def signals_later():
    """The signals that stop a run are handled when the block is left."""
    came, before = [], {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, lambda number, frame: came.append(number))
                  for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def outlast_signals(worker):
    """Let a process that reads images live on while the one that trains ends its step.

    A terminal and a scheduler send their signals to all of them: SIGINT and SIGHUP are ignored,
    SIGTERM ends this one 60 seconds later.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(60))


def square(image, size):
    """A PIL image -> uint8 [C, size, size], scaled, and the middle cropped."""
    pixels = np.array(ImageOps.fit(image, (size, size)))
    return torch.from_numpy(pixels.reshape(size, size, -1)).permute(2, 0, 1)


def decoded(path):
    """The image in a file, of mode RGB or L, turned as EXIF says; and what was done to it.

    Raises ValueError if the file can't be read.
    """
    notes = []
    with readable(path) as image:
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # which cameras write
            notes.append("of several frames, the first of which is taken")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip to the lower 8
            notes.append("of 16 bits, the upper 8 of which are taken")
            levels = np.asarray(image)
            if levels.min() < 0 or levels.max() >= 2**16:
                raise ValueError("its pixels have more than 16 bits")
            image = Image.fromarray((levels >> 8).astype(np.uint8))
        mode = "L" if image.mode in GREY else "RGB"
        if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
            notes.append(f"of {image.mode}, turned into RGB")
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            if layer.getextrema()[3][0] < 255:
                notes.append("transparent, and put on white")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        return image.convert(mode), notes


@contextlib.contextmanager
def readable(path):
    """The PIL image of a file; ValueError if it is none, or turns out to be damaged."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ValueError("it is no regular file")
        Image.init()  # knows FORMATS from here on
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers, of no known range")
            yield image
    except MemoryError:
        raise
    except Exception as error:  # PIL's many decoders have no base in common for theirs
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        reason = str(reason).replace(f" {str(path)!r}", "")  # which PIL names, too
        raise ValueError(f"{path}: not a readable image ({reason})") from error


def load_data(name, split, data_dir=DATA_DIR, size=FOLDER_SIZE, stream=None):
    """The training or the held-out images of a data set.

    name    one of KNOWN_DATA, or a folder with one sub-folder of images per class, or with two such
            folders, train, and test or, if there is none, val
    split   "train" or "test", the held-out images: the official test set, of digits and of a folder
            without one every sixth image of a fixed permutation
    size    side of a folder's images
    stream  whether these stay on the disk; None: if they take more than MEMORY

    returns Data
    Raises ValueError for an unknown name or an unfit folder, OSError where files are missing and
    can't be downloaded to data_dir.
    """
    if stream and name in KNOWN_DATA:
        raise ValueError(f"--stream: is for folders of images, and {name} is none; leave it out")
    if name == "digits":
        digits = load_digits()
        images = torch.from_numpy(np.rint(digits.images * 255 / 16).astype(np.uint8))[:, None]
        labels = torch.from_numpy(digits.target).long()
        chosen = hold_out(len(labels), split)
        return Data(images[chosen], labels[chosen], tuple("0123456789"))
    if name in KNOWN_DATA:
        source = dict(mnist="MNIST", fashion="FashionMNIST", cifar10="CIFAR10")[name]
        found = download(getattr(torchvision.datasets, source), data_dir, split == "train", name)
        images = torch.as_tensor(found.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        classes = tuple("0123456789") if name == "mnist" else tuple(found.classes)
        return Data(images, torch.as_tensor(found.targets).long(), classes)
    if not Path(name).is_dir():
        raise ValueError(f"--data {name}: no such folder, and none of {', '.join(KNOWN_DATA)}")
    return load_folder(name, size, stream)[split]


def may_be_moved(a, b):
    """Whether two names of data may be of one folder, at two places."""
    return not {a, b} & {*KNOWN_DATA}


def download(dataset, data_dir, train, name):
    """A torchvision data set, downloaded if it is not there; OSError if it can't be."""
    with rank_0_first():
        try:
            return dataset(data_dir, train=train, download=True)  # if they are not there
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            for path in (Path(data_dir, dataset.__name__, "raw"), Path(data_dir, dataset.__name__)):
                with contextlib.suppress(OSError):
                    path.rmdir()  # which the attempt left empty
            raise OSError(f"--data {name}: its files are not in {Path(data_dir).resolve()}, or "
                          f"damaged, and can't be downloaded ({error}); --data-dir tells where "
                          "they are, and --data digits needs no download") from error


@functools.lru_cache(maxsize=2)  # a run asks for it more than once
def load_folder(folder, size, stream):
    """The images of a folder of folders, by split: grey if all of them are, else RGB.

    Raises ValueError if the folder has not what it takes, or a class no image that can be read.
    """
    train = test = Path(folder)
    for name in ("val", "test"):
        if folders_in(Path(folder, "train")) and folders_in(Path(folder, name)):
            train, test = Path(folder, "train"), Path(folder, name)
    if train == test and folders_in(Path(folder, "train")):
        raise ValueError(f"--data {folder}: has train, but neither test nor val; add one, or give "
                         f"{Path(folder, 'train')}")
    classes = folders_in(train)
    if other := sorted({*folders_in(test)} ^ {*classes}):
        raise ValueError(f"--data {folder}: its {train.name} and {test.name} differ in the classes "
                         f"{', '.join(other[:5])}; give each class a folder in both")
    places = {}
    for path in (Path(part, name) for part in dict.fromkeys((train, test)) for name in classes):
        if (other := places.setdefault(os.path.realpath(path), path)) != path:
            raise ValueError(f"--data {folder}: {other} and {path} are the same folder, linked; "
                             "leave out one of them")
    images, labels, in_test, damaged, told = survey(dict.fromkeys((train, test)), classes, size,
                                                    stream)
    splits = {}
    for split in ("train", "test"):
        if train == test:
            chosen = hold_out(len(labels), split)
        else:  # shuffled, for some held-out images to be of all classes
            chosen = (in_test == (split == "test")).nonzero()[:, 0]
            chosen = chosen[permutation(len(chosen), 0, 0, "cpu")]
        missing = set(range(len(classes))) - set(labels[chosen].tolist())
        if not len(chosen) or missing and split == "train":
            name = classes[min(missing)] if missing else ""
            reasons = [why for why in damaged if f"{os.sep}{name}{os.sep}" in why][:1]
            reasons += told[bool(damaged):]
            reason = f" ({'; '.join(reasons)})" if reasons else ""
            raise ValueError(f"--data {folder}: no image is left for {split}"
                             + f" of the class '{name}'" * bool(name) + f"{reason}. Every class "
                             "needs a folder of them, such as cats/1.jpg (images without classes "
                             "one for all, such as all/1.jpg), and every sixth is held out")
        subset = images.subset if isinstance(images, FolderImages) else images.__getitem__
        splits[split] = Data(subset(chosen), labels[chosen], classes)
    if beside := [] if train == test else {*Path(folder).iterdir()} - {train, test}:
        told.append(f"{len(beside)} beside {train.name} and {test.name}")
    if told:
        tell("\n    ".join([f"{folder}: {len(labels)} images", *told]), error=True)
    return splits


def survey(parts, classes, size, stream):
    """Decode every image once, also of those that stay on the disk, for none to fail later.

    parts  folders that hold a folder of each class: of training images, of test images
    returns images, a tensor or FolderImages; labels [N]; whether they are test images [N]; of those
    that can't be read and are left out, why; and in words that, and what else a user should know
    """
    notes, damaged = collections.Counter(), []
    for path in (path for part in parts for path in part.iterdir()):
        if path.name.startswith("."):
            notes["hidden"] += 1
        elif path.is_file():
            notes["beside the folders of classes"] += 1
    siblings = {os.path.realpath(path) for part in parts for path in (part, *part.iterdir())}
    files = [(path, label, i) for i, part in enumerate(parts) for label, name in enumerate(classes)
             for path in image_files(Path(part, name), siblings, notes)]
    shape = len(files), 3, size, size
    in_memory = math.prod(shape) <= MEMORY if stream is None else not stream
    images = torch.empty(shape if in_memory else 0, dtype=torch.uint8)
    at_a_time = max(1, min(256, 2**22 // (3 * size**2)))  # of what the processes share: 4 MB
    index, whole, grey = torch.arange(len(files)).split(at_a_time), [], True
    found = read_ahead(Survey([path for path, _, _ in files], size, in_memory), index)
    for part, (pixels, facts) in zip(index, progress(found, "images", len(index))):
        if in_memory:
            images[part] = pixels
        for i, (error, is_grey, its_notes) in zip(part.tolist(), facts):
            if error is None:
                whole.append(i)
                grey = grey and is_grey
                notes.update(its_notes)
            else:
                damaged.append(error)
    told = [f"{count} {note}" for note, count in notes.items()]
    if damaged:
        told.insert(0, f"{len(damaged)} left out as unreadable: {'; '.join(damaged[:3])}"
                    + "; ..." * (len(damaged) > 3))
    whole, mode = torch.tensor(whole, dtype=torch.long), "L" if grey else "RGB"
    paths, labels, in_test = zip(*files) if files else ((), (), ())
    images = images[:, :len(mode)][whole] if in_memory else \
        FolderImages(np.array(paths, object)[whole.numpy()], size, mode)
    return images, torch.tensor(labels)[whole], torch.tensor(in_test)[whole] == 1, damaged, told


def folders_in(path):
    """The names of the folders in one, those of classes: sorted, without hidden ones."""
    return tuple(sorted(child.name for child in path.iterdir() if child.is_dir()
                        and not child.name.startswith("."))) if path.is_dir() else ()


def image_files(folder, siblings, notes):
    """The images in the folder of a class and below it; links are followed.

    siblings  the real paths of all classes' folders and of what they are in, not to be followed to
    notes     a Counter, to which it adds what it passes over
    """
    found, seen = [], set()

    def skip(error):
        notes[f"folders that can't be read ({error.strerror})"] += 1
    for root, folders, names in os.walk(folder, followlinks=True, onerror=skip):
        real = os.path.realpath(root)
        if real in seen or real in siblings and Path(root) != folder:
            folders.clear()
            notes["links to folders that were read already"] += 1
            continue
        seen.add(real)
        hidden = [child for child in (*folders, *names) if child.startswith(".")]
        notes.update(["hidden"] * len(hidden))
        folders[:] = [child for child in folders if child not in hidden]
        for child in sorted(set(names) - set(hidden)):
            if child.lower().endswith(IMG_EXTENSIONS):
                found.append((root, child))
            else:
                notes[f"of another kind ({Path(child).suffix.lower() or 'no ending'})"] += 1
    return [os.path.join(*path) for path in sorted(found)]


def hold_out(count, split):
    """Indices of a split of images that come without one: every sixth is held out."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(count))
    return order[(torch.arange(count) % 6 == 0) == (split == "test")]


def check_same(facts, data):
    """Raises ValueError if data are not what a checkpoint tells of them, in shape and classes."""
    shape, classes = tuple(facts["shape"]), tuple(facts["classes"])
    if data.shape != shape or classes not in (data.classes, ANY_CLASS):
        raise ValueError(f"--data {facts['name']}: has images {data.shape} of the classes "
                         f"{', '.join(data.classes[:10])} now; the checkpoint was trained on "
                         f"{shape} of {', '.join(classes[:10])}; restore them, or train anew")


def check_batch(batch, data, name):
    """Raises ValueError if a batch is more than a data set has."""
    if batch > len(data.labels):
        raise ValueError(f"--batch {batch}: {name} has only {len(data.labels)} images to train on; "
                         "give that many or fewer")


def batch_at(step, count, batch, seed, device="cpu"):
    """Indices [batch] of a step's images: each image at most once in count // batch steps."""
    epoch, position = divmod(step, count // batch)
    return permutation(count, seed, epoch, device)[position * batch:(position + 1) * batch]


@functools.lru_cache(maxsize=8)  # copied to a GPU once; of few images epochs are read ahead
def permutation(count, seed, epoch, device):
    """An order of `count` images: [count] int64"""
    return torch.randperm(count, generator=seeded(ORDER, seed, epoch)).to(device)


def training_batches(data, start, cfg, parts, device):
    """Yield x0 [B, C, H, W] and labels [B] for each part of each step from `start` on.

    Images are those of batch_at(), whether in memory or streamed from a folder, in [-1, 1].
    """
    def indices(device):
        for step in itertools.count(start):
            index = batch_at(step, len(data.labels), cfg.batch, cfg.seed, device)
            yield from (index[part] for part in parts)

    images = data.batches(indices("cpu" if data.streams else device))
    labels = map(data.labels.__getitem__, indices(device))
    for step in itertools.count(start):
        for part in parts:
            x0 = to_float(next(images).to(device))
            if data.flip:
                draw = Draw(FLIP, cfg.seed, step, cfg.batch, (), device, part)
                x0 = torch.where(draw.uniform().view(-1, 1, 1, 1) < 0.5, x0.flip(-1), x0)
            yield x0, next(labels)


def to_float(images):
    """uint8 -> float32 in [-1, 1]; latents, which are float32, as they are."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images


def to_uint8(images):
    """[-1, 1] -> uint8, rounded as EDM does."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


# ---- latents: x0 is an image, or what an autoencoder makes of it -------------------------------

class Pixels:
    """The codec of models whose x0 is the image."""

    def encode(self, images):
        return images

    def decode(self, x0):
        return x0

    def checkpoint(self):
        return None


class Autoencoder(nn.Module):
    """The codec of latent diffusion: a variational autoencoder (Kingma and Welling 2014).

    It is Rombach et al.'s of 2022 ("High-Resolution Image Synthesis with Latent Diffusion Models")
    with its KL term, but without its perceptual and adversarial losses. An image [C, H, W] becomes
    latent_channels values at each place of the last level, [c, h, w].

    Raises ValueError if a level's resolution can't be halved or the channels can't be grouped.
    """

    def __init__(self, img_resolution, img_channels, latent_channels, model_channels, channel_mult,
                 num_blocks):
        super().__init__()
        check_sizes(img_resolution, model_channels, channel_mult)
        self.network = dict(img_resolution=img_resolution, img_channels=img_channels,
                            latent_channels=latent_channels, model_channels=model_channels,
                            channel_mult=channel_mult, num_blocks=num_blocks)
        self.dtype = torch.float32
        widths = [model_channels * mult for mult in channel_mult]
        down, up = [nn.Conv2d(img_channels, widths[0], 3, padding=1)], []
        for level, width in enumerate(widths):
            if level > 0:
                down += [nn.AvgPool2d(2), nn.Conv2d(widths[level - 1], width, 3, padding=1)]
                up += [nn.Conv2d(width, widths[level - 1], 3, padding=1),
                       nn.Upsample(scale_factor=2)]
            down += [Residual(width) for _ in range(num_blocks)]
            up += [Residual(width) for _ in range(num_blocks)]
        self.encoder = nn.Sequential(*down, *norm_act_conv(widths[-1], 2 * latent_channels))
        self.decoder = nn.Sequential(nn.Conv2d(latent_channels, widths[-1], 3, padding=1),
                                     *reversed(up), *norm_act_conv(widths[0], img_channels))
        # Of the latents of training images; so x0 has EDM's standard deviation, SIGMA_DATA.
        self.register_buffer("mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("std", torch.full((latent_channels, 1, 1), SIGMA_DATA))
        self.apply(initialise)

    def posterior(self, images):
        """images [B, C, H, W] in [-1, 1] -> mean and log of the variance of z, [B, c, h, w]"""
        with autocast(images.device, self.dtype):
            mean, log_variance = self.encoder(images).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def forward(self, images, noise):
        """images [B, C, H, W], noise [B, c, h, w] -> decoded images; KL per latent value, a scalar

        The divergence is KL(N(mean, variance) || N(0, 1)), averaged over all values, in nats.
        """
        mean, log_variance = self.posterior(images)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        return self.decoded(mean + (log_variance / 2).exp() * noise), kl

    def decoded(self, z):
        with autocast(z.device, self.dtype):
            return self.decoder(z).float()

    @torch.no_grad()
    def calibrate(self, images):
        """Set mean and standard deviation, per channel, of the latents that encode() scales."""
        z = self.posterior(images)[0]
        self.mean.copy_(z.mean((0, 2, 3)).view_as(self.mean))
        self.std.copy_(z.std((0, 2, 3), correction=0).clamp(min=1e-6).view_as(self.std))

    def encode(self, images):
        """images [B, C, H, W] in [-1, 1] -> x0 [B, c, h, w]: the means, of deviation SIGMA_DATA"""
        return (self.posterior(images)[0] - self.mean) / self.std * SIGMA_DATA

    def decode(self, x0):
        """x0 [B, c, h, w] -> images [B, C, H, W] in about [-1, 1]"""
        return self.decoded(x0 / SIGMA_DATA * self.std + self.mean)

    def reconstruct(self, images):
        return self.decode(self.encode(images))

    def checkpoint(self):
        """What codec_of() makes it of, for the checkpoints of its teachers and generators."""
        return dict(kind="autoencoder", network=self.network, model=self.state_dict())


class Residual(nn.Module):
    """x and what two convolutions make of it."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(*norm_act_conv(channels, channels),
                                    *norm_act_conv(channels, channels))
        scaled(self.layers[-1], 0.1)

    def forward(self, x):
        return x + self.layers(x)


def norm_act_conv(c_in, c_out):
    return group_norm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1)


def latent_shape(network):
    """(c, h, w) of an Autoencoder of these arguments."""
    side = halved(network["img_resolution"], network["channel_mult"])
    return network["latent_channels"], side, side


class AutoencoderTask:
    """Training an autoencoder, likewise (see DiffusionTask)."""

    kind = "autoencoder"

    def __init__(self, cfg, data, codec):
        self.cfg, self.classes, self.stream = cfg, data.classes, AUTOENCODER
        self.network = dict(img_resolution=data.shape[-1], img_channels=data.shape[0],
                            latent_channels=cfg.latent_channels, model_channels=cfg.width,
                            channel_mult=mults_of(cfg), num_blocks=cfg.blocks)
        self.shape = latent_shape(self.network)

    def facts(self):
        return {}

    def losses(self, autoencoder, x0, label, draw):
        return self.terms(autoencoder, x0, draw.normal())

    def terms(self, autoencoder, x0, noise):
        """The loss and its two terms: squared error per pixel, divergence per latent value."""
        decoded, kl = autoencoder(x0, noise)
        error = (decoded - x0).square().mean()
        return dict(loss=error + self.cfg.kl_weight * kl, reconstruction_loss=error, kl=kl)

    @torch.no_grad()
    def validate(self, autoencoder, x0, label):
        """Figures: the loss, with fixed noise, and how near reconstructions without noise come."""
        noise = unit_noise(len(x0), self.shape, 0).to(x0.device)
        return dict(validation_loss=self.terms(autoencoder, x0, noise)["loss"].item(),
                    psnr=psnr(autoencoder.reconstruct(x0), x0))

    @torch.no_grad()
    def picture(self, autoencoder, x0, label, path, rows=3, columns=10):
        """Images above their reconstructions; and latents.png, where latents lie by class."""
        columns = min(columns, len(x0))
        rows = min(rows, len(x0) // columns)
        shown = x0[:rows * columns]
        pairs = torch.stack([shown, autoencoder.reconstruct(shown)]).unflatten(1, (rows, -1))
        save_grid(to_uint8(pairs.transpose(0, 1).flatten(0, 1)), ("real", "decoded") * rows, path)
        latents = autoencoder.encode(x0).flatten(1)
        save_plane({"latent means": (latents, label)}, self.classes, path.with_name("latents.png"))


def codec_of(autoencoder, device="cpu"):
    """What turns images into x0 and back: a checkpoint's autoencoder or, for None, Pixels."""
    return Pixels() if autoencoder is None else build(autoencoder, device)


def psnr(images, originals):
    """Peak signal-to-noise ratio of images in [-1, 1], in dB."""
    error = (images - originals).square().mean().item()
    return -10 * math.log10(max(error, 1e-10) / 4)


@torch.no_grad()
def encoded(data, codec, device):
    """Data on a device, of a codec's x0: latents, with --flip those of the mirror images too."""
    if isinstance(codec, Pixels):
        images = data.images if data.streams else data.images.to(device)
        return data._replace(images=images, labels=data.labels.to(device))
    flips, parts = (False, True)[:1 + data.flip], len(data.labels) // 256 + 1
    images = (to_float(part.to(device)) for part in
              data.batches(torch.arange(len(data.labels)).chunk(parts)))
    latents = [[codec.encode(x0.flip(-1) if flip else x0) for flip in flips]
               for x0 in progress(images, "latents", parts)]
    labels = data.labels.repeat(len(flips)).to(device)
    return Data(torch.cat([torch.cat(part) for part in zip(*latents)]), labels, data.classes)


def load_to_train(cfg, source, codec, device):
    """The training data, as x0; x0 and labels of some held-out images; what checkpoints tell of it.

    Raises ValueError if there are fewer training images than a batch.
    """
    data, held_out = (load_data(cfg.data, split, cfg.data_dir, cfg.size, cfg.stream)
                      for split in ("train", "test"))
    check_batch(cfg.batch, data, cfg.data)
    if source:
        check_same(dict(source["data"], name=cfg.data), data)
    facts = dict(name=cfg.data, data_dir=cfg.data_dir, size=cfg.size, shape=data.shape,
                 classes=data.classes, flip=cfg.flip)
    count = min(512, max(1, 2**24 // math.prod(data.shape)))  # what a network takes at once
    if cfg.latent and not cfg.resume:
        some = permutation(len(data.labels), 0, 0, "cpu")[:count]
        codec.calibrate(to_float(data.images[some]).to(device))
    some = torch.arange(min(count, len(held_out.labels)))
    x0 = codec.encode(to_float(held_out.images[some]).to(device))
    data = encoded(data._replace(flip=cfg.flip), codec, device)
    return data, (x0, held_out.labels[some].to(device)), facts


# ---- random numbers: no state to save, for every draw is made of its place in the run -----------

# The independent streams of random numbers: whatever draws has its own.
TEACHER, GENERATOR, ORDER, NOISE, FEATURES, SUBSET, TRAINED_STEP, FLIP, AUTOENCODER = range(9)


def seeded(stream, *key, device="cpu"):
    """A torch.Generator for the place in a stream that `key`, non-negative integers, names."""
    seed = np.random.SeedSequence((stream, *key)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed) % 2**63)  # what a signed integer holds


class Draw:
    """The random numbers of one training step, in the order they are asked for.

    They are drawn for the whole batch, of which every answer gives the `part`: B of them.
    """

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
    """Yield standard normal noise [count, *shape] without end, one for each step of a sampler.

    Image i is made of seed and start + i only, so it does not depend on the batch size.
    """
    rngs = [seeded(NOISE, seed, i) for i in range(start, start + count)]
    while True:
        yield torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


def unit_noise(count, shape, seed):
    """The first of fresh_noise()."""
    return next(fresh_noise(count, shape, seed))


def exported_noise(noises, steps):
    """Noise for an exported file, of fresh_noise(): [B, *shape], for K steps [K, B, *shape]."""
    return torch.stack(list(itertools.islice(noises, steps))) if steps > 1 else next(noises)


# ---- optimisation -------------------------------------------------------------------------------

class Descent:
    """Steps of an optimizer, each down the mean of the losses whose gradients were added before.

    Gradients reach the optimizer's own parameters only: networks that a loss goes through on its
    way there (a fake score that judges the generator) stay as they are and accumulate nothing. On
    several GPUs they are averaged in one message after the last part of the batch.
    DistributedDataParallel would send them during the backward pass, but holds of networks that a
    step passes through once, and of losses that train every network they pass through.
    """

    def __init__(self, optimizer, cfg, device, prefix=""):
        self.optimizer, self.clip, self.parts = optimizer, cfg.clip, cfg.accumulate
        self.prefix = prefix  # of the names of what is logged
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Does nothing but in float16, whose small gradients would vanish.
        enabled = dtype_of(cfg, device) == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=enabled)

    @record_function("backward")
    def add(self, loss):
        """Add the gradient of the loss of a part of the batch, of --accumulate such parts."""
        self.scaler.scale(loss / self.parts).backward(inputs=self.parameters)

    @record_function("optimizer")
    def step(self, lr):
        """Step at learning rate `lr` with a gradient of norm at most --clip.

        returns what to log: gradient_norm, that of before, which is not looked at here, for the CPU
        would wait for the GPU: Log raises FloatingPointError if it is not finite. In float16 it is
        0 where the scale was too large and the step left out; then left_out is 1.
        """
        average([p.grad for p in self.parameters if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scale = self.scaler.scale(torch.ones_like(norm))  # 1 where there is no scaler
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        left_out = ~norm.isfinite() & (scale > 1)
        values = {f"{self.prefix}gradient_norm": torch.where(left_out, 0, norm)}
        if self.scaler.is_enabled():
            values[f"{self.prefix}left_out"] = left_out.float()
        return values

    def state_dict(self):
        moments = self.optimizer.state_dict()["state"]  # its options are those of the run
        return dict(optimizer=dict(state=moments), scaler=self.scaler.state_dict())

    def load_state_dict(self, state):
        moments = state["optimizer"]["state"]
        for i, found in moments.items():
            shape = self.parameters[i].shape
            fit = dict(step=(), exp_avg=shape, exp_avg_sq=shape)
            if {name: value.shape for name, value in found.items()} != fit or found["step"] < 0:
                raise ValueError("an optimizer's state does not fit its parameters")
        self.optimizer.load_state_dict(dict(self.optimizer.state_dict(), state=moments))
        for p, found in self.optimizer.state.items():  # with the strides of another device
            found.update({name: torch.empty_like(p).copy_(found[name])
                          for name in ("exp_avg", "exp_avg_sq")})
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def rate_at(update, lr, warmup, decay_after=None):
    """Learning rate of an update, counted from 0: it rises linearly, stays, and falls at the end.

    warmup       updates until it is lr
    decay_after  updates until it falls: then it halves in every fifth of as many; None: never
    """
    rise = (update + 1) / max(warmup, 1)
    fall = 5 * (1 - update / decay_after) if decay_after else 0
    return lr * min(1, rise, 2.0**fall)


@torch.no_grad()
def update_ema(ema, model, decay, update):
    """ema <- decay ema + (1 - decay) model, for all parameters.

    At first the memory is shorter: in update k, from 0, it fades by at least 9 / (k + 10).
    """
    decay = min(decay, (update + 1) / (update + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def frozen(model):
    """A copy in eval mode whose parameters get no gradient: a teacher, or the start of an EMA."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def pick_device(name):
    """The torch.device of --device, this rank's own; ValueError if it is not to be had."""
    here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in here if here[n]) if name == "auto" else name
    if not here[name]:
        found = ", ".join(n for n in here if here[n])
        raise ValueError(f"--device {name}: PyTorch finds none here, only {found}")
    if name == "cuda" and ranks() > 1:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(f"--nproc_per_node: needs a GPU for each process, and PyTorch finds "
                             f"{torch.cuda.device_count()}; give that many or fewer")
        torch.cuda.set_device(local)
    return torch.device(name)


def dtype_of(cfg, device):
    """The torch.dtype of the networks' arithmetic."""
    if cfg.dtype != "auto":
        return getattr(torch, cfg.dtype)
    if device.type != "cuda":
        return torch.float32  # on a CPU bfloat16 without compilation was slower, see README
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bfloat16 else torch.float16


def autocast(device, dtype):
    """The context in which networks compute in a dtype, float32 as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def place(denoiser, device):
    """Move a denoiser to a device; a GPU's convolutions are fastest with the channels last."""
    cuda = torch.device(device).type == "cuda"
    return denoiser.to(device, memory_format=torch.channels_last if cuda else
                       torch.contiguous_format)


def prepare(cfg, device, *denoisers):
    """Set how networks compute, as --dtype, --compile and --checkpointing say."""
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU has it
    graphs = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    compile = cfg.compile if cfg.compile != "auto" else "graphs" if graphs else "off"
    if compile != "off":
        torch._dynamo.config.recompile_limit = 64  # with and without gradients, encoder only...
    for denoiser in denoisers:
        denoiser.dtype = dtype_of(cfg, device)
        for layer in denoiser.modules():
            if isinstance(layer, nn.Conv2d) and not layer.weight.requires_grad:
                layer.to(denoiser.dtype)  # once, and not in every pass as autocast would
            if isinstance(layer, (Block, Residual)) and cfg.checkpointing:
                layer.forward = functools.partial(recompute, layer.forward, use_reentrant=False,
                                                  preserve_rng_state=False)
        if compile != "off":
            mode = "reduce-overhead" if compile == "graphs" else None
            for part in denoiser.children():  # the network, or an autoencoder's two
                part.compile(dynamic=False, mode=mode)


# ---- checkpoints --------------------------------------------------------------------------------

@contextlib.contextmanager
def writing(path):
    """Makes the OSError of a full disk, a folder that can't be written... name the path."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__  # so torch.save has it
        if not isinstance(reason, OSError) or reason.errno is None:
            raise
        raise OSError(f"{path}: can't be written ({os.strerror(reason.errno)})") from error


@contextlib.contextmanager
def replacing(path, sync=True):
    """A path to write a file to, which takes the name `path` when it is whole (and on the disk).

    Raises OSError that names path, and leaves what is there as it is, if it can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.unlink(missing_ok=True)  # of a process that was killed; it may be a link
            yield temporary
            if sync:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@on_rank_0
def save(checkpoint, path, keep=0):
    """Write a checkpoint, and keep so many of those that were there before, as older() names them.

    Raises OSError if it can't be written, FloatingPointError naming a tensor that is not finite
    (for which a GPU is waited for); both leave what was there as it was.
    """
    if name := not_finite(checkpoint):
        after = f" after step {checkpoint['step']}" if "step" in checkpoint else ""
        raise FloatingPointError(f"{name} is not finite{after}")
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # before anything else is touched
        previous, whole = older(path, 1), zipfile.is_zipfile(path)  # or a stump, not to be kept
        linked = previous.exists() and whole and os.path.samefile(path, previous)
        if keep and whole and not linked:  # as a process left them that was killed
            for age in range(keep, 1, -1):
                if older(path, age - 1).exists():
                    os.replace(older(path, age - 1), older(path, age))
            with replacing(previous) as copy:  # path stays until the new one is there
                try:
                    os.link(path, copy)
                except OSError:  # no hard links on this file system
                    shutil.copyfile(path, copy)


def older(path, age):
    """The name of what save() replaced: last.1.pt, and last.2.pt of what it replaced before."""
    return Path(path).with_suffix(f".{age}{Path(path).suffix}")


def not_finite(state):
    """The name of the first tensor in nested dictionaries and lists that is not finite; or None."""
    return next((name for name, value in tensors_in(state) if not value.isfinite().all()), None)


def tensors_in(state):
    """Yield name and tensor of all that are in nested dictionaries and lists, in their order."""
    rest, seen = [("", state)], set()
    while rest:
        name, state = rest.pop()
        if isinstance(state, torch.Tensor):
            yield name, state
        if isinstance(state, (dict, list, tuple)) and id(state) not in seen:
            seen.add(id(state))  # for a file may name one a million times
            items = state.items() if isinstance(state, dict) else enumerate(state)
            rest += [(f"{name}.{key}".lstrip("."), value) for key, value in items][::-1]


def load(path, resume=False, kind=None):
    """Read a checkpoint of this project, if asked of a kind, executing nothing from it.

    returns its dictionary: kind ("teacher", "generator", "autoencoder"), config, step, data (name,
    data_dir, size, shape, classes, flip), network (arguments of UNet or Autoencoder), model (the
    EMA weights); of a teacher or generator prediction, schedule, autoencoder (None, or a dictionary
    of kind, network and model); of a generator sigmas, figures, best, teacher_figures,
    teacher_sha256, and in generator.pt fake_score; training (weights and optimizers) where --resume
    can go on from it
    Raises ValueError if the file is missing, foreign, damaged, of another kind, or can't be
    resumed from; it tells of others there that could be taken instead.
    """
    for name in ("last.pt" if resume else "generator.pt", "teacher.pt", "autoencoder.pt"):
        if Path(path, name).is_file():
            raise ValueError(f"{path}: is a folder; give a checkpoint in it, such as "
                             f"{Path(path, name)}")
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint file"
                         + (instead_of(path) or "; teacher.py and dmd2.py write them"))
    try:
        checkpoint = read(path, fits)
        assembled(checkpoint)
        if checkpoint.get("autoencoder"):
            assembled(checkpoint["autoencoder"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}{instead_of(path)}") from error
    if kind not in (None, checkpoint["kind"]):
        raise ValueError(f"{path}: holds a checkpoint of kind {checkpoint['kind']}; needed is one "
                         f"of kind {kind}, which teacher.py --{kind} makes")
    if resume and "training" not in checkpoint:
        raise ValueError(f"{path}: holds no optimizers to resume from; teacher.pt, autoencoder.pt "
                         "and last.pt do")
    return checkpoint


def instead_of(path):
    """What to say after a checkpoint that can't be had: which whole ones save() kept beside it."""
    base = Path(path).with_name(re.sub(r"\.\d(\.\w+)$", r"\1", Path(path).name))
    for candidate in (base, *(older(base, age) for age in range(1, 10))):
        with contextlib.suppress(ValueError, OSError):
            if candidate != Path(path):
                checkpoint = read(candidate, fits)
                assembled(checkpoint)
                return f"; use {candidate}, of step {checkpoint['step']}"
    return ""


# All that the pickle in a checkpoint names, and how the zip archive around it is laid out.
PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage",
           "torch LongStorage"}
LAYOUT = re.compile(r"[^/]+/(data\.pkl|data/\d+|version|byteorder|\.[\w/]+)")


def read(path, accepts):
    """What save() wrote, executing nothing from it, in memory of a small multiple of its size.

    Raises ValueError if it is damaged or foreign, or accepts(content) is not true, or raises.
    """
    check_archive(path)
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError, EOFError, LookupError,
                             ValueError, TypeError, AttributeError, OverflowError), \
            warnings.catch_warnings(action="ignore"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        sizes = [value.nbytes for _, value in tensors_in(content)]  # as views they may be any
        if sum(sizes) <= os.path.getsize(path) and accepts(content):
            return content
    raise ValueError("not a checkpoint of this project, or of another version of it")


def check_archive(path):
    """Raises ValueError if a file is damaged, or something else than save() writes.

    PyTorch looks at no checksum; and without executing anything, it would make room for what
    compressed parts say that they hold, and a bytearray as large as a pickle asks for, and take
    hours for the hash of a tuple of tuples of tuples that are all one.
    """
    with open(path, "rb") as file:
        reason = "not a checkpoint of this project"
        if file.read(4) == b"PK\3\4":
            reason = "a damaged checkpoint, which is not whole or was changed"
        with contextlib.suppress(zipfile.BadZipFile, RuntimeError, OSError, EOFError, LookupError,
                                 ValueError, OverflowError, struct.error):
            archive = zipfile.ZipFile(file)
            entries, size = archive.infolist(), os.fstat(file.fileno()).st_size
            names = {entry.filename.lower() for entry in entries}
            if (len(names) < len(entries) or not all(map(LAYOUT.fullmatch, names))
                    or any(entry.compress_type for entry in entries)
                    or not ends_plainly(file, archive.start_dir)
                    or sum(entry.file_size for entry in entries) > size):
                reason = "not a checkpoint of this project, but an archive of another kind"
            elif archive.testzip() is None:
                content, = (archive.read(entry) for entry in entries
                            if entry.filename.lower().endswith("data.pkl"))
                found, tuples, again, last = set(), set(), 0, ""
                for opcode, value, _ in pickletools.genops(content):
                    if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST"):
                        found.add(value or opcode.name)
                    if "TUPLE" in last and "PUT" in opcode.name:
                        tuples.add(value)
                    again += "GET" in opcode.name and value in tuples
                    last = opcode.name
                if found <= PICKLED and again < 20:
                    return
                what = f"names {min(found - PICKLED)!r:.100}" if found - PICKLED else \
                    "has tuples within tuples"
                reason = f"{what}, which no checkpoint of this project does; refused"
    raise ValueError(reason)


def ends_plainly(file, start):
    """Whether a zip archive ends as PyTorch's do, with one directory, at `start`, for any reader.

    The end is three records: zip64's, where that one is, and zip's (PKWARE's APPNOTE, 4.3.14-16).
    """
    at = file.seek(-98, os.SEEK_END)
    record, locator, last = struct.unpack("<56s20s22s", file.read())
    size, offset = struct.unpack("<QQ", record[40:])
    return (record[:4] == b"PK\6\6" and locator == struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
            and last[:4] == b"PK\5\6" and last[20:] == b"\0\0"
            and (offset, offset + size) == (start, at))


def fits(checkpoint):
    """Whether a dictionary has the fields that load() tells of, and these fit each other."""
    kind, data, network = (checkpoint[name] for name in ("kind", "data", "network"))
    shape = shape_of(network)
    if not (fits_network(checkpoint) and checkpoint["step"] > 0
            and type(checkpoint["step"]) is int and type(checkpoint.get("training", {})) is dict
            and all(isinstance(data[name], (list, tuple)) for name in ("shape", "classes"))
            and all(type(size) is int for size in data["shape"])
            and isinstance(checkpoint["config"], dict) and type(data["flip"]) is bool
            and all(type(name) is str for name in (*data["classes"], data.get("data_dir", "")))
            and (type(data["name"]) is str or data["name"] is None and kind == "teacher")
            and type(checkpoint.get("training", {}).get("images")) in (int, type(None))
            and data["size"] in (None, data["shape"][-1])):
        return False
    if kind == "autoencoder":
        latent_shape(network)
        return tuple(data["shape"]) == shape and {"name", "data_dir"} <= data.keys()
    if kind not in ("teacher", "generator"):
        return False
    autoencoder, classes = checkpoint["autoencoder"], network["label_dim"]
    if autoencoder is not None:
        if (autoencoder["kind"] != "autoencoder" or not fits_network(autoencoder)
                or latent_shape(autoencoder["network"]) != shape):
            return False
        shape = shape_of(autoencoder["network"])
    sigmas = checkpoint["sigmas"] if kind == "generator" else [SIGMA_MAX]
    figures = [checkpoint[name] or {} for name in ("figures", "best", "teacher_figures")
               if kind == "generator"]
    return (all(type(name) is str and type(value) in (int, float, str)
                for part in figures for name, value in part.items())
            and tuple(data["shape"]) == shape and classes in (0, len(data["classes"]))
            and isinstance(sigmas, (list, tuple)) and len(sigmas) > 0
            and all(type(sigma) is float and SIGMA_MIN <= sigma <= SIGMA_MAX for sigma in sigmas)
            and all(type(checkpoint[name]) is str and checkpoint[name] in known for name, known in
                    (("prediction", PREDICTIONS), ("schedule", SCHEDULES))))


def shape_of(network):
    """The shape [C, H, W] of what a network of these arguments takes."""
    return network["img_channels"], network["img_resolution"], network["img_resolution"]


def fits_network(checkpoint):
    """Whether a network has possible sizes, and weights enough for them to be true."""
    network, mults = checkpoint["network"], checkpoint["network"]["channel_mult"]
    if type(network.get("model_type", "")) is not str:
        return False
    sizes = [*mults, network.get("label_dim", 0) + 1, network.get("latent_channels", 1)]
    sizes += [network[n] for n in ("img_resolution", "img_channels", "model_channels",
                                   "num_blocks")]
    return (all(type(size) is int and 0 < size < 2**16 for size in sizes)
            and 0 < len(mults) * network["num_blocks"] <= len(checkpoint["model"]))


def restore(parts, states, path):
    """Load states into networks and optimizers of the same names; ValueError if they don't fit."""
    try:
        if name := not_finite(states):
            raise ValueError(f"{name} is not finite")
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except (RuntimeError, TypeError, LookupError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split()).split("state_dict for ")[-1]
        raise ValueError(f"{path}: can't be resumed from; what it holds does not fit the networks "
                         f"and optimizers of this run ({reason:.200}){instead_of(path)}") from error


def check_resumed(checkpoint, cfg, count, name):
    """Tell where a run goes on, and which of its options are others now.

    Raises ValueError if the number of training images is another.
    """
    before, saved = checkpoint["training"].get("images"), checkpoint["config"]
    if before != count:
        raise ValueError(f"--resume {cfg.resume}: its run has {before} training images, and {name} "
                         f"has {count} now; restore them, or start a new run")
    changed = [f"{flag(key)} {value} (it was {'not given' if saved[key] is None else saved[key]})"
               for key, value in dataclasses.asdict(cfg).items()
               if value != saved[key] and key not in ("out", "resume")]
    tell(", ".join([f"resuming after step {checkpoint['step']}", *changed]), error=True)


def network_of(checkpoint):
    """A new denoiser or autoencoder of a checkpoint's arguments."""
    if checkpoint["kind"] == "autoencoder":
        return Autoencoder(**checkpoint["network"])
    return Denoiser(UNet(**checkpoint["network"]), checkpoint["prediction"])


def build(checkpoint, device="cpu"):
    """The denoiser or autoencoder of a checkpoint, in eval mode, without gradients.

    Raises ValueError if the weights don't fit the network or are not finite.
    """
    return place(frozen(assembled(checkpoint)), device)


def assembled(checkpoint):
    """A network of a checkpoint with its weights, which it shares; ValueError likewise."""
    damaged = f"damaged checkpoint of kind {checkpoint['kind']}: its weights"
    try:
        with torch.device("meta"):  # which takes no memory before the weights are known to fit
            model = network_of(checkpoint)
        model.load_state_dict(checkpoint["model"], assign=True)
    except (RuntimeError, TypeError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"{damaged} don't fit its network") from error
    weights = model.state_dict().values()
    storages = {storage.data_ptr(): storage.nbytes() for storage in
                (weight.untyped_storage() for weight in weights)}
    if 4 * sum(weight.numel() for weight in weights) > sum(storages.values()):
        raise ValueError(f"{damaged} are more than the file holds")
    if not all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights):
        raise ValueError(f"{damaged} are not finite float32")
    return model


@on_rank_0
def make_run_folder(cfg):
    """Create cfg.out with config.json in it; returns its lock, to be held during the run.

    A new run first moves what an older one left there into a new folder, old1 or the next number;
    so no file is of another run. pairs.pt stays, for it knows its teacher.
    Raises OSError if the folder can't be written to, ValueError if another process trains there.
    """
    names = ("autoencoder.pt", "teacher.pt", "generator.pt", "last.pt", "autoencoder.[0-9].pt",
             "teacher.[0-9].pt", "last.[0-9].pt", "config.json", "log.jsonl", "loss.png",
             "latents.png", f"samples_{'[0-9]' * 6}*.png")
    out = Path(cfg.out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = locked(out)
        for name in (*names, "pairs.pt"):  # what a process that was killed had begun to write
            for path in out.glob(f".[0-9]*.{name}"):
                path.unlink()
        found = [path for name in names for path in out.glob(name)]
        if found and not cfg.resume and not cfg.profile:
            old = next(path for n in itertools.count(1) if not (path := out / f"old{n}").exists())
            tell(f"the run that was in {out} is in {old} now", error=True)
            old.mkdir()
            for path in found:
                path.replace(old / path.name)
    with replacing(out / "config.json") as path:
        path.write_text(json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    return lock


def locked(folder):
    """A file by which this process holds a folder until it is closed.

    Raises ValueError if another process has it; where there are no locks, none is held.
    """
    file = open(folder / ".lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"{folder}: another process is training there; stop it, or wait for it, "
                         "or begin a new run in another folder, by --out") from error
    except (ImportError, OSError):  # Windows, some network file systems
        pass
    return file


# ---- logging ------------------------------------------------------------------------------------

class Log:
    """log.jsonl, the progress bar and wandb of a run; stops it if a number is not finite.

    Values stay on their device until a line is due, so that the loop never waits for them.
    """

    def __init__(self, cfg, start, lock=None):
        self.cfg, self.path, self.lock = cfg, Path(cfg.out) / "log.jsonl", lock
        self.pending, self.now, self.began, self.told = [], start + 1, 0.0, time.perf_counter()
        if rank() == 0:  # drop the lines of steps that will be done anew
            lines = read_log(self.path) if start and self.path.is_file() else []
            with replacing(self.path) as path:
                path.write_text("".join(json.dumps(line) + "\n" for line in lines
                                        if line["step"] <= start))
        self.bar = tqdm(total=cfg.steps, initial=start, disable=True if rank() else None,
                        dynamic_ncols=True)
        self.wandb = None
        if cfg.wandb and rank() == 0:
            import wandb
            self.wandb = wandb.init(  # beside the log where nobody is logged in: it must not ask
                project="dmd2", dir=cfg.out, config=dataclasses.asdict(cfg),
                mode=None if wandb.api.api_key else "offline")

    def note(self, **values):
        """Take in tensors, scalars, of the step under way."""
        self.pending += [(self.now, name, value.detach()) for name, value in values.items()]

    def step(self):
        """Close a step."""
        if self.pending[0][0] == self.now:  # the first since the last line
            self.began = time.perf_counter()
        self.bar.update()
        if due(self.now - 1, self.cfg.log_every, self.cfg.steps):
            self.check()
        self.now += 1

    def check(self):
        """Write the means of what is pending; FloatingPointError if a value is not finite."""
        if not self.pending:
            return
        steps, names, values = zip(*self.pending)
        self.pending = []
        values = torch.stack(values)
        average([values])
        collected = {}
        for step, name, value in zip(steps, names, values.tolist()):
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {step}")
            collected.setdefault(name, []).append(value)
        means = {name: sum(values) / len(values) for name, values in collected.items()}
        losses = {name: f"{value:.3g}" for name, value in means.items() if "loss" in name}
        if steps[-1] > steps[0]:  # between the ends of steps, so nothing else counts
            images = (steps[-1] - steps[0]) * self.cfg.batch
            means["images_per_second"] = images / (time.perf_counter() - self.began)
            losses["images/s"] = f"{means['images_per_second']:.0f}"
        self.bar.set_postfix(losses)
        if self.bar.disable and time.perf_counter() > self.told + 60:  # no bar: a line a minute
            self.told = time.perf_counter()
            self.say(f"step {steps[-1]} of {self.cfg.steps}: "
                     + ", ".join(f"{name} {value}" for name, value in losses.items()))
        self.write(steps[-1], **means)

    @on_rank_0
    def write(self, step, **values):
        """Append a line for a step now."""
        line = dict(step=step, **{name: float(f"{value:.6g}") for name, value in values.items()})
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)

    @on_rank_0
    def say(self, message):
        """Print a line above the progress bar."""
        with contextlib.suppress(OSError):  # where nobody listens any more the run goes on
            self.bar.write(message, file=sys.stderr)

    def close(self):
        self.bar.close()
        if self.lock:
            self.lock.close()
        if self.wandb:
            self.wandb.finish()


def read_log(path):
    """The lines of a log.jsonl as dictionaries, up to the first that was not written whole."""
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
            if not (line["step"] >= 0 and len(line) < 100  # a run's own have 20 at most
                    and all(re.fullmatch(r"\w{1,100}", name) and type(value) in (int, float)
                            and abs(value) < 1e30 for name, value in line.items())):
                break
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            break
        lines.append(line)
    return lines


@on_rank_0
def plot_log(path):
    """Draw a log.jsonl as loss.png beside it: a panel per quantity, the teacher's dashed."""
    lines = read_log(path)
    names = {name for line in lines for name in line} - {"step"}
    teachers = {name: line[name] for line in lines for name in line if name.startswith("teacher_")}
    first = ["frechet_distance", "recall", "precision", "accuracy", "loss"]
    names -= {"validation_loss", *teachers}  # which are drawn with loss, and beside the others
    names = [name for name in first if name in names] + sorted(names - set(first))
    columns, rows = min(len(names), 3), math.ceil(len(names) / 3)
    figure = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    for i, name in enumerate(names):
        panel = figure.add_subplot(rows, columns, i + 1, title=name, xlabel="step")
        steps, values = zip(*[(line["step"], line[name]) for line in lines if name in line])
        panel.plot(steps, values, marker="." if len(steps) < 30 else None, linewidth=1)
        other = [(line["step"], line["validation_loss"]) for line in lines
                 if name == "loss" and "validation_loss" in line]
        if other:
            panel.lines[0].set_label("training")
            panel.plot(*zip(*other), marker=".", linewidth=1, label="validation")
            panel.legend()
        if f"teacher_{name}" in teachers:
            panel.axhline(teachers[f"teacher_{name}"], ls="--", color="gray", label="teacher")
            panel.legend()
        if min(values) > 0 and max(values) > 3 * min(values):
            panel.set_yscale("log")
    with replacing(Path(path).with_name("loss.png")) as path:
        figure.savefig(path, dpi=90)


# ---- the steps of a run, and --profile ----------------------------------------------------------

def training_steps(start, cfg, device, networks, log, write_checkpoint):
    """The numbers of the steps to do; with --profile of a few, which end with a report.

    networks          by the names that they have in the report
    write_checkpoint  (number of steps done) -> path of what it wrote

    Asked by a signal to stop, it ends the process when the step under way is done and saved.
    """
    steps = iter(range(start, cfg.steps))
    steps = profiled(steps, cfg, device, networks) if cfg.profile else steps
    with StopSignals(wait=not cfg.profile) as signals:
        for step in steps:
            if device.type == "cuda":  # what the last step's graphs computed may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            yield step
            number = signals.received()
            if number or due(step, cfg.save_every, cfg.steps):
                log.check()
                path = write_checkpoint(step + 1)
                plot_log(log.path)
            if number and step + 1 < cfg.steps:
                log.say(f"stopped after step {step + 1} of {cfg.steps}, which is saved; go on with "
                        f"--resume {path}")
                log.close()
                sys.exit(128 + number)


class StopSignals:
    """SIGINT, SIGTERM, SIGHUP, noted for a step to end first; another SIGINT does not wait.

    With several processes they go on until all know of it, and no signal ends one of them at once.
    """

    def __init__(self, wait):
        self.wait, self.number, self.before = wait, 0, {}

    def __enter__(self):
        if self.wait and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number, frame):
        if number == self.number == signal.SIGINT and ranks() == 1:
            raise KeyboardInterrupt(AGAIN)
        first, self.number = not self.number, number
        if first and rank() == 0:
            with contextlib.suppress(OSError):  # of a terminal that is closed, a `| tee` that ended
                os.write(2, f"{signal.Signals(number).name}: stops when this step is done and "
                            "saved\n".encode())  # print() may not interrupt another

    def received(self):
        """The number of the last signal that came to any of the ranks; 0 if none came.

        Several ranks have to exchange a number for this, in every step, by gloo.
        """
        if ranks() == 1 or not self.wait:
            return self.number
        number = torch.tensor(self.number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()


def profiled(steps, cfg, device, networks, warmup=5, times=20):
    """Yield steps, meanwhile time them, count their operations, trace them; then report."""
    cycle = getattr(cfg, "fake_steps", 1)  # the steps in which each kind of update happens
    seconds, kept, kept_bytes = [], {}, []

    def keep(tensor):  # for a backward pass, each storage once
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def use(tensor):  # the first that a backward pass asks for ends the count, the others add 0
        kept_bytes.append(sum(kept.values()))
        kept.clear()
        return tensor

    began = clock(device)
    yield from itertools.islice(steps, warmup * cycle)
    warm = clock(device) - began
    for _ in range(times):
        began = clock(device)
        yield from itertools.islice(steps, cycle)
        seconds.append((clock(device) - began) / cycle)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    operations = FlopCounterMode(display=False)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, use)
    with torch.compiler.set_stance("force_eager"), operations, hooks:
        yield from itertools.islice(steps, cycle)
    for name, network in networks.items():
        method = "estimate" if isinstance(network, Denoiser) else "forward"
        setattr(network, method, record_function(f"{name}, forward")(getattr(network, method)))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports that it finds no GPU
    with torch.profiler.profile() as profiler:
        yield from itertools.islice(steps, cycle)
    if rank() == 0:
        profiler.export_chrome_trace(f"{cfg.out}/trace.json")
        report_profile(cfg, device, warm, statistics.median(seconds), max(kept_bytes), peak,
                       operations.get_total_flops() / cycle, sum(kept_bytes) / cycle)
        by = "cpu_time_total" if device.type == "cpu" else "device_time_total"
        print(profiler.key_averages().table(by, row_limit=25, max_name_column_width=40))
        print(f"trace: {cfg.out}/trace.json (chrome://tracing or ui.perfetto.dev)")


def report_profile(cfg, device, warm, seconds, kept, peak, operations, moved):
    """Print what profiled() measured of a step (s, FLOP, bytes) beside what this machine can do."""
    dtype, on_cpu = dtype_of(cfg, device), device.type == "cpu"
    matrix, image = (1024, 16) if on_cpu else (8192, 512)
    a = torch.randn(matrix, matrix, device=device, dtype=dtype)
    x, w = (torch.randn(n, 256, side, side, device=device, dtype=dtype)
            for n, side in ((image, 16), (256, 3)))
    block, copy = torch.empty(2, 2**28, dtype=torch.uint8, device=device)
    rate = max(2 * matrix**3 / time_of(lambda: a @ a, device),
               2 * 9 * image * 256**3 / time_of(lambda: F.conv2d(x, w, padding=1), device))
    bandwidth = 2 * len(block) / time_of(lambda: copy.copy_(block), device)
    print(f"{device_name(device)}, torch {torch.__version__}, {str(dtype)[6:]}, --compile "
          f"{cfg.compile}, batch {cfg.batch}\n"
          f"a step      {1000 * seconds:9.2f} ms (median), {cfg.batch / seconds:.0f} images/s; the "
          f"first few, with compilation, {warm:.1f} s\n"
          f"arithmetic  {1000 * operations / rate:9.2f} ms at least: {operations / 1e9:.2f} GFLOP "
          f"at {rate / 1e9:.0f} GFLOP/s, the most measured here\n"
          f"memory      {2000 * moved / bandwidth:9.2f} ms: {moved / 1e6:.0f} MB, kept for "
          f"backward passes in eager mode, written and read at {bandwidth / 1e9:.0f} GB/s\n"
          f"kept for one backward pass: {kept / 1e6:.0f} MB at most"
          + f"; in use at most: {peak / 1e6:.0f} MB" * bool(peak))


def clock(device):
    """Seconds, read when all that the device was asked for is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def time_of(call, device):
    """The least seconds of 20 calls, results awaited."""
    clock(device)
    return min(timeit.repeat(lambda: (call(), clock(device)), number=1, repeat=20))


def device_name(device):
    """What a measured time is of."""
    threads = f"{torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {threads}"


# ---- pictures -----------------------------------------------------------------------------------

@on_rank_0
def save_grid(rows, names, path, titles=()):
    """Write rows of images as one PNG, the name of each row at its left, small images enlarged.

    rows    [R, K, C, H, W]  uint8, C 1 or 3
    names   R strings; titles, above the columns, if there are some
    """
    zoom = max(1, round(56 / rows.shape[-1]))
    side, font = rows.shape[-1] * zoom, ImageFont.load_default(14)
    step, top = side + 4, 22 if titles else 4
    left = 8 + max([round(font.getlength(name)) for name in names], default=0)
    sheet = Image.new("RGB", (left + rows.shape[1] * step, top + len(rows) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.text((left + (column + 0.5) * step, 3), title, "black", font, anchor="ma")
    for r, (row, name) in enumerate(zip(rows.cpu().numpy(), names)):
        draw.text((left - 6, top + r * step + side // 2), name, "black", font, anchor="rm")
        for k, pixels in enumerate(row):
            pixels = pixels.transpose(1, 2, 0).repeat(zoom, 0).repeat(zoom, 1)
            sheet.paste(Image.fromarray(pixels.squeeze()), (left + k * step, top + r * step))
    with replacing(path) as path:
        sheet.save(path)


@on_rank_0
def save_plane(groups, classes, path, umap=False):
    """Draw features as dots in one plane, a colour per class: of PCA, or if asked of UMAP.

    The classes are named if there are 10 at most.

    groups  by name: features [N, D] and labels [N]; the plane is of all of them

    UMAP (McInnes et al. 2018) needs umap-learn; without it, the plane is PCA's.
    """
    features = torch.cat([features for features, _ in groups.values()]).cpu().double()
    if umap and len(features) > 15 and importlib.util.find_spec("umap"):  # its neighbourhoods
        from umap import UMAP
        kind, points = "UMAP", UMAP(random_state=0, n_jobs=1).fit_transform(features.numpy())
    else:
        u, s, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
        kind, points = "PCA", F.pad(u * s, (0, 2))[:, :2].numpy()  # two, even of one image
    figure = Figure(figsize=(0.6 + 4.4 * len(groups), 4.4), layout="constrained")
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    few, start = len(classes) <= 10, 0
    colour = matplotlib.colormaps["tab10" if few else "turbo"].resampled(len(classes))
    for panel, (name, (_, label)) in zip(panels, groups.items()):
        part, start = points[start:start + len(label)], start + len(label)
        for c in label.unique().tolist():
            x, y = part[(label == c).cpu().numpy()].T
            shown = classes[c].replace("$", r"\$").encode(errors="replace").decode()
            panel.scatter(x, y, 3, [colour(c)], label=shown)
        panel.set(title=f"{name} ({kind})", xticks=[], yticks=[])
    if few:
        panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3)
    with replacing(path) as path:
        figure.savefig(path, dpi=90)


# ---- main ---------------------------------------------------------------------------------------

def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    path = train(cfg)
    if cfg.autoencoder and not cfg.profile:
        tell(f"autoencoder: {path}\nnext: python teacher.py --latent {path}")
    elif not cfg.profile:
        tell(f"teacher: {path}\n"
             f"next: python sample.py {path}   or   python dmd2.py --teacher {path}")


if __name__ == "__main__":
    run_script(main)
