"""Images out of any checkpoint, and how good they are.

    python sample.py runs/dmd2/generator.pt                    # a grid of every class
    python sample.py runs/teacher/teacher.pt --labels 3,3,7 --out threes.png
    python sample.py runs/dmd2/generator.onnx --n 1000 --out samples.npz
    python sample.py runs/dmd2/generator.pt --evaluate         # Fréchet distance and more
    python sample.py runs/teacher/teacher.pt --trajectory      # or --map, --beside
    python sample.py edm-cifar10-32x32-cond-vp.pkl --sampler ddim --steps 50

A checkpoint of teacher.py, dmd2.py or NVlabs/edm, or a file of export.py: its path is enough.
"""

import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import pickle
import re
import statistics
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from teacher import (ENDINGS, FEATURES, HEUN_STEPS, SCHEDULES, SIGMA_MAX, SIGMA_MIN, SUBSET, Data,
                     Denoiser, Options, Pixels, arg, build, decoded, encoded, fresh_noise, heun,
                     load, load_data, parse, pick_device, progress, quantile_of, rank, rank_0_first,
                     ranks, replacing, run_script, sampling_sigmas, save, save_grid, seeded,
                     shape_of, start_scale, tell, timestep_sigmas, to_float, to_uint8)

ASSETS = Path(__file__).resolve().parent / "assets"
DIMENSIONS = 64  # of each space in which quality is measured
FIRST = "where Stable Diffusion's generator begins (default: 999; SDXL's of one step 399)"
EVALUATE_N, FID_N, MAP_N = 10000, 50000, 1000  # images, by default
BATCH = 256  # images at a time; changes the speed only
TITLES = dict(frechet_distance="Fréchet distance", pixel_distance="in pixels",
              random_distance="in random features", accuracy="classified as asked", fid="FID",
              inception_score="Inception Score", precision="precision", recall="recall")


# ---- samplers: from noise to images, by a denoiser; heun is in teacher.py -----------------------

@torch.no_grad()
def ddim(denoiser, x, sigmas, label, noises=(), eta=0.0):
    """DDIM (Song et al. 2021, Eq. 12, 16): estimate x0, go on to the next level with its noise.

    With eta 0 this is Euler's method on EDM's equation, and on that of flow matching; with eta 1
    all the noise of a step that can be is drawn anew: DDPM (Ho et al. 2020, Eq. 7).

    x, sigmas, label, returned  as of heun()
    noises                      standard normal [B, C, H, W], one for each step, if eta is not 0
    """
    noises = iter(noises)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x0_hat = denoiser(x, x.new_full(x.shape[:1], sigma), label)
        fresh = eta * sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
        x = x0_hat + (sigma_next**2 - fresh**2) ** 0.5 / sigma * (x - x0_hat)
        if fresh > 0:
            x = x + fresh * next(noises)
    return x


# Function, title, default steps, whether at the noise levels of the teacher's schedule.
SAMPLERS = {
    "heun": (heun, "Heun", HEUN_STEPS, False),
    "euler": (ddim, "Euler", 2 * HEUN_STEPS - 1, False),
    "ddim": (ddim, "DDIM", 50, True),
    "ddpm": (functools.partial(ddim, eta=1.0), "DDPM", 1000, True),
}


def few_step(generator, x, sigmas, label, noises=()):
    """Sample by a generator in len(sigmas) steps: estimate x0, add noise of the next level, repeat.

    x, sigmas, label, returned  as of heun(), but without the level 0
    noises                      standard normal [B, C, H, W], one for each step after the first
    """
    noises, x0 = iter(noises), generator(x, x.new_full(x.shape[:1], sigmas[0]), label)
    for sigma in sigmas[1:]:
        x0 = generator(x0 + sigma * next(noises), x.new_full(x.shape[:1], sigma), label)
    return x0


def generator_sigmas(steps, highest=SIGMA_MAX):
    """A generator's noise levels, falling from `highest` by a tenth of its karras quantile a step,
    as 80, 45.3, 24.4, 12.4, for steps from low levels lose variety."""
    u = quantile_of(highest) * (1 - 0.1 * torch.arange(steps, dtype=torch.float64))
    return SCHEDULES["karras"](u).tolist()


class Guided(nn.Module):
    """A denoiser with classifier-free guidance (Ho and Salimans 2022): none + g (label - none);
    g is 1 above a noise level, `highest` (the upper end of Kynkäänniemi et al. 2024)."""

    def __init__(self, denoiser, guidance, no_label, highest=math.inf):
        super().__init__()
        self.denoiser, self.guidance = denoiser, guidance
        self.no_label, self.highest = no_label, highest

    def forward(self, x, sigma, label):
        if self.highest < math.inf and (sigma > self.highest).all():
            return self.denoiser(x, sigma, label)
        none = torch.full_like(label, self.no_label)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([label, none]))
        with_label, without = both.chunk(2)
        g = torch.where(sigma > self.highest, 1.0, self.guidance).view(-1, 1, 1, 1)
        return without + g * (with_label - without)


def guided(denoiser, cfg, checkpoint):
    """The denoiser with cfg's guidance, or itself for 1; ValueError if it knows no "no label"."""
    if cfg.guidance != 1 and not checkpoint["config"].get("label_dropout"):
        raise ValueError(f"--guidance {cfg.guidance:g}: the teacher had no --label-dropout; give 1")
    no_label = checkpoint["network"].get("label_dim", len(checkpoint["data"]["classes"]))
    return (denoiser if cfg.guidance == 1 else
            Guided(denoiser, cfg.guidance, no_label, cfg.guidance_below or math.inf))


# ---- options ------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """A teacher's guidance, and by what --evaluate and dmd2.py measure images."""

    guidance: float = arg(1.0, "classifier-free guidance of a teacher; 1 is none", low=0)
    guidance_below: float = arg(None, "noise level above which it is 1, if any", low=SIGMA_MIN)
    features: str = arg(None, "measure by this network: inception, for FID, or a file of "
                              "TorchScript or ONNX, of images in [-1, 1]")
    features_weights: str = arg(None, "inception's weights (default: downloaded)", free=True)
    reference: str = arg(None, "of --features: an .npz with mu and sigma of the real images', such "
                               "as EDM's; made if it is not there", free=True)


