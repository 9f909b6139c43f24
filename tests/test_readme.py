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
COMPILED, LARGE, ON_CPU = "nvidia_h200-compile", "nvidia_h200-fused_adamw-b128", "cpu_2_threads-b8-64px"  # of the atlas
EARLIER = "h200_fastest_earlier", "h200_fastest_before"  # runs of the six architectures
SITE = ROOT / "nbs" / "site"


def code_blocks(file, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)


def prose(file):
    "The text of a page in one line, without its blocks of code and the targets of its links."
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())


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
    assert found["geometric_mean_times_fastais_own"] == pytest.approx(statistics.geometric_mean(times), abs=0.01)
    first, second = (record(name)["geometric_mean_times_fastais_own"] for name in EARLIER)
    rows, large, on_cpu = (compared(atlas(end)) for end in ("nvidia_h200", LARGE, ON_CPU))
    sizes = sorted(int(row["batch_size"]) for row in rows)
    items_per_s = statistics.median(float(row["items_per_s"]) for row in rows)
    assert (len(results), len(large)) == (6, 20)
    assert all("compiled" not in row["pick"] for row in (*results, *rows, *large))
    sentences = [
        f"the training steps of {len(rows)} architectures are about {{}} times as fast ({{}} to {{}}) as with".format(
            *in_words(times_of(rows))
        ),
        "and {} times ({} to {}) as fast as those of a plain Learner".format(
            *in_words(times_of(rows, "contiguous_fp32"))
        ),
        f"batches of {sizes[0]} to {sizes[-1]} images, fastai's default Adam, nothing compiled",
        f"): {statistics.geometric_mean(times):.1f} times in the mean, in two earlier runs {first:.1f}",
        f"and {second:.1f} times",
        f"{items_per_s:,.0f} images a second in the median",
    ]
    cpu, amd = (record(name)["results"][0] for name in ("cpu_fastest", "cpu_fastest_amd"))
    pixels = re.search(r"--size (\d+)", record("cpu_fastest")["command"])[1]
    unet = record("h200_swaps_unet")["results"]["DynamicUnet resnet34 32"]
    kept, own = (f"{unet['rows'][name]['busy_ms']:.0f}" for name in ("swaps", "fastai's own"))
    in_readme = [
        "With 128 images, where fastai's own has PyTorch's fused AdamW too, it is {} times ({} to {};".format(
            *in_words(times_of(large))
        ),
        f"an xresnet18 ({cpu['bs']} images of {pixels} pixels) trains {cpu['times_fastais_own']:.1f} times as fast",
        f"on another processor {amd['times_fastais_own']:.1f} times",
        f"and {len(on_cpu)} architectures ({{}} images of {{}} pixels) {{}} times ({{}} to {{}};".format(
            on_cpu[0]["batch_size"], on_cpu[0]["img_size"], *in_words(times_of(on_cpu))
        ),
        f"with {unet['bs']} images takes the GPU {kept} ms then, and {own} ms as fastai's own",
    ]
    for page, its_own in zip(FRONT, (in_readme, [])):
        text = prose(page).replace("**", "")
        for sentence in (*sentences, *its_own):
            assert sentence in text
    known = set(re.findall(r"\d[\d,]*(?:\.\d+)?", " ".join([*sentences, *in_readme])))
    known |= {figure for words in figures_elsewhere() for figure in words}
    assert {figure for page in FRONT for figure in figures(page)} <= known


def figures_elsewhere():
    "Those of the first page that other tests, or none, compare."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    yield settings["min_python"], *re.findall(r"[\d.]+", settings["requirements"])
    yield "1,797", "2.0"  # scikit-learn's digits, the licence
    yield minutes_of_compiled_searches()
    for row in two_gpus("resnet50", 64):
        yield str(row["bs"]), *(f"{row['rows'][name]['ms']:.0f}" for name in ("eager", "graph"))


