"""What the scripts promise. `pytest test_all.py`, by pytest-xdist on two cores sooner: .ci/run.

Wherever it can, a closed-form denoiser stands in for the network: that of data N(mean, std^2).
`pytest test_all.py -m gpu` runs what needs CUDA, `-m reach` what installs an old onnxruntime.
"""

import copy
import functools
import hashlib
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import dmd2
import export
import sample
import teacher

torch.set_num_threads(1)  # of networks so small
ROOT = Path(teacher.__file__).resolve().parent
SHARED = ROOT.parent / "shared"
README = (ROOT / "README.md").read_text()
TINY = "--device cpu --steps 4 --batch 16 --width 8 --sample-every 0 --log-every 1".split()
TINY_DMD = TINY[:6] + ("--evaluate-n 100 --sample-every 0 --log-every 1 --regression-steps 0 "
                       "--regression-weight 0 --fake-steps 2 --gan-weight 0.001").split()

with warnings.catch_warnings(action="ignore"):  # that nobody registered the mark
    gpu, reach, group = pytest.mark.gpu, pytest.mark.reach, pytest.mark.xdist_group


def vectors(name):
    path = SHARED / "vectors" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"needs {path.name}, numbers of the reference implementations")
    return {key: torch.from_numpy(value) for key, value in np.load(path).items()
            if value.dtype.kind in "fib"}


class Gaussian(nn.Module):
    """The exact denoiser of data N(mean, std^2) per pixel, with a network's interface.

    With K means and stds, of images of which each is of one of K such kinds, equally often.
    """

    prediction = "edm"

    def __init__(self, mean, std):
        super().__init__()
        self.mean = nn.Parameter(torch.as_tensor(mean).float().reshape(1, -1, 1, 1, 1))
        self.log_std = nn.Parameter(torch.as_tensor(std).float().log().reshape(1, -1, 1, 1, 1))

    def forward(self, x, sigma, label):
        x, noise_var, var = x[:, None], sigma.view(-1, 1, 1, 1, 1) ** 2, torch.exp(2 * self.log_std)
        both = noise_var + var
        log_likelihood = -0.5 * ((x - self.mean) ** 2 / both + both.log()).sum((2, 3, 4))
        kind = log_likelihood.softmax(1)[:, :, None, None, None]
        return (kind * (self.mean * noise_var + x * var) / both).sum(1)


def stub(x0_hat, prediction="edm"):
    """A denoiser that returns what it is told to."""
    def denoiser(x, sigma, label):
        return x0_hat
    denoiser.prediction = prediction
    return denoiser


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths of a tiny teacher, generator, ONNX file; random weights, so that each matters."""
    folder = tmp_path_factory.mktemp("tiny")
    teacher.main([*TINY, "--out", f"{folder}/teacher"])
    checkpoint = teacher.load(f"{folder}/teacher/teacher.pt")
    rng = torch.Generator().manual_seed(0)
    for weight in checkpoint["model"].values():
        weight += 0.15 * torch.randn(weight.shape, generator=rng)
    teacher.save(checkpoint, f"{folder}/teacher/teacher.pt")
    dmd2.main([*TINY_DMD, "--teacher", f"{folder}/teacher/teacher.pt", "--out", f"{folder}/dmd2"])
    export.main([f"{folder}/dmd2/generator.pt"])
    return types.SimpleNamespace(
        folder=folder, teacher=f"{folder}/teacher/teacher.pt", last=f"{folder}/dmd2/last.pt",
        generator=f"{folder}/dmd2/generator.pt", onnx=f"{folder}/dmd2/generator.onnx")


@pytest.fixture
def distil(tiny, tmp_path):
    """Distil the tiny teacher with more flags, in four steps; returns the run's folder."""
    runs = itertools.count()

    def run(flags=""):
        out = tmp_path / f"run{next(runs)}"
        dmd2.main([*TINY_DMD, "--teacher", tiny.teacher, "--evaluate-every", "0",
                   "--out", str(out), *flags.split()])
        return out
    return run


@pytest.fixture(autouse=True)
def on_cpu(request, monkeypatch):
    """The same tests on every machine, but for those that are marked."""
    if request.node.get_closest_marker("reach") and request.config.option.markexpr != "reach":
        pytest.skip("installs packages: only with -m reach")
    if request.node.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", functools.cache(lambda: False))


def log_of(folder):
    """A run's log without what depends on the machine."""
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name != "images_per_second"} for line in lines]


