"""Export a generator as one ONNX file that an app can use without knowing anything of this project.

    python export.py runs/dmd2/generator.pt                # writes runs/dmd2/generator.onnx
    python export.py runs/dmd2/generator.pt --benchmark    # and times it

    inputs    noise  [batch, c, h, w]  float32, standard normal; [K, batch, c, h, w] of K steps; in
                                       the shape of images or, with an autoencoder, of its latents
              label  [batch]           int64, in [0, classes)
    output    image  [batch, C, H, W]  float32 in [-1, 1]; with --uint8 [batch, H, W, C] uint8

The file takes its name only after onnx.checker passed it and onnxruntime gave PyTorch's images. In
reading order: options, the module that is exported, export, check, benchmark.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnxscript import opset18
from torch import nn
from torch.utils._pytree import tree_map

from sample import few_step, onnx_session, open_checkpoint, teacher_sampler
from teacher import (Options, Pixels, arg, build, clock, codec_of, device_name, exported_noise,
                     fresh_noise, parse, pick_device, place, replacing, run_script, shape_of,
                     to_uint8, unit_noise)

OPSET = opset18.version  # the fewest nodes at run time, and read by every onnxruntime since 1.14
BATCHES = (1, 16, 256)  # of the benchmark


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Options of export.py."""

    checkpoint: str = arg(None, "generator.pt of dmd2.py", positional=True)
    device: str = arg("cpu", "where the file is checked against PyTorch", ("cpu", "cuda"))
    out: str = arg(None, "the file to write (default: beside the checkpoint, .onnx; the name tells "
                         "--uint8 and --fp16)")
    uint8: bool = arg(False, "the image as uint8 [batch, H, W, C], not float32 [batch, C, H, W]")
    fp16: bool = arg(False, "weights and arithmetic in float16; inputs and output keep their types")
    benchmark: bool = arg(False, "then time PyTorch, torch.compile, onnxruntime and the teacher")

    def __post_init__(self):
        super().__post_init__()
        if self.checkpoint is None:
            raise ValueError("no checkpoint given; runs/dmd2/generator.pt is dmd2.py's")
        if self.out and Path(self.out).suffix != ".onnx":
            raise ValueError(f"--out {self.out}: must end in .onnx")


# ---- the module that is exported ----------------------------------------------------------------

class Exported(nn.Module):
    """A generator with its noise scaling, decoded, clamped and if asked converted to uint8."""

    def __init__(self, generator, sigmas, num_classes, uint8=False, codec=None):
        super().__init__()
        self.generator, self.sigmas, self.uint8 = generator, sigmas, uint8
        self.codec = codec or Pixels()
        self.register_buffer("labels", torch.arange(num_classes)[:, None])

    def forward(self, noise, label):
        """noise as of example(), label [batch] int64 -> image, as the file says

        On a CPU raises IndexError, and onnxruntime INVALID_ARGUMENT, for a label that is no class:
        it is looked up in a table of them, where a negative one would count from the end.
        """
        label = torch.where(label < 0, len(self.labels), label)
        label = F.embedding(label, self.labels)[:, 0]
        noise = noise if len(self.sigmas) > 1 else noise[None]
        x0 = few_step(self.generator, self.sigmas[0] * noise[0], self.sigmas, label, noise[1:])
        image = self.codec.decode(x0).clamp(-1, 1)
        return to_uint8(image).permute(0, 2, 3, 1) if self.uint8 else image

    def example(self, batch, shape):
        """Noise to try it with: [batch, *shape]; for K > 1 steps [K, batch, *shape]."""
        return exported_noise(fresh_noise(batch, shape, seed=0), len(self.sigmas))


