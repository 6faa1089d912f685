"""Export a checkpoint as one ONNX file that an app can use without knowing this project.

    python export.py runs/dmd2/generator.pt                # runs/dmd2/generator.onnx and .json
    python export.py runs/dmd2/generator.pt --int8 --benchmark    # generator_int8.onnx, timed
    python export.py runs/teacher/teacher.pt               # a denoiser, for a sampler in the app

    noise   float32 [batch, c, h, w]: standard normal; of K steps [K, batch, c, h, w]
    label   int64 [batch] in [0, labels): a class; of a teacher, beyond all classes, "no label"
    tokens  of text, int64 [batch, 77], of SDXL [batch, 2, 77]: by its tokenizers, padded to 77
    image   float32 [batch, C, H, W] in [-1, 1], or uint8 [batch, H, W, C]; grey or RGB
    x       of a teacher, float32 [batch, c, h, w]: x0 + sigma * noise, x0 an image or latents
    sigma   float32 [batch]: the noise level; sample from sigmas[0] * noise down sigmas, then to 0
    x0_hat  float32 [batch, c, h, w]: the mean of all x0 that fit x
"""

import dataclasses
import functools
import importlib.util
import json
import tempfile
import time
import types
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sample import (TITLES, build_any, digest_of, exported_noise, few_step, load_reference,
                    make_sampler, measure, onnx_sampler, onnx_session, open_checkpoint)
from teacher import (HEUN_STEPS, Options, __version__, arg, build, device_name, fresh_noise, parse,
                     pick_device, run_script, sampling_sigmas, shape_of, start_scale, to_uint8)

MEANING = dict(line.split(None, 1) for line in __doc__.split("\n\n")[2].splitlines())
BATCHES = (1, 16, 256)  # of the benchmark
LARGE = 2**31 - 2**20  # bytes: protobuf's limit, less a margin
INT8_N, INT8_WORSE = 2000, (1.1, 0.01)  # images; times the distance, and share not as asked


@dataclasses.dataclass(frozen=True)
class Config(Options):
    checkpoint: str = arg(None, "generator.pt of dmd2.py, or a teacher", positional=True)
    device: str = arg("cpu", "where the file is checked, and timed by --benchmark", ("cpu", "cuda"))
    out: str = arg(None, "the file to write (default: beside the checkpoint, and .onnx)")
    uint8: bool = arg(False, "the image as uint8 [batch, H, W, C], not float32 [batch, C, H, W]")
    fp16: bool = arg(False, "weights and arithmetic in float16; inputs and output keep their types")
    int8: bool = arg(False, "convolutions and linear layers in int8; checked by quality")
    data_dir: str = arg(None, "with --int8: where the real images are (default: as in training)")
    benchmark: bool = arg(False, "time PyTorch, torch.compile, onnxruntime, OpenVINO, the teacher")


class Exported(nn.Module):
    """A generator with its noise scaling, decoded, clamped and if asked converted to uint8."""

    output = "image"

    def __init__(self, checkpoint, uint8=False):
        super().__init__()
        self.denoiser, self.codec = build_any(checkpoint), build(checkpoint["autoencoder"])
        if checkpoint["autoencoder"]:
            self.codec.vae.disable_slicing()  # which would fix the batch
        self.sigmas, self.shape = checkpoint["sigmas"], shape_of(checkpoint["network"])
        self.uint8, self.start = uint8, start_scale(checkpoint["schedule"], self.sigmas[0])
        self.prompts = getattr(self.denoiser.net, "prompts", None)
        self.encoders = self.prompts and self.prompts.encoders  # for them to be in the file
        none = bool(checkpoint["config"].get("label_dropout"))  # of a teacher, the last label
        self.count = len(checkpoint["data"]["classes"]) + none
        self.register_buffer("labels", torch.arange(self.count))

    def forward(self, noise, label):
        """noise, and label or tokens -> image, all as in the file"""
        label = self.prompts.encoded(label) if self.prompts else self.checked(label)
        noise = noise if len(self.sigmas) > 1 else noise[None]
        x0 = few_step(self.denoiser, self.start * noise[0], self.sigmas, label, noise[1:])
        image = self.codec.decode(x0).clamp(-1, 1)
        return to_uint8(image).permute(0, 2, 3, 1) if self.uint8 else image

    def checked(self, label):
        """The label; one out of range, -1 too, is an error on a CPU. OpenVINO does not look."""
        return self.labels.index_select(0, torch.where(label < 0, self.count, label))

    def example(self, label, seed=0):
        """Inputs by name to try the file with, of label [batch] or, of text, rows of prompts."""
        noise = exported_noise(fresh_noise(len(label), self.shape, seed), len(self.sigmas))
        return {"noise": noise, "label": label} if not self.prompts else {
            "noise": noise, "tokens": self.prompts.table[label]}


