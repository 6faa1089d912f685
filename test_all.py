"""What the scripts promise. `pytest test_all.py`: 8 minutes on two idle cores, no GPU.

Wherever it can, a closed-form denoiser stands in for the network: that of data N(mean, std^2).
`pytest test_all.py -m slow` tries hundreds of faults where the others try dozens.
"""

import ast
import collections
import concurrent.futures
import copy
import ctypes
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dmd2
import export
import sample
import teacher

ROOT = Path(__file__).resolve().parent
SHARED = ROOT.parent / "shared"
README = (ROOT / "README.md").read_text()
TINY = "--steps 4 --batch 16 --width 8 --sample-every 0 --log-every 1".split()
TINY_DMD = "--steps 4 --batch 16 --evaluate-n 100 --sample-every 0 --log-every 1".split()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that nobody registered the mark
    slow = pytest.mark.slow

DIGITS = dict(name="digits", size=None, shape=(1, 8, 8), classes=tuple("0123456789"))


def vectors(name):
    path = SHARED / "vectors" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"needs {path.name}, numbers of the reference implementations")
    return {key: torch.from_numpy(value) for key, value in np.load(path).items()}


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


class Stub(nn.Module):
    """A denoiser that returns what it is told to."""

    prediction = "edm"

    def __init__(self, x0_hat):
        super().__init__()
        self.x0_hat = x0_hat

    def forward(self, x, sigma, label):
        return self.x0_hat


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny teacher, generator, ONNX file; random weights, so that each matters."""
    folder = tmp_path_factory.mktemp("tiny")
    teacher.main([*TINY, "--out", f"{folder}/teacher"])
    checkpoint = teacher.load(f"{folder}/teacher/teacher.pt")
    rng = torch.Generator().manual_seed(0)
    for weight in checkpoint["model"].values():
        weight += 0.15 * torch.randn(weight.shape, generator=rng)
    teacher.save(checkpoint, f"{folder}/teacher/teacher.pt")
    dmd2.main([*TINY_DMD, "--teacher", f"{folder}/teacher/teacher.pt", "--out", f"{folder}/dmd2"])
    export.main([f"{folder}/dmd2/generator.pt"])
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tiny):
    return str(tiny / "teacher" / "teacher.pt")


@pytest.fixture(scope="session")
def tiny_generator(tiny):
    return str(tiny / "dmd2" / "generator.pt")


@pytest.fixture(autouse=True)
def only_if_asked_for(request):
    if request.node.get_closest_marker("slow") and "slow" not in request.config.option.markexpr:
        pytest.skip("tries hundreds of faults; pytest test_all.py -m slow")


@pytest.fixture
def curves():
    """For tests of loss.png; in the others it is not drawn, as that would be most of their time."""


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(teacher, "plot_log", lambda path: None)


@pytest.fixture(scope="session")
def faults(request):
    """How many faults were tried, by kind; told at the end, as the README's table has them."""
    counts = collections.Counter()
    yield counts
    if counts:
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n\nfaults tried and survived, nothing lost:")
            print("\n".join(f"{count:7,} {kind}" for kind, count in counts.items()))


@pytest.fixture(autouse=True, scope="session")
def cpu_only():
    """The same tests on every machine; what needs a GPU says so and asks for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)
        yield


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def equal(a, b):
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# ---- noise levels, preconditioning, loss --------------------------------------------------------

def test_karras_schedule_is_the_official_table_of_1000_levels():
    expected = vectors("dmd2_losses")["karras_sigmas_ascending"]
    torch.testing.assert_close(teacher.sigma_at(torch.linspace(0, 1, 1000), "karras"), expected,
                               rtol=2e-5, atol=0)


def test_lognormal_schedule_has_edm_s_quantiles():
    u = torch.tensor([0.5, 0.8413447])  # the mean and one standard deviation above it
    expected = torch.tensor([math.exp(-1.2), 1.0])
    torch.testing.assert_close(teacher.sigma_at(u, "lognormal"), expected)


@pytest.mark.parametrize("schedule, low, high", [
    ("lognormal", 0.002, 80), ("karras", 0.002, 80), ("linear", 0.0100, 157.407),
    ("cosine", 0.006427, 20291), ("sigmoid", 0.01733, 1825), ("flow", 0.001001, 999)])
def test_schedules_rise_from_end_to_end_of_their_noise_ranges(schedule, low, high):
    for dtype in (torch.float32, torch.float64):
        sigma = teacher.sigma_at(torch.linspace(0, 1, 5001, dtype=dtype), schedule)
        assert sigma.dtype == dtype and (sigma.diff() >= 0).all()
        assert [sigma[0].item(), sigma[-1].item()] == pytest.approx([low, high], rel=1e-3)


@pytest.mark.parametrize("schedule, alpha_bars", [
    ("linear", {0: 0.9999, 499: 0.0786, 999: 4.0358e-5}),        # Ho et al. 2020
    ("cosine", {0: 0.999959, 499: 0.493844, 989: 2.4287e-4}),    # f(t) / f(0), by hand
    ("sigmoid", {0: 0.9997, 249: 0.850853, 499: 0.5, 749: 0.149147})])
def test_schedules_of_ddpm_have_their_alpha_bars(schedule, alpha_bars):
    for step, alpha_bar in alpha_bars.items():
        sigma = teacher.sigma_at(torch.tensor(step / 999, dtype=torch.float64), schedule).item()
        assert 1 / (1 + sigma**2) == pytest.approx(alpha_bar, rel=2e-4), step


@pytest.mark.parametrize("schedule, name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_levels_are_those_of_diffusers(schedule, name):
    u = torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(teacher.sigma_at(u, schedule), vectors("samplers")[f"{name}_sigmas"],
                               rtol=1e-3, atol=0)  # its betas are float32


def test_flow_s_quantiles_are_its_time():
    u = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    sigma = teacher.sigma_at(u, "flow")
    torch.testing.assert_close(sigma / (1 + sigma), 0.001 + 0.998 * u)


@pytest.mark.parametrize("schedule", teacher.SCHEDULES)
@pytest.mark.parametrize("prediction", teacher.PREDICTIONS)
def test_every_prediction_is_finite_at_both_ends_of_every_schedule(prediction, schedule):
    torch.manual_seed(0)
    denoiser = teacher.Denoiser(teacher.UNet(8, 1, 10, 8, (1, 2), 1, (4,)), prediction)
    sigma, label = teacher.sigma_at(torch.tensor([0.0, 1.0]), schedule), torch.tensor([0, 10])
    x0, noise = torch.rand(2, 1, 8, 8) * 2 - 1, torch.randn(2, 1, 8, 8)
    for gamma in (None, 5.0):
        loss = teacher.denoising_loss(denoiser, x0, sigma, label, noise, gamma)
        gradients = torch.autograd.grad(loss, list(denoiser.parameters()))
        assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert denoiser(x0 + sigma.view(-1, 1, 1, 1) * noise, sigma, label).isfinite().all()


@pytest.mark.parametrize("prediction, target", [
    ("eps", lambda x0, noise, s: noise), ("x0", lambda x0, noise, s: x0),
    ("v", lambda x0, noise, s: (noise - s * x0) / (1 + s**2).sqrt()),
    ("flow", lambda x0, noise, s: noise - x0)])
def test_f_learns_what_the_field_calls_the_prediction(prediction, target):
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64).view(-1, 1, 1, 1)
    c_skip, c_out, _ = teacher.precondition(prediction, sigma)
    x = x0 + sigma * noise
    torch.testing.assert_close((x0 - c_skip * x) / c_out, target(x0, noise, sigma))


@pytest.mark.parametrize("prediction", teacher.PREDICTIONS)
def test_min_snr_weighs_the_error_of_x0_by_the_clamped_snr(prediction):
    x0, x0_hat = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 10.0], dtype=torch.float64)  # SNR 100, 4, 0.01
    errors = (x0_hat - x0).square().mean((1, 2, 3))
    expected = (errors * torch.tensor([5.0, 4.0, 0.01], dtype=torch.float64)).mean()
    torch.testing.assert_close(teacher.unit_error(prediction, x0_hat, x0, sigma, 5.0), expected)


@pytest.mark.parametrize("prediction", teacher.PREDICTIONS)
def test_loss_is_the_error_of_f_against_its_own_target(prediction):
    sigma = torch.tensor([0.002, 0.5, 80.0]).view(-1, 1, 1, 1)
    c_skip, c_out, c_in = teacher.precondition(prediction, sigma)
    x0, noise, f = torch.randn(3, 3, 1, 4, 4, dtype=torch.float64)
    x = x0 + sigma * noise
    target = (x0 - c_skip * x) / c_out
    denoiser = Stub(c_skip * x + c_out * f)
    denoiser.prediction = prediction
    loss = teacher.denoising_loss(denoiser, x0, sigma.flatten(), None, noise)
    torch.testing.assert_close(loss, (f - target).square().mean())


def test_edm_coefficients_give_unit_variance_in_and_out():
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    c_skip, c_out, c_in = teacher.precondition("edm", sigma)
    var = teacher.SIGMA_DATA**2
    torch.testing.assert_close(c_in**2 * (var + sigma**2), torch.ones(3, dtype=torch.float64))
    target_var = ((1 - c_skip) ** 2 * var + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_var, torch.ones(3, dtype=torch.float64))


def test_fake_score_loss_is_the_official_one():
    v = vectors("dmd2_losses")
    sigma = v["fake/sigma"].view(-1, 1, 1, 1)
    loss = teacher.denoising_loss(Stub(v["fake/pred_x0"]), v["fake/x"], v["fake/sigma"], None,
                                  (v["fake/noisy"] - v["fake/x"]) / sigma)
    torch.testing.assert_close(loss, v["fake/loss"], rtol=1e-5, atol=0)


def test_exact_denoiser_has_the_lowest_loss():
    x0, noise = torch.randn(2, 512, 1, 4, 4)
    sigma = teacher.sigma_at(torch.rand(512), "karras")
    losses = [teacher.denoising_loss(Gaussian(mean, std), 0.3 + 0.5 * x0, sigma, None, noise)
              for mean, std in ((0.3, 0.5), (0.4, 0.5), (0.3, 0.6), (0.3, 0.4))]
    assert min(losses) == losses[0]


# ---- network ------------------------------------------------------------------------------------

TINY_EDM = {  # of ../shared/vectors: what made these networks
    "edm_ddpmpp_tiny": dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=16,
                            channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8],
                            model_type="SongUNet"),
    "edm_ddpmpp_tiny_uncond": dict(img_resolution=8, img_channels=1, label_dim=0, model_channels=16,
                                   channel_mult=[1, 1], num_blocks=1, attn_resolutions=[],
                                   model_type="SongUNet"),
    "edm_adm_tiny": dict(img_resolution=16, img_channels=3, label_dim=5, model_channels=64,
                         channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8],
                         model_type="DhariwalUNet"),
}


def edm_state(v):
    return {key.removeprefix("state/model."): value for key, value in v.items() if "state/" in key}


@pytest.mark.parametrize("name", TINY_EDM)
def test_unet_is_edm_s(name):
    v, label_dim = vectors(name), TINY_EDM[name]["label_dim"]
    denoiser = teacher.Denoiser(teacher.UNet(**TINY_EDM[name]))
    denoiser.net.load_state_dict({key: value for key, value in edm_state(v).items()
                                  if not key.endswith("resample_filter") and "augment" not in key})
    label = v.get("in/label", torch.zeros(len(v["in/x"]), dtype=torch.long))
    with torch.no_grad():
        torch.testing.assert_close(denoiser(v["in/x"], v["in/sigma"], label), v["out/denoised"],
                                   rtol=0, atol=1e-5)
        if label_dim:
            no_label = torch.full_like(label, label_dim)
            torch.testing.assert_close(denoiser(v["in/x"], v["in/sigma"], no_label),
                                       v["out/denoised_no_label"], rtol=0, atol=1e-5)


def test_new_denoiser_is_c_skip_x_whose_loss_is_about_1():
    torch.manual_seed(0)
    denoiser = teacher.Denoiser(teacher.UNet(8, 1, 10, 16, (1, 2), 1, (4,)))
    x0, noise = torch.randn(2, 64, 1, 8, 8)
    sigma = torch.full((64,), 1.0)
    label = torch.zeros(64, dtype=torch.long)
    assert 0.9 < teacher.denoising_loss(denoiser, 0.5 * x0, sigma, label, noise) < 1.1


def test_denoiser_keeps_shape_and_type_at_both_ends_of_sigma_and_batch_1():
    denoiser = teacher.Denoiser(teacher.UNet(28, 3, 7, 8, (1, 2, 2), 1, (7,))).eval()
    for sigma in (teacher.SIGMA_MIN, teacher.SIGMA_MAX):
        out = denoiser(torch.randn(1, 3, 28, 28, dtype=torch.float64), torch.tensor([sigma]),
                       torch.tensor([7]))
        assert out.shape == (1, 3, 28, 28) and out.dtype == torch.float32 and out.isfinite().all()


def test_unet_names_the_sides_that_work():
    with pytest.raises(ValueError, match="multiple of 4, such as 28 or 32; or give --mults 1,2"):
        teacher.UNet(30, 1, 10, 8, (1, 2, 2), 1, ())


# ---- EDM's checkpoints --------------------------------------------------------------------------

class Persistent:
    """An object as EDM's torch_utils.persistence pickles them."""

    def __init__(self, class_name, **state):
        self.meta = dict(type="class", version=6, module_src="raise SystemExit('executed')",
                         class_name=class_name, state=state)

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class Reduced:
    """An object that is pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def persistence(monkeypatch):
    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called")

    module = types.ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


def persistent_module(state, class_name="Conv2d", **attributes):
    """A module with the parameters of a state dict, those of its parts in parts."""
    parts, parameters, buffers = {}, {}, {}
    for name, value in state.items():
        first, _, rest = name.partition(".")
        if rest:
            parts.setdefault(first, {})[rest] = value
        elif first == "resample_filter":
            buffers[first] = value
        else:
            parameters[first] = nn.Parameter(value)
    modules = {}
    for name, part in parts.items():
        if name in ("enc", "dec"):
            modules[name] = nn.ModuleDict()
            modules[name]._modules.update(persistent_module(part).meta["state"]["_modules"])
        else:
            modules[name] = persistent_module(part)
    return Persistent(class_name, training=False, _parameters={"bias": None, **parameters},
                      _buffers=buffers, _modules=modules, skip_scale=np.sqrt(0.5), **attributes)


def edm_checkpoint(network, state, extra=(), precond="EDMPrecond", weights={}, **kwargs):
    """What EDM pickles of a network with the arguments of UNet and EDM's state dict."""
    kwargs = {**network, **kwargs}
    channels = kwargs.pop("img_channels")
    net = persistent_module(state, kwargs.pop("model_type", "SongUNet"),
                            _init_kwargs=dict(kwargs, in_channels=channels, out_channels=channels))
    net.meta["state"]["_parameters"].update(weights)
    net = Persistent(precond, sigma_data=0.5, _parameters={}, _buffers={}, _modules=dict(model=net))
    return dict(ema=net, loss_fn=None, dataset_kwargs=dict(path="a.zip"), **dict(extra))