@dataclasses.dataclass(frozen=True)
class Config(EvaluationOptions, Options):
    checkpoint: str = arg(None, "of teacher.py, dmd2.py or EDM, DMD2's .bin, a .onnx file, or a "
                                "folder of diffusers or its name on the Hub", positional=True)
    n: int = arg(None, f"images (default: 10 a class; --evaluate {EVALUATE_N}, FID {FID_N})", low=1)
    labels: str = arg(None, "classes by name or number, such as 3,3,7 (default: all, evenly)")
    sampler: str = arg(None, "of a teacher (default: heun, at EDM's noise levels)", tuple(SAMPLERS))
    steps: int = arg(None, f"its steps (default: {[s[2] for s in SAMPLERS.values()]})", low=1)
    data: str = arg(None, "what an EDM checkpoint was trained on, or where a folder is now")
    data_dir: str = arg(None, "where the real images are (default: where training found them)")
    prompt: str = arg(None, "what a text-to-image model is to show")
    prompts: str = arg(None, "a file of prompts, one a line, instead")
    weights: str = arg(None, "of a pipeline's generator: its UNet's or LoRA, .safetensors or .bin")
    student_steps: int = arg(1, "of --weights: the steps of that generator", (1, 2, 4))
    first_timestep: int = arg(None, FIRST, low=249, high=999)
    clip: str = arg(None, "print the CLIP score by this folder of transformers, or name on the Hub")
    seed: int = arg(0, "seed of the noise", low=0)
    out: str = arg("samples.png", "a .png (grid), .npz (images [N, H, W, C], labels) or new folder")
    evaluate: bool = arg(False, "print Fréchet distance, precision and recall")
    seeds: int = arg(3, "with --evaluate: the number of seeds, from --seed on", low=1)
    beside: str = arg(None, "picture: real images | this second checkpoint's | the first's")
    trajectory: bool = arg(False, "picture: x / (1 + sigma) and the estimate of x0, step by step")
    map: bool = arg(False, "picture: images as dots by their features, by t-SNE")
    batch: int = arg(BATCH, "images at a time, which changes the speed only", low=1)


# ---- EDM's published checkpoints: pickles, read without executing anything from them ------------

class EDMUnpickler(pickle.Unpickler):
    """Knows the names in EDM's files as harmless stand-ins, and refuses all others."""

    def module(meta):
        """An object of one of EDM's own classes: a module without its program text."""
        module = nn.Module()
        vars(module).update(meta["state"], class_name=meta["class_name"])
        return module

    NAMES = dict(
        _reconstruct_persistent_obj=module, ModuleDict=nn.ModuleDict,
        _load_from_bytes=lambda content: torch.load(io.BytesIO(content), weights_only=True),
        _rebuild_tensor_v2=torch._utils._rebuild_tensor_v2,
        _rebuild_parameter=lambda data, *rest: data,
        _rebuild_parameter_with_state=lambda data, *rest: data,
        scalar=lambda *rest: None,
        dtype=type("dtype", (), dict(__init__=lambda *rest: None, __setstate__=lambda *rest: None)),
        OrderedDict=dict, EasyDict=type("EasyDict", (dict,), {}), set=set,
        encode=lambda text, _: text.encode("latin1"))

    def find_class(self, module, name):
        if name not in self.NAMES:
            raise ValueError(f"names {module}.{name}, which no EDM checkpoint does; refused")
        return self.NAMES[name]


# The sizes of EDM's two networks, and what they are by default.
EDM_SIZES = "label_dim", "model_channels", "channel_mult", "num_blocks", "attn_resolutions"
EDM_DEFAULTS = {"SongUNet": (0, 128, [1, 2, 2, 2], 4, [16]),
                "DhariwalUNet": (0, 192, [1, 2, 3, 4], 3, [32, 16, 8])}
IMAGENET_64 = dict(label_dim=1000, img_resolution=64, in_channels=3)  # else the defaults


def load_edm(path):
    """A checkpoint of NVlabs/edm or, a .bin, tianweiy/DMD2's one-step generator of ImageNet-64, as
    load() returns ours, without figures and training state, and with its promises."""
    content, official = io.BytesIO(Path(path).read_bytes()), Path(path).suffix == ".bin"
    try:
        if official:
            kind, args = "DhariwalUNet", IMAGENET_64
            state = torch.load(content, map_location="cpu", weights_only=True)
        else:
            precond = EDMUnpickler(content).load()["ema"]
            kind, args = precond.model.class_name, precond.model._init_kwargs
            if precond.class_name != "EDMPrecond" or kind not in EDM_DEFAULTS:
                raise ValueError(f"holds {precond.class_name} of {kind}; it must be EDMPrecond")
            if args.get("embedding_type") == "fourier":
                raise ValueError("its embedding_type is fourier: NCSN++, which is not read")
            state = dict(precond.model.named_parameters())
        network = dict(zip(EDM_SIZES, EDM_DEFAULTS[kind]), model_type=kind,
                       img_resolution=args["img_resolution"], img_channels=args["in_channels"])
        network.update({name: args[name] for name in EDM_SIZES if name in args})
        weights = {f"net.{name.split('model.')[-1]}": value.detach().float() for name, value in
                   state.items() if not re.search("augment|resample_filter", name)}
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        raise ValueError(f"{path}: no checkpoint of EDM or DMD2, or damaged: {error}") from error
    classes = tuple(map(str, range(network["label_dim"]))) or ("all",)
    return dict(kind="generator" if official else "teacher", step=None, config={}, network=network,
                prediction="edm", schedule="lognormal", model=weights, autoencoder=None,
                sigmas=[SIGMA_MAX],  # of a generator
                data=dict(name=None, data_dir="data", size=network["img_resolution"], flip=False,
                          shape=shape_of(network), classes=classes))


# ---- Stable Diffusion: a folder of diffusers as one more teacher, whose labels are prompts -------

class Prompts:
    """A pipeline's tokenizers and frozen text encoders, shared by all copies of a network.

    A label is the row of a prompt in `table`, int64 [rows, 77], of SDXL [rows, 2, 77]: the prompts,
    then "no prompt" for guidance, then captions of real images. Tokens may be given instead.
    """

    def __init__(self, folder, texts, device="cpu"):
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
        index = json.loads((folder / "model_index.json").read_text())
        self.xl, self.device = is_xl(folder), device
        kinds = [("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)][:1 + self.xl]
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / f"tokenizer{part}")
                           for part, _ in kinds]
        self.encoders = nn.ModuleList(
            kind.from_pretrained(folder / f"text_encoder{part}", use_safetensors=True)
            for part, kind in kinds).float().to(device).eval().requires_grad_(False)
        self.table = self.tokens([*texts, ""])
        if index.get("force_zeros_for_empty_prompt"):  # SDXL's is an embedding of zeros
            self.table[-1] = -1

    def __deepcopy__(self, memo):
        return self

    def tokens(self, texts):
        """B texts -> int64 [B, 77], of SDXL [B, 2, 77]; longer ones are cut."""
        ids = [tokenizer(texts, padding="max_length", truncation=True, max_length=77,
                         return_tensors="pt").input_ids for tokenizer in self.tokenizers]
        return torch.stack(ids, dim=1).squeeze(1).to(self.device)

    def encoded(self, label):
        """Rows [B] or tokens -> embeddings [B, 77, D] and, of SDXL, the pooled one [B, P]; of -1
        zeros. In float32, whatever the UNet computes in."""
        label = self.table[label] if label.ndim == 1 else label
        tokens = label.clamp(min=0)
        with torch.autocast(self.table.device.type, enabled=False), torch.no_grad():
            if not self.xl:
                return self.encoders[0](tokens).last_hidden_state, None
            one, two = (encoder(ids, output_hidden_states=True)
                        for encoder, ids in zip(self.encoders, tokens.unbind(1)))
        given = (label >= 0).all(dim=(1, 2)).float()[:, None]
        text = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=2)
        return text * given[:, :, None], two.text_embeds * given


