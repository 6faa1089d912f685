"""Distil a teacher into a one-step generator by distribution matching (DMD2).

    python dmd2.py --teacher runs/teacher/teacher.pt

Two copies of the teacher are trained. One is the generator, which maps noise to an image in one
step. The other is the fake score: as the teacher is a denoiser of the real images, it is kept a
denoiser of the generator's. Where the two denoisers disagree about one of its images, the
generator is moved towards the teacher's estimate (Yin et al., "One-step Diffusion with Distribution
Matching Distillation", 2023: DMD; "Improved Distribution Matching Distillation for Fast Image
Synthesis", 2024: DMD2). In reading order: options, the distribution-matching loss, pictures, what
happens between steps, training.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path

import torch

from sample import (EVALUATE_AT_LEAST, TITLES, few_step, generator_sampler, load_reference, measure,
                    summary, teacher_sampler)
from teacher import (GENERATOR, SIGMA_MAX, Draw, Log, TrainingOptions, arg, build, denoising_loss,
                     descend, due, filled, frozen, load, make_run_folder, parse, pick_device,
                     plot_log, prepare, restore, run_script, save, save_grid, sigma_at, to_uint8,
                     unit_noise, update_ema, warmed_up)

# What of dmd2.py depends on the data: it fills the options that were not given.
RECIPES = {
    "digits": dict(batch=128, steps=1200, lr=4e-4, fake_lr=1e-3, fake_steps=2, ema=0.99),
    "mnist": dict(batch=256, steps=20000, lr=2e-4, fake_lr=4e-4, fake_steps=2, ema=0.999),
    "cifar10": dict(batch=256, steps=100000, lr=5e-5, fake_lr=1e-4, fake_steps=5, ema=0.999),
    "folder": dict(batch=64, steps=20000, lr=5e-5, fake_lr=1e-4, fake_steps=5, ema=0.999),
}
RECIPES["fashion"] = RECIPES["mnist"]

# Other noise than `sample.py --evaluate` takes by default, for the best generator is chosen by it.
EVALUATION_SEED = 1_000_000


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions):
    """Options of dmd2.py; those left at None take their values from RECIPES."""

    teacher: str = arg(None, "checkpoint of teacher.py to distil", free=True)
    out: str = arg("runs/dmd2", "folder of the run", free=True)
    fake_steps: int = arg(None, "updates of the fake score per update of the generator: the two "
                                "time-scale rule (default: by data)", at_least=1)
    lr: float = arg(None, "learning rate of the generator (default: by data)", at_least=0, below=1)
    fake_lr: float = arg(None, "learning rate of the fake score (default: by data)", at_least=0,
                         below=1)
    evaluate_every: int = arg(200, "steps between evaluations, the best of which is kept; 0 for "
                                   "none, which needs no data", at_least=0)
    evaluate_n: int = arg(2000, "images per evaluation", at_least=EVALUATE_AT_LEAST)

    def __post_init__(self):
        super().__post_init__()
        if self.teacher is None:
            raise ValueError("--teacher is missing: give a checkpoint of teacher.py, such as "
                             "runs/teacher/teacher.pt")


# ---- distribution matching ----------------------------------------------------------------------

@torch.no_grad()
def dmd_gradient(teacher, fake_score, x0, sigma, label, noise):
    """Direction that lowers KL(generator || teacher) when subtracted from x0 (DMD's gradient).

        gradient = (fake_score(x) - teacher(x)) / mean|x0 - teacher(x)|,   x = x0 + sigma * noise

    x0, noise  [B, C, H, W]  the generator's images, whose graph is not used; standard normal
    sigma      [B]           one level per image, in [SIGMA_MIN, SIGMA_MAX]
    label      [B]           the classes x0 was generated for, int64
    returns [B, C, H, W], of order 1 per image; exactly 0 where fake_score equals teacher

    A value that is not finite is left so: Log stops the run at it.
    """
    x = x0 + sigma.view(-1, 1, 1, 1) * noise
    real, fake = teacher(x, sigma, label), fake_score(x, sigma, label)
    scale = (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return (fake - real) / scale.clamp(min=1e-6)  # 0 if the teacher leaves x0 as it is


def dmd_loss(teacher, fake_score, x0, sigma, label, noise):
    """Loss whose gradient in x0 is dmd_gradient / x0.numel(); its value says nothing of quality."""
    gradient = dmd_gradient(teacher, fake_score, x0, sigma, label, noise)
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()


# ---- pictures -----------------------------------------------------------------------------------

@torch.no_grad()
def save_estimates(teacher, fake_score, generator, sigmas, data, path, columns=10):
    """The generator's images, the same with noise, and what teacher and fake score make of that."""
    device = next(generator.parameters()).device
    noise = unit_noise(2 * columns, data["shape"], 0).to(device)
    label = torch.arange(columns, device=device) % len(data["classes"])
    sigma = sigma_at(torch.linspace(0.15, 0.75, columns, device=device), "karras")
    x0 = few_step(generator, sigmas[0] * noise[:columns], sigmas, label)
    x = x0 + sigma.view(-1, 1, 1, 1) * noise[columns:]
    rows = torch.stack([x0, x, teacher(x, sigma, label), fake_score(x, sigma, label)])
    names = ["generated x0", "x0 + sigma noise = x", "teacher(x)", "fake score(x)"]
    save_grid(to_uint8(rows), names, path, titles=[f"{s:.2g}" for s in sigma.tolist()])


# ---- what happens between the steps -------------------------------------------------------------

class Keeper:
    """Evaluates, pictures, saves and resumes a run; generator.pt is the best of its EMA generators.

    networks holds what a resumed run needs besides the EMA: networks and optimizers by name.
    """

    def __init__(self, cfg, parent, teacher, ema, sigmas, networks):
        self.cfg, self.parent, self.teacher, self.ema = cfg, parent, teacher, ema
        self.sigmas, self.networks, self.out = sigmas, networks, Path(cfg.out)
        self.device = next(teacher.parameters()).device
        self.teacher_sha256 = hashlib.sha256(Path(cfg.teacher).read_bytes()).hexdigest()
        self.figures = self.best = self.teacher_figures = self.reference = None
        self.start = self.resume() if cfg.resume else 0
        data = parent["data"]
        if cfg.evaluate_every:
            self.reference = load_reference(data["name"], cfg.data_dir or data["data_dir"],
                                            data["size"], self.device)
            self.teacher_figures = self.measure(teacher_sampler(teacher, data, self.device))

    def measure(self, sampler):
        """evaluate() at this run's number of samples, and what they were compared with."""
        n = self.cfg.evaluate_n
        return dict(measure(sampler, self.reference, n, EVALUATION_SEED),
                    protocol=f"{n} samples, {self.reference.protocol}")

    def resume(self):
        """Restore networks and optimizers from --resume; returns the step to go on at."""
        checkpoint = load(self.cfg.resume, resume=True)
        if checkpoint.get("teacher_sha256") != self.teacher_sha256:
            raise ValueError(f"--teacher {self.cfg.teacher}: not the one that the run in "
                             f"{self.cfg.resume} began with")
        restore(dict(self.networks, ema=self.ema),
                dict(checkpoint["training"], ema=checkpoint["model"]), self.cfg.resume)
        self.best = checkpoint.get("best")
        return checkpoint["step"]

    def begin(self, log):
        """Tell the teacher's figures, which the generator's are to be compared with."""
        if self.reference and self.start == 0:
            log.write(0, **{f"teacher_{name}": self.teacher_figures[name] for name in TITLES})
            log.say(f"teacher: {summary(self.teacher_figures)}")

    def after(self, step, log):
        """Do whatever is due after a step, counted from 0."""
        cfg, data = self.cfg, self.parent["data"]
        if due(step, cfg.evaluate_every, cfg.steps):
            log.check()
            sampler = generator_sampler(self.ema, self.sigmas, data, self.device)
            self.figures = dict(self.measure(sampler), step=step + 1)
            log.write(step + 1, **{name: self.figures[name] for name in TITLES})
            log.say(f"step {step + 1}: {summary(self.figures)}")
            if not self.best or self.figures["frechet_distance"] < self.best["frechet_distance"]:
                self.best = self.figures
                save(self.checkpoint(step + 1), self.out / "generator.pt")
        if due(step, cfg.sample_every, cfg.steps):
            save_estimates(self.teacher, self.networks["fake_score"], self.ema, self.sigmas, data,
                           self.out / f"samples_{step + 1:06d}.png")
        if due(step, cfg.save_every, cfg.steps):
            log.check()
            plot_log(log.path)
            if not cfg.evaluate_every:
                save(self.checkpoint(step + 1), self.out / "generator.pt")
            training = {name: network.state_dict() for name, network in self.networks.items()}
            save(dict(self.checkpoint(step + 1), training=training), self.out / "last.pt")

    def checkpoint(self, step):
        """The EMA generator, its figures if this step was evaluated, and where it comes from."""
        inherited = {name: self.parent[name] for name in ("network", "prediction", "data")}
        evaluated = self.figures is not None and self.figures["step"] == step
        return dict(inherited, kind="generator", step=step, config=dataclasses.asdict(self.cfg),
                    sigmas=self.sigmas, figures=self.figures if evaluated else None,
                    best=self.best, teacher_figures=self.teacher_figures,
                    teacher_sha256=self.teacher_sha256, model=self.ema.state_dict())

    def end(self):
        """Say which file holds what, and which step its figures are of."""
        if self.best:
            for name, title, figures in (("generator.pt", "best", self.best),
                                         ("last.pt", "last", self.figures)):
                print(f"{self.out / name}: the {title}, step {figures['step']}: {summary(figures)}")


# ---- training -----------------------------------------------------------------------------------

def train(cfg):
    """Distil; returns the path of the generator's checkpoint."""
    device, parent = pick_device(cfg.device), load(cfg.teacher)
    if parent["kind"] != "teacher":
        raise ValueError(f"--teacher {cfg.teacher}: holds a {parent['kind']}; give a checkpoint of "
                         "teacher.py")
    cfg = filled(cfg, RECIPES, parent["data"]["name"])
    cfg = dataclasses.replace(cfg, teacher=str(Path(cfg.teacher).resolve()))
    num_classes, shape = len(parent["data"]["classes"]), parent["data"]["shape"]
    sigmas = [SIGMA_MAX]
    teacher = build(parent, device)
    generator, fake_score = (build(parent, device).requires_grad_(True) for _ in range(2))
    ema = frozen(generator)
    adamw = functools.partial(torch.optim.AdamW, weight_decay=0.01, fused=device.type != "mps")
    generator_optimizer = adamw(generator.parameters())
    fake_optimizer = adamw(fake_score.parameters())
    keeper = Keeper(cfg, parent, teacher, ema, sigmas, dict(
        generator=generator, fake_score=fake_score, generator_optimizer=generator_optimizer,
        fake_optimizer=fake_optimizer))
    prepare(cfg, device, teacher, generator, fake_score)  # not ema: evaluated in float32
    make_run_folder(cfg)
    log = Log(cfg, keeper.start)
    keeper.begin(log)

    for step in range(keeper.start, cfg.steps):
        draw = Draw(GENERATOR, cfg.seed, step, cfg.batch, shape, device)
        label = draw.label(num_classes)
        update, rest = divmod(step, cfg.fake_steps)
        update_generator = rest == 0  # DMD2's two time-scale update rule
        with torch.set_grad_enabled(update_generator):
            x0 = few_step(generator, sigmas[0] * draw.normal(), sigmas, label)

        # Generator: move its samples along the distribution-matching gradient.
        if update_generator:
            sigma = sigma_at(draw.uniform(0.02, 0.98), "karras")
            loss, norm = descend(
                dmd_loss(teacher, fake_score, x0, sigma, label, draw.normal()),
                generator_optimizer, cfg.clip, warmed_up(cfg.lr, update, cfg.warmup))
            update_ema(ema, generator, cfg.ema, update)
            log.note(dmd_loss=loss, generator_gradient_norm=norm)

        # Fake score: the teacher's own loss, on the generator's samples, at every step.
        sigma = sigma_at(draw.uniform(), "karras")
        loss, norm = descend(
            denoising_loss(fake_score, x0.detach(), sigma, label, draw.normal()),
            fake_optimizer, cfg.clip, warmed_up(cfg.fake_lr, step, cfg.warmup))
        log.note(fake_loss=loss, fake_gradient_norm=norm)

        log.step(step + 1)
        keeper.after(step, log)
    log.close()
    keeper.end()
    return keeper.out / "generator.pt"


def main(argv=None):
    path = train(parse(Config, argv, __doc__))
    print(f"next: python sample.py {path}   or   python export.py {path}")


if __name__ == "__main__":
    run_script(main)