class ExportedTeacher(Exported):
    """A teacher, which is a denoiser, for a sampler in the app; of latents it gives latents."""

    output = "x0_hat"

    def forward(self, x, sigma, label):
        return self.denoiser(x, sigma, self.checked(label))

    def example(self, label, seed=0):
        sigma = torch.tensor(self.sigmas)[torch.arange(len(label)) % len(self.sigmas)]
        noise = next(fresh_noise(len(label), self.shape, seed))
        return {"x": sigma.view(-1, 1, 1, 1) * noise, "sigma": sigma, "label": label}


def halve(exported):
    """Let the networks of a module compute in float16; denoiser and codec make that float32."""
    nets, prompts = [exported.denoiser.net], exported.prompts
    if hasattr(exported.codec, "vae") and not (prompts and prompts.xl):  # whose decoder overflows
        nets.append(exported.codec.vae.decoder)
    for net in nets:
        net.register_forward_pre_hook(lambda net, args: (args[0].half(), *args[1:]))
    for p in nn.ModuleList([*nets, *(exported.encoders or ())]).parameters():
        p.data = p.data.half()  # not the noise levels of timesteps, a buffer
    return exported


def export_onnx(exported):
    """A module of example()'s inputs as an ONNX model with dynamic batch, constants folded."""
    import onnxscript.optimizer
    inputs = exported.example(torch.zeros(2, dtype=torch.long))
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            exported, tuple(inputs.values()), dynamo=True, optimize=False, opset_version=18,
            input_names=[*inputs], output_names=[exported.output], verbose=False,
            dynamic_shapes=tuple({max(0, value.ndim - 4): "batch"} for value in inputs.values()))
    onnxscript.optimizer.optimize(program.model, input_size_limit=LARGE, output_size_limit=LARGE)
    program.model.ir_version = 8  # which is all that opset 18 needs, for onnxruntime before 1.18
    for node in program.model.graph:
        node.metadata_props.clear()  # where the exporter notes source files, with absolute paths
        node.attributes.pop("allowzero", None)  # which some readers refuse; no shape here has a 0
    model = program.model_proto
    del model.graph.value_info[:]  # some are of weights, which quantize_dynamic refuses
    return model


def store(model, facts, path):
    """Write an ONNX model with facts as its metadata, of more than protobuf's 2 GB with the weights
    in a second file, .data; and for languages that can't read metadata the facts as .json."""
    import onnx
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        facts[value.name] = dict(type=str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)),
                                 shape=[dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
                                 meaning=MEANING[value.name])
    names = dict(enumerate(facts["data"]["classes"]))
    onnx.helper.set_model_props(model, {
        "description": f"{facts['kind']}, {facts['arithmetic']}",
        "version": __version__, "license": "MIT, of the program; weights and data have their own",
        "names": json.dumps(names), "date": time.strftime("%Y-%m-%d"), "dmd2": json.dumps(facts)})
    large = sum(len(weight.raw_data) for weight in model.graph.initializer) > LARGE
    onnx.save_model(model, path, save_as_external_data=large, location=f"{path.name}.data")
    onnx.checker.check_model(path, full_check=True)
    path.with_suffix(".json").write_text(json.dumps(dict(facts, id2label=names), indent=2))


