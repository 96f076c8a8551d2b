"""How fast is a training step, beside the usual one and beside what the machine can multiply?

    python benchmarks/step.py [--sizes 32 64] [--batch 64] [--threads N] [--picture step.png]

Measured in one run, in turn: the step of the usual DCGAN tutorials (float32, N x C x H x W in
memory, a discriminator that is not frozen while the generator learns); the same with each switch
of ours alone; and ours, as it ships. Then each convolution alone, torch's and ours, beside the
rate of a matrix product of 2,048 in the same run (8,192 on a GPU, which is taken where there is
one). Freed memory is kept for all of them alike (see `gan_lib.base.memory`).

A figure is the fastest of a few steps in each round, and the median of the rounds: other work on
the machine makes single steps slower, never faster. With --threads 1 on a CPU, seconds are those
in which the process had a core: busy machines give nearly the figures of idle ones.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

os.environ["GAN_LIB_HEADLESS"] = "1"

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from gan_lib.base.memory import keep_freed_memory
from gan_lib.data.batches import Batch
from gan_lib.gan.models import discriminator_of, generator_of
from gan_lib.gan.steps import autocast
from gan_lib.parameters import TrainingParameters
from gan_lib.training.networks import Training
from gan_lib.training.ranks import Ranks, pick_device, speed_of_bfloat16

# Width of both networks at each size: what the profiles train with.
WIDTHS = {16: 16, 32: 32, 64: 64, 128: 64}
# Steps of one variant before it is another's turn; a GPU, which takes a fraction of the time and
# is told of the next step while it does this one, does so many more of them for each.
STEPS_IN_TURN, MORE_ON_A_GPU = 4, 20
SIDES = {"cpu": 2048, "cuda": 8192}  # of the matrices

Step = Callable[[Tensor], Any]


def tutorial_step(
    p: TrainingParameters,
    device: torch.device,
    *,
    frozen: bool = False,
    channels_last: bool = False,
    precision: str = "float32",
    fused: bool = False,
    products: bool = False,
    compiled: bool = False,
) -> Step:
    """The step of Radford et al. 2016 as tutorials write it, or with one switch set otherwise."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    g, d = (make(p).to(device, memory_format=layout) for make in (generator_of, discriminator_of))
    if not products:
        as_torch_does(g)
        as_torch_does(d)
    adam = {"lr": 2e-4, "betas": (0.5, 0.999), "fused": fused or None}
    optimizer_g = torch.optim.Adam(g.parameters(), **adam)
    optimizer_d = torch.optim.Adam(d.parameters(), **adam)
    run_g, run_d = (torch.compile(m) if compiled else m for m in (g, d))

    def loss_of(images: Tensor, label: float) -> Tensor:
        with autocast(device, precision):
            scores = run_d(images)
        return binary_cross_entropy_with_logits(
            scores.float(), torch.full_like(scores, label, dtype=torch.float32)
        )

    def step(real: Tensor) -> tuple[float, float]:
        real = real.contiguous(memory_format=layout)
        if frozen:
            d.requires_grad_(True)
        optimizer_d.zero_grad()
        loss_real = loss_of(real, 1.0)
        loss_real.backward()
        with autocast(device, precision):
            fake = run_g(torch.randn(len(real), p.nz, device=device))
        loss_fake = loss_of(fake.detach(), 0.0)
        loss_fake.backward()
        optimizer_d.step()
        if frozen:
            d.requires_grad_(False)
        optimizer_g.zero_grad()
        loss_g = loss_of(fake, 1.0)
        loss_g.backward()
        optimizer_g.step()
        return (loss_real + loss_fake).item(), loss_g.item()

    return step


def as_torch_does(network: nn.Module) -> None:
    """Without what `gan_lib.gan.convolutions` adds."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
        elif isinstance(module, nn.ConvTranspose2d):
            module.__class__ = nn.ConvTranspose2d


def our_step(p: TrainingParameters, device: torch.device, compiled: bool = False) -> Step:
    """The step of `gan_lib`, as `train_gan` takes it."""
    training = Training(p, Ranks(), device)
    if compiled:
        training.compile()

    def step(real: Tensor) -> Any:
        labels = torch.zeros(len(real), dtype=torch.int64, device=device)
        return training.step(Batch(real, labels, slice(0, len(real)), len(real), 1.0))

    return step


def variants(
    p: TrainingParameters, device: torch.device, compiled: bool
) -> dict[str, Callable[[], Step]]:
    """By its name, how each step is made."""
    fast = "bfloat16" if speed_of_bfloat16(device) == "faster" else "float32"
    switches: dict[str, dict[str, Any]] = {
        "the usual step": {},
        "D frozen": {"frozen": True},
        "channels_last": {"channels_last": True},
        "fused Adam": {"fused": True},
        "channels_last, products": {"products": True, "channels_last": True},
    }
    if fast != "float32":
        switches["bfloat16"] = {"precision": fast}
    if compiled:
        switches["compiled"] = {"compiled": True}

    def usual(told: dict[str, Any]) -> Callable[[], Step]:
        return lambda: tutorial_step(p, device, **told)

    def ours(precision: str, compiled: bool = False) -> Callable[[], Step]:
        return lambda: our_step(p.replace(precision=precision), device, compiled)

    made = {name: usual(told) for name, told in switches.items()}
    made |= {f"ours, {name}": ours(name) for name in dict.fromkeys(("float32", fast))}
    return made | ({f"ours, {fast}, compiled": ours(fast, True)} if compiled else {})


def cudnn(name: str) -> AbstractContextManager[None]:
    """As torch has it, but for ours, which can be repeated."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=name.startswith("ours"))


