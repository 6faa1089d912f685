"""Export a generator as one ONNX file that an app can use without knowing anything of this project.

    python export.py runs/dmd2/generator.pt                # writes runs/dmd2/generator.onnx
    python export.py runs/dmd2/generator.pt --benchmark    # and times it

    inputs    noise  [batch, c, h, w]  float32, standard normal; [K, batch, c, h, w] of K steps; in
                                       the shape of images or, with an autoencoder, of its latents
              label  [batch]           int64, in [0, classes)
              or, of Stable Diffusion, tokens [batch, 77], of SDXL [batch, 2, 77], int64
    output    image  [batch, C, H, W]  float32 in [-1, 1]; with --uint8 [batch, H, W, C] uint8

The file is written only after onnx.checker passed it and onnxruntime gave PyTorch's images.
"""

import copy
import dataclasses
import hashlib
import json
import math
import statistics
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map

from sample import (build_any, exported_noise, few_step, fused, onnx_session, make_sampler,
                    open_checkpoint)
from teacher import (Options, Pixels, __version__, arg, codec_of, device_name, fresh_noise, parse,
                     pick_device, replacing, run_script, shape_of, start_scale, to_uint8)

OPSET = 18  # the fewest nodes at run time, and read by every onnxruntime since 1.14
BATCHES = (1, 16, 256)  # of the benchmark
LARGE = 2**31 - 2**20  # bytes, less than which a file of protobuf has


@dataclasses.dataclass(frozen=True)
class Config(Options):
    checkpoint: str = arg(None, "generator.pt of dmd2.py", positional=True)
    device: str = arg("cpu", "where the file is checked against PyTorch", ("cpu", "cuda"))
    out: str = arg(None, "the file to write (default: beside the checkpoint, and .onnx)")
    uint8: bool = arg(False, "the image as uint8 [batch, H, W, C], not float32 [batch, C, H, W]")
    fp16: bool = arg(False, "weights and arithmetic in float16; inputs and output keep their types")
    benchmark: bool = arg(False, "then time PyTorch, torch.compile, onnxruntime and the teacher")


# ---- the module that is exported ----------------------------------------------------------------

class Exported(nn.Module):
    """A generator with its noise scaling, decoded, clamped and if asked converted to uint8."""

    def __init__(self, generator, checkpoint, uint8=False, codec=Pixels):
        super().__init__()
        self.generator, self.sigmas = generator, checkpoint["sigmas"]
        self.uint8, self.codec = uint8, codec
        self.start = start_scale(checkpoint["schedule"], self.sigmas[0])
        self.prompts = getattr(generator.net, "prompts", None)
        self.encoders = self.prompts and self.prompts.encoders  # for them to be in the file
        num_classes = len(checkpoint["data"]["classes"])
        self.register_buffer("labels", torch.arange(num_classes)[:, None])

    def forward(self, noise, label):
        """noise as of example(), label [batch] int64 -> image, as the file says; a label that is no
        class is an IndexError on a CPU, and onnxruntime's INVALID_ARGUMENT"""
        if self.prompts:
            label = self.prompts.encoded(label)
        else:
            label = torch.where(label < 0, len(self.labels), label)  # -1 would be the last one
            label = F.embedding(label, self.labels)[:, 0]
        noise = noise if len(self.sigmas) > 1 else noise[None]
        x0 = few_step(self.generator, self.start * noise[0], self.sigmas, label, noise[1:])
        image = self.codec.decode(x0).clamp(-1, 1)
        return to_uint8(image).permute(0, 2, 3, 1) if self.uint8 else image

    def example(self, batch, shape):
        """Noise to try it with: [batch, *shape]; for K > 1 steps [K, batch, *shape]."""
        return exported_noise(fresh_noise(batch, shape, seed=0), len(self.sigmas))

    def named(self, rows):
        """What the file is given for rows of classes or prompts [batch]: these, or tokens."""
        return self.prompts.table[rows] if self.prompts else rows


