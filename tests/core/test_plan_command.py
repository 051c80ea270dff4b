# SPDX-License-Identifier: Apache-2.0
"""`magi plan` as a user runs it: named masks, the figures, the pictures."""

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from typer.testing import CliRunner

from magi_attention.cli.main import app
from magi_attention.cli.plan.masks import read_mask
from magi_attention.cli.plan.options import PlanOptions
from magi_attention.cli.plan.study import SIMULATED_DEGREES, PlanStudy, find_algorithm
from magi_attention.common import workloads
from magi_attention.common.enum import DispatchAlgType


def run(*flags):
    result = CliRunner().invoke(app, ["plan", *map(str, flags)])
    assert result.exit_code == 0, result.output
    return result.stdout


def figures_of(*flags):
    return json.loads(run("--json", *flags))


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_named_masks(name):
    figures = figures_of("--mask", name.replace("_", "-"), "--tokens", 4096, "--ranks", 4)
    assert figures["mask"]["pairs"] == workloads.make(name, 4096).area()
    assert figures["mask"]["name"] == name


def test_help_lists_the_named_masks():
    words = re.split(r"[\s,.│]+", run("--help"))
    assert set(workloads.WORKLOADS) <= set(words)


CAUSAL = ["--mask", "causal", "--tokens", "4096"]


@pytest.mark.parametrize(("output", "lines"), [("", 1), (" >&-", 0)])
def test_a_closed_output_is_not_in_the_way(output, lines):
    command = f"exec {shlex.quote(sys.executable)} -m magi_attention.cli plan {' '.join(CAUSAL)} --ranks 2 --json"
    done = subprocess.run(["sh", "-c", command + output], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", lines)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give one of --mask NAME --tokens N, --cu-seqlens FILE and --slices FILE; none was given"),
        ([*CAUSAL, "--cu-seqlens", "ends.txt"], "--mask and --cu-seqlens were given"),
        (["--mask", "causal"], "--mask causal needs --tokens N"),
        (["--mask", "odd", "--tokens", "4096"], "there is no mask 'odd'; take one of full, causal"),
        ([*CAUSAL, "--full"], "--causal/--full goes with --cu-seqlens"),
        (["--cu-seqlens", "ends.txt", "--tokens", "9"], "the last number of --cu-seqlens is the length"),
        (["--cu-seqlens", "ends.txt", "--causal", "--window", "4", "0"], "leave --causal/--full away"),
        (
            ["--cu-seqlens", "ends.txt", "--window", "-2", "0"],
            "--window takes numbers of keys, or -1 for all, not -2 0",
        ),
        (["--cu-seqlens", "nowhere.txt"], "nowhere.txt"),
        ([*CAUSAL, "--cu-seqlens-k", "ends.txt"], "--cu-seqlens-k goes with --cu-seqlens"),
        ([*CAUSAL, "--tokens-k", "64"], "--tokens-k goes with --slices"),
        (["--cu-seqlens", "ends.txt", "--cu-seqlens-k", "more.txt"], "ends.txt holds 3 numbers and more.txt 4"),
        ([*CAUSAL, "--hierarchical"], "--hierarchical needs several nodes of equally many ranks, unlike 8 ranks"),
        ([*CAUSAL, "--simulate", "20", "--hierarchical"], "20 ranks in nodes of 8; give --nodes"),
        ([*CAUSAL, "--nodes", "2", "--hierarchical", "--qo"], "--hierarchical and --qo cannot be combined"),
        ([*CAUSAL, "--qo", "--overlap-degree", "2"], "leave --overlap-degree 2 away"),
        ([*CAUSAL, "--simulate", "0"], "--simulate must be at least 1, not 0"),
        ([*CAUSAL, "--ranks", "0"], "--ranks must be at least 1, not 0"),
        ([*CAUSAL, "--ranks", "5000"], "cannot be shared by 5000 ranks"),
        ([*CAUSAL, "--ranks", "16", "--simulate", "32"], "--simulate 32 and --ranks 16 differ"),
        ([*CAUSAL, "--ranks", "8", "--simulate", "32"], "--simulate 32 and --ranks 8 differ"),
        ([*CAUSAL, "--simulate", "12", "--nodes", "5"], "--nodes 5 must divide the 12 ranks"),
        ([*CAUSAL, "--link", "0"], "--link must be a number above 0, not 0"),
        ([*CAUSAL, "--link", "inf"], "--link must be a number above 0, not inf"),
        (["--mask", "causal", "--tokens", "5000000000"], "--tokens must be at most 2147483647, not 5000000000"),
        (["--cu-seqlens", "huge.txt"], "huge.txt, entry 3: 5000000000 is too large; a sequence can have 2147483647"),
        ([*CAUSAL, "--heads-kv", "5"], "--heads-q 32 must be a multiple of --heads-kv 5"),
        ([*CAUSAL, "--overlap-degree", "999"], "--overlap-degree must be at most 64"),
        ([*CAUSAL, "--overlap-degree", "many"], "--overlap-degree must be 0 or more, or auto, not many"),
        ([*CAUSAL, "--algorithm", "odd"], "--algorithm odd is none of backtracking-pruning"),
        ([*CAUSAL, "--algorithm", "topp-heap", "--uneven"], "uneven_shard=True cannot have"),
        ([*CAUSAL, "--png", "plan.gif"], "--png plan.gif must end in one of .png"),
        ([*CAUSAL, "--html", "nowhere/plan.html"], "make it first"),
        ([*CAUSAL, "--html", "plan.png"], "--html plan.png must end in one of .html"),
    ],
)
def test_bad_flags_are_told(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "ends.txt").write_text("0 64 128")
    (tmp_path / "more.txt").write_text("0 64 128 256")
    (tmp_path / "huge.txt").write_text("0 64 5000000000")
    result = CliRunner().invoke(app, ["plan", *flags])
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("kind", DispatchAlgType)
def test_every_algorithm_has_its_name(kind):
    assert find_algorithm(kind.value.replace("_", "-")).type is kind


