"The README and the pages of the site: their code runs as pasted, their figures are those of the records."

import csv
import json
import re
import statistics
from configparser import ConfigParser
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot as plt

from channelslast import zoo

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "nbs" / "benchmarks"
FRONT = [ROOT / "README.md", ROOT / "nbs" / "index.md"]
SITE = ROOT / "nbs" / "site"


def code_blocks(file, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)


def prose(file):
    "The text of a page without its blocks of code and the targets of its links."
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"\]\([^)]*\)", "]", text)


def record(name):
    return json.loads((RECORDS / f"{name}.json").read_text())


@pytest.fixture
def in_a_shell(tmp_path, monkeypatch, digits_folder, quick_search):
    "A folder of its own, no windows, a few digits and searches of two seconds."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "digits_folder", lambda: digits_folder)
    matplotlib.use("agg")
    yield
    plt.close("all")


def run(blocks):
    "Run blocks of code one after the other, as they stand; return the names they leave behind."
    names = {"__name__": "page"}
    for block in blocks:
        exec(block, names)
    return names


def test_first_snippet_trains_as_pasted(in_a_shell):
    learn = run(code_blocks(FRONT[0])[:1])["learn"]
    assert len(learn.recorder.values) == 2


def test_both_first_pages_have_the_same_snippet_and_figures():
    readme, index = FRONT
    assert code_blocks(readme)[0] == code_blocks(index)[0]
    assert set(figures(index)) <= set(figures(readme))


def figures(file):
    "The numbers in the prose of a page."
    return re.findall(r"(?<![\w.`])\d[\d,]*(?:\.\d+)?(?![\w`]|\.\d)", prose(file))


def in_words(times):
    "The geometric mean, the least and the most, as pages tell them."
    low, mean, high = min(times), statistics.geometric_mean(times), max(times)
    return [f"{mean:.1f}", f"{low:.2f}" if low < 1 else f"{low:.1f}", f"{high:.1f}"]


def test_figures_of_the_first_page_are_those_of_the_record():
    found = record("h200_fastest")
    results = found["results"]
    times = [result["times_fastais_own"] for result in results]
    sizes = [result["bs"] for result in results]
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    mean = statistics.geometric_mean(times)
    assert found["geometric_mean_times_fastais_own"] == pytest.approx(mean, abs=0.01)
    earlier = in_words([result["times_fastais_own"] for result in record("h200_fastest_earlier")["results"]])
    typical = [row for row in atlas().values() if row["times_fastais_own"]]
    assert all(min(sizes) <= int(row["batch_size"]) <= max(sizes) for row in typical)
    gains = [str(len(typical)), *in_words(times_of(typical))]
    large = atlas("-fused_adamw-b128").values()
    known = {*in_words(times), *earlier, *minutes_of_compiled_searches(), str(min(sizes)), str(max(sizes)), *gains}
    known |= {*(row["batch_size"] for row in large), *in_words(times_of(large))[1:]}
    known |= {settings["min_python"], *re.findall(r"[\d.]+", settings["requirements"])}
    known |= {"1,797", "2.0"}  # scikit-learn's digits, the licence
    cpu = [*record("cpu_fastest")["results"], *record("cpu_fastest_amd")["results"]]
    known |= {f"{result['times_fastais_own']:.1f}" for result in cpu}
    known |= {*(str(result["bs"]) for result in cpu), re.search(r"--size (\d+)", record("cpu_fastest")["command"])[1]}
    unet = record("h200_swaps_unet")["results"]["DynamicUnet resnet34 32"]
    known |= {str(unet["bs"]), *(f"{unet['rows'][name]['busy_ms']:.0f}" for name in ("fastai's own", "swaps"))}
    known |= {f"{row['rows'][name]['ms']:.0f}" for row in two_gpus("resnet50", 64) for name in ("eager", "graph")}
    for page in FRONT:
        assert set(figures(page)) <= known
        assert {*in_words(times), *earlier, *gains} <= set(figures(page))
        assert "The six of the picture" in page.read_text()
    assert len(results) == 6 and len(large) == 20
    assert all("compiled" not in row["pick"] for row in (*results, *typical, *large))


def minutes_of_compiled_searches():
    minutes = [result["seconds"] / 60 for result in record("h200_fastest_compiled")["results"]]
    return [f"{min(minutes):.1f}", f"{max(minutes):.1f}"]


def test_what_is_said_of_compiling_is_what_the_record_says():
    results = record("h200_fastest_compiled")["results"]
    low, high = minutes_of_compiled_searches()
    assert f"a search of {low} to {high} minutes on an H200" in " ".join(prose(FRONT[0]).split())
    assert "one to two minutes" in (SITE / "howto.md").read_text() and 1 <= float(low) < float(high) <= 2
    assert "for twelve architectures" in " ".join(prose(SITE / "atlas.md").split()) and len(results) == 12
    assert {result["bs"] for result in results} == {128}
    assert all("compiled graph" in result["pick"] for result in results)
    assert all("--opt fused" in result["made_with"]["command"] for result in results)


def atlas(end=""):
    "The last row of each architecture on the H200, of the file of the atlas whose name ends so."
    (file,) = (RECORDS / "atlas").glob(f"*-nvidia_h200{end}.csv")
    with file.open(newline="") as stream:
        return {row["model"]: row for row in csv.DictReader(stream)}


def times_of(rows):
    return [float(row["times_fastais_own"]) for row in rows if row["times_fastais_own"]]