class Half(nn.Module):
    """A network in float16 behind a float32 input, its first, and outputs."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net).half()

    def forward(self, x, *others):
        return tree_map(torch.Tensor.float, self.net(x.half(), *others))


# ---- export and check ---------------------------------------------------------------------------

def export_onnx(exported, shape, facts):
    """A module (noise, label) -> image as an ONNX model with dynamic batch and metadata."""
    import onnx
    batch = torch.export.Dim("batch", max=63)  # from there diffusers copies, which is no operation
    noise, label = exported.example(2, shape), exported.named(torch.zeros(2, dtype=torch.long))
    with warnings.catch_warnings(action="ignore"):
        model = torch.onnx.export(
            exported, (noise, label), dynamo=True, verbose=False, opset_version=OPSET,
            input_names=["noise", "tokens" if exported.prompts else "label"],
            output_names=["image"],
            dynamic_shapes=dict(noise={noise.ndim - 4: batch}, label={0: batch})).model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where the exporter notes source files, with absolute paths
    onnx.helper.set_model_props(model, {"dmd2": json.dumps(facts)})
    return model


def size_of(model):
    """Bytes of an ONNX model's weights; protobuf can't tell those of more than 2 GB."""
    return sum(len(weight.raw_data) for weight in model.graph.initializer)


def stored(model, path):
    """An ONNX model as bytes; one of more than protobuf's 2 GB as the path it is written to, with
    its weights in a second file beside it, .data."""
    import onnx
    if size_of(model) > LARGE:
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data")
        content = path
    else:
        content = model.SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    return content


def check_onnx(content, exported, shape, num_classes, device="cpu"):
    """Largest difference of onnxruntime's images from PyTorch's, on the scale of [-1, 1]; of uint8
    beyond one level, which comes of rounding. Of batch 1, 3 and 64, every label among them; of
    prompts, batches of 1, 3 and 8."""
    session, _ = onnx_session(content, device, **dict(use_tf32=0) if device == "cuda" else {})
    exported, differences, most = exported.to(device), [], 8 if exported.prompts else 64
    labels = torch.arange(4 + most * math.ceil(num_classes / most)) % num_classes
    for label in (labels[:1], labels[1:4], *labels[4:].split(most)):
        noise, label = exported.example(len(label), shape), exported.named(label)
        feed = dict(zip((i.name for i in session.get_inputs()), (noise.numpy(), label.numpy())))
        image, = session.run(["image"], feed)
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            expected = exported(noise.to(device), label.to(device)).cpu().numpy()
        assert image.shape == expected.shape and image.dtype == expected.dtype
        differences.append(np.abs(image.astype(float) - expected.astype(float)).max())
    worst = float(np.max(differences))  # NaN, if one is
    return max(0.0, worst - 1) / 127.5 if exported.uint8 else worst


def facts_of(checkpoint, path, cfg, prompts=None):
    """The contract and the origin of an exported file, as its metadata tells them."""
    data = {name: checkpoint["data"][name] for name in ("name", "size", "shape", "classes")}
    data["name"] = Path(data["name"] or "prompts").name  # of a folder, not where it lies here
    steps, (c, h, w) = len(checkpoint["sigmas"]), data["shape"]
    noise = [steps] * (steps > 1) + ["batch", *shape_of(checkpoint["network"])]
    return dict(
        data=data, steps=steps, version=__version__, training_step=checkpoint["step"],
        noise=f"float32 [{', '.join(map(str, noise))}], standard normal",
        **dict(tokens=f"int64 {['batch', *prompts.table.shape[1:]]}, CLIP's of a prompt, filled up "
                      "to 77; of SDXL both tokenizers'") if prompts else
        dict(label=f"int64 [batch], 0 to {len(data['classes']) - 1}"),
        image=f"uint8 [batch, {h}, {w}, {c}]" if cfg.uint8 else
              f"float32 [batch, {c}, {h}, {w}] in [-1, 1]",
        arithmetic="float16" if cfg.fp16 else "float32",
        **{name: checkpoint[name] for name in ("sigmas", "figures", "teacher_figures")},
        checkpoint_sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest())


# ---- benchmark ----------------------------------------------------------------------------------

def medians(calls, rounds=5):
    """Median seconds of each of the calls by name; they take turns, as a machine's speed drifts."""
    from torch.utils.benchmark import Timer
    timers = {name: Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
              for name, call in calls.items()}
    found = [{name: timer.blocked_autorange(min_run_time=0.4).median
              for name, timer in timers.items()} for _ in range(rounds)]
    return {name: statistics.median(times[name] for times in found) for name in calls}