def test_json_holds_the_documented_figures():
    flags = ["--mask", "varlen_causal", "--tokens", 20000, "--simulate", 4, "--nodes", 2, "--overlap-degree", "auto"]
    figures = figures_of(*flags, "--tflops", 300, "--link", 25, "--nvlink", 200)
    assert set(figures) == {
        "version", "mask", "plan", "compared", "assumed", "predicted", "ranks", "simulation"
    }  # fmt: skip
    assert figures["version"] == 1
    plan, ranks = figures["plan"], figures["ranks"]
    assert plan["ranks"] == len(ranks) == 4
    assert plan["ranks_per_node"] == 2
    assert plan["padding"] == plan["chunk_size"] * plan["chunks"] - 20000
    assert sum(rank["pairs"] for rank in ranks) == figures["mask"]["pairs"]
    assert sum(rank["tokens"] for rank in ranks) == 20000
    assert sum(rank["rows_received"] for rank in ranks) == sum(rank["rows_sent"] for rank in ranks)
    assert sum(rank["rows_received"] for rank in ranks) == plan["rows_received"] >= plan["rows_received_lower_bound"]
    assert plan["imbalance"] == pytest.approx(max(rank["pairs"] for rank in ranks) * 4 / figures["mask"]["pairs"])
    compared = figures["compared"]
    assert set(compared) == {"all_gather", "ring", "min_heap"}
    assert compared["ring"]["rows_received"] == compared["all_gather"]["rows_received"] == 3 * 20000
    cluster = figures["assumed"]["cluster"]
    assert (cluster["forward_tflops"], cluster["link_gbs"], cluster["nvlink_gbs"]) == (300, 25, 200)
    assert figures["assumed"]["layer"] == {"heads_q": 32, "heads_kv": 8, "head_dim": 128, "bytes_per_number": 2}
    by_degree = {row["overlap_degree"]: row for row in figures["simulation"]}
    assert set(by_degree) == {*SIMULATED_DEGREES, plan["overlap_degree"]}
    predicted = figures["predicted"]
    assert {key: by_degree[plan["overlap_degree"]][key] for key in predicted} == predicted
    assert predicted["forward_seconds"] == max(rank["forward_seconds"] for rank in ranks)
    assert predicted["efficiency"] == pytest.approx(
        predicted["ideal_seconds"] / (predicted["forward_seconds"] + predicted["backward_seconds"])
    )


def test_the_page_shows_what_the_example_prints():
    page = (Path(__file__).parents[2] / "docs" / "plan-command.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^magi plan (.* --json)$", page, re.MULTILINE)
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    figures = json.loads(run(*command.split()))

    def check(shown, printed):
        for name, value in shown.items():
            if isinstance(value, dict):
                check(value, printed[name])
            else:
                assert printed[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value), name

    check(json.loads(shown), figures)


def test_uneven_shards_are_not_padded():
    figures = figures_of("--mask", "causal", "--tokens", 1001, "--ranks", 3, "--uneven", "--algorithm", "min-heap")
    assert figures["plan"]["padding"] == 0
    assert figures["plan"]["rows_received_lower_bound"] is None


