"""The report and the deep trainings behind it, as a user has them: analyze_errors.py --deep, and a real browser.

The browser's tests need Chromium (Debian's package chromium). `pytest tests/test_report.py --report FILE.html` has them
look at a report that is there, of the whole data set, instead of one of the sample.
"""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import SAMPLE, assert_one_line_error, first, made_up_votes, once, run_script
from PIL import Image
from torch import nn

import checkpoint
import data
import engine
import models
import recipes
import training.run
from analysis import composition, corruptions, humans, mistakes, trainings
from analysis.report import render
from runtime import cli


class Own(nn.Module):
    """What a researcher might add: batch normalisation, a depthwise convolution, global pooling."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.out = nn.Linear(16, 10)

    def forward(self, images):
        x = torch.relu(self.norm(self.conv(images)))
        return self.out(torch.relu(self.depthwise(x)).mean((2, 3)))


def shorten():
    """Trainings of a moment, of one recipe and the small models; their robustness on few images."""
    del models.MODELS["resnet"]
    for name in list(recipes.RECIPES)[1:]:
        del recipes.RECIPES[name]
    trainings.FOLD_RECIPE, trainings.FOLD_EPOCHS = "published", 2
    data.AUGMENTATIONS.clear()  # train.py refuses those that no recipe uses
    measure = corruptions.accuracies
    corruptions.accuracies = lambda model, test: measure(model, first(test, 50))
    for model, recipe in recipes.RECIPES["published"].items():
        recipes.RECIPES["published"][model] = recipe._replace(epochs=3, batch_size=32)  # as `trained`


def add_own_model():
    shorten()
    models.MODELS["own"] = Own


@pytest.fixture(scope="module")
def analysed(trained, sample, tmp_path_factory):
    """A report of both models with all that --deep gives, votes and lists too: folder, JSON, and what was printed."""

    def make(folder):
        np.savetxt(folder / "votes.csv", made_up_votes(sample["test"].labels.numpy()), "%d", ",")
        paths = [trained[0] / f"best_{model}_fmnist.pt" for model in ("cnn", "mlp")]
        finished = run_script(
            "analyze_errors.py", *paths, "--deep", "--deep-dir", folder / "deep", "--data-dir", SAMPLE,
            "--figures-dir", folder, "--human-votes", folder / "votes.csv", "--export", folder / "audit",
            before=shorten,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        (folder / "said.txt").write_text(finished.stdout)

    folder = once(tmp_path_factory, "analysed", make)
    return folder, json.loads((folder / "analysis.json").read_text()), (folder / "said.txt").read_text()


def page_data(path):
    html = path.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_a_set_too_small_for_validation_images_is_analysed_too(trained, sample):
    model, info = checkpoint.load(trained[0] / "best_mlp_fmnist.pt")
    few = first(sample["test"], 20)
    measured = composition.measure("a.pt", model, info, few, data.held_out(few._replace(name="train+val")))
    assert measured.temperature is None
    assert "no class has enough for any" in measured.temperature_note


def test_the_comparison_with_people_is_kept_for_those_without_the_votes(analysed, trained, tmp_path):
    folder, numbers, _ = analysed
    people, page = numbers["report"]["people"], page_data(folder / "report.html")
    assert page["people"] == people
    assert np.array_equal(votes_in(page), np.loadtxt(folder / "votes.csv", delimiter=",", dtype=int))
    assert [row["n"] for row in people["trainings"]] == [5, 5]
    assert all(row["cross_entropy_scaled"]["n"] == 5 for row in people["trainings"])
    first = people["checkpoints"][0]
    groups = numbers["report"]["checkpoints"][0]["groups"]
    assert {name: row["n"] for name, row in first["groups"].items()} == {
        name: share["count"] for name, share in groups.items() if share["count"]
    }
    finished = run_script(
        "analyze_errors.py", trained[0] / "best_cnn_fmnist.pt", "--deep-dir", folder / "deep", "--data-dir", SAMPLE,
        "--figures-dir", tmp_path, before=shorten,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert f"their choice is its answer on {mistakes.in_words(first['mistakes']['model'])}" in finished.stdout
    kept = people | {"checkpoints": [first]}
    assert json.loads((tmp_path / "analysis.json").read_text())["report"]["people"] == kept
    content = page_data(tmp_path / "report.html")
    assert content["people"] == kept
    assert content["human"] is None
    assert (tmp_path / "people_sides.png").exists()
    said = f"{people['checkpoints'][0]['mistakes']['model']['share']:.1%}"
    assert f"people's choice is its answer in {said}" in (tmp_path / "report.html").read_text()


def test_no_page_holds_what_json_does_not():
    with pytest.raises(ValueError, match="not JSON compliant"):
        render({"figure": np.nan})


def test_the_groups_partition_the_mistakes(analysed):
    folder, numbers, said = analysed
    page = page_data(folder / "report.html")
    for each, content in zip(numbers["report"]["checkpoints"], page["checkpoints"], strict=True):
        assert list(each["groups"]) == ["label", "duplicate", "consensus", "unstable"]
        mistakes = sum(answer != label for answer, label in zip(content["predicted"], page["labels"], strict=True))
        assert sum(share["count"] for share in each["groups"].values()) == mistakes == content["mistakes"]
        for name, share in each["groups"].items():
            assert share["ci95"][0] <= share["share"] <= share["ci95"][1]
            assert list(content["group_of"].values()).count(name) == share["count"]
    assert "suspected label errors: " in said


def test_consensus_is_what_five_trainings_answer_alike(analysed, sample):
    folder, numbers, _ = analysed
    page = page_data(folder / "report.html")
    assert numbers["report"]["checkpoints"][0]["consensus_trainings"] == 5
    (votes,) = [each["predicted"] for each in page["votes"] if each["name"].startswith("cnn, published")]
    checked = 0
    for i, group in page["checkpoints"][0]["group_of"].items():
        answers = {vote[int(i)] for vote in votes} | {page["checkpoints"][0]["predicted"][int(i)]}
        if group in ("consensus", "unstable"):
            assert (len(answers) == 1) == (group == "consensus")
            checked += 1
    assert checked > 20


def test_mirrored_images_and_votes_are_measured_of_every_training(analysed, sample):
    folder, report = next((analysed[0] / "deep").iterdir()), analysed[1]["report"]
    test, found = sample["test"], []
    votes = humans.read_votes(analysed[0] / "votes.csv", test.labels.numpy())
    for seed in range(5):
        (own,) = (folder / "checkpoints").glob(f"mlp-published-{seed}-*")
        model, _ = checkpoint.load(own / "best_mlp_fmnist.pt")
        answers = engine.predict_logits(model, test._replace(images=test.images.flip(2))).argmax(1)
        result = json.loads((folder / f"mlp-published-{seed}.json").read_text())
        assert result["mirrored"] == (answers == test.labels).double().mean().item()
        expected = humans.cross_entropies(votes, engine.predict_logits(model, test))
        assert result["people"] == {"sha256": votes.sha256, **{key: pytest.approx(expected[key]) for key in expected}}
        found.append(result)
    (row,) = [row for row in report["robustness"] if row["name"] == "mlp, published"]
    assert row["mirrored"] == pytest.approx(np.mean([each["mirrored"] for each in found]))
    (row,) = [row for row in report["people"]["trainings"] if row["name"] == "mlp, published"]
    assert row["cross_entropy"]["mean"] == pytest.approx(np.mean([each["people"]["cross_entropy"] for each in found]))


def test_fold_probabilities_are_of_models_that_never_saw_the_image(analysed, sample):
    folder = next((analysed[0] / "deep").iterdir())
    images, labels = (
        torch.cat([getattr(sample[name], kind) for name in ("train+val", "test")]) for kind in ("images", "labels")
    )
    index = [data.fold_indices(labels.numpy(), f"{number}/5") for number in range(1, 6)]
    assert np.array_equal(np.sort(np.concatenate(index)), np.arange(1500))
    for fold in (1, 4):
        (own,) = (folder / "checkpoints").glob(f"fold-{fold}-*")
        history = json.loads((own / "best_cnn_fmnist.json").read_text())
        assert (history["flags"]["fold"], history["train_images"] + history["select_images"]) == (f"{fold}/5", 1200)
        model, _ = checkpoint.load(own / "best_cnn_fmnist.pt")
        held_out = data.Split("held-out", images[index[fold - 1]], labels[index[fold - 1]], "")
        stored = json.loads((folder / f"fold-{fold}.json").read_text())
        expected = engine.predict_logits(model, held_out).double().softmax(1).numpy()
        np.testing.assert_allclose(
            np.array(stored["probabilities"]) / trainings.PROBABILITY, expected.flatten(), atol=1e-4
        )
        assert stored["accuracy"] == (expected.argmax(1) == held_out.labels.numpy()).mean()


def test_the_same_command_goes_on_and_a_changed_recipe_is_trained_anew(analysed, trained, tmp_path):
    shutil.copytree(analysed[0] / "deep", tmp_path / "deep")
    (folder,) = (tmp_path / "deep").iterdir()
    kept = (folder / "mlp-published-1.json").read_bytes()
    (folder / "mlp-published-0.json").unlink()
    changed = json.loads((folder / "mlp-published-2.json").read_text())
    changed["key"]["recipe"]["lr"] = 5.0
    (folder / "mlp-published-2.json").write_text(json.dumps(changed))
    flags = (trained[0] / "best_mlp_fmnist.pt", "--deep-dir", tmp_path / "deep", "--data-dir", SAMPLE)
    flags += ("--figures-dir", tmp_path)
    without = run_script("analyze_errors.py", *flags, before=shorten)
    assert "mlp-published-2.json" in without.stderr
    assert "Consensus needs 5 trainings" in without.stdout
    finished = run_script("analyze_errors.py", *flags, "--deep", before=shorten)
    assert finished.returncode == 0, finished.stderr
    assert "13 of 15 trainings" in finished.stdout
    assert (folder / "mlp-published-1.json").read_bytes() == kept
    assert "unstable mistakes: " in finished.stdout
    assert "lr" not in json.loads((folder / "mlp-published-2.json").read_text())["key"]["recipe"]  # the usual one


def test_after_an_edit_a_training_gets_another_folder(sample, tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(training.run, "run", lambda request: folders.append(request.checkpoint_dir) or 143)
    for digest in ("before", "after", "after"):
        monkeypatch.setattr(trainings, "code_key", lambda _, digest=digest: digest)
        code = trainings.run(tmp_path, sample["train+val"], sample["test"], "cpu", data_dir=SAMPLE)
        assert code == 143  # an interrupted training ends the call
    assert folders[0] != folders[1] == folders[2]  # else the finished run of the code before would be taken


def test_every_recipe_is_trained_with_five_seeds_or_three_of_the_resnet():
    every = trainings.seed_jobs(is_taught=True)
    expected = {
        f"{model}-{name}-{seed}"
        for name, rows in recipes.RECIPES.items()
        for model in rows
        for seed in range(3 if model == "resnet" else 5)
    }
    assert set(every) == expected
    (teacher,) = {key["teachers"][0] for name, key in every.items() if "-distilled-" in name}
    assert teacher == checkpoint.load(cli.CHECKPOINTS / "best_resnet_fmnist.pt")[1]["sha256"]
    assert set(trainings.seed_jobs(is_taught=False)) == {name for name in expected if "-distilled-" not in name}


def test_a_result_without_what_is_measured_today_is_made_again():
    votes = humans.Votes(np.ones((1, 10), int))
    whole = {"key": {"model": "mlp"}, "mirrored": 0.5, "people": {"sha256": votes.sha256}}
    assert trainings._is_whole(whole, votes)
    for lacking in ("mirrored", "people"):
        result = {name: value for name, value in whole.items() if name != lacking}
        assert not trainings._is_whole(result, votes)
        assert trainings._is_whole(result, None) == (lacking == "people")
    assert not trainings._is_whole(whole | {"people": {"sha256": "of other votes"}}, votes)
    assert trainings._is_whole({"key": {"fold": "1/5"}}, votes)
    assert not trainings._is_whole(None, None)


def test_a_verdict_is_the_same_in_print_numbers_and_page(analysed):
    folder, numbers, said = analysed
    html = (folder / "report.html").read_text()
    judged = numbers["report"]["checkpoints"][0]["findings"]
    for finding, row in zip(numbers["findings"], judged, strict=True):
        assert finding["verdict"] == row["verdict"] in mistakes.VERDICTS
        assert f"{finding['finding']}: {finding['verdict']}\n" in said
        assert f"{row['seeds']}</td><td><b>{row['verdict']}</b></td>" in html
    for verdict, meaning in mistakes.VERDICTS.items():
        assert f"{verdict}: {meaning}\n" in said


def test_a_damaged_result_is_one_line(analysed, trained, tmp_path):
    shutil.copytree(analysed[0] / "deep", tmp_path / "deep")
    (folder,) = (tmp_path / "deep").iterdir()
    (folder / "fold-2.json").write_text('{"key"')
    finished = run_script(
        "analyze_errors.py", trained[0] / "best_mlp_fmnist.pt", "--deep-dir", tmp_path / "deep", "--data-dir", SAMPLE,
        "--figures-dir", tmp_path, before=shorten,
    )  # fmt: skip
    assert_one_line_error(finished, "fold-2.json", "delete it")


def test_too_many_checkpoints_are_one_line(trained):
    path = trained[0] / "best_mlp_fmnist.pt"
    assert_one_line_error(
        run_script("analyze_errors.py", *[path] * 6, "--data-dir", SAMPLE), "6 checkpoints", "up to 5"
    )


def test_a_model_of_ones_own_gets_all_of_it(analysed, tmp_path):
    shutil.copytree(analysed[0] / "deep", tmp_path / "deep")
    where = ("--data-dir", SAMPLE)
    finished = run_script("train.py", "--model", "own", "--checkpoint-dir", tmp_path, *where, before=add_own_model)
    assert finished.returncode == 0, finished.stderr
    finished = run_script(
        "analyze_errors.py", tmp_path / "best_own_fmnist.pt", "--deep", "--deep-dir", tmp_path / "deep",
        "--figures-dir", tmp_path, *where, before=add_own_model,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "15 of 20 trainings" in finished.stdout
    own = json.loads((tmp_path / "analysis.json").read_text())["report"]
    page = page_data(tmp_path / "report.html")
    assert list(own["checkpoints"][0]["groups"]) == ["label", "duplicate", "consensus", "unstable"]
    assert own["checkpoints"][0]["temperature"] > 0
    assert [row["name"] for row in own["robustness"]] == ["mlp, published", "cnn, published", "own, published"]
    assert page["checkpoints"][0]["map_method"] == "Grad-CAM"
    assert page["map"]
    assert [row["trainings"] for row in own["checkpoints"][0]["findings"]] == [5] * 4


def sprite(source, size=28):
    """The images of a sprite in a data URL, uint8 (many, size, size)."""
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("L"))
    across = picture.shape[1] // size
    return picture.reshape(-1, size, across, size).transpose(0, 2, 1, 3).reshape(-1, size, size)


@pytest.fixture(scope="module")
def report(request):
    """Path of the report under test, its data, and the splits it is of."""
    given = request.config.getoption("--report")
    path = given or request.getfixturevalue("analysed")[0] / "report.html"
    train, test = data.load("train+val", "test", data_dir=None if given else SAMPLE)
    return path, page_data(path), train, test


def test_every_picture_is_the_one_it_says(report):
    _, page, train, test = report
    for source, images, index in (
        ("test", test.images, range(page["n"])),
        ("train", train.images, page["train"]["index"]),
    ):
        shown = sprite(page["sprites"][source]).astype(float)
        true = images.numpy()[list(index)].astype(float)
        error = np.sqrt(((shown[: len(true)] - true) ** 2).mean((1, 2)))
        assert np.median(error) < 10  # grey levels of 255: the pictures are compressed
        assert error.max() < 40
    assert page["labels"] == "".join(map(str, test.labels.tolist()))
    assert page["train"]["labels"] == "".join(str(train.labels[i].item()) for i in page["train"]["index"])


@pytest.fixture
def page(browser, report):
    """The report as opened by a double-click; anything on the console, and any request but its own, fails the test."""
    opened = browser.new_page(viewport={"width": 1440, "height": 900})
    complaints = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: request.url.startswith(("data:", "file:")) or complaints.append(request.url))
    opened.goto(f"file://{report[0]}")
    opened.wait_for_selector("body[data-ready]")
    yield opened
    opened.close()
    assert complaints == []


def indices(page):
    """All images of the grid, every page of it."""
    while page.locator("#more").is_visible():
        page.evaluate("for (let k = 0; k < 50 && !document.getElementById('more').hidden; k++) $('more').click()")
    return page.evaluate("[...document.querySelectorAll('#grid button')].map(b => +b.dataset.index)")


def facts(content):
    labels = np.array([int(c) for c in content["labels"]])
    predicted = np.array([int(c) for c in content["checkpoints"][0]["predicted"]])
    probabilities = np.reshape(content["checkpoints"][0]["probabilities"], (-1, 10)) / 10_000
    return labels, predicted, probabilities


def votes_in(content):
    """The votes that the page holds, int (n, 10)."""
    return np.reshape([ord(letter) - content["human_zero"] for letter in content["human"]], (-1, 10))


def sides(content):
    """Whose class people choose on each image, where votes were given: one of humans.SIDES."""
    labels, predicted, _ = facts(content)
    if content["human"] is None:
        pytest.skip("the report is without people's votes")
    votes = votes_in(content)
    clear, choice = (votes == votes.max(1, keepdims=True)).sum(1) == 1, votes.argmax(1)
    return np.select([~clear, choice == labels, choice == predicted], ["tied", "label", "model"], "other")


def test_people_and_their_votes(page, report):
    content = report[1]
    people, (labels, predicted, _) = sides(content), facts(content)
    own = content["people"]["checkpoints"][0]
    for side in humans.SIDES:
        expected = np.flatnonzero((labels != predicted) & (people == side))
        assert own["mistakes"][side]["count"] == len(expected) > 0
        page.locator(f"#peoplebars .bar >> nth=0 >> button.{side}").click()
        assert sorted(indices(page)) == expected.tolist()
    page.locator("#grid button").first.click()
    i = page.evaluate("shown[open]")
    votes = {name: votes_in(content)[i][k] for k, name in enumerate(content["classes"])}
    rows = [row.split("\t") for row in page.locator("#human tr").all_inner_texts()]
    names = {row[0].removesuffix(" (label)").removesuffix(" (answer)"): int(row[-1]) for row in rows}
    assert names == {name: count for name, count in votes.items() if count}
    assert [int(row[-1]) for row in rows] == sorted((int(row[-1]) for row in rows), reverse=True)
    assert page.locator("#human caption").inner_text() == f"{sum(votes.values())} votes of people"
    widths = page.locator("#human .meter span").evaluate_all("all => all.map(e => parseFloat(e.style.width))")
    assert sum(widths) == pytest.approx(100, abs=0.1)
    page.locator("#close").click()
    assert f"{100 * own['mistakes']['model']['share']:.1f}%" in page.locator("#peopletold").inner_text()
    assert page.locator("#peopletrainings tbody tr").count() == len(content["people"]["trainings"])


def test_each_cell_of_the_matrix_shows_exactly_its_images(page, report):
    labels, predicted, _ = facts(report[1])
    counts = np.array(page.locator("#matrix button").all_inner_texts()).astype(int).reshape(10, 10)
    for true in range(10):
        for answer in range(10):
            expected = np.flatnonzero((labels == true) & (predicted == answer))
            assert counts[true, answer] == len(expected)
            if true and ((true == answer and len(expected) > 200) or not len(expected)):
                continue  # of the whole set one full diagonal cell will do, and the empty cells of the first row
            page.locator(f"[data-true='{true}'][data-predicted='{answer}']").click()
            assert sorted(indices(page)) == expected.tolist()


def test_every_filter_and_order(page, report):
    content = report[1]
    labels, predicted, probabilities = facts(content)
    wrong, confidence = labels != predicted, probabilities.max(1)
    flagged = np.isin(np.arange(content["n"]), content["duplicates"])
    suspect = np.isin(np.arange(content["n"]), [int(i) for i in content["suspects"]])
    bits = np.array(content["ambiguity"]) / 100
    group = np.array([content["checkpoints"][0]["group_of"].get(str(i), "") for i in range(content["n"])])
    people = sides(content) if content["human"] else None
    cases = [
        *[("f-people", side, wrong & (people == side)) for side in humans.SIDES if content["human"]],
        ("f-what", "right", ~wrong), ("f-true", "6", wrong & (labels == 6)),
        ("f-predicted", "0", wrong & (predicted == 0)),
        *[("f-group", name, group == name) for name in composition.GROUPS],
        ("f-confidence", "0.5,0.9", wrong & (confidence >= 0.5) & (confidence < 0.9)),
        ("f-confidence", "0,0.5", wrong & (confidence < 0.5)),
        ("f-ambiguity", "1,9", wrong & (bits >= 1)), ("f-ambiguity", "0,0.001", wrong & (bits == 0)),
        ("f-suspect", "yes", wrong & suspect), ("f-duplicate", "yes", wrong & flagged),
        ("f-duplicate", "no", wrong & ~flagged),
    ]  # fmt: skip
    for control, value, expected in cases:
        page.locator("#reset").click()
        page.select_option(f"#{control}", value)
        assert sorted(indices(page)) == np.flatnonzero(expected).tolist(), (control, value)
        assert page.locator("#count").inner_text().startswith(f"{expected.sum()} images")
    rank = np.full(content["n"], content["n"])
    for i, row in content["suspects"].items():
        rank[int(i)] = row["rank"]
    orders = {
        "confident": -confidence, "doubtful": confidence, "ambiguous": -bits, "suspect": rank,
        "near": np.array(content["distance"]), "index": np.arange(content["n"]),
    }  # fmt: skip
    for name, key in orders.items():
        page.locator("#reset").click()
        page.select_option("#f-order", name)
        assert indices(page) == sorted(np.flatnonzero(wrong), key=lambda i: (key[i], i)), name
    assert set(orders) == set(page.locator("#f-order option").evaluate_all("all => all.map(o => o.value)"))


def test_an_image_opens_with_all_that_is_known_of_it(page, report):
    content, train, test = report[1:]
    _, _, probabilities = facts(content)
    maps = sprite(content["checkpoints"][0]["maps"], content["map_size"])
    assert maps[: content["n"]].any((1, 2)).mean() > 0.9
    order = page.evaluate("shown")
    page.locator("#grid button").first.click()
    for step in range(3):
        i = order[step]
        assert page.locator("#h-image").inner_text().startswith(f"Image {i}: label {data.CLASSES[test.labels[i]]}")
        pixels = np.array(page.evaluate("[...$('large').getContext('2d').getImageData(0, 0, 28, 28).data]"))
        picture = pixels.reshape(28, 28, 4)[..., 0].astype(float)
        distances = ((test.images.float().numpy() - picture) ** 2).mean((1, 2))
        assert distances.argmin() == i  # of all test images, the one shown is this one
        heat = np.array(page.evaluate("[...$('heat').getContext('2d').getImageData(0, 0, 28, 28).data]"))
        assert (heat != pixels).any() == maps[i].any()
        assert ("finds no evidence" in page.locator("#heatname").inner_text()) == (not maps[i].any())
        rows = page.locator("#answers table").first.locator("tr").all_inner_texts()
        assert len(rows) == 10
        for row in rows:
            name, percent = row.split("\t")[0], row.split("\t")[-1].strip(" >%")
            assert float(percent) / 100 == pytest.approx(probabilities[i, data.CLASSES.index(name)], abs=2e-4)
        near = page.locator("#near li").evaluate_all("all => all.map(li => [+li.dataset.train, li.innerText])")
        assert len(near) == 5
        for number, text in near:
            assert text.startswith(data.CLASSES[train.labels[number]])
        votes = page.locator("#votes tr").all_inner_texts()
        assert len(votes) == len(content["votes"])
        for row, vote in zip(votes, content["votes"], strict=True):
            said = [line[i] for line in vote["predicted"]]
            for name, count in re.findall(r"([A-Z][\w/ -]+?) (\d+)(?:,|$)", row.split("\t")[1]):
                assert said.count(str(data.CLASSES.index(name))) == int(count)
        page.keyboard.press("ArrowRight") if step else page.locator("#next").click()
    page.keyboard.press("ArrowLeft")
    page.locator("#previous").click()
    assert page.locator("#h-image").inner_text().startswith(f"Image {order[1]}:")
    page.keyboard.press("Escape")
    assert not page.locator("#image").is_visible()
    page.locator("#grid button").nth(2).click()
    page.locator("#close").click()
    assert not page.locator("#image").is_visible()


def test_groups_calibration_coverage_map_and_theme(page, report):
    content = report[1]
    first = content["checkpoints"][0]
    for key, share in first["groups"].items():
        if share["count"]:
            page.locator(f"[data-group={key}]").click()
            assert len(indices(page)) == share["count"]
    assert f"{first['before']['ece']:.4f}" in page.locator("#before h3").inner_text()
    page.select_option("#calclass", "Shirt")
    assert f"{first['before']['classes']['Shirt']['error']:.4f}" in page.locator("#before h3").inner_text()
    if first["after"]:
        assert f"{first['after']['classes']['Shirt']['error']:.4f}" in page.locator("#after h3").inner_text()
    page.locator("#cover").fill("50")
    half = min(first["coverage"], key=lambda point: abs(point["coverage"] - 0.5))
    assert f"({half['n']} images" in page.locator("#covertold").inner_text()
    assert f"{100 * half['accuracy']:.2f}% right" in page.locator("#covertold").inner_text()
    if content["map"]:
        box = page.locator("#map").bounding_box()
        x, y = content["map"][2 * 7 : 2 * 7 + 2]
        page.locator("#map").click(position={"x": x / 1000 * box["width"], "y": y / 1000 * box["height"]})
        opened = int(re.match(r"Image (\d+)", page.locator("#h-image").inner_text())[1])
        near = np.reshape(content["map"], (-1, 2))
        assert np.abs(near[opened] - (x, y)).max() <= 4
        page.locator("#close").click()
    background = "getComputedStyle(document.body).backgroundColor"
    page.select_option("#theme", "light")
    light = page.evaluate(background)
    page.select_option("#theme", "dark")
    assert page.evaluate(background) != light == "rgb(255, 255, 255)"


def test_nothing_but_the_reports_own_script_and_style_is_run(browser, report, tmp_path):
    html = report[0].read_text()
    assert "unsafe" not in html
    injected = """<base href="https://example.org/"><style>body { display: none }</style><script>document.title = "in"