class TextUNet(nn.Module):
    """A UNet of diffusers as Denoiser calls its network: timesteps for noise levels."""

    def __init__(self, unet, prompts, network):
        super().__init__()
        self.unet, self.prompts = unet, prompts
        levels = timestep_sigmas("scaled_linear").log().float()
        self.register_buffer("levels", levels, persistent=False)
        channels, side = unet.config.block_out_channels, network["pixels"]
        self.bottleneck = channels[-1], network["img_resolution"] >> len(channels) - 1
        self.sizes = [side, side, 0, 0, side, side]  # SDXL is told: before the crop, corner, after

    def forward(self, x, c_noise, label, decode=True):
        """x [B, 4, h, w], c_noise [B], label as of Prompts, or what it encodes to -> F (None
        without decode), and the output of the middle block, the bottleneck"""
        unet = self.unet
        text, pooled = label if isinstance(label, tuple) else self.prompts.encoded(label)
        text = text.to(x.dtype)
        # Timesteps stay float32 until they are waves: in bfloat16 999 is 1000.
        emb = unet.time_embedding(unet.get_time_embed(x, timestep_of(4 * c_noise, self.levels)))
        if pooled is not None:
            sizes = pooled.new_tensor(self.sizes).expand(pooled.shape[0], 6)
            emb = emb + unet.get_aug_embed(emb, text, dict(text_embeds=pooled, time_ids=sizes))
        h = unet.conv_in(x)
        skips = (h,)
        for block in unet.down_blocks:
            h, outputs = block(h, emb, encoder_hidden_states=text)
            skips += outputs
        features = h = unet.mid_block(h, emb, encoder_hidden_states=text)
        for block in unet.up_blocks if decode else ():
            count = len(block.resnets)
            h = block(h, skips[-count:], emb, encoder_hidden_states=text)
            skips = skips[:-count]
        return unet.conv_out(F.silu(unet.conv_norm_out(h))) if decode else None, features


def timestep_of(level, levels):
    """ln(sigma) [B], and that of the timesteps [1000] -> timestep [B], 0 to 999, float32; whole
    where it all but is."""
    above = (levels < level[:, None]).sum(dim=1).clamp(1, 999)
    low, high = levels[above - 1], levels[above]
    timestep = (above - 1 + (level - low) / (high - low)).clamp(0, 999)
    return torch.where((timestep - timestep.round()).abs() < 1e-2, timestep.round(), timestep)


# The layers that DMD2's LoRA of SDXL adapts.
LORA_LAYERS = ("to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 "
               "conv_shortcut downsamplers.0.conv upsamplers.0.conv time_emb_proj").split()


def with_adapter(denoiser, rank, alpha):
    """A denoiser whose UNet has the weights of the given one's, of which it copies none, and an
    adapter (LoRA) of rank and alpha, whose parameters are the only ones that the denoiser has."""
    from peft import LoraConfig
    shared = {id(p): p for p in denoiser.parameters()}  # which deepcopy takes for copied
    adapted = copy.deepcopy(denoiser, shared)
    net, unet = adapted.net, adapted.net._modules.pop("unet")
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_LAYERS))
    net.__dict__["unet"] = unet  # not registered: no state_dict() or to() of the role's reaches it
    net.adapter = nn.ParameterList(p for p in unet.parameters() if p.requires_grad)
    return adapted


def folder_of(pipeline):
    """Where a pipeline is: a folder, or of org/name on the Hub what was downloaded of it."""
    if Path(pipeline).is_dir():
        return pipeline
    if Path(pipeline).is_absolute():
        raise ValueError(f"{pipeline}: this pipeline is not there any more; give sample.py its new "
                         "folder, and --weights a .safetensors beside generator.pt, or in unet/")
    from huggingface_hub import snapshot_download
    return snapshot_download(
        pipeline, ignore_patterns=["*.fp16.*", "*.non_ema.*", "safety_checker/*"],
        allow_patterns=["model_index.json", "*/*.json", "*/*.txt", "*/*.safetensors"])


def is_xl(pipeline):
    """Whether it is SDXL."""
    return Path(folder_of(pipeline), "text_encoder_2").is_dir()


