"Importing the package, in any order, and what a star import gives."

import subprocess
import sys

import pytest

IMPORTS = {
    "fastai first": "from fastai.vision.all import *; from channelslast.all import *",
    "ours first": "from channelslast.all import *; from fastai.vision.all import *",
    "ours alone": "from fastai.learner import Learner; import channelslast.callback",
    "fastai's callback last": (
        "from fastai.learner import Learner; from channelslast.callback import *; from fastai.callback.all import *"
    ),
}


@pytest.mark.parametrize("imports", IMPORTS.values(), ids=IMPORTS)
def test_our_methods_win_whatever_the_import_order(imports):
    methods = ["to_channelslast", "to_contiguous", "to_fp16", "to_bf16", "save", "all_batches"]
    code = f"{imports}\nprint(*[getattr(Learner, name).__module__ for name in {methods}])"
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True)
    modules = printed.stdout.split()
    assert modules[:2] == ["channelslast.callback"] * 2 and modules[4] == "channelslast.callback"
    assert modules[2:4] == ["channelslast.precision"] * 2 and modules[5] == "channelslast.precision"


def test_star_import_after_fastais_gives_our_names():
    namespace = {}
    exec("from fastai.vision.all import *\nfrom channelslast.all import *", namespace)
    for name in ("ChannelsLast", "MixedPrecision", "TrainFormat", "get_memory_format", "to_memory_format"):
        assert namespace[name].__module__.startswith("channelslast."), name


def test_package_tells_its_version():
    import channelslast

    assert channelslast.__version__


def test_works_without_accelerate():
    code = "import sys; sys.modules['accelerate'] = None; import channelslast.all, channelslast.cli"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