def seconds_of(step: Callable[[], Any], device: torch.device, n: int = STEPS_IN_TURN) -> float:
    """The fastest of `n` calls; on a GPU, of `n` rows of calls, for each."""
    found, in_a_row = [], MORE_ON_A_GPU if device.type == "cuda" else 1
    # What one thread is busy for is its own, whatever else the machine does meanwhile.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    for _ in range(n):
        wait(device)
        began = clock()
        for _ in range(in_a_row):
            step()
        wait(device)
        found.append((clock() - began) / in_a_row)
    return min(found)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a matrix product, a multiplication and an addition being two."""
    side = SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds_of(lambda: a @ b, device, 10)


def layers(
    p: TrainingParameters, device: torch.device
) -> list[tuple[str, nn.Module, Tensor, list[tuple[bool, bool]]]]:
    """Each convolution of both networks: its name, itself, its input, and its turns in a step.

    A turn says of what a gradient is needed: (the input, the weights).
    """
    found: list[tuple[str, nn.Module, Tensor, list[tuple[bool, bool]]]] = []

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs.append((module, given[0].detach()))

    image = torch.rand(p.batch_size, p.channels, p.image_size, p.image_size)
    for name, network, x in (
        ("G", generator_of(p), torch.randn(p.batch_size, p.nz)),
        ("D", discriminator_of(p), image.contiguous(memory_format=torch.channels_last)),
    ):
        inputs: list[tuple[nn.Module, Tensor]] = []
        network = network.to(device, memory_format=torch.channels_last)
        convolutions = [
            m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
        ]
        hooks = [module.register_forward_pre_hook(note) for module in convolutions]
        network(x.to(device))
        for hook in hooks:
            hook.remove()
        for i, (module, given) in enumerate(inputs, 1):
            # D looks at real images, at generated ones, and frozen at generated ones; of the
            # first layers' inputs, only what the generator learns from has a gradient.
            turns = [(i > 1, True)] if name == "G" else [(i > 1, True)] * 2 + [(True, False)]
            found.append((f"{name} {i}", module, given, turns))
    return found


def operations(module: nn.Module, x: Tensor, turns: list[tuple[bool, bool]]) -> float:
    """Of a layer in one step: forward, and each gradient, are as much work again."""
    y = module(x)
    small = x if isinstance(module, nn.ConvTranspose2d) else y
    once = 2 * module.weight.numel() * small.shape[0] * small.shape[2] * small.shape[3]
    return float(once * sum(1 + of_input + of_weights for of_input, of_weights in turns))


def seconds_of_layer(
    call: Callable[[Tensor, Tensor], Tensor],
    module: nn.Module,
    x: Tensor,
    turns: list[tuple[bool, bool]],
    precision: str,
) -> float:
    """What a layer takes in one step, alone."""
    total = 0.0
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for turn in set(turns):
        given = x.to(dtype).requires_grad_(turn[0])
        weight = module.weight.detach().to(dtype).requires_grad_(turn[1])
        wanted = [t for t, needed in zip((given, weight), turn, strict=True) if needed]
        gradient = torch.randn_like(call(given, weight))

        def once(given: Any, weight: Any, wanted: Any, gradient: Any) -> None:
            torch.autograd.grad(call(given, weight), wanted, gradient)

        told = given, weight, wanted, gradient
        total += turns.count(turn) * seconds_of(partial(once, *told), x.device, 8)
    return total


def plain(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer's convolution as torch offers it."""
    f = torch.conv_transpose2d if isinstance(module, nn.ConvTranspose2d) else torch.conv2d
    return lambda x, w: f(x, w, stride=module.stride, padding=module.padding)