def generator_timesteps(pipeline, steps, first=None):
    """Noise levels of a pipeline's generator, of evenly spread timesteps up to `first`, as 999,
    749, 499, 249; without it where DMD2's begin."""
    first = first or (399 if is_xl(pipeline) and steps == 1 else 999)
    levels = timestep_sigmas("scaled_linear")
    return [levels[(first + 1) * k // steps - 1].item() for k in range(steps, 0, -1)]


def open_pipeline(folder):
    """A folder of diffusers, or org/name on the Hub, as load() returns a teacher, but without
    weights and classes; ValueError if it is no Stable Diffusion."""
    from diffusers import DDPMScheduler
    name, folder = str(folder), folder_of(folder)
    try:
        unet, vae = (json.loads(Path(folder, part, "config.json").read_text())
                     for part in ("unet", "vae"))
        scheduler = DDPMScheduler.from_pretrained(Path(folder, "scheduler"))
        prediction = dict(epsilon="eps", v_prediction="v")[scheduler.config.prediction_type]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no diffusers folder of SD1.5, SD2 or SDXL: {error}") from error
    sigmas = (1 / scheduler.alphas_cumprod.double() - 1).sqrt()
    if not torch.allclose(sigmas, timestep_sigmas("scaled_linear")):
        raise ValueError(f"{folder}: its noise levels are not Stable Diffusion's; with zero "
                         "terminal SNR it has none at the last timestep")
    side = unet["sample_size"]
    pixels = side * 2 ** (len(vae["block_out_channels"]) - 1)
    network = dict(pipeline=name, img_channels=unet["in_channels"], img_resolution=side,
                   pixels=pixels)
    return dict(kind="teacher", step=None, config=dict(label_dropout=0.1), network=network,
                prediction=prediction, schedule="scaled_linear", model=None,
                autoencoder=dict(kind="autoencoder", network=dict(pipeline=name), model=None),
                data=dict(name=None, data_dir="data", size=pixels, flip=False,
                          shape=(3, pixels, pixels), classes=()))


def build_any(checkpoint, device="cpu"):
    """build(), or the denoiser of a pipeline: its own, or of a generator with its weights."""
    if "pipeline" not in checkpoint["network"]:
        return build(checkpoint, device)
    from diffusers import UNet2DConditionModel
    from transformers.utils import logging
    logging.disable_progress_bar()
    network, device = checkpoint["network"], torch.device(device)
    folder = Path(folder_of(network["pipeline"]))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True).float()
    prompts = Prompts(folder, checkpoint["data"]["classes"], device)
    if network.get("weights"):
        load_weights(unet, network["weights"])
    denoiser = Denoiser(TextUNet(unet.to(device), prompts, network), checkpoint["prediction"])
    if checkpoint["model"] and network.get("lora"):
        adapted = with_adapter(denoiser, network["lora"], network["lora_alpha"])
        adapted.load_state_dict(checkpoint["model"])
        adapted.net.unet.fuse_lora()  # into the weights, which are the denoiser's, too
    elif checkpoint["model"]:
        denoiser.load_state_dict(checkpoint["model"])
    return denoiser.to(device).eval().requires_grad_(False)


def load_weights(unet, path):
    """Load a UNet's weights, or a LoRA, of a .safetensors or .bin file, as DMD2's releases are."""
    from diffusers import StableDiffusionPipeline  # SDXL's reads the same
    from diffusers.models.model_loading_utils import load_state_dict
    try:
        state = load_state_dict(path)
        if any("lora" in name for name in state):
            *lora, metadata = StableDiffusionPipeline.lora_state_dict(
                path, unet_config=unet.config, return_lora_metadata=True)
            StableDiffusionPipeline.load_lora_into_unet(*lora, unet, metadata=metadata)
        else:
            unet.load_state_dict(state)
    except Exception as error:  # torch.load, safetensors and peft have no base in common
        raise ValueError(f"--weights {path}: not this UNet's, or damaged: {error!s:.99}") from error


def shard(net, *others):
    """Split weights, gradients and moments of a TextUNet and other modules over the ranks, which
    gather a block's weights while they compute with it (FSDP, Zhao et al. 2023)."""
    from torch.distributed.fsdp import fully_shard
    for block in (*net.unet.down_blocks, net.unet.mid_block, *net.unet.up_blocks, net, *others):
        fully_shard(block)


def write_student(generator, path, half=False):
    """The generator as diffusers reads it, beside its checkpoint: pytorch_lora_weights.safetensors,
    its alpha included, or unet/; in float16 if `half`."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    net, folder = generator.net, path.parent
    if hasattr(net, "adapter"):
        from peft import get_peft_model_state_dict
        state = get_peft_model_state_dict(net.unet)
        state = {name: value.half() if half else value for name, value in state.items()}
        StableDiffusionPipeline.save_lora_weights(
            folder, state, unet_lora_adapter_metadata=net.unet.peft_config["default"].to_dict())
    else:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(net.unet.config)
        weights = load(path)["model"]  # all of them, where the generator may be a shard
        unet.load_state_dict({name.removeprefix("net.unet."): weight for name, weight in
                              weights.items()}, assign=True)
        (unet.half() if half else unet).save_pretrained(folder / "unet")


def load_captioned(facts, codec, prompts, device):
    """Data of a folder's images with captions, in x.jpg and x.txt, or by metadata.jsonl's lines of
    file_name and text; without caption they are left out. Latents, made once and kept in data_dir,
    and the rows of their captions, which follow the prompts. ValueError if there are none."""
    if not facts["name"]:
        raise ValueError("--data is missing: captioned images, for GAN or --no-backward-simulation")
    folder, listed = Path(facts["name"]), Path(facts["name"], "metadata.jsonl")
    if listed.exists():
        lines = map(json.loads, filter(str.strip, listed.read_text().splitlines()))
        found = [(folder / line["file_name"], line["text"]) for line in lines if line.get("text")]
    else:
        found = [(path, text.read_text().strip()) for path in sorted(folder.rglob("*"))
                 if path.suffix.lower() in ENDINGS and (text := path.with_suffix(".txt")).exists()]
    stamp = [(str(path), path.stat().st_size, text) for path, text in found]
    stamp = json.dumps([stamp, facts["size"], digest_of(codec.network["pipeline"])])
    key = hashlib.sha256(stamp.encode()).hexdigest()[:16]
    path = Path(facts["data_dir"], f"{folder.name}-latents-{key}.pt")
    with rank_0_first():
        if not path.exists():
            latents, captions = [], []
            for image, text in progress(found, "latents"):
                pixels = decoded(image, facts["size"])
                if isinstance(pixels, Exception):
                    tell(f"{image}: left out, {pixels}", sys.stderr)
                else:
                    x0 = to_float(torch.from_numpy(pixels)[None]).to(device)
                    latents.append(codec.encode(x0).cpu())
                    captions.append(text)
            if not captions:
                raise ValueError(f"--data {folder}: no readable image has a caption, as in x.txt")
            save(dict(latents=torch.cat(latents), captions=captions), path)
            tell(f"{folder}: latents of {len(captions)} images, kept as {path}", sys.stderr)
    stored = torch.load(path, weights_only=True, mmap=True)
    rows = len(prompts.table) + torch.arange(len(stored["captions"]))
    prompts.table = torch.cat([prompts.table, prompts.tokens(stored["captions"])])
    return encoded(Data(stored["latents"], rows, facts["classes"]), Pixels(), device)


# ---- any checkpoint as one function -------------------------------------------------------------

class Sampler(NamedTuple):
    """What a checkpoint of any kind becomes: a function of unit noise and label, and its facts."""

    x0: Callable      # (iterator of normal noises [B, *shape], label [B] int64) -> [B, *shape]
    decode: Callable  # x0 -> images [B, C, H, W] in about [-1, 1]
    shape: tuple      # of noise and x0: of an image, or of its latents
    name: str         # "teacher, 18 Heun steps"
    evaluations: int  # of the network per image
    data: dict        # name, data_dir, size, shape, classes
    device: torch.device
    denoiser: nn.Module | None = None  # what x0 calls; none of an ONNX file


def open_checkpoint(path, data=None, data_dir=None, kind=None, prompts=None):
    """A checkpoint by its path: load()'s, of a .pkl or .bin load_edm()'s, of a folder or a name on
    the Hub open_pipeline()'s. Data may have moved meanwhile, and a file of prompts, one a line, may
    take the place of a pipeline's. ValueError for an autoencoder."""
    suffix, on_hub = Path(path).suffix, re.fullmatch(r"[\w-]+/[\w.-]+", str(path))
    if suffix in (".pkl", ".bin"):
        checkpoint = load_edm(path)
    elif Path(path, "model_index.json").is_file() or (
            on_hub and suffix != ".pt" and not Path(path).parent.is_dir()):
        checkpoint = open_pipeline(path)
    else:
        checkpoint = load(path, kind)
    if checkpoint["kind"] == "autoencoder":
        raise ValueError(f"{path}: holds an autoencoder; next: python teacher.py --latent {path}")
    facts = checkpoint["data"]
    facts.update(name=data or facts["name"], data_dir=data_dir or facts["data_dir"])
    if "pipeline" in checkpoint["network"] and prompts:
        lines = map(str.strip, Path(prompts).read_text().splitlines())
        facts["classes"] = tuple(filter(None, lines))
    if suffix in (".pkl", ".bin") and data:  # which tell no names of classes
        found = load_data(data, "train", facts["data_dir"], facts["size"]).classes
        facts["classes"] = found if len(found) == len(facts["classes"]) else facts["classes"]
    return checkpoint


def load_images(facts, split):
    """load_data() of the images that a checkpoint tells of; ValueError if they are others now."""
    if facts["name"] is None:
        raise ValueError("--data is missing: an EDM checkpoint does not tell its data, as cifar10; "
                         "pipelines have --clip instead")
    data = load_data(facts["name"], split, facts["data_dir"], facts["size"])
    for now, before in ((data.shape, facts["shape"]), (data.classes, facts["classes"])):
        if now != tuple(before) != ("all",):
            raise ValueError(f"--data {facts['name']}: has {now}, the checkpoint {tuple(before)}")
    return data._replace(flip=facts.get("flip", False))


def load_sampler(path, device="cpu", cfg=None):
    """The Sampler of a file of any kind; of a teacher, as cfg, a Config, says."""
    cfg, device = cfg or Config(checkpoint=path), torch.device(device)
    if Path(path).suffix == ".onnx":
        return onnx_sampler(path, device, cfg.data, cfg.data_dir)
    checkpoint = open_checkpoint(path, cfg.data, cfg.data_dir, prompts=cfg.prompts)
    facts = checkpoint["data"]
    if "pipeline" in checkpoint["network"]:
        if cfg.prompt:
            facts["classes"] = (cfg.prompt,)
        elif not cfg.prompts:  # a generator's are all that it was trained on
            facts["classes"] = facts["classes"][:10]
        if not facts["classes"]:
            raise ValueError('--prompt is missing: say what to show, such as --prompt "a red dog"')
        if cfg.weights:
            checkpoint["network"]["weights"], checkpoint["model"] = cfg.weights, None
            checkpoint.update(kind="generator", sigmas=generator_timesteps(
                checkpoint["network"]["pipeline"], cfg.student_steps, cfg.first_timestep))
    denoiser = build_any(checkpoint, device)
    if checkpoint["kind"] == "teacher":
        denoiser = guided(denoiser, cfg, checkpoint)
    return make_sampler(denoiser, checkpoint, device, cfg.sampler, cfg.steps)


def digest_of(path):
    """SHA-256 of a checkpoint; of a pipeline, of the beginnings of its files."""
    if Path(path).is_file():
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    files = sorted(filter(Path.is_file, Path(folder_of(path)).rglob("*")))
    content = [np.fromfile(file, np.uint8, 2**20) for file in files]
    return hashlib.sha256(np.concatenate(content)).hexdigest()


def make_sampler(denoiser, checkpoint, device, sampler=None, steps=None):
    """The Sampler of a generator, or of a teacher, which may be Guided, by one of SAMPLERS."""
    if checkpoint["kind"] == "generator":
        function, sigmas = few_step, checkpoint["sigmas"]
        calls, name = sigmas, f"generator, {len(sigmas)} step{'s' * (len(sigmas) > 1)}"
    else:
        function, title, default, own = SAMPLERS[sampler or "heun"]
        steps = steps or default
        sigmas = sampling_sigmas(steps, checkpoint["schedule"], own)
        name = f"teacher, {steps} {title} steps"
        calls = sigmas[:1] + 2 * sigmas[1:-1] if function is heun else sigmas[:-1]
    evaluations = len(calls)
    if isinstance(denoiser, Guided):
        name += f", guidance {denoiser.guidance:g}"
        evaluations += sum(sigma <= denoiser.highest for sigma in calls)
        name += f" below {denoiser.highest:g}" if denoiser.highest < math.inf else ""

    @torch.no_grad()
    def x0(noises, label):
        noises = (noise.to(device) for noise in noises)
        x = start_scale(checkpoint["schedule"], sigmas[0]) * next(noises)
        return function(denoiser, x, sigmas, label.to(device), noises)
    codec, shape = build(checkpoint["autoencoder"], device), shape_of(checkpoint["network"])
    return Sampler(x0, codec.decode, shape, name, evaluations, checkpoint["data"], device, denoiser)


def onnx_sampler(path, device, data=None, data_dir=None):
    """The Sampler of a file of export.py, which does not tell where its data are."""
    session, facts = onnx_session(path, device.type)
    inputs = [value.name for value in session.get_inputs()]
    if inputs != ["noise", "label"]:
        raise ValueError(f"{path}: takes {' and '.join(inputs)}; give the .pt it was made of")
    facts["data"].update(name=data or facts["data"]["name"], data_dir=data_dir or "data")
    steps, shape = facts["steps"], tuple(session.get_inputs()[0].shape[-3:])

    def images(noises, label):
        feed = dict(noise=exported_noise(noises, steps).cpu().numpy(), label=label.cpu().numpy())
        image = torch.from_numpy(session.run(["image"], feed)[0])
        return to_float(image.permute(0, 3, 1, 2)) if image.dtype == torch.uint8 else image
    name = f"ONNX generator, {steps} step{'s' * (steps > 1)}"
    return Sampler(images, Pixels.decode, shape, name, steps, facts["data"], device)


def exported_noise(noises, steps):
    """Noise for an exported file, of fresh_noise(): [B, *shape], for K > 1 steps [K, B, *shape]."""
    return torch.stack(list(itertools.islice(noises, steps))) if steps > 1 else next(noises)


def onnx_session(source, device="cpu", **provider_options):
    """An onnxruntime session of a file of export.py (path or bytes), and the facts it tells."""
    import onnxruntime
    if device == "cuda":
        onnxruntime.preload_dlls()
    provider = f"{device.upper()}ExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(source, options, [(provider, provider_options)],
                                               enable_fallback=0)
        facts = json.loads(session.get_modelmeta().custom_metadata_map["dmd2"])
    except Exception as error:  # onnxruntime's exceptions have no other base in common
        raise ValueError(f"{source!s:.99}: no file of export.py, or damaged: {error}") from error
    if provider not in session.get_providers():  # get_available_providers() tells what was compiled
        raise ValueError(f"--device {device}: onnxruntime did not load {provider}")
    return session, facts


