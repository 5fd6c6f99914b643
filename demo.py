"""A web page on which to try the models with pictures of your own: http://127.0.0.1:7860, and nowhere else.

python demo.py                      # the shipped MLP and CNN side by side
python demo.py A.pt B.pt --port 8000

needs pip install -r requirements-optional.txt. No picture leaves this machine, and no network is needed.
"""

import importlib.util
import os
from pathlib import Path

import cli

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GRADIO_TEMP_DIR"] = str(cli.HERE / ".cache" / "gradio")

SHOWN = 280  # pixels a side of the pictures on the page
NEIGHBOURS = 8
EXAMPLES = (0, 1, 2, 8, 12, 18)  # test images, as on the page
DEFAULTS = [cli.DEFAULT_CHECKPOINT, cli.CHECKPOINTS / "best_mlp_fmnist.pt"]


def parse_args(argv=None):
    parser = cli.Parser("Try checkpoints on pictures of your own, in a browser.")
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="*",
        type=Path,
        default=DEFAULTS,
        help="one or more to compare (default: the shipped CNN and MLP); the first explains itself",
    )
    parser.add_argument("--port", type=cli.whole_number(1, 65_535), default=7860, help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    cli.add_common(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    from data import UserError

    if not importlib.util.find_spec("gradio"):
        raise UserError("this needs gradio: pip install -r requirements-optional.txt")
    page = build(args)
    import gradio

    print(f"http://{args.host}:{args.port}  (Ctrl-C ends it)", flush=True)
    try:
        page.launch(
            server_name=args.host,
            server_port=args.port,
            quiet=True,
            footer_links=[],
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        raise UserError(f"{error}: choose another --port") from None
    return 0


def build(args):
    """The page, with all that answers it."""
    import checkpoint
    import data
    import engine
    import explain
    import predict

    device = engine.pick_device(args.device)
    loaded = []
    for path in args.checkpoints:
        model, info = checkpoint.load(path)
        loaded.append((f"{info['model']}, {path.name}", model.to(device), predict.temperature_of(path)))
    train, test = data.load("train+val", "test", data_dir=args.data_dir)
    print("the training images' features, for those nearest to a picture …", flush=True)
    references = explain.features(loaded[0][1], train.to(device))[1]
    import gradio  # which takes seconds: after all that a user may have got wrong

    def answer(source):
        if source is None or (isinstance(source, dict) and source["composite"] is None):
            return [None] * (3 + len(loaded))
        return explain_picture(source, loaded, train, references)

    with gradio.Blocks(title="Fashion-MNIST", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(
            "# What garment is it?\nA picture of one garment on a plain ground, light or dark; or draw one. "
            "It stays on this machine."
        )
        with gradio.Row():
            with gradio.Column():
                with gradio.Tab("Picture"):
                    picture = gradio.Image(sources=["upload", "clipboard"], label="drop, paste or choose", height=SHOWN)
                    picture.preprocess = lambda file: file and file.path  # the file as it is, for pictures.py to read
                    gradio.Examples(write_examples(test), picture, label="test images of the data set")
                with gradio.Tab("Drawing"):
                    drawing = gradio.Sketchpad(
                        type="pil",
                        canvas_size=(SHOWN, SHOWN),
                        label="take the brush, and draw",
                        brush=gradio.Brush(default_size=14, colors=["#000000", "#808080"]),
                        transforms=(),
                        layers=False,
                    )
            with gradio.Column():
                plain = {"height": SHOWN, "format": "png", "buttons": [], "show_label": False}
                gradio.Markdown("What the networks saw")
                seen = gradio.Image(label="what the networks saw", **plain)
                gradio.Markdown("Where the first looked (Grad-CAM; of an MLP, gradient x input)")
                heat = gradio.Image(label="where the first looked", **plain)
            with gradio.Column():
                labels = [gradio.Label(label=name, num_top_classes=10) for name, _, _ in loaded]
        gradio.Markdown("The training images nearest to it, by the features of the first")
        near = gradio.Gallery(label="nearest", show_label=False, columns=NEIGHBOURS, height=170, buttons=[])
        outputs = [seen, heat, *labels, near]
        picture.change(answer, picture, outputs)
        drawing.change(answer, drawing, outputs)
    return page


def explain_picture(source, loaded, train, references):
    """What the page shows of a picture (a path, or a drawing of Gradio's): pictures, labels and neighbours."""
    import gradio
    import numpy as np

    import data
    import explain
    import pictures
    import predict

    try:
        drawn = isinstance(source, dict)
        pixels = pictures.convert(pictures.opaque(source["composite"]) if drawn else pictures.read(source))
    except pictures.PictureError as error:
        if drawn:  # an empty canvas
            return [None] * (3 + len(loaded))
        raise gradio.Error(str(error)) from None
    labels = []
    for _, model, temperature in loaded:
        ((_, _, classes),) = predict.classify(model, [("picture", pixels)], temperature)
        labels.append(dict(classes))
    model = loaded[0][1]
    split = predict.as_split(model, [pixels])
    logits, features = explain.features(model, split)
    maps, _ = explain.attention_maps(model, split, logits.argmax(1))
    near = explain.nearest(features, references, NEIGHBOURS)[1][0].tolist()
    neighbours = [(enlarged(train.images[i].numpy()), data.CLASSES[train.labels[i]]) for i in near]
    heat = np.kron(maps[0].numpy(), np.ones((4, 4)))
    return [enlarged(pixels), enlarged(overlay(pixels, heat)), *labels, neighbours]


def overlay(pixels, heat):
    """A grey image uint8 (28, 28) with a map [0, 1] of the same size in orange upon it: uint8 (28, 28, 3)."""
    import numpy as np

    grey, share = np.repeat(pixels[..., None], 3, 2), 0.6 * heat[..., None]
    return ((1 - share) * grey + share * np.array([255, 120, 0])).astype(np.uint8)


def enlarged(pixels):
    from PIL import Image

    return Image.fromarray(pixels).resize((SHOWN, SHOWN), Image.Resampling.NEAREST)


def write_examples(test):
    """Paths of a few test images as pictures on white."""
    from PIL import ImageOps

    folder = cli.HERE / ".cache" / "examples"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in EXAMPLES:
        if index < len(test.images):
            paths.append(str(folder / f"{index}.png"))
            negative = ImageOps.invert(enlarged(test.images[index].numpy()))
            ImageOps.expand(negative, 20, fill=255).save(paths[-1])
    return paths


if __name__ == "__main__":
    cli.run(main)