def test_figures_of_typical_use_in_the_atlas_are_those_of_its_rows():
    page = " ".join(prose(SITE / "atlas.md").split())
    rows = list(atlas().values())
    times, others = times_of(rows), [row for row in rows if not row["times_fastais_own"]]
    mean, low, high = in_words(times)
    assert f"{len(times)} of {len(rows)} architectures train {mean} times as fast as with fastai's own, in the" in page
    assert f"({low} to {high}); the other {len(others)} are for video, with which fastai's own fails" in page
    assert all(row["task"] == "video" and "fastai's own: RuntimeError" in row["error"] for row in others)
    seconds = [float(row["search_s"]) for row in rows]
    assert f"A search took {min(seconds):.0f} to {max(seconds):.0f} seconds" in page
    waits = [float(row["gpu_busy"]) for row in rows if "graph fused" in row["pick"] and row["gpu_busy"]]
    waits = [busy for busy in waits if busy < 0.8]
    words = f"For {len(waits)} small networks, as mobilenetv4_conv_small, Python takes longer"
    assert words in page and f"GPU busy {min(waits):.0%}"[:-1] in page and f"to {max(waits):.0%}" in page
    assert all("--each" not in row["command"] for row in rows)  # none had less time than a user's search


def test_other_figures_of_the_atlas_are_those_of_its_rows():
    page = " ".join(prose(SITE / "atlas.md").split())
    typical, compiled, large = (atlas(end) for end in ("", "-compile", "-fused_adamw-b128"))
    with_graph = [{arch for arch, row in rows.items() if "graph" in row["pick"]} for rows in (typical, compiled)]
    graphs = set.intersection(*with_graph)
    gain = statistics.geometric_mean(float(typical[arch]["ms"]) / float(compiled[arch]["ms"]) for arch in graphs)
    assert f"the picks of {len(graphs)} architectures that have a CUDA graph in both tables train {gain:.1f}" in page
    assert all("--caches" in row["command"] for row in compiled.values())
    mean, low, high = in_words(times_of(large.values()))
    words = f"fused AdamW: {mean} times as fast, of {len(times_of(large.values()))} architectures ({low} to {high})"
    assert words in page
    rows = [row for file in (typical, compiled, large) for row in file.values() if row["times_fastais_own"]]
    spread = [float(row["fastais_own_iqr"]) / float(row["fastais_own_ms"]) >= 0.1 for row in rows]
    assert sum(spread) > len(spread) / 2 and "differ by a tenth or more in most rows" in page


def two_gpus(arch, bs):
    "What was measured of an architecture on two GPUs, not compiled."
    rows = [row for row in record("h200x2_speed")["speed"] if "graph" in row["rows"]]
    return [row for row in rows if (row["processes"], row["arch"], row["bs"]) == (2, arch, bs)]


def test_figures_of_two_gpus_are_those_of_the_record():
    plain, sync = sorted(two_gpus("resnet50", 64), key=lambda row: row["norm"])
    assert (plain["norm"], sync["norm"]) == ("BatchNorm", "SyncBatchNorm")
    ms = [f"{row['rows'][name]['ms']:.0f}" for row in (plain, sync) for name in ("graph", "eager")]
    readme, howto = (" ".join(prose(file).split()) for file in (FRONT[0], SITE / "howto.md"))
    words = "{} ms with them and {} ms without; with SyncBatchNorm, fastai's default there, {} ms and {} ms"
    assert words.format(*ms) in readme
    assert "{2} ms in place of {3} (without SyncBatchNorm {0} in place of {1})".format(*ms) in howto


def test_figures_of_the_earlier_run_are_those_of_the_records():
    page = " ".join(prose(SITE / "atlas.md").split())
    earlier, now = (record(name)["results"] for name in ("h200_fastest_earlier", "h200_fastest"))
    times = [result["times_fastais_own"] for result in earlier]
    words = "they trained {} times as fast ({} to {};".format(*in_words(times))
    assert [result["arch"] for result in earlier] == [result["arch"] for result in now] and words in page
    rounds = [[len(result["fastais_own"]["samples"]) for result in results] for results in (earlier, now)]
    (least, most), (least_now, most_now) = ((min(each), max(each)) for each in rounds)
    assert f"{least} to {most} in the earlier run, {least_now} to {most_now} here" in page
    picked = [row["ms"] for result in [*earlier, *now] for row in result["again"] if row["format"] == result["pick"]]
    assert f"The steps of the picks, {min(picked):.0f} to {max(picked):.0f} ms" in page


def test_figures_against_the_built_in_are_those_of_the_records():
    page = prose(SITE / "differs.md")
    fp16, bf16, cpu = (record(name) for name in ("h200_resnet50_fp16", "h200_resnet50_bf16", "cpu_xresnet18_bf16"))
    for found, digits in ((fp16, 2), (bf16, 2), (cpu, 1)):
        speed, step = found["throughput_vs_builtin"], found["step_vs_plain_loop"]
        assert f"| {speed:.{digits}f} times | {step:.2f} times |" in page
    assert f"{fp16['callback_us_per_batch']:.0f} microseconds" in page
    assert f"{fp16['conversion_ms']['to_channels_last']:.0f} ms" in page
    assert len(re.findall(r"[\d.]+ (?:times|ms|microseconds)", page)) == 8


@pytest.mark.parametrize("name", ["howto", "precision"])
def test_code_of_a_page_runs_as_it_stands(name, in_a_shell):
    blocks = code_blocks(SITE / f"{name}.md")
    blocks = [block for block in blocks if "import lightning" not in block]
    assert blocks
    run(blocks)


def test_code_for_lightning_runs_as_it_stands(in_a_shell):
    pytest.importorskip("lightning")
    run([block for block in code_blocks(SITE / "howto.md") if "import lightning" in block])


def test_links_between_files_lead_somewhere():
    pages = [*FRONT, *SITE.glob("*.md"), ROOT / "CONTRIBUTING.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