def test_tables_name_what_they_show(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    few = run("--mask", "prefix-lm", "--tokens", 8192, "--ranks", 4)
    for words in ("8,192 tokens", "all-gather, zigzag shards", "greedy heap", "lower bound", "of ideal"):
        assert words in few, words
    many = run("--mask", "prefix-lm", "--tokens", 65536, "--simulate", 32)
    for words in ("median", "95 %", "overlap degree", "efficiency"):
        assert words in many, words


def test_narrow_terminals_lose_no_digit(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert "…" not in run("--mask", "causal", "--tokens", 4096, "--simulate", 4)


class Links(HTMLParser):
    """Collects everything that a page refers to, and checks that elements are closed in order."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.references, self.elements = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.references += [value for name, value in attrs if name in ("href", "src", "action", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()


@pytest.mark.parametrize(("tokens", "ranks"), [(16384, 4), (131072, 64)])
def test_pictures_are_written_and_the_page_stands_alone(tmp_path, tokens, ranks):
    png, html = tmp_path / "plan.png", tmp_path / "plan.html"
    flags = ["--mask", "shared-question", "--tokens", tokens, "--simulate", ranks, "--overlap-degree", 2]
    output = run(*flags, "--png", png, "--html", html)
    assert output.count("Written:") == 2
    pixels = matplotlib.image.imread(png)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 50
    page = html.read_text()
    links = Links()
    links.feed(page)
    assert not links.open
    assert links.references
    assert all(reference.startswith("data:image/png;base64,") for reference in links.references)
    assert "//" not in re.sub(r'href="data:[^"]*"', "", page)
    assert "@import" not in page
    assert "url(" not in page
    assert "<!--" not in page
    tips = [attrs["data-tip"] for _, attrs in links.elements if "data-tip" in attrs]
    assert any("pairs" in tip for tip in tips)
    assert any("gradients" in tip for tip in tips)
    planes = [attrs["data-plane"] for _, attrs in links.elements if "data-plane" in attrs]
    assert {"mask", "ownership", "traffic"} == set(planes)
    data = json.loads(re.search(r"const data = (.*);", page)[1])
    assert data["queries"]["tokens"] == tokens
    assert data["keys"] is None
    assert len(data["traffic"]) == ranks


@pytest.fixture
def two_sequences(tmp_path):
    """Flags for packed texts that attend to pictures."""
    rng = np.random.default_rng(0)
    for name, most in (("texts", 700), ("pictures", 300)):
        np.save(tmp_path / f"{name}.npy", np.append(0, np.cumsum(rng.integers(64, most, 60))))
    return ["--cu-seqlens", tmp_path / "texts.npy", "--cu-seqlens-k", tmp_path / "pictures.npy"]


@pytest.mark.parametrize("algorithm", ["locality", "min-heap"])
@pytest.mark.parametrize("more", [[], ["--qo"], ["--nodes", 2, "--hierarchical"], ["--uneven"]], ids=str)
def test_figures_of_two_sequences(two_sequences, algorithm, more):
    figures = figures_of(*two_sequences, "--simulate", 8, "--algorithm", algorithm, *more)
    mask, plan, ranks = figures["mask"], figures["plan"], figures["ranks"]
    ends = [np.load(two_sequences[n]) for n in (1, 3)]
    assert (mask["tokens"], mask["key_tokens"]) == (ends[0][-1], ends[1][-1])
    assert mask["pairs"] == (np.diff(ends[0]) * np.diff(ends[1])).sum() == sum(rank["pairs"] for rank in ranks)
    assert sum(rank["tokens"] for rank in ranks) == mask["tokens"]
    assert sum(rank["key_tokens"] for rank in ranks) == mask["key_tokens"]
    assert plan["keys"]["padding"] == plan["keys"]["chunks"] * plan["keys"]["chunk_size"] - mask["key_tokens"] or more
    assert sum(rank["rows_received"] for rank in ranks) == sum(rank["rows_sent"] for rank in ranks)
    assert figures["compared"]["ring"]["rows_received"] == 7 * mask["key_tokens"]
    assert (plan["hops"], plan["queries_travel"]) == (1 + ("--hierarchical" in more), "--qo" in more)
    assert plan["imbalance"] <= 1.1
    if not more:
        assert (
            plan["rows_received_lower_bound"]
            <= plan["rows_received"]
            <= figures["compared"]["min_heap"]["rows_received"]
        )
    if "--qo" in more:
        assert len(figures["simulation"]) == 1
        assert 0 <= plan["query_rows_received"] <= plan["rows_received"]


def test_two_hops_cross_less_and_need_as_much():
    flags = ["--mask", "causal", "--tokens", 65536, "--simulate", 16, "--nodes", 4, "--algorithm", "locality"]
    direct, relayed = (figures_of(*flags, *more)["plan"] for more in ([], ["--hierarchical"]))
    # Each row crosses to a node once, not once for each of its four ranks.
    assert relayed["rows_received_between_nodes"] <= 0.5 * direct["rows_received_between_nodes"]
    assert relayed["rows_received"] > relayed["rows_received_between_nodes"]
    assert (direct["hops"], relayed["hops"]) == (1, 2)


def test_queries_travel_where_that_is_cheaper(tmp_path, monkeypatch):
    path = tmp_path / "slices.json"
    path.write_text("[[0, 8192, 0, 8192, 1], [16000, 16384, 0, 16384]]")
    flags = ["--slices", path, "--ranks", 4, "--heads-q", 8, "--heads-kv", 8]
    plan = figures_of(*flags, "--qo")["plan"]
    assert 0 < plan["query_rows_received"] < plan["rows_received"] < figures_of(*flags)["plan"]["rows_received"]
    monkeypatch.setenv("COLUMNS", "200")
    words = run(*flags, "--qo")
    assert f"{plan['query_rows_received']:,} query rows" in words


@pytest.mark.parametrize(("ranks", "more"), [(8, ["--qo"]), (32, ["--hierarchical"])])
def test_pictures_of_two_sequences(two_sequences, tmp_path, ranks, more):
    png, html = tmp_path / "plan.png", tmp_path / "plan.html"
    run(*two_sequences, "--simulate", ranks, *more, "--png", png, "--html", html)
    assert matplotlib.image.imread(png).shape[:2] == (1690, 1690)
    page = html.read_text()
    links = Links()
    links.feed(page)
    planes = [attrs["data-plane"] for _, attrs in links.elements if "data-plane" in attrs]
    assert set(planes) == {"mask", "ownership", "key-ownership", "traffic"}
    data = json.loads(re.search(r"const data = (.*);", page)[1])
    assert data["keys"]["tokens"] == np.load(two_sequences[3])[-1]
    assert ("outputs and gradients go home" in page) == ("--qo" in more)
    tips = [attrs["data-tip"] for _, attrs in links.elements if "data-tip" in attrs]
    assert any("query rows" in tip for tip in tips) == ("--qo" in more)


def test_a_name_cannot_break_the_page(tmp_path):
    path = tmp_path / "<b>&amp;.json"
    path.write_text("[[0, 640, 0, 640, 1]]")
    run("--slices", path, "--ranks", 2, "--html", tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;amp;.json" in page


def test_1024_ranks_at_a_million_tokens(tmp_path):
    html = tmp_path / "plan.html"
    flags = ["--mask", "varlen_causal", "--tokens", 1 << 20, "--simulate", 1024, "--nodes", 128]
    figures = figures_of(*flags, "--html", html)
    assert len(figures["ranks"]) == 1024
    assert figures["compared"]["ring"]["rows_received"] == 1023 << 20
    assert 0 < figures["predicted"]["efficiency"] < 1
    assert html.stat().st_size < 1_000_000


def test_degree_auto_is_chosen():
    options = PlanOptions(mask="causal", tokens=1 << 18, ranks=16, overlap_degree=None)
    chosen = PlanStudy(options, read_mask(options))
    assert chosen.degree >= 1
    assert chosen.figures.work.pairs.shape == (16, chosen.degree + 1)


def test_it_says_where_the_chunks_are_left_to_the_heap():
    flags = ("--mask", "varlen_full", "--tokens", 1 << 20, "--ranks", 256)
    assert not figures_of(*flags)["plan"]["left_to_heap"]
    assert "leaves them to" not in run(*flags)
    assert figures_of(*flags, "--chunk-size", 1024)["plan"]["left_to_heap"]
    assert "leaves them to the greedy heap" in " ".join(run(*flags, "--chunk-size", 1024).split())


def test_it_says_where_cuts_follow_the_documents():
    flags = ("--mask", "varlen_causal", "--tokens", 1 << 18, "--ranks", 8)
    plan = figures_of(*flags)["plan"]
    assert plan["chunks"] < (1 << 18) // plan["chunk_size"]
    assert "runs that follow the documents" in " ".join(run(*flags).split())
    assert figures_of(*flags, "--chunk-size", 128)["plan"]["chunks"] == 2048
