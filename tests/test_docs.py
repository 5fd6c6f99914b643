"""README, docs/ and the model card: every number is that of its run or figure, every file, flag and link exists."""

import ast
import hashlib
import json
import math
import os
import re
import shlex
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import ROOT, SAMPLE, run_script

import checkpoint
import data
import engine
import metrics
import models
from analysis import composition, corruptions, fashion_c, tables
from analysis.runs import collect
from runtime.cli import RUNS
from training.record import history_of

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text()
FIGURES = ROOT / "docs" / "figures"
SCRIPTS = ("train", "evaluate", "analyze_errors", "predict", "compare", "sweep", "demo", "export", "bench")
SHIPPED = {  # checkpoints/: runs/
    "best_mlp_fmnist.pt": "mlp-val-0",
    "best_cnn_fmnist.pt": "cnn-val-0",
    "best_resnet_fmnist.pt": "resnet-best-0",
    "distilled/best_mlp_fmnist.pt": "mlp-distilled-0",
    "distilled/best_cnn_fmnist.pt": "cnn-distilled-0",
    "robust/best_cnn_fmnist.pt": "cnn-robust-2",
}
# Flags of pip, pytest, ruff, unshare and Slurm; and of all.
OF_TOOLS = {
    "--index-url", "--require-hashes", "--tries", "--report", "--check", "--help", "--map-root-user", "--net",
    "--array", "--cpus-per-task", "--time",
}  # fmt: skip
OF_TORCHRUN = {
    "--nproc-per-node", "--nnodes", "--max-restarts", "--rdzv-backend", "--rdzv-endpoint", "--local-addr",
    "--master-addr",
}  # fmt: skip
OF_DATA_FOLDERS = {"classes.txt", "failed.txt"}  # files that a page names and the repository does not hold


def page(name):
    """The text of a page in docs/, its lines joined so that a sentence can be searched for."""
    return " ".join((ROOT / "docs" / f"{name}.md").read_text().split())


def lines_of(name):
    return (ROOT / "docs" / f"{name}.md").read_text().splitlines()


def blocks(text, language):
    """The fenced blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """The commands of a page that run one of our scripts, as (script, its words): fenced ones and inline ones."""
    fenced = [line for block in blocks(text, "sh") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:python|torchrun) [^`]*)`", text)
    for line in [*fenced, *inline]:
        for part in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line)):
            if match := re.search(r"(?:python|torchrun)\s(?:.*\s)?([\w/]+)\.py\b(.*)", part):
                yield match[1], shlex.split(match[2])


@cache
def usage(script):
    return run_script(f"{script}.py", "--help").stdout


def runs(name):
    """Histories of the runs of that name, in the order of their seeds."""
    return [json.loads(path.read_text()) for path in sorted(ROOT.glob(f"runs/{name}-[0-9]/best_*.json"))]


def read(name):
    return json.loads((FIGURES / name).read_text())


# --- the README's form -----------------------------------------------------------------------------------


def test_the_readme_is_short_and_starts_with_a_command():
    assert len(README.encode()) < 10_000
    lines = README.splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv ")]
    assert [line.endswith("train.py --model cnn") for line in commands].count(True) == 1  # .ci/run searches for both
    assert [line.endswith("python -m pytest") for line in commands].count(True) == 1
    assert lines.index(commands[0]) < 40
    assert all(line.count("|") - 1 <= 5 for line in lines if line.startswith("|"))


def test_the_readme_shows_some_rows_of_the_comparison():
    brief = tables.brief(collect([RUNS])).splitlines()
    table = [line for line in README.splitlines() if line.startswith("|")]
    assert table[:2] == brief[:2]
    assert len(table) == 8
    assert len(set(table)) == 8
    for row in table:
        assert row in brief


# --- files, flags, links ---------------------------------------------------------------------------------


def anchors(text):
    """The fragments that GitHub makes from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    text = path.read_text()
    links = [a or b for a, b in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)]
    for link in links:
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, fragment = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if fragment:
            assert fragment in anchors(target.read_text()), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_named_is_there(path):
    text = path.read_text()
    for name in re.findall(r"`([\w/.-]+\.(?:py|txt|c|md|ipynb))`", text):
        assert name in OF_DATA_FOLDERS or any((ROOT / room / name).exists() for room in ("", "docs", "tests")), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_command_names_a_script_and_its_flags(path):
    text = path.read_text()
    for script, words in commands(text):
        assert (ROOT / f"{script}.py").exists(), script
        flags = {word.split("=")[0] for word in words if word.startswith("--")} - OF_TOOLS
        for flag in flags:
            assert re.search(rf"{flag}\b", usage(script)), f"{script}.py {flag}"
    known = OF_TOOLS | OF_TORCHRUN | {flag for name in SCRIPTS for flag in re.findall(r"--[a-z-]+", usage(name))}
    ours = "\n".join(line for line in text.splitlines() if not re.match(r"git |pip |apt", line))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) <= known


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readme_describes_every_script_by_its_own_flags(script):
    prose = re.sub(r"^```.*?^```", "", README, flags=re.DOTALL | re.MULTILINE)
    (described,) = re.findall(rf"\*\*{script}\.py\*\*(.*?)(?=\*\*|^#)", prose, re.DOTALL | re.MULTILINE)
    for flag in set(re.findall(r"--[a-z-]+", described)) - OF_TOOLS:
        assert flag in usage(script), flag


