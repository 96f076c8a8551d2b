"""Images of a trained generator by seed, and the generator itself, drawn with without gan_lib."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from playwright.sync_api import Locator, sync_playwright
from safetensors.torch import load_file
from test_core_install import site_with

from gan_lib.__main__ import main
from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import ParameterError
from gan_lib.base.storage import whole_folder
from gan_lib.cli.generator_commands import parse_seeds
from gan_lib.data.image_set import ImageSet
from gan_lib.gan.drawing import draw_seeds, latent_of_seed, render, walk
from gan_lib.gan.models import Block, Generator, generator_of
from gan_lib.parameters import TrainingParameters
from gan_lib.results.exporting import onnx_bytes
from gan_lib.results.pictures import cut_apart, read_png
from gan_lib.results.run import open_run
from gan_lib.training.rank import train_gan

CLASSES = {"beagle": 48, "Shih-Tzu": 48}
# Runs a script with nothing installed but what lies in a folder: neither this package nor others.
ALONE = """
import importlib.util, runpy, sys
site, without, script, *arguments = sys.argv[1:]
sys.path.append(site)
for name in ("gan_lib", *without.split(",")):
    assert importlib.util.find_spec(name) is None, name
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module", params=["plain", "conditional"])
def run(
    request: pytest.FixtureRequest,
    tiny: TrainingParameters,
    silhouettes: ImageSet,
    tmp_path_factory: pytest.TempPathFactory,
) -> str:
    """A run whose best epoch is not its last, once with a moving average and once with classes."""
    place = str(tmp_path_factory.mktemp(request.param) / "run")
    told = tiny.replace(
        quality_every=2, quality_images=40, keep_checkpoints=0, lr_g=0.02, lr_d=0.002
    )
    images = silhouettes
    if request.param == "plain":
        told = told.replace(ema_images=100, blocks=1)
    else:
        told = told.replace(conditional=True, pixel_mean=0.4, pixel_std=0.6, channels=3)
        labels = np.arange(len(images)) % 2
        pixels = np.repeat(np.asarray(images.pixels), 3, axis=-1)
        images = replace(images, labels=labels, classes=tuple(CLASSES), pixels=pixels)
    train_gan(told, run=place, images=images, progress=False)
    return place


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: read_png(path.read_bytes()) for path in sorted(folder.glob("seed_*.png"))}


def test_a_seed_is_the_same_image_whatever_else_is_asked_for(run: str, tmp_path: Path) -> None:
    many, few = tmp_path / "many", tmp_path / "new/few"
    assert main(["generate", run, "--seeds", "0-11", "--out", str(many), "--walk", "3"]) == 0
    assert main(["generate", run, "--seeds", "20,7,0", "--epoch", "best", "--out", str(few)]) == 0
    found, again = pictures(many), pictures(few)
    assert list(found) == [f"seed_{seed:04d}.png" for seed in range(12)]
    assert list(again) == ["seed_0000.png", "seed_0007.png", "seed_0020.png"]
    for name in ("seed_0000.png", "seed_0007.png"):
        np.testing.assert_array_equal(found[name], again[name])
    # Of the best epoch, and not of the last.
    best = open_run(run).generator("best")
    np.testing.assert_array_equal(found["seed_0007.png"], next(draw_seeds(best, [7])))
    assert len({image.tobytes() for image in found.values()}) == 12
    grid = cut_apart(read_png((many / "grid.png").read_bytes()), 16)
    np.testing.assert_array_equal(grid[:12], np.stack([*found.values()]))
    with Image.open(many / "walk.gif", formats=("GIF",)) as walk:
        assert walk.n_frames == 12 * 3
        assert walk.size == (256, 256)
    assert not list(tmp_path.rglob("*.part"))


def test_a_class_is_drawn_alone(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["generate", run, "--seeds", "0-3", "--out", str(out), "--of", "tzu"]
    if not open_run(run).parameters.conditional:
        assert main(words) == 2
        assert "knows no classes" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
        return
    assert main(words) == 0
    generator = open_run(run).generator("best")
    for seed, image in enumerate(pictures(out).values()):
        z, _ = latent_of_seed(generator, seed)
        expected = render(generator, z, torch.tensor([1]))[0]
        # Which is not in double precision.
        assert np.abs(image.astype(int) - expected).max() <= 1
    # Without a class, both are drawn.
    drawn = [int(label) for s in range(9) if (label := latent_of_seed(generator, s)[1]) is not None]
    assert set(drawn) == {0, 1}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [None, CLASSES])
