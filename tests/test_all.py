"Importing the package, in any order with fastai, and what a star import gives."

import json
import os
import subprocess
import sys

import pytest

import channelslast
from channelslast import callback, devices, find, formats, graphs, memory_format, optimizer, precision, summary, swaps

ROOMS = (callback, devices, find, formats, graphs, memory_format, optimizer, precision, summary, swaps)
PUBLIC = {name for module in ROOMS for name in module.__all__}
METHODS = {
    "to_channelslast": "learner",
    "to_contiguous": "learner",
    "to_format": "learner",
    "save": "learner",
    "export": "learner",
    "to_fp16": "learner",
    "to_bf16": "learner",
    "to_fp32": "learner",
    "all_batches": "learner",
    "__call__": "learner",
    "format_find": "find.run",
    "format_summary": "summary.learner",
}


# What fastai imports is imported once, and a process for each code forked then: of fastai and of us it has nothing
FORKS = """
def main():
    import json, os, sys
    import matplotlib.pyplot, pandas, scipy.ndimage, sklearn.metrics, sklearn.model_selection
    import torch._dynamo, torchvision

    packages = {name.partition(".")[0] for name in sys.modules}
    assert not packages & {"fastai", "fastcore", "accelerate", "channelslast"}
    for name, code in json.load(sys.stdin).items():
        folder = sys.argv[1] = os.path.join(os.environ["FOLDER"], name)
        os.mkdir(folder)
        if not os.fork():
            return code
        with open(os.path.join(folder, "status"), "w") as file:
            file.write(str(os.wait()[1]))

def redirect(folder):
    import os
    for number, stream in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(os.path.join(folder, stream), os.O_WRONLY | os.O_CREAT), number)

import sys
sys.argv.append("")
code = main()
if code:
    redirect(sys.argv[1])
    exec(code)
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    "What each of the codes prints, in a process of its own."
    folder = tmp_path_factory.mktemp("processes")
    command, environment = [sys.executable, "-W", "ignore", "-c", FORKS], {**os.environ, "FOLDER": str(folder)}
    subprocess.run(command, input=json.dumps(CODES), text=True, env=environment, check=True)

    def read(name):
        assert (folder / name / "status").read_text() == "0", (folder / name / "stderr").read_text()
        return (folder / name / "stdout").read_text()

    return read


IMPORTS = {
    "fastai first": "from fastai.vision.all import *; from channelslast.all import *",
    "ours first": "from channelslast.all import *; from fastai.vision.all import *",
    "the package alone, last": "from fastai.text.all import *; import channelslast",
    "one of its modules, first": "import channelslast.memory_format; from fastai.callback.all import *",
}
# The names in `__main__`, and those that star imports of fastai's modules leave then
REPORT = f"""
import importlib, json
from fastai.learner import Learner

def classes(names):
    return {{name: str(names[name]) for name in ("ChannelsLast", "MixedPrecision") if name in names}}

methods = {{name: getattr(Learner, name).__module__ for name in {[*METHODS]}}}
report = {{"main": classes(globals()), "methods": methods}}
for name in ("callback.all", "callback.fp16", "callback.channelslast", "vision.all", "text.all", "tabular.all"):
    names = {{}}
    exec(f"from fastai.{{name}} import *", names)
    report[name] = classes(names)
print(json.dumps(report))
"""


@pytest.fixture(scope="module", params=IMPORTS)
def report(request, printed):
    return json.loads(printed(request.param))


def test_our_methods_win_whatever_the_import_order(report):
    assert report["methods"] == {name: f"channelslast.{module}" for name, module in METHODS.items()}


def test_star_imports_of_fastai_leave_our_classes_behind_whatever_the_import_order(report):
    ours = {name: str(getattr(channelslast, name)) for name in ("ChannelsLast", "MixedPrecision")}
    for name in ("main", "callback.all", "vision.all", "text.all", "tabular.all"):
        assert report[name] == ours, name
    assert report["callback.fp16"] == {"MixedPrecision": ours["MixedPrecision"]}
    assert report["callback.channelslast"] == {"ChannelsLast": ours["ChannelsLast"]}


@pytest.mark.parametrize("module", ["channelslast", "channelslast.all"])
def test_star_import_gives_every_public_name(module):
    names = {}
    exec(f"from {module} import *", names)
    del names["__builtins__"]
    assert set(names) == PUBLIC >= {"ChannelsLast", "MixedPrecision", "TrainFormat", "get_memory_format", "AMPMode"}
    assert all(names[name] is getattr(channelslast, name) for name in PUBLIC)


# A Learner that fastai alone has made, with its own callbacks, before the package is imported
BEFORE = """
import json, pickle, sys, warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from fastai.vision.all import *
from copy import deepcopy