def minutes_of_compiled_searches():
    minutes = [result["seconds"] / 60 for result in record("h200_fastest_compiled")["results"]]
    return [f"{min(minutes):.1f}", f"{max(minutes):.1f}"]


def test_what_is_said_of_compiling_is_what_the_record_says():
    results = record("h200_fastest_compiled")["results"]
    low, high = minutes_of_compiled_searches()
    assert f"a search of {low} to {high} minutes on an H200" in prose(FRONT[0])
    assert "one to three minutes on an H200" in (SITE / "howto.md").read_text() and 1 <= float(low) < float(high) <= 3
    assert "for twelve architectures" in prose(SITE / "atlas.md") and len(results) == 12
    assert {result["bs"] for result in results} == {128}
    assert all("compiled graph" in result["pick"] for result in results)
    assert all("--opt fused" in result["made_with"]["command"] for result in results)


def atlas(end="nvidia_h200"):
    "The last row of each architecture, of the file of the atlas whose name ends so."
    (file,) = (RECORDS / "atlas").glob(f"*-{end}.csv")
    with file.open(newline="") as stream:
        return {row["model"]: row for row in csv.DictReader(stream)}


def compared(rows):
    "Those that were compared with fastai's own."
    return [row for row in rows.values() if row["times_fastais_own"]]


def times_of(rows, other="fastais_own"):
    return [float(row[f"{other}_ms"]) / float(row["ms"]) for row in rows]


def test_figures_of_the_atlas_are_those_of_its_rows():
    page = prose(SITE / "atlas.md")
    files = typical, _, large = [atlas(end) for end in ("nvidia_h200", COMPILED, LARGE)]
    rows, others = compared(typical), [row for row in typical.values() if not row["times_fastais_own"]]
    mean, low, high = in_words(times_of(rows))
    plain, least, most = in_words(times_of(rows, "contiguous_fp32"))
    n_slower = sum(float(row["contiguous_fp32_ms"]) < float(row["fastais_own_ms"]) for row in rows)
    words = [
        f"Typical use: {len(rows)} of {len(typical)} architectures train about {mean} times as fast as with fastai's",
        f"own, in the geometric mean ({low} to {high}), and {plain} times as fast as a plain Learner",
        f"({least} to {most}), which is faster than fastai's own in {n_slower} of them. The other {len(others)} are",
        "for video, with which fastai's own fails",
    ]
    assert " ".join(words) in page.replace("**", "")
    assert all(row["task"] == "video" and "fastai's own: RuntimeError" in row["error"] for row in others)
    seconds = [float(row["search_s"]) for row in typical.values()]
    assert f"A search took {min(seconds):.0f} to {max(seconds):.0f} seconds" in page
    assert all("--each" not in row["command"] for file in files for row in file.values())  # a user's searches
    mean, low, high = in_words(times_of(compared(large)))
    assert f"fused AdamW too: {mean} times as fast, of {len(compared(large))} architectures ({low} to {high})" in page
    twelve = {result["arch"] for result in record("h200_fastest_compiled")["results"]}
    assert "Twelve of them are those of the notebook" in page and len(twelve) == 12 and twelve <= set(large)
    cpu = compared(atlas(ON_CPU))
    mean, low, high = in_words(times_of(cpu))
    assert {(row["batch_size"], row["img_size"]) for row in cpu} == {("8", "64")}
    assert f"8 images of 64 pixels: {mean} times as fast, of {len(cpu)} architectures ({low} to {high})" in page
    spread = [float(row["fastais_own_iqr"]) / float(row["fastais_own_ms"]) >= 0.1 for row in rows]
    assert sum(spread) > len(spread) / 2 and "differ by a tenth or more in most rows" in page


