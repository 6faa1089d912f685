"""Images out of any checkpoint, and how good they are.

    python sample.py runs/dmd2/generator.pt                    # a grid of every class
    python sample.py runs/teacher/teacher.pt --labels 3,3,7 --out threes.png
    python sample.py runs/dmd2/generator.onnx --n 1000 --out samples.npz
    python sample.py runs/dmd2/generator.pt --evaluate         # Fréchet distance and more
    python sample.py runs/teacher/teacher.pt --trajectory      # or --interpolate, --map
    python sample.py edm-cifar10-32x32-cond-vp.pkl --sampler ddim --steps 50

A checkpoint of teacher.py or dmd2.py, a file of export.py, or a checkpoint of NVlabs/edm: its path
is all that is needed. In reading order: samplers, options, EDM's checkpoints, any checkpoint as one
function, features, quality, output, pictures.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import pickletools
import reprlib
import statistics
import struct
import sys
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from teacher import (ANY_CLASS, DATA_DIR, FEATURES, HEUN_STEPS, KNOWN_DATA, SIGMA_DATA, SUBSET,
                     Options, Pixels, arg, build, check_same, codec_of, exported_noise, fits, flag,
                     fresh_noise, heun, load, load_data, may_be_moved, not_finite, on_rank_0, parse,
                     pick_device, progress, psnr, rank, rank_0_first, ranks, read, replacing,
                     run_script, sampling_sigmas, save, save_grid, save_plane, seeded, shape_of,
                     tell, to_float, to_uint8)

ASSETS = Path(__file__).resolve().parent / "assets"
DIMENSIONS = 64  # of the feature space in which quality is measured
NEIGHBOURS = 3  # k of precision and recall
EVALUATE_N, EVALUATE_AT_LEAST = 10000, 100
BATCH = 256  # images at a time; changes the speed only
MAP_N = 1000  # real images and generated ones in a map
STRIP_ROWS, STRIP_COLUMNS = 4, 10  # of a trajectory by default; columns of an interpolation, too
TITLES = dict(frechet_distance="Fréchet distance", accuracy="classified as asked",
              precision="precision", recall="recall")

OPCODES = 10**7  # of a pickle at most; those of EDM have less than 10**5

# SHA-256 of the feature networks in assets/; `python sample.py --train-features digits` makes one.
SHA256 = {
    "digits": "cccf1413509d3f3f21bba293d4335c019cba307419630e1dd361feaf1f021495",
    "mnist": "5754c12ac82f279fea6591087cebb8bac6a0afd92f79af5473a65fbf973d033d",
}


# ---- samplers: from noise to images, by a denoiser; heun is in teacher.py -----------------------

@torch.no_grad()
def ddim(denoiser, x, sigmas, label, noises=(), eta=0.0):
    """DDIM (Song et al. 2021, Eq. 12, 16): estimate x0, go on to the next level with its noise.

    With eta 0 this is Euler's method on EDM's equation, and on that of flow matching. With eta 1
    all the noise of a step that can be is drawn anew, as in DDPM (Ho et al. 2020, Eq. 7).

    x       [B, C, H, W]  noise of level sigmas[0]
    sigmas  falling noise levels, floats, the last of them 0
    label   [B]           int64
    noises  standard normal [B, C, H, W], one for each step, if eta is not 0
    returns x0 [B, C, H, W]
    """
    noises = iter(noises)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x0_hat = denoiser(x, x.new_full(x.shape[:1], sigma), label)
        fresh = eta * sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
        x = x0_hat + (sigma_next**2 - fresh**2) ** 0.5 / sigma * (x - x0_hat)
        if fresh > 0:
            x = x + fresh * next(noises)
    return x


class SamplerKind(NamedTuple):
    """A choice of --sampler."""

    function: Callable
    title: str
    steps: int           # by default
    options: tuple = ()  # of the function, and flags
    own: bool = False    # whether its levels are those of the teacher's schedule


SAMPLERS = {
    "heun": SamplerKind(heun, "Heun", HEUN_STEPS, ("churn", "s_min", "s_max", "s_noise")),
    "euler": SamplerKind(ddim, "Euler", 2 * HEUN_STEPS - 1),
    "ddim": SamplerKind(ddim, "DDIM", 50, ("eta",), own=True),
    "ddpm": SamplerKind(functools.partial(ddim, eta=1.0), "DDPM", 1000, own=True),
}
SAMPLER = "heun"  # by default
SAMPLER_OPTIONS = [option for kind in SAMPLERS.values() for option in kind.options]


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


class Guided(nn.Module):
    """Classifier-free guidance of a denoiser that knows "no label" (Ho and Salimans 2022).

        x0_hat = none + guidance (with label - none)
    """

    def __init__(self, denoiser, guidance, no_label):
        super().__init__()
        self.denoiser, self.guidance, self.no_label = denoiser, guidance, no_label

    def forward(self, x, sigma, label):
        none = torch.full_like(label, self.no_label)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([label, none]))
        with_label, without = both.chunk(2)
        return without + self.guidance * (with_label - without)


def guided(denoiser, guidance, checkpoint, path):
    """The denoiser with guidance, or itself for 1; ValueError if it can't do without labels."""
    if guidance == 1:
        return denoiser
    if not checkpoint["config"].get("label_dropout"):
        raise ValueError(f"--guidance {guidance:g}: {path} was trained without --label-dropout and "
                         "knows no images without label; leave it out")
    return Guided(denoiser, guidance, checkpoint["network"]["label_dim"])