@pytest.mark.parametrize(("image_size", "blocks"), [(16, 0), (64, 0), (16, 2)])
def test_onnx_is_what_torch_is(
    image_size: int, blocks: int, classes: dict[str, int], channels: int
) -> None:
    torch.manual_seed(0)
    generator = Generator(image_size, channels, nz=10, ngf=4, classes=classes, blocks=blocks)
    with torch.no_grad():
        # As after a training: statistics of its own, classes that differ, and strong contrasts.
        torch.nn.init.normal_(generator.layers[-2].weight, 0, 0.5)
        for name, value in generator.named_parameters():
            value.mul_(10 if "own" in name else 1)
        for layer in generator.layers:
            if isinstance(layer, Block):  # which begins as nothing
                torch.nn.init.ones_(getattr(layer.norm, "norm", layer.norm).weight)
        for module in generator.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        generator(torch.randn(32, 10), None if classes is None else torch.arange(32) % 2)
    generator.eval()
    session = onnxruntime.InferenceSession(onnx_bytes(generator))
    for n in (1, 7):
        z = torch.randn(n, 10)
        labels = None if classes is None else torch.arange(n) % 2
        with torch.no_grad():
            told = [z] if labels is None else [z, labels]
            expected = generator(*told).numpy()
        names = ("z", "label")
        feed = {name: value.numpy() for name, value in zip(names, told, strict=False)}
        (found,) = session.run(["image"], feed)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert expected.std() > 0.1