def test_what_the_atlas_says_of_compiling_and_of_what_is_left_is_in_its_rows():
    page = prose(SITE / "atlas.md")
    typical, compiled = atlas(), atlas(COMPILED)
    picks = [
        arch for arch in compiled if "compiled graph" in compiled[arch]["pick"] and "graph" in typical[arch]["pick"]
    ]
    gains = {arch: float(typical[arch]["ms"]) / float(compiled[arch]["ms"]) for arch in picks}
    busy = [a for a in picks if all(float(rows[a]["gpu_busy"] or 0) >= 0.9 for rows in (typical, compiled))]
    mean, low, high = in_words(gains.values())
    words = f"{len(picks)} of {len(compiled)} picks are compiled and can be set against one with a CUDA graph"
    assert words in page and f"without compiling: {mean} times as fast ({low} to {high})" in page
    mean, low, high = in_words([gains[arch] for arch in busy])
    assert f"90% of both steps, {len(busy)} of them, it is {mean} times too ({low} to {high})" in page
    assert all("--caches" in row["command"] for row in compiled.values())
    own = [float(compiled[a]["fastais_own_ms"] or 0) > float(typical[a]["fastais_own_ms"] or 0) for a in picks]
    assert sum(own) > len(own) / 2 and "took longer in most rows of that run" in page
    waits = [row for row in typical.values() if "graph fused" in row["pick"] and 0 < float(row["gpu_busy"] or 0) < 0.9]
    shares = [float(row["gpu_busy"]) for row in waits]
    words = f"in {len(waits)} picks with a CUDA graph and fused steps the GPU is busy for"
    assert f"{words} {100 * min(shares):.0f} to {max(shares):.0%} of the step" in page
    assert f"differ by up to {max(float(row['iqr']) / float(row['ms']) for row in waits):.0%} of it" in page


def two_gpus(arch, bs):
    "What was measured of an architecture on two GPUs, not compiled."
    rows = [row for row in record("h200x2_speed")["speed"] if "graph" in row["rows"]]
    return [row for row in rows if (row["processes"], row["arch"], row["bs"]) == (2, arch, bs)]


def test_figures_of_two_gpus_are_those_of_the_record():
    plain, sync = sorted(two_gpus("resnet50", 64), key=lambda row: row["norm"])
    assert (plain["norm"], sync["norm"]) == ("BatchNorm", "SyncBatchNorm")
    ms = [f"{row['rows'][name]['ms']:.0f}" for row in (plain, sync) for name in ("graph", "eager")]
    readme, howto = (prose(file) for file in (FRONT[0], SITE / "howto.md"))
    words = "{} ms with them and {} ms without; with SyncBatchNorm, fastai's default there, {} ms and {} ms"
    assert words.format(*ms) in readme
    assert "{2} ms in place of {3} (without SyncBatchNorm {0} in place of {1})".format(*ms) in howto


def test_figures_of_the_earlier_runs_are_those_of_the_records():
    page = prose(SITE / "atlas.md")
    runs = [record(name)["results"] for name in (*EARLIER, "h200_fastest")]
    first, second, _ = (in_words([result["times_fastais_own"] for result in results]) for results in runs)
    assert (
        "they trained {} ({} to {};".format(*first) in page
        and "and {} times as fast ({} to {};".format(*second) in page
    )
    assert all([result["arch"] for result in results] == [result["arch"] for result in runs[0]] for results in runs)
    rounds = [[len(result["fastais_own"]["samples"]) for result in results] for results in runs]
    counts = [f"{min(each)} to {max(each)}" for each in rounds]
    assert "few of them, {}, {}, and {} here".format(*counts) in page
    samples = [result["fastais_own"]["samples"] for results in runs for result in results]
    assert (
        max(max(each) / min(each) for each in samples) == pytest.approx(5 / 3, abs=0.05)
        and "differ by up to two thirds" in page
    )
    all_three = [result for results in runs for result in results if result["arch"] == "resnet50"]
    own = [f"{result['fastais_own']['ms']:.0f}" for result in all_three]
    (picked,) = {f"{row['ms']:.0f}" for each in all_three for row in each["again"] if row["format"] == each["pick"]}
    assert f"resnet50 took {picked} ms a step in all three, fastai's own {{}}, {{}} and {{}} ms".format(*own) in page


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