def test_the_lines_for_use_from_python_work(sample, monkeypatch, capsys):
    (lines,) = blocks(README, "python")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FMNIST_DIR", str(SAMPLE))
    exec(lines, {})
    answers = capsys.readouterr().out.splitlines()[-1]
    answers = ast.literal_eval(answers)
    truth = [data.CLASSES[k] for k in sample["test"].labels[:20]]
    assert sum(answer == true for answer, true in zip(answers, truth, strict=True)) > 15


# --- the shipped checkpoints -----------------------------------------------------------------------------


def shipped_run(name):
    (path,) = (ROOT / "runs" / SHIPPED[name]).glob("best_*.json")
    return json.loads(path.read_text())


def shipped(name):
    """The shipped checkpoint and its run; skips where the user has trained a checkpoint of their own."""
    path = ROOT / "checkpoints" / name
    run = shipped_run(name)
    is_shipped = hashlib.sha256(path.read_bytes()).hexdigest() == run["checkpoint_sha256"]
    if not is_shipped and "CI" not in os.environ:
        pytest.skip(f"{path.name} has been trained anew here")
    assert is_shipped
    return path, run


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_checkpoints_are_those_of_the_table(name):
    path, run = shipped(name)
    assert path.stat().st_size < 12e6
    assert history_of(path) == run
    assert checkpoint.load(path)[1]["epoch"] == run["best_epoch"]
    low, high = run["test"]["accuracy_ci95"]
    start = f"| {name} | {run['test']['accuracy']:.2%} ({100 * low:.2f} to {100 * high:.2f}) |"
    assert f"{start} {run['test']['loss']:.4f} |" in page("results")


def test_the_table_of_the_shipped_checkpoints_is_that_of_evaluate():
    """docs/figures/evaluate.json is what evaluate.py wrote of them with --tta."""
    stored = read("evaluate.json")
    for result in stored["checkpoints"]:
        name = result["checkpoint"].removeprefix("checkpoints/")
        if name in SHIPPED:
            assert result["checkpoint_sha256"] == shipped_run(name)["checkpoint_sha256"]
        low, high = result["accuracy_ci95"]
        numbers = f"{result['accuracy']:.2%} ({100 * low:.2f} to {100 * high:.2f}) | {result['log_loss']:.4f}"
        views = f", mean of {result['views']} views" if result["views"] > 1 else ""
        if not views or name == "best_resnet_fmnist.pt":
            assert f"| {name}{views} | {numbers} | {result['ece']:.4f} |" in page("results")
    names = [(result["checkpoint"], result["views"]) for result in stored["checkpoints"]]
    assert {(f"checkpoints/{name}", 1) for name in SHIPPED} <= set(names)
    (pair,) = [
        pair
        for pair in stored["mcnemar"]
        if (pair["a"], pair["b"]) == ("checkpoints/best_cnn_fmnist.pt", "checkpoints/best_mlp_fmnist.pt")
    ]
    for number in (f"{pair['only_a']} images", f"{pair['only_b']}", f"{pair['p_value']:.2g}"):
        assert number in page("results")


# --- docs/mistakes.md ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    """The numbers of the shipped report, which is of the shipped CNN."""
    _, run = shipped("best_cnn_fmnist.pt")
    analysis = read("analysis.json")
    assert analysis["checkpoint_sha256"] == run["checkpoint_sha256"]
    assert f"({analysis['mistakes']} mistakes)" in page("mistakes")
    (cnn,) = analysis["report"]["checkpoints"]
    assert sum(group["count"] for group in cnn["groups"].values()) == analysis["mistakes"]
    return analysis["report"]