def equal(a, b):
    """Whether two nested states hold the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def fails(main, argv, capsys):
    """Run a script's main as its command does; returns the one line it must fail with, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        teacher.run_script(lambda: main(argv))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def photographs(folder, count=6, classes=("cats", "dogs"), mode="RGB"):
    """A folder of small images of noise for each class; returns its path."""
    rng = np.random.default_rng(0)
    for name in classes:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (20 + i % 5, 24, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(Path(folder, name, f"{i}.png"))
    return str(folder)


close, CPU = torch.testing.assert_close, torch.device("cpu")
INPUTS = next(teacher.fresh_noise(8, (1, 8, 8), 0)), torch.linspace(0.1, 5, 8), torch.arange(8)


@pytest.fixture
def denoiser(tiny):
    return teacher.build(teacher.load(tiny.teacher))


@pytest.fixture
def spy(monkeypatch):
    """Watch a function; returns a list of what its calls are given and return."""
    def watch(owner, name):
        def call(*args, **options):
            calls.append((args, original(*args, **options)))
            return calls[-1][1]
        calls, original = [], getattr(owner, name)
        monkeypatch.setattr(owner, name, call)
        return calls
    return watch


def options(*flags):
    return teacher.parse(teacher.Config, ["--out", "/nowhere", *flags], recipe=teacher.recipe)


def descent(optimizer, *flags):
    return teacher.Descent(optimizer, options(*flags), CPU)


# ---- noise levels, predictions, loss ------------------------------------------------------------

@pytest.mark.parametrize("schedule, levels", [
    ("lognormal", {0: 0.002, 0.5: math.exp(-1.2), 0.8413447: 1, 1: 80}),  # one deviation up
    ("karras", {0: 0.002, 0.5: 2.51521898, 1: 80}),
    ("linear", {0: 0.0100005, 499 / 999: 3.42413662, 1: 157.40728}),
    ("cosine", {0: 0.0064254128, 499 / 999: 1.01238956, 1: 20291.1696}),
    ("sigmoid", {0: 0.0173311683, 249 / 999: 0.418676954, 499 / 999: 1, 1: 1824.8926}),
    ("flow", {0: 0.001 / 0.999, 0.25: 0.2505 / 0.7495, 1: 0.999 / 0.001})])  # t / (1 - t)
def test_schedules_rise_through_known_levels(schedule, levels):
    for dtype, rel in ((torch.float32, 1e-3), (torch.float64, 1e-6)):
        sigma = teacher.SCHEDULES[schedule](torch.linspace(0, 1, 5001, dtype=dtype))
        assert sigma.dtype == dtype and (sigma.diff() >= 0).all()
        found = teacher.SCHEDULES[schedule](torch.tensor([*levels], dtype=dtype))
        assert found.tolist() == pytest.approx([*levels.values()], rel=rel)


@pytest.mark.parametrize("prediction, target", [
    ("edm", lambda x0, noise, s: (4 * s * x0 - noise) / (4 * s**2 + 1).sqrt()),
    ("eps", lambda x0, noise, s: noise), ("x0", lambda x0, noise, s: x0),
    ("v", lambda x0, noise, s: (noise - s * x0) / (1 + s**2).sqrt()),
    ("flow", lambda x0, noise, s: noise - x0)])
def test_loss_is_the_prediction_s(prediction, target):
    x0, noise, f = torch.randn(3, 4, 1, 4, 4, dtype=torch.float64)
    s = torch.tensor([0.002, 0.1, 0.5, 80.0], dtype=torch.float64).view(-1, 1, 1, 1)
    c_skip, c_out, _ = teacher.PREDICTIONS[prediction](s)
    x0_hat = c_skip * (x0 + s * noise) + c_out * f
    loss, by_snr = (teacher.denoising_loss(stub(x0_hat, prediction), x0, s.flatten(), None, noise,
                                           gamma) for gamma in (None, 5.0))
    close(loss, (f - target(x0, noise, s)).square().mean())
    close(by_snr, ((x0_hat - x0).square() * (1 / s**2).clamp(max=5)).mean())


# ---- network and EDM's checkpoints ---------------------------------------------------------------

@pytest.mark.parametrize("side, mults", [
    (28, (1, 2, 2)), (32, (1, 2, 2, 2)), (30, (1, 2)), (15, (1,)), (4, (1, 1))])
def test_networks_take_sides_they_can_halve(side, mults):
    sigma = torch.tensor([teacher.SIGMA_MIN, teacher.SIGMA_MAX])
    x = torch.rand(2, 3, side, side, dtype=torch.float64), sigma, torch.arange(2)
    denoiser = teacher.Denoiser(teacher.UNet(side, 3, 2, 8, mults, 1, ()))
    x0_hat, features = denoiser.estimate(*x)
    assert x0_hat.dtype == torch.float32 and x0_hat.isfinite().all() and x0_hat.shape == x[0].shape
    assert equal((denoiser(*x), denoiser.estimate(*x, decode=False)[1]), (x0_hat, features))
    logits = dmd2.Discriminator(denoiser)(*x)
    assert logits.shape == (2,) and logits[0] != logits[1]
    with pytest.raises(ValueError, match=f"side {4 * side + 2}: .* a multiple of 4: give"):
        teacher.UNet(4 * side + 2, 3, 2, 8, (1, 2, 2), 1, ())


def test_patches_are_channels_of_a_smaller_image():
    sizes, given = (10, 16, (1, 2), 1, (4,)), (torch.zeros(3), torch.arange(3))
    patched, small = teacher.UNet(16, 1, *sizes, patch=2), teacher.UNet(8, 4, *sizes)
    small.load_state_dict(patched.state_dict())
    x = torch.rand(3, 1, 16, 16)
    f, features = small(nn.functional.pixel_unshuffle(x, 2), *given)
    assert equal(patched(x, *given), (nn.functional.pixel_shuffle(f, 2), features))


FIELDS = list(inspect.signature(teacher.UNet).parameters)
TINY_EDM = {name: dict(zip(FIELDS, values)) for name, values in {  # of ../shared/vectors
    "edm_ddpmpp_tiny": (16, 3, 10, 16, [1, 2], 1, [8], "SongUNet"),
    "edm_ddpmpp_tiny_uncond": (8, 1, 0, 16, [1, 1], 1, [], "SongUNet"),
    "edm_adm_tiny": (16, 3, 5, 64, [1, 2], 1, [8], "DhariwalUNet")}.items()}


def called(function, *args):
    """An object that is pickled as a call."""
    return type("Called", (), dict(__reduce__=lambda self: (function, args)))()


# The module whose function EDM's pickles call, without which none can be made.
persistence = types.ModuleType("torch_utils.persistence")
exec("def _reconstruct_persistent_obj(meta): raise AssertionError('called')", vars(persistence))
sys.modules.update({"torch_utils": persistence, "torch_utils.persistence": persistence})


class Persistent(nn.Module):
    """A module as EDM's torch_utils.persistence pickles it, program text included."""

    def __reduce__(self):
        meta = dict(type="class", version=6, module_src="raise SystemExit('executed')",
                    class_name=vars(self).get("class_name", "Conv2d"), state=vars(self))
        return persistence._reconstruct_persistent_obj, (meta,)


def edm_checkpoint(network, state, precond="EDMPrecond", weights={}, **changes):
    """What EDM pickles of a network with the arguments of UNet and EDM's state dict."""
    given, net, ema = {**network, **changes}, Persistent(), Persistent()
    given["in_channels"] = given["out_channels"] = given.pop("img_channels")
    net.class_name, net.skip_scale = given.pop("model_type", "SongUNet"), np.sqrt(0.5)
    net._init_kwargs, ema.class_name, ema.model = given, precond, net
    for name, value in state.items():
        *path, last = name.split(".")
        part = net
        for word in path:
            new = nn.ModuleDict() if word in ("enc", "dec") else Persistent()
            part = part._modules.setdefault(word, new)
        kind = part._buffers if last == "resample_filter" else part._parameters
        kind[last] = nn.Parameter(value)
    net._parameters.update(weights)
    return dict(ema=ema, loss_fn=None, dataset_kwargs=dict(path="a.zip"))


@pytest.fixture
def edm_pkl(tmp_path):
    """Write a small network of the digits' shape, with changes, as EDM does; returns its path."""
    def write(label_dim=10, part=slice(None), **changes):
        torch.manual_seed(0)
        network = dict(zip(FIELDS[:7], (8, 1, label_dim, 16, [1, 2], 1, [4])))
        state = {name: value + 0.1 * torch.randn_like(value)
                 for name, value in teacher.UNet(**network).state_dict().items()}
        content = pickle.dumps(edm_checkpoint(network, state, **changes))
        (tmp_path / "edm.pkl").write_bytes(content[part])
        return f"{tmp_path}/edm.pkl"
    return write


@pytest.mark.parametrize("name, protocol", [*itertools.product(TINY_EDM, (2, 4))])
def test_pickle_of_edm_is_its_denoiser(name, protocol, tmp_path):
    v, path, label_dim = vectors(name), tmp_path / "edm.pkl", TINY_EDM[name]["label_dim"]
    state = {key[12:]: value for key, value in v.items() if key.startswith("state/model.")}
    path.write_bytes(pickle.dumps(edm_checkpoint(TINY_EDM[name], state), protocol))
    checkpoint = sample.open_checkpoint(path)
    denoiser, x, sigma = teacher.build(checkpoint), v["in/x"], v["in/sigma"]
    assert checkpoint["network"] == TINY_EDM[name]
    none = torch.full((len(x),), label_dim)
    close(denoiser(x, sigma, v.get("in/label", none)), v["out/denoised"], rtol=0, atol=1e-5)
    if label_dim:
        close(denoiser(x, sigma, none), v["out/denoised_no_label"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("network, parameters, keys", [
    ((32, 3, 10, 128, [2, 2, 2], 4, [16], "SongUNet"), 55_735_299 - 128 * 9, 427 - 8 - 1),
    ((64, 3, 1000, 192, [1, 2, 3, 4], 3, [32, 16, 8], "DhariwalUNet"), 295_899_267, 553 - 12)])
def test_full_size_is_the_published_one(network, parameters, keys):
    """Without EDM's resampling filters, which are constants, and its map_augment."""
    with torch.device("meta"):
        state = teacher.UNet(*network).state_dict()
    assert (sum(value.numel() for value in state.values()), len(state)) == (parameters, keys)


def test_official_generator_of_imagenet(monkeypatch, tmp_path):
    v, path = vectors("edm_adm_tiny"), tmp_path / "pytorch_model.bin"
    torch.save({f"feedforward_model.{key[6:]}": value for key, value in v.items()
                if key.startswith("state/")}, path)
    monkeypatch.setattr(sample, "IMAGENET_64", dict(TINY_EDM["edm_adm_tiny"], in_channels=3))
    sampler = sample.load_sampler(str(path))
    assert (sampler.name, sampler.shape) == ("generator, 1 step", (3, 16, 16))
    x, sigma, label = v["in/x"], v["in/sigma"], v["in/label"]
    close(sampler.denoiser(x, sigma, label), v["out/denoised"], rtol=0, atol=1e-5)
    close(sampler.x0(iter([x / 80]), label), sampler.denoiser(x, torch.full_like(sigma, 80), label))


def test_edm_goes_the_whole_way(edm_pkl, distil, capsys):
    path = edm_pkl(label_dim=0)
    for main, flags in ((sample.main, [path, "--evaluate"]), (dmd2.main, ["--teacher", path])):
        assert "--data is missing: an EDM checkpoint" in fails(main, flags, capsys)
    flags = [path, "--guidance", "2", "--out", f"{path}.png"]
    assert "the teacher had no --label-dropout" in fails(sample.main, flags, capsys)
    sample.main([path, *"--data digits --evaluate --n 100 --sampler ddim --steps 3".split()])
    assert "teacher, 3 DDIM steps" in capsys.readouterr().out
    run = distil(f"--teacher {path} --data digits")
    dmd2.main(["--resume", f"{run}/last.pt", "--steps", "6"])
    export.main([f"{run}/generator.pt"])
    images = sample.generate(sample.load_sampler(f"{run}/generator.onnx"), INPUTS[2] * 0, seed=0)
    assert images.shape == (8, 1, 8, 8) and images.float().std() > 10


PLANTED = called(os.mkdir, "planted")
STORAGE = called(torch.storage._load_from_bytes, pickle.dumps(PLANTED, 2))


@pytest.mark.parametrize("changes, says", [
    (dict(channel_mult=PLANTED), "posix.mkdir"), (dict(weights=dict(w=STORAGE)), "posix.mkdir"),
    (dict(part=slice(999)), "truncated"), (dict(part=slice(1, 2)), "damaged"),
    (dict(precond="VPPrecond"), "holds VPPrecond of SongUNet"),
    (dict(embedding_type="fourier"), "its embedding_type is fourier")])
def test_bad_pickle_is_one_line(changes, says, edm_pkl, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = fails(sample.main, [edm_pkl(**changes)], capsys)
    assert "edm.pkl: no checkpoint of EDM or DMD2, or damaged" in line and says in line
    assert os.listdir(tmp_path) == ["edm.pkl"]


# ---- samplers -----------------------------------------------------------------------------------

def test_heun_matches_edm():
    v, sigmas = vectors("samplers"), teacher.sampling_sigmas(18, "lognormal")
    x0 = teacher.heun(Gaussian(v["mu"], v["s"]).double(), sigmas[0] * v["latents"], sigmas, None)
    close(x0, v["edm_heun_18"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule, name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_ddim_and_ddpm_match_diffusers(schedule, name):
    v = {key.removeprefix(f"{name}_"): value for key, value in vectors("samplers").items()}
    denoiser, levels = Gaussian(v["mu"], v["s"]).double(), v["sigmas"].tolist()
    sigma = teacher.SCHEDULES[schedule](torch.linspace(0, 1, 1000, dtype=torch.float64))
    close(sigma, v["sigmas"].double(), rtol=1e-3, atol=0)  # whose betas are float32
    sigmas = [*(levels[t] for t in v["ddim50_timesteps"]), 0.0]
    x = v["latents"] * (1 + sigmas[0] ** 2) ** 0.5  # out of variance-preserving coordinates
    close(sample.ddim(denoiser, x, sigmas, None), v["ddim50_eta0"], rtol=0, atol=1e-5)
    for t, mean, var in zip(v["ddpm_t"], v["ddpm_mean_vp"], v["ddpm_var"]):
        sigma, sigma_next = levels[t], levels[t - 1]
        x, scale = v["latents"] * (1 + sigma**2) ** 0.5, (1 + sigma_next**2) ** 0.5
        at_0, at_1 = (sample.ddim(denoiser, x, [sigma, sigma_next], None, [noise], eta=1.0) / scale
                      for noise in (torch.zeros_like(x), torch.ones_like(x)))
        close(at_0, mean, rtol=0, atol=1e-5)
        close((at_1 - at_0) ** 2, var.expand_as(x), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name, steps", [("heun", 30), ("euler", 150), ("ddpm", 150)])
def test_samplers_keep_the_moments(name, steps):
    torch.manual_seed(0)
    noise, *fresh = torch.randn(1 + steps, 1000, 1, 4, 4)
    sampler, sigmas = sample.SAMPLERS[name][0], teacher.sampling_sigmas(steps, "lognormal")
    x0 = sampler(Gaussian(0.3, 0.5), 80 * noise, sigmas, None, fresh)
    assert abs(x0.mean() - 0.3) < 0.02 and abs(x0.std() - 0.5) < 0.03
    assert (abs((x0 * noise).mean()) < 0.3) == (name == "ddpm")  # of the others it is 0.5


@pytest.mark.parametrize("schedule", teacher.SCHEDULES)
def test_levels_stay_in_the_teacher_s_range(schedule):
    low, high = teacher.SCHEDULES[schedule](torch.tensor([0, 1]).double()).tolist()
    # Stable Diffusion's own are of whole timesteps, of which the last of 18 is 55.
    lowest = teacher.timestep_sigmas(schedule)[55].item() if schedule == "scaled_linear" else low
    for own, ends in ((False, (min(80, high), max(0.002, low))), (True, (high, lowest))):
        sigmas = teacher.sampling_sigmas(18, schedule, own)
        assert (sigmas[0], sigmas[-2]) == pytest.approx(ends) and sigmas[-1] == 0
        assert len(teacher.sampling_sigmas(61, schedule, own)) == 62  # 1000 / 61 adds up to more
        assert len(sigmas) == 19 and (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("flags, evaluations, name", [
    ("", 35, "18 Heun steps"), ("--sampler euler", 35, "35 Euler steps"),
    ("--sampler ddim", 50, "50 DDIM steps"), ("--sampler ddpm --steps 9", 9, "9 DDPM steps"),
    ("--guidance 2 --guidance-below 4 --steps 4", 11, "4 Heun steps, guidance 2 below 4")])
def test_samplers_of_a_teacher(flags, evaluations, name, tiny, spy):
    cfg = teacher.parse(sample.Config, [tiny.teacher, *flags.split()])
    sampler, passes = sample.load_sampler(tiny.teacher, cfg=cfg), spy(teacher.Denoiser, "estimate")
    assert sample.generate(sampler, torch.arange(10), seed=1).float().std() > 10
    assert sampler.evaluations == evaluations and sampler.name == f"teacher, {name}"
    assert sum(len(args[1]) for args, _ in passes) == 16 * evaluations  # batches are filled up


@pytest.mark.parametrize("kind", ["teacher", "generator"])
def test_images_do_not_depend_on_the_batch(kind, tiny):
    sampler = sample.load_sampler(getattr(tiny, kind))
    label = torch.arange(10).repeat(2)
    images = sample.generate(sampler, label, seed=3)
    assert all(torch.equal(sample.generate(sampler, label, 3, batch), images) for batch in (1, 17))
    assert torch.equal(sample.generate(sampler, label[:9], 3), images[:9])
    assert not torch.equal(sample.generate(sampler, label, 4), images)


# ---- latents, and every kind of teacher ---------------------------------------------------------

@pytest.fixture(scope="session")
def latent(tiny):
    """A folder with a tiny autoencoder of the digits, a teacher of its latents and a generator."""
    pytest.importorskip("diffusers")
    path = tiny.folder / "latent"
    teacher.main([*TINY, "--autoencoder", "--mults", "1,2", "--out", f"{path}/now"])
    teacher.main([*TINY, "--latent", f"{path}/now/autoencoder.pt", "--out", f"{path}/teacher"])
    shutil.move(path / "now", path / "moved")  # what comes after can do without
    dmd2.main([*TINY_DMD, "--teacher", f"{path}/teacher/teacher.pt", "--out", f"{path}/dmd2"])
    export.main([f"{path}/dmd2/generator.pt"])
    return path


def test_latents_have_edm_s_deviation_and_kl_is_that_of_normals(latent):
    cfg, images = options("--autoencoder", "--width", "8"), torch.rand(64, 3, 28, 28)
    task = teacher.AutoencoderTask(cfg, teacher.Data(images, None, ()), None)
    autoencoder, noise = teacher.build(task.facts), torch.randn(64, 4, 7, 7)
    autoencoder.vae.decoder.conv_out.weight.data *= 2
    losses = task.losses(autoencoder, images, None, types.SimpleNamespace(normal=lambda: noise))
    mean, std = (posterior := autoencoder.posterior(images)).mean, posterior.std
    close(losses["kl"], (mean**2 + std**2 - 1 - 2 * std.log()).mean() / 2)
    decoded, before = map(autoencoder.decode, (mean + std * noise, autoencoder.encode(images)))
    assert decoded.min() < -1
    close(losses["reconstruction_loss"], (decoded.clamp(-1, 1) - images).square().mean())
    autoencoder.calibrate(images)
    assert (x0 := autoencoder.encode(images)).shape == (64, *task.shape) == (64, 4, 7, 7)
    close(x0.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    close(x0.std((0, 2, 3)), torch.full((4,), 0.5))
    close(autoencoder.decode(x0), before)  # no matter the scale


def test_autoencoder_learns_to_reconstruct(latent, tmp_path):
    flags = f"--autoencoder --mults 1,2 --steps 100 --warmup 20 --batch 64 --out {tmp_path}"
    teacher.main([*flags.split(), "--sample-every", "50", "--device", "cpu"])
    first, last = (line["psnr"] for line in log_of(tmp_path) if "psnr" in line)
    held_out = teacher.to_float(teacher.load_data("digits", "test").images)
    of_mean_image = -10 * math.log10((held_out - held_out.mean(0)).square().mean() / 4)
    assert last > 1 + of_mean_image and last > first


def test_generator_of_latents_goes_everywhere(latent):
    a, b = (sample.load_sampler(f"{latent}/dmd2/generator.{kind}") for kind in ("pt", "onnx"))
    images = sample.generate(a, INPUTS[2], seed=0)
    assert a.shape == b.shape == (4, 4, 4) and images.shape == (8, 1, 8, 8)
    assert (images.int() - sample.generate(b, INPUTS[2], seed=0).int()).abs().max() <= 1


def test_real_x0_are_latents_of_the_autoencoder_that_travels(latent, distil, spy, monkeypatch):
    batches, data = spy(dmd2, "training_batches"), teacher.load_data("digits", "train")
    monkeypatch.setattr(dmd2, "clamped", None)  # which latents are not
    distil(f"--teacher {latent}/teacher/teacher.pt --steps 1")
    codec = teacher.build(teacher.load(latent / "teacher" / "teacher.pt")["autoencoder"])
    close(batches[0][0][0].images, codec.encode(teacher.to_float(data.images)))


@pytest.mark.parametrize("prediction, schedule", [  # each once at least
    *zip([*teacher.PREDICTIONS] * 2, teacher.SCHEDULES)])
def test_every_kind_trains_samples_and_distils(prediction, schedule, distil, tmp_path, spy):
    losses, path = spy(teacher, "denoising_loss"), f"{tmp_path}/teacher.pt"
    flags = f"--prediction {prediction} --schedule {schedule} --min-snr-gamma 5 --batch 8 --steps 1"
    teacher.main([*TINY, *flags.split(), "--out", str(tmp_path)])
    assert losses[0][0][5] == 5
    passes, low = spy(teacher.Denoiser, "estimate"), teacher.SCHEDULES[schedule](torch.zeros(1))
    distil(f"--teacher {path} --batch 128 --steps 1")
    lowest = torch.cat([args[2] for args, _ in passes]).min()
    most = 1.5 if schedule == "linear" else 3  # times the lowest level that the teacher knows
    assert max(0.002, low) * 0.999 < lowest < max(0.002, low) * most
    for path, kind in ((path, "heun"), (path, "ddpm"), (f"{tmp_path}/run0/generator.pt", None)):
        cfg = sample.Config(checkpoint=path, sampler=kind, steps=kind and 2)
        x0 = sample.load_sampler(path, cfg=cfg).x0(iter(INPUTS[:1] * 2), INPUTS[2])
        assert x0.isfinite().all() and x0.std() > 0


# ---- distribution matching ----------------------------------------------------------------------

def test_losses_are_the_official_ones():
    v = vectors("dmd2_losses")
    x, x0, sigmas = v["dm/x"].requires_grad_(), v["fake/x"], (v["dm/sigma"], v["fake/sigma"])
    noise, fake_noise = ((noisy - x.detach()) / sigma.view(-1, 1, 1, 1) for noisy, x, sigma in
                         zip((v["dm/noisy"], v["fake/noisy"]), (x, x0), sigmas))
    inputs = stub(v["dm/real_x0"]), stub(v["dm/fake_x0"]), x, sigmas[0], None, noise
    loss = dmd2.dmd_loss(*inputs)
    close(dmd2.dmd_gradient(*inputs), v["dm/gradient"])
    close(loss.detach(), v["dm/loss"])
    close(*torch.autograd.grad(loss, x), v["dm/loss_grad_wrt_x"])
    loss = teacher.denoising_loss(stub(v["fake/pred_x0"]), x0, sigmas[1], None, fake_noise)
    close(loss, v["fake/loss"], rtol=1e-5, atol=0)
    real, fake = v["gan/logits_real"].flatten(), v["gan/logits_fake"].flatten()
    close(dmd2.generator_loss(fake), v["gan/generator_loss"])
    close(dmd2.discriminator_loss(real, fake), v["gan/discriminator_loss"])


@pytest.mark.parametrize("kind, steps, lr, fake_lr", [
    ("dm", 1, 8e-3, 3e-2), ("dm", 2, 8e-3, 3e-2), ("gan", 2, 4e-3, 1e-2)])
def test_distilled_gaussian_has_its_teacher_s_moments(kind, steps, lr, fake_lr):
    def generator(x, sigma, label, table=None):  # a + b x / |x|, with an a and a b for each step
        (a, b), = (table or weights).weight[torch.tensor(sigmas) == sigma[0]]
        return a + b * x / (sigma[0] ** 2 + 0.25).sqrt()

    def discriminator(x, sigma):  # by mean and square of an image's pixels
        moments = x.mean((1, 2, 3)), x.square().mean((1, 2, 3)).sqrt(), sigma
        return layers(torch.stack(moments, dim=1)).flatten()
    torch.manual_seed(0)
    sigmas, updates = [80.0, 2.5][:steps], 1000 * steps
    weights = nn.Embedding.from_pretrained(torch.tensor([[-0.5, 1.0]] * steps), freeze=False)
    real, ema = Gaussian(0.3, 0.5).requires_grad_(False), copy.deepcopy(weights)
    fake = Gaussian(torch.linspace(-0.6, -0.4, steps), torch.linspace(0.9, 1.1, steps))
    layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 1))
    betas = (0.5, 0.99) if kind == "gan" else (0.9, 0.999)  # or else the two go round in circles
    step = descent(torch.optim.Adam(weights.parameters(), betas=betas))
    fake_step = descent(torch.optim.Adam([*fake.parameters(), *layers.parameters()]))
    for i in range(updates):
        draw, decay = teacher.Draw(teacher.GENERATOR, 0, i, 64, (1, 8, 8), CPU), 1 - i / updates
        rng = teacher.seeded(teacher.TRAINED_STEP, 0, (i + 1) // 2)
        k = torch.randint(steps, (), generator=rng).item()
        x0 = generator(*dmd2.step_input(generator, sigmas, 80.0, 1.0, k, None, draw), None)
        noise, u = draw.normal(), draw.uniform()
        sigma, fake_sigma = teacher.SCHEDULES["karras"](torch.stack([0.02 + 0.96 * u, u]))
        if i % 2 == 0:
            if kind == "dm":
                loss = dmd2.dmd_loss(real, fake, x0, sigma, None, noise)
            else:
                loss = dmd2.generator_loss(discriminator(*dmd2.diffused(x0, draw, (0, 0.5))))
            step.add(loss)
            step.step(lr * decay)
            fake_step.optimizer.zero_grad()
            teacher.update_ema(ema, weights, 0.99, i // 2)
        if kind == "dm":
            fake_step.add(teacher.denoising_loss(fake, x0.detach(), fake_sigma, None, noise))
        else:
            logits = (discriminator(*dmd2.diffused(image, draw, (0, 0.5)))
                      for image in (0.3 + 0.5 * noise, x0.detach()))
            fake_step.add(dmd2.discriminator_loss(*logits))
        fake_step.step(fake_lr * decay)
    noise, by_ema = torch.randn(steps, 5000, 1, 8, 8), functools.partial(generator, table=ema)
    x0 = sample.few_step(by_ema, sigmas[0] * noise[0], sigmas, None, noise[1:])
    assert abs(x0.mean() - 0.3) < 0.05 and abs(x0.std() - 0.5) < 0.05


def test_discriminator_sees_standard_noise_or_none():
    draw, x0 = teacher.Draw(teacher.GENERATOR, 0, 0, 500, (1, 8, 8), CPU), torch.ones(500, 1, 8, 8)
    x, sigma = dmd2.diffused(x0, draw, (0.25, 0.5))
    assert ((x - x0) / sigma.view(-1, 1, 1, 1)).std().item() == pytest.approx(1, abs=0.02)
    assert equal(dmd2.diffused(x0, draw, None), (x0, torch.full((500,), teacher.SIGMA_MIN)))


@pytest.mark.parametrize("k, real, expected", [
    (0, None, 40), (1, None, 4 + 4 * 1), (2, None, (4 + 4 * 1) / 10 + 2 * 1.5), (2, 0.5, 0.5 + 3)])
def test_input_of_a_step_is_what_sampling_gives_it(k, real, expected):
    draws, tenth, size = itertools.count(1), nn.Parameter(torch.tensor(0.1)), (2, 1, 4, 4)
    draw = types.SimpleNamespace(normal=lambda: torch.full(size, float(next(draws))))
    x, sigma = dmd2.step_input(lambda x, sigma, label: x * tenth, [80.0, 4.0, 2.0], 80.0, 0.5, k,
                               None, draw, real and torch.full(size, real))
    assert (sigma == (80, 4, 2)[k]).all() and not x.requires_grad  # only the last step is trained
    close(x, torch.full(size, float(expected)))


def test_steps_of_a_generator():
    assert dmd2.generator_sigmas(4) == pytest.approx([80, 45.314, 24.408, 12.382], rel=1e-4)
    assert dmd2.generator_sigmas(1) + dmd2.generator_sigmas(2, 2.0)[:1] == pytest.approx([80, 2])


def test_guidance_moves_away_from_no_label(denoiser):
    x, sigma, label = INPUTS
    by = [sample.Guided(denoiser, g, 10, below)(*INPUTS)
          for g, below in ((0, 99), (1, 99), (2, 99), (2, 3))]
    close(by[0], denoiser(x, sigma, torch.full_like(label, 10)))
    close(by[1], denoiser(*INPUTS))
    close(by[2], 2 * by[1] - by[0])
    close(by[3], torch.where(sigma.view(-1, 1, 1, 1) > 3, by[1], by[2]))
    assert (by[1] - by[0]).abs().max() > 1e-3


def test_pairs_are_kept_until_the_teacher_changes(tiny, denoiser, tmp_path):
    def pairs(sampler, level=2.0, digest="a", count=12):
        at = dmd2.load_pairs(sampler, "karras", [80, level], 80, 0.5, digest, count, tmp_path / "a")
        return [at(k, slice(None)) for k in (0, 1)]
    sampler = sample.make_sampler(denoiser, teacher.load(tiny.teacher), CPU)
    (noise, label, images), (x, *same) = made = pairs(sampler)
    levels = sorted([*teacher.sampling_sigmas(18, "karras"), 2.0], reverse=True)
    for found, passed in ((2 * x - images, levels[:levels.index(2.0) + 1]), (images, levels)):
        close(found, teacher.heun(denoiser, 2 * noise, passed, label), rtol=0, atol=1e-5)
    unused = sampler._replace(denoiser=None)  # fails if it is called
    assert equal(pairs(unused), made) and equal(same, [label, images])
    for changed in ((unused, 1.0), (unused, 2.0, "b"), (unused, 2.0, "a", 9),
                    (unused._replace(name="guided"),)):
        with pytest.raises(TypeError):
            pairs(*changed)


def test_lpips_sees_colour_images_of_224(monkeypatch):
    net, shapes, stub = nn.Identity(), [], types.SimpleNamespace(LPIPS=lambda **options: net)
    net.forward = lambda a, b: shapes.extend((a.shape, b.shape)) or (a - b).square()
    monkeypatch.setitem(sys.modules, "lpips", stub)
    distance = dmd2.lpips_distance("cpu")(torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8))
    assert distance.item() == pytest.approx(1) and shapes == [(2, 3, 224, 224)] * 2


def test_networks_start_as_the_teacher_or_a_first_stage(distil, tiny):
    parent, first, same = map(teacher.load, (tiny.teacher, tiny.generator, tiny.last))
    for flags, generator, fake_score in (
            ("", parent["model"], parent["model"]), ("--guidance 3", *[parent["model"]] * 2),
            (f"--init-from {tiny.last}", same["model"], same["training"]["fake_score"]),
            (f"--init-from {tiny.generator}", first["model"], first["fake_score"])):
        out = distil(f"--lr 0 --fake-lr 0 --steps 1 {flags}")
        last = teacher.load(out / "last.pt")
        assert equal(last["training"]["generator"], generator) and equal(last["model"], generator)
        assert equal(last["training"]["fake_score"], fake_score)
        assert (log_of(out)[0]["dmd_loss"] == 0) == (not flags)  # as fake score and teacher are one


def test_discriminator_sees_real_as_real_with_its_labels(distil, spy, monkeypatch):
    monkeypatch.setattr(dmd2, "diffused", lambda x0, *rest: (x0, torch.ones(len(x0))))
    seen, losses = spy(dmd2.Discriminator, "forward"), spy(dmd2, "discriminator_loss")
    distil("--steps 1 --gan-range 0,0.9")
    generated, real, fake = ((x0, label) for (_, x0, _, label), _ in seen)
    images, labels, *_ = teacher.load_data("digits", "train")
    index = teacher.batch_at(0, len(images), 16, seed=0)
    assert equal(real, (teacher.to_float(images[index]), labels[index]))
    assert equal(fake, generated) and not torch.equal(fake[1], real[1])
    assert generated[0].requires_grad and not fake[0].requires_grad
    assert equal(losses[0][0], (seen[1][1], seen[2][1]))


@pytest.mark.parametrize("features, trains_encoder", [("fake", True), ("teacher", False)])
def test_discriminator_trains_the_encoder_it_shares(features, trains_encoder, distil):
    flags = f"--steps 1 --gan-features {features} --fake-lr 0.01 --clip 1e9 --discriminator-weight"
    runs = [teacher.load(distil(f"{flags} {weight}") / "last.pt") for weight in (0.01, 10)]
    assert equal(*(run["training"]["fake_score"] for run in runs)) == (not trains_encoder)


@pytest.mark.parametrize("flags, name, quantiles", [
    ("--dm-range 0.5,0.6", "dmd_loss", (0.5, 0.6)), ("", "dmd_loss", (0.02, 0.6)),
    ("--late-range 0.7,0.8 --decay-after 1 --steps 3", "dmd_loss", (0.7, 0.8)),
    ("--late-range 0.7,0.8 --decay-after 2 --steps 3", "dmd_loss", (0.02, 0.6)),
    ("--fake-range 0.1,0.2", "unit_error", (0.1, 0.2)), ("", "unit_error", (0, 1))])
def test_losses_draw_levels_from_their_range(flags, name, quantiles, distil, spy):
    calls = spy(dmd2, name)
    distil(f"--batch 256 --steps 1 {flags}")
    sigma, (low, high) = calls[-1][0][3], teacher.SCHEDULES["karras"](torch.tensor(quantiles))
    assert low <= sigma.min() < 2 * low + 0.01 and high / 1.5 < sigma.max() <= high


@pytest.mark.parametrize("flags, passes, logged", [
    ("--fake-steps 3", 18, dict(dmd_loss=[1, 4], gan_loss=[1, 4], fake_loss=[1, 2, 3, 4])),
    ("--gan-range 0,0.9", 22, dict(dmd_loss=[1, 3], gan_loss=[1, 3], fake_loss=[1, 2, 3, 4])),
    ("--gan-weight 0", 12, dict(dmd_loss=[1, 3], gan_loss=[], discriminator_loss=[])),
    ("--dm-weight 0 --gan-features teacher --no-gan-noise --no-backward-simulation "
     "--student-steps 2", 18, dict(dmd_loss=[], gan_loss=[1, 3], discriminator_loss=[1, 2, 3, 4])),
    ("--regression-weight 0.25 --pairs 20", 55, dict(dmd_loss=[1, 3], regression_loss=[1, 3])),
    ("--regression-steps 2 --pairs 20", 46, dict(
        regression_loss=[1, 2], dmd_loss=[3], fake_loss=[3, 4], fake_gradient_norm=[3, 4]))])
def test_steps_that_take_a_loss(flags, passes, logged, distil, spy, tiny, monkeypatch):
    """Passes per step: generator 1, its losses 2 + 1; fake score 1, discriminator 1, or 2 if its
    levels or its features are its own. Pairs take 35."""
    watched = "initial", "step_input", "load_pairs", "clamped", "unit_error", "few_step"
    begun, inputs, pairs, shown, errors, few = (spy(dmd2, name) for name in watched)
    calls, before = spy(teacher.Denoiser, "estimate"), teacher.load(tiny.teacher)["model"]
    if flags == "--gan-weight 0":
        monkeypatch.setattr(dmd2, "load_images", None)  # no image is read
    lines = log_of(distil(flags))
    assert len(calls) == passes
    assert all(x0.abs().max() < 1.0001 for (_, _, x0, _), _ in errors)
    assert all(x0.abs().max() > 1.1 for (x0,), _ in shown)
    steps = [args[4] for args, _ in inputs]  # drawn anew after the generator's update
    assert steps == ([0, 1, 1, 0] if "--student-steps 2" in flags else [0] * len(steps))
    assert {args[3] for args, _ in inputs} | {args[4] for args, _ in pairs} == {0.95}  # recipe's
    for _, pairs_at in pairs:  # regression is of a step at its level
        ((_, x, levels, _), x0), index = few[0], teacher.batch_at(0, 20, 16, seed=0)
        given, _, images = pairs_at(0, index)
        assert levels == pytest.approx([80]) and equal([x], [given])
        close(lines[0]["regression_loss"], (x0 - images).square().mean().item(), rtol=1e-5, atol=0)
    assert logged == {name: [line["step"] for line in lines if name in line] for name in logged}
    assert [equal(net.state_dict(), before) for net in begun[0][1]] == [True, False, False]


def test_two_steps_with_patches_are_one_onnx_file(distil, tmp_path):
    teacher.main([*TINY, "--patch", "2", "--mults", "1", "--out", str(tmp_path)])
    out = distil(f"--teacher {tmp_path}/teacher.pt --student-steps 2")
    export.main([f"{out}/generator.pt"])
    a, b = (sample.load_sampler(f"{out}/generator.{kind}") for kind in ("pt", "onnx"))
    noise, label = torch.randn(2, 5, 1, 8, 8), torch.arange(5)
    close(b.x0(iter(noise), label), a.x0(iter(noise), label).clamp(-1, 1), rtol=0, atol=1e-5)


# ---- optimisation -------------------------------------------------------------------------------

def test_descent_clips_its_gradient():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    step = descent(torch.optim.SGD([weight]), "--clip", "1")
    step.add(0.5 * weight.square().sum())
    assert step.step(lr=0.1) == {"gradient_norm": 5}
    close(weight.detach(), torch.tensor([3 - 0.06, 4 - 0.08]))


def test_generator_s_losses_reach_no_others(distil):
    one, other = (log_of(distil(f"--steps 1 --gan-weight {weight}"))[0] for weight in (1, 99))
    assert one["fake_gradient_norm"] == other["fake_gradient_norm"]
    assert one["generator_gradient_norm"] < other["generator_gradient_norm"]


def test_float16_step_that_overflows_is_left_out():
    weight = nn.Parameter(torch.ones(1))
    step = descent(torch.optim.SGD([weight]), "--dtype", "float16")
    step.add(weight * 1e38)
    assert step.step(lr=1.0) == {"gradient_norm": 0} and weight == 1
    step.add(weight.sum())
    assert step.step(lr=0.25) == {"gradient_norm": 1} and weight == 0.75
    for _ in range(20):  # until the scale is spent
        step.add(weight * math.nan)
        values = step.step(lr=1.0)
    assert values["gradient_norm"].isnan()


def test_ema_is_the_weighted_mean():
    ema, model = nn.Linear(1, 1), nn.Linear(1, 1)
    for update, decay in ((80, 0.9), (0, 0.1)):  # from 80 on it is what was asked for
        expected = decay * ema.weight + (1 - decay) * model.weight
        teacher.update_ema(ema, model, 0.9, update)
        close(ema.weight, expected)


def test_learning_rate_rises_stays_and_falls():
    rates = [teacher.rate_at(update, 1.0, 4, 100) for update in (0, 1, 2, 3, 99, 100, 120, 140)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.25])
    assert teacher.rate_at(0, 1.0, 0) == teacher.rate_at(999, 1.0, 4) == 1


def computed(net, *flags):
    """Estimates of a copy of a network that computes as flags say, and its gradient."""
    net = copy.deepcopy(net).requires_grad_(True)
    teacher.prepare(options(*flags), CPU, net)
    x0_hat = net(*INPUTS)
    x0_hat.square().mean().backward()
    return x0_hat.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def test_checkpointing_computes_the_same_again(denoiser, spy):
    calls = spy(nn.functional, "silu")
    plain, count = computed(denoiser), len(calls)
    assert equal(plain, computed(denoiser, "--checkpointing")) and len(calls) > 2.5 * count


def test_frozen_teacher_is_in_the_compute_dtype(denoiser, monkeypatch, spy):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    for lora, dtype in ((0, torch.float32), (4, torch.bfloat16)):
        cfg = types.SimpleNamespace(dtype="auto", compile=False, lora=lora)
        assert teacher.dtype_of(cfg, torch.device("cuda")) == dtype
    norms = spy(nn.functional, "group_norm")
    expected, _ = computed(denoiser, "--dtype", "bfloat16")
    assert {args[0].dtype for args, _ in norms} == {torch.float32}  # as autocast has it on cuda
    teacher.prepare(options("--dtype", "bfloat16"), CPU, denoiser)
    assert {p.dtype for p in denoiser.parameters() if p.ndim == 4} == {torch.bfloat16}
    assert torch.equal(denoiser(*INPUTS), expected)


def test_compiled_bfloat16_is_one_graph_and_close_to_plain(denoiser, monkeypatch):
    """Of the graph that dynamo captures: inductor takes a minute to build its kernels."""
    graphs, plain = [], computed(denoiser)
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(
        nn.Module.compile, backend=lambda graph, inputs: graphs.append(graph) or graph))
    for a, b in zip(plain, computed(denoiser, "--compile", "--dtype", "bfloat16")):
        assert b.dtype == torch.float32 and 0 < (a - b).norm() < 0.05 * a.norm()
    assert len(graphs) == 1


# ---- quality and pictures -----------------------------------------------------------------------

def test_frechet_distance_is_the_closed_form():
    a = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)  # of covariance 8/7
    b = a * torch.tensor([1, 2, 3]) + torch.tensor([1, 0, 2])  # which commutes with it
    assert sample.frechet_distance(a, b) == pytest.approx(5 + 8 / 7 * (0 + 1 + 4), rel=1e-9)
    assert sample.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_counts_fakes_and_recall_reals():
    torch.manual_seed(0)
    left = torch.randn(500, 2)
    both = torch.cat([left, left + torch.tensor([100.0, 0.0])])
    assert sample.precision_recall(both, left + 0.01) == pytest.approx((1, 0.5), abs=0.02)
    assert sample.precision_recall(left, both + 0.01) == pytest.approx((0.5, 1), abs=0.02)


@pytest.fixture(scope="session")
def digits(tiny):
    facts = teacher.load(tiny.teacher)["data"]
    return sample.load_reference(facts), teacher.load_data("digits", "train")


def test_evaluation_of_the_real_images(digits):
    reference, (images, labels, *_) = digits
    same = sample.evaluate(images, labels, reference)
    assert max(same[name] for name in reference.features) < 1e-6
    assert same["precision"] == same["recall"] == same["accuracy"] == 1


def distortions(images, labels):
    """Lists of images by what was done to those given, uint8 [N, C, H, W], ever more of each."""
    x, rng = teacher.to_float(images), teacher.seeded(0)
    noise, order = torch.randn(x.shape, generator=rng), torch.randperm(len(x), generator=rng)
    means = torch.stack([x[labels == c].mean(0) for c in range(10)])[labels]
    apart = torch.cdist(x.flatten(1), x.flatten(1)) + 1e6 * (labels[:, None] != labels)
    changed = dict(
        noise=[x + sigma * noise for sigma in (0.05, 0.1, 0.2)],
        blur=[nn.functional.avg_pool2d(nn.functional.pad(x, [1] * 4, mode="replicate"), 3, 1)],
        pulled_to_the_class=[x + share * (means - x) for share in (0.1, 0.2, 0.4)],
        mean_of_five=[x[apart.topk(5, largest=False).indices].mean(1)],
        repeated=[x[order[torch.arange(len(x)) % n]] for n in (1000, 300, 100) if n < len(x)],
        one_class_missing=[x[labels != 4]], half=[x[order[:len(x) // 2]]])
    return {name: [teacher.to_uint8(part) for part in parts] for name, parts in changed.items()}


def distances(images, reference):
    nets = {name: reference.nets[name] for name in reference.features}
    found = sample.extract(nets, images, CPU)
    return np.array([*sample.distances(found, reference.features).values()])


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_yardstick_sees_lost_quality_and_lost_variety(name, monkeypatch):
    """The table of assets/experiments.md: run with -s. The headline is the first column."""
    if name == "mnist" and not (SHARED / "data" / "MNIST").exists():
        pytest.skip("needs the MNIST files")
    train, test = (teacher.load_data(name, split, SHARED / "data") for split in ("train", "test"))
    first, real, held_out = (data._replace(images=data.images[:n], labels=data.labels[:n])
                             for data, n in ((train, 20000), (train, 5000), (test, 2000)))
    assert name == "digits" or held_out.labels[:5].tolist() == [7, 2, 1, 0, 4]
    splits = dict(train=first, test=held_out)
    monkeypatch.setattr(sample, "load_images", lambda facts, split: splits[split])
    reference = sample.load_reference(dict(name=name))
    headline, labels = reference.features["frechet_distance"].double(), reference.labels
    spread = sum((labels == c).double().mean() * headline[labels == c].var(0) for c in range(10))
    within = (spread.sum() / headline.var(0).sum()).item()
    print(f"\n{name}: {within:.3f} of the variance within classes")
    assert within >= 0.35

    def measured(what, images):
        found = distances(images, reference)
        print(f"{what:24}", *(f"{distance:9.4f}" for distance in found))
        return found[0]
    base = measured("held out", held_out.images)
    for kind, parts in distortions(*held_out[:2]).items():
        found = [measured(f"{kind} {i}", part) for i, part in enumerate(parts, 1)]
        assert kind in ("repeated", "half") or (np.diff([base, *found]) > 0).all(), kind
    of_real = distortions(*real[:2])
    assert (np.diff([measured("real, repeated", part) for part in of_real["repeated"]]) > 0).all()
    half = measured("real, half of them", of_real["half"][0])
    assert measured("real, pulled by 0.2", of_real["pulled_to_the_class"][1]) >= 4 * half


@pytest.mark.parametrize("name, digest", [("digits", "5b856f0ba1cd"), ("mnist", "ebac706b2f69")])
def test_feature_networks_are_the_stated_ones(name, digest, digits):
    path = sample.ASSETS / f"features_{name}.pt"
    assert sample.load_features(digits[1], dict(name=name))[1] == digest
    assert path.stat().st_size < 5e5


def test_features_of_other_data_are_trained_once(digits, tmp_path, monkeypatch, spy):
    data, facts = digits[1], dict(name="mine", data_dir=str(tmp_path))
    monkeypatch.setattr(sample, "train_features", lambda data, device: nn.ModuleDict(
        dict(encoder=sample.feature_net(1, 64), classifier=sample.feature_net(1, 10))))
    trained = spy(sample, "train_features")
    digest, same = (sample.load_features(data, facts)[1] for _ in range(2))
    other = sample.load_features(data._replace(labels=data.labels.flip(0)), facts)[1]
    assert len(trained) == 2 and digest == same != other


def test_report_tells_figures_floor_and_protocol(tiny, capsys):
    sample.main([tiny.generator, "--evaluate", "--n", "200", "--seeds", "2"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert all(word in result["protocol"] for word in (
        "200 samples", "1497 training images of digits", "5b856f0ba1cd", "[0, 1]"))
    assert result["floor"]["accuracy"] > 0.97 and result["floor"]["n"] == 300
    assert "recall" in result["mean"] and "recall" not in result["floor"]
    assert f"{result['mean']['accuracy']:9.4f}" in out and result["spread"]["frechet_distance"] > 0


def test_trajectory_shows_what_the_denoiser_is_given(tiny, tmp_path, spy):
    grids, passes = spy(sample, "save_grid"), spy(teacher.Denoiser, "forward")
    flags = f"--trajectory --labels 3,7 --sampler euler --steps 4 --out {tmp_path}/strip.png"
    sample.main([tiny.teacher, *flags.split()])
    (rows, names, _, titles), _ = grids[0]
    assert names == ["3", "estimate", "7", "estimate"] and titles[::3] == ["80", "0.002"]
    for column, ((_, x, sigma, _), x0_hat) in enumerate(passes):
        assert torch.equal(rows[1::2, column], teacher.to_uint8(x0_hat))
        assert torch.equal(rows[0::2, column], teacher.to_uint8(x / (1 + sigma.view(-1, 1, 1, 1))))


def test_beside_shows_real_second_and_first(tiny, tmp_path, spy, digits):
    grids, made = spy(sample, "save_grid"), spy(sample, "generate")
    flags = f"--beside {tiny.teacher} --steps 3 --out {tmp_path}/beside.png"
    sample.main([tiny.generator, *flags.split()])
    (rows, _, _, titles), _ = grids[0]
    real = [digits[1].images[digits[1].labels == c][:5] for c in range(10)]
    parts = [rows[:, i:i + 5].flatten(0, 1) for i in (0, 6, 12)]
    assert equal(parts, [torch.cat(real), made[0][1], made[1][1]])
    assert [t for t in titles if t] == ["real", "teacher, 3 Heun steps", "generator, 1 step"]


# ---- data and FID -------------------------------------------------------------------------------

def test_digits_split():
    train, test = (teacher.load_data("digits", split) for split in ("train", "test"))
    assert train.images.shape == (1497, 1, 8, 8) and test.images.shape == (300, 1, 8, 8)
    assert train.labels.bincount().tolist() == [146, 154, 149, 148, 143, 155, 157, 144, 151, 150]
    assert train.images.max() == 255
    assert torch.equal(teacher.to_uint8(teacher.to_float(train.images)), train.images)


def test_clamped_images_have_the_gradient_of_those_given():
    x = torch.tensor([-1.5, 0.3, 2.0], requires_grad=True)
    assert torch.autograd.grad(teacher.clamped(x).sum(), x)[0].tolist() == [1, 1, 1]


def test_epoch_shows_each_image_once_and_half_of_them_mirrored():
    *epoch, after = (teacher.batch_at(step, 100, 20, seed=0).tolist() for step in range(6))
    assert sorted(sum(epoch, [])) == list(range(100)) and epoch[0] != after
    data, cfg = teacher.load_data("digits", "train"), types.SimpleNamespace(batch=500, seed=0)
    (plain, label), (some, same), (again, _) = (
        next(teacher.training_batches(data._replace(flip=flip), 0, cfg, [slice(None)], CPU))
        for flip in (False, True, True))
    mirrored = (some == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(some[~mirrored], plain[~mirrored]) and 200 < mirrored.sum() < 300
    assert torch.equal(label, same) and torch.equal(some, again)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of random weights of FID's network."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pt"
    torch.save({}, path)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = module.FeatureExtractorInceptionV3("a", ["2048"], path)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.kaiming_normal_(p)  # so that features are of order 1
    net.fc.weight.data *= 30
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture
def some_digits(monkeypatch):
    """Twenty of the digits in the place of all; twenty others, mirrored."""
    data = teacher.load_data("digits", "train")
    real, fake = (data._replace(images=data.images[part], labels=data.labels[part])
                  for part in (slice(20), slice(20, 40)))
    monkeypatch.setattr(sample, "load_images", lambda *_: real)
    return real, fake._replace(images=fake.images.flip(-1))


def test_fid_is_that_of_others(inception, some_digits):
    fidelity, metrics = map(pytest.importorskip, ("torch_fidelity", "torchmetrics.image.fid"))
    cfg = sample.EvaluationOptions(features="inception", features_weights=inception)
    reference = sample.load_reference(dict(name="digits"), CPU, cfg)
    ours = sample.evaluate(*some_digits[1][:2], reference)
    sets = [torch.utils.data.Subset(data.images.expand(-1, 3, -1, -1), range(20))
            for data in some_digits]
    theirs = fidelity.calculate_metrics(
        input1=sets[1], input2=sets[0], fid=True, isc=True, samples_shuffle=False, batch_size=20,
        cuda=False, cache=False, verbose=False, save_cpu_ram=True,
        feature_extractor_weights_path=inception)
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["fid"] > 1 and ours["inception_score"] > 1.005
    assert ours["inception_score"] - 1 == pytest.approx(theirs["inception_score_mean"] - 1, 1e-3)
    reference.nets["fid"].num_features = 2048
    metric = metrics.FrechetInceptionDistance(reference.nets["fid"])
    for data, real in zip(some_digits, (True, False)):
        metric.update(teacher.to_float(data.images), real=real)
    assert ours["fid"] == pytest.approx(metric.compute().item(), rel=1e-4)


def test_fid_by_a_file_of_statistics(tiny, inception, some_digits, tmp_path, capsys):
    flags = ["--features", "inception", "--features-weights", inception, "--n", "20",
             "--seeds", "1", "--reference", f"{tmp_path}/real.npz"]
    sample.main([tiny.teacher, "--evaluate", *flags])
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    cfg = sample.Config(features="inception", features_weights=inception, reference=flags[-1])
    read = sample.load_reference(dict(classes=range(10)), CPU, cfg)
    sampler, (_, labels, *_) = sample.load_sampler(tiny.teacher), some_digits[0]
    labels = labels[torch.randperm(20, generator=teacher.seeded(teacher.SUBSET))]
    found = sample.evaluate(sample.generate(sampler, labels, 0), labels, read)
    assert made["mean"]["fid"] == pytest.approx(found["fid"], rel=1e-6)
    assert "20 training images of digits, features inception" in made["protocol"]
    assert "recall" in made["mean"] and "recall" not in found


@pytest.mark.parametrize("kind", ["pt", "onnx"])
def test_distance_by_a_network_of_one_s_own(kind, digits, tmp_path):
    reference, data = digits
    net, path, x = reference.nets["frechet_distance"], tmp_path / f"net.{kind}", INPUTS[0]
    if kind == "pt":
        torch.jit.trace(net, x).save(path)
    else:
        torch.onnx.export(net, (x,), path, dynamo=True, verbose=False,
                          dynamic_shapes=[{0: torch.export.Dim("batch")}])
    facts = dict(name="digits", data_dir="data", size=32, shape=(1, 8, 8), classes=data.classes)
    own = sample.load_reference(facts, CPU, sample.EvaluationOptions(features=str(path)))
    some = data.images[:300].flip(-1), data.labels[:300]
    for name in ("frechet_distance", "recall"):
        assert sample.evaluate(*some, own)[name] == pytest.approx(
            sample.evaluate(*some, reference)[name], rel=1e-3)


LEVELS = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4
TOP = np.arange(8)[:, None] < np.full(8, 4)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of images; the working folder, where data/ is made, is the test's own."""
    monkeypatch.chdir(tmp_path)
    return photographs(tmp_path / "photos")


@pytest.mark.parametrize("labels", [True, False])
def test_zip_of_edm_is_its_folder(labels, photos, tmp_path):
    """Packed or not, it has dataset.json, which of images without classes tells no labels."""
    names = sorted(path.relative_to(photos).as_posix() for path in Path(photos).rglob("*.*"))
    given = [[name, i % 3] for i, name in enumerate(names)] if labels else None
    Path(photos, "dataset.json").write_text(json.dumps(dict(labels=given)))
    packed = shutil.make_archive(tmp_path / "packed", "zip", photos)
    folder, other = (teacher.load_data(path, "train", tmp_path, 8) for path in (photos, packed))
    assert equal(folder, other) and folder.classes == (("0", "1", "2") if labels else ("all",))


def test_folder_has_colour_if_a_class_has(photos, tmp_path):
    photographs(photos, classes=["cats"], mode="L")
    assert teacher.load_data(photos, "train", tmp_path, size=8).shape == (3, 8, 8)


@pytest.mark.parametrize("pixels, orientation, expected", [
    (LEVELS * 257, 1, LEVELS),  # level 255 of 16 bits is 65,535
    (np.pad(LEVELS, ((0, 0), (8, 8))).astype(np.uint8), 3, LEVELS[::-1, ::-1]),  # upside down
    (np.stack([0 * TOP, 255 * TOP], -1).astype(np.uint8), 1, 255 * ~TOP)])  # black, clear below
def test_image_as_seen(pixels, orientation, expected, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("0.png", "1.png"):  # both splits need one
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    image = teacher.load_data(str(tmp_path), "train", tmp_path, size=8).images[0]
    assert image.tolist() == [expected.tolist()]


def test_unreadable_files_are_left_out_and_named(photos, capsys):
    bad = {"cut.png": Path(photos, "cats", "0.png").read_bytes()[:-200], "empty.png": b"",
           "text.jpg": b"no image", "gif.png": b"GIF89a"}
    for name, content in bad.items():
        Path(photos, "dogs", name).write_bytes(content)
    count = sum(len(teacher.load_data(photos, split).labels) for split in ("train", "test"))
    told = capsys.readouterr().err
    assert count == 12 and "4 left out" in told and sum(name in told for name in bad) == 3


@pytest.mark.parametrize("change, size", [(None, 32), ("size", 32), ("time", 32), (None, 16)])
def test_folder_is_decoded_once_unless_it_changes(change, size, photos, capsys):
    first, path = teacher.load_data(photos, "train").images, Path(photos, "cats", "0.png")
    (kept,), maps = Path("data").glob("photos-32-*.uint8"), Path("/proc/self/maps")
    assert f"{kept} (0.0 MB)" in capsys.readouterr().err
    assert not maps.exists() or str(kept.resolve()) in maps.read_text()
    if change == "size":
        Image.new("RGB", (9, 9)).save(path)
    elif change == "time":
        os.utime(path, (1, 1))
    second, anew = teacher.load_data(photos, "train", size=size).images, change or size == 16
    assert bool(anew) == bool(capsys.readouterr().err) and second.shape[-1] == size
    assert len(list(Path("data").glob("*.uint8"))) == 1 + bool(anew)
    assert torch.equal(first, second) == (change != "size" and size == 32)


@pytest.mark.parametrize("main, argv", [
    (sample.main, "run0/last.pt --beside run/teacher.pt"),
    (dmd2.main, "--teacher run/teacher.pt --evaluate-every 0 --batch 8 --steps 2 --out new"),
    (dmd2.main, "--resume run0/last.pt --steps 6"),
    (teacher.main, "--resume run/teacher.pt --steps 6")])
def test_folder_changed_renamed_or_moved(main, argv, photos, distil, tmp_path, capsys):
    teacher.main([*TINY, *"--size 8 --mults 1,2 --batch 8 --out run --data".split(), photos])
    distil("--teacher run/teacher.pt --batch 8")
    cats, lynxes = Path(photos, "cats"), Path(photos, "lynxes")
    if "--resume" in argv:
        shutil.copytree(cats, cats / "more")
        teacher.load_data(photos, "train", size=8)
        line = fails(main, argv.split(), capsys)
        assert "count" in line and "was 10, and is 15" in line
        shutil.rmtree(cats / "more")
    cats.rename(lynxes)
    teacher.load_data(photos, "train", size=8)  # which tells that it decodes
    assert "lynxes" in fails(main, argv.split(), capsys)
    lynxes.rename(cats)
    shutil.move(photos, tmp_path / "moved")
    assert f"--data {photos}: no such folder" in fails(main, argv.split(), capsys)
    main([*argv.split(), "--data", "moved"])


@pytest.mark.parametrize("train, test", [
    ("train", "val"), ("Train", "Test"), ("Training", "Testing"), ("training", "validation")])
def test_split_folder(train, test, tmp_path):
    photographs(tmp_path / "photos" / train, count=5)
    photographs(tmp_path / "photos" / test, count=2)
    one, two = (teacher.load_data(f"{tmp_path}/photos", split, tmp_path, 8)
                for split in ("train", "test"))
    assert one.labels.bincount().tolist() == [5, 5] and two.labels.bincount().tolist() == [2, 2]
    assert one.classes == ("cats", "dogs")
    (tmp_path / "photos" / train / "cats").rename(tmp_path / train)  # a class of that name
    assert {*teacher.folder_files(tmp_path)[1]} == {"photos", train}


def test_resumed_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    begun, logged, run = [], [], types.SimpleNamespace(
        log=lambda line, step: logged.append(step), finish=list)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=lambda **options: begun.append(options) or run,
        api=types.SimpleNamespace(api_key=None)))
    teacher.main([*TINY, "--wandb", "--out", str(tmp_path)])
    (tmp_path / "wandb" / "offline-run-20250101_1200-abc").mkdir(parents=True)
    teacher.main(["--resume", str(tmp_path / "teacher.pt"), "--steps", "6"])
    assert [options["id"] for options in begun] == [None, "abc"] and logged == [1, 2, 3, 4, 5, 6]
    assert begun[0]["mode"] == "offline" and begun[0]["config"]["width"] == 8


# ---- runs: resume, faults, several processes -----------------------------------------------------

RESUMABLE = dict(teacher="teacher.pt", dmd2="last.pt", autoencoder="autoencoder.pt")


def same_end(*folders):
    """Assert that two runs left the same bits; returns the names of their checkpoints."""
    names = [{path.name for path in Path(folder).glob("*[!1].pt")} for folder in folders]
    assert names[0] == names[1]
    for name in names[0]:
        one, other = (torch.load(Path(folder, name), weights_only=True) for folder in folders)
        for part in ("step", "model", "training", "figures", "fake_score", "images"):
            assert equal(one.get(part), other.get(part)), (name, part)
    return names[0]


@pytest.mark.parametrize("name, flags", [
    ("teacher", "--latent AUTOENCODER --flip"), ("teacher", "--dtype float16 --decay-after 3"),
    ("autoencoder", "--autoencoder --mults 1,2 --flip --dtype bfloat16 --checkpointing"),
    ("teacher", "--data FOLDER --size 8 --mults 1,2 --blocks 1 --batch 8 --flip"),
    ("dmd2", "--teacher TEACHER --evaluate-every 1"),
    ("dmd2", "--teacher TEACHER --evaluate-every 0 --student-steps 2 --guidance 2"),
    ("dmd2", "--teacher TEACHER --evaluate-every 0 --regression-weight 1 --pairs 40 "
             "--gan-weight 0 --student-steps 2"),
    ("dmd2", "--teacher TEACHER --evaluate-every 0 --regression-steps 4 --pairs 40"),
    ("dmd2", "--teacher LATENT --evaluate-every 0")])
def test_resumed_run_is_the_uninterrupted(name, flags, tiny, photos, request):
    latent = Path(request.getfixturevalue("latent") if re.search("(?i)auto|latent", flags) else "")
    paths = dict(AUTOENCODER=latent / "moved" / "autoencoder.pt", FOLDER=photos,
                 TEACHER=tiny.teacher, LATENT=latent / "teacher" / "teacher.pt")
    flags = [str(paths.get(word, word)) for word in flags.split()]
    main, sizes = (dmd2.main, TINY_DMD) if name == "dmd2" else (teacher.main, TINY)
    main([*sizes, *flags, "--steps", "7", "--out", "whole"])
    main([*sizes, *flags, "--steps", "3", "--out", "parts"])
    main(["--resume", f"parts/{RESUMABLE[name]}", "--steps", "7"])
    assert RESUMABLE[name] in same_end("whole", "parts") and log_of("whole") == log_of("parts")
    assert Path("parts", "log.jsonl").read_text().count("images_per_second") == 7
    if "--evaluate-every 0" in " ".join(flags):  # then the last generator is the one to keep
        last, generator = (teacher.load(f"whole/{file}") for file in ("last.pt", "generator.pt"))
        assert equal(last["model"], generator["model"]) and generator["step"] == 7


@pytest.mark.parametrize("flags, name", [
    ([], "digits"), (["--data", "mnist"], "mnist-cpu"), (["--data", "photos"], "folder"),
    (["--data", "mnist", "--recipe", "mnist"], "mnist"),
    (["--autoencoder", "--data", "mnist"], "autoencoder")])
def test_recipe_is_by_data_and_device_unless_named(flags, name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=True))
    cfg = options("--device", "cpu", *flags)
    assert vars(cfg) == {**vars(cfg), **teacher.RECIPES[name], "recipe": name, "out": "/nowhere"}
    assert (teacher.dtype_of(cfg, CPU) == torch.bfloat16) == name.endswith("-cpu")


def test_config_is_the_run_s_options(tiny, tmp_path):
    first, again = tiny.folder / "dmd2" / "config.json", tmp_path / "config.json"
    dmd2.main(["--config", str(first), "--out", str(tmp_path), "--seed", "1"])
    first, again = (json.loads(path.read_text()) for path in (first, again))
    assert first == teacher.load(tiny.last)["config"]
    assert again == dict(first, out=str(tmp_path), seed=1)


@pytest.mark.parametrize("content", [None, b"cut", b""])
def test_checkpoint_before_the_last(content, distil, capsys):
    out = distil("--save-every 1")
    shutil.copytree(out, out / "whole")
    last, before = out / "last.pt", out / "last.1.pt"
    last.unlink() if content is None else last.write_bytes(content)
    line = fails(dmd2.main, ["--resume", str(last)], capsys)
    assert f"the one before it is {before}" in line and teacher.load(before)["step"] == 3
    dmd2.main(["--resume", str(before)])
    assert same_end(out, out / "whole")


def test_best_generator_survives_a_resume(distil):
    out = distil("--evaluate-every 2")
    best = teacher.load(out / "generator.pt")
    best["figures"].update(frechet_distance=0.0, recall=1.0)
    teacher.save(dict(best, step=99), out / "generator.pt")
    dmd2.main(["--resume", str(out / "last.pt"), "--steps", "6"])
    assert teacher.load(out / "generator.pt")["step"] == 99


def test_pictures_at_sample_every_only(tiny, tmp_path):
    teacher.main([*TINY, "--sample-every", "2", "--steps", "3", "--out", str(tmp_path)])
    assert [line["step"] for line in log_of(tmp_path) if "validation_loss" in line] == [2, 3]
    some, none = ({*os.listdir(folder)} for folder in (tmp_path, tiny.folder / "teacher"))
    assert none == {"config.json", "log.jsonl", "teacher.pt"}
    assert some == none | {"loss.png", "samples_000002.png", "samples_000003.png"}


FAULTY = dict(teacher=[*TINY, *"--save-every 1 --steps 30".split()],
              dmd2=[*TINY_DMD, *"--student-steps 2 --gan-weight 1 --warmup 1 --evaluate-every 5 "
                    "--save-every 1 --steps 12".split()])


@pytest.fixture(scope="session", autouse=True)
def once(tmp_path_factory):
    """A function that calls another in a child, once for all tests, and returns its folder."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([  # imported once
        __name__, "sklearn.datasets", "torch._dynamo", "torch.distributed.fsdp", "peft",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl"])
    multiprocessing.forkserver.ensure_running()  # now, while the current folder has this file

    @functools.cache
    def call(function):
        folder = tmp_path_factory.mktemp(function.__name__)
        (process := in_child(folder / "words", function, folder)).join(900)
        assert process.exitcode == 0, (folder / "words").read_text()
        return folder
    return call


def in_child(words, function, *args):
    """Start a process that calls a function of this file, its words to a file; returns it."""
    process = multiprocessing.get_context("forkserver").Process(
        target=be_child, args=(str(words), torch.cuda.is_available(), function, *args), daemon=True)
    process.start()
    return process


def be_child(words, cuda, function, *args):
    words = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    if not cuda:
        torch.cuda.is_available = lambda: False
    function(*args)


def finish(words, *args):
    """The exit status of a process that is a script, negative for a signal, and its words."""
    process = in_child(words, script, *args)
    process.join(120)
    assert process.exitcode is not None, "hangs"
    return process.exitcode, Path(words).read_text()


def script(name, argv, prepare=lambda: None, *args):
    """Be a script, or one rank of several, after a function has prepared a fault; argv may be that
    of two runs, with the word "then" between them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell ignore it
    sys.argv[0] = f"{name}.py"
    prepare(*args)

    def main():
        for words in " ".join(map(str, argv)).split(" then "):
            sys.modules[name].main(words.split())
            with teacher.rank_0_first():  # which may still be writing
                pass
    teacher.run_script(main)


def at_third_update(*calls):
    """Let calls, tuples of a function and its arguments, be made in the third update of the EMA."""
    def update(*args):
        update_ema(*args)
        if next(count) == 3:
            for function, *arguments in calls:
                function(*arguments)
    count, update_ema = itertools.count(1), teacher.update_ema
    teacher.update_ema = dmd2.update_ema = update


@pytest.fixture(scope="session", params=FAULTY)
def faulty(request, tiny, tmp_path_factory):
    """A script, the options of a run of it, and the folder of such a run left alone."""
    name, folder = request.param, tmp_path_factory.mktemp("whole")
    argv = [*FAULTY[name], *["--teacher", tiny.teacher] * (name == "dmd2")]
    status, words = finish(folder / "words", name, [*argv, "--out", folder / "run"])
    assert status == 0, words
    return types.SimpleNamespace(name=name, argv=argv, whole=folder / "run")


def last_of(faulty, out):
    """The file to go on from: the last checkpoint, or the one before; None if there is neither."""
    path = out / RESUMABLE[faulty.name]
    return next((p for p in (path, path.with_suffix(".1.pt")) if p.exists()), None)


def ends_alike(faulty, out):
    """Go on with a run until it ends; assert that it ends as the one left alone."""
    status, words = finish(out.with_name("words"), faulty.name, ["--resume", last_of(faulty, out)])
    assert status == 0, words
    assert same_end(faulty.whole, out)


def test_killed_run_resumes(faulty, tmp_path):
    """Each time after one more step is saved at least, for slow machines would get nowhere."""
    rng, out = np.random.default_rng(0), tmp_path / "run"
    path = (out / RESUMABLE[faulty.name]).with_suffix(".1.pt")  # which once there always is
    for kills in range(4):  # the last time it may end
        saved = path.exists() and path.stat().st_mtime_ns
        argv = ["--resume", last_of(faulty, out)] if saved else [*faulty.argv, "--out", out]
        process = in_child(tmp_path / "words", script, faulty.name, argv)
        while process.exitcode is None and saved == (path.exists() and path.stat().st_mtime_ns):
            process.join(0.005)
        process.join(rng.uniform(0, 0.1) if kills < 3 else 120)
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "words").read_text()
    assert kills > 1 and same_end(faulty.whole, out) and log_of(faulty.whole) == log_of(out)


@pytest.mark.parametrize("faulty, numbers", [
    ("teacher", [signal.SIGINT]), ("dmd2", [signal.SIGTERM]), ("dmd2", [signal.SIGINT] * 2)],
    indirect=["faulty"])
def test_signal_saves_first_and_the_second_ends(numbers, faulty, tmp_path):
    out = tmp_path / "run"
    argv = [*faulty.argv, "--save-every", 100, "--out", out]
    status, words = finish(tmp_path / "words", faulty.name, argv, at_third_update,
                           *[(signal.raise_signal, number) for number in numbers])
    assert status == 128 + numbers[0] and "--resume" in words.splitlines()[-1], words
    assert bool(path := last_of(faulty, out)) == (len(numbers) == 1)
    if path:
        assert teacher.load(path)["step"] < 8 and f"--resume {path}" in words
        ends_alike(faulty, out)


def test_full_disk(faulty, tmp_path):
    out, size = tmp_path / "run", last_of(faulty, faulty.whole).stat().st_size
    limits = size // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    status, words = finish(tmp_path / "words", faulty.name, [*faulty.argv, "--out", out],
                           at_third_update, (resource.setrlimit, resource.RLIMIT_FSIZE, limits))
    path = last_of(faulty, out)
    assert status == 2 and not list(out.glob("*.tmp"))
    assert words.splitlines()[-1] == f"{faulty.name}.py: {path}: can't be written (File too large)"
    assert teacher.load(path)["step"] == (4 if faulty.name == "dmd2" else 2)
    ends_alike(faulty, out)


@pytest.mark.parametrize("damage", ["flipped", "cut", "foreign", "planted"])
@pytest.mark.parametrize("main, argv", [
    (teacher.main, "--resume"), (teacher.main, "--latent"), (dmd2.main, "--resume"),
    (dmd2.main, "--teacher"), (dmd2.main, "--teacher TEACHER --init-from"), (sample.main, ""),
    (sample.main, "TEACHER --out x.png --beside"), (export.main, "")])
def test_damaged_file_is_one_line(main, argv, damage, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, checkpoint = bytearray(Path(tiny.teacher).read_bytes()), teacher.load(tiny.teacher)
    if damage == "flipped":
        weight = max(checkpoint["model"].values(), key=torch.numel)
        content[content.index(weight.numpy().tobytes())] ^= 1
    Path("bad.pt").write_bytes(dict(cut=content[:-100], foreign=b"a text").get(damage, content))
    if damage == "planted":
        torch.save(dict(checkpoint, step=PLANTED), "bad.pt")
    line = fails(main, [*argv.replace("TEACHER", tiny.teacher).split(), "bad.pt"], capsys)
    assert "bad.pt: no" in line and "checkpoint of this project" in line
    assert os.listdir(tmp_path) == ["bad.pt"]


@pytest.mark.parametrize("main, module, name, says", [
    (teacher.main, teacher, "denoising_loss", "loss is nan at step 3"),
    (teacher.main, nn.utils, "clip_grad_norm_", "gradient_norm is nan at step 3"),
    (dmd2.main, dmd2, "unit_error", "fake_loss is nan at step 3"),
    (dmd2.main, dmd2, "dmd_loss", "dmd_loss is nan at step 5")])
def test_divergence_stops_the_run(main, module, name, says, tiny, tmp_path, monkeypatch, capsys):
    def third(*args, **options):
        return function(*args, **options) * (math.nan if next(calls) == 3 else 1)
    calls, function = itertools.count(1), getattr(module, name)
    monkeypatch.setattr(module, name, third)
    flags = [*([*TINY_DMD, "--teacher", tiny.teacher] if main is dmd2.main else TINY),
             *"--steps 6 --log-every 6 --save-every 2 --out".split(), str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        teacher.run_script(lambda: main(flags))
    assert stop.value.code == 1 and capsys.readouterr().err.endswith(f"diverged: {says}\n")
    path, = tmp_path.glob("[lt]*[!1].pt")
    assert teacher.load(path)["step"] == (4 if says.endswith("5") else 2)


def as_ranks(name, argv, folder):
    """Run a script by two processes, as torchrun starts them; returns what they say."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    paths = [folder / f"words{rank}" for rank in range(2)]
    ranks = [in_child(path, script, name, argv, be_rank, i, port) for i, path in enumerate(paths)]
    for process in ranks:
        process.join(120)
    words = [path.read_text() for path in paths]
    assert [process.exitcode for process in ranks] == [0, 0], words
    return words


def be_rank(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port),
                      MASTER_ADDR="localhost", TORCHELASTIC_RUN_ID="a")


@pytest.mark.parametrize("name, flags", [
    ("teacher", "--sample-every 2"),
    ("dmd2", "--evaluate-every 2 --warmup 1 --student-steps 2 --gan-weight 1 "
             "--discriminator-weight 1")])
def test_losses_of_two_parts_and_of_two_processes(name, flags, tiny, tmp_path):
    sizes = TINY if name == "teacher" else [*TINY_DMD, "--teacher", tiny.teacher]
    argv = [*sizes, *flags.split(), "--out"]
    sys.modules[name].main([*argv, f"{tmp_path}/whole"])
    sys.modules[name].main([*argv, f"{tmp_path}/parts", "--accumulate", "2"])
    words = as_ranks(name, [*argv, tmp_path / "ranks"], tmp_path)
    assert [said.count("next: ") for said in words] == [1, 0]
    whole, *others = (log_of(tmp_path / name) for name in ("whole", "parts", "ranks"))
    for line, same in itertools.chain(*(zip(whole, other, strict=True) for other in others)):
        losses = {key: value for key, value in line.items() if "loss" in key}
        assert same == pytest.approx(line, rel=1e-4, abs=1e-4)
        assert {key: same[key] for key in losses} == pytest.approx(losses, rel=1e-5, abs=1e-5)


def test_rank_that_is_lost_is_started_anew(tmp_path, monkeypatch):
    argv = [*TINY, "--save-every", "1", "--out"]
    (tmp_path / "teacher.py").write_text(f"""if True:
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        del sys.modules["__main__"].__spec__
        import test_all
        lost = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        fault = test_all.at_third_update, (test_all.signal.raise_signal, test_all.signal.SIGKILL)
        test_all.script("teacher", sys.argv[1:], *fault * lost)""")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "--max-restarts", "2", tmp_path / "teacher.py", *argv, "restarted"],
        text=True, capture_output=True, timeout=300, cwd=tmp_path,
        env=dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
    assert done.returncode == 0, done.stderr
    as_ranks("teacher", [*argv, tmp_path / "whole"], tmp_path)
    assert same_end(tmp_path / "restarted", tmp_path / "whole")
    assert done.stderr.count("training images of") == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(ValueError, match="holds a run"):
        teacher.main([*argv, f"{tmp_path}/restarted", "--seed", "1"])


def test_images_of_two_processes_and_of_onnx(tiny, tmp_path):
    argv = ["--n", "40", "--batch", "16", "--out"]
    sample.main([tiny.generator, *argv, f"{tmp_path}/one.npz"])
    sample.main([tiny.onnx, *argv, f"{tmp_path}/onnx.npz"])
    as_ranks("sample", [tiny.generator, *argv, f"{tmp_path}/two.npz"], tmp_path)
    one, *others = (np.load(tmp_path / f"{name}.npz") for name in ("one", "onnx", "two"))
    assert one["images"].shape == (40, 8, 8, 1) and one["images"].std() > 30
    for other in others:
        assert abs(one["images"].astype(int) - other["images"].astype(int)).max() <= 1
        assert one["labels"].tolist() == other["labels"].tolist() == [*range(10)] * 4


# ---- options and mistakes -----------------------------------------------------------------------

@pytest.mark.parametrize("script, argv, says", [
    (teacher, "--data cifra", "cifra: no such folder, and none of digits, mnist, fashion, cifar10"),
    (teacher, "--batch 1500", "--batch 1500: exceeds the 1497 training images"),
    (teacher, "--batch 0", "--batch 0: must be from 1"),
    (teacher, "--batch 16 --accumulate 3", "--batch 16: "),
    (teacher, "--mults 1,x", "--mults 1,x: needs"),
    (teacher, "--out /dev/null/run", "/dev/null/run"),
    (teacher, "--out FOLDER/teacher", "holds a run, teacher.pt"),
    (teacher, "--resume nowhere.pt", "nowhere.pt: no such checkpoint"),
    (teacher, "--resume TEACHER", "--steps 4: "),
    (teacher, "--resume TEACHER --steps 9 --lr 0.1", "--lr 0.1: the run to resume has 0.002"),
    (teacher, "--resume LAST --steps 9", "another script"),
    (teacher, "--latent TEACHER", "autoencoder"), (dmd2, "", "--teacher is missing"),
    (dmd2, "--teacher GENERATOR", "holds a generator"),
    (dmd2, "--teacher TEACHER --dm-weight 0 --regression-steps 0 --regression-weight 0", "nothing"),
    (dmd2, "--teacher TEACHER --dm-range 0.5", "--dm-range 0.5: needs two numbers from 0"),
    (dmd2, "--teacher TEACHER --regression-weight 1 --pairs 9", "--pairs"),
    (dmd2, "--teacher TEACHER --init-from GENERATOR --conditioning-sigma 2", "sigmas is [80.0]"),
    (dmd2, "--resume GENERATOR --steps 9", "holds no optimizers"),
    (sample, "GENERATOR --labels 3,10", "'10' is no class"),
    (sample, "GENERATOR --evaluate --features x", "--features x: no such file, and not inception"),
    (sample, "GENERATOR --steps 4", "--guidance: are for teachers"),
    (sample, "TEACHER --evaluate --n 9", "--n 9: needs 10 or more"),
    (sample, "ONNX --trajectory", "ONNX file"), (dmd2, "--teacher TEACHER --lora 4", "--lora"),
    (sample, "GENERATOR --out x.jpg", "--out x.jpg: must end in .png or .npz"),
    (sample, "GENERATOR --out FOLDER/dmd2", "or be a folder that is new"),
    (export, "TEACHER --uint8", "are not for teachers")])
def test_mistake_is_one_line(script, argv, says, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = re.sub("[A-Z]{4,}", lambda word: str(getattr(tiny, word[0].lower())), argv).split()
    assert says in fails(script.main, argv, capsys) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error, says", [
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "gcc"),
    (RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx"), "gcc"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--batch"),
    (ModuleNotFoundError("No module named 'lpips'", name="lpips"), "pip install lpips")])
def test_what_the_user_can_mend_is_one_line(error, says, capsys):
    def main(argv):
        raise error
    assert says in fails(main, [], capsys)


def test_help_imports_nothing_heavy():
    code = """
import contextlib, sys, teacher, sample, dmd2, export
for script in (teacher, sample, dmd2, export):
    with contextlib.suppress(SystemExit):
        script.main(["--help"])
print({*"torchvision sklearn matplotlib onnx onnxruntime diffusers".split()} & {*sys.modules})"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.endswith("set()\n"), told
    assert all(flag in told.stdout for flag in ("--latent", "--dm-range", "--beside", "--fp16"))


def test_profile_tells_and_touches_no_run(tiny, tmp_path, capsys):
    (tmp_path / "last.pt").write_text("a run's")
    flags = f"--device cpu --batch 16 --pairs 16 --fake-steps 2 --profile --out {tmp_path}".split()
    dmd2.main(["--teacher", tiny.teacher, *flags])
    out = capsys.readouterr().out
    flops = re.search(r"step takes [\d.]+ ms .*, \d+ images/s, ([\d.]+) GFLOP", out)[1]
    assert float(flops) > 0 and "aten::" in out and "next: " not in out
    assert (tmp_path / "last.pt").read_text() == "a run's"
    assert "traceEvents" in json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert {*os.listdir(tmp_path)} == {"last.pt", "profile"}


# ---- ONNX ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, tolerance, device", [
    ("", 1e-5, "cpu"), ("--uint8", 1, "cpu"), ("--fp16", 1e-2, "cpu"),
    pytest.param("", 1e-4, "cuda", marks=gpu), pytest.param("--fp16", 1e-2, "cuda", marks=gpu)])
def test_onnx_contract(flag, tolerance, device, tiny, tmp_path):
    exported = export.Exported(teacher.load(tiny.generator))
    if f"{device.upper()}ExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime is here without its CUDA provider")
    path = Path(tiny.onnx)
    if flag or device == "cuda":
        path = tmp_path / "g.onnx"
        export.main([tiny.generator, *flag.split(), "--device", device, "--out", str(path)])
        assert {*tmp_path.iterdir()} == {path, path.with_suffix(".json")}
    graph, proto = onnx.load(path).graph, onnx.TensorProto
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert found == dict(noise=proto.FLOAT, label=proto.INT64,
                         image=proto.UINT8 if flag == "--uint8" else proto.FLOAT)
    session, _ = sample.onnx_session(path, device, **dict(use_tf32=0) if device == "cuda" else {})
    for batch in (64, 17, 1):
        inputs = exported.example(torch.arange(batch) % 10)
        image, = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        expected = exported(**inputs)
        if flag == "--uint8":
            expected = teacher.to_uint8(expected).permute(0, 2, 3, 1)
        assert image.dtype == expected.numpy().dtype and image.shape == expected.shape
        assert (torch.from_numpy(image).double() - expected.double()).abs().max() <= tolerance


@pytest.mark.parametrize("wrong", [10, -1, -10, 2**40, -2**63])
def test_onnx_refuses_a_label_that_is_no_class(wrong, tiny):
    noise, label = torch.randn(2, 1, 8, 8), torch.tensor([3, wrong])
    with pytest.raises(Exception, match="indices element out of data bounds"):
        sample.load_sampler(tiny.onnx).x0(iter([noise]), label)
    with pytest.raises(IndexError):
        export.Exported(teacher.load(tiny.generator))(noise, label)


def test_onnx_metadata(tiny):
    metadata = {p.key: p.value for p in onnx.load(tiny.onnx).metadata_props}
    assert {*metadata} == {"description", "version", "license", "names", "date", "dmd2"}
    facts, names = json.loads(metadata["dmd2"]), json.loads(metadata["names"])
    beside = json.loads(Path(tiny.onnx).with_suffix(".json").read_text())
    assert beside == dict(facts, id2label=names) and names == {c: c for c in "0123456789"}
    images = dict(type="float32", shape=["batch", 1, 8, 8])
    means = {name: dict(meaning=meaning) for name, meaning in export.MEANING.items()}
    assert facts == dict(
        facts, noise=images | means["noise"], image=images | means["image"], labels=10,
        label=dict(type="int64", shape=["batch"], **means["label"]), version=teacher.__version__,
        checkpoint_sha256=hashlib.sha256(Path(tiny.generator).read_bytes()).hexdigest())
    assert facts["figures"]["frechet_distance"] > 0 and "[0, labels)" in facts["label"]["meaning"]
    for part in (ROOT, tiny.folder, Path(torch.__file__).parent, "export.py", "teacher.py"):
        assert str(part).encode() not in Path(tiny.onnx).read_bytes()


def test_onnx_in_other_hands(tiny, tmp_path):
    """IR version 8 and plain weights: quantize_dynamic and onnx.reference take the file."""
    from onnx.reference import ReferenceEvaluator
    from onnxruntime.quantization import quantize_dynamic
    model, feed = onnx.load(tiny.onnx), dict(noise=INPUTS[0].numpy(), label=INPUTS[2].numpy())
    assert model.ir_version == 8 and not model.graph.value_info
    assert not any(a.name == "allowzero" for node in model.graph.node for a in node.attribute)
    quantize_dynamic(tiny.onnx, tmp_path / "dynamic.onnx")
    expected, dynamic = (sample.onnx_session(path)[0].run(None, feed)[0]
                         for path in (tiny.onnx, tmp_path / "dynamic.onnx"))
    assert abs(ReferenceEvaluator(model).run(None, feed)[0] - expected).max() < 1e-5
    assert 0 < abs(dynamic - expected).max() < 0.5


def test_int8_keeps_quality_or_leaves_no_file(tiny, tmp_path, monkeypatch, capsys):
    argv = [tiny.generator, "--int8", "--out", f"{tmp_path}/g.onnx"]
    monkeypatch.setattr(export, "export_onnx", lambda *args: onnx.load(tiny.onnx))  # no new one
    monkeypatch.setattr(export, "INT8_N", 100)
    monkeypatch.setattr(export, "INT8_WORSE", (0.5, 0.01))
    assert "int8 of float32: Fréchet distance" in fails(export.main, argv, capsys)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(export, "INT8_WORSE", (1.1, 0.05))
    export.main(argv)
    assert sample.onnx_session(tmp_path / "g.onnx")[1]["arithmetic"] == "int8"
    ours, theirs = (sample.load_sampler(path).x0(iter(INPUTS[:1]), INPUTS[2])
                    for path in (tmp_path / "g.onnx", tiny.onnx))
    assert 0 < (ours - theirs).abs().mean() < 0.1
    weights = onnx.load(tmp_path / "g.onnx").graph.initializer
    assert sum(weight.data_type == onnx.TensorProto.INT8 for weight in weights) > 30


@reach
@pytest.mark.parametrize("language, commands", [
    ("python", "python3 -m venv v; v/bin/pip install -q onnxruntime==1.17.3 'numpy<2'; "
               "v/bin/python main.python"),
    ("js", "npm i --ignore-scripts --no-save onnxruntime-node; node main.mjs"),
    ("cpp", "g++ -std=c++17 main.cpp -lonnxruntime; ./a.out")])  # CPATH and the like tell where
def test_readme_s_snippet_elsewhere(language, commands, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(tiny.onnx).parent, "runs/dmd2")
    snippets = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    Path(f"main.{language.replace('js', 'mjs')}").write_text(
        next(snippet for snippet in snippets if "onnxruntime" in snippet))
    for command in commands.split("; "):
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        if done.returncode == 127 or "onnxruntime_cxx_api.h: No such file" in done.stderr:
            pytest.skip(f"needs what {command} needs: {done.stderr}")
        assert not done.returncode, done.stderr


def test_onnx_of_teacher_samples_as_it_does(tiny, tmp_path):
    export.main([tiny.teacher, "--out", f"{tmp_path}/teacher.onnx"])
    session, facts = sample.onnx_session(tmp_path / "teacher.onnx")
    assert facts["labels"] == 11 and "sigmas[0] * noise" in facts["sigma"]["meaning"]

    def denoiser(x, sigma, label):
        feed = dict(x=x.numpy(), sigma=sigma.numpy(), label=label.numpy())
        return torch.from_numpy(session.run(["x0_hat"], feed)[0])
    noise, label = next(teacher.fresh_noise(11, (1, 8, 8), 0)), torch.arange(11)  # 10: no label
    sampler = sample.load_sampler(tiny.teacher)
    found = teacher.heun(denoiser, facts["sigmas"][0] * noise, [*facts["sigmas"], 0.0], label)
    assert (found - sampler.x0(iter([noise]), label)).abs().max() < 1e-4
    without = dict(teacher.load(tiny.teacher), config={}, sigmas=[1.0])  # --label-dropout
    assert export.ExportedTeacher(without).count == 10
    with pytest.raises(ValueError, match="takes x and sigma and label"):
        sample.load_sampler(tmp_path / "teacher.onnx")


@pytest.mark.parametrize("spoil", [0.1, math.nan])
def test_export_that_differs_leaves_no_file(spoil, tiny, tmp_path, monkeypatch, capsys):
    checkpoint, model = teacher.load(tiny.generator), onnx.load(tiny.onnx)
    checkpoint["model"]["net.dec.8x8_aux_conv.bias"] += spoil
    torch.save(checkpoint, tmp_path / "g.pt")
    monkeypatch.setattr(export, "export_onnx", lambda *args: model)
    assert "differs from PyTorch" in fails(export.main, [f"{tmp_path}/g.pt"], capsys)
    assert os.listdir(tmp_path) == ["g.pt"]


def test_benchmark_prints_all_rows(tiny, monkeypatch, capsys):
    files = {name: Path(tiny.onnx).read_bytes() for name in ("onnxruntime", "onnxruntime, int8")}
    names = ["teacher, 18 Heun steps", "PyTorch", "torch.compile", *files]
    names += ["OpenVINO"] * bool(importlib.util.find_spec("openvino"))
    medians = itertools.cycle([1] + [0.5] * (len(names) - 1))
    monkeypatch.setattr(export, "BATCHES", (1, 3))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    monkeypatch.setattr("torch.utils.benchmark.Timer.blocked_autorange", lambda timer, **options:
                        types.SimpleNamespace(median=(timer.timeit(1), next(medians))[1]))
    checkpoint = teacher.load(tiny.generator)
    export.benchmark(files, export.Exported(checkpoint), checkpoint, CPU)
    rows = re.findall(r"^ +(\d) +(\w.*?) {2,}(.*)$", capsys.readouterr().out, re.M)
    assert [row[:2] for row in rows] == [(batch, name) for batch in "13" for name in names]
    teacher_s, ours = (rows[len(names) + i][2].split() for i in (0, 1))
    assert teacher_s == ["1000.00", "3", "1.0"] and ours == ["500.00", "6", "2.0"]


# ---- Stable Diffusion: tiny pipelines, made here, against diffusers -----------------------------

def make_pipeline(folder, xl):
    """A tiny random SD1.5 or SDXL, saved as a folder, with prompts.txt beside it; its pipeline."""
    diffusers, transformers = map(pytest.importorskip, ("diffusers", "transformers"))
    letters = [*map(chr, range(33, 127))]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    torch.manual_seed(xl)
    tokenizers = [transformers.CLIPTokenizer(  # of single letters
        {word: i for i, word in enumerate(words)}, [], model_max_length=77, pad_token=pad)
        for pad in ("<|endoftext|>", "!")]
    text = transformers.CLIPTextConfig(
        vocab_size=190, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        eos_token_id=189, projection_dim=32)
    blocks = "{}Block2D" if xl else "CrossAttn{}Block2D", "{}Block2D"  # and attention in the middle
    more = dict(use_linear_projection=True, addition_embed_type="text_time",
                addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8,
        scaling_factor=0.13025 if xl else 0.18215)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, norm_num_groups=8, block_out_channels=(16, 32),
        attention_head_dim=4, cross_attention_dim=64 if xl else 32, **more if xl else {},
        down_block_types=[name.format("Down") for name in blocks],
        up_block_types=[name.format("Up") for name in blocks[::-1]])
    parts = dict(
        vae=vae, unet=unet, text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=tokenizers[0], scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            timestep_spacing="trailing", steps_offset=1))
    if xl:
        parts.update(text_encoder_2=transformers.CLIPTextModelWithProjection(text).eval(),
                     tokenizer_2=tokenizers[1])
    else:
        parts.update(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = getattr(diffusers, f"StableDiffusion{'XL' * xl}Pipeline")(**parts)
    pipe.save_pretrained(folder)
    folder.with_name("prompts.txt").write_text("\n".join(PROMPTS))
    return pipe


PROMPTS = ["a cat of red", "the sea"]


@pytest.fixture(scope="session", params=["sd15", "sdxl"])
def pipeline(request, tmp_path_factory):
    """A tiny pipeline: its folder, diffusers' object, our denoiser, a file of prompts."""
    folder = tmp_path_factory.mktemp("pipeline") / request.param
    pipe = make_pipeline(folder, request.param == "sdxl")
    prompts = str(folder.with_name("prompts.txt"))
    checkpoint = sample.open_checkpoint(str(folder), prompts=prompts)
    return types.SimpleNamespace(folder=str(folder), pipe=pipe, checkpoint=checkpoint,
                                 prompts=prompts, build=lambda: sample.build_any(checkpoint))


def distil_pipeline(folder, out, flags=""):
    """Distil a pipeline in three steps, by the prompts.txt beside its folder; returns out."""
    dmd2.main(["--teacher", str(folder), "--prompts", str(Path(folder).with_name("prompts.txt")),
               *("--device cpu --batch 2 --steps 3 --fake-steps 2 --warmup 0 --lr 1e-3 "
                 "--fake-lr 1e-3 --log-every 1 --sample-every 0").split(), *flags.split(),
               "--data-dir", str(out.with_name("data")), "--out", str(out)])
    return out


@pytest.fixture
def distil_text(pipeline, tmp_path):
    return lambda flags="", name="run": distil_pipeline(pipeline.folder, tmp_path / name, flags)


def near(a, b, tolerance):
    """Whether a is b within a tolerance of b's largest value."""
    assert (a - b).abs().max() <= tolerance * b.abs().max(), (a - b).abs().max() / b.abs().max()


def test_text_pipeline_is_a_denoiser(pipeline, tmp_path, capsys):
    """Its x0_hat is the scheduler's, also of v; its prompts the pipeline's to the last bit."""
    denoiser, scheduler = pipeline.build(), pipeline.pipe.scheduler
    torch.manual_seed(0)
    timesteps = 0, 1, 20, 249, 399, 499, 749, 980, 999
    sigma = teacher.timestep_sigmas("scaled_linear")[list(timesteps)].float()
    c_in = 1 / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt()
    x = torch.randn(9, 4, 8, 8) / c_in
    noise = c_in * x  # to the last bit what the network is given
    label = torch.arange(9) % 3  # the third is no prompt
    text, pooled = denoiser.net.prompts.encoded(label)
    theirs = pipeline.pipe.encode_prompt(PROMPTS, device=CPU, num_images_per_prompt=1,
                                         do_classifier_free_guidance=True)
    ours, none = (denoiser.net.prompts.encoded(label[part]) for part in (slice(2), slice(2, 3)))
    assert torch.equal(ours[0], theirs[0]) and torch.equal(none[0], theirs[1][:1])
    added = None
    if pooled is not None:
        assert torch.equal(ours[1], theirs[2]) and torch.equal(none[1], theirs[3][:1])
        added = dict(text_embeds=pooled, time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 9))
    f = pipeline.pipe.unet(noise, torch.tensor(timesteps), text, added_cond_kwargs=added)

    def folder(**config):
        """The pipeline's, with another scheduler, which this returns, too."""
        path = Path(shutil.copytree(pipeline.folder, tmp_path / str(config)))
        made = type(scheduler).from_config(scheduler.config, **config)
        made.save_pretrained(path / "scheduler")
        return path, made
    for prediction in ("epsilon", "v_prediction"):
        path, made = folder(prediction_type=prediction)
        ours = teacher.Denoiser(denoiser.net, sample.open_checkpoint(path)["prediction"])
        x0_hat = ours(x, sigma, label)
        made.set_timesteps(1000)
        for i, t in enumerate(timesteps):
            found = made.step(f.sample[i:i + 1], t, noise[i:i + 1]).pred_original_sample
            near(x0_hat[i:i + 1], found, 2e-7)
    assert "with zero terminal SNR it has none" in fails(
        sample.main, [str(folder(rescale_betas_zero_snr=True)[0])], capsys)
    assert "is a pipeline" in fails(export.main, [pipeline.folder], capsys)


def test_guided_ddim_of_text_is_the_pipelines(pipeline):
    cfg = sample.Config(checkpoint=pipeline.folder, prompts=pipeline.prompts, sampler="ddim",
                        steps=10, guidance=5.0)
    sampler = sample.load_sampler(pipeline.folder, "cpu", cfg)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = sampler.x0(iter([noise]), torch.arange(2))
    latents = pipeline.pipe(PROMPTS, num_inference_steps=10, guidance_scale=5.0, latents=noise,
                            output_type="latent").images
    near(x0, latents, 1e-6)
    vae = pipeline.pipe.vae
    near(sampler.decode(x0), vae.decode(latents / vae.config.scaling_factor)[0], 1e-5)


@pytest.mark.parametrize("pipeline, flags, timesteps", [
    ("sd15", "", [999]), ("sdxl", "--lora 4", [399]),
    *((kind, "--lora 4 --fake-lora 0 --student-steps 4", [999, 749, 499, 249])
      for kind in ("sd15", "sdxl")),
    ("sd15", "--half", [999]), ("sdxl", "--student-steps 2 --first-timestep 399", [399, 199])],
    indirect=["pipeline"])
def test_text_student_in_diffusers_makes_our_images(flags, timesteps, distil_text, pipeline):
    def ours(weights):
        return sample.load_sampler(pipeline.folder, "cpu", sample.Config(
            checkpoint=pipeline.folder, prompts=pipeline.prompts, student_steps=len(timesteps),
            weights=str(weights), first_timestep=399 if "399" in flags else None)).x0(
                iter(noises), label)
    diffusers, out = pytest.importorskip("diffusers"), distil_text(f"{flags} --steps 1")
    tolerance, lora = 2e-3 if "--half" in flags else 1e-6, "--lora" in flags
    torch.manual_seed(0)
    noises, label = torch.randn(len(timesteps), 2, 4, 8, 8), torch.arange(2)
    x0 = sample.load_sampler(str(out / "generator.pt")).x0(iter(noises), label)
    weights, = out.rglob("*.safetensors")
    pipe = type(pipeline.pipe).from_pretrained(pipeline.folder)
    if lora:
        pipe.load_lora_weights(out)
    else:
        pipe.unet = pipe.unet.from_pretrained(out / "unet", torch_dtype=torch.float32)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    for fuse in [False, True][:1 + lora]:
        if fuse:
            pipe.fuse_lora()
        fresh = iter(noises[1:])
        diffusers.schedulers.scheduling_lcm.randn_tensor = lambda *args, **more: next(fresh)
        near(x0, pipe(PROMPTS, timesteps=timesteps, guidance_scale=0.0, latents=noises[0],
                      output_type="latent").images, tolerance)
    near(ours(weights), x0, tolerance)
    from safetensors.torch import load_file, save_file
    if not lora:
        torch.save(load_file(weights), out / "unet.bin")
        near(ours(out / "unet.bin"), x0, tolerance)
    else:  # under the names of the official code, too
        official = {}
        for key, value in load_file(weights).items():
            name, kind = key.removeprefix("unet.").split(".lora_")
            stem = f"lora_unet_{name.replace('.', '_')}"
            official[f"{stem}.lora_{dict(A='down', B='up')[kind[0]]}.weight"] = value
            official[f"{stem}.alpha"] = torch.tensor(8.0)
        save_file(official, out / "official.safetensors")
        near(ours(out / "official.safetensors"), x0, 1e-6)


def test_text_adapters_share_the_weights(pipeline):
    """An adapter does not see the others, nor the teacher any."""
    denoiser = pipeline.build()
    torch.manual_seed(0)
    roles = [sample.with_adapter(denoiser, 4, 8) for _ in range(2)]
    for p in itertools.chain(*(role.parameters() for role in roles)):
        p.data += 0.1 * torch.randn(p.shape)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 1.0]), torch.arange(2)
    first = [role(*inputs) for role in (denoiser, *roles)]
    again = [role(*inputs) for role in (*roles, denoiser)]
    assert equal(again, [*first[1:], first[0]]) and equal(first[0], pipeline.build()(*inputs))
    assert (first[1] - first[2]).abs().max() > 0.1
    weights = {*denoiser.net.unet.parameters()}
    assert all({*role.net.unet.parameters()} == weights | {*role.parameters()} for role in roles)


@pytest.mark.parametrize("pipeline, flags", [("sd15", ""), ("sdxl", "--lora 4")],
                         indirect=["pipeline"])
def test_text_run_goes_on_with_the_same_bits(flags, distil_text, captioned):
    flags += f" --data {captioned} --save-every 2"
    torch.manual_seed(len(flags))  # from here on the runs begin with other random numbers
    whole, parts = distil_text(flags), distil_text(flags, "parts")
    dmd2.main(["--resume", str(parts / "last.1.pt"), "--checkpointing"])  # roles recomputed
    assert log_of(whole) == log_of(parts) and "discriminator_loss" in log_of(whole)[0]
    same_end(whole, parts)


@pytest.mark.parametrize("pipeline, flags, more", [
    ("sd15", "--lora 4", "--checkpointing"),
    ("sdxl", "--student-steps 4", "--checkpointing --shard --accumulate 2")], indirect=["pipeline"])
def test_text_losses_of_two_processes(flags, more, distil_text, captioned, tmp_path):
    """They are one's that recomputes nothing: of adapters and of shards, in a resumed run."""
    alone = distil_text(f"{flags} --batch 4 --data {captioned} --gan-weight 0.1 --warmup 4")
    argv = ["--config", alone / "config.json", *more.split(), "--out", tmp_path / "ranks"]
    argv += ["--steps", 2, "then", "--resume", tmp_path / "ranks" / "last.pt", "--steps", 3]
    as_ranks("dmd2", argv, tmp_path)
    for line, same in zip(log_of(alone), log_of(tmp_path / "ranks"), strict=True):
        assert same == pytest.approx(line, rel=2e-5)
    one, two = (teacher.load(path / "generator.pt")["model"].values()
                for path in (alone, tmp_path / "ranks"))
    assert sum((p - q).norm() for p, q in zip(one, two)) <= 3e-4 * sum(p.norm() for p in one)


@pytest.fixture
def captioned(tmp_path):
    folder = Path(photographs(tmp_path, 4, ["captioned"]), "captioned")
    for i, text in enumerate(("a dog", "the sea", "red", "a cat")):
        (folder / f"{i}.txt").write_text(text + "\n")
    return folder


def test_clip_score_of_text(pipeline, tmp_path, capsys):
    transformers, tokenizer = pytest.importorskip("transformers"), pipeline.pipe.tokenizer
    config = transformers.CLIPConfig(
        text_config=pipeline.pipe.text_encoder.config.to_dict(), projection_dim=8,
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, image_size=16, patch_size=8))
    size, model = dict(height=16, width=16), transformers.CLIPModel(config).eval()
    processor = transformers.CLIPImageProcessor(size=size, crop_size=size)
    for part in (model, transformers.CLIPProcessor(processor, tokenizer)):
        part.save_pretrained(tmp_path / "clip")
    sample.main([pipeline.folder, "--prompts", pipeline.prompts, "--n", "3", "--steps", "2",
                 "--clip", str(tmp_path / "clip"), "--out", str(tmp_path / "x.npz")])
    score = float(re.search(r"CLIP score (-?[\d.]+): 3 images", capsys.readouterr().out)[1])
    with np.load(tmp_path / "x.npz") as file, torch.no_grad():
        pixels = processor([*file["images"]], return_tensors="pt")
        tokens = tokenizer([PROMPTS[c] for c in file["labels"]], padding=True, return_tensors="pt")
        cosines = model(**pixels, **tokens).logits_per_image / model.logit_scale.exp()
    assert score == pytest.approx(100 * cosines.diagonal().mean().item(), abs=0.006)


def test_text_of_images_beside_them_or_in_one_file(captioned, pipeline, tmp_path):
    codec = teacher.build(pipeline.checkpoint["autoencoder"])
    facts, prompts = dict(name=captioned, size=16, data_dir=tmp_path, classes=()), sample.Prompts(
        Path(pipeline.folder), PROMPTS)
    captions = ["a dog", "the sea", "red", "a cat"]
    latents, rows, *_ = sample.load_captioned(facts, codec, prompts, "cpu")
    assert latents.shape == (4, 4, 8, 8) and equal(prompts.table[rows], prompts.tokens(captions))
    (captioned / "metadata.jsonl").write_text('{"file_name": "0", "text": null}\n\n' + "\n".join(
        json.dumps(dict(file_name=f"{i}.png", text=text)) for i, text in enumerate(captions[::-1])))
    for _ in range(2):  # the second time from what the first kept
        again, rows, *_ = sample.load_captioned(facts, codec, prompts, "cpu")
        assert equal((again, prompts.table[rows]), (latents, prompts.tokens(captions[::-1])))
        codec.encode = None


def check_turn(v, name, teacher_, fake, x0, sigma, label, noise, tolerance=2e-5):
    """Distribution matching of x0 is the official code's."""
    near(dmd2.dmd_gradient(teacher_, fake, x0, sigma, label, noise), v[f"{name}/gradient"],
         tolerance)
    loss = dmd2.dmd_loss(teacher_, fake, x0, sigma, label, noise)
    near(loss.detach(), v.get(f"{name}/loss", v.get(f"{name}/loss_dm")), 5e-6)
    return loss


@pytest.mark.parametrize("name, guidance", [("closed_sd15", 1.75), ("closed_sdxl", 8.0)])
def test_official_distribution_matching_of_text(name, guidance):
    v, sigmas = vectors("sd_vectors"), teacher.timestep_sigmas("scaled_linear")
    close(sigmas, (1 / v["alphas_cumprod"].double() - 1).sqrt(), rtol=1e-6, atol=0)
    text = torch.cat([v[f"{name}/text"], v[f"{name}/uncond"][:1]]).mean((1, 2))

    def closed(a, b):
        def net(x, c_noise, label, decode=True):
            wave = torch.sin(sample.timestep_of(4 * c_noise, sigmas.log().float()) / 100)
            return a * x + (b * wave + text[label]).view(-1, 1, 1, 1), x
        return teacher.Denoiser(net, "eps")
    fake, guide = closed(0.8, 0.1), sample.Guided(closed(0.9, 0.2), guidance, 3)
    sigma, x0 = sigmas[v[f"{name}/timesteps"]].float(), v[f"{name}/latents"].requires_grad_(True)
    check_turn(v, name, guide, fake, x0, sigma, torch.arange(3), v[f"{name}/noise"]).backward()
    near(x0.grad, v[f"{name}/latents_grad"], 2e-5)
    sigma, x0 = sigmas[v[f"{name}_fake/timesteps"]].float(), x0.detach()
    x0_hat = fake(x0 + sigma.view(-1, 1, 1, 1) * v[f"{name}_fake/noise"], sigma, torch.arange(3))
    near(teacher.unit_error("eps", x0_hat, x0, sigma), v[f"{name}_fake/loss"], 3e-6)


@pytest.mark.parametrize("name, timesteps, guidance, tolerance", [
    ("turn_sd15", [999], 1.75, 2e-5), ("turn_sdxl_399", [399], 8.0, 1e-5),
    ("turn_sdxl_4step", [999, 749, 499, 249], 8.0, 3e-4)])
def test_official_turns_of_text(name, timesteps, guidance, tolerance):
    """A generator's and a fake score's update of the official code: images, losses, gradients."""
    diffusers, v = pytest.importorskip("diffusers"), vectors("sd_vectors")
    kind, sigmas = name.split("_")[1], teacher.timestep_sigmas("scaled_linear")
    source = "turn_sdxl_399" if kind == "sdxl" else name

    def table(part):
        found = torch.cat([v[f"{source}/{part}"], v[f"{source}/real_{part}"]])
        return torch.cat([found, v.get(f"{source}/uncond", torch.zeros_like(found[:1]))])
    text, pooled = table("text"), table("pooled") if kind == "sdxl" else None
    prompts = types.SimpleNamespace(
        encoded=lambda label: (text[label], None if pooled is None else pooled[label]))
    config = json.loads(str(np.load(SHARED / "vectors/sd_vectors.npz")[f"{kind}/unet_config"]))

    def weights_of(part, factor=1):
        return {key.removeprefix(f"{kind}/{part}/"): factor * value.float()
                for key, value in v.items() if key.startswith(f"{kind}/{part}/")}

    def denoiser(factor):
        unet = diffusers.UNet2DConditionModel(**config).eval()
        unet.load_state_dict(weights_of("unet", factor))
        network = dict(img_resolution=8, pixels=v["sdxl/time_ids"][0, 0].item())
        return teacher.Denoiser(sample.TextUNet(unet, prompts, network), "eps")
    guide, fake, generator = sample.Guided(denoiser(1), guidance, 4), denoiser(1.05), denoiser(0.95)
    discriminator = dmd2.Discriminator(fake)
    discriminator.head.load_state_dict(weights_of("head"))
    discriminator.head[1].eps = 1e-5  # the official group norm's

    def logits(x0, timestep, noise, label):
        sigma = sigmas[timestep].float()
        return discriminator(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, label)
    label, real_label = torch.arange(2), torch.arange(2, 4)
    levels, several = [sigmas[t].item() for t in timesteps], len(timesteps) > 1
    drawn = [v[f"{name}/drawn_{i}"] for i in range(9 if several else 4)]
    k, earlier = (2, [drawn[1], drawn[3]]) if several else (0, [])  # noise of the steps before k
    normals = iter([*earlier, v[f"{name}/noise"]])
    x, sigma = dmd2.step_input(
        generator, levels, teacher.start_scale("scaled_linear", levels[0]), 1.0, k, label,
        types.SimpleNamespace(normal=lambda: next(normals)))
    x0 = generator(x, sigma, label)
    near(x0.detach(), v[f"{name}/generated"], 1e-6)
    timestep, noise, gan_timestep, gan_noise = drawn[-4:]
    loss = check_turn(v, name, guide, fake, x0, sigmas[timestep].float(), label, noise, tolerance)
    gan_loss = dmd2.generator_loss(logits(x0, gan_timestep, gan_noise, label))
    near(gan_loss.detach(), v[f"{name}/gen_cls_loss"], 3e-6)
    (loss + 0.1 * gan_loss).backward()
    near(generator.net.unet.conv_in.weight.grad, v[f"{name}/generator_conv_in_grad"], tolerance)
    fake.zero_grad()
    x0, drawn = x0.detach(), [v[f"{name}_guidance/drawn_{i}"] for i in range(6)]
    sigma = sigmas[drawn[1]].float()
    loss = teacher.denoising_loss(fake, x0, sigma, label, drawn[0])
    near(loss.detach(), v[f"{name}_guidance/loss_fake_mean"], 3e-6)
    gan_loss = dmd2.discriminator_loss(logits(v[f"{name}/real"], *drawn[2:4], real_label),
                                       logits(x0, *drawn[4:], label))
    near(gan_loss.detach(), v[f"{name}_guidance/guidance_cls_loss"], 3e-6)
    (loss + 0.01 * gan_loss).backward()
    near(fake.net.unet.conv_in.weight.grad, v[f"{name}_guidance/fake_conv_in_grad"], 3e-6)


def export_texts(folder):
    """Tokens to image: SD1.5's in float16, SDXL's with its weights beside it."""
    export.LARGE = 2**20  # between the two files; in a child alone, as this stays changed
    for name, flags in (("sd15", ["--fp16"]), ("sdxl", [])):
        make_pipeline(folder / name, name == "sdxl")
        distil_pipeline(folder / name, folder / f"{name}_run", "--lora 4 --steps 1")
        export.main([f"{folder}/{name}_run/generator.pt", "--out", f"{folder}/{name}.onnx", *flags])


@pytest.mark.parametrize("name, tolerance", [("sd15", 1e-2), ("sdxl", 1e-5)])
@group("text")
def test_text_to_image_is_one_onnx_file(name, tolerance, once):
    pytest.importorskip("diffusers"), pytest.importorskip("peft")
    folder, xl = once(export_texts), name == "sdxl"
    sampler = sample.load_sampler(f"{folder}/{name}_run/generator.pt")
    session, facts = sample.onnx_session(folder / f"{name}.onnx")
    tokens = sampler.denoiser.net.prompts.tokens(["red", "a dog", ""] * 22)
    noise = torch.randn(66, *sampler.shape, generator=teacher.seeded(0))
    feed = dict(noise=noise.numpy(), tokens=tokens.numpy())
    (image,), expected = session.run(None, feed), sampler.decode(sampler.x0(iter([noise]), tokens))
    assert abs(image - expected.clamp(-1, 1).numpy()).max() <= tolerance
    assert facts["tokens"]["shape"] == ["batch", *[2] * xl, 77]
    assert Path(folder, f"{name}.onnx.data").exists() == xl


# ---- gpu ----------------------------------------------------------------------------------------

def cpu_draw(stream, seed, step, batch, shape, device, part, Draw=teacher.Draw):
    """Draws on the CPU, whatever device the numbers are for, so that losses on two compare."""
    draw = Draw(stream, seed, step, batch, shape, "cpu", part)
    return types.SimpleNamespace(**{
        name: lambda *args, name=name: getattr(draw, name)(*args).to(device)
        for name in ("uniform", "normal", "label")})


@pytest.fixture(params=["teacher", "dmd2"])
def compared(request, tmp_path, monkeypatch):
    """A script's name, and a run of it of 15 steps by the CPU's random numbers: flags -> folder"""
    def run(*flags, device="cpu", tf32=False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        out = tmp_path / f"run{next(runs)}"
        argv = flags if "--resume" in flags else [*first, *flags, "--out", out]
        sys.modules[request.param].main([*map(str, argv), "--device", device])
        return out
    first, runs = "--steps 15 --warmup 10 --log-every 1 --sample-every 0".split(), itertools.count()
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    for module in (teacher, dmd2):
        monkeypatch.setattr(module, "Draw", cpu_draw)
    if request.param == "dmd2":
        teacher.main([*first, "--device", "cpu", "--out", str(tmp_path / "teacher")])
        first += ["--teacher", tmp_path / "teacher" / "teacher.pt", "--evaluate-every", "0",
                  "--regression-steps", "0", "--regression-weight", "0"]
    yield request.param, run
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True
    torch.compiler.reset()


def difference(one, other):
    """The largest relative difference of two runs' losses."""
    return max(abs(line[name] - same[name]) / max(abs(same[name]), 1e-3)
               for line, same in zip(log_of(one), log_of(other), strict=True)
               for name in line if name.endswith("loss"))


@gpu
@pytest.mark.parametrize("flags, tf32, tolerance", [
    ("--dtype float32", False, 2e-3), ("--dtype float32", True, 0.03),
    ("--dtype bfloat16 --compile", True, 0.1), ("--dtype float16", True, 0.05)])
def test_losses_on_a_gpu(flags, tf32, tolerance, compared):
    _, run = compared
    assert difference(run(*flags.split(), device="cuda", tf32=tf32), run()) < tolerance


@gpu
def test_resume_on_a_gpu(compared):
    name, run = compared
    whole, parts = run(device="cuda"), run("--save-every", 6, device="cuda")
    run("--resume", (parts / RESUMABLE[name]).with_suffix(".1.pt"), device="cuda")  # of step 12
    assert difference(parts, whole) < 2e-3


@gpu
@pytest.mark.parametrize("flags, tolerance", [
    ("--dtype float32", 2e-3), ("--lora 4 --checkpointing --dtype float32", 2e-3),
    ("--lora 4 --dtype bfloat16 --student-steps 4 --guidance 2", 0.1)])
def test_text_losses_on_a_gpu(flags, tolerance, distil_text, monkeypatch):
    monkeypatch.setattr(dmd2, "Draw", cpu_draw)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    runs = [distil_text(f"{flags} --steps 4 --device {d}", d) for d in ("cuda", "cpu")]
    assert difference(*runs) < tolerance


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path):
    argv = [*TINY, "--device", "cuda", "--out"]
    teacher.main([*argv, f"{tmp_path}/one"])
    as_ranks("teacher", [*argv, tmp_path / "two"], tmp_path)
    assert difference(tmp_path / "two", tmp_path / "one") < 0.03


# ---- the house ----------------------------------------------------------------------------------

def test_imports_form_a_line():
    allowed = dict(teacher="", sample="teacher", dmd2="teacher sample", export="teacher sample")
    for name, may in allowed.items():
        found = re.findall(r"^\s*(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), re.M)
        assert {*found} & {*allowed} <= {*may.split()}, name


def distil_digits(folder):
    flags = "--device cpu --sample-every 0".split()
    teacher.main([*flags, "--steps", "400", "--out", f"{folder}/teacher"])
    dmd2.main([*flags, "--steps", "500", "--evaluate-every", "0", "--out", f"{folder}/dmd2",
               "--pairs", "1000", "--teacher", f"{folder}/teacher/teacher.pt"])


@group("digits")  # on one worker of pytest-xdist and, as it is larger, first
def test_digits_for_a_minute(once):
    folder = once(distil_digits)
    samplers = [sample.load_sampler(folder / path)
                for path in ("teacher/teacher.pt", "dmd2/generator.pt")]
    reference = sample.load_reference(samplers[0].data)
    real, fake = (sample.measure(sampler, reference, 1000, 0) for sampler in samplers)
    assert real["frechet_distance"] < 1.2 and real["accuracy"] > 0.9
    assert fake["frechet_distance"] < 1.2 * real["frechet_distance"]
    assert fake["accuracy"] > real["accuracy"] - 0.02 and fake["recall"] > 0.75 * real["recall"]


@group("digits")
def test_yardstick_ranks_as_pixels_and_random_features_do(once):
    """By Spearman's correlation, over samplers of a teacher and its generator."""
    folder = once(distil_digits)
    path, options = folder / "teacher" / "teacher.pt", [
        *(dict(steps=steps) for steps in (2, 3, 4, 6, 12)), dict(sampler="ddpm", steps=20),
        dict(sampler="ddim", steps=6), *(dict(steps=6, guidance=g) for g in (1.5, 3.0))]
    samplers = [sample.load_sampler(path, cfg=sample.Config(checkpoint=path, **given))
                for given in options] + [sample.load_sampler(folder / "dmd2" / "generator.pt")]
    reference = sample.load_reference(samplers[0].data)
    found = np.stack([distances(sample.generate(s, reference.labels[:600], 0), reference)
                      for s in samplers])
    ranks = found.argsort(0).argsort(0)
    assert (np.corrcoef(ranks.T)[0] >= 0.8).all(), found


SIZES = dict(teacher=[*TINY, "--sample-every", "4"], export=[], sample=["--seeds", "1"],
             dmd2=[*TINY_DMD, "--sample-every", "4", "--pairs", "20"])


@pytest.mark.parametrize("optional", [False, pytest.param(True, id="text")])
def test_readme_s_commands_run(optional, tmp_path, monkeypatch):
    """And the snippets, in order, those that need diffusers or the others, with small sizes put
    behind each; others' checkpoints are small ones, and all data but the digits are noise."""
    def noise(name, split, data_dir="data", size=None):
        side = 28 if name in ("mnist", "fashion") else size or 32
        images = torch.rand(200, 1 if side == 28 else 3, side, side, generator=teacher.seeded(0))
        return load_data(name, split) if name == "digits" else teacher.Data(
            teacher.to_uint8(images), torch.arange(200) % 10, tuple("0123456789"))
    monkeypatch.chdir(tmp_path)
    load_data, train_features = teacher.load_data, sample.train_features
    samplers = {name: (f, title, 3, own) for name, (f, title, _, own) in sample.SAMPLERS.items()}
    for module, name, replacement in (
            (teacher, "load_data", noise), (sample, "load_data", noise), (teacher, "HEUN_STEPS", 3),
            (sample, "SAMPLERS", samplers), (teacher, "plot_log", lambda path: None),
            (sample, "train_features", lambda *args, **to: train_features(*args, steps=5, **to))):
        monkeypatch.setattr(module, name, replacement)
    network = dict(TINY_EDM["edm_ddpmpp_tiny"], img_resolution=32)
    for name in re.findall(r"[\w.-]+\.pkl", README):
        checkpoint = edm_checkpoint(network, teacher.UNet(**network).state_dict())
        Path(name).write_bytes(pickle.dumps(checkpoint))
    if optional:
        make_pipeline(Path("stable-diffusion-v1-5/stable-diffusion-v1-5"), xl=False)
        make_pipeline(Path(xl := "stabilityai/stable-diffusion-xl-base-1.0"), xl=True)
        checkpoint = sample.open_checkpoint(xl, prompts=shutil.copy("stabilityai/prompts.txt", "."))
        generator = sample.with_adapter(sample.build_any(checkpoint), 4, 8)
        sample.write_student(generator, Path("generator.pt"))
        os.rename("pytorch_lora_weights.safetensors", "dmd2_sdxl_4step_lora_fp16.safetensors")
    lines, ran = "".join(re.findall(r"```sh\n(.*?)```", README, re.S)).splitlines(), set()
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    for program, *words in filter(None, parts):
        of_text = any("stable-diffusion" in word or "runs/text" in word for word in words)
        if optional != (of_text or bool(re.search("autoencoder|latent", " ".join(words)))):
            continue
        if program == "torchrun":  # has tests of its own
            program, words = "python", words[2:]
        if program != "python" or words[0] == "-m":
            assert program in ("pip", "pytest", "git", "cd", "npm", "cp", "python"), program
            continue
        script, n = Path(words.pop(0)).stem, "100" if "--evaluate" in words else "20"
        words += ["--steps", "6"] if "--resume" in words else SIZES[script]
        words += ["--n", "2" if of_text else n] if script == "sample" else []
        if of_text and script == "dmd2":
            words += "--gan-weight 0 --evaluate-every 0 --steps 2 --batch 2 --accumulate 2".split()
        if script == "export" in ran:  # has tests of its own, and takes seconds
            assert Path(teacher.parse(export.Config, words).checkpoint).exists()
            continue
        sys.modules[script].main(words)
        ran.add(script)
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        if optional == ("diffusers" in snippet):
            exec(snippet, {})
    assert ran == ({"teacher", "sample", "dmd2"} if optional else {*SIZES})
    assert all((ROOT / name).exists() for name in re.findall(r"assets/[\w.]+\w", README))