@pytest.fixture
def edm_pkl(persistence, tmp_path):
    """A small conditional network of the digits' shape as an EDM checkpoint."""
    torch.manual_seed(0)
    network = dict(img_resolution=8, img_channels=1, label_dim=10, model_channels=16,
                   channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    net = teacher.UNet(**network)
    state = {name: value + 0.1 * torch.randn_like(value) for name, value in
             net.state_dict().items()}
    path = tmp_path / "edm.pkl"
    path.write_bytes(pickle.dumps(edm_checkpoint(network, state)))
    return types.SimpleNamespace(path=str(path), network=network, state=state)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", TINY_EDM)
def test_pickle_of_edm_is_its_denoiser(name, protocol, persistence, tmp_path):
    v = vectors(name)
    content = pickle.dumps(edm_checkpoint(TINY_EDM[name], edm_state(v)), protocol)
    (tmp_path / "edm.pkl").write_bytes(content)
    checkpoint = sample.open_checkpoint(tmp_path / "edm.pkl")
    assert checkpoint["network"] == TINY_EDM[name]
    label = v.get("in/label", torch.zeros(len(v["in/x"]), dtype=torch.long))
    x0_hat = teacher.build(checkpoint)(v["in/x"], v["in/sigma"], label)
    torch.testing.assert_close(x0_hat, v["out/denoised"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("network, parameters, keys, shapes", [
    (dict(img_resolution=32, label_dim=10, model_channels=128, channel_mult=[2, 2, 2],
          num_blocks=4, attn_resolutions=[16]), 55_735_299 - 128 * 9, 427 - 8 - 1,
     {"map_label.weight": [128, 10], "map_layer0.weight": [512, 128],
      "enc.32x32_conv.weight": [128, 3, 3, 3], "enc.32x32_block0.skip.weight": [256, 128, 1, 1],
      "enc.16x16_down.skip.weight": [256, 256, 1, 1], "enc.16x16_block3.qkv.weight":
      [768, 256, 1, 1], "dec.16x16_block4.proj.weight": [256, 256, 1, 1],
      "dec.32x32_block4.conv0.weight": [256, 384, 3, 3], "dec.32x32_aux_conv.weight":
      [3, 256, 3, 3]}),
    (dict(img_resolution=64, label_dim=1000, model_channels=192, channel_mult=[1, 2, 3, 4],
          num_blocks=3, attn_resolutions=[32, 16, 8], model_type="DhariwalUNet"), 295_899_267,
     553 - 12,
     {"map_label.weight": [768, 1000], "map_layer0.weight": [768, 192],
      "enc.64x64_conv.weight": [192, 3, 3, 3], "enc.8x8_block2.affine.weight": [1536, 768],
      "dec.8x8_block3.conv0.weight": [768, 1344, 3, 3], "dec.16x16_block0.qkv.weight":
      [1728, 576, 1, 1], "dec.64x64_block3.conv0.weight": [192, 384, 3, 3],
      "out_conv.weight": [3, 192, 3, 3]})])
def test_networks_of_full_size_have_the_published_names_and_shapes(network, parameters, keys,
                                                                   shapes):
    """Without EDM's resampling filters, which are constants, and its map_augment."""
    with torch.device("meta"):
        state = teacher.UNet(img_channels=3, **network).state_dict()
    assert len(state) == keys and sum(value.numel() for value in state.values()) == parameters
    assert {name: list(state[name].shape) for name in shapes} == shapes


def test_edm_checkpoint_is_sampled_distilled_and_exported(edm_pkl, tmp_path, capsys):
    sample.main([edm_pkl.path, "--n", "10", "--steps", "3", "--out", str(tmp_path / "a.png")])
    for main, flags in ((sample.main, [edm_pkl.path, "--evaluate"]),
                        (sample.main, [edm_pkl.path, "--beside", edm_pkl.path]),
                        (dmd2.main, ["--teacher", edm_pkl.path])):
        with pytest.raises(ValueError, match="--data is missing: .*edm.pkl does not tell"):
            main(flags)
    with pytest.raises(ValueError, match="10 classes of images .1, 8, 8.; .*edm.pkl has 7"):
        network = dict(edm_pkl.network, label_dim=7)
        state = dict(edm_pkl.state, **{"map_label.weight": torch.zeros(16, 7)})
        (tmp_path / "7.edm.pkl").write_bytes(pickle.dumps(edm_checkpoint(network, state)))
        sample.main([str(tmp_path / "7.edm.pkl"), "--data", "digits"])
    sample.main([edm_pkl.path, "--data", "digits", "--evaluate", "--n", "100", "--seeds", "1",
                 "--sampler", "ddim", "--steps", "3"])
    assert "teacher, 3 DDIM steps" in capsys.readouterr().out
    dmd2.main([*TINY_DMD, "--teacher", edm_pkl.path, "--data", "digits", "--out",
               str(tmp_path / "run")])
    dmd2.main(["--resume", str(tmp_path / "run" / "last.pt"), "--steps", "6"])
    export.main([str(tmp_path / "run" / "generator.pt")])
    sample.main([str(tmp_path / "run" / "generator.onnx"), "--out", str(tmp_path / "b.png")])
    assert teacher.load(tmp_path / "run" / "last.pt")["data"]["name"] == "digits"


def test_unconditional_edm_checkpoint_goes_the_whole_way(edm_pkl, tmp_path):
    network = dict(edm_pkl.network, label_dim=0)
    state = {name: value for name, value in edm_pkl.state.items() if "map_label" not in name}
    Path(edm_pkl.path).write_bytes(pickle.dumps(edm_checkpoint(network, state)))
    dmd2.main([*TINY_DMD, "--teacher", edm_pkl.path, "--data", "digits", "--out",
               str(tmp_path / "run")])
    export.main([str(tmp_path / "run" / "generator.pt")])
    for name in ("generator.pt", "generator.onnx"):
        sample.main([str(tmp_path / "run" / name), "--n", "5", "--out", f"{tmp_path}/{name}.npz"])
    a, b = (np.load(f"{tmp_path}/generator.{kind}.npz")["images"].astype(int)
            for kind in ("pt", "onnx"))
    assert len(a) == 5 and abs(a - b).max() <= 1


def test_planted_call_in_an_edm_pickle_is_refused_by_name_and_not_made(edm_pkl, tmp_path):
    planted = Reduced(os.system, f"touch {tmp_path}/executed")
    in_storage = Reduced(torch.storage._load_from_bytes, pickle.dumps(planted))
    hostile = [planted, dict(ema=planted), edm_checkpoint(edm_pkl.network, edm_pkl.state,
                                                          [("more", planted)])]
    hostile.append(edm_checkpoint(dict(edm_pkl.network, channel_mult=planted), edm_pkl.state))
    hostile.append(edm_checkpoint(edm_pkl.network, edm_pkl.state, weights=dict(
        w=Reduced(torch._utils._rebuild_tensor_v2, in_storage, 0, (1,), (1,), False, {}))))
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        name = "has the opcode|" * (protocol < 2) + f"names '{os.system.__module__}.system'"
        for content in hostile:
            Path(edm_pkl.path).write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(ValueError, match=f"edm.pkl: .*({name}).*, .* refused"):
                sample.load_edm(edm_pkl.path)
    assert not (tmp_path / "executed").exists()


def test_of_an_edm_pickle_nothing_but_plain_data_and_descriptions_of_calls_is_made(edm_pkl):
    def kinds(value):
        if id(value) in seen:
            return set()
        seen.add(id(value))
        parts = value.items() if type(value) is dict else [value]
        parts = value if isinstance(value, (list, tuple)) else [x for part in parts for x in part] \
            if type(value) is dict else []
        return {type(value)}.union(*map(kinds, parts))

    seen = set()
    with open(edm_pkl.path, "rb") as file:
        found = kinds(sample.read_pickle(file))
    assert found <= {dict, list, tuple, str, int, float, bool, bytes, type(None), sample.Call}


@pytest.mark.parametrize("content", [
    b"\x96" + b"\xff" * 3 + b"\x7f" + b"\0" * 4 + b".",         # a bytearray of 2 GB
    b"\x8e" + b"\xff" * 7 + b"\x7f.",                           # bytes without end
    b"})" + b"\x85" * 10**6 + b"Ns.",                            # a key whose hash takes the stack
    b"})" + b"2\x86" * 60 + b"Ns.",                              # or a lifetime
    b"\x96\1\0\0\0\0\0\0\0a\x94\x98h\0K\1a.", b"\x82\1.",  # a buffer; an extension
    b"r\0\0\0\x7f.", b"(.", b"K\1b.", b"K\1)R.", b"N}b.", b"]]u.", b"](K\1K\1u.",
    b"ccollections\nOrderedDict\n}\x8c\x0b__setattr__Nsb.",    # a state for what has none
    b"ctorch._utils\n_rebuild_parameter\n]\x94R\x94h\0h\1a.",  # a call with itself
])
def test_tricks_of_opcodes_are_refused_at_once(content, tmp_path):
    (tmp_path / "trick.pkl").write_bytes(b"\x80\4" + content)
    with pytest.raises(ValueError, match="trick.pkl: not a checkpoint of NVlabs/edm"):
        sample.load_edm(tmp_path / "trick.pkl")


def test_damaged_edm_pickles_are_one_line(edm_pkl):
    def storage(count):
        return torch.storage.TypedStorage(wrap_storage=torch.zeros(count).untyped_storage(),
                                          dtype=torch.float32, _internal=True)

    def tensor(size, stride, offset=0, of=storage(1)):
        return Reduced(torch._utils._rebuild_tensor_v2, of, offset, size, stride, False, {})

    block = storage(10000)

    def changed(**options):
        return pickle.dumps(edm_checkpoint(network, state, **options))

    whole, path = Path(edm_pkl.path).read_bytes(), Path(edm_pkl.path)
    network, state = edm_pkl.network, edm_pkl.state
    cyclic = edm_checkpoint(network, state)
    inner = cyclic["ema"].meta["state"]["_modules"]["model"].meta["state"]["_modules"]
    inner["enc"] = cyclic["ema"]
    sharing = {f"w{i}": tensor((1,), (1,), of=block) for i in range(100)}
    contents = {
        "truncated": whole[:len(whole) // 2], "empty": b"", "text": b"not a pickle",
        "another pickle": pickle.dumps([1]), "no ema": pickle.dumps(dict(net=1)),
        "cyclic": pickle.dumps(cyclic), "another class": changed(precond="VPPrecond"),
        "NCSN++": changed(embedding_type="fourier"),
        "a type": changed(weights=dict(x=torch.zeros(1).double())),
        "a size": changed(weights=dict(x=tensor((2**40,), (0,)))),
        "beyond": changed(weights=dict(x=tensor((1,), (1,), 1))),
        "nothing": changed(weights=dict(x=tensor((0,), (1,)))),
        "a list for a storage": changed(weights=dict(x=tensor((9,), (1,), of=[True] * 9))),
        "a tensor for one": changed(weights=dict(x=tensor((1,), (1,), of=tensor((1,), (1,))))),
        "a state": pickle.dumps(edm_checkpoint(network, state))[:-1] + b"}b.",
        "weights of one memory": changed(weights=sharing),
        "sizes": changed(num_blocks=10**9), "no levels": changed(channel_mult=[]),
        "before": changed(weights=dict(x=tensor((2,), (-1,), 1))),
        "long": b"\x80\x04\x8e" + b"\xff" * 6 + b"\x0f\x00" + b"bytes that are not there",
    }
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match="edm.pkl: not a checkpoint of NVlabs/edm"):
            sample.load_edm(edm_pkl.path)
    for change in (dict(model_channels=32), dict(num_blocks=2), dict(label_dim=5),
                   dict(channel_mult=[0 + 1])):
        path.write_bytes(pickle.dumps(edm_checkpoint(dict(network, **change), state)))
        with pytest.raises(ValueError, match="don't fit"):
            teacher.build(sample.load_edm(edm_pkl.path))
    state = dict(state, **{"map_layer0.bias": torch.full((64,), math.nan)})
    path.write_bytes(pickle.dumps(edm_checkpoint(network, state)))
    with pytest.raises(ValueError, match="not finite"):
        teacher.build(sample.load_edm(edm_pkl.path))


# ---- samplers -----------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [5, 18])
def test_heun_is_edm_s_sampler(steps):
    v = vectors("samplers")
    sigmas = teacher.sampling_sigmas(steps, "lognormal")
    x0 = teacher.heun(Gaussian(v["mu"], v["s"]).double(), sigmas[0] * v["latents"], sigmas, None)
    torch.testing.assert_close(x0, v[f"edm_heun_{steps}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("function, ratio", [(teacher.heun, 4), (sample.ddim, 2)])
def test_order_of_convergence(function, ratio):
    noise = torch.tensor([1.0], dtype=torch.float64).view(1, 1, 1, 1)
    exact = 80 * 0.5 / math.sqrt(80**2 + 0.5**2)  # of the probability flow of N(0, 0.5^2)
    errors = []
    for steps in (100, 200):
        sigmas = teacher.sampling_sigmas(steps, "lognormal")
        x0 = function(Gaussian(0, 0.5).double(), sigmas[0] * noise, sigmas, None)
        errors.append(abs(x0.item() - exact))
    assert 0.85 * ratio < errors[0] / errors[1] < 1.15 * ratio


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_ddim_is_that_of_diffusers(name):
    v = vectors("samplers")
    sigmas = v[f"{name}_sigmas"][v[f"{name}_ddim50_timesteps"]].tolist() + [0.0]
    x = v["latents"] * (1 + sigmas[0] ** 2) ** 0.5  # out of variance-preserving coordinates
    x0 = sample.ddim(Gaussian(v["mu"], v["s"]).double(), x, sigmas, None)
    torch.testing.assert_close(x0, v[f"{name}_ddim50_eta0"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
def test_ddim_with_eta_1_is_ddpm(name):
    v = vectors("samplers")
    levels, denoiser = v[f"{name}_sigmas"].tolist(), Gaussian(v["mu"], v["s"]).double()
    for t, mean, var in zip(v[f"{name}_ddpm_t"].tolist(), v[f"{name}_ddpm_mean_vp"],
                            v[f"{name}_ddpm_var"]):
        sigma, sigma_next = levels[t], levels[t - 1]
        x, scale = v["latents"] * (1 + sigma**2) ** 0.5, (1 + sigma_next**2) ** 0.5
        at_0, at_1 = (sample.ddim(denoiser, x, [sigma, sigma_next], None, [noise], eta=1.0) / scale
                      for noise in (torch.zeros_like(x), torch.ones_like(x)))
        torch.testing.assert_close(at_0, mean, rtol=0, atol=1e-5)
        torch.testing.assert_close((at_1 - at_0) ** 2, var.expand_as(x), rtol=1e-3, atol=0)


def test_samplers_with_noise_keep_the_data_s_moments():
    torch.manual_seed(0)
    denoiser, noise = Gaussian(0.3, 0.5), torch.randn(1000, 1, 4, 4)
    sigmas = teacher.sampling_sigmas(150, "lognormal")
    fresh = (torch.randn_like(noise) for _ in range(450))
    for x0 in (sample.ddim(denoiser, 80 * noise, sigmas, None, fresh, eta=1.0),
               sample.ddim(denoiser, 80 * noise, sigmas, None, fresh, eta=0.5),
               teacher.heun(denoiser, 80 * noise, sigmas, None, fresh, churn=30.0)):
        assert x0.mean().item() == pytest.approx(0.3, abs=0.02)
        assert x0.std().item() == pytest.approx(0.5, abs=0.03)
        assert abs((x0 * noise).mean().item()) < 0.3  # a deterministic sampler has 0.5


def test_churn_is_limited_to_its_levels_and_scaled():
    def denoiser(x, sigma, label):
        levels.append(sigma[0].item())
        return x  # which ends the steps where they began, but for the noise that is added

    levels, x = [], torch.zeros(1, 1, 1, 1)
    ones = (torch.ones_like(x) for _ in range(9))
    x0 = teacher.heun(denoiser, x, [8.0, 4.0, 2.0, 0.0], None, ones, 3 * 0.1, 3.0, 5.0, 2.0)
    assert levels == pytest.approx([8, 4, 4.4, 2, 2])
    assert x0.item() == pytest.approx(2 * (4.4**2 - 4**2) ** 0.5)
    levels.clear()
    teacher.heun(denoiser, x, [4.0, 0.0], None, iter([x + 1]), 9.0)
    assert levels == pytest.approx([4 * 2**0.5])  # EDM's limit


@pytest.mark.parametrize("schedule", teacher.SCHEDULES)
def test_levels_of_a_sampler_stay_in_the_teacher_s_range_and_end_at_0(schedule):
    ends = teacher.sigma_at(torch.tensor([0.0, 1.0], dtype=torch.float64), schedule).tolist()
    sigmas = teacher.sampling_sigmas(18, schedule)
    assert len(sigmas) == 19 and sigmas[0] == pytest.approx(80) and sigmas[-1] == 0
    assert sigmas[-2] == pytest.approx(max(0.002, ends[0]))
    own = teacher.sampling_sigmas(18, schedule, own=True)
    assert own[0] == pytest.approx(ends[1]) and own[-2] == pytest.approx(ends[0])
    assert all((np.diff(levels) < 0).all() for levels in (sigmas, own))


@pytest.mark.parametrize("flags, evaluations, says", [
    ("", 35, "18 Heun steps"), ("--steps 5", 9, "5 Heun steps"),
    ("--sampler euler", 35, "35 Euler steps"), ("--sampler ddim", 50, "50 DDIM steps"),
    ("--sampler ddim --eta 0.5 --steps 7", 7, "7 DDIM steps, eta 0.5"),
    ("--sampler ddpm --steps 9", 9, "9 DDPM steps"),
    ("--churn 40 --s-min 0.05 --s-max 50 --s-noise 1.003", 35, "churn 40, s_min 0.05, s_max 50"),
    ("--guidance 2 --steps 4", 14, "4 Heun steps, guidance 2")])
def test_samplers_of_a_teacher(flags, evaluations, says, tiny_teacher):
    cfg = teacher.parse(sample.Config, [tiny_teacher, *flags.split()])
    sampler = sample.load_sampler(tiny_teacher, cfg=cfg)
    assert sampler.evaluations == evaluations and says in sampler.name
    label = torch.arange(10)
    images = sample.generate(sampler, label, seed=1)
    assert images.float().std() > 10
    assert torch.equal(sample.generate(sampler, label[:3], seed=1), images[:3])
    assert not torch.equal(sample.generate(sampler, label, seed=2), images)


def test_few_step_gives_each_level_the_last_estimate_and_fresh_noise():
    seen = []

    def generator(x, sigma, label):
        seen.append((x.mean().item(), sigma.tolist()))
        return torch.ones_like(x)

    x0 = sample.few_step(generator, torch.full((2, 1, 1, 1), 80.0), [80.0, 2.5], None,
                         [torch.full((2, 1, 1, 1), 4.0)])
    assert seen == [(80, [80, 80]), (1 + 2.5 * 4, [2.5, 2.5])] and x0.mean() == 1


def test_same_seed_and_label_give_the_same_images_at_any_batch_size(tiny_teacher, tiny_generator):
    label = torch.arange(10).repeat(4)
    for path in (tiny_teacher, tiny_generator):
        sampler = sample.load_sampler(path)
        images = sample.generate(sampler, label, seed=3)
        for batch in (1, 7):
            assert torch.equal(sample.generate(sampler, label, 3, batch), images)
        assert torch.equal(sample.generate(sampler, label[:9], 3), images[:9])
        assert not torch.equal(sample.generate(sampler, label, 4), images)


# ---- data ---------------------------------------------------------------------------------------

def test_digits_are_split_without_overlap_and_alike_each_time():
    train, test = (teacher.load_data("digits", split) for split in ("train", "test"))
    assert train.images.shape == (1497, 1, 8, 8) and test.images.shape == (300, 1, 8, 8)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    assert train.labels.bincount().tolist() == [146, 154, 149, 148, 143, 155, 157, 144, 151, 150]
    assert torch.equal(teacher.load_data("digits", "train").images, train.images)


def test_mnist_is_read_where_it_lies():
    if not (SHARED / "data" / "MNIST").exists():
        pytest.skip("needs the MNIST files")
    data = teacher.load_data("mnist", "test", SHARED / "data")
    assert data.images.shape == (10000, 1, 28, 28) and data.labels[:5].tolist() == [7, 2, 1, 0, 4]


def test_folder_has_a_class_per_sub_folder(tmp_path):
    for i, name in enumerate(("cats", "dogs")):
        (tmp_path / name).mkdir()
        for j in range(6):
            Image.new("RGB", (40 + j, 30), (100 * i, 0, 0)).save(tmp_path / name / f"{j}.png")
    data = teacher.load_data(str(tmp_path), "train", size=16)
    assert data.images.shape == (10, 3, 16, 16) and data.classes == ("cats", "dogs")
    assert torch.equal(data.images[:, 0, 0, 0], (100 * data.labels).to(torch.uint8))


def test_uint8_survives_the_way_to_float_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(teacher.to_uint8(teacher.to_float(levels)), levels)


def test_an_epoch_shows_every_image_once():
    indices = torch.cat([teacher.batch_at(step, 100, 20, seed=0) for step in range(5)])
    assert sorted(indices.tolist()) == list(range(100))
    assert not torch.equal(teacher.batch_at(5, 100, 20, 0), indices[:20])


# ---- latents ------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def latent(tiny):
    """A folder with a tiny autoencoder of the digits, a teacher of its latents and a generator."""
    folder = tiny / "latent"
    teacher.main([*TINY, "--autoencoder", "--mults", "1,2", "--out", f"{folder}/autoencoder"])
    teacher.main([*TINY, "--latent", f"{folder}/autoencoder/autoencoder.pt", "--out",
                  f"{folder}/teacher"])
    shutil.move(folder / "autoencoder", folder / "moved")  # what comes after can do without
    dmd2.main([*TINY_DMD, "--teacher", f"{folder}/teacher/teacher.pt", "--out", f"{folder}/dmd2"])
    export.main([f"{folder}/dmd2/generator.pt"])
    return folder


def random_autoencoder(**options):
    torch.manual_seed(0)
    sizes = dict(img_resolution=8, img_channels=1, latent_channels=3, model_channels=8,
                 channel_mult=(1, 2), num_blocks=1)
    return teacher.Autoencoder(**{**sizes, **options})


def test_autoencoder_halves_each_level_and_gives_x0_the_deviation_of_edm():
    autoencoder = random_autoencoder(img_resolution=28, img_channels=3, channel_mult=(1, 2, 2))
    images = torch.rand(64, 3, 28, 28) * 2 - 1
    before = autoencoder.reconstruct(images)
    autoencoder.calibrate(images)
    x0 = autoencoder.encode(images)
    assert x0.shape[1:] == (3, 7, 7) == teacher.latent_shape(autoencoder.network)
    torch.testing.assert_close(x0.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x0.std((0, 2, 3), correction=0), torch.full((3,), 0.5))
    torch.testing.assert_close(autoencoder.reconstruct(images), before)  # no matter the scale
    assert before.shape == images.shape


def test_kl_is_that_of_normal_distributions_and_noise_is_of_the_posterior_s_deviation():
    autoencoder, images = random_autoencoder(), torch.rand(4, 1, 8, 8) * 2 - 1
    mean, log_variance = autoencoder.posterior(images)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    noise = torch.randn_like(mean)
    decoded, kl = autoencoder(images, noise)
    normal = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(posterior, normal).mean()
    torch.testing.assert_close(kl, expected)
    z = posterior.loc + posterior.scale * noise
    torch.testing.assert_close(decoded, autoencoder.decoded(z))


def test_autoencoder_learns_to_reconstruct_held_out_digits(curves, tmp_path):
    teacher.main(["--autoencoder", "--mults", "1,2", "--steps", "100", "--warmup", "20", "--batch",
                  "64", "--sample-every", "50", "--log-every", "25", "--out", str(tmp_path)])
    lines = log_of(tmp_path)
    held_out = teacher.to_float(teacher.load_data("digits", "test").images)
    mean_image = held_out.mean(0, keepdim=True).expand_as(held_out)
    assert lines[-1]["psnr"] > 1 + teacher.psnr(mean_image, held_out)
    assert lines[-1]["psnr"] > [line["psnr"] for line in lines if "psnr" in line][0]
    assert {p.name for p in tmp_path.iterdir()} == {
        ".lock", "autoencoder.pt", "config.json", "latents.png", "log.jsonl", "loss.png",
        "samples_000050.png", "samples_000100.png"}


def test_generator_of_latents_gives_images_wherever_it_goes(latent, tmp_path, capsys):
    generator = sample.load_sampler(str(latent / "dmd2" / "generator.pt"))
    exported = sample.load_sampler(str(latent / "dmd2" / "generator.onnx"))
    assert generator.shape == exported.shape == (4, 4, 4)
    label = torch.arange(10)
    images = sample.generate(generator, label, seed=0)
    assert images.shape == (10, 1, 8, 8)
    difference = images.int() - sample.generate(exported, label, seed=0).int()
    assert difference.abs().max() <= 1
    codec = teacher.codec_of(teacher.load(latent / "dmd2" / "generator.pt")["autoencoder"])
    x0 = generator.x0(teacher.fresh_noise(10, (4, 4, 4), 0), label)
    torch.testing.assert_close(generator.images(teacher.fresh_noise(10, (4, 4, 4), 0), label),
                               codec.decode(x0))
    teachers = str(latent / "teacher" / "teacher.pt")
    sample.main([teachers, "--evaluate", "--n", "100", "--seeds", "1"])
    assert "1497 training images of digits" in capsys.readouterr().out
    sample.main([str(latent / "dmd2" / "generator.pt"), "--beside", teachers, "--out",
                 str(tmp_path / "beside.png")])


def test_discriminator_s_real_x0_are_latents_by_the_autoencoder_that_travels(latent):
    parent = teacher.load(latent / "teacher" / "teacher.pt")
    cfg = types.SimpleNamespace(gan_weight=1, batch=16, data_dir=None, stream=None)
    real = dmd2.load_real(cfg, parent, torch.device("cpu"))
    data = teacher.load_data("digits", "train")
    expected = teacher.codec_of(parent["autoencoder"]).encode(teacher.to_float(data.images))
    torch.testing.assert_close(real.images, expected)
    assert torch.equal(real.labels, data.labels)


def test_second_stage_in_other_latents_is_refused(latent, tmp_path, capsys):
    checkpoint = teacher.load(latent / "dmd2" / "generator.pt")
    checkpoint["autoencoder"]["model"]["std"] += 1
    torch.save(checkpoint, tmp_path / "generator.pt")
    line = fails(dmd2.main, ["--teacher", str(latent / "teacher" / "teacher.pt"), "--init-from",
                             str(tmp_path / "generator.pt"), "--out", str(tmp_path / "x")], capsys)
    assert "is of another autoencoder's latents" in line


@pytest.mark.parametrize("count", [2, 4, 41])
def test_autoencoder_of_few_images_has_its_pictures(count, tmp_path):
    teacher.main([*TINY, "--data", photographs(tmp_path / "photos", count=count), "--size", "8",
                  "--autoencoder", "--batch", "1", "--sample-every", "4", "--out",
                  str(tmp_path / "run")])
    assert (tmp_path / "run" / "samples_000004.png").exists()


def test_run_does_not_replace_the_autoencoder_that_it_is_made_of(latent, capsys):
    path = latent / "moved" / "autoencoder.pt"
    line = fails(teacher.main, ["--latent", str(path), "--out", str(path.parent)], capsys)
    assert f"would move {path}; name another folder" in line and path.exists()


def test_evaluation_of_an_autoencoder_is_of_its_reconstructions(latent, capsys):
    path = str(latent / "moved" / "autoencoder.pt")
    sample.main([path, "--evaluate"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    held_out = teacher.load_data("digits", "test")
    codec = teacher.build(teacher.load(path))
    decoded = teacher.to_uint8(codec.reconstruct(teacher.to_float(held_out.images)))
    reference = sample.load_reference(teacher.load(path)["data"])
    figures = sample.evaluate(decoded, held_out.labels, reference)
    assert result["mean"] == pytest.approx(figures) and result["protocol"].startswith("300 recon")
    assert result["psnr"] == pytest.approx(teacher.psnr(teacher.to_float(decoded),
                                                        teacher.to_float(held_out.images)))


# ---- folders of images --------------------------------------------------------------------------

def photographs(folder, count=6, classes=("cats", "dogs"), mode="RGB", suffix="png"):
    """A folder of folders of images of odd sizes, all different; returns its path as a string."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for j in range(count):
            shape = (30 + 3 * j % 11, 25 + 7 * i + j % 13) + (3,) * (mode == "RGB")
            pixels = rng.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels, mode).save(folder / name / f"{j}.{suffix}")
    return str(folder)


@pytest.mark.parametrize("modes, shape", [
    (("RGB", "RGB"), (3, 16, 16)), (("L", "L"), (1, 16, 16)), (("L", "RGB"), (3, 16, 16))])
def test_folder_is_grey_where_all_of_its_images_are(modes, shape, tmp_path):
    for name, mode in zip(("cats", "dogs"), modes):
        photographs(tmp_path, classes=(name,), mode=mode)
    assert teacher.load_data(str(tmp_path), "train", size=16).shape == shape


def test_16_bits_are_scaled_and_floating_point_is_left_out(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for name in ("1.png", "2.png"):
        Image.fromarray(levels * 257).save(tmp_path / "a" / name)  # level 255 is 65,535
    images = teacher.load_data(str(tmp_path), "train", size=16).images
    assert torch.equal(images[0, 0], torch.from_numpy(levels.astype(np.uint8)))
    for dtype, says in ((np.float32, "are floating-point"), (np.int32, "have more than 16 bits")):
        Image.fromarray(levels.astype(dtype) - 1).save(tmp_path / "a" / "3.tif")
        teacher.load_folder.cache_clear()
        assert torch.equal(teacher.load_data(str(tmp_path), "train", size=16).images, images)
        err = capsys.readouterr().err
        assert "2 images\n    1 left out as unreadable" in err
        assert f"3.tif: not a readable image (its pixels {says}" in err


def dirty_photographs(folder):
    """Images of every kind that a folder may hold; the number of those that can be read."""
    photographs(folder, count=6, classes=("cats", "dogs", r"猫 é $\x$"))
    rng, cats, dogs = np.random.default_rng(1), folder / "cats", folder / "dogs"
    rgba = rng.integers(0, 256, (20, 20, 4), np.uint8)
    Image.fromarray(rgba).save(cats / "clear.png")
    Image.fromarray(rgba | np.array([0, 0, 0, 255], np.uint8)).save(cats / "opaque.png")
    Image.fromarray(rgba[..., :2], "LA").save(cats / "grey_clear.png")
    Image.fromarray(rgba).quantize(16).save(cats / "palette_clear.png")
    Image.fromarray(rgba, "CMYK").save(cats / "cmyk.jpg")
    Image.fromarray(rgba[..., 0] > 99).save(cats / "two_levels.tif")
    Image.fromarray(rgba[..., 0].astype(np.uint16) * 257).save(cats / "16_bits.png")
    frames = [Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)) for _ in range(3)]
    for suffix in ("png", "webp", "tif"):
        frames[0].save(dogs / f"animated.{suffix}", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1000)).save(dogs / "narrow.png")
    (dogs / "deeper").mkdir()
    shutil.copy(cats / "1.png", dogs / "deeper" / "ÄÖ ñ 図.PNG")
    (dogs / "link.png").symlink_to(cats / "2.png")
    good = 3 * 6 + 7 + 3 + 1 + 1 + 1

    whole = (cats / "1.png").read_bytes()
    (cats / "truncated.png").write_bytes(whole[:-300])
    (cats / "empty.png").touch()
    (cats / "text.jpg").write_text("not an image")
    (cats / "broken_link.png").symlink_to(cats / "nowhere.png")
    (cats / "folder.png").mkdir()
    os.mkfifo(cats / "pipe.png")
    (folder / "beside.png").write_bytes(whole)
    (cats / "huge.ppm").write_bytes(b"P6 100000 100000 255\n")
    (dogs / "unreadable.png").write_bytes(whole)
    os.chmod(dogs / "unreadable.png", 0o000)
    good += os.geteuid() == 0  # who can read it
    (cats / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n"
                                       b"%%EndComments\nshowpage\n%%EOF\n")
    (dogs / "mixed.png").write_bytes(whole[:200] + bytes(300) + whole[500:])
    for name in ("a.gif", "b.heic", "Thumbs.db", "README"):
        (dogs / name).write_bytes(b"GIF89a")
    (dogs / "._1.jpg").touch()
    (folder / ".ipynb_checkpoints").mkdir()
    (dogs / "loop").symlink_to(folder)
    (dogs / "again").symlink_to(dogs)
    return good


@pytest.mark.parametrize("stream", [False, True])
def test_dirty_folder_is_told_of_and_trains(stream, tmp_path, capsys, faults):
    folder = tmp_path / "photos"
    good, flags = dirty_photographs(folder), ["--stream"] if stream else ["--no-stream"]
    teacher.main([*TINY, "--data", str(folder), "--size", "16", "--blocks", "1", *flags, "--batch",
                  "8", "--out", str(tmp_path / "t")])
    told = capsys.readouterr().err
    bad = 8 + (os.geteuid() != 0)
    assert told.startswith(f"{folder}: {good} images\n    {bad} left out as unreadable: ")
    for part in ("3 transparent, and put on white", "1 smaller than --size and enlarged",
                 "3 of several frames, the first of which is taken", "2 hidden",
                 "2 links to folders that were read already", "1 beside the folders of classes",
                 "1 of another kind (.gif)", "1 of another kind (.heic)", "1 of another kind (.db)",
                 "1 of another kind (no ending)", "1 of CMYK, turned into RGB",
                 "1 of 16 bits, the upper 8 of which are taken",
                 "cats/empty.png: not a readable image"):
        assert part in told, (part, told)
    data = [teacher.load_data(str(folder), split, size=16) for split in ("train", "test")]
    assert sum(len(part.labels) for part in data) == good and data[0].classes[2] == r"猫 é $\x$"
    dmd2.main([*TINY_DMD, "--teacher", str(tmp_path / "t" / "teacher.pt"), "--batch", "8", "--out",
               str(tmp_path / "d"), "--evaluate-every", "0", *flags])
    sample.main([str(tmp_path / "d" / "last.pt"), "--labels", r"猫 é $\x$", "--out",
                 f"{tmp_path}/a.png"])
    faults["dirty images and other files"] += len(list(folder.rglob("*"))) - 3 - 18  # clean ones


def test_images_of_a_dirty_folder_are_the_same_from_disk_and_memory(tmp_path, capsys):
    dirty_photographs(tmp_path)
    a, b = (teacher.load_data(str(tmp_path), "train", size=16, stream=s) for s in (False, True))
    assert torch.equal(a.images, b.images.read(torch.arange(len(b.labels))))
    assert torch.equal(a.labels, b.labels)


def test_clear_pixels_are_white_and_grey_stays_grey(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((8, 8, 2), np.uint8)
    pixels[:4, :, 1] = 255  # black; the lower half clear
    for i in range(2):
        Image.fromarray(pixels, "LA").save(tmp_path / "a" / f"{i}.png")
    images = teacher.load_data(str(tmp_path), "train", size=8).images
    assert images.shape == (1, 1, 8, 8) and (images[0, 0, :4] == 0).all()
    assert (images[0, 0, 4:] == 255).all()


def test_classes_that_are_empty_or_left_without_an_image_are_refused(tmp_path, capsys):
    folder = Path(photographs(tmp_path / "photos"))
    (folder / "empty").mkdir()
    line = fails(teacher.main, ["--data", str(folder)], capsys)
    assert "no image is left for train of the class 'empty'" in line and "Every class" in line
    (folder / "empty" / "1.png").write_text("no image")
    with pytest.raises(ValueError, match="train of the class 'empty' .*/empty/1.png: not a rea"):
        teacher.load_data(str(folder), "train")
    (tmp_path / "nothing").mkdir()
    line = fails(teacher.main, ["--data", f"{tmp_path}/nothing"], capsys)
    assert "no image is left for train. Every" in line
    one = photographs(tmp_path / "one", count=20, classes=("all",))
    teacher.main([*TINY, "--data", one, "--size", "8", "--mults", "1,2", "--blocks", "1", "--out",
                  str(tmp_path / "run")])


def test_image_that_goes_while_it_is_streamed_stops_the_run_in_one_line(tmp_path, capsys):
    folder = photographs(tmp_path / "photos", count=60)
    data = teacher.load_data(folder, "train", size=8, stream=True)
    Path(data.images.paths[3]).unlink()
    with pytest.raises(ValueError, match=r"\.png: not a readable image .No such file") as error:
        data.images.read(torch.arange(len(data.labels)))
    assert "Traceback" not in str(error.value)


def test_images_are_turned_as_exif_says_and_cropped_in_the_middle(tmp_path):
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = [[255, 0, 0]] * 10  # the middle, red, its upper half brighter
    pixels[:5, 10:20, 1] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (tmp_path / "a").mkdir()
    for i in range(2):
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png", exif=exif)
    images = teacher.load_data(str(tmp_path), "train", size=10).images
    assert (images[:, 0] == 255).all() and (images[:, 1, 5:] == 255).all()
    assert (images[:, 1, :5] == 0).all()


@pytest.mark.parametrize("name", ["test", "val"])
def test_folder_of_splits_is_read_as_such(name, tmp_path):
    photographs(tmp_path / "train", count=5)
    photographs(tmp_path / name, count=2)
    train, test = (teacher.load_data(str(tmp_path), split, size=8) for split in ("train", "test"))
    assert (len(train.labels), len(test.labels)) == (10, 4) and train.classes == ("cats", "dogs")
    assert train.labels.tolist() != sorted(train.labels.tolist())  # some of them are of all classes
    shutil.rmtree(tmp_path / name / "cats")
    teacher.load_folder.cache_clear()
    with pytest.raises(ValueError, match=f"its train and {name} differ in the classes "):
        teacher.load_data(str(tmp_path), "test", size=8)


@pytest.mark.parametrize("side, mults", [(28, (1, 2, 2)), (32, (1, 2, 2, 2)), (20, (1, 2, 2)),
                                         (64, (1, 1, 1)), (30, (1, 2)), (15, (1,))])
def test_networks_take_every_side_that_they_can_halve(side, mults):
    net = teacher.UNet(side, 3, 2, 8, mults, 1, ())
    out, _ = net(torch.randn(1, 3, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    autoencoder = random_autoencoder(img_resolution=side, channel_mult=mults)
    assert out.shape[2:] == (side, side)
    assert autoencoder.reconstruct(torch.rand(1, 1, side, side)).shape == (1, 1, side, side)


def test_sides_that_work_are_named(capsys, tmp_path):
    line = fails(teacher.main, ["--data", photographs(tmp_path), "--size", "30"], capsys)
    assert "a multiple of 4, such as 28 or 32" in line and "or give --mults 1,2" in line


def test_streamed_folder_gives_the_batches_of_one_in_memory(tmp_path):
    folder = photographs(tmp_path, count=120)  # enough for reading by other processes
    cfg = types.SimpleNamespace(batch=40, seed=3)
    parts, found = [slice(0, 15), slice(15, 40)], []
    for stream in (False, True):
        data = teacher.load_data(folder, "train", size=12, stream=stream)._replace(flip=True)
        assert isinstance(data.images, teacher.FolderImages) == stream
        batches = teacher.training_batches(data, 3, cfg, parts, torch.device("cpu"))
        found.append([next(batches) for _ in range(12)])  # past the epoch's 5 steps
    assert equal(*found)
    assert found[0][0][0].shape == (15, 3, 12, 12) and found[0][1][0].shape == (25, 3, 12, 12)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc and /proc")
def test_streaming_keeps_memory_flat(tmp_path):
    """Of 1,000 images, which would take 0.8 GB, 200 are read."""
    folder = photographs(tmp_path / "photos", count=600, suffix="jpg")
    in_child(memory_of_streaming, folder, tmp_path / "report").join(120)
    pixels, resident = json.loads((tmp_path / "report").read_text())
    assert pixels > 7e8 and max(resident) - resident[0] < 2e7


def memory_of_streaming(folder, report):
    multiprocessing.set_start_method("fork", force=True)
    data = teacher.load_data(folder, "train", size=512, stream=True)
    cfg = types.SimpleNamespace(batch=4, seed=0)
    batches = teacher.training_batches(data, 0, cfg, [slice(0, 4)], torch.device("cpu"))
    resident = []
    for _ in range(5):
        for _ in range(10):
            next(batches)
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free, which glibc may keep
        resident.append(4096 * int(Path("/proc/self/statm").read_text().split()[1]))
    report.write_text(json.dumps([math.prod(data.images.shape), resident]))


def test_large_folder_streams_by_itself(tmp_path, monkeypatch):
    folder = photographs(tmp_path)
    monkeypatch.setattr(teacher, "MEMORY", 12 * 3 * 16 * 16)
    assert isinstance(teacher.load_data(folder, "test", size=16).images, torch.Tensor)
    monkeypatch.setattr(teacher, "MEMORY", 9 * 3 * 16 * 16)
    teacher.load_folder.cache_clear()
    data = teacher.load_data(folder, "train", size=16)
    assert isinstance(data.images, teacher.FolderImages) and data.images.shape[0] == 10
    some = data.in_memory()
    assert some.images.shape == (9, 3, 16, 16) and len(some.labels) == 9


def test_half_of_the_images_are_mirrored_alike_each_time():
    data = teacher.load_data("digits", "train")
    cfg, all_of = types.SimpleNamespace(batch=500, seed=0), [slice(None)]
    (plain, label), (some, same), (again, _) = (
        next(teacher.training_batches(data._replace(flip=flip), 0, cfg, all_of,
                                      torch.device("cpu"))) for flip in (False, True, True))
    mirrored = (some == plain.flip(-1)).flatten(1).all(1)
    assert torch.equal(some[~mirrored], plain[~mirrored]) and 200 < mirrored.sum() < 300
    assert torch.equal(label, same) and torch.equal(some, again)


def test_mirror_images_have_latents_of_their_own():
    data, codec = teacher.load_data("digits", "test")._replace(flip=True), random_autoencoder()
    latents = teacher.encoded(data, codec, torch.device("cpu"))
    mirrored = codec.encode(teacher.to_float(data.images).flip(-1))
    torch.testing.assert_close(latents.images[300:], mirrored.detach())
    assert torch.equal(latents.labels[:300], latents.labels[300:]) and not latents.flip


def test_folder_that_changed_is_refused(tmp_path, capsys):
    folder = photographs(tmp_path / "data", mode="L")
    teacher.main([*TINY, "--data", folder, "--size", "8", "--mults", "1,2", "--blocks", "1",
                  "--batch", "8", "--out", str(tmp_path / "run")])
    Image.new("RGB", (9, 9)).save(tmp_path / "data" / "cats" / "9.png")
    teacher.load_folder.cache_clear()
    capsys.readouterr()
    line = fails(dmd2.main, ["--teacher", str(tmp_path / "run" / "teacher.pt"), "--out",
                             str(tmp_path / "dmd2")], capsys)
    assert "has images (3, 8, 8) of the classes cats, dogs now; the checkpoint was" in line


@pytest.mark.parametrize("flags", ["--resume", "--teacher"])
def test_class_renamed_since_training_is_refused(flags, tmp_path, capsys):
    folder, run = photographs(tmp_path / "data"), tmp_path / "run" / "teacher.pt"
    teacher.main([*TINY, "--data", folder, "--size", "8", "--mults", "1,2", "--blocks", "1",
                  "--batch", "8", "--out", str(run.parent)])
    (tmp_path / "data" / "cats").rename(tmp_path / "data" / "lynxes")
    teacher.load_folder.cache_clear()
    capsys.readouterr()
    script, more = (teacher, "--steps") if flags == "--resume" else (dmd2, "--batch")
    line = fails(script.main, [flags, str(run), more, "8"] + ["--out", str(tmp_path / "x")] *
                 (script is dmd2), capsys)
    assert "of the classes dogs, lynxes now; the checkpoint was trained on" in line


def test_folder_without_classes_that_was_sorted_since_is_refused(tmp_path, capsys):
    folder, run = tmp_path / "data", tmp_path / "run"
    photographs(folder, classes=("all",), count=12)
    teacher.main([*TINY, "--data", str(folder), "--size", "8", "--mults", "1,2", "--blocks", "1",
                  "--batch", "8", "--out", str(run)])
    for i, path in enumerate(sorted((folder / "all").iterdir())):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        path.rename(folder / "ab"[i % 2] / path.name)
    (folder / "all").rmdir()
    teacher.load_folder.cache_clear()
    capsys.readouterr()
    line = fails(dmd2.main, ["--teacher", f"{run}/teacher.pt", "--out", f"{tmp_path}/x"], capsys)
    assert "of the classes a, b now; the checkpoint was trained on (3, 8, 8) of all" in line


def test_folder_that_moved_is_taken_at_its_new_place(tmp_path, capsys):
    """By every script; and another folder is not taken for it, nor a data set that is none."""
    folder, argv = photographs(tmp_path / "a", count=9), ["--batch", "8", "--sample-every", "0"]
    at, run, distilled = ["--data", f"{tmp_path}/b"], tmp_path / "run", tmp_path / "distilled"
    teacher.main([*TINY, "--data", folder, "--size", "8", "--mults", "1,2", "--blocks", "1",
                  *argv, "--out", str(run)])
    dmd2.main([*TINY_DMD, "--teacher", f"{run}/teacher.pt", "--evaluate-every", "0", *argv, "--out",
               str(distilled)])
    Path(folder).rename(tmp_path / "b")
    photographs(tmp_path / "other", count=9, classes=("cats", "lynxes"))
    capsys.readouterr()
    line = fails(dmd2.main, ["--resume", f"{distilled}/last.pt", "--steps", "6"], capsys)
    assert "no such folder; --data tells where it is" in line
    for script, resume in ((dmd2, distilled / "last.pt"), (teacher, run / "teacher.pt")):
        words = ["--resume", str(resume), "--steps", "6"]
        line = fails(script.main, [*words, "--data", f"{tmp_path}/other"], capsys)
        assert "has images (3, 8, 8) of the classes cats, lynxes now" in line
        line = fails(script.main, [*words, "--data", "digits"], capsys)
        assert "--data digits: the run to resume has " in line
        script.main([*words, *at])
        assert f"--data {tmp_path}/b (it was " in capsys.readouterr().err
    again = ["--teacher", f"{run}/teacher.pt", "--evaluate-every", "0", *argv, *at, "--out"]
    dmd2.main([*TINY_DMD, *again, f"{tmp_path}/new"])
    dmd2.main([*TINY_DMD, *again, f"{tmp_path}/second", "--init-from",
               f"{tmp_path}/new/generator.pt"])
    sample.main([f"{tmp_path}/new/last.pt", "--beside", f"{run}/teacher.pt", *at, "--out",
                 f"{tmp_path}/a.png"])
    assert teacher.load(tmp_path / "new" / "last.pt")["data"]["name"] == f"{tmp_path}/b"


def test_classes_that_are_one_folder_are_refused(tmp_path, capsys):
    folder = Path(photographs(tmp_path / "photos"))
    (folder / "dogs_too").symlink_to(folder / "dogs")
    line = fails(teacher.main, ["--data", str(folder)], capsys)
    assert f"{folder}/dogs and {folder}/dogs_too are the same folder, linked; leave out" in line


def test_folder_of_train_alone_or_of_one_image_is_refused(tmp_path):
    photographs(tmp_path / "a" / "train")
    with pytest.raises(ValueError, match="has train, but neither test nor val; add one, or give"):
        teacher.load_data(str(tmp_path / "a"), "train")
    folder = photographs(tmp_path / "b", count=1, classes=("cats",))
    with pytest.raises(ValueError, match="no image is left for train of the class 'cats' .*Every"):
        teacher.load_data(folder, "train")
    for i in range(3):
        photographs(tmp_path / "c" / "dogs" / str(i), count=9, classes=("x",))
    assert teacher.load_data(str(tmp_path / "c"), "train").classes == ("dogs",)


def test_autoencoder_of_images_all_alike_is_measured(tmp_path, capsys):
    for i in range(30):
        (tmp_path / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / str(i % 2) / f"{i}.png")
    teacher.main([*TINY, "--data", str(tmp_path / "photos"), "--size", "8", "--autoencoder",
                  "--out", str(tmp_path / "run")])
    teacher.main([*TINY, "--latent", str(tmp_path / "run" / "autoencoder.pt"), "--out",
                  str(tmp_path / "teacher")])
    assert teacher.psnr(torch.ones(2), torch.ones(2)) > 100


# ---- pictures -----------------------------------------------------------------------------------

def test_trajectory_shows_what_the_denoiser_is_given_and_says(tiny_teacher, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sample, "save_grid", lambda *args: shown.append(args))
    sample.main([tiny_teacher, "--trajectory", "--labels", "3,7", "--sampler", "euler",
                 "--steps", "4", "--out", str(tmp_path / "strip.png")])
    rows, names, _, titles = shown[0]
    assert rows.shape == (4, 4, 1, 8, 8) and names == ["3", "estimate", "7", "estimate"]
    assert titles[0] == "80" and titles[-1] == "0.002"
    cfg = sample.Config(checkpoint=tiny_teacher, sampler="euler", steps=4)
    images = sample.generate(sample.load_sampler(tiny_teacher, cfg=cfg), torch.tensor([3, 7]), 0)
    assert (rows[1::2, -1].int() - images.int()).abs().max() <= 1  # the last estimate is the image
    noise = teacher.unit_noise(2, (1, 8, 8), 0)
    assert torch.equal(rows[0::2, 0], teacher.to_uint8(80 * noise / 81))


def test_slerp_goes_from_noise_to_noise_and_keeps_their_variance():
    a, b = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(sample.slerp(a, b, 0.0), a)
    torch.testing.assert_close(sample.slerp(a, b, 1.0), b)
    assert sample.slerp(a, b, 0.5).std().item() == pytest.approx(1, abs=0.03)
    assert ((a + b) / 2).std().item() < 0.75


def test_interpolation_s_ends_are_the_images_of_its_noises(tiny_generator, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(sample, "save_grid", lambda *args: shown.append(args))
    sample.main([tiny_generator, "--interpolate", "--labels", "3,7", "--out", "x.png"])
    rows, names, _ = shown[0]
    assert rows.shape == (2, 10, 1, 8, 8) and names == ["3", "7"]
    sampler = sample.load_sampler(tiny_generator)
    images = sample.generate(sampler, torch.tensor([3, 7, 3, 7]), 0)
    ends = torch.cat([rows[:, 0], rows[:, -1]])
    assert (ends.int() - images.int()).abs().max() <= 1


def test_plane_of_pca_shows_the_widest_directions(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(teacher.Figure, "savefig", lambda figure, path, **_: (path.touch(),
                                                                              drawn.append(figure)))
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(500, 5, generator=rng) * torch.tensor([0.1, 9.0, 0.1, 3.0, 0.1])
    label = torch.arange(500) % 2
    teacher.save_plane({"a": (features[:250], label[:250]), "b": (features[250:], label[250:])},
                       ("x", "y"), tmp_path / "plane.png")
    panels = drawn[0].axes
    points = np.concatenate([np.concatenate([s.get_offsets() for s in panel.collections])
                             for panel in panels])
    assert [panel.get_title() for panel in panels] == ["a (PCA)", "b (PCA)"]
    assert [len(panel.collections) for panel in panels] == [2, 2]
    assert points.std(0).tolist() == pytest.approx([9, 3], rel=0.1)


def test_map_is_of_as_many_real_images_as_generated_ones(tiny_generator, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(sample, "save_plane", lambda *args, **options: drawn.append(args))
    sample.main([tiny_generator, "--map", "--n", "120", "--out", "map.png"])
    (groups, classes, path), = drawn
    (real, label), (made, asked) = groups.values()
    assert real.shape == made.shape == (120, sample.DIMENSIONS) and torch.equal(label, asked)
    assert list(groups) == ["real", "generator, 1 step"] and classes == tuple("0123456789")


def test_training_and_validation_loss_share_a_panel(curves, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(teacher.Figure, "savefig", lambda figure, path, **_: (path.touch(),
                                                                              drawn.append(figure)))
    lines = [dict(step=1, loss=2.0), dict(step=2, loss=1.0), dict(step=2, validation_loss=1.5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    teacher.plot_log(tmp_path / "log.jsonl")
    panel, = drawn[0].axes
    assert [line.get_label() for line in panel.lines] == ["training", "validation"]
    assert panel.lines[1].get_ydata().tolist() == [1.5]


# ---- every kind of teacher, from training to images ---------------------------------------------

@pytest.mark.parametrize("schedule", teacher.SCHEDULES)
@pytest.mark.parametrize("prediction", teacher.PREDICTIONS)
def test_every_prediction_and_schedule_trains_samples_and_distils(prediction, schedule, tmp_path):
    flags = f"--prediction {prediction} --schedule {schedule} --min-snr-gamma 5 --batch 8"
    teacher.main([*TINY, *flags.split(), "--steps", "2", "--out", f"{tmp_path}/teacher"])
    dmd2.main([*TINY_DMD, "--teacher", f"{tmp_path}/teacher/teacher.pt", "--batch", "8", "--steps",
               "2", "--evaluate-every", "0", "--out", f"{tmp_path}/dmd2"])
    for path, flags in (("teacher/teacher.pt", dict(sampler="heun", steps=3)),
                        ("teacher/teacher.pt", dict(sampler="ddpm", steps=3)),
                        ("dmd2/generator.pt", {})):
        cfg = sample.Config(checkpoint=f"{tmp_path}/{path}", **flags)
        sampler = sample.load_sampler(cfg.checkpoint, cfg=cfg)
        images = sampler.images(teacher.fresh_noise(10, (1, 8, 8), 0), torch.arange(10))
        assert images.isfinite().all() and images.std() > 0
    assert all(math.isfinite(value) for folder in ("teacher", "dmd2")
               for line in log_of(tmp_path / folder) for value in line.values())


def test_min_snr_reaches_the_teacher_s_loss(tmp_path):
    losses = []
    for flags in ([], ["--min-snr-gamma", "5"]):
        teacher.main([*TINY, "--steps", "1", "--out", str(tmp_path), *flags])
        losses.append(log_of(tmp_path)[0]["loss"])
    assert 0 < losses[1] < 0.6 * losses[0]  # c_out^2 min(SNR, 5) is at most 0.56


@pytest.mark.parametrize("schedule, lowest", [("linear", 0.01), ("lognormal", 0.002)])
def test_teacher_is_asked_at_the_levels_of_its_schedule_only(schedule, lowest, tmp_path,
                                                             monkeypatch):
    def seen(self, x, sigma, *args, **options):
        sigmas.append(sigma)
        return original(self, x, sigma, *args, **options)

    teacher.main([*TINY, "--schedule", schedule, "--out", f"{tmp_path}/teacher"])
    sigmas, original = [], teacher.Denoiser.estimate
    monkeypatch.setattr(teacher.Denoiser, "estimate", seen)
    dmd2.main([*TINY_DMD, "--teacher", f"{tmp_path}/teacher/teacher.pt", "--batch", "256",
               "--out", f"{tmp_path}/dmd2"])
    assert lowest * 0.999 < torch.cat(sigmas).min() < lowest * 1.5


def test_config_of_a_run_gives_the_same_run_and_flags_go_before_it(tmp_path, tiny_teacher):
    for script, flags, name in ((teacher, [*TINY, "--min-snr-gamma", "3"], "teacher.pt"),
                                (dmd2, [*TINY_DMD, "--teacher", tiny_teacher, "--lr", "1e-3"],
                                 "last.pt")):
        first, again, other = (tmp_path / script.__name__ / part for part in "abc")
        script.main([*flags, "--out", str(first)])
        config = str(first / "config.json")
        script.main(["--config", config, "--out", str(again)])
        script.main(["--config", config, "--out", str(other), "--seed", "1", "--steps", "2"])
        a, b, c = (teacher.load(folder / name) for folder in (first, again, other))
        assert equal(a["training"], b["training"]) and equal(a["model"], b["model"])
        assert dict(b["config"], out="") == dict(a["config"], out="")
        assert dict(c["config"], out="") == dict(a["config"], out="", seed=1, steps=2)
        assert not equal(a["model"], c["model"])


@pytest.mark.parametrize("content, says", [
    (None, "No such file"), ("{", "not a run's config.json"), ("[1]", "not a run's config.json"),
    ('{"width": "x"}', "invalid int value: 'x'"), ('{"width": true}', "--width"),
    ('{"lr": [1]}', "invalid float value"), ('{"help": true}', "has help, no option"),
    ('{"teacher": "t.pt"}', "has teacher, no option"), ('{"config": "c"}', "has config, no option"),
    ("\ud800", "not a run's config.json"), ("[" * 10**5, "not a run's config.json"),
    ('{"prediction": "u"}', "--prediction u: choose from"),
    ('{"profile": true}', "of a --profile")])
def test_config_that_does_not_fit_is_refused(content, says, tmp_path, capsys):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
    line = fails(teacher.main, ["--config", str(path), "--out", str(tmp_path / "run")], capsys)
    assert f"--config {path}: " in line and says in line and not (tmp_path / "run").exists()


def test_config_of_the_run_in_the_same_folder_is_refused(tiny, tiny_teacher, capsys):
    config, before = str(tiny / "teacher" / "config.json"), Path(tiny_teacher).read_bytes()
    for flags in (["--out", str(tiny / "teacher")], []):
        line = fails(teacher.main, ["--config", config, *flags], capsys)
        assert "a folder of its own" in line and Path(tiny_teacher).read_bytes() == before
    line = fails(teacher.main, ["--config", config, "--resume", tiny_teacher], capsys)
    assert "leave out --config" in line


def test_paths_in_a_config_are_whole(edm_pkl, tiny_teacher, tiny_generator, tmp_path, monkeypatch):
    for i in range(60):
        Path(tmp_path / f"mine/{i % 10}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).convert("RGB").save(tmp_path / f"mine/{i % 10}/{i}.png")
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny_generator, "first.pt")
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--init-from", "first.pt", "--out", "run",
               "--data-dir", "data", "--evaluate-every", "0"])
    config = json.loads(Path("run/config.json").read_text())
    assert config["init_from"] == str(tmp_path / "first.pt")
    assert config["data_dir"] == str(tmp_path / "data")
    teacher.main([*TINY, "--data", "mine", "--size", "8", "--out", "mine_teacher"])
    teacher.main(["--resume", "mine_teacher/teacher.pt", "--data", "mine", "--steps", "6"])
    sample.main(["mine_teacher/teacher.pt", "--data", "mine", "--steps", "2"])


# ---- distribution matching ----------------------------------------------------------------------

def test_dmd_loss_and_gradient_are_the_official_ones():
    v = vectors("dmd2_losses")
    x, sigma = v["dm/x"].requires_grad_(), v["dm/sigma"]
    noise = (v["dm/noisy"] - v["dm/x"].detach()) / sigma.view(-1, 1, 1, 1)
    networks = Stub(v["dm/real_x0"]), Stub(v["dm/fake_x0"])
    gradient = dmd2.dmd_gradient(*networks, x, sigma, None, noise)
    torch.testing.assert_close(gradient, v["dm/gradient"])
    loss = dmd2.dmd_loss(*networks, x, sigma, None, noise)
    loss.backward()
    torch.testing.assert_close(loss.detach(), v["dm/loss"])
    torch.testing.assert_close(x.grad, v["dm/loss_grad_wrt_x"])


def test_dmd_gradient_is_exactly_0_where_fake_score_is_the_teacher():
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    gradient = dmd2.dmd_gradient(Gaussian(0, 1), Gaussian(0, 1), x0, torch.ones(4), None, noise)
    assert gradient.count_nonzero() == 0


def test_descending_the_dmd_gradient_moves_samples_towards_the_teacher_s():
    x0, noise = torch.randn(2, 4, 1, 8, 8)
    gradient = dmd2.dmd_gradient(Gaussian(1, 1), Gaussian(0, 1), x0, torch.ones(4), None, noise)
    assert (gradient < 0).all()  # subtracted: up, to the teacher's mean


class Affine(nn.Module):
    """A generator a + b x / |x| with an a and a b for each of its steps."""

    def __init__(self, sigmas):
        super().__init__()
        self.sigmas = torch.tensor(sigmas).tolist()  # as float32 has them
        self.a, self.b = (nn.Parameter(torch.full((len(sigmas),), v)) for v in (-0.5, 1.0))

    def forward(self, x, sigma, label):
        k = self.sigmas.index(sigma[0].item())
        return self.a[k] + self.b[k] * x / (sigma[0] ** 2 + 0.25).sqrt()


class Moments(nn.Module):
    """A discriminator by the mean and the square of an image's pixels and its noise level."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(),
                                    nn.Linear(32, 1), nn.Flatten(0))

    def forward(self, x, sigma, label):
        mean, square = x.mean((1, 2, 3)), x.square().mean((1, 2, 3))
        return self.layers(torch.stack([mean, square.sqrt(), sigma], dim=1))


@pytest.mark.parametrize("kind, steps, generator_lr, fake_lr", [
    ("dm", 1, 8e-3, 3e-2), ("dm", 2, 8e-3, 3e-2), ("dm", 4, 8e-3, 3e-2),
    ("gan", 1, 4e-3, 1e-2), ("gan", 2, 4e-3, 1e-2), ("gan", 4, 4e-3, 1e-2),
    ("regression", 1, 8e-3, 3e-2)])
def test_distilled_gaussian_has_its_teacher_s_moments(kind, steps, generator_lr, fake_lr):
    """Generator, fake score and discriminator of a few parameters, by the real loop's functions."""
    torch.manual_seed(0)
    real = Gaussian(0.3, 0.5).requires_grad_(False)
    fake = Gaussian(torch.linspace(-0.6, -0.4, steps), torch.linspace(0.9, 1.1, steps))
    sigmas = dmd2.generator_sigmas(steps)
    generator, discriminator = Affine(sigmas), Moments()
    ema = teacher.frozen(generator)
    betas = (0.5, 0.99) if kind == "gan" else (0.9, 0.999)  # or else the two go round in circles
    generator_descent = descent(torch.optim.Adam(generator.parameters(), betas=betas))
    fake_descent = descent(torch.optim.Adam([*fake.parameters(), *discriminator.parameters()]))
    updates = 1000 * steps
    for step in range(updates):
        draw = teacher.Draw(teacher.GENERATOR, 0, step, 64, (1, 8, 8), "cpu")
        decay = 1 - step / updates
        k = dmd2.trained_step(steps, 0, step)
        x, sigma = dmd2.step_input(generator, sigmas, k, None, draw)
        x0 = generator(x, sigma, None)
        if step % 2 == 0:
            noise = draw.normal()
            if kind == "dm":
                sigma = teacher.sigma_at(draw.uniform(0.02, 0.98), "karras")
                loss = dmd2.dmd_loss(real, fake, x0, sigma, None, noise)
            elif kind == "gan":
                logits = discriminator(*dmd2.diffused(x0, draw, (0, 0.5)), None)
                loss = dmd2.generator_loss(logits)
            else:
                image = 0.3 + 0.5 * (80 * noise - 0.3) / math.hypot(80, 0.5)  # the exact flow's
                loss = dmd2.regression_loss(generator, sigmas[0], noise, None, image)
            generator_descent.add(loss)
            generator_descent.step(generator_lr * decay)
            teacher.update_ema(ema, generator, 0.99, step // 2)
        x0, sigma = x0.detach(), teacher.sigma_at(draw.uniform(), "karras")
        loss = teacher.denoising_loss(fake, x0, sigma, None, draw.normal())
        logits = [discriminator(*dmd2.diffused(images, draw, (0, 0.5)), None)
                  for images in (0.3 + 0.5 * draw.normal(), x0)]
        fake_descent.add(loss + dmd2.discriminator_loss(*logits))
        fake_descent.step(fake_lr * decay)
    noise = torch.randn(steps, 5000, 1, 8, 8)
    x0 = sample.few_step(ema, sigmas[0] * noise[0], sigmas, None, noise[1:])
    assert abs(x0.mean() - 0.3) < 0.05 and abs(x0.std() - 0.5) < 0.05


def test_gan_losses_are_the_official_ones():
    v = vectors("dmd2_losses")
    real, fake = v["gan/logits_real"].flatten(), v["gan/logits_fake"].flatten()
    torch.testing.assert_close(dmd2.generator_loss(fake), v["gan/generator_loss"])
    torch.testing.assert_close(dmd2.discriminator_loss(real, fake), v["gan/discriminator_loss"])


@pytest.mark.parametrize("side, mults", [(8, (1, 2)), (28, (1, 2, 2)), (32, (1, 2, 2)),
                                         (64, (1, 2, 2)), (4, (1, 1, 1))])
def test_discriminator_fits_the_network_and_tells_images_apart(side, mults):
    torch.manual_seed(0)
    denoiser = teacher.Denoiser(teacher.UNet(side, 3, 5, 8, mults, 1, ()))
    x, label = torch.randn(6, 3, side, side), torch.arange(6) % 5
    logits = dmd2.Discriminator(denoiser)(x, torch.ones(6), label)
    assert logits.shape == (6,) and len(logits.unique()) == 6


def test_gan_gradient_reaches_the_generator_and_nothing_on_its_way(tiny_teacher):
    checkpoint = teacher.load(tiny_teacher)
    generator, fake_score = (teacher.build(checkpoint).requires_grad_(True) for _ in range(2))
    discriminator, label = dmd2.Discriminator(fake_score), torch.arange(8)
    before = copy.deepcopy(discriminator.state_dict()), copy.deepcopy(generator.state_dict())
    x0 = generator(80 * torch.randn(8, 1, 8, 8), torch.full((8,), 80.0), label)
    loss = dmd2.generator_loss(discriminator(x0, torch.ones(8), label))
    step = descent(torch.optim.SGD(generator.parameters()))
    step.add(loss)
    assert step.step(1e-2)["gradient_norm"] > 0 and not equal(generator.state_dict(), before[1])
    assert equal(discriminator.state_dict(), before[0])
    assert all(p.grad is None for p in discriminator.parameters())


def test_discriminator_sees_images_with_noise_of_its_range_or_without():
    draw = teacher.Draw(teacher.GENERATOR, 0, 0, 500, (1, 8, 8), "cpu")
    x, sigma = dmd2.diffused(torch.zeros(500, 1, 8, 8), draw, (0.25, 0.5))
    low, high = teacher.sigma_at(torch.tensor([0.25, 0.5]), "karras")
    assert sigma.min() >= low and sigma.max() <= high and sigma.std() > 0
    assert (x / sigma.view(-1, 1, 1, 1)).std().item() == pytest.approx(1, abs=0.02)
    x, sigma = dmd2.diffused(torch.ones(500, 1, 8, 8), draw, None)
    assert (x == 1).all() and (sigma == teacher.SIGMA_MIN).all()


def test_only_the_generator_s_trained_step_has_a_gradient():
    with_grad = []

    def generator(x, sigma, label):
        with_grad.append((sigma[0].item(), torch.is_grad_enabled(), x.requires_grad))
        return x * weight

    weight = nn.Parameter(torch.tensor(0.5))
    draw = teacher.Draw(teacher.GENERATOR, 0, 0, 2, (1, 4, 4), "cpu")
    sigmas = dmd2.generator_sigmas(4)
    x, sigma = dmd2.step_input(generator, sigmas, 2, None, draw)
    generator(x, sigma, None).sum().backward()
    assert [level for level, *_ in with_grad] == pytest.approx(sigmas[:3])
    assert [grad for _, grad, _ in with_grad] == [False, False, True]
    assert not any(x_grad for *_, x_grad in with_grad) and weight.grad is not None


class Counting:
    """A Draw whose first noise is all 1, the second all 2, and so on."""

    def __init__(self):
        self.count = 0

    def normal(self):
        self.count += 1
        return torch.full((2, 1, 4, 4), float(self.count))


def test_input_of_a_step_is_what_sampling_gives_it():
    def generator(x, sigma, label):
        return x / 10

    sigmas = [80.0, 4.0, 2.0]
    for k, expected in enumerate((80, 8 + 4 * 2, (8 + 4 * 2) / 10 + 2 * 3)):
        x, sigma = dmd2.step_input(generator, sigmas, k, None, Counting())
        assert (sigma == sigmas[k]).all()
        torch.testing.assert_close(x, torch.full((2, 1, 4, 4), float(expected)))
    real = torch.full((2, 1, 4, 4), 0.5)
    x, _ = dmd2.step_input(generator, sigmas, 2, None, Counting(), real)
    torch.testing.assert_close(x, real + 2 * 3)


def test_sigmas_of_several_steps_fall_evenly_in_quantiles():
    assert dmd2.generator_sigmas(1) == pytest.approx([80])
    assert dmd2.generator_sigmas(4) == pytest.approx([80, 17.528, 2.5152, 0.16975], rel=1e-4)


def test_trained_step_is_drawn_evenly():
    steps = [dmd2.trained_step(4, 0, step) for step in range(400)]
    assert all(70 < steps.count(k) < 130 for k in range(4))


def test_guidance_moves_the_estimate_away_from_that_without_label(tiny_teacher):
    denoiser = teacher.build(teacher.load(tiny_teacher))
    x, sigma, label = torch.randn(4, 1, 8, 8), torch.full((4,), 0.5), torch.arange(4)
    guided = [sample.Guided(denoiser, guidance, 10)(x, sigma, label) for guidance in (0, 1, 2)]
    torch.testing.assert_close(guided[0], denoiser(x, sigma, torch.full((4,), 10)))
    torch.testing.assert_close(guided[1], denoiser(x, sigma, label))
    torch.testing.assert_close(guided[2], 2 * guided[1] - guided[0])
    assert (guided[1] - guided[0]).abs().max() > 1e-3


def test_pairs_are_the_teacher_s_images_and_kept_until_it_changes(tiny_teacher, tmp_path, capsys):
    checkpoint, path = teacher.load(tiny_teacher), tmp_path / "pairs.pt"
    denoiser = teacher.build(checkpoint)
    sampler = sample.teacher_sampler(denoiser, checkpoint, torch.device("cpu"))
    pairs = dmd2.load_pairs(sampler, "a", 12, path)
    sigmas = teacher.sampling_sigmas(18, "lognormal")
    expected = teacher.heun(denoiser, sigmas[0] * pairs.noise, sigmas, pairs.label)
    torch.testing.assert_close(pairs.images, expected, rtol=0, atol=1e-5)
    noise, label, images = pairs.batch(3, 5, seed=0)
    assert images.shape == noise.shape == (5, 1, 8, 8) and label.shape == (5,)

    unused = sampler._replace(x0=None)  # fails if it is called
    again = dmd2.load_pairs(unused, "a", 12, path)
    assert all(map(torch.equal, pairs, again)) and not capsys.readouterr().err
    denoiser = sample.Guided(denoiser, 1.5, 10)
    guided = sample.teacher_sampler(denoiser, checkpoint, torch.device("cpu"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(ValueError, match="a damaged checkpoint"):
        teacher.read(tmp_path / "flipped.pt", bool)
    for changed in ((unused, "b", 12), (unused._replace(name=guided.name), "a", 12),
                    (unused, "a", 13)):
        with pytest.raises(TypeError):
            dmd2.load_pairs(*changed, path)
        assert "making the pairs anew" in capsys.readouterr().err
    path.write_bytes(b"damaged")
    assert torch.equal(dmd2.load_pairs(sampler, "a", 12, path).images, pairs.images)


def test_regression_run_shows_its_pairs_and_uses_them_again(tiny_teacher, tmp_path):
    flags = [*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--sample-every", "4",
             "--regression-weight", "0.25", "--pairs", "20"]
    dmd2.main(flags)
    assert all(line["regression_loss"] > 0 for line in log_of(tmp_path) if "dmd_loss" in line)
    assert Image.open(tmp_path / "samples_000004.png").height > 6 * 56
    made = (tmp_path / "pairs.pt").stat().st_mtime_ns
    dmd2.main(flags)
    assert (tmp_path / "pairs.pt").stat().st_mtime_ns == made


def test_lpips_that_can_not_be_had_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match="pip install lpips"):
        dmd2.distance_function("lpips", "cpu")

    def no_weights(**options):
        raise OSError("no network")

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=no_weights))
    with pytest.raises(ValueError, match="weights can't be had .no network."):
        dmd2.distance_function("lpips", "cpu")


def test_lpips_sees_colour_images_of_224(monkeypatch):
    class Seen(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, a, b):
            assert a.shape == b.shape == (2, 3, 224, 224)
            return (a - b).square().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Seen))
    distance = dmd2.distance_function("lpips", "cpu")
    assert distance(torch.ones(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)).item() == pytest.approx(1)


def test_second_stage_begins_with_generator_and_fake_score_of_the_first(tiny_teacher,
                                                                        tiny_generator, tmp_path):
    first = teacher.load(tiny_generator)
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--steps", "1",
               "--init-from", tiny_generator, "--lr", "0", "--fake-lr", "0", "--ema", "0"])
    last = teacher.load(tmp_path / "last.pt")
    assert equal(last["training"]["generator"], first["model"])
    assert equal(last["training"]["fake_score"], first["fake_score"])
    assert not equal(first["fake_score"], first["model"])
    assert last["training"]["fake_descent"]["optimizer"]["state"][0]["step"] == 1


def test_discriminator_sees_real_images_as_real_with_their_own_labels(tiny_teacher, tmp_path,
                                                                      monkeypatch):
    seen, drawn = [], []

    def diffused(x0, draw, quantiles):
        drawn.append(x0)
        return x0, x0.new_full(x0.shape[:1], 0.5)

    def forward(self, x, sigma, label):
        seen.append((x, label))
        return x.mean((1, 2, 3))

    def loss(real_logits, fake_logits):
        assert torch.equal(real_logits, seen[-2][0].mean((1, 2, 3)))
        assert torch.equal(fake_logits, seen[-1][0].mean((1, 2, 3)))
        return (fake_logits - real_logits).mean()

    monkeypatch.setattr(dmd2, "diffused", diffused)
    monkeypatch.setattr(dmd2.Discriminator, "forward", forward)
    monkeypatch.setattr(dmd2, "discriminator_loss", loss)
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--steps", "2",
               "--evaluate-every", "0", "--gan-range", "0,0.9"])
    data = teacher.load_data("digits", "train")
    of_generator, real, fake, *_ = seen  # step 0: the generator's loss, then the discriminator's
    index = teacher.batch_at(0, len(data.images), 16, seed=0)
    assert torch.equal(real[0], teacher.to_float(data.images[index]))
    assert torch.equal(real[1], data.labels[index])
    assert torch.equal(fake[0], of_generator[0]) and torch.equal(fake[1], of_generator[1])
    assert not torch.equal(fake[1], real[1]) and not fake[0].requires_grad
    assert of_generator[0].requires_grad and len(seen) == 3 + 2


@pytest.mark.parametrize("flags, passes", [
    ("", 6 + 3), ("--gan-range 0,0.9", 7 + 4), ("--gan-features teacher", 7 + 4),
    ("--gan-weight 0", 4 + 2)])
def test_no_pass_through_a_network_is_made_twice(flags, passes, tiny_teacher, tmp_path,
                                                 monkeypatch):
    """Generator 1, losses of teacher and fake score 2 + 1; GAN 1, its discriminator 1 or 2."""
    def estimate(*args, **options):
        calls.append(1)
        return original(*args, **options)

    calls, original = [], teacher.Denoiser.estimate
    monkeypatch.setattr(teacher.Denoiser, "estimate", estimate)
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--steps", "2",
               "--evaluate-every", "0", *flags.split()])
    assert len(calls) == passes