def test_the_groups_of_mistakes_are_those_of_the_report(report):
    for group in report["checkpoints"][0]["groups"].values():
        low, high = group["ci95"]
        assert f"| {group['count']} | {group['share']:.1%} | {low:.1%} to {high:.1%} |" in page("mistakes")


def test_the_findings_are_those_of_the_report(report):
    for finding in report["checkpoints"][0]["findings"]:
        (row,) = [line for line in lines_of("mistakes") if line.startswith(f"| {finding['finding']} |")]
        _, _, measured, trainings, verdict, _ = row.split("|")
        assert measured.strip() in finding["summary"]
        assert (trainings.strip(), verdict.strip()) == (finding["seeds"], finding["verdict"])


def test_the_robustness_is_that_of_the_report(report):
    for row in report["robustness"]:
        some = f" (of {row['mirrored_n']})" if row["mirrored_n"] != row["n"] else ""
        mirrored = "not measured" if row["mirrored"] is None else f"{row['mirrored']:.1%}{some}"
        means = [f"{value:.1%}" for value in (*row["mean"].values(), row["all"])]
        cells = " | ".join([f"{row['clean']:.1%}", mirrored, *means])
        assert f"| {row['name']} | {row['n']} | {cells} |" in page("mistakes")
    noise = {row["name"]: row["mean"]["noise"] for row in report["robustness"] if row["name"] != "cnn, robust"}
    of_mlp, of_cnn = ([value for name, value in noise.items() if name.startswith(kind)] for kind in ("mlp", "cnn"))
    assert min(of_mlp) > max(of_cnn)
    assert f"every MLP ({min(of_mlp):.1%} to {max(of_mlp):.1%}) beats every CNN of these recipes" in page("mistakes")
    (robust,) = [row for row in report["robustness"] if row["name"] == "cnn, robust"]
    assert f"Its mean over the six corruptions is {robust['all']:.1%}" in page("mistakes")
    cells = " | ".join(f"{robust[key]:.1%}" for key in ("clean", "mirrored"))
    cells += " | " + " | ".join(f"{value:.1%}" for value in (*robust["mean"].values(), robust["all"]))
    assert f"| cnn | {cells} |" in page("results")
    (row,) = [row for row in report["robustness"] if row["name"] == "resnet, robust"]
    cells = " | ".join(f"{value:.1%}" for value in (row["clean"], row["mirrored"], *row["mean"].values(), row["all"]))
    assert f"| resnet | {cells} |" in page("results")
    assert f"The ResNet of `robust` has {row['all']:.1%} and {row['clean']:.1%}." in page("mistakes")
    (plain,) = [row for row in report["robustness"] if row["name"] == "cnn, published"]
    both = f"right on {robust['clean']:.1%} of the plain images, where the published recipe has {plain['clean']:.1%}"
    assert both in page("mistakes")
    contrast = {row["name"]: row["mean"]["contrast"] for row in report["robustness"]}
    assert f"a mean of {contrast['cnn, best']:.1%} under lower contrast" in page("mistakes")
    assert f"The published recipe keeps {contrast['cnn, published']:.1%}" in page("mistakes")


def test_the_sentences_are_those_of_the_report(report):
    issues, double = report["label_issues"], report["near_duplicates"]
    groups = report["checkpoints"][0]["groups"]
    before, after = (report["checkpoints"][0][f"calibration_{when}"] for when in ("before", "after"))
    by_class = issues["by_class"]
    doubted = sum(by_class[name] for name in ("Shirt", "T-shirt/top", "Pullover", "Coat")) / sum(by_class.values())
    assert by_class["Bag"] == 1
    gain = double["accuracy"]["share"] - double["accuracy_without"]["share"]
    limits = {at["scale"]: at["count"] for at in double["other_limits"]}
    for sentence in (
        f"{issues['train']['count']} training and {issues['test']['count']} test labels",
        f"{doubted:.0%} of them are Shirt, T-shirt/top, Pullover or Coat",
        f"right on {issues['out_of_fold_accuracy']['share']:.2%} of the 70,000 images",
        f"{groups['consensus']['count']} mistakes are shared by all five trainings",
        f"{groups['unstable']['count']} mistakes change with the seed",
        f"{double['test']['count']} test images",
        f"flatter the accuracy by {100 * gain:.2f} points",
        f"{double['accuracy_of_them']['share']:.2%} on them and {double['accuracy_without']['share']:.2%} without them",
        f"there are {limits[0.5]} of them, with limits twice as wide {limits[2.0]:,}",
        f"Near-duplicates with another label than their twin: {double['of_another_label']}",
        f"a temperature of {report['checkpoints'][0]['temperature']:.2f}",
        f"from {before['ece']:.4f} to {after['ece']:.4f}",
        f"from {before['classwise_ece']:.4f} to {after['classwise_ece']:.4f}",
    ):
        assert sentence in page("mistakes")