# ---- options ------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of sample.py."""

    checkpoint: str = arg(None, "teacher.pt, generator.pt, generator.onnx, an EDM .pkl or, to "
                                "--evaluate, autoencoder.pt", positional=True)
    n: int = arg(None, "number of images, or of the rows of --trajectory and --interpolate "
                       f"(default: 10 per class; {STRIP_ROWS} and at most 10 rows; with "
                       f"--evaluate {EVALUATE_N})", at_least=1)
    labels: str = arg(None, "the classes to sample, by number or name, such as 3,3,7 (default: "
                            "all, evenly)")
    sampler: str = arg(None, "of a teacher: Heun's method or Euler's, at EDM's noise levels, or "
                             "DDIM or DDPM, at those of the teacher's schedule unless that is "
                             f"lognormal (default: {SAMPLER})", tuple(SAMPLERS))
    steps: int = arg(None, "steps of a teacher's sampler (default: "
                           f"{', '.join(f'{k} {v.steps}' for k, v in SAMPLERS.items())})",
                     at_least=1)
    eta: float = arg(None, "of ddim: the share of DDPM's noise (default: 0)", at_least=0, at_most=1)
    churn: float = arg(None, "of heun: EDM's S_churn, noise added in each step (default: 0)",
                       at_least=0)
    s_min: float = arg(None, "with --churn: the lowest noise level it is added at (default: 0)",
                       at_least=0)
    s_max: float = arg(None, "with --churn: the highest (default: any)", at_least=0)
    s_noise: float = arg(None, "with --churn: the standard deviation of it (default: 1)",
                         at_least=0)
    guidance: float = arg(None, "classifier-free guidance of a teacher (default: 1, none)",
                          at_least=0)
    data: str = arg(None, "what images an EDM checkpoint was trained on, such as cifar10, or where "
                          "a folder is now: for --evaluate, --beside, --map, names of classes")
    seed: int = arg(0, "seed of the noise", at_least=0, below=2**63)
    out: str = arg(None, "a .png (a grid), a .npz (images uint8 [N, H, W, C] and labels), or a "
                         "folder for a PNG file each (default: samples.png)")
    evaluate: bool = arg(False, "print Fréchet distance, precision and recall (also of an "
                                "autoencoder's reconstructions); writes no images")
    seeds: int = arg(3, "with --evaluate: the number of seeds, from --seed on", at_least=1)
    beside: str = arg(None, "a second checkpoint: the picture shows real images, its images, and "
                            "those of the first for the same noise")
    trajectory: bool = arg(False, "the picture shows a sample per row, step by step: the noisy "
                                  "image, scaled by 1 / (1 + sigma), and the estimate of x0")
    interpolate: bool = arg(False, "the picture shows a class per row, from one noise to another")
    map: bool = arg(False, "the picture shows real and generated images as dots in one plane of "
                           f"their features (--n of each, by default {MAP_N}): of UMAP where "
                           "umap-learn is installed, or else of PCA")
    data_dir: str = arg(None, "with --evaluate, --beside and --map: where the real images are "
                              "(default: where training found them)")
    batch: int = arg(BATCH, "images at a time, which changes the speed only", at_least=1)
    train_features: str = arg(None, "make a new feature network for this data, written to --out; "
                                    "figures measured with it compare with no others",
                              tuple(SHA256))

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint is None and not self.train_features:
            raise ValueError("no checkpoint given; runs/dmd2/generator.pt is dmd2.py's")
        shown = [flag(name) for name in ("evaluate", "beside", "trajectory", "interpolate", "map")
                 if getattr(self, name)]
        if len(shown) > 1:
            raise ValueError(f"{' and '.join(shown)}: are different things; give one of them")
        if self.evaluate and (self.labels or self.out):
            raise ValueError("--evaluate measures all classes of a checkpoint and writes no "
                             "images: leave out --labels and --out")
        if self.map and self.labels:
            raise ValueError("--map shows all classes: leave out --labels")
        if self.evaluate and self.n is not None and self.n < EVALUATE_AT_LEAST:
            raise ValueError(f"--n {self.n}: --evaluate needs at least {EVALUATE_AT_LEAST} images")
        kind = self.sampler or SAMPLER
        for name in SAMPLER_OPTIONS:
            if getattr(self, name) is not None and name not in SAMPLERS[kind].options:
                value = getattr(self, name)
                raise ValueError(f"{flag(name)} {value}: not an option of --sampler {kind}")
        if not self.churn and {self.s_min, self.s_max, self.s_noise} != {None}:
            raise ValueError("--s-min, --s-max and --s-noise say how --churn adds noise: give it")
        if None not in (self.s_min, self.s_max) and self.s_min > self.s_max:
            raise ValueError(f"--s-min {self.s_min}: is above --s-max {self.s_max}")
        if self.beside and (self.labels or self.n):
            raise ValueError("--beside shows 5 images of each class: leave out --labels and --n")
        kinds = (".png",) if shown else (".png", ".npz", "")
        kinds = (".pt",) if self.train_features else kinds
        if self.out and Path(self.out).suffix not in kinds:
            raise ValueError(f"--out {self.out}: must end in "
                             f"{' or '.join(kind or 'nothing, for a folder' for kind in kinds)}")


# ---- EDM's published checkpoints: pickles, read without executing anything from them ------------

class Call(NamedTuple):
    """What a pickle asks to be called. Here nothing is: it is kept as a description."""

    name: str    # of EDM_NAMES
    args: tuple
    state: dict  # what the result is to be updated with


# All that EDM's files name (torch_utils.persistence, version 6; NumPy 1 and 2; pickle 2 to 4).
EDM_NAMES = {
    "torch_utils.persistence._reconstruct_persistent_obj", "torch.nn.modules.container.ModuleDict",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes", "torch.FloatStorage",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype",
    "collections.OrderedDict", "dnnlib.util.EasyDict", "builtins.set", "__builtin__.set",
    "_codecs.encode"}
DICTIONARIES = {"collections.OrderedDict", "dnnlib.util.EasyDict"}