@torch.no_grad()
def benchmark(content, exported, checkpoint, device):
    """Print the medians of the generator by PyTorch and onnxruntime, and of the teacher's sampler,
    where the generator's network stands in for the teacher's, which is of its size."""
    print(f"{device_name(device)}, torch {torch.__version__}; medians of calls that take turns\n"
          f"{'batch':>5}  {'':22} {'ms':>9} {'images/s':>10} {'x teacher':>10}")
    exported, (session, _) = exported.to(device), onnx_session(content, device.type)
    teacher = make_sampler(exported.generator, dict(checkpoint, kind="teacher"), device)
    for batch in BATCHES:
        noise = exported.example(batch, teacher.shape).to(device)
        label = torch.arange(batch, device=device) % len(checkpoint["data"]["classes"])
        noises, binding = noise.view(-1, batch, *teacher.shape), session.io_binding()
        binding.bind_cpu_input("noise", noise.cpu().numpy())  # and lies on the device from then on
        binding.bind_cpu_input("label", label.cpu().numpy())
        binding.bind_output("image", device.type)
        torch.compiler.reset()
        calls = {teacher.name: lambda: teacher.decode(teacher.x0(iter(noises), label)),
                 "PyTorch": lambda: exported(noise, label),
                 "onnxruntime": lambda: session.run_with_iobinding(binding)}
        compiled = torch.compile(exported, dynamic=False)
        try:
            compiled(noise, label)
            calls["torch.compile"] = lambda: compiled(noise, label)
        except RuntimeError as error:  # no compiler
            print(f"torch.compile: {str(error).splitlines()[0]}")
        found = medians(calls)
        for name, seconds in found.items():
            print(f"{batch:5}  {name:22} {1000 * seconds:9.2f} {batch / seconds:10.0f} "
                  f"{found[teacher.name] / seconds:10.1f}", flush=True)


def main(argv=None):
    cfg = parse(Config, argv, __doc__.split("\n\nThe file is")[0])
    device, checkpoint = pick_device(cfg.device).type, open_checkpoint(cfg.checkpoint)
    if checkpoint["kind"] != "generator":
        raise ValueError(f"{cfg.checkpoint}: holds a teacher; distil it first, by dmd2.py")
    ending = "_uint8" * cfg.uint8 + "_fp16" * cfg.fp16 + ".onnx"
    path = Path(cfg.out or cfg.checkpoint.removesuffix(".pt") + ending)
    if "pipeline" in checkpoint["network"]:  # whose classes are all the prompts
        checkpoint["data"]["classes"] = checkpoint["data"]["classes"][:8]
    shape, classes = shape_of(checkpoint["network"]), len(checkpoint["data"]["classes"])
    generator, codec = fused(build_any(checkpoint)), codec_of(checkpoint["autoencoder"])
    if checkpoint["autoencoder"]:
        codec.vae.disable_slicing()  # which would fix the batch
    exported = Exported(generator, checkpoint, cfg.uint8, codec)
    prompts, to_export = exported.prompts, copy.deepcopy(exported) if cfg.fp16 else exported
    if prompts and len(checkpoint["sigmas"]) > 1:
        raise ValueError(f"{cfg.checkpoint}: a text-to-image file holds one step, which an app "
                         "repeats; distil with --student-steps 1")
    if cfg.fp16:
        to_export.generator.net = Half(exported.generator.net)
        if prompts:
            to_export.prompts = copy.copy(prompts)
            to_export.encoders = to_export.prompts.encoders = copy.deepcopy(prompts.encoders).half()
        if checkpoint["autoencoder"] and not getattr(prompts, "xl", False):  # SDXL's overflows
            to_export.codec.vae.decoder = Half(codec.vae.decoder)
    tolerance = 1e-2 if cfg.fp16 else 1e-4 if device == "cuda" else 1e-5
    tolerance *= 2 if checkpoint["autoencoder"] else 1  # two networks, one after the other
    model = export_onnx(to_export, shape, facts_of(checkpoint, cfg.checkpoint, cfg, prompts))
    path.parent.mkdir(parents=True, exist_ok=True)
    size = size_of(model)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        content = stored(model, Path(folder, path.name))
        error = check_onnx(content, exported, shape, classes, device)
        if not error <= tolerance:
            raise ValueError(f"onnxruntime differs from PyTorch by {error:.1e}; no file was "
                             "written")
        for file in Path(folder).iterdir():
            file.replace(path.with_name(file.name))
    if isinstance(content, bytes):
        with replacing(path) as file:
            file.write(content)
    size = len(content) if isinstance(content, bytes) else size
    print(f"{path}: {size / 1e6:.1f} MB; differs from PyTorch by {error:.1e}, allowed "
          f"are {tolerance:.0e}{' beyond one level' * cfg.uint8}"
          + (f"; its weights are in {path.name}.data" if isinstance(content, Path) else "")
          + ("" if prompts else f"\nnext: python sample.py {path}"))
    if cfg.benchmark and not prompts:
        for name in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            benchmark(content, exported, checkpoint, torch.device(name))


if __name__ == "__main__":
    run_script(main)