class Half(nn.Module):
    """A network in float16 behind a float32 input, its first, and outputs."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net).half()

    def forward(self, x, *others):
        return tree_map(torch.Tensor.float, self.net(x.half(), *others))


# ---- export and check ---------------------------------------------------------------------------

def attention(q, k, v):
    """Attention of q, k, v [B, heads, T, C] that leaves no transposition for run time.

    Those here cancel the network's own, or onnxruntime takes them into its matrix products.
    """
    def transposed(x):
        return opset18.Transpose(x, perm=(0, 1, 3, 2))
    scale = opset18.CastLike(opset18.Constant(value_float=q.shape[-1]**-0.5), q)
    weights = opset18.Softmax(opset18.Mul(opset18.MatMul(q, transposed(k)), scale), axis=-1)
    return transposed(opset18.MatMul(transposed(v), transposed(weights)))


def export_onnx(exported, shape, facts, path):
    """Write a module (noise, label) -> image as one ONNX file with dynamic batch and metadata."""
    batch = torch.export.Dim("batch")
    noise = exported.example(2, shape)
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            exported, (noise, torch.zeros(2, dtype=torch.long)), dynamo=True,
            input_names=["noise", "label"], output_names=["image"], opset_version=OPSET,
            dynamic_shapes=dict(noise={noise.ndim - 4: batch}, label={0: batch}), verbose=False,
            custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default:
                                      attention})
    model = program.model_proto
    graph = model.graph  # the exporter notes source files in it, with their absolute paths
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output,
                 *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    onnx.helper.set_model_props(model, {"dmd2": json.dumps(facts)})
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)


def check_onnx(path, exported, shape, num_classes, device="cpu"):
    """Largest difference of onnxruntime's images from PyTorch's, on the scale of [-1, 1].

    Of batch 1, 3 and 64, every label among them. A uint8 image counts from the second level on, for
    one comes of rounding.
    """
    session, _ = onnx_session(path, device, dict(use_tf32=0) if device == "cuda" else None)
    exported, worst, first = exported.to(device), 0.0, 0
    for batch in (1, 3) + (64,) * math.ceil(num_classes / 64):
        label = torch.arange(first, first + batch) % num_classes
        first += batch
        noise = exported.example(batch, shape)
        image, = session.run(["image"], {"noise": noise.numpy(), "label": label.numpy()})
        with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
            expected = exported(noise.to(device), label.to(device)).cpu().numpy()
        assert image.shape == expected.shape and image.dtype == expected.dtype
        difference = np.abs(image.astype(np.float64) - expected.astype(np.float64)).max()
        if exported.uint8:
            difference = max(0, difference - 1) / 127.5
        worst = np.maximum(worst, difference)  # which keeps a NaN
    return float(worst)


def facts_of(checkpoint, path, cfg):
    """The contract and the origin of an exported file, as its metadata tells them."""
    data = {name: checkpoint["data"][name] for name in ("name", "size", "shape", "classes")}
    data["name"] = Path(data["name"]).name  # of a folder, not where it lies on this machine
    steps, (channels, height, width) = len(checkpoint["sigmas"]), data["shape"]
    return dict(
        data=data, steps=steps, sigmas=checkpoint["sigmas"],
        noise=f"float32 [{f'{steps}, ' * (steps > 1)}batch, "
              f"{', '.join(map(str, shape_of(checkpoint['network'])))}], standard normal",
        label=f"int64 [batch], 0 to {len(data['classes']) - 1}",
        image=f"uint8 [batch, {height}, {width}, {channels}]" if cfg.uint8 else
              f"float32 [batch, {channels}, {height}, {width}] in [-1, 1]",
        arithmetic="float16" if cfg.fp16 else "float32",
        training_step=checkpoint["step"], figures=checkpoint["figures"],
        teacher_figures=checkpoint["teacher_figures"], git_commit=git_commit(),
        checkpoint_sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest())


def git_commit():
    """The commit of these scripts, -dirty if they were changed since; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True,
                              text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---- benchmark ----------------------------------------------------------------------------------

def bound(path, noise, label, image, device, graph=False):
    """A call that runs the file on inputs and into an output that lie on the device already.

    With graph as a CUDA graph, for which the session knows its batch size.
    """
    options = (dict(enable_cuda_graph=1), len(label)) if graph else ()
    session, _ = onnx_session(path, device.type, *options)
    noise, label, image = (
        onnxruntime.OrtValue.ortvalue_from_numpy(tensor.cpu().numpy(), device.type, 0)
        for tensor in (noise, label, image))
    binding = session.io_binding()
    binding.bind_ortvalue_input("noise", noise)
    binding.bind_ortvalue_input("label", label)
    binding.bind_ortvalue_output("image", image)
    call = functools.partial(session.run_with_iobinding, binding)
    call()  # captures
    return call


def compiled_call(exported, inputs):
    """A call of the compiled module, for this batch size."""
    torch.compiler.reset()
    compiled = torch.compile(exported, dynamic=False)
    compiled(*inputs)
    return lambda: compiled(*inputs)