def test_an_exported_generator_draws_without_gan_lib(run: str, tmp_path: Path) -> None:
    ours, exported = tmp_path / "ours", tmp_path / "exported"
    assert main(["export", run, "--out", str(exported)]) == 0
    assert main(["generate", run, "--seeds", "0-5,1000", "--out", str(ours)]) == 0
    expected = pictures(ours)
    for name, needs, without, most in (
        ("generate.py", ["torch"], "numpy,PIL,onnxruntime", 0),
        ("generate_onnx.py", ["onnxruntime", "numpy"], "torch,PIL", 1),
    ):
        elsewhere = tmp_path / name.removesuffix(".py")
        elsewhere.mkdir()
        # -I: nothing of the environment's; -S: nothing that is installed.
        command = [sys.executable, "-I", "-S", "-c", ALONE]
        command += [str(site_with(elsewhere, needs)), without, str(exported / name)]
        done = subprocess.run(
            [*command, "1000", *"012345"], cwd=elsewhere, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found = pictures(elsewhere)
        assert list(found) == list(expected)
        for seed, image in found.items():
            difference = np.abs(image.astype(int) - expected[seed])
            assert difference.max() <= most, (name, seed)
    samples = cut_apart(read_png((exported / "samples.png").read_bytes()), 16)
    np.testing.assert_array_equal(samples[5], expected["seed_0005.png"])


@pytest.mark.long
def test_the_page_draws_the_same_in_a_browser(run: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    out = tmp_path / "out"
    assert main(["export", run, "--out", str(out)]) == 0
    generator = open_run(run).generator("best")
    a, label = latent_of_seed(generator, 999)
    expected = {(seed, 1, 0): next(draw_seeds(generator, [seed])) for seed in (0, 7, 500, 999)}
    way = walk(torch.cat([a, latent_of_seed(generator, 2)[0]]), np.array([0.5]))
    expected[999, 2, 50] = render(generator, way, label)[0]

    def pixels(canvas: Locator) -> np.ndarray:
        data = """c => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]"""
        return np.array(canvas.evaluate(data)).reshape(16, 16, 4)

    handler = partial(http.server.SimpleHTTPRequestHandler, directory=out)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as browsers:
            browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            view = browser.new_page()
            for place in (out.as_uri(), f"http://127.0.0.1:{server.server_port}"):
                asked: list[str] = []
                view.on("request", lambda request, asked=asked: asked.append(request.url))
                view.goto(f"{place}/demo.html")
                for numbers, image in expected.items():
                    for name, number in zip(("from", "to", "way"), numbers, strict=True):
                        view.locator(f"#{name}").fill(str(number))
                    view.evaluate("new Promise(requestAnimationFrame)")
                    drawn = pixels(view.locator("#image"))
                    assert (drawn[..., 3] == 255).all()
                    assert np.abs(drawn[..., :3] - image.astype(int)).max() <= 1, numbers
                view.locator("#wall canvas").nth(39).wait_for()
                seventh = pixels(view.locator("#wall canvas").nth(7))
                assert np.abs(seventh[..., :3] - expected[7, 1, 0].astype(int)).max() <= 1
                assert view.locator("#of").is_visible() == (label is not None)
                if label is not None:
                    view.locator("#of").select_option("beagle")
                    view.evaluate("new Promise(requestAnimationFrame)")
                    beagle = render(generator, way, torch.tensor([0]))[0].astype(int)
                    assert np.abs(pixels(view.locator("#image"))[..., :3] - beagle).max() <= 1
                assert asked == [f"{place}/demo.html"]
            browser.close()
    finally:
        server.shutdown()


def test_what_is_exported_says_what_it_is(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", run, "--epoch", "last", "--out", str(out)]) == 0
    told, p = open_run(run), open_run(run).parameters
    config = json.loads((out / "config.json").read_text())
    assert config["classes"] == (CLASSES if p.conditional else {})
    # Others who have gan_lib load the weights as they are.
    generator = generator_of(p, config["classes"]).eval()
    left = generator.load_state_dict(load_file(out / "model.safetensors"), strict=False)
    assert all(name.endswith("num_batches_tracked") for name in left.missing_keys)
    assert not left.unexpected_keys
    np.testing.assert_array_equal(
        *(next(draw_seeds(g, [3])) for g in (generator, told.generator(4)))
    )
    card = (out / "README.md").read_text()
    line = told.quality()[-1]
    for words in (
        "trained on Dog silhouettes of Animal Shape MNIST",
        "licence: MIT",
        "allows: any use that keeps the licence text",
        f"| KID (less is better) | {line['kid']:.4f} | {line['kid_floor']:.4f} |",
        "efficientnet-lite0",
        "epoch 4, after 12 steps",
        "| lr_g | 0.02 |",
        f"torch {torch.__version__.split('+')[0]}",
    ):
        assert words in card, words
    page = (out / "demo.html").read_text()
    (held,) = re.findall(r'id="weights">([^<]+)<', page)
    assert base64.b64decode(held) == (out / "model.safetensors").read_bytes()
    assert "licence: MIT" in page
    assert not re.findall("@[A-Z]+@|(?:src|href)=", page.replace(held, ""))


def test_the_card_of_own_images_tells_no_place(tiny: TrainingParameters, tmp_path: Path) -> None:
    told = tiny.replace(source=str(tmp_path / "secret/pictures"), epochs=1)
    images = ImageSet(np.zeros((64, 16, 16, 1), np.uint8), np.zeros(64, int), ("one",))
    train_gan(told, run=str(tmp_path / "run"), images=images, progress=False)
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "trained on pictures" in card
    assert "secret" not in card
    assert card.count("unknown: ask the owner of the images") == 2
    assert "It was not measured." in card


def test_seeds_are_numbers_and_ranges() -> None:
    assert parse_seeds("3, 7,10-12,11") == [3, 7, 10, 11, 12]
    for wrong in ("", "-1", "3-1", "1.5", "all"):
        with pytest.raises(ParameterError, match="write it as 0-99, or 3,7,10-12"):
            parse_seeds(wrong)
    with pytest.raises(ParameterError, match="more than 1,000,000 images"):
        parse_seeds("0-9,5-99999999999")


def test_what_cannot_be_exported_is_said_in_one_sentence(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    out = str(tmp_path / "out")
    for words, sentence in (
        (["export", run, "--out", "/proc/out"], "/proc/out cannot be written"),
        (["export", run, "--out", str(taken)], f"{taken} is there already: name a new folder"),
        (["generate", run, "--out", str(taken)], f"{taken} is there already: name a new folder"),
        (["generate", run, "--out", "s3://bucket/out"], "name a folder of this machine"),
        (["generate", run, "--seeds", "1", "--walk", "3", "--out", out], "there are 1 seeds"),
        (["export", run, "--epoch", "3", "--out", out], "no checkpoint of epoch 3: it keeps"),
        (["export", str(taken), "--out", out], "no run lives at"),
        (["export", run, "--out", out], "pip install onnx safetensors"),
    ):
        if "pip" in sentence:
            monkeypatch.setitem(sys.modules, "onnx", None)
        assert main(words) == 2
        said = capsys.readouterr()
        assert sentence in said.err
        assert said.err.count("\n") == 1
        assert list(tmp_path.iterdir()) == [taken]


@pytest.mark.long
@pytest.mark.parametrize("command", ["generate", "export"])
def test_a_killed_one_leaves_nothing_that_looks_done(
    command: str, run: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-m", "gan_lib", command, run, "--out", str(out)]
    first = {"generate": "seed_0000.png", "export": "model.safetensors"}[command]
    with subprocess.Popen(words, cwd=CHECKOUT) as process:
        while not list(tmp_path.glob(f".out.*.part/{first}")):
            assert process.poll() is None
        process.kill()
    left = list(tmp_path.iterdir())
    assert [path.name.startswith(".out.") for path in left] == [True]
    # The same again puts away what the killed one has left, and nothing of one that is at work.
    (tmp_path / f".out.{'0' * 32}.part").mkdir()
    with whole_folder(str(out)) as ours:
        assert list(tmp_path.iterdir()) == [ours]
        with contextlib.suppress(ParameterError), whole_folder(str(out)) as other:
            assert {*tmp_path.iterdir()} == {ours, other}
            raise ParameterError("not now")
    out.rmdir()
    assert main([command, run, "--out", str(out)]) == 0
    assert (out / first).exists()
    assert list(tmp_path.iterdir()) == [out]


def test_ctrl_c_leaves_nothing(run: str, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not list(tmp_path.glob(".out.*.part/seed_*.png")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["generate", run, "--seeds", "0-99999", "--out", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []
