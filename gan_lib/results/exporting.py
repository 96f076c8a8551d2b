"""A generator to take away: files with which anybody draws who has never heard of this package.

model.safetensors   its weights                    generate.py        draws with torch alone
generator.onnx      all of it, for any batch size   generate_onnx.py   with onnxruntime, numpy
config.json         what both scripts need to know  README.md          a model card
samples.png         the images of seeds 0 to 63      demo.html          draws in any browser
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from gan_lib.base.errors import ParameterError
from gan_lib.gan.drawing import draw_seeds
from gan_lib.gan.models import Block, ClassBatchNorm, Generator
from gan_lib.results.model_card import about_source, model_card
from gan_lib.results.pictures import image_grid, png_bytes

if TYPE_CHECKING:
    from gan_lib.results.run import Run

SCRIPTS = ("generate.py", "generate_onnx.py")
TAKEAWAY = resources.files("gan_lib.results") / "takeaway"
N_SAMPLES = 64
# Of 2021 and 2022: what reads ONNX files today reads these. BatchNormalization is that of 15.
OPSET, IR_VERSION = 17, 8


def export_generator(run: Run, epoch: int | str, folder: Path) -> int:
    """Write the generator of a run into a folder, see above.

    Args:
        run: that has a checkpoint.
        epoch: as in `Run.checkpoint`.
        folder: empty.

    Returns:
        The number of that epoch.

    Raises:
        RunError: if there is no such checkpoint.
        ParameterError: if a package is missing, or a layer is one that cannot be written.
    """
    # Read once: a run that trains may have another newest one a moment later.
    state = run.checkpoint(epoch)
    generator = run.generator_in(state)
    try:
        from safetensors.torch import save

        network = onnx_bytes(generator)
    except ImportError as error:
        raise ParameterError(
            f"export needs the packages onnx and safetensors ({error}): pip install onnx "
            "safetensors"
        ) from None
    # How many batches BatchNorm has seen is no number to draw with.
    weights = {
        name: value.contiguous()
        for name, value in generator.state_dict().items()
        if value.is_floating_point()
    }
    data, config = save(weights), _config(generator)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "generator.onnx").write_bytes(network)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "demo.html").write_text(_demo(run, config, data), encoding="utf-8")
    samples = np.stack([*draw_seeds(generator, range(N_SAMPLES))])
    (folder / "samples.png").write_bytes(png_bytes(image_grid(samples)))
    for name in SCRIPTS:
        (folder / name).write_bytes((TAKEAWAY / name).read_bytes())
    (folder / "README.md").write_text(model_card(run, state, generator), encoding="utf-8")
    return int(state["epoch"])


def _config(generator: Generator) -> dict[str, Any]:
    """What config.json says: all that the weights do not."""
    mean, std = generator.normalisation
    return {
        "nz": generator.nz,
        "pixel_mean": mean,
        "pixel_std": std,
        "classes": generator.classes,
        "layers": [*_layers(generator)],
    }


def _demo(run: Run, config: dict[str, Any], weights: bytes) -> str:
    """A page that holds the weights, and draws with them by JavaScript alone.

    So it is one file that opens from disk, where a browser lets no page load another file.
    """
    title, about = about_source(run.parameters)
    parts = {
        "TITLE": html.escape(f"A generator trained on {title}"),
        "ABOUT": "".join(f"<div>{html.escape(line)}</div>" for line in about),
        # What a class is called must not end the script.
        "CONFIG": json.dumps(config).replace("<", "\\u003c"),
        "WEIGHTS": base64.b64encode(weights).decode(),
    }
    page = (TAKEAWAY / "demo.html").read_text(encoding="utf-8")
    # In one pass: what is put in is not looked through.
    return re.sub("@([A-Z]+)@", lambda found: parts[found[1]], page)


def _layers(generator: Generator) -> Iterator[dict[str, Any]]:
    """One after the other in plain words, those of blocks among them.

    Where a block begins, what comes is kept; where it ends, it is added.
    """
    for number, layer in generator.layers.named_children():
        name = f"layers.{number}"
        if isinstance(layer, Block):
            yield {"kind": "keep"}
            yield _described(f"{name}.convolution", layer.convolution)
            yield _described(f"{name}.norm", layer.norm)
            yield {"kind": "add"}
            yield {"kind": "relu"}
        else:
            yield _described(name, layer)


def _described(name: str, layer: nn.Module) -> dict[str, Any]:
    """One layer in plain words; `name` is that of its weights in the state.

    Raises:
        ParameterError: if it is of a kind that the scripts do not know.
    """
    if isinstance(layer, nn.ConvTranspose2d) and layer.bias is None:
        steps = {"stride": layer.stride[0], "padding": int(layer.padding[0])}
        return {"kind": "convolution", "name": name, **steps}
    if isinstance(layer, nn.BatchNorm2d | ClassBatchNorm):
        norm = layer if isinstance(layer, nn.BatchNorm2d) else layer.norm
        return {"kind": "norm", "name": name, "eps": norm.eps}
    for kind, word in ((nn.ReLU, "relu"), (nn.Tanh, "tanh")):
        if isinstance(layer, kind):
            return {"kind": word}
    raise ParameterError(f"the generator has a layer that cannot be exported: {layer}")


def onnx_bytes(generator: Generator) -> bytes:
    """The generator in eval mode as an ONNX file.

    Inputs are z, N x nz, and where it knows classes label, int64, N; the output is image,
    N x channels x size x size, as the generator's own. It is written layer by layer: that needs
    the package onnx alone, where torch's exporter needs four and half a minute.

    Raises:
        ImportError: without that package.
        ParameterError: as `export_generator`.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(name: str, value: Any) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def compute(kind: str, output: str, *inputs: str, **told: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **told))
        return output

    x = kept = compute("Reshape", "feature_maps", "z", constant("shape", np.array([0, -1, 1, 1])))
    state = {key: value.numpy() for key, value in generator.state_dict().items()}
    for number, told in enumerate(_layers(generator)):
        name = told.get("name", f"step.{number}")
        if told["kind"] == "convolution":
            steps = {"strides": [told["stride"]] * 2, "pads": [told["padding"]] * 4}
            weight = constant(f"{name}.weight", state[f"{name}.weight"])
            x = compute("ConvTranspose", name, x, weight, **steps)
        elif told["kind"] == "norm":
            norm = "norm." if generator.classes else ""
            parts = [
                constant(f"{name}.{part}", state[f"{name}.{norm}{part}"])
                for part in ("weight", "bias", "running_mean", "running_var")
            ]
            x = compute("BatchNormalization", name, x, *parts, epsilon=told["eps"])
            if generator.classes:
                factor, offset = np.split(state[f"{name}.own.weight"][:, :, None, None], 2, axis=1)
                for kind, part, values in (
                    ("Mul", "factor", 1 + factor),
                    ("Add", "offset", offset),
                ):
                    table = constant(f"{name}.{part}s", values)
                    chosen = compute("Gather", f"{name}.{part}", table, "label", axis=0)
                    x = compute(kind, f"{name}.{kind}", x, chosen)
        elif told["kind"] == "keep":
            kept = x
        elif told["kind"] == "add":
            x = compute("Add", name, x, kept)
        else:
            x = compute({"relu": "Relu", "tanh": "Tanh"}[told["kind"]], name, x)
    compute("Identity", "image", x)

    def value(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, ["n", *shape])

    inputs = [value("z", TensorProto.FLOAT, generator.nz)]
    inputs += [value("label", TensorProto.INT64)] if generator.classes else []
    size = ("channels", "height", "width")
    graph = helper.make_graph(
        nodes, "generator", inputs, [value("image", TensorProto.FLOAT, *size)], constants
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data