def test_estimate_and_features_of_one_pass_are_those_of_two(tiny_teacher):
    denoiser = teacher.build(teacher.load(tiny_teacher))
    inputs = teacher.unit_noise(8, (1, 8, 8), 0), torch.linspace(0.1, 5, 8), torch.arange(8)
    assert equal(denoiser.estimate(*inputs), (denoiser(*inputs), denoiser.features(*inputs)))


@pytest.mark.parametrize("features, trains_encoder", [("fake", True), ("teacher", False)])
def test_discriminator_trains_the_encoder_that_it_shares(features, trains_encoder, tiny_teacher,
                                                         tmp_path):
    states = []
    for weight in ("0.01", "10"):
        dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--steps", "1",
                   "--evaluate-every", "0", "--gan-features", features, "--discriminator-weight",
                   weight, "--fake-lr", "0.01", "--clip", "1e9"])
        states.append(teacher.load(tmp_path / "last.pt")["training"]["fake_score"])
    assert equal(*states) == (not trains_encoder)


@pytest.mark.parametrize("flags, name, quantiles", [
    ("--dm-range 0.5,0.6", "dmd_loss", (0.5, 0.6)), ("", "dmd_loss", (0.02, 0.6)),
    ("--fake-range 0.1,0.2", "unit_error", (0.1, 0.2)), ("", "unit_error", (0, 1))])
