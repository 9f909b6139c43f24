"The command `channelslast`: architectures of three libraries, its record, and what bad input gets."

import json
import math
import re
import subprocess
import sys
import weakref

import pytest
import torch

from channelslast import TrainFormat, __version__
from channelslast.cli import find as find_command
from channelslast.cli import main
from channelslast.find.result import FormatTimings
from channelslast.find.timing import FormatTiming


@pytest.fixture
def run(monkeypatch, capsys):
    "A function that runs the command with arguments; what it printed."

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["channelslast", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return command


@pytest.fixture
def fails(run, capsys):
    "A function that runs the command with arguments it must refuse; the one line that it says."

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        captured = capsys.readouterr()
        assert ended.value.code == 2 and captured.out == ""
        (line,) = captured.err.splitlines()
        return line

    return command


ARCHITECTURES = {
    "resnet18": 64,
    "resnet50": 64,
    "xresnet50": 64,
    "DynamicUnet": 64,
    "vgg16_bn": 32,
    "densenet121": 64,
    "efficientnet_b0": 64,
    "mobilenetv3_large_100": 64,
    "convnext_tiny": 64,
    "regnety_032": 64,
    "resnetv2_50x1_bit": 64,
    "shufflenet_v2_x1_0": 64,
    "vit_tiny_patch16_224": 224,
    "swin_tiny_patch4_window7_224": 224,
    "poolformer_s12": 64,
    "ghostnet_100": 64,
    "deeplabv3_resnet50": 64,
    "r3d_18": 32,
    "raft_small": 128,
    "ssdlite320_mobilenet_v3_large": 64,
    "inception_v3": 96,
    "quantized_resnet18": 64,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before_rounds_s, said", [(30.0, "`--budget 37` may do"), (math.nan, "a larger `--budget`")])
def test_what_more_time_would_do_is_told_as_an_option(run, monkeypatch, before_rounds_s, said):
    rows = [FormatTiming(TrainFormat(), [40.0], note="1 step, the time was up")]
    found = FormatTimings(rows, TrainFormat(), before_rounds_s=before_rounds_s)
    monkeypatch.setattr("channelslast.cli.find.find_format", lambda *args: found)
    printed = run("find", "squeezenet1_1", "--bs", "2", "--size", "32")
    assert said in " ".join(printed.split()) and "`budget" not in printed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch, size", ARCHITECTURES.items(), ids=ARCHITECTURES)
def test_summary_of_an_architecture(run, arch, size):
    printed = run("summary", arch, "--size", size, "--bs", 2, "--device", "cpu")
    assert re.search(r"channels last; (\S+ of \d+ layers|the one layer) with images", " ".join(printed.split()))


def test_record_holds_the_result_and_what_made_it(run, tmp_path):
    file = tmp_path / "record.json"
    arguments = ["summary", "raft_small", "--bs", 2, "--size", 128, "--amp_mode", "fp32", "--device", "cpu"]
    printed = run(*arguments, "--json", file)
    record = json.loads(file.read_text())
    assert record["command"] == f"channelslast {' '.join(map(str, arguments))} --json {file}"
    assert record["versions"]["torch"] == torch.__version__ and record["device"].startswith("cpu")
    assert (record["arch"], record["bs"], record["size"], record["dtype"]) == ("raft_small", 2, 128, "fp32")
    assert record["verdict"] in " ".join(printed.split())
    assert record["gpu"] is None and record["error"] is None and record["dense_gradients"] == []
    assert set(record["losers"]) & {event["module"] for event in record["events"]}
    assert 0 < record["channels_last_share"] < 1


@pytest.mark.filterwarnings("ignore")
def test_summary_of_several_architectures_with_record_and_picture(run, tmp_path):
    files = tmp_path / "record.json", tmp_path / "picture.png"
    options = ["--size", 32, "--bs", 2, "--device", "cpu", "--json", files[0], "--plot", files[1]]
    printed = run("summary", "resnet10t", "mobilenetv3_small_050", *options)
    assert printed.index("resnet10t:") < printed.index("ResNet (") < printed.index("mobilenetv3_small_050:")
    results = json.loads(files[0].read_text())["results"]
    assert [result["arch"] for result in results] == ["resnet10t", "mobilenetv3_small_050"]
    assert all(0 < result["channels_last_share"] <= 1 for result in results)
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore")
def test_summary_goes_on_after_an_architecture_that_rejects_its_images(run, capsys, tmp_path):
    options = ["--size", 32, "--bs", 2, "--device", "cpu", "--json", tmp_path / "a.json"]
    with pytest.raises(SystemExit) as ended:
        run("summary", "vit_tiny_patch16_224", "resnet10t", *options)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and "error: vit_tiny_patch16_224 rejects 2 images of 32 px: " in captured.err
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert "Rejected: rejects 2 images" in results[0]["error"]
    assert results[1]["verdict"] in " ".join(captured.out.split())


@pytest.mark.filterwarnings("ignore")
def test_summary_on_a_folder_of_images(run, digits_folder):
    printed = run("summary", "resnet10t", "--path", digits_folder, "--size", 32, "--bs", 4, "--device", "cpu")
    assert "4 x 3 x 32 x 32" in printed.splitlines()[0]


@pytest.mark.parametrize("option", ["--amp_mode", "--amp-mode"])
@pytest.mark.parametrize("mode, dtype", [("bf16", "bf16"), ("fp32", "fp32"), ("auto", "bf16")])
def test_precision_in_both_spellings_of_the_option(run, bf16_cpu, monkeypatch, option, mode, dtype):
    printed = run("summary", "resnet18", "--size", 64, "--bs", 2, "--device", "cpu", option, mode)
    assert f"{dtype} on cpu" in printed.splitlines()[0]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            ["resnet51a"],
            "error: resnet51a: no such model in fastai, torchvision or timm; did you mean resnet51q",
        ),
        (["qqqqqqqq"], "try xresnet18, resnet50 or, with timm, convnext_tiny"),
        ([], "summary: pass names of fastai, torchvision or timm models"),
        (["resnet18", "--bs", "0"], "--bs 0: pass a number above 0"),
        (["resnet18", "--size", "-3"], "--size -3: pass a number above 0"),
        (["resnet18", "--device", "abacus"], "--device abacus: "),
        (["resnet18", "--amp_mode", "fp8"], "--amp_mode fp8: pass one of auto, fp16, bf16, fp32"),
        (["vit_b_16", "--size", "64"], "vit_b_16 rejects 8 images of 64 px: "),
        (
            ["resnet18", "--size", "32", "--bs", "1"],
            "resnet18 rejects 1 images of 32 px: Expected more than 1",
        ),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_pass(fails, arguments, said):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert said in fails("summary", *arguments, *device)


def test_model_that_says_nothing_about_what_it_rejects(fails, monkeypatch):
    class Asserts(torch.nn.Module):
        def forward(self, x):
            raise AssertionError

    monkeypatch.setattr("channelslast.cli.summary.new_model", lambda *args, **kwargs: Asserts())
    assert "resnet18 rejects 8 images of 224 px: AssertionError" in fails("summary", "resnet18", "--device", "cpu")


@pytest.mark.parametrize("verbose", [False, True])
def test_traceback_of_a_model_is_printed_on_demand(run, capsys, monkeypatch, bf16_cpu, verbose):
    class Typo(torch.nn.Conv2d):
        def forward(self, x):
            return no_such_name  # noqa: F821

    for module in ("cli.summary", "zoo.learners"):
        monkeypatch.setattr(f"channelslast.{module}.new_model", lambda *args, **kwargs: Typo(3, 3, 1))
    for command, code in (("summary", 2), ("find", 1)):
        with pytest.raises(SystemExit) as ended:
            run(command, "resnet18", "--size", 32, "--device", "cpu", *(["--verbose"] if verbose else []))
        printed = capsys.readouterr().err
        assert ended.value.code == code and "name 'no_such_name' is not defined" in printed.splitlines()[-1]
        assert ("return no_such_name" in printed) == verbose
        assert verbose or len(printed.splitlines()) == 1


def test_json_that_cannot_be_written(run, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run("summary", "resnet18", "--size", 64, "--bs", 2, "--device", "cpu", "--json", tmp_path)
    assert f"--json {tmp_path}: Is a directory" in capsys.readouterr().err


def test_json_in_a_folder_that_is_none(fails):
    arguments = ["resnet18", "--device", "cpu", "--json", "/no/such/folder/a.json"]
    assert "--json /no/such/folder/a.json: there is no such folder" in fails("summary", *arguments)


def test_precision_that_is_replaced_is_told(run, capsys, bf16_cpu):
    run("summary", "resnet18", "--size", 64, "--bs", 2, "--device", "cpu", "--amp_mode", "fp32")
    assert capsys.readouterr().err == ""
    monkey = ["summary", "resnet18", "--size", 64, "--bs", 2, "--device", "cpu", "--amp_mode", "fp16"]
    sys.argv = ["channelslast", *map(str, monkey)]
    main()
    assert "amp_mode='fp16': the device 'cpu' has no fast arithmetic for it" in capsys.readouterr().err


def test_device_where_channels_last_is_not_reliable(fails, monkeypatch):
    monkeypatch.setattr("channelslast.cli.summary.supports_channels_last", lambda device: False)
    assert "--device cpu: channels last is not reliable" in fails("summary", "resnet18", "--device", "cpu")


# Every command


@pytest.mark.parametrize("command", ["summary", "find"])
@pytest.mark.parametrize(
    "arguments, said",
    [
        (["unet"], "unet: no such model in fastai, torchvision or timm; did you mean DynamicUnet?"),
        (["resnet18", "--bs", "many"], "argument --bs: invalid int value: 'many'"),
        (["resnet18", "--no-such"], "unrecognized arguments: --no-such"),
        (["resnet18", "--plot", "."], "--plot .: Is a directory"),
        (["resnet18", "--json", "."], "--json .: Is a directory"),
        (["resnet18", "--path", "/no/such/folder"], "--path /no/such/folder: there is no such folder"),
        (["resnet18", "nothing18", "--device", "cpu"], "error: nothing18: no such model"),
    ],
)
def test_bad_input_is_refused_before_long_work(fails, monkeypatch, command, arguments, said):
    for module in ("cli.summary", "zoo.learners"):
        monkeypatch.setattr(f"channelslast.{module}.new_model", None)
    assert said in fails(command, *arguments)


def test_version(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("--version")
    assert ended.value.code == 0 and capsys.readouterr().out == f"channelslast {__version__}\n"


def test_archs_lists_names(run):
    every = run("archs").split()
    assert len(every) == len(set(every)) and {"resnet50", "xresnet50", "DynamicUnet", "convnext_tiny"} <= set(every)
    assert run("archs", "UNET").split() == ["DynamicUnet"]
    found = run("archs", "resnet50*").split()
    assert "resnet50" in found and all(name.startswith("resnet50") for name in found)


def test_archs_that_finds_none_names_what_is_close(fails):
    said = fails("archs", "resnt50")
    assert "error: resnt50: no such name in fastai, torchvision or timm; did you mean resnet50" in said
    assert "`channelslast archs` lists all" in fails("archs", "q?q")


def test_help_is_not_slowed_down_by_what_commands_import():
    code = (
        "import sys; from channelslast.cli import main; main(); print({'timm', 'channelslast.zoo'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "COMMAND" in printed.stdout and printed.stdout.splitlines()[-1] == "set()"


def test_unknown_command(fails):
    assert fails("sumary") == "channelslast: error: sumary: no such command; pass one of summary, find, archs"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(run, arguments):
    printed = run(*arguments)
    assert "  summary " in printed and "  find " in printed


def test_help_of_a_command_tells_its_options(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("summary", "--help")
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(option in printed for option in ("arch", "--bs", "--size", "--device", "--json", "--path", "--plot"))
    assert "--amp-mode" in printed and "--amp_mode" in printed


def test_command_is_installed():
    code = "from importlib.metadata import entry_points as e; print(*e(group='console_scripts', name='channelslast'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "channelslast.cli:main" in printed


# find


@pytest.fixture
def find(run, monkeypatch, bf16_cpu):
    "A function that runs `channelslast find` on the CPU, for the shortest time."
    for name, value in {"N_ROUNDS": 2, "FEW_STEPS": 1, "ENOUGH_STEPS": 1, "ENOUGH_S": 0}.items():
        monkeypatch.setattr(f"channelslast.find.plan.{name}", value)
    return lambda *arguments: run("find", "--device", "cpu", "--size", 32, "--bs", 4, *arguments)


@pytest.mark.filterwarnings("ignore")
def test_find_several_architectures_with_record_and_picture(find, tmp_path, capsys):
    files = tmp_path / "record.json", tmp_path / "picture.png"
    options = ["--opt", "fused", "--built-in", "--verify", "--json", files[0], "--plot", files[1]]
    printed = find("resnet10t", "mobilenetv3_small_050", *options)
    assert printed.count("Format   ") == 2 and printed.count("Again: ") == 2 and "fastai's own" in printed
    assert printed.index("resnet10t:") < printed.index("mobilenetv3_small_050:")
    record = json.loads(files[0].read_text())
    assert record["command"].startswith("channelslast find --device cpu") and record["versions"]["torch"]
    first, second = record["results"]
    assert (first["arch"], second["arch"]) == ("resnet10t", "mobilenetv3_small_050")
    formats = ["channels last bf16", "contiguous fp32", "contiguous bf16", "channels last fp32"]
    for result in record["results"]:
        assert [row["format"] for row in result["rows"]][:4] == formats
        assert all(row["format"] in formats or row["format"].endswith(" fused") for row in result["rows"])
        assert all(row["ms"] > 0 and row["error"] is None and row["peak_bytes"] is None for row in result["rows"])
        assert result["built_in"]["ms"] > 0 and result["verified"]["best_vs_fastest"] >= 1
        assert result["opt"] == "fused" and result["bs"] == 4 and result["shapes"] == [[4, 3, 32, 32]]
    assert files[1].read_bytes().startswith(b"\x89PNG")


ALL_KINDS = {
    "DynamicUnet": 32,
    "deeplabv3_mobilenet_v3_large": 32,
    "mc3_18": 16,
    "ssdlite320_mobilenet_v3_large": 32,
    "inception_v3": 80,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch, size", ALL_KINDS.items(), ids=ALL_KINDS)
def test_find_trains_every_kind_of_architecture(find, arch, size):
    printed = find(arch, "--size", size, "--bs", 2, "--formats", "contiguous fp32, channels last fp32")
    assert "channels last fp32  " in printed and "Error" not in printed


@pytest.mark.filterwarnings("ignore")
def test_find_on_a_folder_of_images(find, digits_folder):
    printed = find("resnet18", "--path", digits_folder, "--formats", "channels  last bf16")
    assert "(input shape: 4 x 3 x 32 x 32)" in printed
    assert [line.split("  ")[0] for line in printed.splitlines() if "fp32  " in line or "bf16  " in line] == [
        "contiguous fp32",
        "channels last bf16",
    ]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "find: pass names of fastai, torchvision or timm models"),
        (
            ["resnet18", "resnet51a"],
            "error: resnet51a: no such model in fastai, torchvision or timm; did you",
        ),
        (["resnet18", "--opt", "adagrad"], "--opt adagrad: pass one of adam, fused"),
        (["resnet18", "--bs", "0"], "--bs 0: pass a number above 0"),
        (["resnet18", "--budget", "-1"], "--budget -1.0: pass a number above 0"),
        (["resnet18", "--formats", "fp16"], "--formats 'fp16': 'fp16' is no format: did you mean "),
        (
            ["resnet18", "--formats", "contiguous fp32,"],
            "--formats 'contiguous fp32,': '' is no format: did you mean ",
        ),
        (["resnet18", "--json", "/no/such/folder/a.json"], "--json /no/such/folder/a.json: there is no such"),
        (["resnet18", "--plot", "/no/such/folder/a.png"], "--plot /no/such/folder/a.png: there is no such"),
        (["resnet18", "--plot", "a.xyz"], "--plot a.xyz: "),
        (["resnet18", "--path", "/no/such/folder"], "--path /no/such/folder: there is no such folder"),
        (["DynamicUnet", "--path", "."], "error: DynamicUnet: no such classification model"),
    ],
)
def test_find_refuses_bad_input_before_it_begins(fails, arguments, said):
    assert said in fails("find", "--device", "cpu", *arguments)


def test_interrupt_ends_with_a_line_and_the_status_of_one(run, capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(find_command, "run", interrupted)
    with pytest.raises(SystemExit) as ended:
        run("find", "resnet18")
    assert ended.value.code == 130 and capsys.readouterr().err.split("\n") == ["", "channelslast: interrupted", ""]


@pytest.mark.filterwarnings("ignore")
def test_find_goes_on_after_an_architecture_that_cannot_train(find, capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        find("vit_tiny_patch16_224", "resnet10t", "--formats", "contiguous fp32", "--json", tmp_path / "a.json")
    captured = capsys.readouterr()
    assert ended.value.code == 1 and "error: vit_tiny_patch16_224" in captured.err and "ResNet (input" in captured.out
    results = json.loads((tmp_path / "a.json").read_text())["results"]
    assert "error" in results[0] and results[1]["best"] == "contiguous fp32"


@pytest.mark.filterwarnings("ignore")
def test_find_holds_one_architecture_at_a_time(find, monkeypatch):
    models, alive, real = [], [], find_command.new_learner

    def watch(*args):
        alive.append([model() is not None for model in models])
        learn = real(*args)
        models.append(weakref.ref(learn.model))
        return learn

    monkeypatch.setattr(find_command, "new_learner", watch)
    find("resnet18", "mobilenetv3_small_050", "resnet10t", "--formats", "contiguous fp32")
    assert alive == [[], [False], [False, False]] and models[-1]() is None