def of(share, digits=1):
    """A share as docs/mistakes.md writes it: 41.1% (37.7 to 44.6)."""
    low, high = (100 * end for end in share["ci95"])
    return f"{share['share']:.{digits}%} ({low:.{digits}f} to {high:.{digits}f})"


NUMBERS = ("none", "one", "two", "three", "four", "five")


def mean_of(figure):
    """A mean over trainings: 39.5% (31.6 to 47.4)."""
    return of({"share": figure["mean"], "ci95": figure["ci95"]})


def people_sentences(people):
    """What docs/mistakes.md says of people, from the numbers of the report."""
    own, trainings = people["checkpoints"][0], {row["name"]: row for row in people["trainings"]}
    mistakes, groups, suspects, classes = own["mistakes"], own["groups"], people["suspects"], people["by_class"]
    chosen, unlike = people["label_chosen"], sum(classes[k]["n"] - classes[k]["count"] for k in ("Coat", "Shirt"))
    sixty, eighty, most = (each["label"] for each in own["agreeing"])
    plain, best, resnet = (trainings[name] for name in ("cnn, published", "cnn, best", "resnet, best"))
    gain = 100 * (best["label_accuracy"]["mean"] - plain["label_accuracy"]["mean"])
    rho, bits = own["confidence"], people["ambiguity"]
    yield f"{people['votes']:,} votes of people"
    yield f"is the label of {of(chosen)} of the images"
    yield f"is the CNN's answer in {of(mistakes['model'])} and the label in {of(mistakes['label'])}"
    yield f"By chance, it would be {mistakes['expected']['model']:.1%} and {mistakes['expected']['label']:.1%}"
    yield f"of the five trainings are {mean_of(plain['mistakes_model'])} and {mean_of(plain['mistakes_label'])}"
    yield f"in {NUMBERS[plain['label_ahead']]} of them, the label comes first"
    unclear, clear = (own["often_chosen"][key] for key in ("no", "yes"))
    yield f"is the label of {of(classes['Coat'])} of the coats and {of(classes['Shirt'])} of the shirts"
    yield f"These two classes hold {unlike / (chosen['n'] - chosen['count']):.0%} of the images"
    yield f"On the {unclear['n']} mistakes with these two labels, people's choice is the CNN's answer in "
    yield f"{of(unclear['model'])} and the label in {of(unclear['label'])}; on the other {clear['n']}"
    yield f"in {of(clear['model'])} and {of(clear['label'])}"
    for name in ("consensus", "unstable"):
        yield f"the {groups[name]['n']} {name} mistakes"
        yield f"{of(groups[name]['model'])} and the label in {of(groups[name]['label'])}"
    yield f"Of the {suspects['outvoted']['n']} suspect test labels, people outvote {of(suspects['outvoted'])}"
    yield f"of the others {of(suspects['others_outvoted'])}"
    yield f"Images of the suspects' classes would give {suspects['expected']:.1%}"
    closer = 100 * (best["people_accuracy"]["mean"] - plain["people_accuracy"]["mean"])
    yield f"by {gain:.1f} points nearer to the labels, and by {closer:.1f} nearer to people's choices"
    yield f"On {people['tied']} images several classes share the first place"
    yield f"{mean_of(plain['people_accuracy'])} and {mean_of(best['people_accuracy'])}"
    yield f"in {resnet['people_accuracy']['mean']:.1%}"
    for key, digits in (("cross_entropy", 2), ("cross_entropy_scaled", 2)):
        yield f"{resnet[key]['mean']:.{digits}f} nats for the ResNet and {plain[key]['mean']:.{digits}f} for the CNN"
    yield f"{most['n'] - most['count']} mistakes on the {most['n']:,} images on which at least 95% of people agree"
    yield f"{eighty['n'] - eighty['count']} on the {eighty['n']:,} on which at least 80% do"
    fewer, n = mistakes["n"] - (sixty["n"] - sixty["count"]), people["n"] - sixty["n"]
    yield f"{fewer / mistakes['n']:.0%} of its mistakes are among the {n / people['n']:.0%} of the images"
    yield f"(Spearman −{-rho['spearman']:.2f}, interval −{-rho['ci95'][0]:.2f} to −{-rho['ci95'][1]:.2f})"
    yield f"{bits['trainings']} trainings ({bits['spearman']:.2f}, {bits['ci95'][0]:.2f} to {bits['ci95'][1]:.2f})"
    differ = bits["where_they_differ"]
    yield f"On the {differ['n']:,} images on which the trainings disagree, both follow it weakly"
    yield f"(−{-differ['confidence']:.2f} and {differ['ambiguity']:.2f})"