def test_losses_draw_their_noise_levels_from_their_range(flags, name, quantiles, tiny_teacher,
                                                         tmp_path, monkeypatch):
    def seen(*args):
        sigmas.append(args[3])
        return original(*args)

    sigmas, original = [], getattr(dmd2, name)
    monkeypatch.setattr(dmd2, name, seen)
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), *flags.split(),
               "--evaluate-every", "0", "--batch", "256", "--steps", "1"])
    low, high = teacher.sigma_at(torch.tensor(quantiles), "karras")
    assert low <= sigmas[0].min() < 2 * low + 0.01 and high / 1.5 < sigmas[0].max() <= high


def test_without_gan_no_image_is_read(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(dmd2, "load_images", None)
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--gan-weight", "0",
               "--evaluate-every", "0"])
    assert not any("gan_loss" in line for line in log_of(tmp_path))


def test_guidance_of_the_teacher_reaches_the_loss(tiny_teacher, tmp_path):
    losses = []
    for guidance in ("1", "3"):
        dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--gan-weight",
                   "0", "--evaluate-every", "0", "--guidance", guidance])
        losses.append(log_of(tmp_path)[0]["dmd_loss"])
    assert losses[0] == 0 and losses[1] > 0  # fake score and teacher are the same at first


def test_weighted_sum_of_losses():
    losses = dict(a=torch.tensor(2.0), b=torch.tensor(3.0))
    assert dmd2.weighted(losses, dict(a=0.5, b=10, c=1)) == 31


def test_gan_alone_and_several_steps_train(tiny_teacher, tmp_path):
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--dm-weight", "0",
               "--gan-weight", "1", "--gan-features", "teacher", "--no-gan-noise",
               "--student-steps", "2", "--no-backward-simulation"])
    lines = [line for line in log_of(tmp_path) if "fake_loss" in line]
    assert not any("dmd_loss" in line for line in lines)
    assert all(line["discriminator_loss"] > 0 for line in lines)
    assert lines[0]["gan_loss"] > 0 and lines[0]["generator_gradient_norm"] > 0
    assert len(teacher.load(tmp_path / "generator.pt")["sigmas"]) == 2


@pytest.mark.parametrize("steps", [2])  # of 4 there is one in the README
def test_generator_of_several_steps_is_one_onnx_file(steps, tiny_teacher, tmp_path):
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--student-steps",
               str(steps), "--evaluate-every", "0", "--sample-every", "4"])
    path = tmp_path / "generator.pt"
    export.main([str(path)])
    generator, sigmas = teacher.build(teacher.load(path)), teacher.load(path)["sigmas"]
    session = onnxruntime.InferenceSession(tmp_path / "generator.onnx")
    for batch in (1, 5):
        noise, label = torch.randn(steps, batch, 1, 8, 8), torch.arange(batch)
        image, = session.run(None, {"noise": noise.numpy(), "label": label.numpy()})
        expected = sample.few_step(generator, 80 * noise[0], sigmas, label, noise[1:]).clamp(-1, 1)
        np.testing.assert_allclose(image, expected, rtol=0, atol=1e-5)
        noise[-1] += 1  # the last noise counts too
        assert abs(session.run(None, {"noise": noise.numpy(), "label": label.numpy()})[0]
                   - image).max() > 1e-3
    for source in ("generator.pt", "generator.onnx"):
        sample.main([str(tmp_path / source), "--n", "20", "--out", f"{tmp_path}/{source}.npz"])
    a, b = (np.load(f"{tmp_path}/generator.{kind}.npz")["images"].astype(int)
            for kind in ("pt", "onnx"))
    assert abs(a - b).max() <= 1


def test_new_run_leaves_nothing_of_the_one_it_replaces(tiny_teacher, tmp_path, capsys):
    for name in ("last.pt", "generator.pt", "samples_000099.png"):
        (tmp_path / name).write_text("old")
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path)])
    assert f"the run that was in {tmp_path} is in {tmp_path}/old1 now" in capsys.readouterr().err
    assert not (tmp_path / "samples_000099.png").exists()
    assert {path.name for path in (tmp_path / "old1").iterdir()} == {
        "last.pt", "generator.pt", "samples_000099.png"}
    assert teacher.load(tmp_path / "last.pt")["step"] == 4


def test_new_run_keeps_what_it_did_not_make(tmp_path):
    ours = dict.fromkeys(("config.json", "log.jsonl"), "mine")
    others = dict.fromkeys((".2024-notes.txt", "samples_best.png", "a.txt"), "mine")
    for name, text in {**ours, **others}.items():
        (tmp_path / name).write_text(text)
    teacher.main([*TINY, "--out", str(tmp_path)])
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert all((tmp_path / "old1" / name).read_text() == "mine" for name in ours)


def test_link_to_a_checkpoint_is_resumed_in_the_run_s_own_folder(tmp_path):
    teacher.main([*TINY, "--out", str(tmp_path / "run")])
    (tmp_path / "link.pt").symlink_to(tmp_path / "run" / "teacher.pt")
    teacher.main(["--resume", str(tmp_path / "link.pt"), "--steps", "6"])
    assert teacher.load(tmp_path / "run" / "teacher.pt")["step"] == 6
    assert {path.name for path in tmp_path.iterdir()} == {"link.pt", "run"}


def test_training_goes_on_where_stderr_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    teacher.run_script(lambda: teacher.main([*TINY, "--out", str(tmp_path)]))
    assert teacher.load(tmp_path / "teacher.pt")["step"] == 4


@pytest.mark.parametrize("line", ['{"step": 3, "loss": 1%s}' % ("0" * 400),
                                  '{"step": 3, "$x^$": 1}',
                                  '{"step": 3, "\\ud800": 1}', '{"step": 3, "loss": 1e308}',
                                  "[]"])