def as_ours(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A layer as it ships."""
    return lambda x, w: torch.func.functional_call(module, {"weight": w}, (x,))


def by_layer(p: TrainingParameters, device: torch.device, precision: str, step: float) -> None:
    """Print what each convolution reaches of the machine's rate, and what it is of the step."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    rate = matrix_rate(dtype, device)
    size = f"{p.image_size} x {p.image_size}"
    print(f"\n{size} in {precision}, a matrix product: {rate / 1e9:,.0f} GFLOP/s\n")

    def row(name: str, weights: str, work: float, seconds: float) -> list[str]:
        told = f"{work / 1e9:.2f}", f"{seconds * 1e3:.2f}", f"{work / seconds / rate:.2f}"
        return [name, weights, *told]

    rows, total, ours, work = [], 0.0, 0.0, 0.0
    for name, module, x, turns in layers(p, device):
        n = operations(module, x, turns)
        alone = seconds_of_layer(plain(module), module, x, turns, precision)
        its = seconds_of_layer(as_ours(module), module, x, turns, precision)
        weights = " x ".join(map(str, module.weight.shape))
        rows.append(row(name, weights, n, alone) + row("", "", n, its)[3:])
        total, ours, work = total + alone, ours + its, work + n
    rows += [row("all", "", work, total) + row("", "", work, ours)[3:]]
    rows += [["the step", "", "", "", "", *row("", "", work, step)[3:]]]
    titles = ["layer", "weights", "GFLOP", "torch's, ms", "of the rate", "ours, ms", "of the rate"]
    print_table(titles, rows)


def measure(
    p: TrainingParameters, device: torch.device, rounds: int, compiled: bool
) -> dict[str, list[float]]:
    """Seconds of a step of each variant, in each round."""
    real = torch.rand(p.batch_size, p.channels, p.image_size, p.image_size, device=device) * 2 - 1
    real = real.contiguous(memory_format=torch.channels_last)
    found: dict[str, list[float]] = {}
    steps: dict[str, Step] = {}
    made = variants(p, device, compiled)
    # From the last to the first: ours, compiled, throws away what was compiled before.
    for name, make in reversed(made.items()):
        try:
            with cudnn(name):
                steps[name] = make()
                # Memory is allocated, convolutions are chosen, and what is to be is compiled.
                seconds_of(partial(steps[name], real), device)
        except Exception as error:  # of a compiler, say: the others are worth measuring
            steps.pop(name, None)
            print(f"{name} fails: {type(error).__name__}: {error}")
    for _ in range(rounds):
        for name in made:
            if name in steps:
                with cudnn(name):
                    seconds = seconds_of(partial(steps[name], real), device)
                found.setdefault(name, []).append(seconds)
    return found


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    """As Markdown."""
    for row in (titles, ["---"] * len(titles), *rows):
        print(f"| {' | '.join(row)} |")


def draw(by_size: dict[int, dict[str, float]], path: str) -> None:
    """Bars of images per second, a panel for each size."""
    figure, panels = plt.subplots(
        1, len(by_size), figsize=(5.5 * len(by_size), 3.2), squeeze=False, layout="constrained"
    )
    for axes, (size, rates) in zip(panels[0], by_size.items(), strict=True):
        colours = ["tab:orange" if name.startswith("ours") else "tab:blue" for name in rates]
        bars = axes.barh(list(rates), list(rates.values()), color=colours)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(title=f"{size} x {size}", xlabel="images per second")
    figure.savefig(path, dpi=120)
    print(path)


def machine(device: torch.device) -> str:
    """What was measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], choices=list(WIDTHS))
    parser.add_argument("--batch", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of a CPU; by default one for each core")
    parser.add_argument("--compiled", action="store_true", help="also compiled: takes minutes")
    parser.add_argument("--no-layers", action="store_true", help="no table by layer")
    parser.add_argument("--picture", help="draw bars into this file")
    told = parser.parse_args()
    if told.threads:
        torch.set_num_threads(told.threads)
    device = pick_device()
    keep_freed_memory()
    if device.type == "cuda":
        # As cuDNN's convolutions have it unless one forbids it: a ceiling of the same kind.
        torch.set_float32_matmul_precision("high")
    print(f"{machine(device)}, torch {torch.__version__}, Python {platform.python_version()}")
    pictured: dict[int, dict[str, float]] = {}
    for size in told.sizes:
        for batch in told.batch:
            width = WIDTHS[size]
            p = TrainingParameters(image_size=size, ngf=width, ndf=width, batch_size=batch)
            found = measure(p, device, told.rounds, told.compiled)
            base = found["the usual step"]
            print(f"\n{size} x {size}, ngf = ndf = {width}, batches of {batch}\n")
            rows, rates = [], {}
            for name, seconds in found.items():
                ratios = [b / s for b, s in zip(base, seconds, strict=True)]
                rates[name] = batch / statistics.median(seconds)
                rows.append([name, f"{rates[name]:,.0f}", f"{statistics.median(ratios):.2f}"])
            print_table(["step", "images/s", "ratio"], rows)
            pictured.setdefault(size, rates)
            for name, seconds in found.items():
                if name.startswith("ours") and "compiled" not in name and not told.no_layers:
                    by_layer(p, device, name.split(", ")[1], min(seconds))
    if told.picture:
        draw(pictured, told.picture)


if __name__ == "__main__":
    main()