def read_pickle(file):
    """The contents of a pickle: dictionaries, lists, tuples, strings, numbers, bytes, and Calls.

    It does what the few opcodes of EDM's files say about such data, and nothing else: no function
    or method that a file names is looked up or called, and no object of another kind is made.
    Raises ValueError, LookupError, TypeError or AttributeError for any other file.
    """
    stack, marks, memo = [], [], {}

    def taken(count):  # from the stack: so many, or all above the last mark
        place = marks.pop() if count is None else len(stack) - count
        items, stack[place:] = stack[place:], []
        return items

    for count, (opcode, value, _) in enumerate(pickletools.genops(file)):
        if count > OPCODES:
            raise ValueError("is longer than any EDM checkpoint")
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP" | "BINPERSID":
                pass
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE" | "BINPUT" | "LONG_BINPUT":
                memo[len(memo) if value is None else value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(dict(NONE=None, NEWTRUE=True, NEWFALSE=False)[opcode.name])
            case ("BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE"
                  | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"):
                stack.append(value)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" | "TUPLE":
                counts = dict(EMPTY_TUPLE=0, TUPLE1=1, TUPLE2=2, TUPLE3=3)
                stack.append(tuple(taken(counts.get(opcode.name))))
            case "APPEND" | "APPENDS" | "ADDITEMS":
                items = taken(1 if opcode.name == "APPEND" else None)
                list.extend(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = taken(2 if opcode.name == "SETITEM" else None)
                if not all(type(key) is str and len(key) < 100 for key in items[::2]):
                    raise ValueError("has a dictionary of other keys than names")
                dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "GLOBAL" | "STACK_GLOBAL":
                name = ".".join(value.split(" ") if opcode.name == "GLOBAL" else taken(2))
                if name not in EDM_NAMES:
                    raise ValueError(f"names {name!r:.200}, which no EDM checkpoint does; refused")
                stack.append(Call(name, (), {}))
            case "REDUCE" | "NEWOBJ":
                call, args = taken(2)
                if type(call) is not Call or type(args) is not tuple:
                    raise TypeError("calls no function, or with something else than arguments")
                name = call.name
                empty = name in DICTIONARIES and args == ()
                stack.append({} if empty else Call(name, args, {}))
            case "BUILD":
                state = stack.pop()
                stack[-1].state.update(state=state)
            case name:
                raise ValueError(f"has the opcode {name}, which no EDM checkpoint does; refused")
    return stack.pop()


def brief(value):
    """A value for a message; of what a file may have made without end, its type."""
    return reprlib.repr(value) if type(value) in (str, int, float, bool) else type(value).__name__


def state_of(module):
    """Class name (of EDM's own) and state of a module."""
    if module.name == "torch.nn.modules.container.ModuleDict":
        return None, module.state["state"]
    if module.name != "torch_utils.persistence._reconstruct_persistent_obj":
        raise ValueError(f"has a {module.name} for a module")
    meta, = module.args
    return meta["class_name"], meta["state"]


def tensor_of(call):
    """The float32 tensor of a Call to make one; ValueError if it would reach out of its storage."""
    while call.name.startswith("torch._utils._rebuild_parameter"):
        call = call.args[0]
    (kind, (content,), _), offset, size, stride, *_ = call.args
    if (call.name, kind) != ("torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"):
        raise ValueError(f"has a {call.name} of another kind for a tensor")
    if type(content) is Call and content.name == "_codecs.encode":
        content = content.args[0].encode("latin1")  # pickle 2 has no bytes
    file = io.BytesIO(content)
    *_, (_, dtype, _, _, count, _), _ = (read_pickle(file) for _ in range(5))
    if dtype.name != "torch.FloatStorage" or struct.unpack("<q", file.read(8)) != (count,):
        raise ValueError("has a storage of another type than float32")
    if not all(type(n) is int and 0 <= n < 2**31 for n in (offset, *size, *stride)):
        raise ValueError("has a tensor with no possible shape")
    storage = np.frombuffer(content, "<f4", count, file.tell())
    if len(size) > 4 or not 0 < math.prod(size) <= count:
        raise ValueError("has a tensor that does not fit its storage")
    return torch.as_strided(torch.from_numpy(storage.copy()), size, stride, offset)


def tensors_of(module, prefix=""):
    """Yield name and tensor of a module's parameters and buffers and those of all within it."""
    _, state = state_of(module)
    for part in ("_parameters", "_buffers", "_modules"):
        while state[part]:  # taken out, so that none is met twice
            name, value = state[part].popitem()
            if value is not None and part == "_modules":
                yield from tensors_of(value, f"{prefix}{name}.")
            elif value is not None:
                yield prefix + name, tensor_of(value)


# What both of EDM's networks are made of here, and what each is by default.
EDM_FIXED = dict(embedding_type="positional", encoder_type="standard", decoder_type="standard",
                 resample_filter=[1, 1], channel_mult_noise=1, channel_mult_emb=4,
                 sigma_data=SIGMA_DATA)
EDM_DEFAULTS = {
    "SongUNet": dict(label_dim=0, model_channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4,
                     attn_resolutions=[16]),
    "DhariwalUNet": dict(label_dim=0, model_channels=192, channel_mult=[1, 2, 3, 4], num_blocks=3,
                         attn_resolutions=[32, 16, 8]),
}


def load_edm(path):
    """A checkpoint of NVlabs/edm as the dictionary that load() returns, executing nothing from it.

    Only the EMA network's constructor arguments and float32 weights are taken out of the pickle;
    the program text that it carries too is passed over. Raises ValueError if the file is missing,
    of another kind or damaged.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such checkpoint file; NVlabs/edm publishes them")
    try:
        with open(path, "rb") as file:
            precond, state = state_of(read_pickle(file)["ema"])
        net = state["_modules"]["model"]
        model_type, given = state_of(net)[0], state_of(net)[1]["_init_kwargs"]
        if precond != "EDMPrecond" or type(model_type) is not str \
                or model_type not in EDM_DEFAULTS:
            names = " of ".join(brief(name) for name in (precond, model_type))
            raise ValueError(f"holds {names}; only EDMPrecond of SongUNet or DhariwalUNet is read")
        found = dict(given, sigma_data=state["sigma_data"])
        for name, fixed in EDM_FIXED.items():
            if found.get(name, fixed) != fixed:
                raise ValueError(f"its {name} is {brief(found[name])}; only {fixed} is read")
        network = {name: given.get(name, default)
                   for name, default in EDM_DEFAULTS[model_type].items()}
        network.update(model_type=model_type, img_resolution=given["img_resolution"],
                       img_channels=given["in_channels"])
        weights, budget = {}, Path(path).stat().st_size
        for name, tensor in tensors_of(net):
            budget -= tensor.untyped_storage().nbytes()
            if budget < 0 or len(name) > 1000:
                raise ValueError("its weights share memory, or have names without end")
            if not name.endswith("resample_filter"):
                weights[f"net.{name}"] = tensor
        weights.pop("net.map_augment.weight", None)  # of EDM's augmentations; samples have none
        side, label_dim = network["img_resolution"], network["label_dim"]
        classes = tuple(map(str, range(min(label_dim, 2**16)))) or ANY_CLASS
        checkpoint = dict(kind="teacher", step=1, config={}, network=network, prediction="edm",
                          schedule="lognormal", model=weights, autoencoder=None,
                          data=dict(name=None, size=side, classes=classes, flip=False,
                                    shape=(network["img_channels"], side, side)))
        if not fits(checkpoint):
            raise ValueError("its network's arguments do not fit each other")
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, RuntimeError,
            OverflowError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: not a checkpoint of NVlabs/edm that can be read, or damaged: "
                         f"{reason:.400}") from error
    return checkpoint


# ---- any checkpoint as one function -------------------------------------------------------------

class Sampler(NamedTuple):
    """What a checkpoint of any kind becomes: a function of unit noise and label, and its facts."""

    x0: Callable      # (noises, label [B] int64) -> [B, *shape]; noises: an iterator of standard
                      # normal [B, *shape], fresh for each step
    decode: Callable  # x0 -> images [B, C, H, W] in about [-1, 1]
    shape: tuple      # of noise and x0: of an image, or of its latents
    name: str         # "teacher, 18 Heun steps"
    evaluations: int  # of the network per image
    data: dict        # name, size, shape, classes; and data_dir and flip, which ONNX files lack
    device: torch.device
    denoiser: nn.Module | None = None  # what x0 calls; none of an ONNX file

    def images(self, noises, label):
        return self.decode(self.x0(noises, label))


def open_checkpoint(path, data=None, data_dir=None):
    """load() or, of a .pkl, load_edm(): a checkpoint, with `data` as the images it was trained on.

    Raises ValueError if either does, if it holds an autoencoder, or `data` can't be these.
    """
    checkpoint = load_edm(path) if Path(path).suffix == ".pkl" else load(path)
    if checkpoint["kind"] == "autoencoder":
        raise ValueError(f"{path}: holds an autoencoder; a teacher of its latents is trained by "
                         f"python teacher.py --latent {path}, and it is measured by python "
                         f"sample.py {path} --evaluate")
    facts = checkpoint["data"]
    if data is None or data == facts["name"]:
        return checkpoint
    if facts["name"] is not None:
        at_new_place(facts, data, path)
    where = str(Path(data_dir or DATA_DIR).resolve())
    found = load_data(data, "train", where, facts["size"])
    classes = checkpoint["network"]["label_dim"]
    if facts["name"] is not None:
        check_same(dict(facts, name=data), found)
    if found.shape != facts["shape"] or classes not in (0, len(found.classes)):
        raise ValueError(f"--data {data}: has {len(found.classes)} classes of images "
                         f"{found.shape}; {path} has {classes} of {facts['shape']}")
    named = found.classes if classes else ANY_CLASS
    return dict(checkpoint, data=dict(facts, name=data, data_dir=where, classes=named))


def at_new_place(data, name, path):
    """A file's data, found under another name if one is given; ValueError if it can't be these."""
    if name is None:
        return data
    if name != data["name"] and not may_be_moved(name, data["name"]):
        raise ValueError(f"--data {name}: {path} was trained on {data['name']}; leave it out")
    return dict(data, name=name)


def load_sampler(path, device=torch.device("cpu"), cfg=None):
    """Make a Sampler of a file of any kind, of a teacher as cfg, a Config, says.

    Raises ValueError if it is of none, or cfg has options that are only for teachers.
    """
    cfg = cfg or Config(checkpoint=path)
    how = {name: value for name in ("sampler", "steps", "guidance", *SAMPLER_OPTIONS)
           if (value := getattr(cfg, name)) is not None}
    if Path(path).suffix == ".onnx":
        sampler = onnx_sampler(path, device)
        sampler = sampler._replace(data=at_new_place(sampler.data, cfg.data, path))
    else:
        checkpoint = open_checkpoint(path, cfg.data, cfg.data_dir)
        denoiser = build(checkpoint, device)
        if checkpoint["kind"] == "teacher":
            denoiser = guided(denoiser, how.pop("guidance", 1), checkpoint, path)
            return teacher_sampler(denoiser, checkpoint, device, **how)
        sampler = generator_sampler(denoiser, checkpoint, device)
    if how and not cfg.beside:  # where they are for the other, if that is a teacher
        name, value = how.popitem()
        raise ValueError(f"{flag(name)} {value}: is for teachers; {path} is a generator of "
                         f"{steps_of(sampler.evaluations)}")
    return sampler


def name_of(data, path):
    """The name of a checkpoint's data; ValueError if it doesn't tell and --data doesn't either."""
    if data["name"] is None:
        raise ValueError(f"--data is missing: {path} does not tell what images it was trained on; "
                         "give it, such as --data cifar10")
    if data["name"] not in KNOWN_DATA and not Path(data["name"]).is_dir():
        raise ValueError(f"{path}: was trained on {data['name']}: no such folder; --data tells "
                         "where it is")
    return data["name"]


def teacher_sampler(denoiser, checkpoint, device, sampler=None, steps=None, **options):
    """A sampler of a teacher, which may be Guided; options are those of the kind of sampler."""
    kind = SAMPLERS[sampler or SAMPLER]
    steps = steps or kind.steps
    name = f"teacher, {steps} {kind.title} steps"
    evaluations = 2 * steps - 1 if kind.function is heun else steps
    name += "".join(f", {option} {value:g}" for option, value in options.items())
    if isinstance(denoiser, Guided):
        name, evaluations = f"{name}, guidance {denoiser.guidance:g}", 2 * evaluations
    sigmas = sampling_sigmas(steps, checkpoint["schedule"], kind.own)

    def x0(noises, label):
        x = sigmas[0] * next(noises)
        return kind.function(denoiser, x, sigmas, label, noises, **options)
    return sampler_of(x0, name, evaluations, denoiser, checkpoint, device)


def generator_sampler(generator, checkpoint, device):
    """The few-step sampler of a generator."""
    sigmas = checkpoint["sigmas"]

    @torch.no_grad()
    def x0(noises, label):
        x = sigmas[0] * next(noises)
        return few_step(generator, x, sigmas, label, itertools.islice(noises, len(sigmas) - 1))
    steps = len(sigmas)
    return sampler_of(x0, f"generator, {steps_of(steps)}", steps, generator, checkpoint, device)


def sampler_of(x0, name, evaluations, denoiser, checkpoint, device):
    """A Sampler whose x0 are what a checkpoint's are."""
    codec = codec_of(checkpoint["autoencoder"], device)
    return Sampler(x0, codec.decode, shape_of(checkpoint["network"]), name, evaluations,
                   checkpoint["data"], device, denoiser)


def steps_of(count):
    """A number of steps in words."""
    return "1 step" if count == 1 else f"{count} steps"


def onnx_sampler(path, device):
    """The sampler of a file of export.py, run by onnxruntime."""
    session, facts = onnx_session(path, device.type)
    steps = facts["steps"]

    def images(noises, label):
        feed = dict(noise=exported_noise(noises, steps).cpu().numpy(), label=label.cpu().numpy())
        try:
            image = torch.from_numpy(session.run(["image"], feed)[0])
        except Exception as error:  # onnxruntime's exceptions have no other base in common
            raise ValueError(f"{path}: onnxruntime can't run it: {error}") from error
        image = to_float(image.permute(0, 3, 1, 2)) if image.dtype == torch.uint8 else image
        if image.shape != (len(label), *facts["data"]["shape"]):
            raise ValueError(f"{path}: gives images of another shape than it tells of")
        return image
    shape = tuple(session.get_inputs()[0].shape[-3:])
    return Sampler(images, Pixels().decode, shape, f"ONNX generator, {steps_of(steps)}", steps,
                   facts["data"], device)


def onnx_session(path, device, provider_options=None, batch=None):
    """An onnxruntime session of a file of export.py, on "cpu" or "cuda", and its metadata's facts.

    It has as many threads as PyTorch. batch: the only size of its batches, if it is to be prepared
    for one.

    Raises ValueError if the file is missing or foreign, or onnxruntime did not load the provider.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; export.py writes it")
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    providers = dict(cpu="CPUExecutionProvider", cuda="CUDAExecutionProvider")
    if device not in providers:
        raise ValueError(f"--device {device}: onnxruntime runs files of export.py on cpu and cuda")
    provider = providers[device]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.intra_op_num_threads = torch.get_num_threads()
    if batch:
        options.add_free_dimension_override_by_name("batch", batch)
    content = Path(path).read_bytes()  # and not its name, which may not be UTF-8
    try:
        if not is_straight(onnx.load_from_string(content)):
            raise ValueError("it has loops, branches, or weights in other files")
        session = onnxruntime.InferenceSession(content, options, [
            (provider, provider_options or {})], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no other base in common
        raise ValueError(f"{path}: onnxruntime can't read it: {error}") from error
    loaded = session.get_providers()  # get_available_providers() would tell what was compiled in
    if provider not in loaded:
        raise ValueError(f"--device {device}: onnxruntime did not load {provider}, only {loaded}")
    try:
        facts = json.loads(session.get_modelmeta().custom_metadata_map["dmd2"])
        ours = fits_graph(facts, session)
    except (LookupError, ValueError, AttributeError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{path}: an ONNX file, but not one of export.py")
    return session, facts


def is_straight(model):
    """Whether an ONNX model has neither loops nor branches, nor weights in other files."""
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    tensors = [*model.graph.initializer, *(attribute.t for attribute in attributes)]
    return not (model.functions or model.graph.sparse_initializer
                or any(part.HasField("g") or part.graphs or part.HasField("sparse_tensor")
                       or part.tensors or part.sparse_tensors for part in attributes)
                or any(tensor.data_location or tensor.external_data for tensor in tensors))


def fits_graph(facts, session):
    """Whether the metadata of an exported file say what its graph takes and gives."""
    data, steps = facts["data"], facts["steps"]
    (noise, label), (image,) = session.get_inputs(), session.get_outputs()
    order = (1, 2, 3) if image.type == "tensor(float)" else (3, 1, 2)
    return (type(steps) is int and steps == len(facts["sigmas"]) > 0 and "size" in data
            and type(data["classes"]) is list
            and [image.shape[i] for i in order] == data["shape"]
            and (noise.name, noise.type) == ("noise", "tensor(float)")
            and (label.name, label.type) == ("label", "tensor(int64)")
            and image.name == "image" and image.type in ("tensor(float)", "tensor(uint8)")
            and len(noise.shape) == 4 + (steps > 1) and len(label.shape) == 1
            and all(type(size) is int for size in (*data["shape"], *noise.shape[-3:]))
            and len(data["classes"]) > 0 and type(data["name"]) is str
            and all(type(name) is str for name in data["classes"]))


def generate(sampler, label, seed, batch=BATCH):
    """Images uint8 [N, C, H, W] of label [N]; image i is made of seed, i and label[i] only.

    Batches are filled up to multiples of 16: at odd sizes the last bits come out differently, for
    kernels then add in another order. Several ranks share the work, and each gets all images.
    """
    batch, count = batch + -batch % 16, len(label) + -len(label) % 16
    shape, device = sampler.shape, sampler.device
    images = torch.zeros(count, *sampler.data["shape"], dtype=torch.uint8, device=device)
    for start in progress(range(rank() * batch, count, ranks() * batch), sampler.name):
        part = F.pad(label, (0, count - len(label)))[start:start + batch]
        noises = (noise.to(device) for noise in fresh_noise(len(part), shape, seed, start))
        images[start:start + batch] = uint8_images(sampler, noises, part.to(device))
    if ranks() > 1:
        dist.all_reduce(images)
    return images[:len(label)].cpu()


def uint8_images(sampler, noises, label):
    """A sampler's images as uint8; FloatingPointError if they are not finite."""
    image = sampler.images(noises, label)
    if not image.isfinite().all():
        raise FloatingPointError(f"images are not finite, of the {sampler.name}")
    return to_uint8(image)


# ---- features: a small classifier, its weights part of the protocol -----------------------------

class FeatureNet(nn.Module):
    """Classifier of images of any size; what enters its last layer are the features."""

    def __init__(self, channels, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            convolution(channels, 32, stride=1), convolution(32, 64, 2), convolution(64, 64, 2),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 64, DIMENSIONS), nn.ReLU())
        self.head = nn.Linear(DIMENSIONS, num_classes)

    def forward(self, x):
        """x [B, C, H, W] in [-1, 1] -> features [B, DIMENSIONS], logits [B, num_classes]"""
        features = self.body(x)
        return features, self.head(features)


def convolution(c_in, c_out, stride):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, padding=1), nn.BatchNorm2d(c_out),
                         nn.ReLU())


