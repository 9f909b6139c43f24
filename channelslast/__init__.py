"Train fastai models in PyTorch's channels last memory format, on every device."

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("channelslast")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0+unknown"