@torch.no_grad()
def check_onnx(path, exported, device="cpu"):
    """Largest difference, on the scale of [-1, 1], of onnxruntime's output from PyTorch's on a CPU.
    Batches are of 1, 2 and 64, with every label; of text, which takes more memory, of 1 and 2."""
    session, _ = onnx_session(path, device, **dict(use_tf32=0) if device == "cuda" else {})
    labels, worst = torch.arange(exported.count + -exported.count % 64) % exported.count, 0.0
    for label in (labels[:1], labels[1:3], *(labels.split(64) if not exported.prompts else ())):
        inputs = exported.example(label)
        found, = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        expected = exported(*inputs.values()).numpy()
        assert found.shape == expected.shape and found.dtype == expected.dtype
        worst = np.maximum(worst, np.abs(np.subtract(found, expected, dtype=float)).max())  # or NaN
    return worst / 127.5 if exported.uint8 else worst


def quantise(model, exported, facts, path, data):
    """Put in the place of an ONNX file its model with convolutions and linear layers in static int8
    (QDQ, weights per channel), calibrated on noise. Both make images of the same noise: ValueError
    if these are worse than INT8_WORSE. Returns what to tell the user."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    reference, cpu = load_reference(data), torch.device("cpu")
    before = measure(onnx_sampler(path, cpu), reference, INT8_N, 0)
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})  # no advice
    inputs = (exported.example(torch.arange(64) % exported.count, seed) for seed in range(1, 5))
    feeds = ({name: value.numpy() for name, value in feed.items()} for feed in inputs)
    quantize_static(model, path, types.SimpleNamespace(get_next=lambda: next(feeds, None)),
                    op_types_to_quantize=["Conv", "Gemm"], per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    store(onnx.load(path), dict(facts, arithmetic="int8"), path)
    after = measure(onnx_sampler(path, cpu), reference, INT8_N, 0)
    told = "int8 of float32: " + ", ".join(f"{TITLES[name]} {after[name]:.4f} of {before[name]:.4f}"
                                           for name in ("frechet_distance", "accuracy"))
    if not (after["frechet_distance"] <= INT8_WORSE[0] * before["frechet_distance"]
            and after["accuracy"] >= before["accuracy"] - INT8_WORSE[1]):
        raise ValueError(f"{told}; no file was written")
    return told


@torch.no_grad()
def benchmark(files, exported, checkpoint, device):
    """Print medians of the generator by PyTorch, by onnxruntime, of ONNX files by name, and by
    OpenVINO; and of the teacher's sampler, by the generator's network, which is of its size."""
    from torch.utils.benchmark import Timer
    print(f"{device_name(device)}, torch {torch.__version__}; medians of calls that take turns\n"
          f"{'batch':>5}  {'':22} {'ms':>9} {'images/s':>10} {'x teacher':>10}")
    compiled = torch.compile(exported.to(device), dynamic=False)
    teacher = make_sampler(exported.denoiser, dict(checkpoint, kind="teacher"), device)
    hosts = {name: functools.partial(onnx_session(content, device.type)[0].run, None)
             for name, content in files.items()}
    if device.type == "cpu" and importlib.util.find_spec("openvino"):
        from openvino import Core
        hints = dict(INFERENCE_PRECISION_HINT="f32", INFERENCE_NUM_THREADS=torch.get_num_threads())
        hosts["OpenVINO"] = Core().compile_model(files["onnxruntime"], "CPU", hints, weights=b"")
    for batch in BATCHES:
        inputs = exported.example(torch.arange(batch) % exported.count)
        noise, label = (value.to(device) for value in inputs.values())
        noises = noise.view(-1, batch, *teacher.shape)
        feed = {name: value.numpy() for name, value in inputs.items()}
        calls = {
            teacher.name: lambda: teacher.decode(teacher.x0(iter(noises), label)),
            "PyTorch": lambda: exported(noise, label),
            "torch.compile": lambda: compiled(noise, label),
            **{name: functools.partial(run, feed) for name, run in hosts.items()}}
        timers = [Timer("call()", globals=dict(call=call), num_threads=torch.get_num_threads())
                  for call in calls.values()]
        found = np.median([[timer.blocked_autorange(min_run_time=0.4).median for timer in timers]
                           for _ in range(5)], axis=0)  # by turns, as a machine's speed drifts
        for name, seconds in zip(calls, found):
            print(f"{batch:5}  {name:22} {1000 * seconds:9.2f} {batch / seconds:10.0f} "
                  f"{found[0] / seconds:10.1f}", flush=True)


def main(argv=None):
    cfg = parse(Config, argv, __doc__)
    device = pick_device(cfg.device)
    checkpoint = open_checkpoint(cfg.checkpoint, data_dir=cfg.data_dir)
    data, pipeline = checkpoint["data"], "pipeline" in checkpoint["network"]
    teacher = checkpoint["kind"] == "teacher"
    if pipeline and teacher:
        raise ValueError(f"{cfg.checkpoint}: is a pipeline; export what dmd2.py makes of it")
    if cfg.uint8 and teacher or cfg.int8 and cfg.fp16 or (cfg.int8 or cfg.benchmark) and (
            pipeline or teacher):
        raise ValueError("--uint8, --int8, --benchmark: are not for teachers, nor the last two for "
                         "text; --int8 not with --fp16")
    tolerance = 1e-2 if cfg.fp16 else 1e-4 if device.type == "cuda" else 1e-5
    tolerance *= 2 if checkpoint["autoencoder"] else 1  # two networks, one after the other
    tolerance += cfg.uint8 / 127.5  # a level: it may be rounded the other way
    data["classes"] = data["classes"][:3 if pipeline else None]  # of text, 3 of all prompts
    if teacher:
        checkpoint["sigmas"] = sampling_sigmas(HEUN_STEPS, checkpoint["schedule"])[:-1]
        # In x0_hat the errors of a network of eps are multiplied by sigma.
        tolerance *= checkpoint["sigmas"][0] if checkpoint["prediction"] == "eps" else 1
    ending = "_pixels" * cfg.uint8 + "_fp16" * cfg.fp16 + "_int8" * cfg.int8 + ".onnx"
    path = Path(cfg.out or str(Path(cfg.checkpoint).with_suffix("")) + ending)
    exported = (ExportedTeacher if teacher else Exported)(checkpoint, cfg.uint8)
    origin = "kind", "schedule", "sigmas", "figures", "teacher_figures"
    facts = {name: checkpoint.get(name) for name in origin} | dict(
        steps=len(checkpoint["sigmas"]), labels=exported.count, training_step=checkpoint["step"],
        arithmetic="float16" if cfg.fp16 else "float32", version=__version__,
        checkpoint_sha256=digest_of(cfg.checkpoint), data=dict(
            name=data["name"] and Path(data["name"]).name,  # of a folder, not where it lies
            size=data["shape"][-1], shape=data["shape"], classes=data["classes"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        file = Path(folder, path.name)
        model = export_onnx(halve(type(exported)(checkpoint, cfg.uint8)) if cfg.fp16 else exported)
        store(model, facts, file)
        error = check_onnx(file, exported, device.type)
        told = f"differs from PyTorch by {error:.1e}, allowed are {tolerance:.0e}"
        if not error <= tolerance:
            raise ValueError(f"{path}: {told}; no file was written")
        files = {"onnxruntime": file.read_bytes()} if cfg.benchmark else {}
        if cfg.int8:
            told = quantise(model, exported, facts, file, data)
            files["onnxruntime, int8"] = file.read_bytes()
        written = [part.replace(path.with_name(part.name)) for part in [*Path(folder).iterdir()]]
    print(f"{path}: {sum(part.stat().st_size for part in written) / 1e6:.2f} MB; {told}"
          + f"; its weights are in {path.name}.data" * (len(written) > 2)
          + f"\nnext: python sample.py {path}" * (not teacher and not pipeline))
    if cfg.benchmark:
        benchmark(files, exported, checkpoint, device)


if __name__ == "__main__":
    run_script(main)