def test_what_people_see_is_what_was_measured(report):
    for sentence in people_sentences(report["people"]):
        assert sentence in page("mistakes")
    mistakes, readme = report["people"]["checkpoints"][0]["mistakes"], " ".join(README.replace("*", "").split())
    shares = [f"{mistakes[side]['share']:.0%}" for side in ("model", "label")]
    chances = [f"{mistakes['expected'][side]:.0%}" for side in ("model", "label")]
    (plain,) = [row for row in report["people"]["trainings"] if row["name"] == "cnn, published"]
    means = [f"{plain[f'mistakes_{side}']['mean']:.0%}" for side in ("model", "label")]
    said = (
        f"on the CNN's {mistakes['n']} mistakes, most votes of people go to its answer in {shares[0]} and to the label "
        f"in {shares[1]}; the means of five trainings are {means[0]} and {means[1]}. By chance it would be "
        f"{chances[0]} and {chances[1]}."
    )
    assert said in readme


def test_the_limits_of_near_duplicates_are_those_of_the_report(report):
    limits = (composition.PIXEL_LIMIT, composition.LOOSE_PIXEL_LIMIT, composition.FEATURE_LIMIT)
    assert "({} and {} of the grey range, {} of cosine distance)".format(*limits) in page("mistakes")
    n, shares, expected = report["near_duplicates"]["test"]["n"], {}, []
    for at in report["near_duplicates"]["other_limits"]:
        shares[at["scale"]] = share = at["count"] / n
        expected.append(f"| {at['scale']:g} | {at['count']:,} | {share:.2%} | {at['without']['share']:.2%} |")
    start = lines_of("mistakes").index(expected[0])
    assert lines_of("mistakes")[start : start + len(expected) + 1] == [*expected, ""]
    assert shares[1.0] == report["near_duplicates"]["test"]["share"]
    assert shares[1.0] < 0.0598 < shares[1.5]