def test_line_of_a_log_that_no_run_writes_is_dropped(line, curves, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n' + line + "\n")
    assert len(teacher.read_log(path)) == 2
    teacher.plot_log(path)
    assert (tmp_path / "loss.png").exists()


def test_networks_start_as_the_teacher_which_stays_bit_identical(tiny_teacher, tmp_path,
                                                                 monkeypatch):
    built, at_start = [], []

    def build(*args):
        built.append(teacher.build(*args))
        at_start.append(copy.deepcopy(built[-1].state_dict()))
        return built[-1]

    monkeypatch.setattr(dmd2, "build", build)
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--gan-weight", "0"])
    frozen, generator, fake_score = (net.state_dict() for net in built)
    before = teacher.load(tiny_teacher)["model"]
    assert len(built) == 3 and all(equal(state, before) for state in at_start)
    assert equal(frozen, before)
    assert not equal(generator, before) and not equal(fake_score, before)
    first, _, third, *_ = (line for line in log_of(tmp_path) if "fake_loss" in line)
    assert first["dmd_loss"] == 0 and first["generator_gradient_norm"] == 0
    assert third["dmd_loss"] > 0


def test_two_time_scale_rule(tiny_teacher, tmp_path):
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--fake-steps", "3"])
    lines = [line for line in log_of(tmp_path) if "fake_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "dmd_loss" in line] == [1, 4]


# ---- optimisation and logging -------------------------------------------------------------------

def descent(optimizer, *flags):
    return teacher.Descent(optimizer, teacher.parse(teacher.Config, flags), torch.device("cpu"))


def test_descent_scales_the_gradient_down_and_returns_its_norm():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    step = descent(torch.optim.SGD([weight]), "--clip", "1")
    step.add(0.5 * weight.square().sum())
    assert step.step(lr=0.1) == {"gradient_norm": 5}
    torch.testing.assert_close(weight.detach(), torch.tensor([3 - 0.06, 4 - 0.08]))


def test_gradients_of_parts_make_that_of_the_whole():
    x, results = torch.randn(8, 3), []
    for count in (1, 4):
        torch.manual_seed(0)
        net = nn.Linear(3, 1)
        step = descent(torch.optim.SGD(net.parameters()), "--accumulate", str(count))
        for part in x.chunk(count):
            step.add(net(part).square().mean())
        results.append((step.step(lr=1.0)["gradient_norm"], *net.parameters()))
    torch.testing.assert_close(*results)


def test_float16_step_that_overflows_is_left_out_until_the_scale_is_spent():
    weight = nn.Parameter(torch.ones(1))
    step = descent(torch.optim.SGD([weight]), "--dtype", "float16")
    step.add(weight * 1e38)
    assert step.step(lr=1.0) == {"gradient_norm": 0, "left_out": 1} and weight == 1
    step.add(weight.sum())
    assert step.step(lr=0.25) == {"gradient_norm": 1, "left_out": 0} and weight == 0.75
    for _ in range(20):
        step.add(weight * math.nan)
        values = step.step(lr=1.0)
    assert values["gradient_norm"].isnan() and values["left_out"] == 0


def test_parts_of_all_ranks_make_up_the_batch(monkeypatch):
    cfg, found = types.SimpleNamespace(batch=24, accumulate=3), []
    monkeypatch.setattr(teacher, "ranks", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(teacher, "rank", lambda rank=rank: rank)
        found += teacher.parts_of(cfg)
    whole, *draws = (teacher.Draw(teacher.GENERATOR, 0, 5, 24, (1, 2, 2), "cpu", part)
                     for part in (slice(None), *found))
    expected, *each = [(draw.label(10), draw.uniform(), draw.normal()) for draw in (whole, *draws)]
    assert equal(expected, tuple(map(torch.cat, zip(*each))))


def as_ranks(script, argv, folder):
    """The exit status and the words of each of two processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = [in_child(run_in_child, script, argv, f"{folder}/words{rank}", be_rank, rank, port)
             for rank in range(2)]
    for process in ranks:
        process.join(120)
    return [(process.exitcode, Path(folder, f"words{rank}").read_text())
            for rank, process in enumerate(ranks)]


def be_rank(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=str(port),
                      MASTER_ADDR="localhost", TORCHELASTIC_RUN_ID="a")


def test_mistake_that_rank_0_meets_ends_the_others_without_a_word(tmp_path):
    (tmp_path / "file").touch()
    (status, words), other = as_ranks("teacher", [*TINY, "--out", f"{tmp_path}/file/run"], tmp_path)
    assert status == 2 and other == (1, "")
    assert words == f"teacher.py, rank 0: {tmp_path}/file/run: can't be written (Not a directory)\n"


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(teacher, "ranks", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert teacher.pick_device("auto").type == "cuda" and chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="PyTorch finds 2"):
        teacher.pick_device("cuda")


@pytest.mark.parametrize("flag, device, mode", [
    ("auto", "cpu", None), ("off", "cuda", None), ("on", "cpu", "default"),
    ("auto", "cuda", "reduce-overhead"), ("graphs", "cuda", "reduce-overhead")])
def test_networks_are_compiled_as_asked(flag, device, mode, tiny_teacher, monkeypatch):
    monkeypatch.setattr(teacher.importlib.util, "find_spec", lambda name: True)  # triton
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    denoiser = teacher.build(teacher.load(tiny_teacher))
    denoiser.net.compile = lambda **options: modes.append(options["mode"] or "default")
    modes, cfg = [], teacher.parse(teacher.Config, ["--compile", flag])
    teacher.prepare(cfg, torch.device(device), denoiser)
    assert modes == [mode] * (mode is not None)
    assert denoiser.dtype == (torch.bfloat16 if device == "cuda" else torch.float32)


@pytest.mark.parametrize("script, flags", [
    (teacher, "--steps 6 --batch 16 --width 8 --sample-every 2 --log-every 1"),
    (dmd2, "--steps 6 --batch 16 --evaluate-n 300 --evaluate-every 2 --log-every 1 --warmup 1 "
           "--student-steps 2 --gan-weight 1 --discriminator-weight 1 --save-every 2 "
           "--sample-every 2")])
def test_run_is_the_same_on_two_ranks_and_in_parts(script, flags, tiny_teacher, tmp_path):
    """Batch, noise and steps are the same; sums are taken in another order."""
    flags = flags.split() + ["--teacher", tiny_teacher] * (script is dmd2)
    one, parts, two = (tmp_path / name for name in ("one", "parts", "two"))
    script.main([*flags, "--out", str(one)])
    script.main([*flags, "--out", str(parts), "--accumulate", "4"])
    words = [*flags, "--out", two]
    if script is dmd2:  # begun alone, resumed on two
        script.main([*flags, "--out", str(two), "--steps", "2"])
        words = ["--resume", two / "last.pt", "--steps", "6"]
    ended = as_ranks(script.__name__, list(map(str, words)), tmp_path)
    assert [status for status, _ in ended] == [0, 0], ended
    assert [words.count("next: ") for _, words in ended] == [1, 0]
    expected = log_of(one)
    for folder in (parts, two):
        for line, same in zip(expected, log_of(folder), strict=True):
            assert line.keys() == same.keys()
            for name in line.keys() - {"images_per_second"}:
                tolerance = 1e-5 if "loss" in name else 1e-4
                assert same[name] == pytest.approx(line[name], rel=tolerance, abs=tolerance), name
        names = [{path.name for path in run.iterdir()} - {"loss.png"} for run in (folder, one)]
        assert names[0] == names[1]


def test_checkpointing_keeps_less_and_gives_the_same_gradients():
    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    results, sizes = [], []
    for flags in ([], ["--checkpointing"]):
        torch.manual_seed(0)
        denoiser = teacher.Denoiser(teacher.UNet(8, 1, 10, 16, (1, 2), 2, (4,)))
        teacher.prepare(teacher.parse(teacher.Config, flags), torch.device("cpu"), denoiser)
        x, label, kept = teacher.unit_noise(8, (1, 8, 8), 0), torch.arange(8), {}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = denoiser(x, torch.full((8,), 0.5), label).square().mean()
            sizes.append(sum(kept.values()))
        loss.backward()
        results.append([p.grad for p in denoiser.parameters()])
    assert equal(*results) and sizes[1] < 0.5 * sizes[0]


def test_frozen_teacher_is_in_the_compute_type_and_estimates_the_same(tiny_teacher):
    estimates = []
    for frozen in (False, True):
        denoiser = teacher.build(teacher.load(tiny_teacher)).requires_grad_(not frozen)
        cfg = teacher.parse(teacher.Config, ["--dtype", "bfloat16"])
        teacher.prepare(cfg, torch.device("cpu"), denoiser)
        types_of = {p.dtype for p in denoiser.parameters() if p.ndim == 4}
        assert types_of == {torch.bfloat16 if frozen else torch.float32}
        x, label = teacher.unit_noise(8, (1, 8, 8), 0), torch.arange(8)
        estimates.append(denoiser(x, torch.full((8,), 0.5), label).detach())
    assert equal(*estimates)


@pytest.mark.parametrize("script", [teacher, dmd2])
def test_profile_tells_where_the_step_goes_and_touches_no_run(script, tiny_teacher, tmp_path,
                                                              capsys):
    flags = ["--teacher", tiny_teacher] if script is dmd2 else ["--width", "8"]
    (tmp_path / "profile").mkdir()
    for path in ("last.pt", "profile/last.pt"):
        (tmp_path / path).write_text("a run's")
    script.main([*flags, "--batch", "16", "--profile", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "next: " not in out and (tmp_path / "last.pt").read_text() == "a run's"
    assert (tmp_path / "profile" / "last.pt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "profile"}
    assert "traceEvents" in json.loads((tmp_path / "profile" / "trace.json").read_text())
    names = ("generator", "fake_score", "teacher") if script is dmd2 else ("teacher",)
    assert all(f"{name}, forward" in out for name in names) and "backward" in out
    step, arithmetic = (float(re.search(rf"{name} +([0-9.]+) ms", out)[1])
                        for name in ("a step", "arithmetic"))
    assert 0 < arithmetic < step


def test_profile_counts_the_operations_of_a_step(tmp_path, capsys):
    def step():
        x, label = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
        denoiser(x, torch.ones(16), label).mean().backward()

    denoiser = teacher.Denoiser(teacher.UNet(8, 1, 10, 8, (1, 2), 1, (4,)))
    with FlopCounterMode(display=False) as counter:
        step()
    teacher.main(["--width", "8", "--batch", "16", "--profile", "--out", str(tmp_path)])
    found = float(re.search(r"([0-9.]+) GFLOP at", capsys.readouterr().out)[1])
    assert found == pytest.approx(counter.get_total_flops() / 1e9, abs=0.005)


def test_optimizer_state_of_another_device_takes_the_strides_of_this_one():
    """A GPU's are with the channels last; fused kernels would pair them wrongly."""
    states = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        nets = nn.Conv2d(4, 4, 3).to(memory_format=memory_format), nn.Conv2d(4, 4, 3)
        first, second = (descent(torch.optim.Adam(net.parameters(), fused=True)) for net in nets)
        for net, step in zip(nets, (first, second)):
            if net is nets[1]:
                net.load_state_dict(nets[0].state_dict())
                second.load_state_dict(first.state_dict())
            for _ in range(3):
                step.add(net(torch.ones(1, 4, 5, 5)).square().sum())
                step.step(lr=0.1)
        states.append([p.detach() for p in nets[1].parameters()])
    torch.testing.assert_close(*states)


def test_ema_is_the_weighted_mean():
    ema, model = nn.Linear(1, 1), nn.Linear(1, 1)
    expected = 0.9 * ema.weight + 0.1 * model.weight
    teacher.update_ema(ema, model, 0.9, update=80)  # from then on the decay is what was asked for
    torch.testing.assert_close(ema.weight, expected)
    teacher.update_ema(ema, model, 0.9, update=0)
    torch.testing.assert_close(ema.weight, 0.1 * expected + 0.9 * model.weight)


def test_learning_rate_rises_stays_and_falls():
    rates = [teacher.rate_at(update, 1.0, 4) for update in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1] and teacher.rate_at(0, 1.0, 0) == 1
    rates = [teacher.rate_at(update, 1.0, 4, 100) for update in (99, 100, 120, 140)]
    assert rates == pytest.approx([1, 1, 0.5, 0.25])


def test_divergence_stops_the_run_with_step_and_quantity(tmp_path, tiny_teacher, monkeypatch):
    def loss(*args):
        steps.append(1)
        return teacher.unit_error(*args) * (math.nan if len(steps) == 3 else 1)

    steps = []
    monkeypatch.setattr(dmd2, "unit_error", loss)
    with pytest.raises(FloatingPointError, match="fake_loss is nan at step 3"):
        dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path),
                   "--save-every", "2", "--log-every", "4"])
    assert teacher.load(tmp_path / "last.pt")["step"] == 2


@pytest.mark.parametrize("quantity", ["loss", "gradient_norm", "weight", "average"])
def test_teacher_that_diverges_stops_with_step_and_quantity(quantity, tmp_path, monkeypatch,
                                                            faults):
    """At step 3, so that the last checkpoint is of step 2."""
    def at_3(function, spoil):
        def call(*args, **options):
            steps.append(1)
            result = function(*args, **options)
            return spoil(result, *args) if len(steps) == 3 else result
        return call

    def spoiled(result, *nets):
        next(nets[quantity == "weight"].parameters()).data.fill_(math.inf)

    steps = []
    module, name, spoil = dict(
        loss=(teacher, "denoising_loss", lambda loss, *_: loss * math.nan),
        gradient_norm=(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    ).get(quantity, (teacher, "update_ema", spoiled))
    monkeypatch.setattr(module, name, at_3(getattr(module, name), spoil))
    says = dict(loss="loss is nan at step 3", gradient_norm="gradient_norm is inf at step 3",
                weight=r"training.model.net.map_label.weight is not finite after step 3",
                average=r"model.net.map_label.weight is not finite after step 3")[quantity]
    with pytest.raises(FloatingPointError, match=f"^{says}"):
        teacher.main([*TINY, "--save-every", "1", "--out", str(tmp_path)])
    assert teacher.load(tmp_path / "teacher.pt")["step"] == 2
    faults["runs that diverge"] += 1


def test_wandb_is_asked_for_by_name_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        teacher.main([*TINY, "--wandb", "--out", str(tmp_path / "run")])


# ---- checkpoints and resuming -------------------------------------------------------------------

def test_a_checkpoint_that_fails_to_be_written_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    teacher.save({"step": 1}, path)

    def full_disk(checkpoint, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError):
        teacher.save({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_loading_executes_nothing(tmp_path):
    torch.save({"kind": Planted(tmp_path / "executed")}, tmp_path / "hostile.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    for name, says in (("hostile.pt", "names 'posix mkdir', which no checkpoint .* does; refused"),
                       ("plain.pt", "plain.pt: not a checkpoint of this project")):
        with pytest.raises(ValueError, match=says):
            teacher.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit_or_are_not_finite_are_refused(tiny_generator):
    checkpoint = teacher.load(tiny_generator)
    with pytest.raises(ValueError, match="don't fit"):
        teacher.build(dict(checkpoint, network=dict(checkpoint["network"], num_blocks=3)))
    next(iter(checkpoint["model"].values())).fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        teacher.build(checkpoint)


def test_weights_that_are_more_than_their_file_are_refused(tiny_generator):
    checkpoint = teacher.load(tiny_generator)
    checkpoint["model"] = {name: torch.zeros(1).expand(weight.shape)
                           for name, weight in checkpoint["model"].items()}
    with pytest.raises(ValueError, match="are more than the file holds"):
        teacher.build(checkpoint)


@pytest.mark.parametrize("change", [
    dict(kind="other"), dict(data=None), dict(sigmas=[]), dict(network={}), dict(model={}),
    dict(prediction="w"), dict(config=None), dict(schedule="w"), dict(step=-1),
    dict(sigmas=[math.nan]),
    dict(data=dict(name="digits", size=None, shape=(1, 16, 16), classes=tuple("0123456789"),
                   flip=False)),
    dict(data=dict(name=5, size=None, shape=(1, 8, 8), classes=tuple("0123456789"), flip=False)),
    dict(data=dict(name="x", size=9, shape=(1, 8, 8), classes=tuple("0123456789"), flip=False)),
    dict(data=dict(name="x", size=8, shape=(1, 8, 8), classes=tuple(range(10)), flip=False)),
    dict(autoencoder={}), dict(autoencoder=dict(kind="autoencoder", network={}, model={})),
    dict(autoencoder=dict(kind="autoencoder", model={f"{i}": torch.zeros(1) for i in range(9)},
                          network=dict(img_resolution=8, img_channels=1, latent_channels=4,
                                       model_channels=8, channel_mult=(1, 2), num_blocks=1)))])
def test_checkpoint_whose_fields_do_not_fit_is_refused(change, tiny_generator, tmp_path):
    torch.save(dict(teacher.load(tiny_generator), **change), tmp_path / "changed.pt")
    with pytest.raises(ValueError, match="changed.pt: not a checkpoint of this project"):
        teacher.load(tmp_path / "changed.pt")


def test_a_flipped_byte_in_a_checkpoint_is_noticed(tiny_generator, tmp_path):
    content = bytearray(Path(tiny_generator).read_bytes())
    weight = max(teacher.load(tiny_generator)["model"].values(), key=torch.numel)
    content[content.index(weight.numpy().tobytes())] ^= 0xFF
    (tmp_path / "flipped.pt").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        teacher.load(tmp_path / "flipped.pt")


def test_log_that_was_not_written_whole_does_not_stop_a_resume(tiny_teacher, tmp_path):
    shutil.copytree(Path(tiny_teacher).parent, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text()[:-20])
    teacher.main(["--resume", str(tmp_path / "run" / "teacher.pt"), "--steps", "6"])
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 5, 6]


@pytest.mark.parametrize("script, flags, name", [
    (teacher, TINY, "teacher.pt"), (dmd2, TINY_DMD, "last.pt"),
    (teacher, [*TINY, "--dtype", "float16", "--decay-after", "3"], "teacher.pt"),
    (dmd2, [*TINY_DMD, "--gan-weight", "1", "--student-steps", "4"], "last.pt"),
    (dmd2, [*TINY_DMD, "--regression-weight", "1", "--pairs", "40"], "last.pt"),
    (teacher, [*TINY, "--autoencoder", "--mults", "1,2", "--flip"], "autoencoder.pt"),
    (teacher, [*TINY, "--latent", "AUTOENCODER", "--flip"], "teacher.pt"),
    (teacher, [*TINY, "--data", "FOLDER", "--size", "8", "--stream", "--flip"], "teacher.pt"),
    (dmd2, [*TINY_DMD, "--teacher", "LATENT_TEACHER", "--evaluate-every", "1"], "last.pt")])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(script, flags, name, tiny_teacher, latent,
                                                          tmp_path, faults):
    paths = dict(AUTOENCODER=latent / "moved" / "autoencoder.pt", FOLDER=tmp_path / "photos",
                 LATENT_TEACHER=latent / "teacher" / "teacher.pt")
    if "FOLDER" in flags:
        photographs(tmp_path / "photos", count=60)
    flags = [str(paths.get(word, word)) for word in flags]
    if script is dmd2 and "--teacher" not in flags:
        flags = [*flags, "--teacher", tiny_teacher, "--evaluate-every", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script.main([*flags, "--steps", "7", "--out", str(whole)])
    script.main([*flags, "--steps", "3", "--out", str(parts)])
    script.main(["--resume", str(parts / name), "--steps", "7"])
    a, b = teacher.load(whole / name), teacher.load(parts / name)
    assert a["step"] == b["step"] == 7
    assert equal(a["model"], b["model"]) and equal(a["training"], b["training"])
    if script is dmd2:
        a, b = (teacher.load(folder / "generator.pt") for folder in (whole, parts))
        assert equal(a["model"], b["model"]) and a["figures"] == b["figures"]
    values = [[line["loss" if script is teacher else "fake_loss"] for line in log_of(folder)
               if "gradient_norm" in line or "fake_loss" in line] for folder in (whole, parts)]
    assert values[0] == values[1] and len(values[0]) == 7
    faults["runs resumed"] += 1


def test_config_beside_the_run_and_in_the_checkpoint_are_the_options(tiny, tiny_teacher):
    config = json.loads((tiny / "teacher" / "config.json").read_text())
    assert config == teacher.load(tiny_teacher)["config"]
    assert config["width"] == 8 and config["lr"] == teacher.RECIPES["digits"]["lr"]


# ---- quality ------------------------------------------------------------------------------------

def test_frechet_distance_of_gaussians_is_the_closed_form():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5000, 3, dtype=torch.float64)
    a, b = (x - x.mean(0) for x in (a, b))
    a, b = (x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T for x in (a, b))
    std, mean = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 2.0])
    expected = mean.square().sum() + (std - 1).square().sum()  # commuting covariances
    assert sample.frechet_distance(a, b * std + mean) == pytest.approx(expected.item(), rel=1e-9)
    assert sample.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_precision_counts_fakes_among_the_real_and_recall_reals_among_the_fake():
    torch.manual_seed(0)
    left = torch.randn(500, 2)
    right = left + torch.tensor([100.0, 0.0])
    both = torch.cat([left, right])
    assert sample.precision_recall(both, left + 0.01) == pytest.approx((1, 0.5), abs=0.02)
    assert sample.precision_recall(left, both + 0.01) == pytest.approx((0.5, 1), abs=0.02)


def test_evaluation_of_the_training_images_themselves_is_perfect():
    reference = sample.load_reference(DIGITS)
    data = teacher.load_data("digits", "train")
    figures = sample.evaluate(data.images, data.labels, reference)
    assert figures["frechet_distance"] < 1e-6 and figures["accuracy"] == 1
    assert figures["precision"] == figures["recall"] == 1
    assert reference.floor["accuracy"] > 0.97 and reference.floor["n"] == 300


def test_evaluation_sees_blur_and_lost_classes():
    reference = sample.load_reference(DIGITS)
    data = teacher.load_data("digits", "train")
    good = sample.evaluate(data.images[::2], data.labels[::2], reference)
    kept = data.labels[::2] < 8
    fewer = sample.evaluate(data.images[::2][kept], data.labels[::2][kept], reference)
    smooth = torch.nn.functional.avg_pool2d(teacher.to_float(data.images[::2]), 3, 1, 1)
    blurred = sample.evaluate(teacher.to_uint8(smooth), data.labels[::2], reference)
    assert fewer["frechet_distance"] > 4 * good["frechet_distance"] and fewer["recall"] < 0.85
    assert blurred["frechet_distance"] > 4 * good["frechet_distance"] and blurred["precision"] < 0.7


@pytest.mark.parametrize("name", sample.SHA256)
def test_feature_networks_are_the_stated_ones_and_small(name):
    path = sample.ASSETS / f"features_{name}.pt"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sample.SHA256[name]
    assert sum(p.stat().st_size for p in sample.ASSETS.glob("features_*.pt")) < 1e6


def test_report_tells_figures_floor_and_protocol(tiny_generator, capsys):
    sample.main([tiny_generator, "--evaluate", "--n", "200", "--seeds", "2"])
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    for word in ("200 samples", "1497 training images of digits", sample.SHA256["digits"][:12],
                 "EMA", "1 function evaluation(s)", "seeds 0, 1"):
        assert word in result["protocol"]
    assert result["ratio_to_floor"] == pytest.approx(
        result["mean"]["frechet_distance"] / result["floor"]["frechet_distance"])
    assert result["spread"]["frechet_distance"] > 0 and "classified as asked" in out


# ---- ONNX ---------------------------------------------------------------------------------------

def run_onnx(path, batch, seed=0):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    noise = teacher.unit_noise(batch, (1, 8, 8), seed)
    label = torch.arange(batch) % 10
    image, = session.run(None, {"noise": noise.numpy(), "label": label.numpy()})
    return image, noise, label


@pytest.mark.parametrize("flags, tolerance", [([], 1e-5), (["--uint8"], 1), (["--fp16"], 1e-2)])
def test_onnx_file_keeps_its_contract(flags, tolerance, tiny_generator, tmp_path):
    path = tmp_path / "g.onnx"
    export.main([tiny_generator, *flags, "--out", str(path)])
    model = onnx.load(path)
    assert [i.name for i in model.graph.input] == ["noise", "label"]
    assert [o.name for o in model.graph.output] == ["image"]
    types = [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)]
    image_type = onnx.TensorProto.UINT8 if flags == ["--uint8"] else onnx.TensorProto.FLOAT
    assert types == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, image_type]
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert list(tmp_path.iterdir()) == [path]

    checkpoint = teacher.load(tiny_generator)
    generator = teacher.build(checkpoint)
    for batch in (1, 3, 64, 257):
        image, noise, label = run_onnx(path, batch)
        expected = generator(80 * noise, torch.full((batch,), 80.0), label).clamp(-1, 1)
        if flags == ["--uint8"]:
            expected = teacher.to_uint8(expected).permute(0, 2, 3, 1)
        assert image.shape == expected.shape
        assert batch < 64 or expected.float().std() > 0.2 * (127.5 if flags == ["--uint8"] else 1)
        assert abs(image.astype(float) - expected.numpy().astype(float)).max() <= tolerance


def test_onnx_file_is_right_for_a_thousand_inputs_and_every_batch_size(tiny, tiny_generator,
                                                                       faults):
    checkpoint = teacher.load(tiny_generator)
    generator, label = teacher.build(checkpoint), torch.randint(10, (1000,))
    label[:2] = torch.tensor([0, 9])
    noise = torch.randn(1000, 1, 8, 8)
    kinds = [noise, torch.zeros(20, 1, 8, 8), 100 * noise[:20], 1e6 * noise[:20], 1e30 * noise[:20],
             torch.full((20, 1, 8, 8), 1e-30), -torch.ones(20, 1, 8, 8)]
    session = onnxruntime.InferenceSession(tiny / "dmd2" / "generator.onnx")
    for noise in kinds:
        images, = session.run(None, {"noise": noise.numpy(), "label": label[:len(noise)].numpy()})
        with torch.no_grad():
            expected = generator(80 * noise, torch.full((len(noise),), 80.0), label[:len(noise)])
        finite = expected.isfinite()  # 80 times 1e30, squared for its norm, is more than float32
        difference = (torch.from_numpy(images) - expected.clamp(-1, 1))[finite].abs()
        assert finite.all() == (noise.abs().max() < 1e20) and (difference <= 1e-5).all()
        faults["inputs of an exported file"] += len(noise)
    noise = torch.randn(257, 1, 8, 8)
    whole, = session.run(None, {"noise": noise.numpy(), "label": label[:257].numpy()})
    for batch in range(1, 258):
        part = {"noise": noise[:batch].numpy(), "label": label[:batch].numpy()}
        images, = session.run(None, part)
        assert images.shape == (batch, 1, 8, 8) and abs(images - whole[:batch]).max() <= 1e-5
        faults["inputs of an exported file"] += batch


def test_label_that_is_no_class_is_refused_by_the_graph(tiny, tiny_generator):
    checkpoint = teacher.load(tiny_generator)
    exported = export.Exported(teacher.build(checkpoint), checkpoint["sigmas"], 10)
    session = onnxruntime.InferenceSession(tiny / "dmd2" / "generator.onnx")
    noise = teacher.unit_noise(2, (1, 8, 8), 0)
    for wrong in (10, 11, -1, -2, -10, 2**40, -2**63):
        label = torch.tensor([3, wrong])
        with pytest.raises(Exception, match="indices element out of data bounds"):
            session.run(None, {"noise": noise.numpy(), "label": label.numpy()})
        with pytest.raises(IndexError):
            exported(noise, label)


def test_uint8_of_an_exported_file_is_rounded_as_pytorch_does(tmp_path):
    """By a generator that gives its input back: both sides of every boundary between two levels."""
    edges = (torch.arange(257) - 128) / 127.5
    x = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1), torch.randn(253)])
    noise, label = x.view(-1, 1, 8, 8), torch.zeros(16, dtype=torch.long)
    exported = export.Exported(Passing(), [1.0], 10, uint8=True)
    export.export_onnx(exported, (1, 8, 8), dict(), tmp_path / "g.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx")
    image, = session.run(None, {"noise": noise.numpy(), "label": label.numpy()})
    expected = teacher.to_uint8(noise.clamp(-1, 1)).permute(0, 2, 3, 1)
    assert np.array_equal(image, expected.numpy()) and len(np.unique(image)) == 256


class Passing(nn.Module):
    """A generator whose image is its noise."""

    def forward(self, x, sigma, label):
        return x + 0 * label.view(-1, 1, 1, 1)