def replayed(call):
    """A call that replays on CUDA what PyTorch launched for `call`, which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def medians(calls, device, rounds=5, budget=0.4):
    """Median seconds of each of the calls, by name.

    They take turns in rounds, as a machine's speed drifts, each for `budget` seconds or 3 calls,
    of which the first is to warm up and does not count.
    """
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            ends = [clock(device)]
            while len(ends) < 4 or ends[-1] - ends[0] < budget:
                call()
                ends.append(clock(device))
            seconds[name] += [end - start for start, end in itertools.pairwise(ends)][1:]
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def benchmark(path, exported, checkpoint, device):
    """Yield (batch, name, seconds) of the teacher's sampler, PyTorch's and onnxruntime's generator.

    The teacher's network has the generator's size, so the generator's stands in for it.
    """
    exported = place(exported, device)
    teacher = teacher_sampler(exported.generator, checkpoint, device)
    for batch in BATCHES:
        inputs = (exported.example(batch, teacher.shape).to(device),
                  torch.arange(batch, device=device) % len(checkpoint["data"]["classes"]))
        noise = unit_noise(batch, teacher.shape, seed=0).to(device)
        calls = {teacher.name: lambda: teacher.images(iter([noise]), inputs[1]),
                 "PyTorch eager": lambda: exported(*inputs)}
        image = exported(*inputs)
        attempts = {"torch.compile": lambda: compiled_call(exported, inputs),
                    "onnxruntime": lambda: bound(path, *inputs, image, device)}
        if device.type == "cuda":
            attempts["PyTorch, CUDA graph"] = lambda: replayed(calls["PyTorch eager"])
            attempts["onnxruntime, CUDA graph"] = lambda: bound(path, *inputs, image, device, True)
        failed = {}
        for name, attempt in attempts.items():
            try:
                calls[name] = attempt()
            except Exception as error:  # no compiler, no graph: onnxruntime's have no other base
                failed[f"{name}: {type(error).__name__}"] = math.nan
        for name, seconds in {**medians(calls, device), **failed}.items():
            yield batch, name, seconds


def print_benchmark(rows, device):
    """Print the rows of benchmark() as they come, with each batch's gain over the teacher."""
    tf32 = ", both with TF32" * (device.type == "cuda")
    print(f"{device_name(device)}, torch {torch.__version__} in float32, onnxruntime "
          f"{onnxruntime.__version__} with the file as exported{tf32}; medians")
    print(f"{'batch':>5}  {'':22} {'ms':>9} {'images/s':>10} {'x teacher':>10}")
    base = {}
    for batch, name, seconds in rows:
        gain = base.setdefault(batch, seconds) / seconds  # a batch's first row is the teacher
        print(f"{batch:5}  {name:22} {1000 * seconds:9.2f} {batch / seconds:10.0f} {gain:10.1f}",
              flush=True)


# ---- main ---------------------------------------------------------------------------------------

def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    device = pick_device(cfg.device).type
    checkpoint = open_checkpoint(cfg.checkpoint)
    if checkpoint["kind"] != "generator":
        raise ValueError(f"{cfg.checkpoint}: holds a {checkpoint['kind']}; distil it first: python "
                         f"dmd2.py --teacher {cfg.checkpoint}")
    kind = "_uint8" * cfg.uint8 + "_fp16" * cfg.fp16
    default = Path(cfg.checkpoint).with_name(Path(cfg.checkpoint).stem + kind + ".onnx")
    path, shape = Path(cfg.out or default), shape_of(checkpoint["network"])
    classes = len(checkpoint["data"]["classes"])
    exported = Exported(build(checkpoint), checkpoint["sigmas"], classes, cfg.uint8,
                        codec_of(checkpoint["autoencoder"]))
    to_export = copy.deepcopy(exported)
    if cfg.fp16:
        to_export.generator.net = Half(exported.generator.net)
        if checkpoint["autoencoder"]:
            to_export.codec.decoder = Half(exported.codec.decoder)
    tolerance = 1e-2 if cfg.fp16 else 1e-4 if device == "cuda" else 1e-5
    tolerance *= 2 if checkpoint["autoencoder"] else 1  # two networks, one after the other

    facts = facts_of(checkpoint, cfg.checkpoint, cfg)
    with replacing(path) as temporary:
        export_onnx(to_export, shape, facts, temporary)
        error = check_onnx(temporary, exported, shape, classes, device)
        if not error <= tolerance:
            print(f"export.py: onnxruntime differs from PyTorch by {error:.1e}, more than "
                  f"{tolerance:.0e}; no file was written", file=sys.stderr)
            sys.exit(1)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; differs from PyTorch by {error:.1e}, of "
          f"{tolerance:.0e} allowed{' beyond one level' * cfg.uint8}, on {device}\n"
          f"next: python sample.py {path}")
    if cfg.benchmark:
        torch.set_float32_matmul_precision("high")  # TF32, as onnxruntime's default is on CUDA
        for name in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            device = torch.device(name)
            print_benchmark(benchmark(path, exported, checkpoint, device), device)


if __name__ == "__main__":
    run_script(main)