def test_the_table_of_another_benchmark_names_our_corruptions():
    text = "\n".join(lines_of("mistakes")).partition("### Fashion-MNIST-C")[2].partition("\n#### ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert f"one of {sum(len(row[0].split(', ')) for row in rows)} ways" in " ".join(text.split())
    closest = {row[2] for row in rows} - {"none"}
    (without,) = re.findall(r"Our (\w+) and (\w+) have no counterpart", text)
    assert sorted([*closest, *without]) == sorted(corruptions.KINDS)
    for kind, words in (("rotation", "{} to {} degrees"), ("contrast", "{} to {} of it remain")):
        amounts = corruptions.STRENGTHS[kind][0]
        assert words.format(amounts[0], amounts[-1]) in text
    assert sorted(kind for row in rows for kind in row[0].split(", ")) == sorted(fashion_c.KINDS)


def test_the_accuracies_by_kind_are_those_of_their_command():
    """docs/figures/fashion_c.json is what `python -m analysis.fashion_c` wrote of the three checkpoints."""
    results = read("fashion_c.json")["checkpoints"]
    names = [result["checkpoint"].removeprefix("checkpoints/") for result in results]
    for name, result in zip(names, results, strict=True):
        assert result["checkpoint_sha256"] == shipped_run(name)["checkpoint_sha256"]
        assert result["plain"]["share"] == shipped_run(name)["test"]["accuracy"]
        assert list(result["kinds"]) == list(fashion_c.KINDS)
        assert result["mean"] == pytest.approx(mean(each["share"] for each in result["kinds"].values()))
    assert "The columns are `{}`, `{}` and `{}`".format(*names) in page("mistakes")
    rows = {"as they are": [result["plain"]["share"] for result in results]}
    rows |= {kind: [result["kinds"][kind]["share"] for result in results] for kind in fashion_c.KINDS}
    rows[f"mean of the {len(fashion_c.KINDS)} kinds"] = means = [result["mean"] for result in results]
    expected = [f"| {name} | {' | '.join(f'{share:.1%}' for share in row)} |" for name, row in rows.items()]
    start = lines_of("mistakes").index(expected[0])
    assert lines_of("mistakes")[start : start + len(expected) + 1] == [*expected, ""]
    assert rows["as they are"].index(max(rows["as they are"])) == means.index(min(means)) == 1  # the ResNet
    assert means.index(max(means)) == 2  # the robust CNN
    leads = sum(max(rows[kind]) == rows[kind][2] for kind in fashion_c.KINDS)
    assert f"the highest accuracy in {leads} of the {len(fashion_c.KINDS)} ways" in page("mistakes")
    hard = max(max(rows[kind]) for kind in ("inverse", "upside down", "turned left", "turned right"))
    assert f"None of the three is right on more than {math.ceil(100 * hard)}% of the images" in page("mistakes")


# --- docs/reliability.md, docs/distributed.md --------------------------------------------------------------


def test_the_tries_of_faults_add_up():
    tries = re.findall(r"^\| [^|]+ \| ([\d,]+) \| 0 \| 0 \|$", (ROOT / "docs/reliability.md").read_text(), re.MULTILINE)
    total = sum(int(number.replace(",", "")) for number in tries)
    assert f"In {total:,} tries of {len(tries)} faults" in page("reliability")
    for script in SCRIPTS:
        assert f"| nonsense flag of {script}.py |" in page("reliability")


def test_the_speedups_of_processes_and_threads_are_quotients_of_their_rates():
    advantages = []
    for row in [line for line in lines_of("distributed") if re.search(r"\| [\d,]+ \| [\d,]+ \(", line)]:
        alone, processes, threads = (int(n.replace(",", "")) for n in re.findall(r"(?<=\| )[\d,]+(?= [|(])", row))
        assert f"({processes / alone:.2f} times)" in row
        assert f"({threads / alone:.2f} times)" in row
        advantages.append(threads / processes)
    assert f"{min(advantages):.1f} to {max(advantages):.1f} times as fast" in page("distributed")
    cnn = models.build("cnn")
    assert f"The CNN has {models.count_parameters(cnn):,} weights" in page("distributed")
    assert f"3 x {models.count_flop(cnn) / 1e6:.1f} MFLOP" in page("distributed")


# --- the model card --------------------------------------------------------------------------------------


def test_the_model_card_is_of_the_shipped_checkpoints():
    card = " ".join((ROOT / "MODEL_CARD.md").read_text().split())
    report = read("analysis.json")["report"]
    measured = {each["checkpoint"]: each["ece"] for each in read("evaluate.json")["checkpoints"] if each["views"] == 1}
    for model, name in (("cnn", "CNN"), ("mlp", "MLP"), ("resnet", "ResNet")):
        path, run = shipped(f"best_{model}_fmnist.pt")
        test, ece = run["test"], measured[f"checkpoints/{path.name}"]
        if model != "resnet":  # which takes half a minute
            assert metrics.evaluate(*logits_and_labels(path), data.CLASSES)["ece"] == pytest.approx(ece, rel=1e-4)
        low, high = test["accuracy_ci95"]
        start = f"| {name} | {test['accuracy']:.2%} ({100 * low:.2f} to {100 * high:.2f}) | {test['loss']:.4f} "
        assert f"{start}| {ece:.4f}" in card
        assert f"value: {test['accuracy']}" in card
        assert f"| {models.count_parameters(models.build(model)):,} |" in card
    for name, first in SHIPPED.items():
        accuracies = [100 * run["test"]["accuracy"] for run in runs(first.rpartition("-")[0])]
        assert f"{mean(accuracies):.2f} ± {stdev(accuracies):.2f}%" in card, name
    (cnn,) = report["checkpoints"]
    assert f"with temperature {cnn['temperature']:.2f}: {cnn['calibration_after']['ece']:.4f}" in card
    recalls = [row[k] / sum(row) for k, row in enumerate(cnn["confusion_matrix"])]
    assert f"| CNN | {' | '.join(f'{recall:.1%}' for recall in recalls)} |" in card
    (robust,) = [row for row in report["robustness"] if row["name"] == "cnn, published"]
    for kind in ("shift", "rotation", "noise"):
        assert f"{robust['mean'][kind]:.1%}" in card


def logits_and_labels(path: Path):
    (test,) = data.load("test")
    return engine.predict_logits(checkpoint.load(path)[0], test), test.labels