def train_features(data, steps=1500, batch=128, device="cpu"):
    """Train the feature network on the training images, each batch shifted by a few pixels."""
    rng = seeded(FEATURES)
    torch.manual_seed(0)
    images, labels = data.images, data.labels
    net = FeatureNet(images.shape[1], len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    side, reach = images.shape[-1], max(1, images.shape[-1] // 9)
    for _ in progress(range(steps), "feature network"):
        index = torch.randint(len(images), (batch,), generator=rng)
        dy, dx = torch.randint(-reach, reach + 1, (2,), generator=rng).tolist()
        x = F.pad(to_float(images[index]), (reach,) * 4, mode="replicate")
        x = x[:, :, reach + dy:reach + dy + side, reach + dx:reach + dx + side]
        loss = F.cross_entropy(net(x.to(device))[1], labels[index].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def load_features(data, name, device="cpu"):
    """The feature network for a data set, and the head of its SHA-256, to tell figures apart by.

    digits and mnist have theirs in assets/; for other data it is trained once, which takes a
    minute or so, and kept in ~/.cache/dmd2. Raises ValueError if the file in assets/ was changed.
    """
    path = ASSETS / f"features_{name}.pt"
    if name not in SHA256:
        content = hashlib.sha256(data.images.numpy())
        content.update(data.labels.numpy())
        path = Path.home() / ".cache" / "dmd2" / f"features_{content.hexdigest()[:16]}.pt"
        with rank_0_first():
            if not path.exists():
                tell(f"training a feature network for {name}; figures compare only with others "
                     "that tell the same hash", error=True)
                write_features(data, path, device)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256.get(name, digest):
        raise ValueError(f"{path}: SHA-256 {digest[:12]} is not {SHA256[name][:12]}; restore it")
    net = FeatureNet(data.images.shape[1], len(data.classes))
    try:
        net.load_state_dict(read(path, lambda weights: not not_finite(weights)))
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged; delete it, and it is made anew") from error
    return net.to(device).eval().requires_grad_(False), digest[:12]


def write_features(data, path, device="cpu"):
    """Train a feature network and keep it at path."""
    net = train_features(data, device=device)
    save(net.cpu().state_dict(), path)
    print(f"wrote {path}, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}", file=sys.stderr)


# ---- quality ------------------------------------------------------------------------------------

class Reference(NamedTuple):
    """What images are measured against."""

    net: FeatureNet
    features: torch.Tensor  # [N, DIMENSIONS] of the real training images
    labels: torch.Tensor    # [N] int64, in the same order
    floor: dict             # distance and accuracy of the n held-out real images
    protocol: str


def load_images(facts, split, data_dir=None, stream=None):
    """load_data() of the images that a checkpoint tells of; ValueError if they are others now."""
    where = data_dir or facts.get("data_dir", DATA_DIR)  # an exported file doesn't tell
    data = load_data(facts["name"], split, where, facts["size"], stream)
    check_same(facts, data)
    return data


def load_reference(facts, data_dir=None, device="cpu", stream=None):
    """Read a checkpoint's data and make the Reference to evaluate against, with held-out images."""
    name = facts["name"]
    data, held_out = (load_images(facts, split, data_dir, stream).in_memory()
                      for split in ("train", "test"))
    if len(held_out.images) <= NEIGHBOURS:
        raise ValueError(f"{name}: {len(held_out.images)} held-out images are too few to evaluate "
                         f"against; at least {NEIGHBOURS + 1} are needed, or for dmd2.py "
                         "--evaluate-every 0")
    net, digest = load_features(data, name, device)
    order = torch.randperm(len(data.images), generator=seeded(SUBSET))  # a prefix is a fair sample
    features = torch.cat([extract(net, data.images[part])[0] for part in order.split(1000)])
    protocol = f"reference {len(features)} training images of {name}, feature network {digest}"
    reference = Reference(net, features, data.labels[order], {}, protocol)
    floor = evaluate(held_out.images, held_out.labels, reference)
    del floor["precision"], floor["recall"]  # of so few images they compare with no others
    return reference._replace(floor=dict(floor, n=len(held_out.images)))


@torch.no_grad()
def extract(net, images, batch=1000):
    """Features [N, DIMENSIONS] and predicted classes [N], on the CPU, of uint8 [N, C, H, W]."""
    device = next(net.parameters()).device
    outputs = [net(to_float(part.to(device))) for part in images.split(batch)]
    features, logits = (torch.cat(parts).cpu() for parts in zip(*outputs))
    return features, logits.argmax(1)


def evaluate(images, label, reference):
    """Quality of images uint8 [N, C, H, W] that were asked to be of the classes label [N].

    returns frechet_distance to the training images, accuracy (share classified as label), precision
    and recall (of equally many real and given images, at most 10000)
    """
    features, predicted = extract(reference.net, images)
    count = min(len(features), len(reference.features), 10000)
    precision, recall = precision_recall(reference.features[:count], features[:count])
    return dict(frechet_distance=frechet_distance(features, reference.features),
                accuracy=(predicted == label.cpu()).double().mean().item(),
                precision=precision, recall=recall)


def frechet_distance(a, b):
    """Fréchet distance of Gaussians fitted to features a [N, D] and b [M, D] (Heusel et al. 2017).

        |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    in float64; the trace of the root is that of the symmetric C_a^(1/2) C_b C_a^(1/2). Not an FID,
    for the features are not Inception's.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root_trace = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * root_trace).item()


def precision_recall(real, fake, k=NEIGHBOURS):
    """Share of fake features inside the real ones' manifold, and of real inside the fake ones'.

    The manifold of features [N, D] is the union of balls, each reaching to the k-th nearest
    neighbour of its centre (Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric").
    """
    def share_inside(points, centres):
        radii = torch.cat([torch.cdist(part, centres).kthvalue(k + 1).values  # 1: itself
                           for part in centres.split(1000)])
        inside = [(torch.cdist(part, centres) <= radii).any(1) for part in points.split(1000)]
        return torch.cat(inside).double().mean().item()
    return share_inside(fake, real), share_inside(real, fake)


def measure(sampler, reference, n, seed, batch=BATCH):
    """evaluate() n images of a sampler, of classes in the proportions of the training images."""
    label = reference.labels.repeat(-(-n // len(reference.labels)))[:n]
    return evaluate(generate(sampler, label, seed, batch), label, reference)


def report(runs, reference, of_what):
    """Figures of evaluate(), of several runs: mean, spread, floor, ratio and protocol, as one dict.

    of_what  what was measured, in words
    """
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    mean = {name: statistics.mean(values) for name, values in columns.items()}
    spread = {name: statistics.stdev(values) if len(values) > 1 else None
              for name, values in columns.items()}
    return dict(mean=mean, spread=spread, floor=reference.floor,
                protocol=f"{of_what}; {reference.protocol}",
                ratio_to_floor=(mean["frechet_distance"]
                                / max(reference.floor["frechet_distance"], 1e-12)))


def summary(figures):
    """Figures of evaluate() in a line."""
    return ", ".join(f"{title} {figures[name]:.3f}" for name, title in TITLES.items())


def table(result):
    """The text that shows a report() to a person."""
    lines = [f"{'':20}{'samples':>9}{'spread':>9}{'floor':>9}   "
             f"(floor: the {result['floor']['n']} held-out real images)"]
    for name, title in TITLES.items():
        cells = [column.get(name) for column in (result["mean"], result["spread"], result["floor"])]
        lines.append(f"{title:20}" + "".join("        -" if cell is None else f"{cell:9.4f}"
                                             for cell in cells))
    lines.append(f"{'ratio to the floor':20}{result['ratio_to_floor']:9.2f}")
    if "psnr" in result:
        lines.append(f"{'PSNR, dB':20}{result['psnr']:9.2f}")
    return "\n".join(lines)


# ---- output -------------------------------------------------------------------------------------

def read_labels(text, classes):
    """Class numbers of "3,3,7", or of class names; ValueError naming the one that is neither."""
    numbers = []
    for word in map(str.strip, text.split(",")):
        number = classes.index(word) if word in classes else int(word) if word.isdecimal() else -1
        if not 0 <= number < len(classes):
            raise ValueError(f"--labels {text}: {word!r} is no class; there are 0 to "
                             f"{len(classes) - 1}, or by name {', '.join(classes[:10])}")
        numbers.append(number)
    return torch.tensor(numbers)


def padded(images, count):
    """Images uint8 [N, C, H, W] and white ones, count in all."""
    return F.pad(images, (0, 0) * 3 + (0, count - len(images)), value=255)


@on_rank_0
def write_images(images, label, classes, out):
    """Write images uint8 [N, C, H, W] as a grid (.png), arrays (.npz), or PNG files in a folder."""
    out = Path(out)
    if out.suffix == ".png":
        groups = [(classes[c], images[label == c]) for c in label.unique().tolist()]
        width = max(len(group) for _, group in groups)
        rows = torch.stack([padded(group, width) for _, group in groups])
        save_grid(rows, [name for name, _ in groups], out)
        return
    pixels = images.permute(0, 2, 3, 1).numpy()
    if out.suffix == ".npz":
        with replacing(out) as path:
            np.savez_compressed(path, images=pixels, labels=label.numpy())
        return
    for i, (image, c) in enumerate(zip(pixels, label.tolist())):
        with replacing(out / f"{i:05d}_{c}.png", sync=False) as path:
            Image.fromarray(image.squeeze()).save(path)


# ---- pictures -----------------------------------------------------------------------------------

def save_beside(blocks, names, path, columns=5):
    """Write blocks, each a title and images uint8 [rows * columns, C, H, W], side by side."""
    grids = [images.unflatten(0, (len(names), columns)) for _, images in blocks]
    gap = torch.full_like(grids[0][:, :1], 255)
    rows = torch.cat([part for grid in grids for part in (grid, gap)][:-1], dim=1)
    titles = [""] * rows.shape[1]
    for i, (title, _) in enumerate(blocks):
        titles[i * (columns + 1) + columns // 2] = title
    save_grid(rows, names, path, titles)


def compare(cfg, sampler, out):
    """The picture real | second checkpoint | first checkpoint, a row per class (the first 10)."""
    other, data = load_sampler(cfg.beside, sampler.device, cfg), sampler.data
    name_of(other.data, cfg.beside)
    if "teacher" not in sampler.name + other.name:  # this raises if options of teachers were given
        load_sampler(cfg.checkpoint, sampler.device, dataclasses.replace(cfg, beside=None))
    if any(tuple(other.data[key]) != tuple(data[key]) for key in ("shape", "classes")):
        raise ValueError(f"--beside {cfg.beside}: has images of other shape or classes than "
                         f"{cfg.checkpoint}; give two checkpoints of the same data")
    name_of(data, cfg.checkpoint)
    real = load_images(data, "train", cfg.data_dir)
    classes, columns = real.classes[:10], 5
    label = torch.arange(len(classes)).repeat_interleave(columns)
    shown = [real.images[(real.labels == c).nonzero()[:columns, 0]] for c in range(len(classes))]
    shown = torch.cat([padded(images, columns) for images in shown])
    blocks = [(s.name, generate(s, label, cfg.seed, cfg.batch)) for s in (other, sampler)]
    save_beside([("real", shown), *blocks], classes, out, columns)


def save_trajectory(sampler, label, seed, out):
    """Write what a sampler's denoiser was given and what it made of it, as columns of noise levels.

    They are STRIP_COLUMNS at most, evenly spread over its calls, the first and last among them.
    """
    if sampler.denoiser is None:
        raise ValueError("--trajectory: an ONNX file tells its images only; give the generator.pt")
    calls = []
    hook = sampler.denoiser.register_forward_hook(
        lambda _, given, x0_hat: calls.append((*given[:2], x0_hat)))
    noises = (noise.to(sampler.device) for noise in fresh_noise(len(label), sampler.shape, seed))
    sampler.x0(noises, label.to(sampler.device))
    hook.remove()
    columns = min(len(calls), STRIP_COLUMNS)
    shown = [calls[round(i)] for i in np.linspace(0, len(calls) - 1, columns)]
    rows = [[sampler.decode((x / (1 + sigma.view(-1, 1, 1, 1))).float()),
             sampler.decode(x0_hat.float())] for x, sigma, x0_hat in shown]
    images = torch.stack([torch.stack(pair) for pair in rows]).permute(2, 1, 0, 3, 4, 5)
    names = [name for c in label.tolist() for name in (sampler.data["classes"][c], "estimate")]
    titles = [f"{sigma[0].item():.2g}" for _, sigma, _ in shown]
    save_grid(to_uint8(images.flatten(0, 1)), names, out, titles)


def slerp(a, b, t):
    """Noise between noises a and b [*shape], on the arc between them (White 2016), t in [0, 1].

    On the straight line it would have less variance than noise has.
    """
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), 0).clamp(-1, 1))
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def save_interpolation(sampler, label, seed, out):
    """Write a row per label: images of the noises between two, in STRIP_COLUMNS steps."""
    steps, rows = torch.linspace(0, 1, STRIP_COLUMNS).tolist(), []
    for i, c in enumerate(label.tolist()):
        ends = zip(fresh_noise(1, sampler.shape, seed, i),
                   fresh_noise(1, sampler.shape, seed, len(label) + i))
        noises = (torch.cat([slerp(a, b, t) for t in steps]).to(sampler.device) for a, b in ends)
        rows.append(uint8_images(sampler, noises, torch.full((len(steps),), c).to(sampler.device)))
    names = [sampler.data["classes"][c] for c in label.tolist()]
    save_grid(torch.stack(rows), names, out)


def save_map(cfg, sampler, out):
    """Write real and generated images as dots in a plane of their features, a colour per class."""
    name_of(sampler.data, cfg.checkpoint)
    reference = load_reference(sampler.data, cfg.data_dir, sampler.device)
    n = min(cfg.n or MAP_N, len(reference.labels))
    if n < (cfg.n or 0):
        tell(f"--n {cfg.n}: shows {n}, for there are no more real images", error=True)
    label = reference.labels[:n].clamp(max=len(sampler.data["classes"]) - 1)  # 0 if unconditional
    features, _ = extract(reference.net, generate(sampler, label, cfg.seed, cfg.batch))
    save_plane({"real": (reference.features[:n], label), sampler.name: (features, label)},
               sampler.data["classes"], out, umap=True)


# ---- main ---------------------------------------------------------------------------------------

def measured(cfg, device):
    """The report() of --evaluate: of samples at several seeds or, of an autoencoder, of what it
    makes of the held-out images, with their PSNR."""
    path = cfg.checkpoint
    other = Path(path).suffix in (".onnx", ".pkl")
    if not other and (checkpoint := load(path))["kind"] == "autoencoder":
        for name in ("n", "guidance", "sampler", "steps", *SAMPLER_OPTIONS):
            if getattr(cfg, name) is not None:
                raise ValueError(f"{flag(name)} {getattr(cfg, name)}: {path} holds an autoencoder, "
                                 "of which all held-out images are evaluated; leave it out")
        facts = at_new_place(checkpoint["data"], cfg.data, path)
        name_of(facts, path)
        reference = load_reference(facts, cfg.data_dir, device)
        held_out = load_images(facts, "test", cfg.data_dir).in_memory()
        codec = build(checkpoint, device)
        decoded = to_uint8(torch.cat([codec.reconstruct(to_float(part.to(device))).cpu()
                                      for part in held_out.images.split(cfg.batch)]))
        figures = evaluate(decoded, held_out.labels, reference)
        result = report([figures], reference, f"{len(decoded)} reconstructions of held-out images")
        return dict(result, psnr=psnr(to_float(decoded), to_float(held_out.images)))
    sampler = load_sampler(path, device, cfg)
    name_of(sampler.data, path)
    reference = load_reference(sampler.data, cfg.data_dir, device)
    n, seeds = cfg.n or EVALUATE_N, range(cfg.seed, cfg.seed + cfg.seeds)
    runs = [measure(sampler, reference, n, seed, cfg.batch) for seed in seeds]
    return report(runs, reference, f"{n} samples, {sampler.name}, EMA weights, "
                  f"{sampler.evaluations} function evaluation(s), seeds "
                  f"{', '.join(map(str, seeds))}")


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    if cfg.train_features:
        path = Path(cfg.out or ASSETS / f"features_{cfg.train_features}.pt")
        write_features(load_data(cfg.train_features, "train", cfg.data_dir or DATA_DIR), path)
        return
    on_cpu = cfg.device == "auto" and Path(cfg.checkpoint).suffix == ".onnx"
    device = pick_device("cpu" if on_cpu else cfg.device)
    if cfg.evaluate:
        result = measured(cfg, device)
        tell(f"{table(result)}\n{json.dumps(result)}")
        return
    sampler, out = load_sampler(cfg.checkpoint, device, cfg), cfg.out or "samples.png"
    classes = tuple(sampler.data["classes"])
    asked = read_labels(cfg.labels, classes) if cfg.labels else torch.arange(len(classes))
    rows = (STRIP_ROWS if cfg.trajectory else min(10, len(classes)) if cfg.interpolate else
            10 * len(classes))
    n = cfg.n or (len(asked) if cfg.labels else rows)
    label = asked[torch.arange(n) % len(asked)]
    if cfg.beside:
        compare(cfg, sampler, out)
    elif cfg.trajectory:
        save_trajectory(sampler, label, cfg.seed, out)
    elif cfg.interpolate:
        save_interpolation(sampler, label, cfg.seed, out)
    elif cfg.map:
        save_map(cfg, sampler, out)
    else:
        write_images(generate(sampler, label, cfg.seed, cfg.batch), label, classes, out)
    tell(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