def test_app_without_the_project_runs_the_file(tiny, tmp_path):
    """The README's snippet, in an isolated Python that can't find the scripts or PyTorch."""
    snippet, = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "runs" / "dmd2").mkdir(parents=True)
    shutil.copy(tiny / "dmd2" / "generator.onnx", tmp_path / "runs" / "dmd2")
    code = ("import sys; sys.modules.update(torch=None, onnx=None)\n" + snippet
            + "\nassert pixels.shape == (10, 1, 8, 8) and 'teacher' not in sys.modules")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


def test_onnxruntime_has_nothing_to_transpose(tiny, tmp_path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "run.onnx")
    onnxruntime.InferenceSession(tiny / "dmd2" / "generator.onnx", options,
                                 providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert "FusedMatMul" in operators and "Transpose" not in operators


def test_bound_session_fills_the_output_with_the_images(tiny, tiny_generator):
    checkpoint = teacher.load(tiny_generator)
    exported = export.Exported(teacher.build(checkpoint), checkpoint["sigmas"], 10)
    noise, label = exported.example(5, (1, 8, 8)), torch.arange(5)
    image = torch.zeros(5, 1, 8, 8)
    export.bound(tiny / "dmd2" / "generator.onnx", noise, label, image, torch.device("cpu"))()
    torch.testing.assert_close(image, exported(noise, label).detach(), atol=1e-5, rtol=0)


def test_medians_are_of_calls_that_take_turns():
    order = []
    found = export.medians(dict(a=lambda: order.append("a"), b=lambda: order.append("b")),
                           torch.device("cpu"), rounds=2, budget=0)
    assert "".join(order) == "aaabbbaaabbb" and all(0 < found[name] < 1 for name in "ab")


def test_onnx_image_depends_on_noise_and_label(tiny):
    session = onnxruntime.InferenceSession(tiny / "dmd2" / "generator.onnx")
    noise = teacher.unit_noise(1, (1, 8, 8), 0).numpy()
    images = [session.run(None, {"noise": scale * noise, "label": np.array([label])})[0]
              for scale, label in ((1, 0), (1, 1), (-1, 0))]
    assert abs(images[0] - images[1]).max() > 0.05 and abs(images[0] - images[2]).max() > 0.05


def test_onnx_metadata_hold_the_contract_and_no_path(tiny):
    path = tiny / "dmd2" / "generator.onnx"
    facts = json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["dmd2"])
    assert facts["data"]["classes"] == list("0123456789") and facts["data"]["shape"] == [1, 8, 8]
    assert facts["sigmas"] == [80.0] and facts["steps"] == 1
    assert facts["figures"]["frechet_distance"] > 0
    digest = hashlib.sha256((tiny / "dmd2" / "generator.pt").read_bytes()).hexdigest()
    assert facts["checkpoint_sha256"] == digest
    content = path.read_bytes()
    for part in (str(ROOT), str(tiny), str(Path(torch.__file__).parent), "export.py", "teacher.py"):
        assert part.encode() not in content


