"The options of every command. Imports no torchvision and no timm, so that `--help` need not wait for them too."

from argparse import ArgumentParser
from typing import NoReturn

from channelslast import __version__

COMMANDS = {
    "summary": "Show where models lose channels last in a training step, and what it costs.",
    "find": "Time a training step in each format, contiguous and channels last, and tell which to train in.",
    "archs": "List the architectures of fastai, torchvision and timm.",
}
ARCH = "name of a fastai, torchvision or timm model, as resnet50 (`channelslast archs` lists them)"


class Parser(ArgumentParser):
    "Says what is wrong in one line."

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: error: {message}\n")


def new_parser() -> Parser:
    parser = Parser(
        prog="channelslast",
        description="Train in PyTorch's channels last memory format: where it is lost, and what it gives.",
        epilog="`channelslast COMMAND --help` tells the options.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_options = {"summary": add_summary_options, "find": add_find_options, "archs": add_archs_options}
    for name, what in COMMANDS.items():
        add_options[name](commands.add_parser(name, help=what, description=what))
    return parser


def add_summary_options(parser: Parser) -> None:
    add_common_options(parser, bs=8)
    add_amp_mode(parser)


def add_find_options(parser: Parser) -> None:
    add_common_options(parser, bs=16)
    parser.add_argument(
        "--formats", help='as "contiguous fp16, channels last bf16 graph fused"; default: what may pay, in stages'
    )
    parser.add_argument("--compile", action="store_true", help="also try the best one compiled by PyTorch: minutes")
    parser.add_argument("--keep-precision", action="store_true", help="try float32 alone, which the models have")
    parser.add_argument("--opt", default="adam", help="adam (fastai's, the default) or fused (PyTorch's AdamW)")
    parser.add_argument(
        "--budget",
        type=float,
        metavar="SECONDS",
        help="for a model, compilation not counted; default: 30, up to 60 where steps are slow",
    )
    parser.add_argument(
        "--built-in",
        "--built_in",
        action="store_true",
        help="also time fastai's own `to_channelslast()`, to compare",
    )
    parser.add_argument("--verify", action="store_true", help="afterwards measure all that can train again")


def add_archs_options(parser: Parser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="a part of the names, or as 'res*50'; default: all")


def add_common_options(
    parser: Parser,
    bs: int,  # its default
) -> None:
    parser.add_argument("arch", nargs="*", help=ARCH)
    parser.add_argument("--bs", type=int, default=bs, help=f"images in a batch; default: {bs}")
    parser.add_argument("--size", type=int, help="pixels square; default: what timm says, 112 for video, else 224")
    parser.add_argument("--path", help="folder of images, one subfolder a class; default: random images")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: fastai's choice")
    parser.add_argument("--plot", metavar="FILE", help="also draw a picture, to this file")
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file")
    parser.add_argument("--verbose", action="store_true", help="print the whole traceback of a model's error")


def add_amp_mode(
    parser: ArgumentParser,
) -> None:
    parser.add_argument(
        "--amp-mode", "--amp_mode", default="auto", help="auto (what the device is fastest at), fp16, bf16 or fp32"
    )