</script><img src="data:," onerror="document.title = 'in'" style="position: fixed"><form action="https://example.org/">
<button id="send">send</button></form>"""
    (tmp_path / "report.html").write_text(html.replace("<body>", f"<body>{injected}"))
    opened = browser.new_page()
    opened.goto(f"file://{tmp_path}/report.html")
    opened.wait_for_selector("body[data-ready]")
    assert opened.title().startswith("What the ")
    assert opened.url == opened.evaluate("document.baseURI") == f"file://{tmp_path}/report.html"
    assert opened.evaluate("getComputedStyle(document.querySelector('[onerror]')).position") == "static"
    with opened.expect_console_message(lambda message: "form-action" in message.text, timeout=5000):
        opened.evaluate("document.getElementById('send').click()")
    opened.close()


def test_the_matrix_and_an_image_by_keyboard_alone(page):
    page.locator("[data-true='0'][data-predicted='0']").focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.evaluate("[document.activeElement.dataset.true, document.activeElement.dataset.predicted]") == [
        "2",
        "0",
    ]
    page.keyboard.press("Enter")
    assert page.evaluate("[$('f-true').value, $('f-predicted').value, $('f-what').value]") == ["2", "0", "all"]
    page.locator("#grid button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#image").is_visible()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.parentElement.parentElement.id") == "grid"  # back where one was


def test_several_checkpoints_side_by_side(page, report):
    content = report[1]
    if len(content["checkpoints"]) < 2:
        pytest.skip("the report is of one checkpoint")
    answers = [each["predicted"] for each in content["checkpoints"]]
    differ = [i for i in range(content["n"]) if len({each[i] for each in answers}) > 1]
    page.select_option("#f-what", "all")
    page.select_option("#f-agree", "no")
    assert sorted(indices(page)) == differ
    assert page.locator("#disagreements").inner_text() == str(len(differ))
    page.locator("#grid button").first.click()
    assert page.locator("#answers table").count() == len(answers)
    page.locator("#close").click()
    page.select_option("#which", "1")
    counts = np.array(page.locator("#matrix button").all_inner_texts()).astype(int).reshape(10, 10)
    labels = np.array([int(c) for c in content["labels"]])
    second = np.array([int(c) for c in answers[1]])
    assert np.trace(counts) == (labels == second).sum()


def test_it_fits_a_phone_and_is_named_for_screen_readers(page, report):
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#grid button").first.click()
    assert page.evaluate("$('image').scrollWidth <= $('image').clientWidth")
    controls = page.locator("button, select, input")
    assert controls.evaluate_all("all => all.filter(e => !(e.innerText || e.ariaLabel || e.labels?.length))") == []
    assert report[0].stat().st_size < 8e6