def test_onnx_file_of_a_folder_takes_the_folder_again(tmp_path, monkeypatch):
    for i in range(60):
        Path(tmp_path / f"mine/{i % 10}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"mine/{i % 10}/{i}.png")
    monkeypatch.chdir(tmp_path)
    teacher.main([*TINY, "--data", "mine", "--size", "8", "--out", "t"])
    dmd2.main([*TINY_DMD, "--teacher", "t/teacher.pt", "--out", "g", "--evaluate-every", "0"])
    export.main(["g/generator.pt"])
    Path("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="mine: no such folder; --data tells where it is"):
        sample.main(["../g/generator.onnx", "--beside", "../g/generator.pt", "--out", "a.png"])
    sample.main(["../g/generator.onnx", "--beside", "../g/generator.pt", "--out", "a.png", "--data",
                 "../mine"])
    with pytest.raises(ValueError, match="was trained on mine; leave it out"):
        sample.main(["../g/generator.onnx", "--data", "digits"])


def test_images_that_are_not_finite_are_not_written(tiny_teacher, tmp_path):
    with pytest.raises(FloatingPointError, match="images are not finite"):
        sample.main([tiny_teacher, "--guidance", "1e38", "--out", str(tmp_path / "a.png")])
    assert not list(tmp_path.iterdir())


def test_onnx_file_alone_makes_the_checkpoint_s_images(tiny, tiny_generator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for source in (tiny_generator, str(tiny / "dmd2" / "generator.onnx")):
        sample.main([source, "--n", "20", "--out", Path(source).suffix[1:] + ".npz"])
    a, b = np.load("pt.npz"), np.load("onnx.npz")
    assert a["images"].shape == (20, 8, 8, 1) and a["images"].dtype == np.uint8
    assert abs(a["images"].astype(int) - b["images"].astype(int)).max() <= 1
    assert a["labels"].tolist() == b["labels"].tolist() == [i % 10 for i in range(20)]


def test_export_that_differs_from_pytorch_leaves_no_file(tiny_generator, tmp_path, monkeypatch,
                                                         capsys):
    original = export.export_onnx

    def wrong(exported, *args):
        exported = copy.deepcopy(exported)
        with torch.no_grad():
            exported.generator.net.dec["8x8_aux_conv"].bias += 0.1
        original(exported, *args)

    monkeypatch.setattr(export, "export_onnx", wrong)
    with pytest.raises(SystemExit) as stop:
        export.main([tiny_generator, "--out", str(tmp_path / "g.onnx")])
    assert stop.value.code == 1 and "differs from PyTorch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_file_with_weights_that_are_not_finite_is_not_exported(tiny, tiny_generator, tmp_path,
                                                               monkeypatch):
    original = export.export_onnx

    def broken(exported, *args):
        with torch.no_grad():
            exported.generator.net.map_layer0.bias.fill_(math.nan)
        original(exported, *args)

    monkeypatch.setattr(export, "export_onnx", broken)
    with pytest.raises(SystemExit):
        export.main([tiny_generator, "--out", str(tmp_path / "g.onnx")])
    assert not list(tmp_path.iterdir())


def test_provider_that_did_not_load_is_an_error(tiny, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    with pytest.raises(ValueError, match="did not load CUDAExecutionProvider"):
        sample.onnx_session(tiny / "dmd2" / "generator.onnx", "cuda")


# ---- what users see -----------------------------------------------------------------------------

def fails(main, argv, capsys):
    """Run a script's main as its command does; returns the one line it must fail with, status 2."""
    with pytest.raises(SystemExit) as stop:
        teacher.run_script(lambda: main(argv))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("main, argv, says", [
    (teacher.main, "--data cifra", "cifra: no such folder, and none of digits, mnist"),
    (teacher.main, "--data mnist --data-dir /dev/null/x", "--data digits needs no download"),
    (teacher.main, "--batch 1500", "--batch 1500: digits has only 1497"),
    (teacher.main, "--batch 0", "--batch 0: must be at least 1"),
    (teacher.main, "--batch 16 --accumulate 3", "--accumulate 3 x 1 processes; give a multiple"),
    (teacher.main, "--batch many", "invalid int value: 'many'"),
    (teacher.main, "--lr nan", "--lr nan: must be"),
    (teacher.main, "--mults 1,x", "--mults 1,x: needs positive integers"),
    (teacher.main, "--mults 9999999999", "needs positive integers below 1000, such as"),
    (teacher.main, "--mults 1,0000009991", "needs positive integers below 1000, such as"),
    (teacher.main, "--width 2147483644", "must be below 65536"),
    (teacher.main, "--min-snr-gamma 1e300", "must be at most"),
    (teacher.main, "--data=", "--data: is empty"),
    (teacher.main, "--mults 1,2,2,2,2", "multiple of 16"),
    (teacher.main, "--schedule cosin", "--schedule cosin: choose from lognormal"),
    (teacher.main, "--bacth 3", "unrecognized arguments: --bacth"),
    (teacher.main, "--out /dev/null/run", "/dev/null/run"),
    (teacher.main, "--resume nowhere.pt", "nowhere.pt: no such checkpoint"),
    (dmd2.main, "", "--teacher is missing"),
    (dmd2.main, "--teacher nowhere.pt", "nowhere.pt: no such checkpoint"),
    (dmd2.main, "--teacher TEACHER --student-steps 3", "choose from 1, 2, 4"),
    (dmd2.main, "--teacher TEACHER --dm-weight 0 --gan-weight 0", "nothing is left to train"),
    (dmd2.main, "--teacher TEACHER --dm-range 0.5", "--dm-range 0.5: needs two numbers from 0"),
    (dmd2.main, "--teacher TEACHER --gan-range 0.9,0.1", "the smaller one first"),
    (dmd2.main, "--teacher TEACHER --no-backward-simulation", "give --student-steps 2 or 4"),
    (dmd2.main, "--teacher TEACHER --student-steps 2 --regression-weight 1", "of one step"),
    (dmd2.main, "--teacher TEACHER --init-from TEACHER", "holds no fake score"),
    (dmd2.main, "--teacher OTHER --init-from GENERATOR", "has another data than --teacher"),
    (dmd2.main, "--teacher TEACHER --init-from GENERATOR --student-steps 4", "--student-steps 1"),
    (dmd2.main, "--teacher TEACHER --init-from GENERATOR --out FOLDER", "name another folder"),
    (dmd2.main, "--teacher TEACHER --init-from GENERATOR --conditioning-sigma 9", "another noise"),
    (dmd2.main, "--teacher TEACHER --out TEACHER_S", "name another folder"),
    (dmd2.main, "--teacher TEACHER --dm-weight inf", "--dm-weight inf: must be below inf"),
    (dmd2.main, "--teacher TEACHER --fake-weight 0", "needs a fake score that learns"),
    (dmd2.main, "--teacher TEACHER --discriminator-weight 0", "needs a discriminator that learns"),
    (dmd2.main, "--teacher TEACHER --regression-weight 1 --pairs 9", "--pairs 9: "),
    (dmd2.main, "--teacher TEACHER --batch 1500 --gan-weight 1", "digits has only 1497"),
    (dmd2.main, "--teacher NO_NULL --guidance 1.5", "knows no images without label"),
    (dmd2.main, "--teacher GENERATOR", "holds a generator"),
    (dmd2.main, "--teacher LATENT --gan-weight 0 --regression-weight 1 --regression-distance lpips",
     "this teacher makes latents; use mse"),
    (dmd2.main, "--teacher TEACHER --out /dev/null/run", "/dev/null/run"),
    (dmd2.main, "--resume LAST --batch 32", "--batch 32: the run to resume has 16"),
    (dmd2.main, "--resume GENERATOR", "holds no optimizers"),
    (teacher.main, "--width 30", "width 30: must be a multiple of 4"),
    (teacher.main, "--resume LAST", "holds a generator of another script"),
    (dmd2.main, "--resume TEACHER", "holds a teacher of another script"),
    (dmd2.main, "--resume LAST", "--steps 4: "),
    (dmd2.main, "--resume LAST --steps 8 --out x", "goes on in its own folder"),
    (teacher.main, "--autoencoder --schedule cosine", "--schedule cosine: is for teachers"),
    (teacher.main, "--kl-weight 1", "--kl-weight 1.0: is for --autoencoder; leave it out"),
    (teacher.main, "--latent TEACHER", "of kind teacher; needed is one of kind autoencoder"),
    (teacher.main, "--latent AUTOENCODER --data mnist", "those of digits; leave it out"),
    (teacher.main, "--latent AUTOENCODER --autoencoder", "leave out --autoencoder"),
    (teacher.main, "--latent AUTOENCODER --mults 1,2,2,2", "side 4: the network's 4 levels"),
    (teacher.main, "--size 32", "--size 32: is for folders of images"),
    (teacher.main, "--stream", "--stream: is for folders of images, and digits is none"),
    (dmd2.main, "--teacher TEACHER --stream", "--stream: is for folders of images, and digits is"),
    (sample.main, "AUTOENCODER --evaluate --n 200", "of which all held-out images are evaluated"),
    (teacher.main, "--resume LATENT --latent x.pt --steps 9", "--latent x.pt: the run to resume"),
    (sample.main, "AUTOENCODER", "holds an autoencoder; a teacher of its latents"),
    (dmd2.main, "--teacher AUTOENCODER", "holds an autoencoder; a teacher of its latents"),
    (export.main, "AUTOENCODER", "holds an autoencoder; a teacher of its latents"),
    (teacher.main, "--resume GENERATOR", "holds no optimizers"),
    (sample.main, "TEACHER --map --interpolate", "are different things; give one of them"),
    (sample.main, "TEACHER --map --labels 3", "leave out --labels"),
    (sample.main, "TEACHER --trajectory --out x.npz", "must end in .png"),
    (sample.main, "ONNX --trajectory", "an ONNX file tells its images only"),
    (sample.main, "", "no checkpoint given"),
    (sample.main, "nowhere.pt", "nowhere.pt: no such checkpoint"),
    (sample.main, "nowhere.onnx", "nowhere.onnx: no such file"),
    (sample.main, "README", "not a checkpoint of this project"),
    (sample.main, "FOREIGN", "not a checkpoint of this project"),
    (sample.main, "GENERATOR --labels 3,10", "'10' is no class; there are 0 to 9"),
    (sample.main, "GENERATOR --labels 3,,7", "'' is no class"),
    (sample.main, "GENERATOR --steps 4", "--steps 4: is for teachers"),
    (sample.main, "GENERATOR --sampler ddim", "--sampler ddim: is for teachers"),
    (sample.main, "GENERATOR --guidance 2", "--guidance 2.0: is for teachers"),
    (sample.main, "TEACHER --eta 1", "--eta 1.0: not an option of --sampler heun"),
    (sample.main, "TEACHER --sampler ddpm --churn 9", "--churn 9.0: not an option of"),
    (sample.main, "TEACHER --sampler plms", "choose from heun, euler, ddim, ddpm"),
    (sample.main, "NO_NULL --guidance 2", "knows no images without label"),
    (sample.main, "TEACHER --data mnist", "was trained on digits; leave it out"),
    (sample.main, "TEACHER --sampler ddim --eta 1.5", "--eta 1.5: must be at most 1"),
    (sample.main, "TEACHER --s-noise 1.1", "say how --churn adds noise"),
    (sample.main, "TEACHER --churn 9 --s-min 5 --s-max 4", "--s-min 5.0: is above --s-max 4.0"),
    (sample.main, "GENERATOR --beside GENERATOR --churn 9", "--churn 9.0: is for teachers"),
    (export.main, "PLAIN", "not a checkpoint of NVlabs/edm"),
    (dmd2.main, "--teacher TEACHER --init-from PLAIN", "not a checkpoint of NVlabs/edm"),
    (teacher.main, "--config CONFIG --resume TEACHER", "leave out --config"),
    (dmd2.main, "--teacher TEACHER --conditioning-sigma 81", "must be at most 80"),
    (sample.main, "nowhere.pkl", "nowhere.pkl: no such checkpoint"),
    (sample.main, "PLAIN", "not a checkpoint of NVlabs/edm"),
    (dmd2.main, "--teacher PLAIN", "not a checkpoint of NVlabs/edm"),
    (dmd2.main, "--teacher TEACHER --data mnist", "was trained on digits; leave it out"),
    (teacher.main, "--min-snr-gamma 0", "--min-snr-gamma 0.0: must be at least"),
    (sample.main, "GENERATOR --out /dev/null/x.png", "/dev/null"),
    (sample.main, "GENERATOR --evaluate --out x.png", "leave out"),
    (sample.main, "GENERATOR --evaluate --n 50", "at least 100"),
    (sample.main, "GENERATOR --out x.jpg", "must end in .png or .npz"),
    (sample.main, "GENERATOR --beside TEACHER --n 3", "leave out --labels and --n"),
    (sample.main, "GENERATOR --beside nowhere.pt", "nowhere.pt: no such checkpoint"),
    (export.main, "", "no checkpoint given"),
    (export.main, "GENERATOR --out GENERATOR", "must end in .onnx"),
    (export.main, "TEACHER", "distil it first"),
    (export.main, "GENERATOR --out /dev/null/x.onnx", "/dev/null"),
])
def test_mistake_of_the_user_is_one_line_and_status_2(main, argv, says, tiny, tiny_teacher,
                                                      tiny_generator, latent, tmp_path,
                                                      monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    (tiny / "plain.pkl").write_bytes(pickle.dumps("text"))
    paths = dict(CONFIG=str(tiny / "teacher" / "config.json"), PLAIN=str(tiny / "plain.pkl"),
                 TEACHER=tiny_teacher, GENERATOR=tiny_generator,
                 LAST=str(tiny / "dmd2" / "last.pt"), README=str(ROOT / "README.md"),
                 FOREIGN=str(tmp_path / "foreign.pt"), FOLDER=str(tiny / "dmd2"),
                 TEACHER_S=str(tiny / "teacher"), ONNX=str(tiny / "dmd2" / "generator.onnx"),
                 AUTOENCODER=str(latent / "moved" / "autoencoder.pt"),
                 LATENT=str(latent / "teacher" / "teacher.pt"),
                 NO_NULL=str(tiny / "no_null.pt"), OTHER=str(tiny / "other.pt"))
    checkpoint = teacher.load(tiny_teacher)
    checkpoint["config"]["label_dropout"] = 0.0
    torch.save(checkpoint, tiny / "no_null.pt")
    checkpoint["data"]["classes"] = tuple("abcdefghij")
    torch.save(checkpoint, tiny / "other.pt")
    capsys.readouterr()
    line = fails(main, [paths.get(word, word) for word in argv.split()], capsys)
    assert says in line and "Traceback" not in line
    assert [p.name for p in tmp_path.iterdir()] == ["foreign.pt"]


def test_device_that_is_not_there_is_refused(capsys):
    missing = "mps" if torch.cuda.is_available() else "cuda"
    assert f"--device {missing}" in fails(teacher.main, ["--device", missing], capsys)


def test_a_script_started_as_users_do_fails_in_one_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "nothing.pt"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("sample.py: nothing.pt: no such checkpoint")
    assert len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize("name", sample.SHA256)
def test_feature_network_can_be_made_anew(name, tmp_path, monkeypatch):
    data = teacher.load_data("digits", "train")
    monkeypatch.setattr(sample, "load_data", lambda *args: data)
    monkeypatch.setattr(sample, "train_features", lambda data, device: sample.FeatureNet(1, 10))
    sample.main(["--train-features", name, "--out", str(tmp_path / "f.pt")])
    committed = torch.load(sample.ASSETS / f"features_{name}.pt", weights_only=True)
    assert committed.keys() == torch.load(tmp_path / "f.pt", weights_only=True).keys()


def test_feature_network_of_other_data_is_trained_once_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    data = teacher.load_data("digits", "test")
    first = sample.load_features(data, "mine")[1]
    assert "training a feature network for mine" in capsys.readouterr().err
    assert sample.load_features(data, "mine")[1] == first and not capsys.readouterr().err


def test_checkpoints_beside_each_other_make_one_picture(tiny_teacher, tiny_generator, tmp_path):
    path = tmp_path / "beside.png"
    sample.main([tiny_generator, "--beside", tiny_teacher, "--out", str(path)])
    width, height = Image.open(path).size
    assert width > 17 * 56 and height > 10 * 56


def test_labels_make_a_row_per_class_and_a_folder_a_file_per_image(tiny_generator, tmp_path):
    sample.main([tiny_generator, "--labels", "3,3,7", "--out", str(tmp_path / "grid.png")])
    sample.main([tiny_generator, "--labels", "3,3,7", "--out", str(tmp_path / "folder")])
    assert Image.open(tmp_path / "grid.png").size[1] < Image.open(tmp_path / "grid.png").size[0] * 2
    names = sorted(p.name for p in (tmp_path / "folder").iterdir())
    assert names == ["00000_3.png", "00001_3.png", "00002_7.png"]
    assert Image.open(tmp_path / "folder" / names[0]).size == (8, 8)


def test_training_leaves_its_log_and_pictures(curves, tiny_teacher, tmp_path):
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--out", str(tmp_path), "--sample-every", "2",
               "--evaluate-every", "2"])
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {".lock", "config.json", "log.jsonl", "loss.png", "generator.pt", "last.pt",
                     "samples_000002.png", "samples_000004.png"}
    evaluations = [line for line in log_of(tmp_path) if "frechet_distance" in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert log_of(tmp_path)[0]["teacher_frechet_distance"] > 0
    best, last = (teacher.load(tmp_path / name) for name in ("generator.pt", "last.pt"))
    assert best["step"] in (2, 4) and best["figures"]["frechet_distance"] == pytest.approx(
        evaluations[best["step"] // 2 - 1]["frechet_distance"], rel=1e-5)
    assert last["step"] == 4 and last["best"] == best["figures"]
    assert "1497 training images of digits" in best["figures"]["protocol"]


def test_best_generator_has_about_the_teacher_s_recall_and_then_the_least_distance():
    keeper = types.SimpleNamespace(teacher_figures=dict(recall=0.9))
    figures = [dict(frechet_distance=distance, recall=recall) for distance, recall in
               ((0.2, 0.88), (0.3, 0.95), (0.1, 0.8), (0.05, 0.7))]
    assert sorted(figures[::-1], key=lambda f: dmd2.Keeper.merit(keeper, f))[::-1] == figures


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no compiler")
def test_compiled_bfloat16_network_is_the_plain_one_within_its_precision(tiny_teacher):
    """torch.compile and autocast, the defaults on CUDA: same estimate, same gradients."""
    results = []
    for flags in ([], ["--compile", "on", "--dtype", "bfloat16"]):
        denoiser = teacher.build(teacher.load(tiny_teacher)).requires_grad_(True)
        cfg = teacher.parse(teacher.Config, flags)
        teacher.prepare(cfg, torch.device("cpu"), denoiser)
        x, label = teacher.unit_noise(8, (1, 8, 8), 0), torch.arange(8)
        x0_hat = denoiser(x, torch.full((8,), 0.5), label)
        x0_hat.square().mean().backward()
        gradient = torch.cat([p.grad.flatten() for p in denoiser.parameters()])
        assert x0_hat.dtype == torch.float32
        results.append((x0_hat.detach(), gradient))
    for plain, fast in zip(*results):
        assert 0 < (plain - fast).norm() < 0.05 * plain.norm()


# ---- faults: nothing lost ------------------------------------------------------------------------

def in_child(function, *args):
    """Start a process that calls a function of this file, quickly: it has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all"])
    process = context.Process(target=function, args=args)
    process.start()
    # Its exit code can be read once, and any other start, or the end of a script, would read it.
    multiprocessing.process._children.discard(process)
    return process


def run_in_child(script, argv, output, fault=None, *args):
    """Be a script: its exit status, its words to a file, after a function has prepared a fault."""
    words = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.setsid()
    cpu = pytest.MonkeyPatch()
    cpu.setattr(torch.cuda, "is_available", lambda: False)
    cpu.setattr(teacher, "plot_log", lambda path: None)  # which would be most of the time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if these tests are a job of
    signal.signal(signal.SIGHUP, signal.SIG_DFL)              # a shell, or of nohup
    multiprocessing.set_start_method("fork", force=True)  # of processes that read images
    torch.set_num_threads(1)  # so two can run at a time
    if fault:
        fault(*args)
    sys.argv[0], status = f"{script}.py", 0
    try:
        teacher.run_script(lambda: sys.modules[script].main(argv))
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    os._exit(status)  # past what multiprocessing does at its end


def finish(script, argv, output, fault=None, *args, seconds=120):
    """Such a process and its end: its exit status, negative for a signal, and its words."""
    process = in_child(run_in_child, script, argv, output, fault, *args)
    process.join(seconds)
    assert process.exitcode is not None, "hangs"
    return process.exitcode, Path(output).read_text()


def resumable(script, folder):
    return Path(folder) / ("last.pt" if script == "dmd2" else "teacher.pt")


def go_on(script, first, folder):
    """The command to begin a run in a folder or, if there is a checkpoint, to go on with it."""
    path = resumable(script, folder)
    return ["--resume", str(path)] if path.exists() else [*first, "--out", str(folder)]


def same_end(script, a, b):
    """Assert that two runs ended with the same bits."""
    names = ("teacher.pt",) if script == "teacher" else ("last.pt", "generator.pt")
    for name in names:
        one, other = (teacher.load(Path(folder) / name) for folder in (a, b))
        assert one["step"] == other["step"] and equal(one["model"], other["model"])
        assert equal(one.get("training"), other.get("training"))
        assert one.get("figures") == other.get("figures")


def all_whole(folder):
    """Assert that every checkpoint in a folder can be loaded; returns the step of each."""
    return {path.name: teacher.load(path)["step"] 
            for path in Path(folder).glob("[!.]*.pt")}


def side_by_side(function, *items):
    """The results of a function that waits for child processes, of each item, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


RUNS = {
    "teacher": "--batch 16 --width 8 --sample-every 0 --log-every 3 --save-every 1 --seed 5",
    "dmd2": "--batch 16 --student-steps 2 --gan-weight 1 --evaluate-n 100 --evaluate-every 5 "
            "--warmup 1 --sample-every 0 --log-every 3 --save-every 1",
}


@pytest.fixture(scope="session")
def run_of(tiny_teacher):
    """The options of a run of a script, of so many steps."""
    def options(script, steps):
        more = ["--teacher", tiny_teacher] if script == "dmd2" else []
        return [*RUNS[script].split(), "--steps", str(steps), *more]
    return options


def tried(faults, kind, count):
    """Count faults after which a run was resumed and ended as one left alone."""
    faults[kind] += count
    faults["runs resumed"] += count


def left_alone(script, run_of, folder, steps, *flags):
    """The folder of a run that nothing happens to."""
    argv = [*run_of(script, steps), *flags, "--out", f"{folder}/whole"]
    status, words = finish(script, argv, f"{folder}/words")
    assert status == 0, words
    return f"{folder}/whole"


def killed_at_random(script, run_of, folder, kills, steps, seed):
    """Kill a run so many times, each time resume it, let it end; it must end as one left alone."""
    rng, argv, done = random.Random(seed), run_of(script, steps), 0
    whole, out = left_alone(script, run_of, folder, steps), folder / "killed"
    while done < kills:
        process = in_child(run_in_child, script, go_on(script, argv, out), f"{folder}/words")
        process.join(rng.uniform(0.05, 2 if script == "dmd2" else 0.8))
        process.kill()
        process.join()
        done += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), Path(folder, "words").read_text()
        found = all_whole(out)
        if found.get(resumable(script, out).name) == steps:  # it came to its end; to the next
            same_end(script, whole, out)
            shutil.rmtree(out)
    if out.exists():
        status, words = finish(script, go_on(script, argv, out), f"{folder}/words")
        assert status == 0, words
        same_end(script, whole, out)
    return done


def test_run_killed_at_random_moments_ends_as_one_left_alone(run_of, tmp_path, faults):
    def killed(script):
        (tmp_path / script).mkdir()
        return killed_at_random(script, run_of, tmp_path / script, *plan[script], seed=0)
    plan = dict(teacher=(8, 40), dmd2=(4, 20))
    tried(faults, "kills at random moments", sum(side_by_side(killed, *RUNS)))


@slow
def test_run_killed_hundreds_of_times_ends_as_one_left_alone(run_of, tmp_path, faults):
    def killed(script):
        (tmp_path / script).mkdir()
        return killed_at_random(script, run_of, tmp_path / script, 120, 40, seed=1)
    tried(faults, "kills at random moments", sum(side_by_side(killed, *RUNS)))


def die_at_call(number, after):
    """Be killed before or after one of the calls, counted from 0, by which files are written."""
    calls = itertools.count()

    def deadly(function):
        def call(*args, **options):
            mine = next(calls) == number
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **options)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call
    for name in ("fsync", "replace", "link"):
        setattr(os, name, deadly(getattr(os, name)))
    torch.save = deadly(torch.save)


def die_in_write(number, share):
    """Be killed when a share of the bytes of a checkpoint, counted from 0, is written."""
    calls, save = itertools.count(), torch.save

    def deadly(checkpoint, file):
        content = io.BytesIO()
        save(checkpoint, content)
        mine = next(calls) == number
        file.write(content.getvalue()[:int(share * content.tell())] if mine else content.getvalue())
        if mine:
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = deadly


def killed_inside_writes(run_of, folder, plans):
    """Kill runs of four steps as planned, resume them; they must end as those left alone."""
    def killed(plan):
        number, script, fault, *args = plan
        out, argv, own = folder / str(number), run_of(script, 4), f"{folder}/words{number}"
        status, words = finish(script, [*argv, "--out", str(out)], own, fault, *args)
        assert status == -signal.SIGKILL, (fault, args, words)
        all_whole(out)
        status, words = finish(script, go_on(script, argv, out), own)
        assert status == 0 or "has done 4 already" in words, words
        same_end(script, wholes[script], out)
        assert [path.name for path in out.glob(".*")] == [".lock"], "a temporary file is left"

    for script in RUNS:
        (folder / script).mkdir()
    wholes = dict(zip(RUNS, side_by_side(
        lambda script: left_alone(script, run_of, folder / script, 4), *RUNS)))
    return len(side_by_side(killed, *[(i, *plan) for i, plan in enumerate(plans)]))


CALLS = dict(teacher=31, dmd2=35)  # that write files, in a run of four steps


def test_run_killed_inside_a_write_keeps_a_whole_checkpoint(run_of, tmp_path, faults):
    rng = random.Random(0)
    plans = [(script, die_at_call, rng.randrange(CALLS[script]), after) for script, after, _ in
             itertools.product(RUNS, (False, True), range(2))]
    plans += [(script, die_in_write, rng.randrange(4), rng.random()) for script in RUNS]
    tried(faults, "kills inside a write", killed_inside_writes(run_of, tmp_path, plans))


@slow
def test_run_killed_at_every_call_that_writes_keeps_a_whole_checkpoint(run_of, tmp_path, faults):
    rng = random.Random(1)
    plans = [(script, die_at_call, number, after) for script, after in
             itertools.product(RUNS, (False, True)) for number in range(CALLS[script])]
    plans += [(script, die_in_write, rng.randrange(4), rng.random())
              for script in RUNS for _ in range(50)]
    tried(faults, "kills inside a write", killed_inside_writes(run_of, tmp_path, plans))


# How a folder stops taking files after a step of a run.
def at_step(number, act):
    calls, update = itertools.count(1), teacher.update_ema

    def acting(*args):
        update(*args)
        if next(calls) == number:
            act()
    teacher.update_ema = dmd2.update_ema = acting


def full_disk(number, free):
    """From a step on, no file can become larger than `free` bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    at_step(number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard)))


def read_only(number, folder):
    """From a step on, the folder can't be written to; root has to become somebody else for that."""
    def act():
        os.chmod(folder, 0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
    at_step(number, act)


def test_disk_that_is_full_and_folder_that_turns_read_only_stop_a_run_in_one_line(
        run_of, tmp_path, faults):
    """From its third step on a run can't write; it stops with that said, and can be resumed."""
    def stopped(plan):
        script, fault, share = plan
        folder, argv = tmp_path / script / str(share), run_of(script, 6)
        folder.mkdir()
        number = 3 if script == "teacher" else 2  # of the EMA's updates
        how = f"{folder}/run" if fault is read_only else \
            share * resumable(script, wholes[script]).stat().st_size
        status, words = finish(script, [*argv, "--out", f"{folder}/run"], f"{folder}/words", fault,
                               number, int(how) if fault is full_disk else how)
        os.chmod(f"{folder}/run", 0o755)
        assert status == 2 and "Traceback" not in words, words
        assert words.splitlines()[-1].startswith(f"{script}.py: {folder}/run/"), words
        assert "can't be written (" in words.splitlines()[-1], words
        assert all_whole(f"{folder}/run")[resumable(script, "").name] == 2
        status, words = finish(script, go_on(script, argv, f"{folder}/run"), f"{folder}/words")
        assert status == 0, words
        same_end(script, wholes[script], f"{folder}/run")

    for script in RUNS:
        (tmp_path / script).mkdir()
    wholes = dict(zip(RUNS, side_by_side(
        lambda script: left_alone(script, run_of, tmp_path / script, 6), *RUNS)))
    plans = [(script, full_disk, share) for script in RUNS for share in (0.02, 0.5, 0.999)]
    tried(faults, "full disks", len(side_by_side(stopped, *plans)))
    plans = [(script, read_only, 0) for script in RUNS]
    tried(faults, "folders that turn read-only", len(side_by_side(stopped, *plans)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")
def test_file_system_that_is_really_full_stops_a_run_in_one_line(run_of, tmp_path, faults):
    whole = left_alone("teacher", run_of, tmp_path, 6)
    size = resumable("teacher", whole).stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(3.5 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no mount here")
    try:
        argv = run_of("teacher", 6)
        status, words = finish("teacher", [*argv, "--out", f"{disk}/run"], tmp_path / "words")
        assert status == 2 and "teacher.pt: can't be written (No space left on device)" in words
        assert all_whole(disk / "run")["teacher.pt"] == 3
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", str(disk)], check=True)
        status, words = finish("teacher", go_on("teacher", argv, disk / "run"), tmp_path / "words")
        assert status == 0, words
        same_end("teacher", whole, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    tried(faults, "full disks", 1)


def signal_at_step(number, *numbers):
    """Send this process, and those that read images for it, signals in the midst of a step."""
    at_step(number, lambda: [os.killpg(0, n) for n in numbers])


def test_signal_saves_the_step_under_way_and_leaves_with_its_status(run_of, tmp_path, faults):
    def interrupted(plan):
        script, number, flags = plan
        folder = tmp_path / f"{script}{number}"
        folder.mkdir()
        argv = [*run_of(script, 6), "--save-every", "100", *flags]
        whole = left_alone(script, run_of, folder, 6, "--save-every", "100", *flags)
        status, words = finish(script, [*argv, "--out", f"{folder}/run"], f"{folder}/words",
                               signal_at_step, 2, number)
        assert status == 128 + number, words
        assert f"{signal.Signals(number).name}: stops when this step is done and saved" in words
        path = resumable(script, folder / "run")
        step = re.search(rf"after step (\d) of 6, which is saved; go on with --resume {path}",
                         words)
        assert 2 <= int(step[1]) < 6 and teacher.load(path)["step"] == int(step[1])
        status, words = finish(script, go_on(script, argv, folder / "run"), f"{folder}/words")
        assert status == 0, words
        same_end(script, whole, folder / "run")

    streamed = ["--data", photographs(tmp_path / "photos", count=60), "--size", "8", "--stream",
                "--mults", "1,2", "--blocks", "1"]  # with processes that read images
    plans = [("teacher", signal.SIGINT, []), ("teacher", signal.SIGTERM, streamed),
             ("dmd2", signal.SIGTERM, [])]
    tried(faults, "signals", len(side_by_side(interrupted, *plans)))


def test_run_outlives_the_program_that_it_talks_to(run_of, tmp_path, faults):
    """Such as `2>&1 | tee log`, which ends by the Ctrl-C that the run is to save at."""
    status, words = finish("teacher", [*run_of("teacher", 6), "--sample-every", "1", "--save-every",
                                       "100", "--out", f"{tmp_path}/run"], f"{tmp_path}/words",
                           deaf_ears)
    assert status == 130 and all_whole(tmp_path / "run")["teacher.pt"] == 3
    faults["signals"] += 1


def deaf_ears():
    """A pipe that nobody reads any more, for all that is said; and an interrupt at step 3."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    os.dup2(writing, 2)
    os.close(reading)
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGINT))


def test_second_interrupt_does_not_wait_and_sigterm_before_the_first_step_leaves_no_file(
        run_of, tmp_path, faults):
    def words_of(fault, *args):
        return finish("teacher", [*run_of("teacher", 6), "--out", f"{tmp_path}/{fault.__name__}"],
                      f"{tmp_path}/words", fault, *args)
    status, words = words_of(signal_at_step, 3, signal.SIGINT, signal.SIGINT)
    assert status == 130 and "interrupted; --resume goes on from the last checkpoint" in words
    assert all_whole(tmp_path / "signal_at_step")["teacher.pt"] == 2
    status, words = words_of(terminated_while_writing)
    assert status == 143 and not words
    assert [path.name for path in (tmp_path / "terminated_while_writing").iterdir()] == [".lock"]
    faults["signals"] += 2


def terminated_while_writing():
    replace = os.replace

    def act(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        replace(*args)
    os.replace = act


@pytest.mark.parametrize("script", RUNS)
def test_older_checkpoints_are_kept_and_one_is_named_where_the_last_is_damaged(
        script, run_of, tmp_path, capsys, faults):
    argv = [*run_of(script, 6), "--keep", "3", "--out", str(tmp_path / "run")]
    sys.modules[script].main(argv)
    path = resumable(script, tmp_path / "run")
    steps = all_whole(path.parent)
    assert [steps[teacher.older(path, age).name] for age in (1, 2, 3)] == [5, 4, 3]
    assert not teacher.older(path, 4).exists()
    content = path.read_bytes()
    for length in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        capsys.readouterr()
        line = fails(sys.modules[script].main, ["--resume", str(path), "--steps", "8"], capsys)
        assert f"use {teacher.older(path, 1)}, of step 5" in line
        assert "damaged" in line or length < 4
        faults["hostile or damaged files"] += 1
    sys.modules[script].main(["--resume", str(teacher.older(path, 1)), "--steps", "6"])
    assert teacher.load(teacher.older(path, 1))["step"] == 5  # the damaged one is not kept
    capsys.readouterr()
    path.unlink()
    line = fails(sys.modules[script].main, ["--resume", str(path), "--steps", "8"], capsys)
    assert "no such checkpoint file" in line and "of step 5" in line
    teacher.older(path, 1).write_bytes(content[:-1])
    line = fails(sys.modules[script].main, ["--resume", str(path), "--steps", "8"], capsys)
    assert f"use {teacher.older(path, 2)}, of step 4" in line
    sys.modules[script].main(["--resume", str(teacher.older(path, 2)), "--steps", "6"])
    assert teacher.load(path)["step"] == 6


STATE = ("training", "descent", "optimizer", "state", 0)


@pytest.mark.parametrize("path, value", [
    (("config", "latent"), "/a.pt"), (("config", "steps"), None), (("config", "batch"), None),
    (("config", "seed"), torch.zeros(3)), (("training", "images"), torch.zeros(3)),
    ((*STATE, "exp_avg"), torch.zeros(())), ((*STATE, "step"), torch.zeros(8)),
    ((*STATE, "exp_avg_sq"), ...), ((*STATE, "more"), torch.zeros(())),
    (("training", "model", "net.map_layer0.weight"), torch.zeros(1).expand(30000, 30000))])
def test_resume_of_what_a_run_can_not_have_is_refused(path, value, tiny_teacher, tmp_path, capsys,
                                                      faults):
    torch.save(changed_at(torch.load(tiny_teacher, weights_only=True), path, value),
               tmp_path / "teacher.pt")
    line = fails(teacher.main, ["--resume", f"{tmp_path}/teacher.pt", "--no-profile"], capsys)
    assert "teacher.pt" in line and list(tmp_path.iterdir()) == [tmp_path / "teacher.pt"]
    faults["hostile or damaged files"] += 1


def test_second_process_in_a_run_s_folder_is_refused(run_of, tmp_path):
    first = in_child(run_in_child, "teacher", [*run_of("teacher", 2000), "--out",
                                               f"{tmp_path}/run"], f"{tmp_path}/first")
    while not (tmp_path / "run" / "teacher.pt").exists():
        assert first.is_alive(), (tmp_path / "first").read_text()
        time.sleep(0.05)
    status, words = finish("teacher", [*run_of("teacher", 3), "--out", f"{tmp_path}/run"],
                           f"{tmp_path}/words")
    assert status == 2 and "another process is training there" in words
    first.terminate()
    first.join()
    assert first.exitcode == 143 and not (tmp_path / "run" / "old1").exists()


def test_best_generator_outlives_a_resume_from_an_older_checkpoint(tiny_teacher, tmp_path, capsys):
    dmd2.main([*TINY_DMD, "--teacher", tiny_teacher, "--steps", "6", "--save-every", "2",
               "--evaluate-every", "2", "--out", str(tmp_path)])
    best = dict(teacher.load(tmp_path / "generator.pt"), step=5)
    best["figures"].update(frechet_distance=0.0, recall=1.0)
    teacher.save(best, tmp_path / "generator.pt")
    dmd2.main(["--resume", str(tmp_path / "last.2.pt"), "--steps", "4"])
    assert teacher.load(tmp_path / "generator.pt")["step"] == 5
    (tmp_path / "generator.pt").write_bytes(b"PK\3\4")
    dmd2.main(["--resume", str(tmp_path / "last.pt"), "--steps", "6"])
    assert "generator.pt: a damaged checkpoint" in capsys.readouterr().err
    assert teacher.load(tmp_path / "generator.pt")["step"] == 6


def test_options_that_are_others_when_a_run_is_resumed_are_told(run_of, tmp_path, capsys):
    teacher.main([*run_of("teacher", 3), "--out", str(tmp_path)])
    capsys.readouterr()
    teacher.main(["--resume", str(tmp_path / "teacher.pt"), "--steps", "4", "--keep", "3"])
    err = capsys.readouterr().err
    assert "resuming after step 3, --steps 4 (it was 3), --keep 3 (it was 2)\n" in err


def test_run_whose_images_became_more_is_not_resumed(tmp_path, capsys):
    photographs(tmp_path / "photos")
    flags = ["--data", str(tmp_path / "photos"), "--size", "8", "--mults", "1,2", "--blocks", "1"]
    teacher.main([*TINY, *flags, "--batch", "8", "--out", str(tmp_path / "run")])
    dmd2.main([*TINY_DMD, "--teacher", str(tmp_path / "run" / "teacher.pt"), "--batch", "8",
               "--out", str(tmp_path / "dmd2"), "--evaluate-every", "0"])
    shutil.copy(tmp_path / "photos/cats/1.png", tmp_path / "photos/cats/9.png")
    shutil.copy(tmp_path / "photos/cats/1.png", tmp_path / "photos/cats/10.png")
    for main, path in ((teacher.main, "run/teacher.pt"), (dmd2.main, "dmd2/last.pt")):
        teacher.load_folder.cache_clear()
        capsys.readouterr()
        line = fails(main, ["--resume", str(tmp_path / path), "--steps", "6"], capsys)
        assert "its run has 10 training images, and" in line and "has 11 now" in line


EVERY_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import teacher, dmd2, sample, export
teacher.main({tiny!r} + ["--out", "t"])
dmd2.main({tiny_dmd!r} + ["--teacher", "t/teacher.pt", "--out", "d"])
for path in ("t/teacher.pt", "d/generator.pt"):
    sample.main([path, "--n", "20", "--out", path[0] + ".npz"])
sample.main(["d/generator.pt", "--out", "d.png"])
export.main(["d/generator.pt"])
"""


def test_same_seed_gives_the_same_bits_in_every_script(tmp_path):
    """In two fresh processes, whose hashes of strings are seeded otherwise."""
    def run(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        script = EVERY_SCRIPT.format(root=str(ROOT), tiny=TINY, tiny_dmd=TINY_DMD)
        subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True,
                       env=dict(os.environ, PYTHONHASHSEED=str(number), OMP_NUM_THREADS="1",
                                CUDA_VISIBLE_DEVICES=""))
        return folder
    one, same = side_by_side(run, 0, 1)
    for name in ("t.npz", "d.npz", "d.png"):
        assert (one / name).read_bytes() == (same / name).read_bytes(), name
    graphs = [onnx.load(folder / "d/generator.onnx").graph for folder in (one, same)]
    assert graphs[0] == graphs[1]  # the metadata tell what file they are of
    for name in ("t/teacher.pt", "d/last.pt", "d/generator.pt"):
        a, b = (teacher.load(folder / name) for folder in (one, same))
        for part in ("model", "training", "fake_score", "figures", "best"):  # paths are others
            assert equal(a.get(part), b.get(part)), (name, part)


@pytest.mark.parametrize("dies", [1, pytest.param(0, marks=slow)])
def test_rank_that_dies_ends_the_others_and_leaves_a_whole_checkpoint(dies, tmp_path, faults):
    command = f"-m torch.distributed.run --standalone --nproc_per_node 2 {ROOT / 'teacher.py'}"
    flags = "--batch 16 --width 8 --sample-every 0 --save-every 1 --steps 100000 --out run"
    group = subprocess.Popen(
        [sys.executable, *command.split(), *flags.split()], cwd=tmp_path, text=True,
        stderr=subprocess.PIPE, env=dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"))
    path = tmp_path / "run" / "teacher.2.pt"
    while not path.exists():
        assert group.poll() is None, group.stderr.read()
        time.sleep(0.05)
    children = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    rank_of = {int(re.search(r"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_text())[1]): int(pid)
               for pid in children if "\0RANK=" in Path(f"/proc/{pid}/environ").read_text()}
    os.kill(rank_of[dies], signal.SIGKILL)
    try:
        group.wait(60)
    finally:
        group.kill()
    words = group.stderr.read()
    assert group.returncode != 0
    assert dies == 0 or "rank 0: another process has ended; --resume goes on" in words, words
    assert not any(Path(f"/proc/{pid}").exists() for pid in rank_of.values())
    step = all_whole(tmp_path / "run")["teacher.pt"]
    teacher.main(["--resume", str(tmp_path / "run" / "teacher.pt"), "--steps", str(step + 2)])
    faults["processes of several that die"] += 1


def test_sigterm_to_several_processes_saves_the_step_that_all_have_done(tmp_path, faults):
    command = f"-m torch.distributed.run --standalone --nproc_per_node 2 {ROOT / 'teacher.py'}"
    flags = "--batch 16 --width 8 --sample-every 0 --save-every 100000 --steps 100000 --log-every 1"
    group = subprocess.Popen(
        [sys.executable, *command.split(), *flags.split(), "--out", "run"], cwd=tmp_path, text=True,
        stderr=subprocess.PIPE, env=dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"))
    while not (tmp_path / "run/log.jsonl").exists() or len(log_of(tmp_path / "run")) < 3:
        assert group.poll() is None, group.stderr.read()
        time.sleep(0.05)
    group.terminate()
    group.wait(60)
    step = re.search(r"stopped after step (\d+) of 100000, which is saved", group.stderr.read())[1]
    assert teacher.load(tmp_path / "run" / "teacher.pt")["step"] == int(step)
    faults["signals"] += 1


# ---- hostile and damaged files -------------------------------------------------------------------

class Planted:
    """A call that a pickle asks for, which leaves a file where it is made."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def places(value, path=()):
    """The way to every value in nested dictionaries, lists and tuples; of weights to two each."""
    yield path
    if isinstance(value, (dict, list, tuple)) and len(value):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        tensors = [key for key in keys if isinstance(value[key], torch.Tensor)]
        for key in [key for key in keys if key not in tensors[2:]][:40]:
            yield from places(value[key], (*path, key))


def changed_at(value, path, new):
    """A copy in which another value stands there; `...` for none."""
    if not path:
        return new
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    items[path[0]] = changed_at(items.get(path[0]), path[1:], new)
    if items[path[0]] is ...:
        del items[path[0]]
    return items if isinstance(value, dict) else type(value)(items.values())


WRONG = [None, True, -1, 2**70, 1e308, math.nan, "", "x" * 1000, "\ud800", [], {}, (), [[]] * 3,
         torch.zeros(2), torch.full((3, 3), math.nan), torch.zeros(1).expand(10**6, 10**6)]


def deep(value, depth=3000):
    for _ in range(depth):
        value = [value]
    return value


def archive(path, entries, compression=zipfile.ZIP_STORED):
    """A zip file of these entries, in the layout of a checkpoint."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as file:
        warnings.simplefilter("ignore")  # of two of one name
        for name, content in entries:
            file.writestr(f"archive/{name}", content)
    end_as_pytorch(path)


def end_as_pytorch(path, at=None):
    """Give a zip file the end of PyTorch's, with a record of zip64; or one said to be at `at`."""
    content = path.read_bytes()
    content, end = content[:-22], content[-22:]
    count, size, start = struct.unpack("<10xHLL2x", end)
    record = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(content) if at is None else at, 1)
    path.write_bytes(content + record + locator + end)


@pytest.fixture(scope="session")
def parts_of_checkpoint(tiny_generator):
    with zipfile.ZipFile(tiny_generator) as file:
        return [(name.removeprefix("generator/").removeprefix("archive/"), file.read(name))
                for name in file.namelist()]


def bombs(folder, checkpoint, parts):
    """Files that would fill memory, or time, if they were believed."""
    pickled = dict(parts)["data.pkl"]
    others = [part for part in parts if part[0] not in ("data.pkl", "data/0")]
    archive(folder / "zip_bomb.pt", [("data.pkl", pickled), ("data/0", bytes(10**9)), *others],
            zipfile.ZIP_DEFLATED)
    archive(folder / "two_pickles.pt", [("data.pkl", pickled), ("DATA.PKL", pickled), *others])
    archive(folder / "code.pt", [*parts, ("code/a.py", b"import os")])
    torch.save({"kind": Reduced(bytearray, 10**11)}, folder / "bytearray.pt")
    torch.save({"kind": Reduced(torch.Tensor, 10**11)}, folder / "tensor.pt")
    for name, content in (("deep.pt", b"\x80\x02" + b"]" * 10**5 + b"."),
                          ("protocol4.pt", pickle.dumps([0], 4))):
        archive(folder / name, [("data.pkl", content), *others])
    archive(folder / "two_directories.pt", [("data.pkl", pickled), ("data/0", bytes(10**9)),
                                            *others], zipfile.ZIP_DEFLATED)
    bomb, path = (folder / "two_directories.pt").read_bytes(), folder / "good.pt"
    archive(path, parts)
    path.write_bytes(bomb[:-42] + path.read_bytes()[:-98] + path.read_bytes()[-22:])
    end_as_pytorch(path, at=len(bomb) - 98)  # PyTorch would read the bomb, zipfile the good one
    path.rename(folder / "two_directories.pt")
    key = b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    archive(folder / "laughing_key.pt", [("data.pkl", b"\x80\2}q\xc8)q\0" + key +
                                             b"h\xc8h\x3cK\0s."), *others])
    laughs = ()
    for _ in range(60):
        laughs = laughs, laughs
    shared = torch.zeros(2 * 10**6)
    network = dict(checkpoint["network"], model_channels=256, num_blocks=250, channel_mult=(1,))
    with torch.device("meta"):
        model = teacher.network_of(dict(checkpoint, network=network)).state_dict()
    torch.save(dict(checkpoint, network=network, model={
        name: shared[:weight.numel()].view(weight.shape) for name, weight in model.items()}),
        folder / "shared.pt")
    for path in (("kind",), ("data", "shape"), ("data", "classes"), ("sigmas",), ("figures",),
                 ("figures", "recall"), ("best",), ("network", "channel_mult"), ("model",),
                 ("training",), ("prediction",), ("schedule",), ("network", "model_type")):
        torch.save(changed_at(checkpoint, path, laughs), folder / f"laughs_{'_'.join(path)}.pt")


def hostile_checkpoints(folder, checkpoint, parts, rng, count):
    """Make files that are no good checkpoint, each of which has to be refused."""
    content = io.BytesIO()
    torch.save(checkpoint, content)
    content = content.getvalue()
    bombs(folder, checkpoint, parts)
    (folder / "folder.pt").mkdir()
    for name, some in (("empty", b""), ("text", b"not a checkpoint"), ("zip_head", b"PK\3\4"),
                       ("pickle", pickle.dumps(Planted(folder / "executed"))),
                       ("pickle2", pickle.dumps(Planted(folder / "executed"), 2))):
        (folder / f"{name}.pt").write_bytes(some)
    np.savez(folder / "arrays.npz", a=np.zeros(3))
    (folder / "arrays.npz").rename(folder / "arrays.pt")
    torch.save(checkpoint, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    for k in range(count):
        length = rng.randrange(len(content))
        (folder / f"truncated{k}.pt").write_bytes(content[:length])
    for k, path in enumerate(places(checkpoint)):
        torch.save(changed_at(checkpoint, path, Planted(folder / "executed")),
                   folder / f"planted{k}.pt")
        if path and len(path) < 3 and path[0] not in ("config", "figures", "best", "fake_score",
                                                      "teacher_figures", "teacher_sha256"):
            if path not in (("data", "data_dir"), ("network", "label_dim")):
                torch.save(changed_at(checkpoint, path, ...), folder / f"missing{k}.pt")
    weights = checkpoint["model"]
    for k, (name, weight) in enumerate(weights.items()):
        for kind, wrong in (("nan", torch.full_like(weight, math.nan)), ("half", weight.half()),
                            ("shape", weight[None]), ("huge", torch.zeros(1).expand(10**6, 10**6))):
            if k % 17 == 0:
                torch.save(dict(checkpoint, model=dict(weights, **{name: wrong})),
                           folder / f"{kind}{k}.pt")


def refusals(folder, report, all_scripts):
    """In a process of its own, give files to scripts that load them, each to one or to all; tell
    what came of it."""
    torch.set_num_threads(1)
    os.chdir(folder)
    results, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k, path in enumerate(sorted(Path(folder).glob("*.*"))):
        commands = [(sample.main, [path.name, "--n", "1", "--out", "out.png"])]
        if path.suffix != ".onnx":
            commands += [(export.main, [path.name]),
                         (dmd2.main, ["--teacher", path.name, "--out", "run"])]
        if path.suffix == ".pt":
            commands += [(dmd2.main, ["--resume", path.name]),
                         (teacher.main, ["--latent", path.name])]
        for main, argv in commands if all_scripts else [commands[k % len(commands)]]:
            sys.stderr = io.StringIO()
            try:
                teacher.run_script(lambda: main(argv))
                status = 0
            except SystemExit as stop:
                status = stop.code
            except BaseException as error:
                status = repr(error)
            results.append((path.name, main.__module__, status, sys.stderr.getvalue()))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    Path(report).write_text(json.dumps(dict(results=results, grown=1024 * grown)))
    os._exit(0)


def refused(folder, faults, kind, memory, all_scripts):
    """Assert that scripts refuse every file in a folder in one line; count them."""
    report = folder.parent / "report.json"
    process = in_child(refusals, str(folder), str(report), all_scripts)
    process.join(500)
    found = json.loads(report.read_text())
    for name, script, status, words in found["results"]:
        assert status == 2 and len(words.splitlines()) == 1, (name, script, status, words)
        assert name in words, words
    assert found["grown"] < memory, found["grown"]
    assert not (folder / "executed").exists() and not (folder / "run").exists()
    faults[kind] += len({name for name, *_ in found["results"]})


@pytest.mark.parametrize("count", [10, pytest.param(500, marks=slow)])
def test_hostile_checkpoints_are_refused_in_one_line_and_execute_nothing(
        count, tiny_generator, parts_of_checkpoint, tmp_path, faults):
    (tmp_path / "files").mkdir()
    hostile_checkpoints(tmp_path / "files", torch.load(tiny_generator, weights_only=True),
                        parts_of_checkpoint, random.Random(0), count)
    refused(tmp_path / "files", faults, "hostile or damaged files", 2e8, all_scripts=count > 10)


def hostile_graphs(folder, content):
    """ONNX files that are none, or no export of ours, though some say so."""
    def changed(name, change):
        model = onnx.load_from_string(content)
        facts = json.loads(model.metadata_props[0].value)
        change(model, facts)
        model.metadata_props[0].value = json.dumps(facts)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())

    def of_file(model, facts):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../../../../../../etc/passwd")

    def other_graph(model, facts):
        noise, image = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["b", 3])
                        for name in ("noise", "image"))
        label = onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["b"])
        node = onnx.helper.make_node("Identity", ["noise"], ["image"])
        model.graph.CopyFrom(onnx.helper.make_graph([node], "other", [noise, label], [image]))

    def branches(model, facts):
        inner = onnx.helper.make_graph([], "inner", [], [])
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("then_branch", inner))

    def other_shape(model, facts):
        facts["data"].update(shape=[1, 16, 16], size=16)
        for dim in model.graph.output[0].type.tensor_type.shape.dim[-2:]:
            dim.dim_value = 16

    def sparse_weights(model, facts):
        model.graph.sparse_initializer.add(dims=[1]).values.name = "sparse"

    changed("sparse", sparse_weights)
    changed("branches", branches)
    changed("other_shape", other_shape)
    changed("other", other_graph)
    changed("outside", of_file)
    changed("unknown", lambda model, facts: setattr(model.graph.node[0], "domain", "hostile"))
    changed("no_facts", lambda model, facts: setattr(model.metadata_props[0], "key", "other"))
    for name, value in (("steps", 2**40), ("steps", "1"), ("steps", None), ("data", []),
                        ("sigmas", 3), ("sigmas", [])):
        changed(f"{name}_{value}"[:20], lambda model, facts: facts.update({name: value}))
    for name, value in (("shape", [1, 8]), ("shape", [1, 8, 10**9]), ("classes", []),
                        ("classes", [1, 2]), ("name", ["digits"]), ("shape", "188")):
        changed(f"{name}{len(str(value))}",
                lambda model, facts: facts["data"].update({name: value}))
    for name, length in (("empty", 0), ("half", len(content) // 2), ("short", len(content) - 9)):
        (folder / f"{name}.onnx").write_bytes(content[:length])
    (folder / "deep.onnx").write_bytes(content.replace(b'{"data', b"[" * 6))


def test_hostile_onnx_files_are_refused_in_one_line(tiny, tmp_path, faults):
    (tmp_path / "files").mkdir()
    hostile_graphs(tmp_path / "files", (tiny / "dmd2" / "generator.onnx").read_bytes())
    refused(tmp_path / "files", faults, "hostile or damaged files", 2e8, all_scripts=True)


# ---- fuzzing -------------------------------------------------------------------------------------

def fuzz(examples, strategy, check):
    """Call `check` with so many examples of a strategy, the same ones each time."""
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def run(example):
        check(example)
    run()
    return examples


# Edits of a file: at a share of its length a byte is replaced, put in or taken out, or all that
# follows is cut off or repeated.
EDITS = st.lists(st.tuples(st.sampled_from(["replace"] * 4 + ["insert", "delete", "cut", "repeat"]),
                           st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
                 min_size=1, max_size=4)


def edited(content, edits):
    content = bytearray(content)
    for kind, share, byte in edits:
        i = int(share * len(content))
        if kind == "replace" and content:
            content[i] ^= byte or 1
        elif kind == "insert":
            content.insert(i, byte)
        elif kind == "repeat":
            content += content[i:i + 1000]
        else:
            del content[i:i + 1 if kind == "delete" else None]
    return bytes(content)


@pytest.mark.parametrize("examples", [80, pytest.param(5000, marks=slow)])
def test_fuzzed_checkpoint_is_refused_or_unchanged(examples, tiny_teacher, tmp_path, faults):
    def check(edits):
        path.write_bytes(edited(content, edits))
        try:
            assert equal(teacher.load(path), whole)
        except ValueError as error:
            assert "\n" not in str(error)
    content, path = Path(tiny_teacher).read_bytes(), tmp_path / "x.pt"
    whole = teacher.load(tiny_teacher)
    faults["fuzzed files"] += fuzz(examples, EDITS, check)


@pytest.mark.parametrize("examples", [120, pytest.param(5000, marks=slow)])
def test_fuzzed_fields_of_a_checkpoint_are_refused_or_work(examples, tiny_generator, tmp_path,
                                                           faults, capsys):
    """Whatever stands in any place of it, sample.py makes an image or fails in one line."""
    def check(example):
        where, value = example
        torch.save(changed_at(checkpoint, ways[where], value), path)
        ends_well(sample.main, [str(path), "--n", "1", "--out", str(tmp_path / "a.png")], capsys)
    checkpoint, path = torch.load(tiny_generator, weights_only=True), tmp_path / "x.pt"
    ways = list(places(checkpoint))[1:]
    plain = st.one_of(st.sampled_from(WRONG), st.integers(), st.floats(), st.text(max_size=5))
    values = st.one_of(plain, st.lists(plain, max_size=3), st.dictionaries(st.text(), plain))
    where = st.integers(0, len(ways) - 1)
    faults["fuzzed files"] += fuzz(examples, st.tuples(where, values), check)


def ends_well(main, argv, capsys):
    """Assert that a script succeeds or fails as it should: in one line, with status 2 (or 1 if what
    it computes is not finite); returns the status."""
    capsys.readouterr()
    status = 0
    try:
        teacher.run_script(lambda: main(argv))
    except SystemExit as stop:
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    wanted = status == 0 or status == 2 and len(lines) == 1 or "not finite" in lines[-1] \
        or "diverged: " in lines[-1] or status == 2 and lines[0].startswith("digits: ")
    assert wanted, (argv, status, lines)
    return status


@pytest.mark.parametrize("examples", [100, pytest.param(5000, marks=slow)])
def test_fuzzed_pickle_of_edm_is_refused_or_read(examples, edm_pkl, tmp_path, faults):
    def check(edits):
        path.write_bytes(edited(content, edits))
        try:
            teacher.assembled(sample.load_edm(path))
        except ValueError as error:
            assert "\n" not in str(error)
    content, path = Path(edm_pkl.path).read_bytes(), tmp_path / "x.pkl"
    faults["fuzzed files"] += fuzz(examples, EDITS, check)


def fuzzed_graphs(content, examples, path):
    """In a process of its own, for onnxruntime is C++, which a bad file could bring down."""
    def check(edits):
        Path(path).write_bytes(edited(content, edits))
        try:
            sampler = sample.onnx_sampler(path, torch.device("cpu"))
            sampler.images(iter([torch.zeros(2, *sampler.shape)]), torch.tensor([0, 1]))
        except ValueError:
            pass
    fuzz(examples, EDITS, check)
    os._exit(77)


@pytest.mark.parametrize("examples", [60, pytest.param(3000, marks=slow)])
def test_fuzzed_onnx_file_is_refused_or_runs(examples, tiny, tmp_path, faults):
    content = (tiny / "dmd2" / "generator.onnx").read_bytes()
    process = in_child(fuzzed_graphs, content, examples, str(tmp_path / "x.onnx"))
    process.join(500)
    assert process.exitcode == 77
    faults["fuzzed files"] += examples


@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=slow)])
def test_fuzzed_config_and_log_are_refused_or_read(examples, tiny, tmp_path, faults):
    def check(example):
        edits, lines = example
        path.write_bytes(edited(config, edits))
        try:
            assert isinstance(teacher.parse(teacher.Config, ["--config", str(path), "--out", "x"]),
                              teacher.Config)
        except ValueError as error:
            assert "--config" in str(error)
        path.write_bytes(edited(log, edits) + json.dumps(lines).encode())
        assert all(line["step"] >= 0 for line in teacher.read_log(path))
    path = tmp_path / "x.json"
    config, log = ((tiny / "teacher" / name).read_bytes() for name in ("config.json", "log.jsonl"))
    anything = st.recursive(st.none() | st.floats() | st.text(), lambda inner: st.lists(inner)
                            | st.dictionaries(st.text(), inner), max_leaves=5)
    faults["fuzzed files"] += 2 * fuzz(examples, st.tuples(EDITS, anything), check)


@pytest.mark.parametrize("examples", [25, pytest.param(1500, marks=slow)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp", "ppm"])
def test_fuzzed_image_is_refused_or_read(suffix, examples, tmp_path, faults):
    def check(edits):
        path.write_bytes(edited(content, edits))
        try:
            image, _ = teacher.decoded(path)
            assert image.mode in ("L", "RGB")
        except ValueError as error:
            assert f"{path}: not a readable image" in str(error)
    photographs(tmp_path, count=1, classes=("a",), suffix=suffix)
    path = tmp_path / "a" / f"0.{suffix}"
    content = path.read_bytes()
    faults["fuzzed files"] += fuzz(examples, EDITS, check)


SCRIPTS = dict(teacher=teacher, dmd2=dmd2, sample=sample, export=export)


def fields_of(script):
    return [(script, field) for field in sample.dataclasses.fields(SCRIPTS[script].Config)]


TEXTS = st.one_of(
    st.text(max_size=8), st.integers().map(str), st.floats().map(str),
    st.sampled_from(["0", "-1", "1e999", "nan", "-inf", str(2**63), str(2**31), "1,2", "0.5,0.1",
                     ",", "=", "--", "%s", "\x00", "None", "true", "é", "../..", "/dev/null", "-"]))


@pytest.mark.parametrize("examples", [12, pytest.param(500, marks=slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_takes_a_value_in_its_range_or_is_refused(script, examples, faults):
    def check(text):
        words = [text] if field.metadata["positional"] else [f"{teacher.flag(field.name)}={text}"]
        others = dict(teacher=[], dmd2=["--teacher=a.pt"], sample=["a.pt"], export=["a.pt"])[script]
        try:
            cfg = teacher.parse(config, [*words, *others])
        except ValueError as error:
            assert len(str(error)) < 2000
            return
        value, meta = getattr(cfg, field.name), field.metadata
        assert value is None or type(value) is field.type
        if field.type in (int, float) and value is not None:
            assert meta["at_least"] is None or value >= meta["at_least"]
            assert meta["below"] is None or value < meta["below"]
            assert math.isfinite(value)
        assert not meta["choices"] or value in meta["choices"]
    config = SCRIPTS[script].Config
    for _, field in fields_of(script):
        if field.name not in ("resume", "config"):
            faults["fuzzed options"] += fuzz(examples, TEXTS, check)


def numbers(field):
    """Values of an option that are taken: its ends, and others of a size to be tried."""
    meta = field.metadata
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    low = meta["at_least"] or 0
    if field.type is int:
        return st.integers(low, low + 3)
    top = min(meta["below"] or 1e4, meta["at_most"] or 1e4)
    return st.floats(low, top, exclude_max=True) | st.just(float(low))


# Options with which a run is too long to be tried, or that have tests of their own.
LONG = {"steps", "evaluate_n", "batch", "device", "compile", "dtype", "student_steps", "size",
        "latent_channels", "kl_weight", "save_every", "wandb", "profile", "stream", "pairs",
        "regression_distance", "conditioning_sigma", "blocks", "width", "autoencoder", "flip"}


@pytest.mark.parametrize("examples", [12, pytest.param(500, marks=slow)])
@pytest.mark.parametrize("script", RUNS)
def test_run_with_any_options_ends_or_is_refused_in_one_line(
        script, examples, tiny_teacher, tmp_path, capsys, faults):
    def check(chosen):
        words = [f"{teacher.flag(name)}={value}" if type(value) is not bool else
                 teacher.flag(name if value else f"no_{name}") for name, value in chosen.items()]
        out = tmp_path / "run"
        ends_well(SCRIPTS[script].main, [*base, *words, "--out", str(out)], capsys)
        shutil.rmtree(out, ignore_errors=True)

    base = [*TINY, "--steps", "2"] if script == "teacher" else \
        [*TINY_DMD, "--steps", "2", "--evaluate-every", "0", "--teacher", tiny_teacher]
    fields = {field.name: numbers(field) if field.type is not bool else st.booleans()
              for _, field in fields_of(script) if field.name not in LONG
              and (field.type in (int, float, bool) or field.metadata["choices"])}
    some = st.sets(st.sampled_from(sorted(fields)), min_size=1, max_size=4).flatmap(
        lambda chosen: st.fixed_dictionaries({name: fields[name] for name in sorted(chosen)}))
    faults["fuzzed options"] += fuzz(examples, some, check)


# ---- the house ----------------------------------------------------------------------------------

def test_imports_form_a_line():
    allowed = dict(teacher=set(), sample={"teacher"}, dmd2={"teacher", "sample"},
                   export={"teacher", "sample"})
    for name, may in allowed.items():
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                     for alias in node.names}
        assert imported & set(allowed) <= may, name


def test_every_class_and_every_function_that_another_file_uses_is_documented():
    used = "".join((ROOT / f"{name}.py").read_text() for name in ("sample", "dmd2", "export"))
    for module in (teacher, sample, dmd2, export):
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "") == module.__name__ and (
                    inspect.isclass(thing) or re.search(rf"import[^)]*\b{name}\b", used)):
                assert thing.__doc__, f"{module.__name__}.{name}"


def test_readme_names_the_feature_network_that_its_figures_are_of():
    assert sample.SHA256["digits"][:12] in README


def test_readme_s_file_map_has_the_right_numbers_of_lines():
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M):
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_rows_of_the_readme_s_ablation_are_options_that_work():
    rows = re.findall(r"^\| [^|]+ \| `?(--[^|`]*|none)`? \|", README, re.M)
    assert len(rows) >= 11
    for flags in rows:
        teacher.parse(dmd2.Config, ["--teacher", "t.pt", *flags.replace("none", "").split()])


def test_rosetta_of_the_readme_is_right():
    rows = re.findall(r"^\| ([\d.]+) \| (.* \| 0.\d{4} \| .*) \|$", README, re.M)
    for sigma, cells in rows:
        sigma, (snr, log_snr, alpha_bar, t, *timesteps, u) = float(sigma), map(float,
                                                                               cells.split(" | "))
        assert snr == pytest.approx(1 / sigma**2, rel=1e-3)
        assert log_snr == pytest.approx(math.log(snr), abs=0.01)
        assert alpha_bar == pytest.approx(1 / (1 + sigma**2), rel=1e-3)
        assert t / (1 - t) == pytest.approx(sigma, rel=0.01)
        for schedule, step in zip(("linear", "cosine", "sigmoid"), timesteps, strict=True):
            sigmas = teacher.timestep_sigmas(schedule)
            assert sigmas[int(step) - 1] < sigma < sigmas[int(step) + 1], (schedule, step)
        assert teacher.quantile_of(sigma) == pytest.approx(u, abs=0.001)
    assert len(rows) == 6


def test_pictures_of_the_readme_exist():
    names = re.findall(r"\(?`?(assets/[\w.]+)`?\)?", README)
    assert len(names) >= 4 and all((ROOT / name).exists() for name in names)


def distil_digits(folder):
    """In a process of its own, on what the tests leave of the cores: a minute of training."""
    os.nice(10)
    torch.set_num_threads(1)
    words = os.open(f"{folder}/words", os.O_WRONLY | os.O_CREAT)
    os.dup2(words, 1)
    os.dup2(words, 2)
    with pytest.MonkeyPatch.context() as cpu:
        cpu.setattr(torch.cuda, "is_available", lambda: False)
        teacher.main(f"--steps 400 --sample-every 0 --out {folder}/teacher".split())
        dmd2.main(f"--teacher {folder}/teacher/teacher.pt --steps 300 --evaluate-every 0 "
                  f"--sample-every 0 --out {folder}/dmd2".split())


@pytest.fixture(scope="session", autouse=True)
def distilled_digits(request, tmp_path_factory):
    """Such a process, begun before the first test if the one that waits for it is to run."""
    wanted = any("distilling_digits" in item.name for item in request.session.items)
    folder = tmp_path_factory.mktemp("digits")
    process = in_child(distil_digits, str(folder)) if wanted else None
    yield folder, process
    if process:
        process.kill()


def test_distilling_digits_for_a_minute_comes_near_the_teacher(distilled_digits):
    folder, process = distilled_digits
    process.join(600)
    assert process.exitcode == 0, (folder / "words").read_text()
    reference = sample.load_reference(DIGITS)
    real, fake = (sample.measure(sample.load_sampler(f"{folder}/{path}"), reference, 1000, 0)
                  for path in ("teacher/teacher.pt", "dmd2/generator.pt"))
    assert real["frechet_distance"] < 1.2 and real["accuracy"] > 0.9
    assert fake["frechet_distance"] < 1.2 * real["frechet_distance"]
    assert fake["accuracy"] > real["accuracy"] - 0.02
    assert fake["recall"] > 0.75 * real["recall"]


def commands(readme):
    """The commands in the README's blocks, one to a string, in reading order."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", readme, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


def test_every_command_of_the_readme_runs(curves, tmp_path, persistence, monkeypatch):
    """In order, in an empty folder, by the scripts' own main, with tiny sizes put behind each.

    EDM's checkpoint is a small one of its kind, CIFAR-10 and the photos are folders of noise, and
    of MNIST there are 1,000 images.
    """
    monkeypatch.chdir(tmp_path)
    network = dict(TINY_EDM["edm_ddpmpp_tiny"], img_resolution=32)
    state = teacher.UNet(**network).state_dict()
    Path("edm-cifar10-32x32-cond-vp.pkl").write_bytes(pickle.dumps(edm_checkpoint(network, state)))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    for i, image in enumerate(pixels):
        Path(f"cifar10/{i % 10}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(f"cifar10/{i % 10}/{i}.png")
    photographs(tmp_path / "photos", count=15)
    whole = teacher.load_data

    def some(name, *args):
        data = whole(name, *args)
        return data._replace(images=data.images[:1000], labels=data.labels[:1000]) \
            if name == "mnist" else data
    for module in (teacher, sample):
        monkeypatch.setattr(module, "load_data", some)
    monkeypatch.setattr(export, "BATCHES", (1,))
    whole_medians = export.medians
    monkeypatch.setattr(export, "medians", lambda calls, device: whole_medians(calls, device, 1, 0))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)  # has a test of its own
    ran = 0
    for command in dict.fromkeys(commands(README)):  # each once
        program, *words = shlex.split(command)
        if program == "torchrun":  # which has tests of its own
            assert words[:2] == ["--nproc_per_node", "8"]
            program, words = "python", words[2:]
        if program != "python":
            assert command in ("pip install -r requirements.txt", "pytest test_all.py"), command
            continue
        of_mnist = any(word in command for word in ("mnist", "autoencoder", "latent"))
        if of_mnist and not (SHARED / "data" / "MNIST").exists():
            continue
        words += ["--data-dir", str(SHARED / "data")] if "mnist" in words else []
        words = [str(tmp_path / "cifar10") if word == "cifar10" else word for word in words]
        script = Path(words[0]).stem
        n = "100" if "--evaluate" in words else "20"
        extra = dict(teacher=[*TINY, "--sample-every", "4"],
                     dmd2=[*TINY_DMD, "--sample-every", "4", "--pairs", "20"],
                     sample=["--n", n, "--seeds", "1"], export=[])[script]
        extra = [] if script == "sample" and "autoencoder" in words[1] else extra
        extra = ["--steps", "6"] if "--resume" in words else [] if "--beside" in words else extra
        extra += ["--evaluate-every", "0"] if script == "dmd2" and "--data" in words else []
        main = dict(teacher=teacher, dmd2=dmd2, sample=sample, export=export)[script].main
        main([*words[1:], *extra])
        ran += 1
    assert ran >= 15
    for snippet in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(snippet, variables := {})
        assert variables["image"].shape == (10, 1, 8, 8)


def test_words_of_the_readme_s_promises_select_tests():
    """And every test that counts faults is behind one of them."""
    source = Path(__file__).read_text()
    tests = re.findall(r"^def (test_\w+)", source, re.M)
    counting = re.findall(r"^def (test_\w+)\([^)]*\bfaults\b", source, re.M)
    table = README.split("| promise | words |")[1].split("\n\n")[0]
    words = [re.findall(r"\w+", cell) for cell in re.findall(r"\| `([^`]+)` \|", table)]
    words = [[word for word in row if word != "or"] for row in words]
    assert len(words) >= 12
    for row in words:
        for word in row:
            assert any(word in test for test in tests), word
    for test in set(counting) - {"test_readme_s_table_of_faults_has_the_counts_of_the_tests"}:
        assert any(word in test for row in words for word in row), test


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk to fill")
def test_readme_s_table_of_faults_has_the_counts_of_the_tests(faults):
    """The last test, when the others have counted."""
    rows = {kind: int(count.replace(",", "")) for kind, count in
            re.findall(r"^\| ([a-z][^|]+) \| ([\d,]+) \| [\d,]+ \|$", README, re.M)}
    assert len(rows) > 10
    if rows.keys() - faults.keys():
        pytest.skip("other tests have to count before")
    assert {kind: faults[kind] for kind in rows} == rows
