"The command `channelslast`: the first argument names what to do."

import sys
from importlib import import_module

from channelslast.cli.options import COMMANDS, new_parser

__all__ = ["main"]


def main() -> None:
    arguments = sys.argv[1:]
    parser = new_parser()
    if not arguments or arguments[0] in ("-h", "--help"):
        parser.print_help()
        return
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"{arguments[0]}: no such command; pass one of {', '.join(COMMANDS)}")
    options = parser.parse_args(arguments)
    if not vars(options).get("arch", True):
        parser.error(f"{options.command}: pass names of fastai, torchvision or timm models, as resnet50 convnext_tiny")
    # only now: to import torchvision and timm takes seconds more than the package itself
    command = import_module(f"channelslast.cli.{options.command}")
    zoo = import_module("channelslast.zoo")
    try:
        command.run(options)
    except KeyboardInterrupt:
        parser.exit(130, "\nchannelslast: interrupted\n")  # as shells say: 128 and the number of the signal
    except zoo.IllegalValue as error:
        where = error.value if error.name == "arch" else f"--{error.name} {error.value}"
        parser.error(f"{where}: {error.why}")
