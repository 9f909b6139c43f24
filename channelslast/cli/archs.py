"`channelslast archs`."

from argparse import Namespace
from fnmatch import fnmatch

from channelslast.zoo import IllegalValue, arch_names, similar_names


def run(
    options: Namespace,
) -> None:
    names = sorted({name for group in arch_names().values() for name in group}, key=str.lower)
    pattern = options.pattern if set("*?[") & set(options.pattern) else f"*{options.pattern}*"
    found = [name for name in names if fnmatch(name.lower(), pattern.lower())]
    if not found:
        close = ", ".join(similar_names(options.pattern, names))
        hint = f"did you mean {close}?" if close else "`channelslast archs` lists all"
        raise IllegalValue("arch", options.pattern, f"no such name in fastai, torchvision or timm; {hint}")
    print(*found, sep="\n")