class Items(list):
    def new_empty(self):
        return self

def learner():
    items = Items(zip(torch.randn(8, 3, 8, 8), torch.arange(8) % 2))
    dls = DataLoaders.from_dsets(items, items, bs=4, num_workers=0, device="cpu")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), path=Path(sys.argv[1]))
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn.to_channelslast(amp_mode="bf16")

learners = [learner() for _ in range(6)]
learners[0].fit(1)
theirs = ChannelsLast, MixedPrecision
pickled = pickle.dumps(learners[0])
learners[0].export("theirs.pkl")
"""
AFTER = """
import channelslast
ours = channelslast.ChannelsLast, channelslast.MixedPrecision

def kinds(learn):
    cbs = [cb for cb in learn.cbs if isinstance(cb, theirs)]
    return ["ours" if isinstance(cb, ours) else "theirs" for cb in cbs]

def trains(learn):
    learn.fit(1)
    return bool(learn.recorder.losses[-1].isfinite())

fits, replaced, contiguous, fp32, copied, removed = learners
again = pickle.loads(pickle.dumps(copied))
copied_cbs = deepcopy(copied.cbs)
old = pickle.loads(pickled)
old.dls = fits.dls
loaded = load_learner(Path(sys.argv[1]) / "theirs.pkl", cpu=False)
loaded.dls = fits.dls
results = {
    "fits": trains(fits) and kinds(fits),
    "replaced": trains(replaced.to_channelslast(amp_mode="bf16")) and kinds(replaced),
    "contiguous": trains(contiguous.to_contiguous(to_fp32=True)) and kinds(contiguous),
    "fp32": trains(fp32.to_fp32()) and kinds(fp32),
    "removed": kinds(removed.remove_cbs(theirs)),
    "pickled": trains(again) and kinds(again),
    "copied": ["ours" if isinstance(cb, ours) else "theirs" for cb in copied_cbs if isinstance(cb, theirs)],
    "pickled by fastai alone": trains(old) and kinds(old),
    "loaded as fastai alone exported it": trains(loaded) and kinds(loaded),
    "loaded on the cpu": kinds(load_learner(Path(sys.argv[1]) / "theirs.pkl")),
}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def made_before(printed):
    return json.loads(printed("made before"))


@pytest.mark.parametrize(
    "what, kinds",
    {
        "fits": ["theirs", "theirs"],
        "replaced": ["ours", "ours"],
        "contiguous": [],
        "fp32": ["theirs"],
        "removed": [],
        "pickled": ["theirs", "theirs"],
        "copied": ["theirs", "theirs"],
        "pickled by fastai alone": ["ours", "ours"],
        "loaded as fastai alone exported it": ["ours", "ours"],
        "loaded on the cpu": [],
    }.items(),
)
def test_learner_that_fastai_made_before_the_import_goes_on(made_before, what, kinds):
    assert made_before[what] == kinds


def test_package_tells_its_version():
    assert channelslast.__version__


def test_works_without_accelerate(printed):
    assert printed("without accelerate") == "imported\n"


WITHOUT_ACCELERATE = """
import sys
sys.modules['accelerate'] = None
import channelslast.all, channelslast.cli
print("imported")
"""
CODES = {
    **{name: imports + REPORT for name, imports in IMPORTS.items()},
    "made before": BEFORE + AFTER,
    "without accelerate": WITHOUT_ACCELERATE,
}