def batch_of(sampler, batch=BATCH):
    """How many of a sampler's images to make at a time: `batch`, or fewer that are large."""
    return min(batch, max(1, 2**23 // math.prod(sampler.data["shape"])))


def generate(sampler, label, seed, batch=BATCH):
    """Images uint8 [N, C, H, W] of label [N]; image i is made of seed, i and label[i] only: batches
    are filled up to multiples of 16, for at odd sizes kernels add in another order. Several ranks
    share the work, and each gets all images. FloatingPointError if they are not finite."""
    fill = 16 if math.prod(sampler.data["shape"]) < 2**17 else 1  # of large ones it costs too much
    batch = batch_of(sampler, batch)
    batch, count = batch + -batch % fill, len(label) + -len(label) % fill
    images = torch.zeros(count, *sampler.data["shape"], dtype=torch.uint8, device=sampler.device)
    for start in progress(range(rank() * batch, count, ranks() * batch), sampler.name):
        part = F.pad(label, (0, count - len(label)))[start:start + batch]
        noises = fresh_noise(len(part), sampler.shape, seed, start)
        image = sampler.decode(sampler.x0(noises, part))
        if not image.isfinite().all():
            raise FloatingPointError(f"images are not finite, of the {sampler.name}")
        images[start:start + batch] = to_uint8(image)
    if ranks() > 1:
        dist.all_reduce(images)
    return images[:len(label)].cpu()


# ---- quality, and the features that it is measured by -------------------------------------------

def feature_net(channels, outputs):
    """A network of images [B, C, H, W] of any size -> [B, outputs]"""
    layers = [nn.Sequential(nn.Conv2d(c_in, c, 3, stride, 1), nn.BatchNorm2d(c), nn.ReLU())
              for c_in, c, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, outputs))


def train_features(data, steps=1500, batch=128, device="cpu"):
    """Train on the training images, each batch shifted by a few pixels, an encoder, from whose
    features a decoder restores the image, so they keep variety, and a head, of weight 0.01, tells
    the class; and a classifier, which shares nothing with it."""
    rng = seeded(FEATURES)
    torch.manual_seed(0)
    (_, channels, _, side), reach = data.images.shape, max(1, data.images.shape[-1] // 9)
    nets = nn.ModuleDict(dict(
        encoder=feature_net(channels, DIMENSIONS),
        classifier=feature_net(channels, len(data.classes)),
        decoder=nn.Sequential(
            nn.Linear(DIMENSIONS, 256), nn.ReLU(), nn.Unflatten(1, (64, 2, 2)),
            nn.Upsample(-(-side // 2)), nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Upsample(side), nn.Conv2d(64, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, channels, 3, 1, 1)),
        head=nn.Sequential(nn.ReLU(), nn.Linear(DIMENSIONS, len(data.classes))))).to(device)
    optimizer = torch.optim.AdamW(nets.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    for _ in progress(range(steps), "feature networks"):
        index = torch.randint(len(data.images), (batch,), generator=rng)
        dy, dx = torch.randint(-reach, reach + 1, (2,), generator=rng).tolist()
        x = F.pad(to_float(data.images[index]).to(device), (reach,) * 4, mode="replicate")
        x = x[:, :, reach + dy:reach + dy + side, reach + dx:reach + dx + side]
        features = nets["encoder"](x)
        of_class, by_classifier = (
            F.cross_entropy(logits, data.labels[index].to(device), label_smoothing=0.1)
            for logits in (nets["head"](features), nets["classifier"](x)))
        loss = F.mse_loss(nets["decoder"](features), x) + 0.01 * of_class + by_classifier
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    del nets["decoder"], nets["head"]
    return nets.half().cpu()


def load_features(data, facts, device="cpu"):
    """What images of a data set are measured by, functions of images in [-1, 1] by the names of
    their distances: a trained encoder, principal components of the training images, and a random
    network; and a classifier. The trained ones are in assets/, or trained once and kept in
    data_dir. And the head of a SHA-256 to tell figures apart by."""
    path, channels = ASSETS / f"features_{facts['name']}.pt", data.images.shape[1]
    if facts["name"] not in ("digits", "mnist"):
        content = data.images[:1000].numpy().tobytes() + data.labels.numpy().tobytes()
        path = Path(facts["data_dir"], f"networks_{hashlib.sha256(content).hexdigest()[:16]}.pt")
        with rank_0_first():
            if not path.exists():
                tell(f"training feature networks for {facts['name']}, kept in {path}", sys.stderr)
                save(train_features(data, device=device).state_dict(), path)
    nets = nn.ModuleDict(dict(encoder=feature_net(channels, DIMENSIONS),
                              classifier=feature_net(channels, len(data.classes))))
    nets.load_state_dict(torch.load(path, weights_only=True))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        nets["random"] = feature_net(channels, DIMENSIONS)
    nets.to(device).eval().requires_grad_(False)
    pixels = to_float(data.images[:2000]).to(device).flatten(1)
    axes = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False).Vh[:DIMENSIONS].T
    nets = dict(frechet_distance=nets["encoder"], pixel_distance=lambda x: x.flatten(1) @ axes,
                random_distance=nets["random"], classifier=nets["classifier"])
    return nets, hashlib.sha256(path.read_bytes()).hexdigest()[:12]


class Inception(nn.Module):
    """TensorFlow's network of 2015, by torch-fidelity: FID's and the Inception Score's."""

    def __init__(self, weights=None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        if weights:
            torch.load(weights, weights_only=True)  # raises, where that class would execute a call
        self.net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)

    def forward(self, x):
        """x [B, 1 or 3, H, W] in [-1, 1] -> [B, 2048]"""
        return self.net(to_uint8(x).expand(-1, 3, -1, -1))[0]

    def score(self, features):
        """Inception Score (Salimans et al. 2016) of features [N, 2048], the mean over ten parts."""
        log_p = (features.double() @ self.net.fc.weight.double().cpu().T).log_softmax(1)
        return statistics.mean(
            F.kl_div(part.exp().mean(0).log(), part, reduction="none", log_target=True)
            .sum(1).mean().exp().item() for part in log_p.tensor_split(10))


def load_network(name, weights=None, device="cpu"):
    """A network of images in [-1, 1] by what --features gives, and the head of a SHA-256 of it."""
    if name == "inception":
        net = Inception(weights).to(device)
        content = b"".join(p.cpu().numpy().tobytes() for p in net.state_dict().values())
    elif not Path(name).is_file():
        raise ValueError(f"--features {name}: no such file, and not inception")
    elif Path(name).suffix == ".onnx":
        import onnxruntime
        session, content = onnxruntime.InferenceSession(name), Path(name).read_bytes()
        given = session.get_inputs()[0].name
        net = lambda x: torch.from_numpy(session.run(None, {given: x.cpu().numpy()})[0])
    else:
        net, content = torch.jit.load(name, device).eval(), Path(name).read_bytes()
    return net, hashlib.sha256(content).hexdigest()[:12]


class Reference(NamedTuple):
    """What images are measured against."""

    nets: dict            # of load_features(), or one of load_network()
    features: dict        # of real images, in each space by its distance: [N, D] or gaussian()
    labels: torch.Tensor  # [N] int64, in the same order
    protocol: str
    device: torch.device | str


def load_reference(facts, device="cpu", cfg=EvaluationOptions()):
    """The Reference to evaluate against: training images of the data that a checkpoint tells of, in
    the spaces of load_features(), or in that of --features, of which --reference may tell."""
    if cfg.features:
        net, digest = load_network(cfg.features, cfg.features_weights, device)
        nets = {"fid" if cfg.features == "inception" else "frechet_distance": net}
        about = f"features {Path(cfg.features).name} {digest}"
        if cfg.reference and Path(cfg.reference).exists():
            with np.load(cfg.reference) as file:
                real = tuple(torch.from_numpy(file[part]).double() for part in ("mu", "sigma"))
            return Reference(nets, dict.fromkeys(nets, real), torch.arange(len(facts["classes"])),
                             f"reference {Path(cfg.reference).name}, {about}", device)
    data = load_images(facts, "train")
    if not cfg.features:
        nets, digest = load_features(data, facts, device)
        about = f"feature networks {digest}"
    order = torch.randperm(len(data.images), generator=seeded(SUBSET))  # a prefix is a fair sample
    real = {name: found[order] for name, found in extract(nets, data.images, device).items()
            if name != "classifier"}
    if cfg.features and cfg.reference and rank() == 0:
        mu, sigma = gaussian(*real.values())
        with replacing(cfg.reference) as file:
            np.savez(file, mu=mu, sigma=sigma)
    about = f"reference {len(order)} training images of {facts['name']}, {about}"
    return Reference(nets, real, data.labels[order], about, device)


@torch.no_grad()
def extract(nets, images, device):
    """What each network, by its name, makes of images uint8 [N, C, H, W]: [N, D], on the CPU."""
    # 50 images at a time fit a CPU's cache.
    found = {name: torch.cat([net(to_float(part.to(device))).cpu() for part in
                              images.tensor_split(ranks())[rank()].split(50)])
             for name, net in nets.items()}
    of_ranks = [found] * ranks()
    if ranks() > 1:
        dist.all_gather_object(of_ranks, found)
    return {name: torch.cat([part[name] for part in of_ranks]) for name in found}


def evaluate(images, label, reference):
    """Quality of images uint8 [N, C, H, W] that were asked for by label [N]: distances(); the share
    that the classifier, which has no part in them, puts into the class asked for; precision and
    recall in the first space, of equally many real and given images, at most 10000."""
    found = extract(reference.nets, images, reference.device)
    name, real = next(iter(reference.features.items()))
    figures = distances(found, reference.features)
    if "classifier" in found:
        right = found["classifier"].argmax(1) == label.cpu()
        figures["accuracy"] = right.double().mean().item()
    if name == "fid":
        figures["inception_score"] = reference.nets[name].score(found[name])
    if torch.is_tensor(real):  # and not only its mean and covariance
        n = min(len(real), len(images), 10000)
        figures["precision"], figures["recall"] = precision_recall(real[:n], found[name][:n])
    return figures


def distances(found, real):
    """Fréchet distances of features [N, D] from real ones in each space, in units of the real
    ones' variance, the mean over the D, so that those of different spaces can be compared; but FID
    as it is published."""
    real = {name: gaussian(features) for name, features in real.items()}
    return {name: frechet_distance(found[name], (mean, covariance)) /
            (1 if name == "fid" else covariance.diagonal().mean().item())
            for name, (mean, covariance) in real.items()}


def gaussian(features):
    """Mean [D] and covariance [D, D] of features [N, D], in float64, or these as they are."""
    if isinstance(features, tuple):
        return features
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(a, b):
    """Fréchet distance of Gaussians of features a [N, D] and b [M, D], or of gaussian()s (Heusel
    et al. 2017).

        |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    in float64. The root's trace is that of (R' C_b R)^(1/2), where R R' = C_a.
    """
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(a), gaussian(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt()
    root_trace = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (mean_a - mean_b).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root_trace).item()


def precision_recall(real, fake, k=3):
    """Share of fake features [N, D] in the real ones' manifold, and of real in the fake ones': the
    union of balls that reach to their centre's k-th neighbour (Kynkäänniemi et al. 2019)."""
    def share_inside(points, centres):
        radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values  # 1: itself
                           for part in centres.split(100)])
        inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(100)]
        return torch.cat(inside).double().mean().item()
    return share_inside(fake, real), share_inside(real, fake)


def measure(sampler, reference, n, seed, batch=BATCH):
    """evaluate() n images of a sampler, of classes in the proportions of the training images."""
    label = reference.labels.repeat(-(-n // len(reference.labels)))[:n]
    return evaluate(generate(sampler, label, seed, batch), label, reference)


def report(runs, floor, protocol):
    """Print mean and spread of figures of evaluate() beside those of n held-out real images, the
    floor, which may be empty; then all as JSON."""
    mean, spread = {}, {}
    about = f"   (floor: the {floor['n']} held-out real images)" if floor else ""
    tell(f"{'':22}samples   spread    floor{about}")
    for name in runs[0]:
        title, values = TITLES[name], [run[name] for run in runs]
        mean[name] = statistics.mean(values)
        spread[name] = statistics.stdev(values) if len(runs) > 1 else None
        cells = (mean[name], spread[name], floor.get(name))
        tell(f"{title:20}" + "".join(f"{'-':>9}" if x is None else f"{x:9.4f}" for x in cells))
    tell(json.dumps(dict(mean=mean, spread=spread, floor=floor, protocol=protocol)))


@torch.no_grad()
def clip_score(images, texts, folder, device="cpu"):
    """Mean cosine, times 100, of CLIP's embeddings of images uint8 [N, 3, H, W] and of the N texts
    that they were asked for by (Hessel et al. 2021, without its factor and threshold)."""
    from transformers import CLIPModel, CLIPProcessor
    model, scores = CLIPModel.from_pretrained(folder).to(device).eval(), []
    processor = CLIPProcessor.from_pretrained(folder)
    for part in (slice(start, start + 64) for start in range(0, len(texts), 64)):
        inputs = processor(text=texts[part], images=[*images[part]], padding=True, truncation=True,
                           return_tensors="pt")
        found = model(**inputs.to(device))
        scores.append((found.image_embeds * found.text_embeds).sum(1))
    return 100 * torch.cat(scores).mean().item()


# ---- output and pictures ------------------------------------------------------------------------

def read_labels(text, classes):
    """Class numbers [N] of names such as "cat,dog" or, where no name is a number, of numbers."""
    numbers = {name: i for i, name in enumerate(classes)}
    if not any(name.isdecimal() for name in classes):
        numbers.update({str(i): i for i in range(len(classes))})
    for word in text.split(","):
        if word not in numbers:
            raise ValueError(f"--labels {text}: {word!r} is no class of {', '.join(classes[:20])}")
    return torch.tensor([numbers[word] for word in text.split(",")])


def write_images(images, label, classes, out):
    """Write images uint8 [N, C, H, W] as a grid (.png), arrays (.npz), or PNG files in a folder."""
    pixels = images.permute(0, 2, 3, 1).numpy()
    if out.suffix == ".png":
        shown = label.unique().tolist()
        rows = pad_sequence([images[label == c] for c in shown], True, 255)
        save_grid(rows, [classes[c] for c in shown], out)
    elif out.suffix == ".npz":
        with replacing(out) as file:
            np.savez_compressed(file, images=pixels, labels=label.numpy())
    else:
        out.mkdir(parents=True)
        for i, (image, c) in enumerate(zip(pixels, label.tolist())):
            Image.fromarray(image.squeeze()).save(out / f"{i:05d}_{c}.png")


def compare(cfg, sampler, columns=5):
    """The picture real | second checkpoint | first checkpoint, a row per class (the first 10)."""
    other, data = load_sampler(cfg.beside, sampler.device, cfg), sampler.data
    if any(tuple(other.data[key]) != tuple(data[key]) for key in ("shape", "classes")):
        raise ValueError(f"--beside {cfg.beside}: has images of other shape or classes")
    real = load_images(data, "train")
    names = real.classes[:10]
    label = torch.arange(len(names)).repeat_interleave(columns)
    rows = [real.images[(real.labels == c).nonzero()[:columns, 0]] for c in range(len(names))]
    for s in (other, sampler):
        rows += generate(s, label, cfg.seed, cfg.batch).split(columns)
    blocks = F.pad(pad_sequence(rows, True, 255), (0,) * 7 + (1,), value=255).chunk(3)  # and a gap
    titles = [title if i == columns // 2 else "" for title in ("real", other.name, sampler.name)
              for i in range(columns + 1)]
    save_grid(torch.cat(blocks, dim=1)[:, :-1], names, cfg.out, titles[:-1])


def save_trajectory(sampler, label, seed, out, columns=10):
    """Write what a sampler's denoiser was given and its estimates, some noise levels as columns."""
    if sampler.denoiser is None:
        raise ValueError("--trajectory: an ONNX file tells its images only; give the generator.pt")
    calls = []
    sampler.denoiser.register_forward_hook(lambda _, args, x0: calls.append((*args[:2], x0)))
    sampler.x0(fresh_noise(len(label), sampler.shape, seed), label)
    shown = [calls[round(i)] for i in np.linspace(0, len(calls) - 1, min(len(calls), columns))]
    pairs = [(x / (1 + sigma.view(-1, 1, 1, 1)), x0_hat) for x, sigma, x0_hat in shown]
    images = [torch.stack([*map(sampler.decode, pair)], dim=1).flatten(0, 1) for pair in pairs]
    names = [name for c in label.tolist() for name in (sampler.data["classes"][c], "estimate")]
    titles = [f"{sigma[0].item():.2g}" for _, sigma, _ in shown]
    save_grid(to_uint8(torch.stack(images, dim=1)), names, out, titles)


def save_map(cfg, sampler):
    """Write images as dots of their features in a plane, by t-SNE (van der Maaten, Hinton 2008)."""
    from matplotlib.figure import Figure
    from sklearn.manifold import TSNE
    reference, classes = load_reference(sampler.data, sampler.device), sampler.data["classes"]
    label = reference.labels[:cfg.n or MAP_N].clamp(max=len(classes) - 1)  # 0 if unconditional
    images = generate(sampler, label, cfg.seed, cfg.batch)
    found = extract(reference.nets, images, sampler.device)
    features = torch.cat([part["frechet_distance"][:len(label)]
                          for part in (reference.features, found)]).double()
    points = TSNE(random_state=0).fit_transform(features.numpy())
    figure, few = Figure(figsize=(9.4, 4.4), layout="constrained"), len(classes) <= 10
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for panel, name, part in zip(panels, ("real", sampler.name), np.split(points, 2)):
        dots = panel.scatter(*part.T, 3, label, cmap="tab10" if few else "turbo")
        panel.set(title=f"{name} (t-SNE)", xticks=[], yticks=[])
    if few:
        panels[1].legend(dots.legend_elements(num=None)[0], [classes[c] for c in label.unique()],
                         loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(cfg.out, dpi=90)


def main(argv=None):
    cfg = parse(Config, argv, __doc__.split("\n\nA checkpoint")[0])
    onnx = cfg.checkpoint.endswith(".onnx") and cfg.device == "auto"
    device = pick_device("cpu" if onnx else cfg.device)
    sampler, out = load_sampler(cfg.checkpoint, device, cfg), Path(cfg.out)
    classes = tuple(sampler.data["classes"])
    if not (sampler.name.startswith("teacher") or cfg.beside) and (
            cfg.sampler or cfg.steps or cfg.guidance != 1):
        raise ValueError(f"--sampler, --steps, --guidance: are for teachers, not {cfg.checkpoint}")
    if cfg.evaluate:
        default = FID_N if cfg.features == "inception" else EVALUATE_N
        n, seeds = cfg.n or default, range(cfg.seed, cfg.seed + cfg.seeds)
        if n < 10 or cfg.reference and not cfg.features:
            raise ValueError(f"--evaluate --n {n}: needs 10 or more; --reference needs --features")
        reference = load_reference(sampler.data, device, cfg)
        floor = {}
        if not cfg.features:
            # Without precision and recall, which of so few images compare with no others.
            real = {name: gaussian(features) for name, features in reference.features.items()}
            images, label, *_ = load_images(sampler.data, "test")
            floor = dict(evaluate(images, label, reference._replace(features=real)), n=len(images))
        runs = [measure(sampler, reference, n, seed, cfg.batch) for seed in seeds]
        return report(runs, floor, f"{n} samples, {sampler.name}, EMA weights, "
                      f"{sampler.evaluations} function evaluation(s), seeds {[*seeds]}; "
                      f"{reference.protocol}")
    if out.suffix not in (".png", ".npz", "") or out.is_dir():
        raise ValueError(f"--out {out}: must end in .png or .npz, or be a folder that is new")
    asked = read_labels(cfg.labels, classes) if cfg.labels else torch.arange(len(classes))
    n = cfg.n or (len(asked) if cfg.labels else 4 if cfg.trajectory else 10 * len(classes))
    label = asked[torch.arange(n) % len(asked)]
    if cfg.beside:
        compare(cfg, sampler)
    elif cfg.trajectory:
        save_trajectory(sampler, label, cfg.seed, out)
    elif cfg.map:
        save_map(cfg, sampler)
    else:
        images = generate(sampler, label, cfg.seed, cfg.batch)
        if cfg.clip:
            score = clip_score(images, [classes[c] for c in label], cfg.clip, device)
            tell(f"CLIP score {score:.2f}: {n} images, {sampler.name}, {cfg.clip}")
        if rank() == 0:
            write_images(images, label, classes, out)
    tell(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
