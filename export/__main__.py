"""Export a model folder to other runtimes; each format is compared with the model before it is released.

  python -m export --model=runs/demo/model --formats=onnx,onnx_int8 --output=runs/demo/export
  python -m export --model=runs/demo/model --formats=onnx,saved_model,stablehlo --output=out --data=folder:my_images

Each format is opened in its own runtime by a new process and compared with the model on the images of --data and on
black, white and noise images. A format that differs too much is deleted, with an explanation. Exits 0 when all formats
passed, 3 when one failed, 2 on a mistake.
"""

import sys

from clip_har_jax import cli


def main() -> int:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    cli.add_model(parser)
    add(
        "--formats",
        required=True,
        metavar="NAMES",
        help="among onnx, onnx_fp16, onnx_int8, saved_model, stablehlo, torchscript, tensorrt, e.g. --formats=onnx",
    )
    cli.add_output(parser, "runs/demo/export")
    help = (
        "images or clips on which each format is compared, e.g. --data=folder:photos; default: the test split of the "
    )
    cli.add_data(parser, help + "embedded images, for a model of clips of the embedded clips")
    help = "number of images, or of frames of clips, e.g. --num_examples=256 (default)"
    add("--num_examples", type=int, default=256, metavar="N", help=help)
    cli.add_classes(parser)
    add("--int8", choices=("dynamic", "static"), default="dynamic", help="scales of activations, e.g. --int8=static")
    add(
        "--precision",
        choices=("fp32", "fp16", "bf16", "int8"),
        default="fp16",
        help="number format of TensorRT's engines, e.g. --precision=int8",
    )
    add("--clips", action="store_true", help="give a model of images the graph of whole clips too, e.g. --clips")
    add("--sign", metavar="FILE", help="sign the folder with a private key in PEM, e.g. --sign=private.pem")
    add("--overwrite", action="store_true", help="replace an earlier export, e.g. --overwrite")
    arguments = parser.parse_args()

    from clip_har_jax.inference.backends import split_classes
    from export.run import EXIT_PARITY, ExportOptions, export_model

    parity = export_model(
        arguments.model,
        [name.strip() for name in arguments.formats.split(",") if name.strip()],
        arguments.output,
        ExportOptions(
            arguments.data,
            arguments.num_examples,
            split_classes(arguments.classes),
            arguments.overwrite,
            arguments.int8 == "static",
            arguments.sign,
            arguments.precision,
            arguments.clips,
        ),
    )
    for name, entry in parity.items():
        if entry["passed"]:
            weak = "; weak: under half of the classes are ever predicted" if entry["weak"] else ""
            print(
                f"{name}: passed; largest error {entry['max_abs_error']:.2g}, same first class in "
                f"{entry['top1_agreement']:.1%}, cosine {entry['min_cosine']:.6f}, {entry['num_examples']} images{weak}"
            )
            for key, way in (("clips", "whole clips"), ("clips_by_frame", "clips frame by frame")):
                if clips := entry.get(key):
                    print(
                        f"  {way}: largest error {clips['max_abs_error']:.2g}, another first class in "
                        f"{clips['num_changed']} of {clips['num_clips']}, cosine {clips['min_cosine']:.6f}"
                    )
        else:
            print(f"{name}: FAILED and was deleted: {'; '.join(entry['failures'])}", file=sys.stderr)
            if worst := entry.get("worst_example"):
                was, became = (f"{worst[who]['label']} {worst[who]['score']:.3f}" for who in ("model", "exported"))
                print(f"  the worst image, number {worst['number']}: {was} became {became}", file=sys.stderr)
    return 0 if all(entry["passed"] for entry in parity.values()) else EXIT_PARITY


if __name__ == "__main__":
    cli.run(main)
